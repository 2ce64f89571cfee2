# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
What differs between the versions of Transformers that this package supports, in one place.

Transformers 5.24 renamed the argument and the output field `past_key_values` to `cache`. The models here call it
`cache` and take both names in every version: `model(ids, cache=cache)` and `model(ids, past_key_values=cache)` are the
same call, `output.cache` and `output.past_key_values` the same object. From 5.24 on the old name gives the deprecation
warning of Transformers.

An argument that no version passes is refused, so that another renaming is an error, not an argument without effect.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from packaging.version import Version
from transformers import modeling_outputs
from transformers.cache_utils import Cache
from transformers.utils import TransformersKwargs, logging
from transformers.utils.deprecation import deprecate_kwarg


logger = logging.get_logger(__name__)

NEWEST_TESTED = "5.24"  # the newest minor version that the whole test suite has passed with

# The name by which this version of Transformers passes the cache to a model and reads it from an output.
CACHE_NAME = "cache" if "cache" in modeling_outputs.BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
CACHE_NAMES = ("cache", "past_key_values")


def warn_if_untested(version: str) -> None:
    """Warn, once, that this version of Transformers is newer than [`NEWEST_TESTED`]."""
    if Version(version).release[:2] > Version(NEWEST_TESTED).release:
        logger.warning_once(
            f"Transformers {version} is newer than {NEWEST_TESTED}, the newest version that modeling_rtransformer was "
            "tested with; its results may differ"
        )


warn_if_untested(transformers.__version__)


def accepts_both_cache_names(function: Callable) -> Callable:
    """
    Decorate a function that takes the cache by one of [`CACHE_NAMES`] so that it takes the other name too.

    Raises:
        ValueError: on a call with a cache under both names.
    """
    if CACHE_NAME == "cache":
        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)(function)
    own = "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"
    [other] = set(CACHE_NAMES) - {own}

    @functools.wraps(function)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if other in kwargs:
            if own in kwargs:
                raise ValueError(f"`cache` and `past_key_values` are names of one argument; pass `{CACHE_NAME}` alone")
            kwargs[own] = kwargs.pop(other)
        return function(*args, **kwargs)

    return renamed


# What a forward takes without naming it: what Transformers passes to every model. `token_type_ids` is what tokenizers
# return whether or not a model reads it; `generate` hands the tokenizers that it was given on to each forward;
# `return_dict` and the names after it are read by decorators of Transformers.
PASSED_BY_TRANSFORMERS = {
    *TransformersKwargs.__annotations__,
    *("seq_idx", "cu_seq_lens_q", "is_causal", "token_type_ids", "tokenizer", "assistant_tokenizer"),
    *("return_dict", "use_cache", "debug_io"),
}


def refuse_unknown_arguments(arguments: Mapping[str, Any], known: Collection[str], also: Collection[str] = ()) -> None:
    """
    Check the `**kwargs` of a forward.

    Args:
        arguments: what was passed by names that are no parameter of the forward.
        known: its parameters, for the hint.
        also: further names that are right in this call.

    Raises:
        TypeError: one of them is not in [`PASSED_BY_TRANSFORMERS`]; with the nearest name that would be right.
    """
    for name in arguments:
        if name not in PASSED_BY_TRANSFORMERS and name not in also:
            near = difflib.get_close_matches(name, [*known, *PASSED_BY_TRANSFORMERS], n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise TypeError(f"`{name}` is not an argument of this model{hint}")


def named_cache(cache: Cache | None) -> dict[str, Cache | None]:
    """Keyword argument for a function or an output class of this version of Transformers."""
    return {CACHE_NAME: cache}


class _BothCacheNames:
    """An output of an older Transformers, read by `output.cache` and `output["cache"]` too."""

    @property
    def cache(self) -> Cache | None:
        return self.past_key_values

    def __getitem__(self, key):
        return super().__getitem__("past_key_values" if key == "cache" else key)


def _with_both_names(output: type) -> type:
    """The output class itself or, where it lacks the name `cache`, a class of the same name and fields that has it."""
    if "cache" in output.__dataclass_fields__:
        return output
    return dataclass(type(output.__name__, (_BothCacheNames, output), {"__doc__": output.__doc__}))


BaseModelOutputWithPast = _with_both_names(modeling_outputs.BaseModelOutputWithPast)
CausalLMOutputWithPast = _with_both_names(modeling_outputs.CausalLMOutputWithPast)
SequenceClassifierOutputWithPast = _with_both_names(modeling_outputs.SequenceClassifierOutputWithPast)


__all__ = ["BaseModelOutputWithPast", "CausalLMOutputWithPast", "SequenceClassifierOutputWithPast"]
