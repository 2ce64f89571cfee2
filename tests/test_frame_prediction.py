"""Music: reading piano rolls, cutting them into rows, nats a frame, and a recipe from the file to its score."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from scipy.io import savemat
from transformers import EvalPrediction

from scripts import evaluate, train
from scripts.data.sources import piano_roll
from scripts.data.sources.download import local_or_downloaded
from scripts.metrics import METRIC_FUNCTIONS
from scripts.sharing.folder import public_recipe
from scripts.tasks.frame_prediction import Frames, frame_metrics, pad_frames, row_nll, summed_loss
from scripts.training.recipe import read_recipe
from tests.tiny_recipe import write_recipe


REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "music"
TRAINING = """
[task]
name = "frame_prediction"
transpose = 2

[data]
source = "piano_roll"
file = {train}

[training]
max_steps = 12
per_device_train_batch_size = 3
per_device_eval_batch_size = 2
learning_rate = 2e-2
logging_steps = 1
eval_steps = 6
save_steps = 6
include_num_input_tokens_seen = "non_padding"
use_cpu = true
disable_tqdm = true

[report]
metrics = ["nats_per_frame"]
"""


def pieces(count, seed=0):
    """Tunes of 5 to 20 frames in which two keys take turns."""
    rng = np.random.default_rng(seed)
    rolls = []
    for _ in range(count):
        roll = np.zeros((rng.integers(5, 21), 88), dtype=np.uint8)
        roll[::2, 40], roll[1::2, 44] = 1, 1
        rolls.append(roll)
    return rolls


def cells(rolls):
    array = np.empty((1, len(rolls)), dtype=object)
    array[0] = rolls
    return array


def write_music(folder, **parts):
    """A file of the Nottingham format, of which single parts can be replaced or left out (None)."""
    arrays = {"traindata": cells(pieces(6)), "validdata": cells(pieces(3, 1)), "testdata": cells(pieces(4, 2)), **parts}
    savemat(folder / "music.mat", {name: array for name, array in arrays.items() if array is not None})
    return folder / "music.mat"


def load(file):
    return piano_roll.load(piano_roll.Options("piano_roll", file=str(file)))


def test_a_file_is_read_piece_by_piece(tmp_path):
    splits = load(write_music(tmp_path)).with_format("numpy")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 6, "validation": 3, "test": 4}
    for row, roll in zip(splits["test"], pieces(4, 2), strict=True):
        np.testing.assert_array_equal(row["values"], roll)


def test_the_keys_are_those_of_a_piano():
    names = piano_roll.key_names()
    assert (len(names), names[0], names[39], names[48], names[87]) == (88, "A0", "C4", "A4", "C8")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"validdata": None}, "has no array `validdata`; it needs .* of these it has testdata, traindata"),
        ({"testdata": np.zeros((3, 88))}, r"`testdata` .* must be a cell array .* got float64 of shape \(3, 88\)"),
        (
            {"testdata": cells([np.zeros((9, 88)), np.zeros((9, 87))])},
            r"piece 1 .* got float64 of shape \(9, 87\)",
        ),
        ({"testdata": cells([np.zeros((1, 88)), np.zeros((9, 88))])}, r"piece 0 of `testdata` .*at least 2 frames"),
        (
            {"testdata": cells([np.full((9, 88), 2), np.zeros((9, 88))])},
            "piece 0 .* and hold 0 and 1 only, got int64",
        ),
    ],
)
def test_a_file_of_another_content_is_refused(tmp_path, parts, message):
    with pytest.raises(ValueError, match=message):
        load(write_music(tmp_path, **parts))


def test_what_is_no_matlab_file_is_refused(tmp_path):
    (tmp_path / "music.mat").write_text("not a MATLAB file " * 50)
    with pytest.raises(ValueError, match="`data.file` 'music.mat' cannot be read as a MATLAB file"):
        load(tmp_path / "music.mat")
    with pytest.raises(FileNotFoundError, match="`data.file` names .*, which is not a file"):
        load(tmp_path / "missing.mat")


class TestDownload:
    CONTENT = b"some public data\n"
    SHA256 = "e4c2e8edac362acab7123654b9e73432d1d5dd87dc1ff6b4b9fc4b8d8e7cd0c1"

    @pytest.fixture
    def source(self, tmp_path, monkeypatch):
        """The address of a file outside the cache, which is empty, and the file's checksum."""
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        (tmp_path / "data.csv").write_bytes(self.CONTENT)
        return {"url": (tmp_path / "data.csv").as_uri(), "sha256": hashlib.sha256(self.CONTENT).hexdigest()}

    def cached(self, tmp_path):
        return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]

    def test_it_is_fetched_once(self, source, tmp_path):
        path = local_or_downloaded(None, **source)
        assert path.read_bytes() == self.CONTENT and self.cached(tmp_path) == [path]
        (tmp_path / "data.csv").unlink()
        assert local_or_downloaded(None, **source) == path

    def test_a_changed_file_is_refused_and_not_kept(self, source, tmp_path):
        with pytest.raises(ValueError, match="data.csv has changed: .* got .* name a copy .* `data.file`"):
            local_or_downloaded(None, url=source["url"], sha256=self.SHA256)
        assert self.cached(tmp_path) == []

    def test_what_cannot_be_fetched_is_said(self, source, tmp_path, monkeypatch):
        (tmp_path / "data.csv").unlink()
        with pytest.raises(ConnectionError, match="data.csv cannot be fetched .* `data.file`"):
            local_or_downloaded(None, **source)
        assert self.cached(tmp_path) == []
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE forbids"):
            local_or_downloaded(None, **source)

    def test_a_local_file_is_taken_as_it_is(self, source, tmp_path):
        assert local_or_downloaded(str(tmp_path / "data.csv"), **source) == tmp_path / "data.csv"
        assert self.cached(tmp_path) == []


