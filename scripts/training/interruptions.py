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
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from datetime import timedelta
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
        if threading.current_thread() is not threading.main_thread():
            yield
            return
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
            batches = [describe_batch(inputs, self.tokenizer) for _, inputs in self._batches]
            processes = gather_object([(args.process_index, losses.tolist(), float(norm), batches)])
            raise NotFinite(f"step {state.global_step + 1} was not made: {_explain(processes)}. {_how_to_resume(args)}")
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
    """What identifies a batch: its first text, or its rows with numbers that are not finite; a hash of its input."""
    name = "input_ids" if "input_ids" in inputs else next(iter(inputs))
    values = inputs[name].detach().cpu()
    known = f"SHA-256 of its {name} {hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]}"
    if name == "input_ids" and tokenizer is not None:
        return f"begins with {tokenizer.decode(values[0])[:60]!r}, {known}"
    bad = (~torch.isfinite(values)).flatten(1).any(dim=1).nonzero().flatten().tolist()
    return f"has numbers that are not finite in rows {bad} of {len(values)}, {known}" if bad else f"is finite, {known}"


def _explain(processes: list[tuple[int, list[float], float, list[str]]]) -> str:
    """The bad losses with their process and batch or, where all losses are finite, the norms and all batches."""
    bad_losses = [
        f"the loss is {loss} on process {rank}, for the batch that {batch}"
        for rank, losses, _, batches in processes
        for loss, batch in zip(losses, batches)
        if not torch.isfinite(torch.tensor(loss))
    ]
    if bad_losses:
        return "; ".join(bad_losses)
    return "; ".join(
        f"the norm of the gradient is {norm} on process {rank}, for the batch that {batch}"
        for rank, _, norm, batches in processes
        for batch in batches
    )


def _how_to_resume(args: TrainingArguments) -> str:
    last = newest_complete(Path(args.output_dir))
    kept = f"The last checkpoint is {last}" if last else "No checkpoint was made yet"
    return f"{kept}; mend the data or lower training.learning_rate, then go on with --resume"


def restart_count() -> int:
    """How many times a launcher has restarted this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def init_process_group_after_restart(timeout: float) -> None:
    """
    After a launcher has restarted the processes, connect them under a key prefix of this restart.

    Launchers keep one store over restarts, and torch 2.13 (`_create_c10d_store`) reads it as a new one each time,
    although it still holds the addresses of the processes that ended.

    Args:
        timeout: seconds, as `TrainingArguments.ddp_timeout`.
    """
    restarts = restart_count()
    if not restarts or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    dist.init_process_group(
        store=dist.PrefixStore(f"restart{restarts}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=timeout),
    )


def delay_signals_in_worker(worker: int) -> None:
    """
    Initialise a data loader's worker so that a signal to the whole group of processes does not end it before its
    process has finished the step. The process then ends it; if not, it ends `WORKER_GRACE` seconds after SIGTERM.
    """
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
