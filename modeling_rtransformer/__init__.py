# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
R-Transformer and RSA heads as ordinary Transformers models.

Importing this package registers the model type `rtransformer` with the Auto classes, and marks the classes so that
`save_pretrained` and `push_to_hub` put their code beside the weights.
"""

import transformers
from transformers import AutoConfig

from .classification import (
    RTransformerForAudioFrameClassification,
    RTransformerForQuestionAnswering,
    RTransformerForSequenceClassification,
    RTransformerForTokenClassification,
)
from .configuration_rtransformer import RTransformerConfig, model_classes, rem_heads
from .forecasting import RTransformerForTimeSeriesPrediction
from .modeling_rtransformer import (
    RTransformerForCausalLM,
    RTransformerForMaskedLM,
    RTransformerModel,
    RTransformerPreTrainedModel,
)


AutoConfig.register(RTransformerConfig.model_type, RTransformerConfig)
RTransformerConfig.register_for_auto_class()
for auto_class, model_class in model_classes().items():
    getattr(transformers, auto_class).register(RTransformerConfig, model_class)
    model_class.register_for_auto_class(auto_class)

__version__ = "0.1.0"

__all__ = [
    "RTransformerConfig",
    "RTransformerForAudioFrameClassification",
    "RTransformerForCausalLM",
    "RTransformerForMaskedLM",
    "RTransformerForQuestionAnswering",
    "RTransformerForSequenceClassification",
    "RTransformerForTimeSeriesPrediction",
    "RTransformerForTokenClassification",
    "RTransformerModel",
    "RTransformerPreTrainedModel",
    "rem_heads",
]
