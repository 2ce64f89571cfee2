# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
From a linear RNN to RSA heads, without loss.

    h[t] = W_h h[t-1] + u[t],   u[t] = W_x x[t] + b,   h before the sequence is zero
    h[t] = u[t] + sum over j >= 1 of W_h^j u[t-j]

With W_h = B J B^-1 in real Jordan form, a real eigenvalue l with the column a of B and the row c of B^-1 gives
W_h^j the part l^j a c: one regular REM head with values c u and output a. A pair r e^(+-i w) with the columns a, b and
the rows c, d gives

    r^j [cos(j w) (a c + b d) + sin(j w) (a d - b c)]

one first and one second cyclical head, both with values (c u, d u), whose outputs are (a, b) and (-b, a). So n
eigenvalues make n REM heads, and their sum is the sum over j >= 1. What is left of an RSA layer:

- The gate. REM and softmax share the values, (1 - gate) softmax V + gate P V, and no finite query and key make softmax
  vanish. Here all keys are zero, so softmax is the mean over the past in every head, and as many plain heads as have
  room for n values subtract what the REM heads let through of it. The sum is exact for every gate in (0, 1).
- The term j = 0, which P with its zero diagonal does not have. It is the residual connection, in which u stands.
- The LayerNorm before the attention, which is not linear. With eps = 2^80 and a weight of 2^40 it is, up to a relative
  variance / 2^81 (below 1e-16 for any variance below 1e8), and the mean that it takes away is zero, because one more
  coordinate holds -sum(u).

Exact in this sense, to rounding: [`rsa_from_linear_rnn`], a whole model. Approximate: [`load_linear_rnn_`] into an
attention layer behind an ordinary LayerNorm, which then runs the recurrence over normalised inputs; and every tanh RNN,
by the error of its linear part ([`LinearRNN.from_torch`]).

