"""
Convert a recurrent network into a model with RSA heads that `from_pretrained` loads.

    python scripts/convert_rnn_to_rsa.py rnn.safetensors converted/ --nonlinearity none
    python scripts/convert_rnn_to_rsa.py rnn.safetensors converted/ --inputs inputs.safetensors

Reads a state dict with the names of a one-layer `torch.nn.RNN` (`weight_hh_l0`, `weight_ih_l0` and, if it has them,
`bias_hh_l0` and `bias_ih_l0`), with anything before them. `--nonlinearity none` says that the RNN is linear: the model
then equals it. Of a tanh RNN the linear part is converted: the tangent at zero, or with `--inputs` (a file with one
tensor `inputs` (batch, length, features)) the best linear fit on what the RNN reads. Eigenvalues on or outside the unit
circle are converted only with `--largest`, which brings them down to that size; a matrix without a basis of
eigenvectors only with `--perturbation`.

The last line of stdout is one JSON object; its `error` is the largest difference between the RNN's and the model's
states, over the largest state, on the inputs given or else on 8 x 64 normal random numbers.
"""

import argparse
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

import torch
from safetensors.torch import load_file
from torch import nn

from modeling_rtransformer.linear_rnn import LinearRNN, rsa_from_linear_rnn
from scripts.convert_original_checkpoint import read_state_dict


def read_rnn(path: Path) -> nn.RNN:
    """The one RNN in a file, in float64; raises ValueError if there is none, or more than one layer or direction."""
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


def convert(rnn: nn.RNN, nonlinearity: str, inputs: torch.Tensor | None = None, **options) -> tuple:
    """The model, and the largest error of its states relative to the RNN's largest state."""
    linear = LinearRNN.from_torch(rnn, inputs if nonlinearity == "tanh" else None)
    model = rsa_from_linear_rnn(linear, **options)
    if inputs is None:
        inputs = torch.randn(8, 64, rnn.input_size, generator=torch.Generator().manual_seed(0))
    inputs = inputs.double()
    with torch.no_grad():
        states = linear.run(inputs) if nonlinearity == "none" else rnn(inputs)[0]
        given = model(input_values=inputs).last_hidden_state[..., : rnn.hidden_size]
    return model, ((given - states).abs().max() / states.abs().max()).item()


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the RNN's state dict, .safetensors or .pt")
    parser.add_argument("output_dir", type=Path, help="folder for the model, new or empty")
    parser.add_argument("--nonlinearity", choices=("tanh", "none"), default="tanh")
    parser.add_argument(
        "--inputs", type=Path, help="safetensors file with `inputs`, to fit a tanh RNN's linear part on"
    )
    parser.add_argument("--gate", type=float, default=0.5, help="share of the REM in its heads; the model is the same")
    parser.add_argument("--perturbation", type=float, default=0.0, help="relative size of noise; makes it approximate")
    parser.add_argument(
        "--largest", type=float, help="size that larger eigenvalues are brought down to; approximate too"
    )
    options = parser.parse_args(argv)
    if options.output_dir.exists() and (not options.output_dir.is_dir() or any(options.output_dir.iterdir())):
        parser.error(f"output_dir must be a new or empty folder, got {options.output_dir}")
    try:
        inputs = None if options.inputs is None else load_file(options.inputs).get("inputs")
        if options.inputs is not None and inputs is None:
            raise ValueError(f"--inputs {options.inputs} must hold a tensor named `inputs`")
        rnn = read_rnn(options.checkpoint)
        settings = {name: getattr(options, name) for name in ("gate", "perturbation", "largest")}
        model, error = convert(rnn, options.nonlinearity, inputs, **settings)
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    model.save_pretrained(options.output_dir)
    result = {
        "output_dir": str(options.output_dir),
        "units": rnn.hidden_size,
        "rem_kinds": model.config.rem_kinds,
        "parameters": model.num_parameters(),
        "error": error,
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
