"""
What ends a run before its time, and how it ends then.

| fault | what happens |
|---|---|
| SIGTERM or SIGINT | the step is finished and saved on all processes; exit status 128 and the signal's number |
| SIGINT once more | the end, at once |
| a loss, gradient or weight that is not finite | all processes stop before the step, or the checkpoint, is made of it |
| no room or no right to write | an error before training begins; a disk that fills up later is explained |

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
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from scripts.training.checkpoints import newest_complete


PATIENCE = 60  # seconds that a worker of a data loader lives on after a signal: its process needs it to finish the step


class NotFinite(FloatingPointError):
    """A loss, a gradient or a weight was infinite or not a number."""


class Watch(TrainerCallback):
    """
    Ends the run on a signal or on numbers that are not finite, on all processes at the same step.

    Once a step, just before it is made, the processes exchange two numbers: whether one has a loss or gradient that is
    not finite, and whether one has got a signal.

    Args:
        tokenizer: to show how a bad batch begins.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.tokenizer = tokenizer
        self.signal: signal.Signals | None = None  # agreed on by all processes
        self._received = self._agreed = 0
        self._step: list[tuple[torch.Tensor, dict]] = []  # loss and inputs of the batches of this step

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT are taken note of here; elsewhere they do what they did before."""
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
        os.write(2, message.encode())  # print() may be in the middle of a line itself

    def note(self, loss: torch.Tensor, inputs: dict) -> None:
        """Remember a batch of the step that is being made."""
        self._step.append((loss, inputs))

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        losses = torch.stack([loss.float() for loss, _ in self._step])
        norm = gradient_norm(model)
        if getattr(optimizer, "scaler", None) is not None:
            norm = torch.zeros_like(norm)  # float16's loss scale is found by overflowing; such a step is left out
        finite = torch.isfinite(losses).all() & torch.isfinite(norm).to(losses.device)
        bad, self._agreed = agree(args, (~finite).to(torch.int64), self._received)
        if bad:
            step = f"step {state.global_step + 1}"
            rows = gather_object([(args.process_index, losses.tolist(), float(norm), self._describe())])
            raise NotFinite(f"{step} was not made: {_explain(rows)}. {_go_on(args)}")
        self._step.clear()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self._agreed:
            self.signal = signal.Signals(self._agreed)
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False  # whoever sent the signal will not wait for long
        self._check_weights(args, state, control, model)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if self.signal is not None:
            control.should_save = control.should_evaluate = False  # saved already, and the epoch is not at its end
        self._check_weights(args, state, control, model)

    def _check_weights(self, args, state, control, model) -> None:
        if control.should_save or control.should_evaluate:  # an evaluation may decide on saving
            finite = all(bool(torch.isfinite(_local(parameter)).all()) for parameter in model.parameters())
            if agree(args, int(not finite))[0]:
                raise NotFinite(
                    f"a weight is not finite after step {state.global_step}, which is not saved. {_go_on(args)}"
                )

    def _describe(self) -> list[str]:
        return [describe(inputs, self.tokenizer) for _, inputs in self._step]


def agree(args: TrainingArguments, *values: torch.Tensor | int) -> list[int]:
    """The largest of each value among all processes."""
    values = torch.stack([torch.as_tensor(value, dtype=torch.int64, device=args.device) for value in values])
    if args.world_size > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def gradient_norm(model: PreTrainedModel) -> torch.Tensor:
    """The norm of all gradients, of whole ones and of those that are shared out (DTensor) alike."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    shared = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norms = [get_total_norm(shared).full_tensor()] if shared else []
    return get_total_norm([*norms, get_total_norm(whole)])


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def describe(inputs: dict, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """What a batch can be known by again: how it begins, rows with numbers that are not finite, a hash of its input."""
    name = "input_ids" if "input_ids" in inputs else next(iter(inputs))
    values = inputs[name].detach().cpu()
    known = f"SHA-256 of its {name} {hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]}"
    if name == "input_ids" and tokenizer is not None:
        return f"begins with {tokenizer.decode(values[0])[:60]!r}, {known}"
    bad = (~torch.isfinite(values)).flatten(1).any(dim=1).nonzero().flatten().tolist()
    return f"has numbers that are not finite in rows {bad} of {len(values)}, {known}" if bad else f"is finite, {known}"


def _explain(processes: list[tuple[int, list[float], float, list[str]]]) -> str:
    """What each process with a bad loss had, or, where no loss is bad, what they all had."""
    bad_losses = [
        f"the loss is {loss} on process {rank}, for the batch that {batch}"
        for rank, losses, _, batches in processes
        for loss, batch in zip(losses, batches)
        if not torch.isfinite(torch.tensor(loss))
    ]
    if bad_losses:
        return "; ".join(bad_losses)
    batches = "; ".join(f"process {rank}: {batch}" for rank, *_, batches in processes for batch in batches)
    return f"the norm of the gradient is {processes[0][2]} (batches: {batches})"


def _go_on(args: TrainingArguments) -> str:
    last = newest_complete(Path(args.output_dir))
    kept = f"The last checkpoint is {last}" if last else "No checkpoint was made yet"
    return f"{kept}; mend the data or lower training.learning_rate, then go on with --resume"


def meet_anew(timeout: float) -> None:
    """
    Let processes that a launcher has restarted find each other under a name of their own.

    Launchers keep one store over restarts, and torch 2.13 (`_create_c10d_store`) takes it for a new one each time: the
    addresses of the processes that ended are still in it.

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


def restart_count() -> int:
    """How often a launcher has started this run anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def outlive_signals(worker: int) -> None:
    """
    For workers of a data loader: a signal to the whole group of processes must not end them before their process.

    They are told when they are no longer needed; if that does not come, they end after a while.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(PATIENCE))


def require_writable(output_dir: Path) -> None:
    """
    Refuse a folder that cannot be made or written to; leaves nothing behind.

    Raises:
        OSError: with the folder.
    """
    place = _existing(output_dir)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
    except OSError as error:
        raise OSError(f"`--output-dir` {output_dir} cannot be written to ({error}); name another") from error


def _existing(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def checkpoint_bytes(model: PreTrainedModel, averaged: bool = False) -> tuple[int, int]:
    """
    Bytes of the weights, and of a checkpoint: with them the two moments that Adam has of each trained weight and, where
    they are an average, the weights themselves.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return weights, weights * (1 + averaged) + 2 * trained


def require_room(output_dir: Path, model: PreTrainedModel, args: TrainingArguments, averaged: bool = False) -> None:
    """
    Refuse a disk without room for the checkpoints that are kept, one more while it is written, and the final model.

    Raises:
        OSError: with the folder, the bytes that are needed and those that are free.
    """
    weights, checkpoint = checkpoint_bytes(model, averaged)
    checkpoint = weights if args.save_only_model else checkpoint
    kept = 0 if args.save_strategy == SaveStrategy.NO else 2
    if kept and args.save_total_limit:
        kept = max(args.save_total_limit, 1 + args.load_best_model_at_end) + 1
    elif kept and args.save_strategy == SaveStrategy.STEPS and args.max_steps > 0 and args.save_steps >= 1:
        kept = 1 + int(args.max_steps // args.save_steps)
    there = [file for folder in output_dir.glob("checkpoint-*") for file in folder.rglob("*") if file.is_file()]
    needed = max(0, kept * checkpoint - sum(file.stat().st_size for file in there)) + weights
    free = shutil.disk_usage(_existing(output_dir)).free
    if free < needed:
        raise OSError(
            f"`--output-dir` {output_dir} has {free:,} bytes free, but {kept} checkpoints of {checkpoint:,} bytes and "
            f"the final model need {needed:,}; make room, name another folder, or lower training.save_total_limit"
        )


@contextlib.contextmanager
def full_disk_explained(output_dir: Path, model: PreTrainedModel, averaged: bool = False) -> Iterator[None]:
    """Say in words what torch and safetensors report as a failed write, if the disk has no room for a checkpoint."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not output_dir.is_dir() or shutil.disk_usage(output_dir).free > checkpoint_bytes(model, averaged)[1]:
            raise
        sys.exit(
            f"error: no space left for a checkpoint in `--output-dir` {output_dir} ({error}); make room and go on with "
            "--resume, or keep fewer checkpoints with training.save_total_limit"
        )
