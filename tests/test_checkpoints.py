"""Which checkpoint a run goes on from, when some were cut off; and that a folder is replaced at once."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from scripts.training.averaging import UNAVERAGED
from scripts.training.checkpoints import damage, load_model, newest_complete, put_in_place
from tests.conftest import tiny_config


def write_checkpoint(run, step):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"weight": torch.arange(50.0), "bias": torch.ones(3)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.zeros(9)}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def cut(path, share=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_the_newest_whole_checkpoint_is_the_one_of_the_highest_step(tmp_path):
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_complete(tmp_path).name == "checkpoint-100"
    assert newest_complete(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("harm", ["cut", "emptied", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, name, harm, caplog):
    whole, damaged = write_checkpoint(tmp_path, 10), write_checkpoint(tmp_path, 20)
    path = damaged / name
    path.unlink() if harm == "missing" else cut(path, 0.6 if harm == "cut" else 0)
    assert damage(whole) is None
    assert damage(damaged) is not None
    assert newest_complete(tmp_path) == whole


@pytest.mark.parametrize("harm", ["cut", "emptied", "missing"])
def test_an_average_without_the_weights_to_go_on_from_is_damaged(tmp_path, harm):
    folder = write_checkpoint(tmp_path, 10)
    (folder / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": {"WeightAverage": {}}}))
    save_file({"weight": torch.arange(50.0)}, folder / UNAVERAGED)
    assert damage(folder) is None
    (folder / UNAVERAGED).unlink() if harm == "missing" else cut(folder / UNAVERAGED, 0.6 if harm == "cut" else 0)
    assert damage(folder) is not None


def test_a_header_that_promises_more_than_the_file_has_is_damage(tmp_path):
    folder = write_checkpoint(tmp_path, 1)
    cut(folder / "model.safetensors", 0.99)
    assert damage(folder) == "model.safetensors is cut off"


def test_a_checkpoint_of_another_head_is_refused(tmp_path):
    AutoModelForSequenceClassification.from_config(tiny_config()).save_pretrained(tmp_path)
    assert load_model(AutoModelForSequenceClassification, tmp_path).config.model_type == "rtransformer"
    with pytest.raises(
        ValueError, match="is not a checkpoint for AutoModelForCausalLM: it lacks .*SequenceClassification"
    ):
        load_model(AutoModelForCausalLM, tmp_path)


def test_a_finished_folder_takes_the_place_of_an_old_one(tmp_path):
    final, partial = tmp_path / "final", tmp_path / ".final.partial"
    for content in ("one", "two"):
        partial.mkdir()
        (partial / "file").write_text(content)
        put_in_place(partial, final)
        assert (final / "file").read_text() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final"]
