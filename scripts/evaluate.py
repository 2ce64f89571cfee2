"""
Score a trained model on a split of its recipe's data.

    python -m scripts.evaluate runs/stdlib-code/final
    python -m scripts.evaluate runs/stdlib-code/final --split validation --set task.eval_window=512
    python -m scripts.evaluate runs/text8-xl/final --set model.memory_length=2100 --set model.clamp_length=820

CHECKPOINT is the final/ of a run, or any saved model with the recipe's training.toml in its folder. The split must be
available as in training: the same files, or the same Python for stdlib-code. Progress goes to stderr. The last line of
stdout is one JSON object with the metrics.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, TrainingArguments

from scripts.results.provenance import provenance
from scripts.training.checkpoints import load_model, saved_model
from scripts.training.recipe import add_overrides, read_recipe
from scripts.training.trainer import make_trainer, score


# What may be another than in training: no parameter depends on it.
MEMORY_FIELDS = ("memory_length", "memory_mask", "clamp_length")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the folder of a saved model with its training.toml")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    add_overrides(parser, "a setting of training.toml, as section.key=value, or model.memory_length=value")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict:
    """Score; the result."""
    options = parse_arguments(arguments)
    options.checkpoint = saved_model(options.checkpoint)
    try:
        recipe = read_recipe(options.checkpoint.resolve(), options.overrides)
        if options.split == "train" and getattr(recipe.data, "streaming", False):
            raise ValueError("`--split train` is an endless stream; score another split, or --set data.streaming=false")
        has_tokenizer = (options.checkpoint / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(options.checkpoint) if has_tokenizer else None
        prepared = recipe.prepare(tokenizer=tokenizer, splits=(options.split,))
        fields = {name: recipe.model[name] for name in MEMORY_FIELDS if name in recipe.model}
        model = load_model(prepared.auto_class, options.checkpoint, **fields)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory() as folder:  # required by Trainer; nothing is written to it
        kept = ("per_device_eval_batch_size", "use_cpu", "bf16", "bf16_full_eval", "dataloader_num_workers")
        settings = {name: value for name, value in recipe.training.items() if name in kept}
        trainer = make_trainer(model, TrainingArguments(output_dir=folder, **settings), prepared)
        metrics, _, details = score(trainer, prepared, options.split, recipe.report.metrics)
    return {
        "checkpoint": options.checkpoint.name,
        "split": options.split,
        "metrics": metrics | prepared.compare(options.split),
        "overrides": options.overrides,
        "parameters": model.num_parameters(),
        **details,
        **provenance(),
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = main()
    print(json.dumps(result))
