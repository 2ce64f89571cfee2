"""Training and scoring with a memory that is carried from row to row of streams."""

import math
import shutil

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from modeling_rtransformer import RTransformerForCausalLM
from scripts import evaluate, train
from scripts.data.streams import Streams
from scripts.data.windows import IGNORED
from scripts.training.carried_memory import Memory
from scripts.training.checkpoints import newest_complete
from tests.conftest import tiny_config
from tests.tiny_recipe import LANGUAGE_MODELING, write_recipe, write_text


MODELS = {
    "xl": {"num_local_rnns": 0, "position_embedding": "relative", "memory_length": 16},
    "gru-and-rsa": {"memory_length": 9},
    "brt": {
        "num_hidden_layers": 2,
        "num_local_rnns": 0,
        "memory_length": 7,
        "recurrent_layers": [1],
        "rem_kinds": None,
        "block_length": 8,
        "num_state_vectors": 3,
    },
}


@pytest.fixture
def recipe(tmp_path):
    """Makes the folder of a recipe that reads streams of 16 tokens a row."""

    def make(model="xl", name="recipe", **fields):
        training = LANGUAGE_MODELING.replace("window = 33\neval_stride = 20", 'rows = "streams"\nwindow = 16')
        training = training.replace('compressors = ["gzip", "bzip2", "xz"]', "")
        training = training.replace("save_steps = 4", "save_steps = 4\nsave_total_limit = 9")
        return write_recipe(tmp_path, training, write_text(tmp_path), name, **{**MODELS[model], **fields})

    return make


def run(folder, output, *overrides):
    return train.main([str(folder), "--output-dir", str(output), *(f"--set={value}" for value in overrides)])


