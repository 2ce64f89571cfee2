"""
Train a recipe, keep its best checkpoint and score it on held-out data.

    python -m scripts.train stdlib-code
    python -m scripts.train digits --output-dir runs/wide --set model.hidden_size=128 --set training.learning_rate=1e-3
    python -m scripts.train stdlib-code --resume
    accelerate launch --config_file configuration/accelerate/fsdp2.yaml -m scripts.train stdlib-code

A recipe is a folder of configuration/ by name, or any folder with a config.json and a training.toml. The run goes to
runs/<recipe>, or --output-dir: checkpoint-<step>/ while it trains, and final/ at the end, which has the best model, its
tokenizer, results.json, curve.json, curve.png and training.toml. final/ is a recipe itself, and what evaluate.py and
generate.py take. Progress goes to stderr. The last line of stdout is the result, the JSON of results.json on one line.
SIGTERM and Ctrl-C save the step that is being made and end with 143 and 130; --resume goes on from there.
docs/SCALING.md has the ways to launch several processes. With --set training.push_to_hub=true (and
training.hub_model_id) the checkpoints go to the Hub as they are made, and final/ with its card at the end.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainingArguments, set_seed

from scripts.data.streaming import StreamedWindows, StreamError, StreamState
from scripts.push_to_hub import push
from scripts.results.plots import curve, plot_curve
from scripts.results.provenance import commit, machine, versions
from scripts.sharing.upload import PushError
from scripts.tasks.prepared import Prepared
from scripts.training.averaging import WeightAverage
from scripts.training.budget import CLOCKS, SCORING_ENDS, EpochDrops, TimeBudget
from scripts.training.checkpoints import newest_complete, put_in_place, restore_callbacks
from scripts.training.interruptions import (
    NotFinite,
    Watch,
    full_disk_explained,
    meet_anew,
    require_room,
    require_writable,
    restart_count,
)
from scripts.training.launch import attach, make_model, set_up, whole_model
from scripts.training.recipe import Recipe, add_overrides, read_recipe
from scripts.training.trainer import make_trainer, score


SMALLER_IS_BETTER = {"bits_per_character", "perplexity", "nats_per_frame", "mse", "mae"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a folder of configuration/ by name, or the path of a recipe")
    parser.add_argument("--output-dir", type=Path, help="where the run goes; runs/<recipe> if left out")
    add_overrides(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint of the run")
    return parser.parse_args(arguments)


def prepare_output(output_dir: Path, resume: bool) -> Path | None:
    """The checkpoint to resume from, if any; refuses to write over another run."""
    if resume or restart_count():  # a restart goes on with its own run
        checkpoint = newest_complete(output_dir)
        if checkpoint is None:
            print(f"no whole checkpoint in {output_dir}; training starts anew", file=sys.stderr)
        return checkpoint
    first = int(os.environ.get("RANK", 0)) == 0  # the others may come after it has begun to write
    if first and output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(
            f"`--output-dir` {output_dir} is not empty; add --resume to go on with that run, name another, or remove it"
        )
    return None


def training_arguments(recipe: Recipe, output_dir: Path) -> TrainingArguments:
    """The recipe's settings; the first metric of the report picks the best checkpoint."""
    metric = recipe.report.metrics[0]
    chosen = {"metric_for_best_model": metric, "greater_is_better": metric not in SMALLER_IS_BETTER}
    return TrainingArguments(output_dir=str(output_dir), **{**chosen, **recipe.training})


def scores_of(
    trainer: Trainer, prepared: Prepared, recipe: Recipe, budget: TimeBudget
) -> tuple[dict[str, dict[str, float]], dict[str, list[int]]]:
    """
    The metrics of validation and test, and of each split how many of its rows were scored and how many it has: fewer
    where `budget.total_seconds` leaves no time for all, which both splits have for as many of their rows then.
    """
    metrics, rows = {}, {split: len(prepared.datasets[split]) for split in ("validation", "test")}
    scored = {}
    for split, share in (("validation", rows["validation"] / sum(rows.values())), ("test", 1.0)):
        seconds = share * budget.left(SCORING_ENDS)
        metrics[split], given = score(trainer, prepared, split, recipe.report.metrics, seconds, budget.clock)
        scored[split] = [given, rows[split]]
    return metrics, scored


def result_of(trainer: Trainer, prepared: Prepared, recipe: Recipe, budget: TimeBudget) -> dict:
    """Score the trained model and gather what there is to say about the run."""
    seconds = {clock: round(budget.seconds_by(clock), 1) for clock in CLOCKS}
    metrics, scored = scores_of(trainer, prepared, recipe, budget)
    metrics["test"].update(prepared.compare("test"))
    state = trainer.state
    return {
        "recipe": recipe.name,
        "overrides": list(recipe.overrides),
        "metrics": metrics,
        "rows_scored": scored,
        "parameters": trainer.accelerator.unwrap_model(trainer.model).num_parameters(),
        "tokens_seen": state.num_input_tokens_seen // trainer.get_tp_size(),  # a row once, however many share it
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "wall_seconds": {"training": seconds["wall"]},
        "processor_seconds": {"training": seconds["processor"]},
        "seed": trainer.args.seed,
        "processes": trainer.args.world_size,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }


