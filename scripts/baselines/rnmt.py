"""
RNMT+ as a language model or classifier: layer-normalised LSTMs, the first of which attends to its own past.

    h^0     = LSTM_0(inputs)
    ctx_t   = Attention(query h^0_t, keys and values h^0_1 .. h^0_t)
    x^0     = h^0
    y^i     = LSTM_i([x^{i-1}; ctx])                                 for the further layers i
    x^i     = x^{i-1} + y^i from layer `residual_from` on, else y^i
    output  = W [x^top; ctx] + bias

with dropout of each layer's output. The paper translates: its decoder attends to an encoder. Here the source is the
model's own past, the encoder is left out, and, as in OpenNMT-tf, the first layer does not read the previous context.
The linear map after the last layer keeps the width, so that the embedding can be tied to the head.

Attention has `num_attention_heads` heads, q = W_q h + b_q and v = W_v h + b_v, whose values are v and whose outputs are
not mapped again:

    additive   e_ts = u . tanh(A v_s + C q_t), with u, A and C shared by all heads (the paper)
    dot        e_ts = q_t . v_s / sqrt(d)

Initial values: those of [`LayerNormLSTM`] or torch.nn; u, A and C normal(0, 1 / sqrt(2 D)); linear maps as heads.

Source: Chen et al. 2018, "The Best of Both Worlds: Combining Recent Advances in Neural Machine Translation" (arXiv
1804.09849), section 4, and the authors' code, tensorflow/lingvo (`MTDecoderV1`).
"""

# B batch, T queries, S keys, D hidden size, H heads, d head size

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from modeling_rtransformer.configuration_rtransformer import nearest
from scripts.baselines.heads import BaselineConfig, BaselineModel, register
from scripts.baselines.layer_norm_lstm import LayerNormLSTM


ATTENTIONS = ("additive", "dot")
CHUNK_NUMBERS = 2**24  # tanh values of the additive attention that exist at a time


