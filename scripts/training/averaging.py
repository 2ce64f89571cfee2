"""
An exponential moving average of the weights, which is what a run is scored by and what it returns:

    average <- decay * average + (1 - decay) * weights        after each step, beginning with the first weights

A checkpoint's `model.safetensors` is the average; training resumes from `unaveraged.safetensors` beside it.
"""

from pathlib import Path

import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import parse_flag_from_env
from safetensors.torch import load_model, save_model
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainingArguments


UNAVERAGED = "unaveraged.safetensors"


class WeightAverage(TrainerCallback):
    """
    Keeps the average while `Trainer` trains, and gives it to the model for every evaluation and checkpoint, and for
    good at the end. It must be the last callback: the others set what happens after a step.

    Each process of several computes the same average, so each must have all weights. Buffers are not averaged.

    Args:
        decay: above 0 and below 1.
        checkpoint: the one to resume from.
    """

    def __init__(self, decay: float, checkpoint: Path | None = None) -> None:
        self.update, self.checkpoint = get_ema_multi_avg_fn(decay), checkpoint
        self.weights: list[torch.Tensor] = []  # the model's trained parameters, tied ones once
        self.other: list[torch.Tensor] = []  # the average while the model has the weights, else the weights
        self.model_has_average = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.other = [weight.detach().clone() for weight in self.weights]  # on resuming, Trainer has loaded the average
        if self.checkpoint is not None:
            load_model(model, self.checkpoint / UNAVERAGED)
        self._give(average=True)

    def on_step_begin(self, args, state, control, **kwargs):
        self._give(average=False)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.update(self.other, self.weights, None)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_evaluate or control.should_save or control.should_training_stop:
            self._give(average=True)

    on_epoch_end = on_step_end

    def on_train_end(self, args, state, control, **kwargs):
        self.weights, self.other = [], []  # the model has the average, or the best checkpoint's, and keeps it

    def on_save(self, args, state, control, model=None, **kwargs):
        if args.should_save:
            self._give(average=False)
            save_model(model, str(Path(args.output_dir, f"checkpoint-{state.global_step}", UNAVERAGED)))
            self._give(average=True)

    @torch.no_grad()
    def _give(self, average: bool) -> None:
        """Give the model the average, or the weights, in the parameters' own memory, which compiled code refers to."""
        if average != self.model_has_average:
            for weight, other in zip(self.weights, self.other):
                before = weight.clone()
                weight.copy_(other)
                other.copy_(before)
            self.model_has_average = average


def average_callbacks(decay: float | None, args: TrainingArguments, checkpoint: Path | None) -> list[WeightAverage]:
    """
    The callback of `[averaging]`; none without a `decay`.

    Raises:
        ValueError: the processes share out the weights, or `checkpoint` is of a run with averaging and this one is
            without, or the reverse.
    """
    if checkpoint is not None and (checkpoint / UNAVERAGED).is_file() != (decay is not None):
        raise ValueError(
            f"{checkpoint} is of a run {'without' if decay else 'with'} `averaging.decay`; resume with the recipe of "
            "that run, or begin a new one in another --output-dir"
        )
    if decay is None:
        return []
    sharded = args.fsdp or args.deepspeed or ParallelismConfig().non_data_parallel_size > 1
    if sharded or parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "`averaging.decay` needs all weights in each process: one process or DDP, not FSDP, DeepSpeed, tensor or "
            "context parallelism; leave it out"
        )
    return [WeightAverage(decay, checkpoint)]
