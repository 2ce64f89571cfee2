# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
RSA heads in the attention modules of existing Transformers models.

A head with a REM P returns, in place of softmax(...) V,

    (1 - gate) * softmax(...) V + gate * (P * visible) V

where `visible` is 1 for the pairs of a query and a key that the softmax may use and 0 for the others. This one rule
covers padding on either side, packed sequences, sliding windows, prefix masks and caches.

Nothing of the model is wrapped and no parameter is renamed. An attention module gets

    module.rsa       the REMs and gates, a child module
    module.config    a `ConfigView` of the model's config, in which `_attn_implementation` has the prefix "rsa|"
    a forward hook   which tells `rsa_attention_forward` where the queries stand among the cached keys

and the attention function of that name calls the one that the model would have called. So masks, `config.json` and
`set_attn_implementation` are those of the model.

Sources: Huang et al. 2023, "Encoding Recurrence into Transformers" (ICLR 2023), section 3; the attention interface of
Transformers, https://huggingface.co/docs/transformers/attention_interface
"""

# B batch, H attention heads, R heads with a REM, T queries, L keys, d head size

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .library_versions import CACHE_NAMES
from .positions import packed_segment_ids
from .rsa_encoding import RsaEncoding, VisibleKeys, read_visible_keys


PREFIX = "rsa|"
# Parts of the names that cross-attention modules and their classes have in Transformers.
CROSS_ATTENTION_NAMES = ("cross", "encoder_attn", "encdec", "encoder_attention")


class AttentionCall(NamedTuple):
    """What the forward of an attention class calls: `interface.get_interface(implementation, eager)`."""

    interface: AttentionInterface
    eager: Callable
    passes_kwargs: bool  # whether forward takes further keyword arguments, which reach the attention function


_CALLS: dict[type, AttentionCall | None] = {}


def attention_call(attention_class: type[nn.Module]) -> AttentionCall | None:
    """
    Which attention function the forward of a class calls, read from its source; None if it does not ask the attention
    interface of Transformers. All classes that ask write `get_interface(self.config._attn_implementation, eager)`.
    """
    if attention_class not in _CALLS:
        _CALLS[attention_class] = _read_attention_call(attention_class)
    return _CALLS[attention_class]


def _read_attention_call(attention_class: type[nn.Module]) -> AttentionCall | None:
    forward = inspect.unwrap(attention_class.forward)
    try:
        source = textwrap.dedent(inspect.getsource(forward))
    except (OSError, TypeError):  # a class without a source file
        return None
    if "get_interface" not in source:
        return None
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get_interface":
            interface, implementation, eager = (ast.unparse(part) for part in (node.func.value, *node.args))
            if implementation == "self.config._attn_implementation":
                names = forward.__globals__
                kinds = {parameter.kind for parameter in inspect.signature(forward).parameters.values()}
                return AttentionCall(names[interface], names[eager], inspect.Parameter.VAR_KEYWORD in kinds)
    return None


def is_cross_attention(name: str, module: nn.Module) -> bool:
    """Whether an attention module attends to another sequence than its own, by its class and its own name."""
    words = f"{type(module).__name__} {name.rpartition('.')[2]}".lower()
    return getattr(module, "is_cross_attention", False) or any(word in words for word in CROSS_ATTENTION_NAMES)


def attention_sites(model: nn.Module) -> dict[str, nn.Module]:
    """The self-attention modules of a model that can have RSA heads, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if attention_call(type(module)) is not None and not is_cross_attention(name, module)
    }


