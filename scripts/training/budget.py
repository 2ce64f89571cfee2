"""A time budget for training: when to stop, and how the learning rate comes down by then, or by steps."""

import time

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


# The time that passes, and what the process's threads use of the processor: that of others beside it does not count.
CLOCKS = {"wall": time.monotonic, "processor": time.process_time}


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
    """

    def __init__(self, max_seconds: float | None = None, clock: str = "wall") -> None:
        self.max_seconds, self.clock = max_seconds, clock
        self.seconds_before = dict.fromkeys(CLOCKS, 0.0)  # of the runs that this one resumes
        self.started: dict[str, float] | None = None
        self.shared_seconds = 0.0  # the first process's clock at the last step

    @property
    def seconds(self) -> float:
        """Seconds of training so far by the budget's clock, those before a resume included."""
        return self.seconds_by(self.clock)

    def seconds_by(self, clock: str) -> float:
        """The same by any clock."""
        return self.seconds_before[clock] + (CLOCKS[clock]() - self.started[clock] if self.started is not None else 0.0)

    def state(self) -> dict:
        return {
            "args": {"max_seconds": self.max_seconds, "clock": self.clock},
            "attributes": {"seconds_before": {clock: self.seconds_by(clock) for clock in CLOCKS}},
        }

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        self.started = {name: now() for name, now in CLOCKS.items()}
        self.shared_seconds = self.seconds_before[self.clock]
        if self.max_seconds is not None and hasattr(lr_scheduler, "lr_lambdas"):
            lr_scheduler.lr_lambdas = [self._by_the_clock(factor, state) for factor in lr_scheduler.lr_lambdas]

    def _by_the_clock(self, factor, state):
        def at(step: int) -> float:
            return factor(max(step, min(1.0, self.shared_seconds / self.max_seconds) * state.max_steps))

        return at

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.max_seconds is None:
            return
        seconds = torch.tensor([self.seconds], device=args.device, dtype=torch.float32)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(seconds, src=0)
        self.shared_seconds = seconds.item()

    def on_step_end(self, args, state, control, **kwargs):
        if self.max_seconds is not None and self.shared_seconds >= self.max_seconds:
            control.should_training_stop = control.should_evaluate = control.should_save = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        done = state.global_step / max(state.max_steps, 1)
        if self.max_seconds is not None:
            done = max(done, min(1.0, self.shared_seconds / self.max_seconds))
        logs["percent"] = state.log_history[-1]["percent"] = round(100 * done, 2)
        state.log_history[-1]["seconds"] = round(self.seconds, 2)


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
