# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
`add_rsa`: RSA heads in a pretrained Transformers model, as an adapter of PEFT.

    model = add_rsa(model, regular=4)                      # the same as model.add_adapter(RsaConfig(regular=4))
    model = get_peft_model(model, RsaConfig(regular=4))    # PEFT's own way

The adapter's gates begin at zero, so that the model's outputs are those of before, and are learned with the REMs. The
model's parameters are frozen. Saving, loading, switching, disabling and deleting are PEFT's; `unload` gives the base
model back. Other than LoRA, an RSA head cannot be merged into weights.

Importing this file registers the method with PEFT, under the name RSA.

Sources: Huang et al. 2023, "Encoding Recurrence into Transformers" (ICLR 2023); PEFT, https://huggingface.co/docs/peft
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

from .configuration_rtransformer import REM_GATES, nearest, rem_heads
from .rsa_attention import attach, attention_call, attention_sites, detach, is_cross_attention, number_of_heads
from .rsa_encoding import GATE_FORMS, RsaEncoding


COUNTS = (
    *("regular", "first_cyclical", "second_cyclical"),
    *("dilated_regular", "dilated_first_cyclical", "dilated_second_cyclical"),
)
NEEDED = (
    "\nThis adapter is of the method RSA. Before you load it, run `import modeling_rtransformer` (the package "
    "modeling-rtransformer with its extra `rsa`).\n"
)


def _add_peft_type() -> None:
    """PEFT registers methods of others, but its names are a closed enumeration: one member is added by force."""
    if "RSA" not in PeftType.__members__:
        member = str.__new__(PeftType, "RSA")
        member._name_ = member._value_ = "RSA"
        PeftType._member_map_["RSA"] = PeftType._value2member_map_["RSA"] = member
        PeftType._member_names_.append("RSA")
        type.__setattr__(PeftType, "RSA", member)


_add_peft_type()


