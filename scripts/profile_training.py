"""
Show where the time of a recipe's training goes: before it begins, by the parts of a step, and by operations.

    python -m scripts.profile_training stdlib-code
    python -m scripts.profile_training ptb-char --steps 5 --set model.hidden_size=128 --trace runs/ptb-char.json

The recipe is trained as by train.py for a few steps, each part of which is timed until the device has finished it, and
then for as many under torch's profiler, for the operations. --trace keeps what the profiler saw, for a browser's
chrome://tracing. Nothing else is written. The last line of stdout is the result as JSON on one line.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainingArguments, set_seed

from scripts.results.provenance import machine, versions
from scripts.training.interruptions import Watch
from scripts.training.recipe import Recipe, add_overrides, read_recipe
from scripts.training.trainer import RecipeTrainer, make_trainer


WARM_UP = 2  # steps that are not counted: the first makes what the others find
OPERATIONS = 8  # the dearest that are shown
PARTS = {
    "data": "the batches of a step, collated and on the device",
    "forward": "the model and its loss",
    "backward": "the gradients",
    "clipping": "the gradients' norm, and their scaling",
    "watch": "looking for numbers that are not finite, and signals",
    "optimizer": "the new weights",
    "rest": "what Trainer does around them",
}


class Clock:
    """Seconds spent in each part; a part is its methods, wrapped where they are."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def wrap(self, part: str, owner: Any, method: str) -> None:
        """Have `owner.method` timed as `part`."""
        function: Callable = getattr(owner, method)

        def timed(*arguments, **options):
            start = self.now()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[part] += self.now() - start

        setattr(owner, method, timed)


class Steps(TrainerCallback):
    """
    Times the parts of steps `WARM_UP + 1` to `WARM_UP + steps`, then has as many looked at by torch's profiler.

    Args:
        trainer: the one that will train.
        watch: its watch.
        steps: how many.
    """

    def __init__(self, trainer: RecipeTrainer, watch: Watch, steps: int) -> None:
        self.trainer, self.watch, self.steps = trainer, watch, steps
        self.clock = Clock(trainer.args.device)
        activities = [ProfilerActivity.CPU]
        if self.clock.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities)
        self.total = self.started = 0.0
        self.tokens_before = self.tokens = 0

    def on_train_begin(self, args, state, control, **kwargs):
        for part, owner, method in (
            ("data", self.trainer, "get_batch_samples"),
            ("forward", self.trainer, "compute_loss"),
            ("backward", self.trainer.accelerator, "backward"),
            ("clipping", self.trainer.accelerator, "clip_grad_norm_"),
            ("watch", self.watch, "on_pre_optimizer_step"),
            ("watch", self.watch, "on_step_end"),
        ):
            self.clock.wrap(part, owner, method)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == WARM_UP:
            self.clock.wrap("optimizer", optimizer, "step")  # here, for a schedule replaces it before the first
            self.clock.seconds = dict.fromkeys(PARTS, 0.0)
            self.tokens_before, self.started = state.num_input_tokens_seen, self.clock.now()
        elif state.global_step == WARM_UP + self.steps:
            self.total = self.clock.now() - self.started
            self.clock.seconds["rest"] = self.total - sum(self.clock.seconds.values())
            self.tokens = state.num_input_tokens_seen - self.tokens_before
            self.seconds = {part: seconds / self.steps for part, seconds in self.clock.seconds.items()}
            self.profiler.start()
        elif state.global_step == WARM_UP + 2 * self.steps:
            self.profiler.stop()

    def operations(self) -> dict[str, float]:
        """The share of the time of each of the dearest operations, by itself; on a GPU, of the GPU's time."""
        on_gpu = self.clock.device.type == "cuda"
        spent = {
            event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
            for event in self.profiler.key_averages()
        }
        total = sum(spent.values())
        dearest = sorted(spent, key=spent.get, reverse=True)[:OPERATIONS]
        return {name: spent[name] / total for name in dearest}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a folder of configuration/ by name, or the path of a recipe")
    parser.add_argument("--steps", type=int, default=10, help="how many steps to time; 10 if left out")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="keep what torch's profiler saw")
    add_overrides(parser)
    return parser.parse_args(arguments)


def profile_recipe(recipe: Recipe, steps: int, trace: Path | None = None) -> dict[str, Any]:
    """
    Train for a few steps; seconds before the first, seconds a step by part, and the dearest operations.

    Raises:
        ValueError: fewer steps than 1, or a recipe that cannot be prepared.
    """
    if steps < 1:
        raise ValueError(f"`--steps` must be at least 1, got {steps}")
    started = time.perf_counter()
    prepared = recipe.prepare(tokenizer=None, splits=("train",))
    preparation = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        only = {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
        only |= {"max_steps": WARM_UP + 2 * steps, "load_best_model_at_end": False, "push_to_hub": False}
        args = TrainingArguments(**{**recipe.training, **only, "output_dir": folder})
        set_seed(args.seed)
        model = prepared.auto_class.from_config(recipe.config(**prepared.config_values))
        watch = Watch(prepared.tokenizer)
        trainer = make_trainer(model, args, prepared, callbacks=[watch])
        timed = Steps(trainer, watch, steps)
        trainer.add_callback(timed)
        trainer.train()
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        timed.profiler.export_chrome_trace(str(trace))
    return {
        "recipe": recipe.name,
        "overrides": list(recipe.overrides),
        "parameters": model.num_parameters(),
        "steps": steps,
        "preparation_seconds": preparation,
        "step_seconds": timed.total / steps,
        "tokens_per_second": timed.tokens / timed.total,
        "parts": timed.seconds,
        "operations": timed.operations(),
        "machine": machine(),
        "versions": versions(),
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    step = result["step_seconds"]
    return "\n".join(
        [
            f"{result['recipe']}, {result['parameters']:,} parameters: {1e3 * step:,.1f} ms a step after "
            f"{result['preparation_seconds']:,.1f} s for the data",
            "",
            "| part | ms a step | share | what it is |",
            "|---|---|---|---|",
            *(
                f"| {part} | {1e3 * seconds:,.1f} | {seconds / step:.1%} | {PARTS[part]} |"
                for part, seconds in result["parts"].items()
            ),
            "",
            "| operation | share of all operations |",
            "|---|---|",
            *(f"| {name} | {share:.1%} |" for name, share in result["operations"].items()),
        ]
    )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Profile; the result."""
    options = parse_arguments(arguments)
    try:
        result = profile_recipe(read_recipe(options.recipe, options.overrides), options.steps, options.trace)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table(result) + "\n", file=sys.stderr)
    return result


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = main()
    print(json.dumps(result))
