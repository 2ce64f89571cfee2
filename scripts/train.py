"""
Train a recipe, keep its best checkpoint and score it on held-out data.

    python -m scripts.train stdlib-code
    python -m scripts.train digits --output-dir runs/wide --set model.hidden_size=128 --set training.learning_rate=1e-3
    python -m scripts.train stdlib-code --resume
    accelerate launch --config_file configuration/accelerate/fsdp2.yaml -m scripts.train stdlib-code

RECIPE is the name of a folder in configuration/, or the path of any folder with a config.json and a training.toml. The
run is written to runs/RECIPE, or --output-dir: checkpoint-STEP/ during training, and final/ at the end, with the best
model, its tokenizer, results.json, curve.json, curve.png and training.toml. final/ is a recipe itself, and evaluate and
generate take it. Progress is printed on stderr. The last line of stdout is the result, the JSON of results.json on one
line. On SIGTERM and Ctrl-C the current step is finished and saved, and the exit status is 143 and 130; --resume
continues from there. docs/SCALING.md describes the ways to launch several processes. With --set
training.push_to_hub=true (and training.hub_model_id) the checkpoints are pushed to the Hub as they are made, and final/
with its model card at the end.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from transformers import EarlyStoppingCallback, PreTrainedModel, TrainingArguments, set_seed

from scripts.data.streaming import StreamedWindows, StreamError, StreamState
from scripts.data.streams import Streams
from scripts.push_to_hub import push
from scripts.results.plots import curve, plot_confusion, plot_curve
from scripts.results.provenance import provenance
from scripts.sharing.upload import PushError
from scripts.tasks.prepared import Prepared
from scripts.training.averaging import average_callbacks
from scripts.training.budget import CLOCKS, SCORING_ENDS, EpochDrops, TimeBudget
from scripts.training.carried_memory import SaveMemory
from scripts.training.checkpoints import MarkComplete, newest_complete, replace_folder, restore_callbacks
from scripts.training.interruptions import InterruptionCallback, NotFinite, explain_full_disk, require_writable
from scripts.training.launch import (
    attach,
    init_process_group_after_restart,
    make_model,
    restart_count,
    set_up,
    whole_model,
)
from scripts.training.profiling import ProfileCallback
from scripts.training.recipe import Recipe, add_overrides, read_recipe, recipe_folder
from scripts.training.trainer import RecipeTrainer, make_trainer, require_packages, score


SMALLER_IS_BETTER = {"bits_per_character", "perplexity", "nats_per_frame", "mse", "mae"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a folder of configuration/ by name, or the path of a recipe")
    parser.add_argument("--output-dir", type=Path, help="where the run is written; runs/RECIPE if left out")
    add_overrides(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint of the run")
    parser.add_argument("--profile", type=int, metavar="STEPS", help="profile so many steps; writes profile.json")
    return parser.parse_args(arguments)


def prepare_output(output_dir: Path, resume: bool) -> Path | None:
    """The checkpoint to resume from, if any; refuses a folder that holds another run."""
    if resume or restart_count():  # a restart continues its own run
        checkpoint = newest_complete(output_dir)
        if checkpoint is None:
            print(f"no complete checkpoint in {output_dir}; training starts from the beginning", file=sys.stderr)
        return checkpoint
    first = int(os.environ.get("RANK", 0)) == 0  # the others may look after it has begun to write
    if first and output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(
            f"`--output-dir` {output_dir} is not empty; add --resume to go on with that run, name another, or remove it"
        )
    return None


@dataclasses.dataclass(frozen=True)
class Run:
    """A training that is ready to begin. `make` makes a new, whole model; `checkpoint` is the one to resume from."""

    recipe: Recipe
    output_dir: Path
    checkpoint: Path | None
    prepared: Prepared
    make: Callable[[], PreTrainedModel]
    trainer: RecipeTrainer
    budget: TimeBudget
    interruption: InterruptionCallback


def prepare(options: argparse.Namespace) -> Run:
    """
    Read the recipe and the data, make the model and the trainer.

    Raises:
        ValueError, OSError: a setting, the data, the output folder or the launch settings are not valid.
    """
    recipe = read_recipe(options.recipe, options.overrides)
    if any(recipe_folder(options.recipe).glob("*.safetensors")):
        raise ValueError(
            f"recipe {options.recipe!r} holds a trained model, and train makes a new one; go on with it by --resume, "
            "train it further with `Trainer`, or copy config.json and training.toml to a folder of their own"
        )
    budget = TimeBudget(recipe.budget.max_seconds, recipe.budget.clock, recipe.budget.total_seconds)
    output_dir = options.output_dir or Path("runs") / recipe.name
    checkpoint = prepare_output(output_dir, options.resume)
    require_writable(output_dir)
    init_process_group_after_restart(recipe.training.get("ddp_timeout", TrainingArguments.ddp_timeout))
    metric = recipe.report.metrics[0]
    settings = {"metric_for_best_model": metric, "greater_is_better": metric not in SMALLER_IS_BETTER}
    args = TrainingArguments(str(output_dir), **{**settings, **recipe.training})
    require_packages(args)
    set_up(args, options.resume, checkpoint)
    averages = average_callbacks(recipe.averaging.decay, args, checkpoint)
    with args.main_process_first(desc="preparing the data"):  # the others find it in the cache
        prepared = recipe.prepare(tokenizer=None, splits=("train", "validation", "test"))
    set_seed(args.seed)

    def make() -> PreTrainedModel:
        return prepared.auto_class.from_config(recipe.config(**prepared.config_values))

    model = make_model(make)
    interruption = InterruptionCallback(prepared.tokenizer)
    callbacks = [EpochDrops(recipe.schedule.drop_every_epochs, recipe.schedule.drop_factor), budget, interruption]
    if recipe.budget.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(recipe.budget.early_stopping_patience))
    if isinstance(prepared.datasets["train"], StreamedWindows):
        callbacks.append(StreamState())
    if options.profile is not None:
        callbacks.append(ProfileCallback(options.profile, output_dir))
    if checkpoint is not None:
        restore_callbacks(callbacks, checkpoint)
    trainer = make_trainer(model, args, prepared, callbacks=callbacks)
    attach(trainer)
    if isinstance(prepared.datasets["train"], Streams):
        trainer.add_callback(SaveMemory(trainer.memories[True], checkpoint))
    for callback in (*averages, MarkComplete()):  # each comes after all that it has to come after
        trainer.add_callback(callback)
    return Run(recipe, output_dir, checkpoint, prepared, make, trainer, budget, interruption)


def train(run: Run) -> None:
    """Train to the end; exits where a signal, a number that is not finite, or a full disk ends it before."""
    try:
        with run.interruption.handle_signals(), explain_full_disk(run.output_dir):
            run.trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
    except (NotFinite, StreamError) as error:
        sys.exit(f"error: {error}")
    if run.interruption.signal is not None:
        run.trainer.accelerator.end_training()
        number, step = run.interruption.signal, run.trainer.state.global_step
        print(
            f"{number.name}: stopped after step {step}, which is saved in {run.output_dir / f'checkpoint-{step}'}; "
            "go on with the same command and --resume",
            file=sys.stderr,
        )
        sys.exit(128 + number)  # as shells have it for a program that a signal ended


def finish(run: Run, began: float) -> dict | None:
    """
    Score the model, save it with its results and push it if asked for.

    Args:
        began: when the program began, by `time.monotonic`.

    Returns:
        The result on the main process, None on the others.
    """
    trainer, final = run.trainer, run.output_dir / "final"
    result = result_of(run)
    result["wall_seconds"]["total"] = round(time.monotonic() - began, 1)
    model = whole_model(trainer, run.make)
    if model is not None:
        with explain_full_disk(run.output_dir):
            save_final(run, model, result, final)
        if trainer.args.push_to_hub:
            push_final(trainer, final)
    trainer.accelerator.end_training()
    return result if model is not None else None


def result_of(run: Run) -> dict:
    """
    Score the trained model and gather the facts about the run.

    `rows_scored` has, for each split, how many rows were scored and how many there are: `budget.total_seconds` may
    leave no time for all of them. The splits then get time in proportion to their rows.
    """
    trainer, budget = run.trainer, run.budget
    seconds = {clock: {"training": round(budget.seconds_by(clock), 1)} for clock in CLOCKS}
    rows = {split: len(run.prepared.datasets[split]) for split in ("validation", "test")}
    metrics, rows_scored, unscored = {}, {}, sum(rows.values())
    for split, count in rows.items():
        time_left = budget.left(SCORING_ENDS) * count / unscored
        names = run.recipe.report.metrics
        metrics[split], scored, details = score(trainer, run.prepared, split, names, time_left, budget.clock)
        rows_scored[split], unscored = [scored, count], unscored - count
    metrics["test"].update(run.prepared.compare("test"))
    return {
        "recipe": run.recipe.name,
        "overrides": list(run.recipe.overrides),
        "metrics": metrics,
        "rows_scored": rows_scored,
        **details,  # of the test split
        "parameters": trainer.accelerator.unwrap_model(trainer.model).num_parameters(),
        # Each process counts the rows it reads, and those that share rows count them once each.
        "tokens_seen": trainer.state.num_input_tokens_seen // trainer.get_tp_size(),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "wall_seconds": seconds["wall"],
        "processor_seconds": seconds["processor"],
        "seed": trainer.args.seed,
        "processes": trainer.args.world_size,
        **provenance(),
    }


def save_final(run: Run, model: PreTrainedModel, result: dict, folder: Path) -> None:
    """Write the final model and its files to a folder beside `folder`, then rename that to `folder`."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    if run.prepared.tokenizer is not None:
        run.prepared.tokenizer.save_pretrained(partial)
    run.recipe.save(partial)
    metric = run.recipe.report.metrics[0]
    rows = curve(run.trainer.state.log_history, metric)
    for name, content in (("results.json", result), ("curve.json", rows)):
        (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    plot_curve(rows, metric, partial / "curve.png")
    if "confusion" in result:
        plot_confusion(result["confusion"], [row["class"] for row in result["classes"]], partial / "confusion.png")
    replace_folder(folder, partial)


def push_final(trainer: RecipeTrainer, folder: Path) -> None:
    """Push the saved final model with its card, replacing what was pushed during training."""
    options = {"private": bool(trainer.args.hub_private_repo), "revision": trainer.args.hub_revision}
    try:
        print(f"pushed to {push(folder, trainer.hub_model_id, **options)['url']}", file=sys.stderr)
    except (PushError, ValueError, OSError) as error:
        sys.exit(f"error: {error}. The run is saved in {folder}; push it with python -m scripts.push_to_hub")


def main(arguments: list[str] | None = None) -> dict | None:
    """Train; the result on the main process, None on the others."""
    began = time.monotonic()
    options = parse_arguments(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("modeling_rtransformer").setLevel(logging.INFO)  # which implementation of the LocalRNN runs
    try:
        run = prepare(options)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    train(run)
    return finish(run, began)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = main()
    if result is not None:
        print(json.dumps(result))
