"""
Convert a checkpoint of other code, a recurrent network, or the linear layers of a saved model, into a model that
`from_pretrained` loads.

    python -m scripts.convert original-checkpoint model.pt converted/ --num-attention-heads 8 --local-window 7
    python -m scripts.convert rnn rnn.safetensors converted/ --nonlinearity none
    python -m scripts.convert rnn rnn.safetensors converted/ --inputs inputs.safetensors
    python -m scripts.convert transformer-xl model.pt converted/ --set memory_length=512 --set norm_position=post
    python -m scripts.convert block-recurrent model.safetensors converted/ --set block_length=64 --set memory_length=64
    python -m scripts.convert butterfly-checkpoint model.pt converted/ --num-attention-heads 8 --local-window 7
    python -m scripts.convert monarch runs/stdlib-code/final converted/ --linear-blocks 8
    python -m scripts.convert fold runs/stdlib-code/final converted/

Each sub-command has its own --help. The last line of stdout is one JSON object with the result.
"""

import argparse
import json
from pathlib import Path

from modeling_rtransformer.configuration_rtransformer import LINEAR_PARTS
from scripts.conversion import (
    block_recurrent,
    butterfly_checkpoint,
    dense_to_monarch,
    fold_structure,
    original_checkpoint,
    rnn_to_rsa,
    transformer_xl,
)


COMMANDS = {
    "original-checkpoint": original_checkpoint,
    "rnn": rnn_to_rsa,
    "transformer-xl": transformer_xl,
    "block-recurrent": block_recurrent,
    "butterfly-checkpoint": butterfly_checkpoint,
    "monarch": dense_to_monarch,
    "fold": fold_structure,
}


def main(arguments: list[str] | None = None) -> dict:
    """Convert; the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {}
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, description=module.__doc__, formatter_class=parser.formatter_class)
        command.add_argument(
            "checkpoint", type=Path, help="its state dict, .safetensors or .pt; of `monarch` and `fold` a folder"
        )
        command.add_argument("output_dir", type=Path, help="folder for the model, new or empty")
        parsers[name] = command
    for published in (parsers["original-checkpoint"], parsers["butterfly-checkpoint"]):
        published.add_argument("--task", choices=original_checkpoint.TASKS, help="inferred, except for piano rolls")
        published.add_argument("--num-attention-heads", type=int, required=True, help="heads (`h` in the original)")
        published.add_argument("--local-window", type=int, required=True, help="window (`ksize` in the original)")
    monarch = parsers["monarch"]
    monarch.add_argument("--linear-blocks", type=int, required=True, help="blocks of a factor")
    monarch.add_argument(
        "--linear-structure-in", nargs="+", choices=LINEAR_PARTS, help="parts of a block; all if left out"
    )
    rnn = parsers["rnn"]
    remembering = [parsers["transformer-xl"], parsers["block-recurrent"]]
    rnn.add_argument("--nonlinearity", choices=("tanh", "none"), default="tanh")
    rnn.add_argument("--inputs", type=Path, help="safetensors file with `inputs`, to fit a tanh RNN's linear part on")
    rnn.add_argument("--perturbation", type=float, default=0.0, help="relative noise on the matrix; approximate")
    rnn.add_argument("--largest", type=float, help="scale larger eigenvalues down to this size; approximate")
    for command in remembering:
        field = {"metavar": "FIELD=VALUE", "dest": "fields", "help": "a field of RTransformerConfig; may be repeated"}
        command.add_argument("--set", action="append", default=[], **field)
    options = vars(parser.parse_args(arguments))
    name, folder = options.pop("command"), options.pop("output_dir")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        parsers[name].error(f"output_dir must be a new or empty folder, got {folder}")
    try:
        model, found = COMMANDS[name].convert(**options)
    except (ValueError, OSError) as problem:
        parsers[name].error(str(problem))
    model.save_pretrained(folder)
    result = {"output_dir": str(folder), "parameters": model.num_parameters(), **found}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
