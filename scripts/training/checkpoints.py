"""Checkpoints on disk: marking one as complete, finding the newest complete one, loading one, replacing a folder."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.utils import logging


logger = logging.get_logger(__name__)

COMPLETE = "complete"


class MarkComplete(TrainerCallback):
    """
    Writes the empty file `complete` into a checkpoint after all processes have written their parts of it, so that one
    cut off by a kill or a full disk can be told. It must be the last callback.

    A checkpoint with the model only (`save_only_model`) cannot be resumed from and is not marked.
    """

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        if args.should_save and not args.save_only_model:
            Path(args.output_dir, f"checkpoint-{state.global_step}", COMPLETE).touch()


def newest_complete(run: Path) -> Path | None:
    """The complete checkpoint of the highest step in `run`; incomplete ones are named in a warning and passed over."""
    folders = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        if (folder / COMPLETE).is_file():
            return folder
        logger.warning(
            f"{folder} is passed over: it has no file `{COMPLETE}`, which is written last, so saving it was "
            "interrupted, or it holds only the model. If an older version of these scripts wrote it and it is whole, "
            f"create that file (touch {folder / COMPLETE}) and resume again"
        )
    return None


def restore_callbacks(callbacks: Iterable[TrainerCallback], checkpoint: Path) -> None:
    """
    Restore the state that callbacks saved in the checkpoint, such as the seconds of a budget.

    `restore_callback_states_from_checkpoint` of `TrainingArguments` would restore their old settings as well, so that a
    run could not be resumed with a longer budget.
    """
    saved = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).stateful_callbacks
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            for name, value in saved.get(type(callback).__name__, {}).get("attributes", {}).items():
                setattr(callback, name, value)


def saved_model(folder: str | Path) -> Path:
    """The folder of a saved model: `final/` of a run in place of the run."""
    inside = Path(folder) / "final"
    return inside if (inside / "config.json").is_file() else Path(folder)


def load_model(auto_class, checkpoint: str | Path, **fields) -> PreTrainedModel:
    """
    Load a model of the task's kind, with other values of config fields that no parameter depends on.

    Raises:
        ValueError: the checkpoint lacks weights that this kind of model has, so it is of another kind.
    """
    model, loading = auto_class.from_pretrained(str(checkpoint), output_loading_info=True, **fields)
    if loading["missing_keys"]:
        raise ValueError(
            f"{checkpoint} is not a checkpoint for {auto_class.__name__}: it lacks "
            f"{', '.join(sorted(loading['missing_keys'])[:3])}; its config names {model.config.architectures}"
        )
    return model


def replace_folder(folder: Path, finished: Path) -> None:
    """Rename `finished` to `folder`, replacing one that is there, so that `folder` is never half-written."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    finished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
