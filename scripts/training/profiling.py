"""Show where the time of training steps goes, by operation, with PyTorch's profiler."""

import sys
from pathlib import Path

import torch
from torch.profiler import profile, schedule
from transformers import TrainerCallback


SKIPPED, WARM_UP = 2, 1  # steps before the profile: the first ones compile kernels and fill caches
OPERATIONS = 20  # rows of the printed table


class ProfileCallback(TrainerCallback):
    """
    Profiles steps 4 to 3 + `steps` of a training on the first process, then prints the most expensive operations and
    writes `profile.json`, a trace for chrome://tracing or ui.perfetto.dev. Training goes on.

    Args:
        steps: how many steps to profile.
        folder: where `profile.json` goes.

    Raises:
        ValueError: `steps` is below 1.
    """

    def __init__(self, steps: int, folder: Path) -> None:
        if steps < 1:
            raise ValueError(f"`--profile` must be at least 1 step, got {steps}")
        self.steps, self.folder = steps, folder
        self.profiler: profile | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            steps = schedule(wait=SKIPPED, warmup=WARM_UP, active=self.steps, repeat=1)
            self.profiler = profile(schedule=steps, on_trace_ready=self.write)
            self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.profiler is not None:
            self.profiler.step()

    def on_train_end(self, args, state, control, **kwargs):
        if self.profiler is not None:
            self.profiler.stop()

    def write(self, profiler: profile) -> None:
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=order, row_limit=OPERATIONS), file=sys.stderr)
        path = self.folder / "profile.json"
        profiler.export_chrome_trace(str(path))
        print(f"the trace of {self.steps} steps is in {path}", file=sys.stderr)
