"""
What the baselines of causal sequence models share: their input, their heads, and what padding does.

The heads are those of `modeling_rtransformer` over another base model: same arguments, labels, losses and errors, so a
recipe's task runs unchanged. Padding, on either side, changes no output: the real positions are moved to the front
(`real_first`), where a causal model sees nothing before them, and their outputs are moved back.
"""

# B batch, T positions, D hidden size, F input features

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioFrameClassification,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.generation import GenerationMixin

from modeling_rtransformer.classification import FrameClassificationHead, SequenceClassificationHead, real_positions
from modeling_rtransformer.inputs import embed_inputs
from modeling_rtransformer.language_modeling import CausalLMHead
from modeling_rtransformer.library_versions import BaseModelOutputWithPast, refuse_unknown_arguments


# Arguments of a forward, for the hint where a name is misspelt. What the heads pass and a baseline has no use for:
# positions, whose order is all that it reads, and the cache, which it never fills.
UNUSED = ("position_ids", "cache", "use_cache")
INPUTS = ("input_ids", "attention_mask", "inputs_embeds", "input_values", "labels")


@strict
class BaselineConfig(PreTrainedConfig):
    """
    Fields of every baseline that reads a sequence from left to right.

    Args:
        vocab_size: token ids, of the input and of a language model's output.
        hidden_size: width D of the embeddings and of every layer.
        num_hidden_layers: layers.
        num_input_features: if set, the input is `input_values` of shape (batch, length, features), read as they are.
        tie_word_embeddings: a language model's head uses the embedding's weight.
        lm_head_bias: a bias in that head.
        embedding_dropout: dropout of the embedded tokens.
        hidden_dropout: dropout between or in the layers, as the model says.
        output_dropout: dropout before the head.
        initializer_range: standard deviation of the initial embeddings and heads. Without LayerNorms to scale them up,
            small embeddings may keep a model from learning: an LSTM did not learn parity with 0.02.

    Raises:
        ValueError: a value out of range, with the field, the value and what would be right.
    """

    vocab_size: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_input_features: int | None = None
    tie_word_embeddings: bool = True
    lm_head_bias: bool = True
    embedding_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    output_dropout: float | int = 0.0
    initializer_range: float = 0.1
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    is_causal = True  # not a field: each of these models sees the past only

    def __post_init__(self, **kwargs) -> None:
        if self.num_input_features is not None:
            self.tie_word_embeddings = False
        super().__post_init__(**kwargs)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_input_features"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("embedding_dropout", "hidden_dropout", "output_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}")

    @property
    def input_size(self) -> int:
        """Width of what the first layer reads."""
        return self.hidden_size if self.num_input_features is None else self.num_input_features


class BaselinePreTrainedModel(PreTrainedModel):
    """What the base models and their heads share."""

    config: BaselineConfig
    base_model_prefix = "model"

    def __init__(self, config: BaselineConfig):
        super().__init__(config)
        if config.num_input_features is not None:
            self.main_input_name = "input_values"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Embeddings and heads normal(0, `initializer_range`), biases 0; the layers keep what they were made with."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            super()._init_weights(module)


class BaselineModel(BaselinePreTrainedModel):
    """
    The embedded input and the layers, without a head. A baseline makes its layers in `make_layers` and runs them in
    `run`, which never sees padding before a real position.
    """

    pretrained_class = BaselinePreTrainedModel

    def __init__(self, config: BaselineConfig):
        super().__init__(config)
        if config.num_input_features is None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        else:
            self.embed_values = nn.Identity()
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = self.make_layers(config)
        self.output_dropout = nn.Dropout(config.output_dropout)
        self.post_init()

    @staticmethod
    def make_layers(config: BaselineConfig) -> nn.Module:
        """The layers, from `config.input_size` to `config.hidden_size`."""
        raise NotImplementedError

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, T, input size) -> (B, T, D)"""
        raise NotImplementedError

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Exactly one of `input_ids` `(B, T)`, `inputs_embeds` `(B, T, D)` and, in a model with `num_input_features`,
        `input_values` `(B, T, F)`; `attention_mask` `(B, T)` is 0 where padded. Each row is one sequence: a cache,
        packed sequences and masks of four dimensions raise a ValueError.
        """
        refuse_unknown_arguments(kwargs, INPUTS, UNUSED)
        for name in ("cache", "seq_idx", "cu_seq_lens_q"):
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` must be left out: a baseline reads each row as one whole sequence")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"`attention_mask` must have the shape (batch, length), got {tuple(attention_mask.shape)}")
        inputs = embed_inputs(self, input_ids, inputs_embeds, input_values)
        if input_values is None:
            inputs = self.embedding_dropout(inputs)
        real = real_positions(attention_mask, inputs.shape[1])
        if real is None:
            return BaseModelOutputWithPast(last_hidden_state=self.output_dropout(self.run(inputs)))
        order = real_first(real)
        outputs = self.run(inputs.gather(1, order[..., None].expand_as(inputs)))
        outputs = outputs.gather(1, order.argsort(dim=1)[..., None].expand_as(outputs))
        return BaseModelOutputWithPast(last_hidden_state=self.output_dropout(outputs))


def real_first(real: torch.Tensor) -> torch.Tensor:
    """`(B, T)`: the positions in order, the real ones before the others; from which are real, `(B, T)`, bool."""
    return real.logical_not().long().argsort(dim=1, stable=True)


# The heads that a baseline gets, by Auto class; the classes that they are made of stand before the baseline's own.
HEADS = {
    AutoModelForCausalLM: ((CausalLMHead,), (GenerationMixin,)),
    AutoModelForSequenceClassification: ((SequenceClassificationHead,), ()),
    AutoModelForAudioFrameClassification: ((FrameClassificationHead,), ()),
}


def register(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> None:
    """
    Make the three heads of a base model and register all of it with the Auto classes.

    Args:
        model_class: named `...Model`; its `pretrained_class` is the `PreTrainedModel` that its heads share.
    """
    AutoConfig.register(config_class.model_type, config_class)
    AutoModel.register(config_class, model_class)
    for auto_class, (before, behind) in HEADS.items():
        name = model_class.__name__.removesuffix("Model") + auto_class.__name__.removeprefix("AutoModel")
        fields = {
            "config_class": config_class,
            "base_class": model_class,
            "__doc__": before[0].__doc__,
            "__module__": model_class.__module__,
        }
        auto_class.register(config_class, type(name, (*before, model_class.pretrained_class, *behind), fields))
