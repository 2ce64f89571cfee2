"""
Convert a recurrent network into a model with RSA heads that `from_pretrained` loads.

Reads a state dict with the names of a one-layer `torch.nn.RNN` (`weight_hh_l0`, `weight_ih_l0` and, with biases,
`bias_hh_l0` and `bias_ih_l0`), with any prefix. With `--nonlinearity none` the RNN is linear, and the model equals it.
Of a tanh RNN only a linear part is converted: the tangent at zero or, with `--inputs` (a file with one tensor `inputs`
(batch, length, features)), the best linear fit on these inputs. Eigenvalues on or outside the unit circle need
`--largest`, which scales them down to that size; a matrix without a basis of eigenvectors needs `--perturbation`.

The result's `error` is the largest difference between the states of the RNN and of the model, divided by the RNN's
largest state, on the given inputs or else on 8 x 64 normal random numbers.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from modeling_rtransformer.linear_rnn import LinearRNN, rsa_from_linear_rnn
from scripts.conversion.original_checkpoint import read_state_dict


def read_rnn(path: Path) -> nn.RNN:
    """The RNN in a file, in float64; a ValueError if there is none, or more than one layer or direction."""
    state = read_state_dict(path)
    names = [name for name in state if "weight_hh_l" in name]
    if len(names) != 1 or not names[0].endswith("weight_hh_l0"):
        raise ValueError(
            f"{path} must hold one `weight_hh_l0`, of one layer and direction, got {names or sorted(state)[:5]}"
        )
    prefix = names[0].removesuffix("weight_hh_l0")
    state = {name.removeprefix(prefix): value.double() for name, value in state.items() if name.startswith(prefix)}
    state = {name: value for name, value in state.items() if name.endswith("_l0")}
    if "weight_ih_l0" not in state:
        raise ValueError(f"{path} has no `{prefix}weight_ih_l0` beside `{prefix}weight_hh_l0`")
    (rows, units), features = state["weight_hh_l0"].shape, state["weight_ih_l0"].shape[1]
    if rows != units:
        raise ValueError(
            f"`weight_hh_l0` must be square, as in a plain RNN, got {(rows, units)}: a GRU or LSTM has gates"
        )
    rnn = nn.RNN(features, units, bias="bias_hh_l0" in state, batch_first=True).double()
    rnn.load_state_dict(state)
    return rnn


def convert(checkpoint: Path, nonlinearity: str, inputs: Path | None = None, **options) -> tuple[PreTrainedModel, dict]:
    """The model, and its size and `error`; `options` are those of [`rsa_from_linear_rnn`]."""
    rnn = read_rnn(checkpoint)
    values = None
    if inputs is not None:
        values = load_file(inputs).get("inputs")
        if values is None:
            raise ValueError(f"--inputs {inputs} must hold a tensor named `inputs`")
    linear = LinearRNN.from_torch(rnn, values if nonlinearity == "tanh" else None)
    model = rsa_from_linear_rnn(linear, **options)
    if values is None:
        values = torch.randn(8, 64, rnn.input_size, generator=torch.Generator().manual_seed(0))
    values = values.double()
    with torch.no_grad():
        states = linear.run(values) if nonlinearity == "none" else rnn(values)[0]
        given = model(input_values=values).last_hidden_state[..., : rnn.hidden_size]
    error = ((given - states).abs().max() / states.abs().max()).item()
    return model, {"units": rnn.hidden_size, "rem_kinds": model.config.rem_kinds, "error": error}