def number_of_heads(module: nn.Module) -> int:
    """H of an attention module: its own attribute, or the field of its config."""
    for name in ("num_heads", "num_attention_heads", "n_heads"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    return module.config.num_attention_heads


class ConfigView:
    """
    A model's config as an attention module with RSA heads sees it: the same object in all but one property, which
    names [`rsa_attention_forward`] in place of the attention function of the model.
    """

    def __init__(self, config: Any):
        self.__dict__["base_config"] = config

    @property
    def _attn_implementation(self) -> str:
        name = PREFIX + (self.base_config._attn_implementation or "eager")
        if name not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(name, rsa_attention_forward)
        return name

    def __getattr__(self, name: str) -> Any:
        if name == "base_config":  # asked for by copy and pickle before it is there
            raise AttributeError(name)
        return getattr(self.base_config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.base_config, name, value)


class ModuleView:
    """An attention module with the model's own config, for functions that read the implementation's name from it."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.config = module.config.base_config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def attach(module: nn.Module, rsa: nn.Module) -> None:
    """Give an attention module its child `rsa`, a module with `active_encoding()`, and all that calls it."""
    module.rsa = rsa
    module.config = ConfigView(module.config)
    module.config._attn_implementation  # noqa: B018  registers the function, before a compiler looks for it
    module.register_forward_pre_hook(place_queries, with_kwargs=True)


def detach(module: nn.Module) -> None:
    """Undo [`attach`]."""
    module.config = module.config.base_config
    del module.rsa
    for number, hook in list(module._forward_pre_hooks.items()):
        if hook is place_queries:
            del module._forward_pre_hooks[number], module._forward_pre_hooks_with_kwargs[number]


class QueryPlace(NamedTuple):
    """
    Where queries stand in a cache.

    Args:
        first: the first query's place among the keys that `cache.update` will return.
        keys: how many it will return.
    """

    first: int | torch.Tensor
    keys: int
    cache: Cache


def place_queries(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """
    Forward pre-hook of an attention module: adds `rsa_place` to the keyword arguments where there is a cache.

    It asks the cache what the creation of the mask asks, before the cache is updated.

    Raises:
        ValueError: a call that RSA heads cannot serve, and what to do instead.
    """
    if kwargs.get("key_value_states") is not None:
        raise ValueError("`key_value_states` makes this module a cross-attention, which cannot have RSA heads")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _refuse_split_sequences()
    cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
    if cache is None:
        for name in CACHE_NAMES:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` is a {type(kwargs[name]).__name__}, in which keys are not in the order of positions: "
                    "RSA heads need a `Cache` (`generate` makes one; `generate_batch` cannot be used)"
                )
        return None
    if not attention_call(type(module)).passes_kwargs:
        raise ValueError(f"{type(module).__name__} passes no keyword arguments on: RSA heads need `use_cache=False`")
    hidden_states = args[0] if args else kwargs["hidden_states"]
    keys, offset = cache.get_mask_sizes(hidden_states.shape[1], module.layer_idx)
    first = cache.get_query_offset(module.layer_idx) - offset
    return args, {**kwargs, "rsa_place": QueryPlace(first, keys, cache)}


def _refuse_split_sequences() -> None:
    """Raise where Accelerate splits sequences over processes: a process then does not know the places of its keys."""
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    settings = None if state is None else state._shared_state.get("parallelism_config")
    for field in ("cp_size", "sp_size"):
        size = getattr(settings, field, None) or 1
        if size > 1:
            raise ValueError(
                f"`parallelism_config.{field}` must be 1, got {size}: with RSA heads sequences cannot be split over "
                "processes"
            )


class Call(NamedTuple):
    """One call of an attention function, as far as it says which keys the T queries see."""

    mask: Any
    is_flash: bool
    place: QueryPlace | None
    options: dict[str, Any]
    queries: int  # T
    keys: int  # L

    @property
    def first(self) -> int | torch.Tensor:
        return 0 if self.place is None else self.place.first

    @property
    def keys_are_own(self) -> bool:
        """
        Whether the first T keys are the queries' own positions. Without a mask every function but flash attention
        takes them to be; so Transformers calls it with an empty static cache, whose `first` is a tensor.
        """
        without_past = isinstance(self.first, int) and self.first == 0
        return without_past or (self.mask is None and not self.is_flash and self.queries > 1)

    def positions(self, device: torch.device) -> torch.Tensor:
        """Places of the queries among the keys: `(T,)`."""
        return self.first + torch.arange(self.queries, device=device)

    def visible(self, device: torch.device) -> torch.Tensor | None:
        """True where a query sees a key, `(B or 1, 1 or H, 1 or T, L)`; None if the mask hides nothing."""
        if self.is_flash:
            return self._visible_to_flash(device)
        if self.mask is None:
            return None
        mask = self.mask
        if not isinstance(mask, torch.Tensor):  # a BlockMask of flex attention
            from torch.nn.attention.flex_attention import create_mask

            return create_mask(mask.mask_mod, *mask.shape[:2], self.queries, self.keys, device=str(device))
        if mask.dim() != 4:
            raise ValueError(f"the mask of an attention function must have 4 dimensions, got {tuple(mask.shape)}")
        mask = mask[..., : self.keys]
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2

    def _visible_to_flash(self, device: torch.device) -> torch.Tensor | None:
        """Flash attention has a mask of padded keys `(B, L)`, and a window as an option."""
        visible, window = None, self.options.get("sliding_window")
        if window is not None:
            distance = self.positions(device)[:, None] - torch.arange(self.keys, device=device)
            visible = (distance < window)[None, None]
        if self.mask is not None:
            padding = self.mask[:, None, None, :].bool()
            visible = padding if visible is None else visible & padding
        return visible

    def visible_keys(self, is_causal: bool, device: torch.device) -> VisibleKeys | None:
        """What the queries see of their own positions; None if the mask has another form or may not be read."""
        if self.is_flash:
            return self._keys_of_flash(is_causal)
        if self.mask is None:
            return VisibleKeys()
        if not isinstance(self.mask, torch.Tensor) or not _may_be_read(self.mask):
            return None
        if self.mask.is_inference():  # can change in place without notice
            return self._read(is_causal, device)
        # Once for all layers that are given this mask: the result is kept on it.
        key = (self.mask._version, is_causal, self.queries)
        kept = getattr(self.mask, "rsa_visible_keys", None)
        if kept is None or kept[0] != key:
            kept = self.mask.rsa_visible_keys = (key, self._read(is_causal, device))
        return kept[1]

    def _read(self, is_causal: bool, device: torch.device) -> VisibleKeys | None:
        visible = self.visible(device)[..., : self.queries]
        return read_visible_keys(visible.expand(-1, -1, self.queries, -1), is_causal)

    def _keys_of_flash(self, is_causal: bool) -> VisibleKeys:
        window = self.options.get("sliding_window")
        if window is not None and not is_causal:
            raise ValueError("a `sliding_window` to both sides is not supported with RSA heads and flash attention")
        reach = None if window is None else window - 1
        if self.mask is not None:
            if self.mask.shape[1] != self.queries:
                raise ValueError(f"the mask must have {self.queries} keys, got {self.mask.shape[1]}")
            return VisibleKeys(self.mask.bool(), None, reach)
        cu_seq_lens, position_ids = self.options.get("cu_seq_lens_q"), self.options.get("position_ids")
        segment_ids = None
        if cu_seq_lens is not None:
            segment_ids = packed_segment_ids(1, self.queries, position_ids=None, seq_idx=None, cu_seq_lens=cu_seq_lens)
        elif position_ids is not None and position_ids.shape == (1, self.queries):
            segment_ids = find_packed_sequence_indices(position_ids)
        return VisibleKeys(None, segment_ids, reach)


def _may_be_read(mask: torch.Tensor) -> bool:
    """Whether the program may depend on the numbers of a mask: not in a graph that is being compiled or recorded."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or mask.device.type == "meta":
        return False
    return not (mask.is_cuda and torch.cuda.is_current_stream_capturing())


class DecodingTable(NamedTuple):
    """What one module needs for the steps of a generation, from its parameters alone."""

    entries: torch.Tensor  # (R, S) gate * P at the distances S - 1 to 0
    complement: torch.Tensor  # (H, 1) 1 - gate

    @classmethod
    def of(cls, encoding: RsaEncoding, call: Call, dtype: torch.dtype) -> "DecodingTable | None":
        """
        The table of a call with one query of a cache, where no gradient is wanted and nothing is compiled.

        P depends on distances alone, so one table serves all steps. It is kept in the cache, and made anew when a
        parameter has changed or there are more keys than distances.
        """
        if call.place is None or call.queries > 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        parameters = (encoding.eta, encoding.nu, encoding.theta, encoding.mu)
        if any(parameter.is_inference() for parameter in parameters):  # can change in place without notice
            return None
        key = (dtype, *((parameter.data_ptr(), parameter._version) for parameter in parameters))
        tables = call.place.cache.__dict__.setdefault("rsa_tables", {})
        table = tables.get(key)
        if table is None or table.entries.shape[1] < call.keys:
            size = max(256, 2 ** call.keys.bit_length())
            last = torch.full((1,), size - 1, device=encoding.mu.device)
            table = tables[key] = cls(encoding.rows(last, size)[:, 0].to(dtype), encoding.complement().to(dtype))
        return table

    def rows(self, call: Call) -> torch.Tensor:
        """gate * P of the query: `(R, 1, L)`."""
        size = self.entries.shape[1]
        if isinstance(call.first, int) and call.first == call.keys - 1:
            return self.entries[:, None, size - call.keys :]
        distance = call.first - torch.arange(call.keys, device=self.entries.device)
        return self.entries[:, None].index_select(2, size - 1 - distance.clamp(min=0))  # zero for keys yet to come


def visible_rows(encoding: RsaEncoding, rows: torch.Tensor, call: Call) -> torch.Tensor:
    """gate * (P * visible) `(B or 1, R, T, L)` from gate * P `(R, T, L)`."""
    visible = call.visible(rows.device)
    if visible is None:
        return rows[None]
    return rows * (visible[:, encoding.head_index] if visible.shape[1] > 1 else visible)


def rsa_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *args: Any,
    rsa_place: QueryPlace | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The attention function of a module with RSA heads: the model's own function, and the REMs.

    Returns:
        the output `(B, T, H, d)` and, from a function that has them, the weights `(B, H, T, L)` that multiply the
        values: for an RSA head gate, softmax and REM together.

    Raises:
        ValueError: a call that RSA heads cannot serve, and what to do instead.
    """
    implementation = module.config.base_config._attn_implementation or "eager"
    encoding = module.rsa.active_encoding()
    if encoding is not None:
        _check_call(module, encoding, implementation, query, key, rsa_place, kwargs)
    chosen = attention_call(type(module))
    function = chosen.interface.get_interface(implementation, chosen.eager)
    base = module if implementation in ("eager", "sdpa", "flex_attention") else ModuleView(module)
    output, weights = function(base, query, key, value, attention_mask, *args, **kwargs)
    if encoding is None:
        return output, weights

    call = Call(attention_mask, "flash" in implementation, rsa_place, kwargs, query.shape[2], key.shape[2])
    device, selected = value.device, encoding.selection()
    if weights is not None:  # the definition, from the matrix
        complement = encoding.complement()
        matrix = visible_rows(encoding, encoding.rows(call.positions(device), call.keys), call)
        weights = weights * complement[:, :, None].to(weights.dtype)
        weights = weights.index_add(1, encoding.head_index, matrix.to(weights.dtype).expand(len(weights), -1, -1, -1))
        product = encoding.times_values(matrix, value)
    else:
        table = DecodingTable.of(encoding, call, value.dtype)
        complement = encoding.complement() if table is None else table.complement
        keys = call.visible_keys(encoding.is_causal, device) if call.keys_are_own else None
        if keys is not None:
            product = encoding.scan(value[:, :, : call.queries], keys)
        else:
            rows = encoding.rows(call.positions(device), call.keys) if table is None else table.rows(call)
            product = encoding.times_values(visible_rows(encoding, rows, call), value)
    mixed = encoding.mix(output, product, complement.to(output.dtype), selected)
    return mixed.contiguous(), weights  # the layout of the model's own functions, and so its rounding


def _check_call(module, encoding, implementation, query, key, place, options) -> None:
    if query.shape[1] != encoding.num_attention_heads:
        raise ValueError(
            f"the attention module has {encoding.num_attention_heads} heads, got queries of {query.shape[1]}: with RSA "
            "heads they cannot be split over processes (tensor parallelism)"
        )
    expected = query.shape[2] if place is None else place.keys
    if key.shape[2] != expected:
        source = "of the same positions" if place is None else "of this layer's cache"
        raise ValueError(
            f"got {query.shape[2]} queries and {key.shape[2]} keys, where RSA heads need {expected} keys {source}: "
            "cross-attention and layers that share the keys of another cannot have RSA heads"
        )
    for is_causal in (options.get("is_causal"), module.is_causal):
        if is_causal is not None and bool(is_causal) != encoding.is_causal:
            raise ValueError(f"`is_causal` must be {encoding.is_causal}, as it was when RSA was added, got {is_causal}")
    if implementation.startswith("paged"):
        raise ValueError(f"{implementation!r} (`generate_batch`) cannot be used with RSA heads; `generate` can")


__all__ = ["attach", "attention_sites", "detach", "rsa_attention_forward"]
