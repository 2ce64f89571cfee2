# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
R-Transformer and RSA heads as ordinary Transformers models.

Importing this package registers its model types with the Auto classes, and marks the classes so that `save_pretrained`
and `push_to_hub` put their code beside the weights.
"""

import importlib

import transformers
from transformers import PreTrainedConfig

from . import modeling_forecaster, modeling_rtransformer
from .configuration_forecaster import RTransformerForecasterConfig
from .configuration_rtransformer import RTransformerConfig
from .configuration_rtransformer import rem_heads as rem_heads
from .modeling_forecaster import *  # noqa: F403
from .modeling_rtransformer import *  # noqa: F403


CONFIGS = (RTransformerConfig, RTransformerForecasterConfig)


def model_classes(config_class: type[PreTrainedConfig] = RTransformerConfig) -> dict[str, type]:
    """The model class that each Auto class gives for one of [`CONFIGS`], from the map of its code."""
    classes = {}
    for auto_class, place in config_class.code.items():
        file, name = place.split(".")
        if auto_class != "AutoConfig":
            classes[auto_class] = getattr(importlib.import_module(f".{file}", __name__), name)
    return classes


for config_class in CONFIGS:
    transformers.AutoConfig.register(config_class.model_type, config_class)
    config_class.register_for_auto_class()
    for auto_class, model_class in model_classes(config_class).items():
        getattr(transformers, auto_class).register(config_class, model_class)
        model_class.register_for_auto_class(auto_class)

__version__ = "0.2.0"

__all__ = [
    *("model_classes", "rem_heads"),
    *(config_class.__name__ for config_class in CONFIGS),
    *modeling_rtransformer.__all__,
    *modeling_forecaster.__all__,
]