@pytest.mark.parametrize("window", [None, 1, 4, 7, 100])
def test_every_frame_but_the_first_of_a_piece_is_predicted_once(window):
    rolls = [np.arange(n)[:, None] + 100 * index for index, n in enumerate((2, 9, 8, 15))]
    rows = Frames(rolls, window)
    predicted = np.concatenate([rows[index][1:] for index in range(len(rows))])
    np.testing.assert_array_equal(predicted, np.concatenate([roll[1:] for roll in rolls]))
    assert all(2 <= len(rows[index]) <= (window or 14) + 1 for index in range(len(rows)))


def test_training_rows_are_transposed_anew_in_each_epoch_and_the_same_when_it_is_repeated():
    rolls = [np.zeros((9, 88), dtype=np.uint8) for _ in range(20)]
    for roll in rolls:
        roll[:, [1, 40, 43]] = 1
    rows = Frames(rolls, transpose=3)
    seen = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        seen.append([tuple(np.flatnonzero(rows[index][0])) for index in range(20)])
    assert seen[0] == seen[2] != seen[1]
    assert {notes[-1] - 43 for notes in seen[0] + seen[1]} == set(range(-3, 4))
    assert {notes for notes in seen[0] if notes[-1] == 43 + 3} == {(4, 43, 46)}
    assert {notes for notes in seen[0] + seen[1] if notes[-1] == 43 - 3} == {(37, 40)}  # one fell off the keyboard


def test_a_batch_shifts_its_labels_and_pads_at_the_end():
    batch = pad_frames(pieces(3))
    for index, roll in enumerate(pieces(3)):
        length = len(roll) - 1
        assert batch["attention_mask"][index].sum() == length and batch["attention_mask"][index, :length].all()
        np.testing.assert_array_equal(batch["input_values"][index, :length], roll[:-1])
        np.testing.assert_array_equal(batch["labels"][index, :length], roll[1:])
        assert (batch["labels"][index, length:] == -100).all() and not batch["input_values"][index, length:].any()