Source: Huang et al. 2023, "Encoding Recurrence into Transformers" (ICLR 2023), section 2 and Proposition 1.
"""

# B batch, L length, n units of the RNN, m input features, D hidden size, H heads, d head size

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from .block import RTransformerAttention
from .configuration_rtransformer import RTransformerConfig, rem_heads
from .modeling_rtransformer import RTransformerModel, RTransformerPreTrainedModel


# Beyond this relative error of B J B^-1 the matrix counts as defective; rounding alone leaves about 1e-16 cond(B).
TOLERANCE = 1e-10
LINEAR_NORM_EPS, LINEAR_NORM_WEIGHT = 2.0**80, 2.0**40


class LinearRNN(NamedTuple):
    """h[t] = recurrent h[t-1] + input x[t] + bias, in float64: `(n, n)`, `(n, m)`, `(n,)`."""

    recurrent: torch.Tensor
    input: torch.Tensor
    bias: torch.Tensor

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        """The definition, step by step: `(B, L, m)` to `(B, L, n)`."""
        hidden, states = inputs.new_zeros(inputs.shape[0], len(self.bias)), []
        for step in inputs.unbind(1):
            hidden = hidden @ self.recurrent.T + step @ self.input.T + self.bias
            states.append(hidden)
        return torch.stack(states, dim=1)

    @classmethod
    @torch.no_grad()
    def from_torch(cls, rnn: nn.RNN, inputs: torch.Tensor | None = None) -> "LinearRNN":
        """
        The linear part of a one-layer `nn.RNN`, in whose place tanh(z) is slope * z + offset, unit by unit.

        Args:
            rnn: with `nonlinearity="tanh"`; one layer, one direction.
            inputs (`(B, L, m)`, *optional*): what the RNN reads. Slope and offset are then the least squares fit over
                the z that it meets there; without them the tangent at zero, slope 1 and offset 0.

        Raises:
            ValueError: an RNN of another kind, or inputs of another width.
        """
        for name, value, needed in (
            ("nonlinearity", getattr(rnn, "nonlinearity", type(rnn).__name__), "tanh"),
            ("num_layers", rnn.num_layers, 1),
            ("bidirectional", rnn.bidirectional, False),
        ):
            if value != needed:
                raise ValueError(f"`rnn.{name}` must be {needed!r} for a linear part, got {value!r}")
        recurrent, projection = rnn.weight_hh_l0.detach().double(), rnn.weight_ih_l0.detach().double()
        bias = recurrent.new_zeros(len(recurrent))
        if rnn.bias:
            bias = rnn.bias_ih_l0.detach().double() + rnn.bias_hh_l0.detach().double()
        if inputs is None:
            return cls(recurrent, projection, bias)
        if inputs.dim() != 3 or inputs.shape[-1] != rnn.input_size:
            raise ValueError(f"`inputs` must be (B, L, {rnn.input_size}), got {tuple(inputs.shape)}")
        hidden, met = recurrent.new_zeros(len(inputs), len(recurrent)), []
        for step in inputs.double().unbind(1):
            met.append(hidden @ recurrent.T + step @ projection.T + bias)
            hidden = torch.tanh(met[-1])
        met = torch.cat(met)  # (L B, n)
        centred = met - met.mean(0)
        slope = (centred * torch.tanh(met)).sum(0) / centred.square().sum(0).clamp(min=1e-300)
        offset = torch.tanh(met).mean(0) - slope * met.mean(0)
        return cls(slope[:, None] * recurrent, slope[:, None] * projection, slope * bias + offset)


class RealJordanForm(NamedTuple):
    """W = basis J inverse: R real eigenvalues `(R,)`, then P pairs by decay r and angle w `(P,)`; R + 2 P = n."""

    real: torch.Tensor
    decay: torch.Tensor
    angle: torch.Tensor
    basis: torch.Tensor  # (n, n) columns: the R real ones, then two for each pair
    inverse: torch.Tensor  # (n, n)

    def power(self, exponent: int) -> torch.Tensor:
        """W^exponent, `(n, n)`."""
        turned = self.decay**exponent * torch.stack([(exponent * self.angle).cos(), (exponent * self.angle).sin()])
        cosine, sine = turned  # (P,), (P,)
        blocks = torch.stack([torch.stack([cosine, sine], -1), torch.stack([-sine, cosine], -1)], -2)  # (P, 2, 2)
        return self.basis @ torch.block_diag(torch.diag(self.real**exponent), *blocks) @ self.inverse


def real_jordan_form(matrix: torch.Tensor, perturbation: float = 0.0, largest: float | None = None) -> RealJordanForm:
    """
    The real Jordan form of a matrix with a basis of eigenvectors and all eigenvalues inside the unit circle.

    Args:
        matrix (`(n, n)`): taken in float64.
        perturbation: the size, relative to the matrix's norm, of a fixed random matrix that is added first. It
            separates the eigenvalues of a defective matrix, at the price of that error.
        largest: bring eigenvalues of a larger size down to this one, below 1, angle and vectors kept. The form is then
            that of another matrix, which forgets.

    Raises:
        ValueError: not square or not finite; an eigenvalue that no REM reaches (tanh(eta) and sigmoid(nu) lie inside
            the unit circle), by its value; a defective matrix, with the two eigenvalues that coincide.
    """
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not torch.isfinite(matrix).all():
        raise ValueError(f"`recurrent` must be a square matrix of finite numbers, got shape {tuple(matrix.shape)}")
    if not 0 <= perturbation < 1:
        raise ValueError(f"`perturbation` must be at least 0 and below 1, got {perturbation}")
    if largest is not None and not 0 < largest < 1:
        raise ValueError(f"`largest` must lie above 0 and below 1, got {largest}")
    matrix = matrix.detach().double().cpu()
    if perturbation:
        noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        matrix = matrix + perturbation * matrix.norm() * noise / noise.norm()
    values, vectors = torch.linalg.eig(matrix)
    for value in values[values.abs() >= 1].tolist() if largest is None else ():
        raise ValueError(
            f"`recurrent` has the eigenvalue {_readable(value)} with |eigenvalue| = {abs(value):.6g}, but a REM "
            "reaches only those below 1 (tanh(eta) and sigmoid(nu)): such an RNN does not forget. `largest`, such as "
            "0.999, brings eigenvalues down to that size and makes the conversion approximate"
        )
    is_real, is_upper = values.imag == 0, values.imag > 0
    pairs = vectors[:, is_upper]
    basis = torch.cat([vectors[:, is_real].real, torch.stack([pairs.real, pairs.imag], -1).flatten(1)], dim=1)
    inverse, info = torch.linalg.inv_ex(basis)
    form = RealJordanForm(values[is_real].real, values[is_upper].abs(), values[is_upper].angle(), basis, inverse)
    error = math.inf if info.item() else (form.power(1) - matrix).norm().item() / max(matrix.norm().item(), 1e-300)
    # Rounding in B and B^-1 shows in the powers as eps cond(B); the first power alone can hide it.
    error = max(error, torch.finfo(torch.float64).eps * torch.linalg.cond(basis).item())
    if not error <= TOLERANCE:
        first, second = _nearest_pair(values)
        raise ValueError(
            f"`recurrent` is defective or nearly so: it has no basis of eigenvectors (relative error {error:.1e}); the "
            f"eigenvalues {_readable(first)} and {_readable(second)} lie {abs(first - second):.1e} apart. A small "
            "`perturbation`, such as 1e-8, separates them and makes the conversion approximate"
        )
    if largest is None:
        return form
    return form._replace(real=form.real.clamp(-largest, largest), decay=form.decay.clamp(max=largest))


def _nearest_pair(values: torch.Tensor) -> tuple[complex, complex]:
    distance = (values[:, None] - values).abs() + torch.diag(torch.full((len(values),), math.inf, dtype=torch.float64))
    first, second = divmod(int(distance.argmin()), len(values))
    return values[first].item(), values[second].item()


def _readable(value: complex) -> str:
    return f"{value.real:.6g}" if value.imag == 0 else f"{value.real:.6g}{value.imag:+.6g}i"


def attention_fields(form: RealJordanForm) -> dict[str, Any]:
    """The fields of [`RTransformerConfig`] of the smallest RSA layer that holds this matrix."""
    units = len(form.basis)
    head_dim = 2 if len(form.decay) else 1
    num_heads = units + math.ceil(units / head_dim)  # REM heads, and plain heads with room for n values
    return {
        "hidden_size": num_heads * head_dim,
        "num_attention_heads": num_heads,
        **rem_heads(num_heads, regular=len(form.real), first_cyclical=len(form.decay), second_cyclical=len(form.decay)),
    }


@torch.no_grad()
def load_linear_rnn_(attention: RTransformerAttention, form: RealJordanForm, gate: float = 0.5) -> None:
    """
    Set an attention layer to u -> sum over j >= 1 of W_h^j u[t-j], from and to the first n coordinates of its width.

    Exact for every gate, as the file's docstring shows. Keys are zero and queries stay as they are, so softmax learns
    as soon as the layer is trained.

    Args:
        attention: of a config with the [`attention_fields`] of `form`, or wider.
        gate: sigmoid(mu) of the REM heads.

    Raises:
        ValueError: a gate outside (0, 1), or a layer whose heads do not fit.
    """
    units, dim = len(form.basis), attention.head_dim
    needed = attention_fields(form)
    recurrence = attention.recurrence
    kinds = [] if recurrence is None else sorted(zip(recurrence.head_indices, recurrence.kinds))
    wanted = [(head, kind) for head, kind in enumerate(needed["rem_kinds"]) if kind != "none"]
    num_plain = attention.config.num_attention_heads - units
    if not 0 < gate < 1:
        raise ValueError(f"`gate` must lie above 0 and below 1, got {gate}")
    if kinds != wanted or set(recurrence.dilations) != {1} or not attention.is_causal:
        raise ValueError(f"the layer must be causal with the undilated REM heads {wanted}, got {kinds}")
    if attention.attentive_fusion is not None:
        raise ValueError("`attentive_layers` must not name the layer, whose output would not be the attention's alone")
    needed_dim = 2 if len(form.decay) else 1
    if dim < needed_dim or num_plain * dim < units:
        raise ValueError(
            f"the layer must have {needed['num_attention_heads']} heads of size {needed_dim} or more, "
            f"got {attention.config.num_attention_heads} of size {dim}"
        )
    num_real, num_pairs = len(form.real), len(form.decay)
    width = attention.v_proj.in_features
    values = form.basis.new_zeros(attention.config.num_attention_heads, dim, width)  # a head's coordinates from u
    outputs = form.basis.new_zeros(width, attention.config.num_attention_heads, dim)
    values[:num_real, 0, :units] = form.inverse[:num_real]
    outputs[:units, :num_real, 0] = form.basis[:, :num_real]
    if num_pairs:
        rows = form.inverse[num_real:].view(num_pairs, 2, units)
        columns = form.basis[:, num_real:].view(units, num_pairs, 2)
        cosine, sine = slice(num_real, num_real + num_pairs), slice(num_real + num_pairs, units)
        values[cosine, :2, :units] = values[sine, :2, :units] = rows
        outputs[:units, cosine, :2] = columns
        outputs[:units, sine, :2] = torch.stack([-columns[..., 1], columns[..., 0]], dim=-1)
    # What softmax lets through of all REM heads, taken away by the plain heads.
    through = torch.einsum("ohd,hdi->oi", outputs, values)[:, :units]
    outputs = outputs / gate
    first_plain = units * dim
    values.view(-1, width)[first_plain : first_plain + units].fill_diagonal_(1)
    outputs.view(width, -1)[:, first_plain : first_plain + units] = -(1 - gate) / gate * through

    for parameter, value in (
        (attention.v_proj.weight, values.view(-1, width)),
        (attention.o_proj.weight, outputs.view(width, -1)),
        (recurrence.eta, torch.atanh(form.real)),
        (recurrence.nu, torch.logit(form.decay)),
        (recurrence.theta, form.angle),
    ):
        parameter.copy_(value)
    recurrence.mu.fill_(math.log(gate / (1 - gate)))
    for zero in (attention.k_proj.weight, attention.k_proj.bias, attention.v_proj.bias, attention.o_proj.bias):
        zero.zero_()


@torch.no_grad()
def rsa_from_linear_rnn(
    rnn: LinearRNN,
    model_class: type[RTransformerPreTrainedModel] = RTransformerModel,
    *,
    gate: float = 0.5,
    perturbation: float = 0.0,
    largest: float | None = None,
    **fields: Any,
) -> RTransformerPreTrainedModel:
    """
    A model of one RSA block whose hidden state is that of a linear RNN: the first n coordinates of
    `last_hidden_state` are h[t], in float64 to rounding. Its feed-forward layer starts at zero.

    Args:
        rnn: of n units that reads m features; the model's input is `input_values` `(B, L, m)`.
        model_class: any head; a head's own weights are initialised as ever.
        gate, perturbation, largest: as in [`load_linear_rnn_`] and [`real_jordan_form`].
        fields: more fields of [`RTransformerConfig`], such as `num_labels`.

    Returns:
        The model in float64 and evaluation mode.

    Raises:
        ValueError: what [`real_jordan_form`] and [`load_linear_rnn_`] refuse, or shapes that do not fit together.
    """
    form = real_jordan_form(rnn.recurrent, perturbation, largest)
    units = len(form.basis)
    if rnn.input.dim() != 2 or len(rnn.input) != units or rnn.bias.shape != (units,):
        raise ValueError(
            f"`input` must be ({units}, features) and `bias` ({units},) beside a recurrent matrix of {units} units, "
            f"got {tuple(rnn.input.shape)} and {tuple(rnn.bias.shape)}"
        )
    config = RTransformerConfig(
        num_input_features=rnn.input.shape[1],
        num_hidden_layers=1,
        num_local_rnns=0,
        final_norm=False,
        layer_norm_eps=LINEAR_NORM_EPS,
        **attention_fields(form),
        **fields,
    )
    model = model_class(config).double().eval()
    block, embedding = model.base_model.layers[0], model.base_model.embed_values
    load_linear_rnn_(block.self_attn, form, gate)
    for parameter, value in ((embedding.weight, rnn.input), (embedding.bias, rnn.bias)):
        parameter.zero_()
        parameter[:units] = value
        parameter[units] = -value.sum(0)  # so that the mean over the width, which a LayerNorm takes away, is zero
    for norm in (block.self_attn_norm, block.mlp_norm):
        norm.weight.fill_(LINEAR_NORM_WEIGHT)
    block.mlp.down_proj.weight.zero_()
    return model


__all__ = ["LinearRNN", "RealJordanForm", "load_linear_rnn_", "real_jordan_form", "rsa_from_linear_rnn"]