class TestStreams:
    class Text:
        """Tokens 0, 1, 2, ..., with a document beginning at every tenth."""

        def __init__(self, length):
            self.tokens = np.arange(length)

        def __len__(self):
            return len(self.tokens)

        def __getitem__(self, span):
            return self.tokens[span]

        def document_begins(self, start, end):
            return np.array([place - start for place in range(start, end) if place % 10 == 0], dtype=np.int64)

        def documents_before(self, end):
            return -(-end // 10)

    @pytest.mark.parametrize("length", [2, 50, 97, 101])
    @pytest.mark.parametrize("streams", [1, 3, 4])
    def test_every_token_but_the_first_is_predicted_once_after_the_one_before(self, length, streams):
        dataset = Streams(self.Text(length), segment=8)
        dataset.streams = streams
        predicted = []
        for row in (dataset[index] for index in range(len(dataset))):
            scored = row["labels"] != IGNORED
            assert torch.equal(row["input_ids"][scored] + 1, row["labels"][scored])
            predicted += row["labels"][scored].tolist()
        assert sorted(predicted) == list(range(1, length))

    def test_batches_in_order_continue_each_other(self):
        dataset = Streams(self.Text(101), segment=8)
        dataset.streams = 4
        batches = [[dataset[4 * step + row] for row in range(4)] for step in range(len(dataset) // 4)]
        for before, after in zip(batches, batches[1:]):
            for row in range(4):
                if (after[row]["labels"] != IGNORED).any():
                    assert after[row]["input_ids"][0] == before[row]["labels"][-1]

    def test_documents_are_numbered_through_all_rows(self):
        dataset = Streams(self.Text(101), segment=8, separate=True)
        dataset.streams = 4
        for row in (dataset[index] for index in range(len(dataset))):
            scored = row["labels"] != IGNORED
            assert torch.equal(row["seq_idx"][scored], row["input_ids"][scored] // 10 + 1)

    def test_the_beginning_of_a_text(self):
        dataset = Streams(self.Text(101), segment=8, max_rows=3)
        assert len(dataset) == 3 and dataset[2]["labels"][-1] == 24


@pytest.mark.parametrize("model", MODELS)
def test_a_run_learns_is_scored_and_goes_on_after_a_stop_as_if_there_had_been_none(model, recipe, tmp_path):
    folder = recipe(model)
    whole = run(folder, tmp_path / "whole")
    assert newest_complete(tmp_path / "whole").name == "checkpoint-12"
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    for step in (4, 8):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", stopped / f"checkpoint-{step}")
    again = train.main([str(folder), "--output-dir", str(stopped), "--resume"])
    assert again["metrics"] == whole["metrics"]


def test_scoring_is_the_memory_run_through_the_whole_text(recipe, tmp_path):
    """One stream: the nats of every token, by hand from the trained model, memory and all."""
    result = run(recipe("xl"), tmp_path / "run", "training.per_device_eval_batch_size=1", "task.eval_window=13")
    final = tmp_path / "run" / "final"
    scored = evaluate.main([str(final), "--set=task.eval_window=13", "--set=training.per_device_eval_batch_size=1"])
    assert scored["metrics"]["perplexity"] == pytest.approx(result["metrics"]["test"]["perplexity"], rel=1e-6)
    other_cut = evaluate.main([str(final), "--set=task.eval_window=31", "--set=training.per_device_eval_batch_size=1"])
    assert other_cut["metrics"]["perplexity"] == pytest.approx(scored["metrics"]["perplexity"], rel=1e-5)
    longer = evaluate.main([str(final), "--set=model.memory_length=40", "--set=training.per_device_eval_batch_size=1"])
    assert abs(longer["metrics"]["perplexity"] - scored["metrics"]["perplexity"]) > 1e-4
    with_cold_starts = evaluate.main([str(final), "--set=training.per_device_eval_batch_size=8"])
    assert abs(with_cold_starts["metrics"]["perplexity"] - scored["metrics"]["perplexity"]) > 1e-4


def test_training_uses_the_memory_and_scoring_has_its_own(recipe, tmp_path, monkeypatch):
    """Row s of training sees what row s - 1 left, whatever was scored between them."""
    seen = []
    plain = Memory.arguments

    def arguments(self, batch):
        given = plain(self, batch)
        seen.append((id(self), given["cache"].get_seq_length()))
        return given

    monkeypatch.setattr(Memory, "arguments", arguments)
    run(recipe("xl"), tmp_path / "run", "training.eval_steps=2", "training.save_steps=2", "training.max_steps=5")
    training = [length for owner, length in seen if owner == seen[0][0]]
    assert training == [0, 16, 32, 48, 64]
    assert [length for owner, length in seen if owner != seen[0][0]].count(0) >= 3


def test_an_epoch_begins_without_memory(recipe, tmp_path, monkeypatch):
    lengths = []
    plain = Memory.arguments

    def arguments(self, batch):
        given = plain(self, batch)
        lengths.append(given["cache"].get_seq_length())
        return given

    monkeypatch.setattr(Memory, "arguments", arguments)
    epochs = ["training.max_steps=-1", "training.num_train_epochs=2", "task.window=400", "training.eval_strategy=no"]
    run(recipe("xl"), tmp_path / "run", *epochs, "training.save_strategy=no", "training.load_best_model_at_end=false")
    steps = lengths.index(0, 1)  # of an epoch
    assert lengths[:steps] == [400 * step for step in range(steps)] == lengths[steps : 2 * steps]


def test_accumulated_rows_follow_each_other(recipe, tmp_path):
    """Two rows a step are the gradient of both, the second with the memory of the first."""
    one = run(recipe("xl"), tmp_path / "one", "training.gradient_accumulation_steps=2", "training.max_steps=4")
    assert math.isfinite(one["metrics"]["test"]["perplexity"])


@pytest.mark.parametrize("variant", ["xl", "gru-and-rsa-with-memory", "brt"])
def test_a_saved_memory_is_restored(variant):
    model = RTransformerForCausalLM(tiny_config(variant)).eval()
    ids = torch.randint(3, 37, (2, 24))
    memory = Memory(model.config)
    model(**memory.arguments({"input_ids": ids[:, :13]}))
    memory.detach()
    restored = Memory(model.config)
    restored.load(memory.state())
    assert isinstance(restored.cache, DynamicCache)
    outputs = [model(**each.arguments({"input_ids": ids[:, 13:]})).logits for each in (memory, restored)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("model", ["xl", "gru-and-rsa"])
def test_separate_documents_are_not_remembered(model, recipe, tmp_path):
    result = run(recipe(model), tmp_path / "run", "task.documents=separate")
    assert math.isfinite(result["metrics"]["test"]["perplexity"])


@pytest.mark.parametrize(
    ("model", "overrides", "message"),
    [
        ("xl", ["task.stride=4"], "`task.stride` is not for `task.rows` 'streams'"),
        ("xl", ["task.train_once=true"], "`task.train_once` is not for `task.rows` 'streams'"),
        ("xl", ["budget.total_seconds=9"], "`budget.total_seconds` is not for `task.rows` 'streams'"),
        ("xl", ["training.gradient_checkpointing=true"], "`training.gradient_checkpointing` is not for"),
        ("brt", ["model.block_length=16"], r"`task.window` must be whole blocks .* \(16\), at least two, .* got 16"),
        ("brt", ["model.block_length=5"], r"`task.window` must be whole blocks of `model.block_length` \(5\)"),
        ("brt", ["task.documents=separate"], "`task.documents` must be 'joined' with `model.recurrent_layers`"),
    ],
)
def test_what_does_not_go_with_a_memory_is_refused(model, overrides, message, recipe, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run(recipe(model), tmp_path / "run", *overrides)


def test_a_model_without_memory_is_refused(recipe, tmp_path):
    with pytest.raises(SystemExit, match="`model.memory_length` must be a number with `task.rows` 'streams', got None"):
        run(recipe("gru-and-rsa", memory_length=None), tmp_path / "run")