def save_final(
    model: PreTrainedModel, trainer: Trainer, prepared: Prepared, recipe: Recipe, result: dict, folder: Path
) -> None:
    """Write the final model with all that belongs to it beside `folder`, then rename it to `folder` at once."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if hasattr(recipe.config(), "use_cache"):
        model.config.use_cache = recipe.config().use_cache  # Trainer switches it off
    elif hasattr(model.config, "use_cache"):  # or makes one up
        del model.config.use_cache
    model.save_pretrained(partial)
    if prepared.tokenizer is not None:
        prepared.tokenizer.save_pretrained(partial)
    recipe.save(partial)
    metric = recipe.report.metrics[0]
    rows = curve(trainer.state.log_history, metric)
    for name, content in (("results.json", result), ("curve.json", rows)):
        (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    plot_curve(rows, metric, partial / "curve.png")
    put_in_place(partial, folder)


def push_final(trainer: Trainer, folder: Path) -> None:
    """Put the final model with its card in place of what was pushed during training; the run is saved already."""
    options = {"private": bool(trainer.args.hub_private_repo), "revision": trainer.args.hub_revision}
    try:
        print(f"pushed to {push(folder, trainer.hub_model_id, **options)['url']}", file=sys.stderr)
    except (PushError, ValueError, OSError) as error:
        sys.exit(f"error: {error}. The run is saved in {folder}; push it with python -m scripts.push_to_hub")


def stopped_by(number: signal.Signals, step: int, output_dir: Path) -> NoReturn:
    """End as a shell says that a signal ended a program: with 128 and its number."""
    print(
        f"{number.name}: stopped after step {step}, which is saved in {output_dir / f'checkpoint-{step}'}; go on with "
        "the same command and --resume",
        file=sys.stderr,
    )
    sys.exit(128 + number)


def main(arguments: list[str] | None = None) -> dict | None:
    """Train; the result on the main process, None on the others."""
    started = time.monotonic()
    options = parse_arguments(arguments)
    try:
        recipe = read_recipe(options.recipe, options.overrides)
        budget = TimeBudget(recipe.budget.max_seconds, recipe.budget.clock, recipe.budget.total_seconds)
        output_dir = options.output_dir or Path("runs") / recipe.name
        checkpoint = prepare_output(output_dir, options.resume)
        require_writable(output_dir)
        meet_anew(recipe.training.get("ddp_timeout", TrainingArguments.ddp_timeout))
        args = training_arguments(recipe, output_dir)
        averaged = recipe.averaging.decay is not None
        set_up(args, options.resume, checkpoint, averaged)
        with args.main_process_first(desc="preparing the data"):  # the others find it in the cache
            prepared = recipe.prepare(tokenizer=None, splits=("train", "validation", "test"))
        set_seed(args.seed)
        make = functools.partial(prepared.auto_class.from_config, recipe.config(**prepared.config_values))
        model = make_model(make)
        require_room(output_dir, model, args, averaged)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    watch = Watch(prepared.tokenizer)
    drops = EpochDrops(recipe.schedule.drop_every_epochs, recipe.schedule.drop_factor)
    callbacks = [drops, budget, watch]
    if averaged:
        callbacks.append(WeightAverage(recipe.averaging.decay))
    if recipe.budget.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(recipe.budget.early_stopping_patience))
    if isinstance(prepared.datasets["train"], StreamedWindows):
        callbacks.append(StreamState())
    if checkpoint is not None:
        restore_callbacks(callbacks, checkpoint)
    trainer = make_trainer(model, args, prepared, callbacks=callbacks)
    attach(trainer)
    try:
        with watch.signals(), full_disk_explained(output_dir, model, averaged):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (NotFinite, StreamError) as error:
        sys.exit(f"error: {error}")
    if watch.signal is not None:
        trainer.accelerator.end_training()
        stopped_by(watch.signal, trainer.state.global_step, output_dir)
    result = result_of(trainer, prepared, recipe, budget)
    result["wall_seconds"]["total"] = round(time.monotonic() - started, 1)
    model = whole_model(trainer, make)
    if trainer.is_world_process_zero():
        with full_disk_explained(output_dir, model):
            save_final(model, trainer, prepared, recipe, result, output_dir / "final")
        if args.push_to_hub:
            push_final(trainer, output_dir / "final")
    trainer.accelerator.end_training()
    return result if trainer.is_world_process_zero() else None


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = main()
    if result is not None:
        print(json.dumps(result))