def test_nats_per_frame_is_the_sum_over_keys_averaged_over_all_frames():
    batch = pad_frames(pieces(3))
    frames = sum(len(roll) - 1 for roll in pieces(3))
    logits = torch.zeros(batch["labels"].shape)  # each key: log 2
    nll = row_nll(logits, batch["labels"])
    score = frame_metrics(EvalPrediction(nll.numpy(), batch["labels"].numpy()), metrics=["nats_per_frame"])
    assert score == {"nats_per_frame": pytest.approx(88 * math.log(2))}
    output = type("Output", (), {"logits": logits})
    assert summed_loss(output, batch["labels"]).item() == pytest.approx(frames * 88 * math.log(2), rel=1e-5)
    assert METRIC_FUNCTIONS["nats_per_frame"](nll=[6.0, 2.0], count=[1, 3]) == 2.0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a small file: its recipe, folder and result."""
    folder = tmp_path_factory.mktemp("music")
    recipe = write_recipe(folder, TRAINING, write_music(folder))
    return recipe, folder / "run", train.main([str(recipe), "--output-dir", str(folder / "run")])


def test_a_recipe_learns_and_its_model_scores_the_same(run):
    _, folder, result = run
    losses = [row["loss"] for row in json.loads((folder / "final" / "curve.json").read_text())["training"]]
    assert losses[-1] < losses[0] / 2
    assert 0 < result["metrics"]["test"]["nats_per_frame"] < 88 * math.log(2)
    config = json.loads((folder / "final" / "config.json").read_text())
    assert config["architectures"] == ["RTransformerForAudioFrameClassification"]
    assert config["problem_type"] == "multi_label_classification" and config["id2label"]["87"] == "C8"
    for batch in (1, 4):
        settings = ["--set", f"training.per_device_eval_batch_size={batch}"]
        scored = evaluate.main([str(folder / "final"), *settings])["metrics"]
        assert scored == pytest.approx(result["metrics"]["test"], rel=1e-5)


def test_a_shared_recipe_names_the_file_without_its_folder(run):
    recipe, folder, _ = run
    path = read_recipe(folder / "final").sections["data"]["file"]
    assert Path(path).is_absolute() and public_recipe(read_recipe(recipe)).sections["data"]["file"] == "music.mat"


def test_tokens_seen_are_frames_without_padding(run):
    frames = sum(len(roll) - 1 for roll in pieces(6))
    assert run[2]["tokens_seen"] == 12 // 2 * frames  # two steps an epoch


def test_a_resumed_run_ends_as_if_it_had_not_stopped(run, tmp_path):
    recipe, folder, result = run
    shutil.copytree(folder / "checkpoint-6", tmp_path / "checkpoint-6")
    resumed = train.main([str(recipe), "--output-dir", str(tmp_path), "--resume"])
    assert resumed["metrics"]["test"] == pytest.approx(result["metrics"]["test"], rel=1e-5)


def test_the_sum_as_loss_takes_the_step_that_the_mean_takes_with_a_rate_for_its_labels(run, tmp_path):
    recipe, one = run[0], ["--set", "training.max_steps=1", "--set", "training.optim=sgd", "--set"]
    one += ["training.max_grad_norm=0.0", "--set", "training.warmup_steps=0", "--set", "training.max_steps=1", "--set"]
    batch = sorted(len(roll) - 1 for roll in pieces(6))
    one += ["training.per_device_train_batch_size=6", "--set"]
    rates = {"mean": 1e-2, "sum": 1e-2 / (88 * sum(batch))}
    scores = [
        train.main(
            [str(recipe), "--output-dir", str(tmp_path / loss), *one, f"task.loss={loss}", "--set",
             f"training.learning_rate={rate!r}"]
        )["metrics"]["test"]["nats_per_frame"]
        for loss, rate in rates.items()
    ]  # fmt: skip
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('report.metrics=["nats"]', "`report.metrics` of frame_prediction are of nats_per_frame, got 'nats'"),
        ('report.compressors=["gzip"]', "`report.compressors` is for language_modeling"),
        ("tokenizer.kind=character", r"section `\[tokenizer\]` is for text"),
        ("model.is_causal=false", "`is_causal` must be True for frame_prediction"),
        ("task.window=0", "`task.window` must be greater than 0, or left out, got 0"),
        ("task.loss=total", "`task.loss` must be 'mean' or 'sum', got 'total'"),
        ("data.dataset=Nottingam", "`data.dataset` must be 'Nottingham' or 'JSB_Chorales', got 'Nottingam'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, setting, message):
    recipe = write_recipe(tmp_path, TRAINING, write_music(tmp_path))
    with pytest.raises(SystemExit, match=message):
        train.main([str(recipe), "--output-dir", str(tmp_path / "run"), "--set", setting])


@pytest.mark.parametrize("name", ["nottingham", "nottingham-paper"])
def test_the_recipes_of_the_repository_start(tmp_path, name):
    recipe = str(write_music(tmp_path))
    settings = [
        f"data.file={json.dumps(recipe)}",
        "model.hidden_size=8",
        "training.max_steps=2",
        "training.use_cpu=true",
    ]
    arguments = [part for setting in settings for part in ("--set", setting)]
    result = train.main([name, "--output-dir", str(tmp_path / "run"), *arguments])
    assert result["steps"] == 2 and 0 < result["metrics"]["test"]["nats_per_frame"] < 88


def test_the_authors_recipe_has_their_settings():
    config = read_recipe("nottingham-paper").config()
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 160, 4)
    assert (config.local_rnn_type, config.local_window, config.num_local_rnns, config.rem_kinds) == ("gru", 6, 1, None)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real piano rolls are not at ../shared/data/music")
@pytest.mark.parametrize(
    ("name", "sizes", "longest"), [("Nottingham", (694, 173, 170), 1793), ("JSB_Chorales", (229, 76, 77), 160)]
)
def test_the_published_files_have_the_published_sizes(name, sizes, longest):
    path = REAL / f"{name}.mat"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == piano_roll.SHA256[name]
    splits = load(path).with_format("numpy")
    assert tuple(len(splits[split]) for split in ("train", "validation", "test")) == sizes
    assert max(len(row["values"]) for row in splits["test"]) == longest
