"""A time budget: when training and scoring stop, and how the learning rate comes down by then, or by steps."""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


# The time that passes, and what the process's threads use of the processor: that of others beside it does not count.
CLOCKS = {"wall": time.monotonic, "processor": time.process_time}

# Shares of `total_seconds` after which training and scoring have to end; what follows scoring is written in the rest.
TRAINING_ENDS, SCORING_ENDS = 5 / 6, 19 / 20


class TimeBudget(TrainerCallback, ExportableState):
    """
    Stops training after `max_seconds`, with a last evaluation and checkpoint, and notes the seconds in every log entry.

    The learning rate follows its schedule at `max(step / max_steps, seconds / max_seconds)`, so a schedule that ends at
    zero is near zero when the time is up. A warm-up given as a share of the steps is a share of the time then.

    Every log entry has the `percent` of the run that is done: of its steps or its time, whichever is nearer its end.

    The seconds count on over a resume. With several processes, the first one's clock decides for all of them.

    Args:
        max_seconds: None for no limit; then only the seconds are noted.
        clock: one of [`CLOCKS`].
        total_seconds:
            for the whole run, counted from here on and not over a resume: training ends when `TRAINING_ENDS` of them
            have passed, if not before, and [`left`] says what remains then. None for no limit.
    """

    def __init__(
        self, max_seconds: float | None = None, clock: str = "wall", total_seconds: float | None = None
    ) -> None:
        self.max_seconds, self.clock, self.total_seconds = max_seconds, clock, total_seconds
        self.begun = CLOCKS[clock]()
        self.limit = max_seconds  # of training, in seconds of this clock; `on_train_begin` lowers it to what is left
        self.seconds_before = dict.fromkeys(CLOCKS, 0.0)  # of the runs that this one resumes
        self.started: dict[str, float] | None = None
        self.shared_seconds = 0.0  # the first process's clock at the last step

    def seconds_by(self, clock: str) -> float:
        """Seconds of training so far by any clock, those before a resume included."""
        return self.seconds_before[clock] + (CLOCKS[clock]() - self.started[clock] if self.started is not None else 0.0)

    def left(self, share: float) -> float:
        """Seconds until this share of `total_seconds` has passed; infinite without a limit."""
        if self.total_seconds is None:
            return math.inf
        return max(0.0, share * self.total_seconds - (CLOCKS[self.clock]() - self.begun))

    def state(self) -> dict:
        return {"args": {}, "attributes": {"seconds_before": {clock: self.seconds_by(clock) for clock in CLOCKS}}}

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        self.started = {name: now() for name, now in CLOCKS.items()}
        self.shared_seconds = self.seconds_before[self.clock]
        if self.total_seconds is not None:
            left = max(1e-3, self.left(TRAINING_ENDS))  # of a start-up that took too long, one step is left
            self.limit = min(self.max_seconds or math.inf, self.shared_seconds + left)
        if self.limit is not None and hasattr(lr_scheduler, "lr_lambdas"):
            lr_scheduler.lr_lambdas = [self._by_the_clock(factor, state) for factor in lr_scheduler.lr_lambdas]

    def _by_the_clock(self, factor, state):
        def at(step: int) -> float:
            return factor(max(step, min(1.0, self.shared_seconds / self.limit) * state.max_steps))

        return at

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.limit is None:
            return
        shared = torch.tensor([self.seconds_by(self.clock), self.limit], device=args.device, dtype=torch.float32)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(shared, src=0)
        self.shared_seconds, self.limit = shared.tolist()

    def on_step_end(self, args, state, control, **kwargs):
        if self.limit is not None and self.shared_seconds >= self.limit:
            control.should_training_stop = control.should_evaluate = control.should_save = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        done = state.global_step / max(state.max_steps, 1)
        if self.limit is not None:
            done = max(done, min(1.0, self.shared_seconds / self.limit))
        logs["percent"] = state.log_history[-1]["percent"] = round(100 * done, 2)
        state.log_history[-1]["seconds"] = round(self.seconds_by(self.clock), 2)


class RowsInTime(IterableDataset):
    """
    The rows of a dataset, each once, until `seconds` have passed; the first row in any case. Wherever they end they are
    spread evenly: row k is number k s modulo the rows, with a step s near the golden section of the rows.

    Args:
        clock: one of [`CLOCKS`].
    """

    def __init__(self, dataset: Dataset, seconds: float, clock: str = "wall") -> None:
        self.dataset, self.seconds, self.clock = dataset, seconds, clock
        self.given = 0

    def __iter__(self) -> Iterator[Any]:
        rows, end = len(self.dataset), CLOCKS[self.clock]() + self.seconds
        step = next(step for step in range(round(0.618 * rows) or 1, rows + 1) if math.gcd(step, rows) == 1)
        for self.given in range(1, rows + 1):
            yield self.dataset[(self.given - 1) * step % rows]
            if CLOCKS[self.clock]() >= end:
                return


class EpochDrops(TrainerCallback):
    """
    Multiplies the learning rate that the schedule gives by `factor` after every `epochs` epochs.

    Args:
        epochs: None for never.
    """

    def __init__(self, epochs: int | None, factor: float) -> None:
        self.epochs, self.factor = epochs, factor

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        if self.epochs is not None:
            steps = state.max_steps / args.num_train_epochs * self.epochs
            lr_scheduler.lr_lambdas = [self._dropped(factor, steps) for factor in lr_scheduler.lr_lambdas]

    def _dropped(self, factor, steps: float):
        return lambda step: factor(step) * self.factor ** int(step / steps)