@strict
class RNMTPlusConfig(BaselineConfig):
    """
    Args:
        num_attention_heads: heads; a divisor of `hidden_size`.
        attention: `additive` (the paper) or `dot`, which is faster.
        gate_norm: LayerNorms in the LSTM on each gate; without them the layers are torch.nn's LSTM, each behind a
            LayerNorm of its input (a first layer that reads numbers has none).
        cell_clip: largest absolute value of a cell with `gate_norm`.
        residual_from: the first layer, counted from 0, with a residual connection.
        attention_dropout: dropout of the attention weights.
        hidden_dropout: dropout of each layer's output. The rest is in [`BaselineConfig`].
    """

    model_type = "rnmt_plus"

    num_attention_heads: int = 4
    attention: str = "additive"
    gate_norm: bool = True
    cell_clip: float | int = 10.0
    residual_from: int = 2
    attention_dropout: float | int = 0.0

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` must be a divisor of `hidden_size` ({self.hidden_size}), got "
                f"{self.num_attention_heads}"
            )
        if self.attention not in ATTENTIONS:
            hint = nearest(self.attention, ATTENTIONS)
            raise ValueError(f"`attention` must be one of {', '.join(ATTENTIONS)}, got {self.attention!r}{hint}")
        if not self.cell_clip > 0:
            raise ValueError(f"`cell_clip` must be positive, got {self.cell_clip}")
        if not self.gate_norm and self.cell_clip != type(self).cell_clip:
            raise ValueError(
                f"`cell_clip` needs `gate_norm`, since torch.nn's LSTM does not clip its cell, got {self.cell_clip}"
            )
        if self.residual_from < 1:
            raise ValueError(
                f"`residual_from` must be at least 1, since layer 0 reads another width, got {self.residual_from}"
            )
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"`attention_dropout` must be in [0, 1), got {self.attention_dropout}")


class PreNormLSTM(nn.Module):
    """torch.nn's LSTM behind a LayerNorm of its input."""

    def __init__(self, input_size: int, hidden_size: int, reads_numbers: bool):
        super().__init__()
        self.norm = nn.Identity() if reads_numbers else nn.LayerNorm(input_size)
        self.lstm = nn.LSTM(input_size, hidden_size, batch_first=True)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, T, I) -> (B, T, D)"""
        return self.lstm(self.norm(inputs))[0]


def additive_energies(query: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """u . tanh(key_s + query_t): `(B, H, T, S)` from C q `(B, H, T, d)`, A v `(B, H, S, d)` and u `(d)`."""
    return torch.tanh(key[:, :, None] + query[:, :, :, None]) @ hidden


def additive_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor, dropout: float = 0.0
) -> torch.Tensor:
    """
    The definition: `(B, H, T, d)`, for queries at the last T of the S positions, each of which sees the keys up to its
    own position. Arguments of [`additive_energies`], the values `(B, H, S, d)` and the dropout of the weights.
    """
    queries, keys = query.shape[2], key.shape[2]
    future = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(keys - queries + 1)
    energies = additive_energies(query, key, hidden).masked_fill(future, float("-inf"))
    return F.dropout(energies.softmax(-1), dropout) @ value


def additive_attention_in_chunks(query, key, value, hidden, dropout=0.0, numbers=CHUNK_NUMBERS) -> torch.Tensor:
    """
    [`additive_attention`] for S = T, some queries at a time, so that at most about `numbers` values of the tanh exist,
    or those of one query; the backward pass computes them again.
    """
    length = query.shape[2]
    rows = max(1, numbers // max(query.numel(), 1))
    parts = []
    for start in range(0, length, rows):
        end = start + rows
        arguments = query[:, :, start:end], key[:, :, :end], value[:, :, :end], hidden, dropout
        if rows < length and torch.is_grad_enabled():
            parts.append(checkpoint(additive_attention, *arguments, use_reentrant=False))
        else:
            parts.append(additive_attention(*arguments))
    return torch.cat(parts, dim=2) if parts else value


class PastAttention(nn.Module):
    """The context of each position: attention of its state to the states up to it."""

    def __init__(self, config: RNMTPlusConfig):
        super().__init__()
        size = config.hidden_size
        self.kind = config.attention
        self.head_dim = size // config.num_attention_heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        if self.kind == "additive":
            shapes = {"query_weight": (self.head_dim,) * 2, "key_weight": (self.head_dim,) * 2, "hidden": self.head_dim}
            for name, shape in shapes.items():
                setattr(self, name, nn.Parameter(torch.empty(shape).normal_(std=(2 * size) ** -0.5)))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)"""
        query, value = (
            proj(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.q_proj, self.v_proj)
        )  # (B, H, T, d)
        dropout = self.dropout if self.training else 0.0
        if self.kind == "dot":
            context = F.scaled_dot_product_attention(query, value, value, dropout_p=dropout, is_causal=True)
        else:
            query, key = query @ self.query_weight, value @ self.key_weight
            context = additive_attention_in_chunks(query, key, value, self.hidden, dropout)
        return context.transpose(1, 2).flatten(2)


class RNMTPlusLayers(nn.Module):
    """The layers and the attention between them, `(B, T, input size)` -> `(B, T, D)`."""

    def __init__(self, config: RNMTPlusConfig):
        super().__init__()
        size = config.hidden_size
        self.residual_from = config.residual_from
        sizes = [config.input_size] + [2 * size] * (config.num_hidden_layers - 1)
        if config.gate_norm:
            lstms = [LayerNormLSTM(each, size, config.cell_clip) for each in sizes]
        else:
            reads_numbers = config.num_input_features is not None
            lstms = [PreNormLSTM(each, size, reads_numbers and index == 0) for index, each in enumerate(sizes)]
        self.lstms = nn.ModuleList(lstms)
        self.attention = PastAttention(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.output_proj = nn.Linear(2 * size, size)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        first, *further = self.lstms
        hidden = first(inputs)
        context = self.attention(hidden)
        hidden = self.dropout(hidden)
        for index, lstm in enumerate(further, 1):
            output = self.dropout(lstm(torch.cat([hidden, context], dim=-1)))
            hidden = hidden + output if index >= self.residual_from else output
        return self.output_proj(torch.cat([hidden, context], dim=-1))


class RNMTPlusModel(BaselineModel):
    """RNMT+ over the embedded input."""

    config_class = RNMTPlusConfig

    @staticmethod
    def make_layers(config: RNMTPlusConfig) -> nn.Module:
        return RNMTPlusLayers(config)

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)


register(RNMTPlusConfig, RNMTPlusModel)
