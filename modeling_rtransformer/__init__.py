# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
R-Transformer and RSA heads as ordinary Transformers models.

Importing this package registers its model types with the Auto classes, and marks the classes so that `save_pretrained`
and `push_to_hub` put their code beside the weights. Where PEFT is installed, it also registers the adapter method RSA
with PEFT, so that adapters of `add_rsa` load.
"""

import importlib
import importlib.metadata
from typing import Any

import transformers
from packaging.version import Version
from transformers import PreTrainedConfig
from transformers.utils import is_peft_available

from . import modeling_feedback, modeling_forecaster, modeling_latent_bottleneck, modeling_rtransformer
from .configuration_feedback import FeedbackTransformerConfig
from .configuration_forecaster import RTransformerForecasterConfig
from .configuration_latent_bottleneck import TemporalLatentBottleneckConfig
from .configuration_rtransformer import RTransformerConfig
from .configuration_rtransformer import rem_heads as rem_heads
from .modeling_feedback import *  # noqa: F403
from .modeling_forecaster import *  # noqa: F403
from .modeling_latent_bottleneck import *  # noqa: F403
from .modeling_rtransformer import *  # noqa: F403


OLDEST_PEFT = "0.21"
ADAPTER_NAMES = ("RsaConfig", "add_rsa")
HAS_PEFT = is_peft_available() and Version(importlib.metadata.version("peft")) >= Version(OLDEST_PEFT)
if HAS_PEFT:
    from .rsa_adapter import RsaConfig as RsaConfig
    from .rsa_adapter import add_rsa as add_rsa

CONFIGS = (
    RTransformerConfig,
    RTransformerForecasterConfig,
    FeedbackTransformerConfig,
    TemporalLatentBottleneckConfig,
)


def model_classes(config_class: type[PreTrainedConfig] = RTransformerConfig) -> dict[str, type]:
    """The model class that each Auto class gives for one of [`CONFIGS`], from the map of its code."""
    classes = {}
    for auto_class, place in config_class.code.items():
        file, name = place.split(".")
        if auto_class != "AutoConfig":
            classes[auto_class] = getattr(importlib.import_module(f".{file}", __name__), name)
    return classes


def __getattr__(name: str) -> Any:
    if name in ADAPTER_NAMES:  # reached only without PEFT
        raise ImportError(
            f"`{name}` needs PEFT {OLDEST_PEFT} or newer: install it with `pip install 'modeling-rtransformer[rsa]'`"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


for config_class in CONFIGS:
    transformers.AutoConfig.register(config_class.model_type, config_class)
    config_class.register_for_auto_class()
    for auto_class, model_class in model_classes(config_class).items():
        getattr(transformers, auto_class).register(config_class, model_class)
        model_class.register_for_auto_class(auto_class)

__version__ = "0.2.0"

__all__ = [
    *("model_classes", "rem_heads"),
    *(ADAPTER_NAMES if HAS_PEFT else ()),
    *(config_class.__name__ for config_class in CONFIGS),
    *modeling_rtransformer.__all__,
    *modeling_forecaster.__all__,
    *modeling_feedback.__all__,
    *modeling_latent_bottleneck.__all__,
]