@dataclass
class RsaConfig(PeftConfig):
    """
    Which heads of which attention modules get a REM, and how it is gated.

    Args:
        regular, first_cyclical, second_cyclical (`int`, defaults to 2, 1 and 1), dilated_regular,
            dilated_first_cyclical, dilated_second_cyclical (`int`, defaults to 0):
            The paper's (k1, ..., k6): heads of each kind in a layer, laid out in this order from the first head on.
        dilations (`list[int]`, *optional*): one dilation for each dilated head.
        gate (`str`, defaults to `"head"`): one gate a `"head"` or one a `"layer"` (the paper).
        gate_form (`str`, defaults to `"zero"`):
            `"zero"`: gate = tanh(mu) with mu = 0 at first, which leaves the model's outputs as they are;
            `"sigmoid"`: the paper's gate = sigmoid(mu), with mu uniform on [-3, 3] at first.
        layers (`list[int]`, *optional*): numbers of the layers that get RSA heads, as in module names; all if None.
        target_modules (`list[str]` or `str`, *optional*):
            Names of self-attention modules, or a regular expression, as in PEFT. If None it is set to all of the model,
            or of `layers`, when the adapter is added.
        modules_to_save (`list[str]`, *optional*): modules of the model that are trained too, such as a new head.

    Raises:
        ValueError: a value out of range or an unknown field, with what would be right.
    """

    regular: int = 2
    first_cyclical: int = 1
    second_cyclical: int = 1
    dilated_regular: int = 0
    dilated_first_cyclical: int = 0
    dilated_second_cyclical: int = 0
    dilations: list[int] | None = None
    gate: str = "head"
    gate_form: str = "zero"
    layers: list[int] | None = None
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "RsaConfig":
        # PEFT drops fields that it does not know with a warning. A field of a later version can change what an adapter
        # computes, so here it is an error, as is a misspelt one.
        names = [entry.name for entry in fields(cls)]
        for name in kwargs:
            if name not in names:
                raise ValueError(f"`{name}` is not a field of RsaConfig{nearest(name, names)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.RSA
        for name in COUNTS:
            self._require(_is_count(getattr(self, name)), name, "an integer of at least 0")
        if not any(getattr(self, name) for name in COUNTS):
            raise ValueError(f"there is nothing to train: at least one of {', '.join(COUNTS)} must be 1 or more")
        dilations = [] if self.dilations is None else self.dilations
        valid = isinstance(dilations, list) and all(_is_count(dilation) and dilation >= 1 for dilation in dilations)
        self._require(valid, "dilations", "a list of integers of at least 1")
        self.head_kinds(sum(getattr(self, name) for name in COUNTS))  # checks the number of dilations
        for name, names in (("gate", REM_GATES), ("gate_form", GATE_FORMS)):
            value = getattr(self, name)
            self._require(value in names, name, f"one of {', '.join(names)}", nearest(value, names))
        valid = isinstance(self.layers, list) and self.layers and all(_is_count(layer) for layer in self.layers)
        self._require(self.layers is None or valid, "layers", "None or a list of layer numbers, from 0 on")

    def _require(self, holds: bool, name: str, requirement: str, hint: str = "") -> None:
        if not holds:
            raise ValueError(f"`{name}` must be {requirement}, got {getattr(self, name)!r}{hint}")

    def head_kinds(self, num_attention_heads: int) -> list[tuple[int, str, int]]:
        """`(head, kind, dilation)` of each head with a REM, of a module with so many heads."""
        counts = {name: getattr(self, name) for name in COUNTS}
        heads = rem_heads(num_attention_heads, **counts, dilations=self.dilations)
        kinds = zip(heads["rem_kinds"], heads["rem_dilations"])
        return [(head, kind, dilation) for head, (kind, dilation) in enumerate(kinds) if kind != "none"]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and into README.md what the adapter needs to be loaded."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        if NEEDED.strip() not in text:
            card.write_text(text + NEEDED, encoding="utf-8")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class RsaLayer(nn.Module, BaseTunerLayer):
    """The child `rsa` of an attention module: the [`RsaEncoding`] of each RSA adapter."""

    adapter_layer_names = ("rsa_encoding",)

    def __init__(self, adapter_name: str):
        super().__init__()
        self.rsa_encoding = nn.ModuleDict()
        self._active_adapter = adapter_name

    def add(self, adapter_name: str, config: RsaConfig, attention: nn.Module) -> None:
        """Make the REMs of an adapter for an attention module, with initial values."""
        weight = next(attention.parameters())
        num_heads = number_of_heads(attention)
        encoding = RsaEncoding(
            config.head_kinds(num_heads), num_heads, config.gate, attention.is_causal, config.gate_form
        )
        if not encoding.mu.is_meta:  # PEFT makes no values where it is going to load them
            encoding.init_parameters()
            encoding.to(
                weight.device, torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else None
            )
        self.rsa_encoding[adapter_name] = encoding
        self.set_adapter(self.active_adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        mine = [name for name in names if name in self.rsa_encoding]
        if len(mine) > 1:
            raise ValueError(
                f"one RSA adapter can be active at a time, got {', '.join(mine)}; add them up is undefined"
            )
        super().set_adapter(names, inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self.rsa_encoding:  # the indices have been on the attention module's device from the start
            encoding = self.rsa_encoding[adapter_name]
            encoding.to(encoding.head_index.device if device is None else device)

    def active_encoding(self) -> RsaEncoding | None:
        """The REMs in use; None if no RSA adapter is active."""
        if not self.disable_adapters:
            for name in self.active_adapters:
                if name in self.rsa_encoding:
                    return self.rsa_encoding[name]
        return None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        raise ValueError(NO_MERGE)


NO_MERGE = "RSA heads cannot be merged into weights: keep the adapter, or call `unload()` for the base model"


class RsaModel(BaseTuner):
    """PEFT's tuner of the method RSA: it gives each targeted attention module a child and changes nothing else."""

    prefix = "rsa_"
    tuner_layer_cls = RsaLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: RsaConfig, model_config: dict) -> RsaConfig:
        peft_config.target_modules = find_target_modules(self.model, peft_config)
        return peft_config

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if not isinstance(getattr(target, "rsa", None), RsaLayer):
            attach(target, RsaLayer(adapter_name))
        target.rsa.add(adapter_name, peft_config, target)

    def _check_new_adapter_config(self, config: RsaConfig) -> None:
        super()._check_new_adapter_config(config)
        [adapter_name] = [name for name, other in self.peft_config.items() if other is config]
        refuse_second(self.model, adapter_name)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        if merge:
            raise ValueError(NO_MERGE)
        for module in list(self.model.modules()):
            if isinstance(getattr(module, "rsa", None), RsaLayer):
                detach(module)
        del self.model.peft_config
        return self.model


def refuse_second(model: nn.Module, adapter_name: str) -> None:
    """Raise ValueError if a model has an RSA adapter of this name."""
    for module in model.modules():
        if isinstance(module, RsaLayer) and adapter_name in module.rsa_encoding:
            raise ValueError(
                f"the model has an RSA adapter {adapter_name!r} already: choose another `adapter_name`, or delete that "
                "one with `delete_adapter`"
            )


def find_target_modules(model: nn.Module, config: RsaConfig) -> list[str] | str:
    """
    The attention modules of a model that an adapter adds RSA heads to, checked before anything is changed.

    Raises:
        ValueError: no such module, one that cannot have RSA heads, or fewer heads than the config asks for.
    """
    sites = attention_sites(model)
    if config.target_modules is not None:
        chosen = {}
        for name, module in model.named_modules():
            if name and RsaModel._check_target_module_exists(config, name):
                if name not in sites:
                    raise ValueError(f"`target_modules` has {name}: {_why_not(name, module)}")
                chosen[name] = module
        if not chosen:
            raise ValueError(f"`target_modules` {config.target_modules} are no modules of {type(model).__name__}")
    else:
        if not sites:
            raise ValueError(_no_sites(model))
        numbers = {name: layer_number(name) for name in sites}
        missing = set(config.layers or []) - set(numbers.values())
        if missing:
            available = sorted({number for number in numbers.values() if number is not None})
            raise ValueError(f"`layers` must be among {available}, got {sorted(missing)}")
        chosen = {name: site for name, site in sites.items() if config.layers is None or numbers[name] in config.layers}
    for name, module in chosen.items():
        _check_site(name, module, config)
    return list(chosen) if config.target_modules is None else config.target_modules


def layer_number(name: str) -> int | None:
    """The last number in the name of a module: 3 for `model.layers.3.self_attn`."""
    return next((int(part) for part in reversed(name.split(".")) if part.isdigit()), None)


def _why_not(name: str, module: nn.Module) -> str:
    kind = type(module).__name__
    if is_cross_attention(name, module):
        return f"{kind} is a cross-attention, where a REM has no meaning"
    return f"{kind} is no self-attention that calls the attention interface of Transformers"


def _no_sites(model: nn.Module) -> str:
    classes = sorted(
        {
            type(module).__name__
            for name, module in model.named_modules()
            if "Attention" in type(module).__name__ and attention_call(type(module)) is None
        }
    )
    named = f" ({', '.join(classes)})" if classes else ""
    return (
        f"{type(model).__name__} cannot have RSA heads: none of its self-attention modules{named} calls the attention "
        "interface of Transformers"
    )


def _check_site(name: str, module: nn.Module, config: RsaConfig) -> None:
    wanted, heads = sum(getattr(config, count) for count in COUNTS), number_of_heads(module)
    if wanted > heads:
        raise ValueError(f"{name} has {heads} heads, got {wanted} with a REM: lower {', '.join(COUNTS[:3])} or others")
    if getattr(module, "reorder_and_upcast_attn", False):
        raise ValueError("`reorder_and_upcast_attn` must be False: with it GPT-2 does not call the attention interface")
    if not hasattr(module, "is_causal"):
        raise ValueError(f"{name} ({type(module).__name__}) does not say whether it is causal")
    if next(module.parameters()).is_meta:
        raise ValueError(f"{name} is on the meta device: load the model's weights before you add RSA heads")


def add_rsa(model: PreTrainedModel, adapter_name: str = "default", **options: Any) -> PreTrainedModel:
    """
    Add RSA heads to a pretrained model, in place: `model.add_adapter(RsaConfig(**options), adapter_name)`.

    The model's own parameters are frozen, and the REMs and gates are trained; they need a larger learning rate than the
    matrices of LoRA do. `save_pretrained` and `push_to_hub` then write the adapter alone.

    Args:
        model: any Transformers model whose self-attention calls the attention interface.
        adapter_name: a name of your choice, when a model has several adapters.
        options: fields of [`RsaConfig`].

    Returns:
        the same model.

    Raises:
        TypeError, ValueError: a model or an option that does not fit, before the model is changed.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> from modeling_rtransformer import add_rsa

    >>> model = AutoModelForCausalLM.from_pretrained("openai-community/gpt2")
    >>> model = add_rsa(model, regular=4, first_cyclical=2, second_cyclical=2)
    ```
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a Transformers model, got {type(model).__name__}")
    config = RsaConfig(**options)
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        raise ValueError(
            f"this version of Transformers needs PEFT {MIN_PEFT_VERSION} for adapters of its own; "
            "`peft.get_peft_model(model, RsaConfig(...))` works with the PEFT that is installed"
        ) from error
    refuse_second(model, adapter_name)
    find_target_modules(model, config)
    model.add_adapter(config, adapter_name)
    return model


register_peft_method(name="rsa", config_cls=RsaConfig, model_cls=RsaModel)

__all__ = ["RsaConfig", "add_rsa"]
