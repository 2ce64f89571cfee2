"""Checkpoints on disk: which one is whole, loading one, and putting a finished folder in place at once."""

import json
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from scripts.training.averaging import UNAVERAGED, WeightAverage


logger = logging.get_logger(__name__)

# What accelerate saves under FSDP, of the model and of the optimizer: shards in folders, or one file each.
SHARDS = ("pytorch_model_fsdp_0", "optimizer_0")
FULL_STATES = ("pytorch_model_fsdp.bin", "optimizer.bin")


def newest_complete(run: Path) -> Path | None:
    """The whole checkpoint of the highest step in `run`; damaged ones are named in a warning and passed over."""
    folders = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        problem = damage(folder)
        if problem is None:
            return folder
        logger.warning(f"{folder} is damaged ({problem}); the checkpoint before it is used")
    return None


def is_sharded_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint of `Trainer` was saved under FSDP."""
    return (folder / SHARDS[0]).is_dir() or (folder / FULL_STATES[0]).is_file()


def damage(folder: Path) -> str | None:
    """What a kill or a full disk while saving has left wrong with a checkpoint of `Trainer`; None if nothing."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        archives = [folder / "scheduler.pt", *(sorted(folder.glob("rng_state*.pth")) or [folder / "rng_state.pth"])]
        if (folder / SHARDS[0]).is_dir():
            problems = (_shards_damage(folder / name) for name in SHARDS)
            return next(filter(None, problems), None) or _archives_damage(archives)
        if (folder / FULL_STATES[0]).is_file():
            return _archives_damage([*(folder / name for name in FULL_STATES), *archives])
        weights = sorted(folder.glob("model*.safetensors"))
        if (folder / "model.safetensors.index.json").is_file():
            index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
            weights = sorted({folder / name for name in index["weight_map"].values()})
        if not weights:
            return "model.safetensors is missing"
        if WeightAverage.__name__ in state.get("stateful_callbacks", {}):
            weights.append(folder / UNAVERAGED)
        for path in weights:
            if _safetensors_size(path) != path.stat().st_size:
                return f"{path.name} is cut off"
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return _archives_damage([folder / "optimizer.pt", *archives])


def _archives_damage(paths: Iterable[Path]) -> str | None:
    for path in paths:
        if not zipfile.is_zipfile(path):  # what torch.save writes is a zip archive, with its index at the end
            return f"{path.name} is {'cut off' if path.is_file() else 'missing'}"
    return None


def _shards_damage(folder: Path) -> str | None:
    """The same for shards of `torch.distributed.checkpoint`, whose `.metadata`, written last, says what is where."""
    if not (folder / ".metadata").is_file():
        return f"{folder.name}/.metadata is missing"
    try:
        stored = FileSystemReader(folder).read_metadata().storage_data.values()
    except Exception as error:  # a pickle that is cut off fails in many ways
        return f"{folder.name}/.metadata is cut off ({type(error).__name__})"
    for piece in stored:
        path = folder / piece.relative_path
        if not path.is_file():
            return f"{folder.name}/{path.name} is missing"
        if path.stat().st_size < piece.offset + piece.length:
            return f"{folder.name}/{path.name} is cut off"
    return None


def _safetensors_size(path: Path) -> int:
    """The size that the header of a safetensors file tells."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return (
        8
        + length
        + max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    )


def restore_callbacks(callbacks: Iterable[TrainerCallback], checkpoint: Path) -> None:
    """
    Give callbacks what they had remembered at the checkpoint.

    `restore_callback_states_from_checkpoint` of `TrainingArguments` would also bring back their old settings, so that a
    run could not be resumed with a longer budget.
    """
    saved = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).stateful_callbacks
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            for name, value in saved.get(type(callback).__name__, {}).get("attributes", {}).items():
                setattr(callback, name, value)


def load_model(auto_class, checkpoint: str | Path) -> PreTrainedModel:
    """
    Load a model of the task's kind.

    Raises:
        ValueError: the checkpoint lacks weights that this kind of model has, so it is of another model.
    """
    model, loading = auto_class.from_pretrained(str(checkpoint), output_loading_info=True)
    if loading["missing_keys"]:
        raise ValueError(
            f"{checkpoint} is not a checkpoint for {auto_class.__name__}: it lacks "
            f"{', '.join(sorted(loading['missing_keys'])[:3])}; its config names {model.config.architectures}"
        )
    return model


def put_in_place(finished: Path, folder: Path) -> None:
    """Rename a finished folder to `folder`, in place of one that is there, so that `folder` is never half-written."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    finished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
