"""Which checkpoint a run resumes from when some are incomplete; and that a folder is replaced at once."""

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from scripts.training import checkpoints
from scripts.training.checkpoints import COMPLETE, MarkComplete, load_model, newest_complete, replace_folder
from tests.conftest import tiny_config


def write_checkpoint(run, step, complete=True):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    if complete:
        (folder / COMPLETE).touch()
    return folder


def test_the_newest_complete_checkpoint_is_the_one_of_the_highest_step(tmp_path, caplog):
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_complete(tmp_path).name == "checkpoint-100"
    assert newest_complete(tmp_path / "nothing") is None
    assert not caplog.records


def test_an_incomplete_checkpoint_is_named_and_the_one_before_used(tmp_path, caplog):
    """As after a kill while saving; or of a version of the scripts that wrote no mark."""
    complete, newer = write_checkpoint(tmp_path, 10), write_checkpoint(tmp_path, 20, complete=False)
    assert newest_complete(tmp_path) == complete
    assert f"{newer} is passed over" in caplog.text
    assert f"touch {newer / COMPLETE}" in caplog.text
    (newer / COMPLETE).touch()
    assert newest_complete(tmp_path) == newer


@pytest.mark.parametrize("model_only", [False, True])
def test_a_checkpoint_is_marked_after_all_processes_have_saved(tmp_path, monkeypatch, model_only):
    folder = write_checkpoint(tmp_path, 3, complete=False)
    waited = []

    class State:
        def wait_for_everyone(self):
            waited.append((folder / COMPLETE).exists())

    monkeypatch.setattr(checkpoints, "PartialState", State)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, save_only_model=model_only)
    MarkComplete().on_save(args, TrainerState(global_step=3), TrainerControl())
    assert waited == [False]
    assert (folder / COMPLETE).exists() != model_only  # without the optimizer a run cannot be resumed


def test_a_checkpoint_of_another_head_is_refused(tmp_path):
    AutoModelForSequenceClassification.from_config(tiny_config()).save_pretrained(tmp_path)
    assert load_model(AutoModelForSequenceClassification, tmp_path).config.model_type == "rtransformer"
    with pytest.raises(
        ValueError, match="is not a checkpoint for AutoModelForCausalLM: it lacks .*SequenceClassification"
    ):
        load_model(AutoModelForCausalLM, tmp_path)


def test_a_finished_folder_replaces_an_old_one(tmp_path):
    final, partial = tmp_path / "final", tmp_path / ".final.partial"
    for content in ("one", "two"):
        partial.mkdir()
        (partial / "file").write_text(content)
        replace_folder(final, partial)
        assert (final / "file").read_text() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final"]
