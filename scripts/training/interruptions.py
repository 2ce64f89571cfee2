"""
What ends a run early, and how it ends then.

| fault | what happens |
|---|---|
| SIGTERM or SIGINT | the step is finished and saved on all processes; exit status 128 and the signal's number |
| SIGINT once more | the process ends at once |
| a loss, gradient or weight that is not finite | all processes stop before the step, or the checkpoint, is made |
| a folder that cannot be written to | an error before training begins |
| a full disk | an error; the last complete checkpoint can be resumed from |

Transformers' own `enable_jit_checkpoint` is not used: each process decides for itself when to save, so several would
wait for each other, and it may save between the gradients and the step.
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from scripts.training.checkpoints import newest_complete


WORKER_GRACE = 60  # seconds that a data loader's worker lives on after SIGTERM, so that its process finishes the step
FULL_DISK = 2**20  # bytes: a failed write with less than this free is put down to a full disk


class NotFinite(FloatingPointError):
    """A loss, a gradient or a weight was infinite or not a number."""


class InterruptionCallback(TrainerCallback):
    """
    Ends the run on a signal or on numbers that are not finite, on all processes at the same step.

    Once a step, just before the optimizer's, the processes exchange two numbers: whether one has a loss or gradient
    that is not finite, and whether one has received a signal.

    Args:
        tokenizer: shows the text at the beginning of a bad batch.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.tokenizer = tokenizer
        self.signal: signal.Signals | None = None  # the one that all processes stop for
        self._received = self._stop_for = 0  # signal numbers: of this process, and the largest of all
        self._batches: list[tuple[torch.Tensor, dict]] = []  # loss and inputs of the batches of this step

    @contextlib.contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Inside, SIGTERM and SIGINT stop the run after the step; the handlers from before are restored afterwards."""
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
        message = f"\n{signal.Signals(number).name}: stopping after this step; Ctrl-C again stops at once\n"
        os.write(2, message.encode())  # not print(), which this signal may have interrupted

    def record_batch(self, loss: torch.Tensor, inputs: dict) -> None:
        """Remember a batch until its step is made."""
        self._batches.append((loss, inputs))

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        losses = torch.stack([loss.float() for loss, _ in self._batches])
        norm = get_total_norm([local(p.grad) for p in model.parameters() if p.grad is not None])
        if getattr(optimizer, "scaler", None) is not None:
            norm = torch.zeros_like(norm)  # float16's loss scale is found by overflowing; such a step is left out
        finite = torch.isfinite(losses).all() & torch.isfinite(norm).to(losses.device)
        bad, self._stop_for = maximum(args, (~finite).to(torch.int64), self._received)
        if bad:
            found = [(f"the loss is {loss.item()}", inputs) for loss, inputs in self._batches if not loss.isfinite()]
            if not found and not norm.isfinite():
                found = [(f"the norm of the gradient is {norm.item()}", inputs) for _, inputs in self._batches]
            where = f"on process {args.process_index}, for the batch that"
            told = gather_object([f"{what} {where} {describe_batch(inputs, self.tokenizer)}" for what, inputs in found])
            causes = [text for text in told if text.startswith("the loss")] or told
            raise NotFinite(f"step {state.global_step + 1} was not made: {'; '.join(causes)}. {_how_to_resume(args)}")
        self._batches.clear()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self._stop_for:
            self.signal = signal.Signals(self._stop_for)
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False  # the sender of the signal may soon kill the process
        self._check_weights(args, state, control, model)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if self.signal is not None:
            control.should_save = control.should_evaluate = False  # saved already, and the epoch is not at its end
        self._check_weights(args, state, control, model)

    def _check_weights(self, args, state, control, model) -> None:
        if control.should_save or control.should_evaluate:  # an evaluation may decide on saving
            finite = all(bool(torch.isfinite(local(parameter)).all()) for parameter in model.parameters())
            if maximum(args, int(not finite))[0]:
                raise NotFinite(
                    f"a weight is not finite after step {state.global_step}, which is not saved. {_how_to_resume(args)}"
                )


def maximum(args: TrainingArguments, *values: torch.Tensor | int) -> list[int]:
    """The largest of each value over all processes."""
    values = torch.stack([torch.as_tensor(value, dtype=torch.int64, device=args.device) for value in values])
    if args.world_size > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor, or the whole of any other."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def describe_batch(inputs: dict, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The beginning of a batch's first text, or the rows with numbers that are not finite."""
    if "input_ids" in inputs and tokenizer is not None:
        return f"begins with {tokenizer.decode(inputs['input_ids'][0])[:60]!r}"
    values = next(iter(inputs.values()))
    rows = (~torch.isfinite(values)).flatten(1).any(dim=1).nonzero().flatten().tolist()
    return f"has numbers that are not finite in rows {rows} of {len(values)}" if rows else "is finite"


def _how_to_resume(args: TrainingArguments) -> str:
    last = newest_complete(Path(args.output_dir))
    kept = f"The last checkpoint is {last}" if last else "No checkpoint was made yet"
    return f"{kept}; mend the data or lower training.learning_rate, then go on with --resume"


def delay_signals_in_worker(worker: int, initialise: Callable[[int], None] | None = None) -> None:
    """
    Initialise a data loader's worker, and so that a signal to the whole group of processes does not end it before its
    process has finished the step. The process then ends it; if not, it ends `WORKER_GRACE` seconds after SIGTERM.
    """
    if initialise is not None:
        initialise(worker)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(WORKER_GRACE))


def require_writable(output_dir: Path) -> None:
    """
    Refuse a folder that cannot be made or written to; leaves nothing behind.

    Raises:
        OSError: with the folder.
    """
    existing = next(place for place in (output_dir.absolute(), *output_dir.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
    except OSError as error:
        raise OSError(f"`--output-dir` {output_dir} cannot be written to ({error}); name another") from error


@contextlib.contextmanager
def explain_full_disk(output_dir: Path) -> Iterator[None]:
    """Exit with a clear message where torch, safetensors or Python failed to write because the disk is full."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = output_dir.is_dir() and shutil.disk_usage(output_dir).free < FULL_DISK
        if not full and "No space left" not in str(error):  # torch's errors do not say so
            raise
        sys.exit(
            f"error: no space left for a checkpoint in `--output-dir` {output_dir} ({error}); make room and go on with "
            "--resume, or keep fewer checkpoints with training.save_total_limit"
        )
