"""
A learned Toeplitz matrix in place of the REM: the control of the RSA paper, which asks whether an RSA head gains from
recurrence or from any learned preference for distances.

    head(x) = [(1 - gate) * softmax(Q K' / sqrt(d)) + gate * P] V,    P[i, j] = weight[i - j]  for i > j, else 0

with one weight for each distance from 1 to `max_length` - 1 and head, where a REM has one or two for all distances. All
else is our block: the heads, layers and the gate that `rem_kinds`, `rem_layers` and `rem_gate` name.

Source: Huang et al. 2023, "Encoding Recurrence into Transformers" (ICLR 2023), the ablation on text8.
"""

# B batch, H attention heads, R heads with a Toeplitz matrix, T queries, L keys, d head size

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from modeling_rtransformer import RTransformerConfig, RTransformerModel, RTransformerPreTrainedModel
from modeling_rtransformer.attention import RTransformerAttention
from modeling_rtransformer.block import MIXERS
from modeling_rtransformer.head_shard import HeadShard
from modeling_rtransformer.recurrence_encoding import RecurrenceEncoding
from scripts.baselines.heads import register


@strict
class ToeplitzConfig(RTransformerConfig):
    """
    Args:
        max_length: the longest sequence there are weights for; a longer one is refused. The rest is in
            [`RTransformerConfig`]; of `rem_kinds` it matters only which heads have one, all of them if None.

    Raises:
        ValueError: besides [`RTransformerConfig`]'s, no head has a matrix, or the model is not causal.
    """

    model_type = "toeplitz"
    code = {}  # of the Hub: none, this model is for comparisons in a checkout
    _auto_class = None

    max_length: int = 512

    def __post_init__(self, **kwargs) -> None:
        if self.rem_kinds is None:
            self.rem_kinds = ["regular"] * self.num_attention_heads
        super().__post_init__(**kwargs)
        if self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, got {self.max_length}")
        if not self.is_causal:
            raise ValueError("`is_causal` must be True with a lower triangular Toeplitz matrix")
        if not any(self.layer_rem_heads(layer) for layer in range(self.num_hidden_layers)):
            raise ValueError(f"`rem_kinds` must name at least one head that is not none, got {self.rem_kinds}")

    def layer_mixers(self, layer_idx: int) -> dict[str, int]:
        """As of [`RTransformerConfig`], with Toeplitz heads in the attention."""
        return {"local_rnn": self.num_local_rnns, "toeplitz_attention": 1}


class LearnedToeplitz(RecurrenceEncoding):
    """The matrices of one attention layer and their gate: a [`RecurrenceEncoding`] whose P is looked up."""

    def __init__(self, heads: list[int], num_attention_heads: int, gate: str, max_length: int):
        super().__init__([(head, "regular", 1) for head in heads], num_attention_heads, gate, is_causal=True)
        del self.eta, self.nu, self.theta
        self.weight = nn.Parameter(torch.empty(len(heads), max_length - 1))  # of the distances 1, 2, ...

    def init_parameters(self) -> None:
        """Weights normal(0, 0.02), mu uniform on [-3, 3]; the indices."""
        init.normal_(self.weight, std=0.02)
        init.uniform_(self.mu, -3, 3)
        for name, index in self.index_buffers().items():
            init.copy_(getattr(self, name), index)

    def learned(self, shard: HeadShard | None = None) -> tuple[torch.Tensor, ...]:
        """The weights in the place of `eta`, nothing for `nu` and `theta`, and `mu`."""
        if shard is not None:
            raise ValueError("the Toeplitz baseline has all its heads in one process; leave tensor parallelism")
        nothing = self.weight[:0]
        return self.weight, nothing, nothing, self.mu

    def matrix(self, positions, length, segment_ids=None, shard=None, learned=None) -> torch.Tensor:
        """P of all H heads, zero for a plain one: `(1 or B, H, T, length)`; arguments as of [`RecurrenceEncoding`]."""
        longest, distance = self.weight.shape[1] + 1, positions  # (T, L), the distances themselves
        if positions.dim() == 1:
            distance = positions[:, None] - torch.arange(length, device=positions.device)
        else:
            length = int(distance.max()) + 1
        if length > longest:
            raise ValueError(f"the input must have at most `max_length` = {longest} positions, got {length}")
        entries = self.weight[:, distance.clamp(min=1) - 1] * (distance >= 1)  # (R, T, L)
        matrix = entries.new_zeros(1, self.num_attention_heads, *distance.shape)
        matrix[:, self.head_indices] = entries
        if segment_ids is None:
            return matrix
        return matrix * (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])

    def product(self, values, positions=None, segment_ids=None, gates=None, shard=None, learned=None) -> torch.Tensor:
        """gates * P V of the R heads: `(B, R, T, d)`; arguments as of [`RecurrenceEncoding`]."""
        if positions is None:
            positions = torch.arange(values.shape[2], device=values.device)
        matrix = self.matrix(positions, values.shape[2], segment_ids)[:, self.head_indices]
        product = matrix.to(values.dtype) @ values[:, self.head_indices]
        return product if gates is None else product * gates[:, None, None].to(values.dtype)


class ToeplitzAttention(RTransformerAttention):
    """The attention mixer with learned Toeplitz matrices where RSA has REMs."""

    @staticmethod
    def make_recurrence(config: ToeplitzConfig, layer_idx: int) -> LearnedToeplitz | None:
        heads = [head for head, _, _ in config.layer_rem_heads(layer_idx)]
        if not heads:
            return None
        return LearnedToeplitz(heads, config.num_attention_heads, config.rem_gate, config.max_length)


class ToeplitzPreTrainedModel(RTransformerPreTrainedModel):
    """What the base model and its heads share."""

    config_class = ToeplitzConfig
    _auto_class = None


class ToeplitzModel(RTransformerModel):
    """Our blocks with [`ToeplitzAttention`]."""

    config_class = ToeplitzConfig
    pretrained_class = ToeplitzPreTrainedModel
    _auto_class = None


MIXERS["toeplitz_attention"] = MIXERS["attention"]._replace(module=ToeplitzAttention)
register(ToeplitzConfig, ToeplitzModel)
