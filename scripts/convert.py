"""
Convert a checkpoint of the original R-Transformer code, or a recurrent network, into a model that `from_pretrained`
loads.

    python -m scripts.convert original-checkpoint model.pt converted/ --num-attention-heads 8 --local-window 7
    python -m scripts.convert rnn rnn.safetensors converted/ --nonlinearity none
    python -m scripts.convert rnn rnn.safetensors converted/ --inputs inputs.safetensors

Each sub-command has its own --help. The last line of stdout is one JSON object with the result.
"""

import argparse
import json
import sys
from pathlib import Path

from safetensors.torch import load_file
from transformers import PreTrainedModel

from scripts.conversion import original_checkpoint, rnn_to_rsa


def convert_original_checkpoint(options: argparse.Namespace) -> tuple[PreTrainedModel, dict]:
    model, unused = original_checkpoint.convert(
        original_checkpoint.read_state_dict(options.checkpoint),
        options.task,
        num_attention_heads=options.num_attention_heads,
        local_window=options.local_window,
    )
    print(f"left {len(unused)} parameters that the original never used: {', '.join(unused)}", file=sys.stderr)
    return model, {"class": type(model).__name__, "unused": unused}


def convert_rnn(options: argparse.Namespace) -> tuple[PreTrainedModel, dict]:
    inputs = None if options.inputs is None else load_file(options.inputs).get("inputs")
    if options.inputs is not None and inputs is None:
        raise ValueError(f"--inputs {options.inputs} must hold a tensor named `inputs`")
    rnn = rnn_to_rsa.read_rnn(options.checkpoint)
    settings = {name: getattr(options, name) for name in ("gate", "perturbation", "largest")}
    model, error = rnn_to_rsa.convert(rnn, options.nonlinearity, inputs, **settings)
    return model, {"units": rnn.hidden_size, "rem_kinds": model.config.rem_kinds, "error": error}


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser of the sub-command, which reports wrong arguments, and the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, module) -> argparse.ArgumentParser:
        description, style = module.__doc__, argparse.RawDescriptionHelpFormatter
        added = commands.add_parser(
            name, help=description.strip().splitlines()[0], description=description, formatter_class=style
        )
        added.set_defaults(parser=added)
        return added

    original = command("original-checkpoint", original_checkpoint)
    original.add_argument("checkpoint", type=Path, help="state dict of the original code, .pt or .safetensors")
    original.add_argument("output_dir", type=Path, help="folder for the converted model, new or empty")
    original.add_argument(
        "--task", choices=original_checkpoint.TASKS, help="what the model does; inferred, except for piano rolls"
    )
    original.add_argument("--num-attention-heads", type=int, required=True, help="heads (`h` in the original)")
    original.add_argument("--local-window", type=int, required=True, help="window (`ksize` in the original)")
    original.set_defaults(convert=convert_original_checkpoint)

    rnn = command("rnn", rnn_to_rsa)
    rnn.add_argument("checkpoint", type=Path, help="the RNN's state dict, .safetensors or .pt")
    rnn.add_argument("output_dir", type=Path, help="folder for the model, new or empty")
    rnn.add_argument("--nonlinearity", choices=("tanh", "none"), default="tanh")
    rnn.add_argument("--inputs", type=Path, help="safetensors file with `inputs`, to fit a tanh RNN's linear part on")
    rnn.add_argument(
        "--gate", type=float, default=0.5, help="share of the REM in its heads; any value gives the same outputs"
    )
    rnn.add_argument(
        "--perturbation", type=float, default=0.0, help="relative size of noise on the matrix; approximate"
    )
    rnn.add_argument("--largest", type=float, help="scale larger eigenvalues down to this size; approximate")
    rnn.set_defaults(convert=convert_rnn)

    options = parser.parse_args(arguments)
    return options.parser, options


def main(arguments: list[str] | None = None) -> dict:
    """Convert; the result."""
    parser, options = parse_arguments(arguments)
    folder = options.output_dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        parser.error(f"output_dir must be a new or empty folder, got {folder}")
    try:
        model, found = options.convert(options)
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    model.save_pretrained(folder)
    result = {"output_dir": str(folder), "parameters": model.num_parameters(), **found}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
