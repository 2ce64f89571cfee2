"""Public data sets that the papers use: Penn Treebank and MNIST, from made-up files and from the real ones."""

import gzip
import hashlib
import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from scripts import train
from scripts.data.sources import mnist, penn_treebank, wikipedia
from scripts.data.sources.download import local_or_downloaded
from scripts.data.windows import IGNORED
from scripts.sharing.folder import public_recipe, public_results
from scripts.tasks.language_modeling import Options as LanguageModeling
from scripts.training.budget import EpochDrops
from scripts.training.recipe import read, read_recipe


REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
QUICK = ["training.max_steps=2", "training.use_cpu=true", "training.eval_strategy=no", "training.save_strategy=no"]
QUICK += ["training.load_best_model_at_end=false", "training.lr_scheduler_type=constant", "model.hidden_size=8"]


def write_words(folder: Path) -> Path:
    for part, lines in (("train", 40), ("valid", 12), ("test", 12)):
        text = "".join(f" the {'cat' if n % 2 else '<unk>'} has N lives \n" for n in range(lines))
        (folder / f"ptb.{part}.txt").write_text(text, encoding="utf-8")
    return folder


def write_images(folder: Path, train=5_010, test=7, side=4) -> Path:
    """Images of `side * side` pixels in four IDX files, the labels in turn."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, size=(count, side, side), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes(), 1))
    return folder


def run(recipe, output, *settings):
    arguments = [part for setting in (*QUICK, *settings) for part in ("--set", setting)]
    return train.main([recipe, "--output-dir", str(output), *arguments])


class TestPennTreebank:
    def test_a_part_is_one_document_whose_last_line_end_is_left_to_eos(self, tmp_path):
        splits = penn_treebank.load(penn_treebank.Options("penn_treebank", str(write_words(tmp_path))))
        assert {split: len(rows) for split, rows in splits.items()} == {"train": 1, "validation": 1, "test": 1}
        text = (tmp_path / "ptb.test.txt").read_text(encoding="utf-8")
        assert splits["test"]["text"][0] + "\n" == text

    @pytest.mark.parametrize(("content", "message"), [(b"\n", "is empty"), (b"\xff", "is not UTF-8"), (None, "has no")])
    def test_what_cannot_be_read_is_named(self, tmp_path, content, message):
        path = write_words(tmp_path) / "ptb.valid.txt"
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError), match=f"`data.folder`.* {message}"):
            penn_treebank.load(penn_treebank.Options("penn_treebank", str(tmp_path)))

    @pytest.mark.parametrize(
        ("name", "metric"),
        [
            ("ptb-char", "bits_per_character"),
            ("ptb-char-paper", "bits_per_character"),
            ("ptb-word", "perplexity"),
            ("ptb-word-paper", "perplexity"),
        ],
    )
    def test_its_recipes_start(self, tmp_path, name, metric):
        settings = [f"data.folder={write_words(tmp_path)}", "model.num_hidden_layers=1"]
        result = run(name, tmp_path / "run", *settings)
        assert result["steps"] == 2 and result["metrics"]["test"][metric] > 0

    @pytest.mark.skipif(not REAL.is_dir(), reason="the real text is not at ../shared/data/ptb")
    def test_the_published_files_have_the_published_sizes(self):
        splits = penn_treebank.load(penn_treebank.Options("penn_treebank", str(REAL / "ptb")))
        texts = {split: rows["text"][0] + "\n" for split, rows in splits.items()}
        sizes = {split: (len(text), len(text.replace("\n", " <eos> ").split())) for split, text in texts.items()}
        assert sizes == {
            "train": (5_101_618, 929_589),
            "validation": (399_782, 73_760),
            "test": (449_945, 82_430),
        }
        for split, (_, sha256) in penn_treebank.FILES.items():
            assert hashlib.sha256(texts[split].encode("utf-8")).hexdigest() == sha256

    def test_the_authors_settings(self):
        characters, words = (read_recipe(name).config() for name in ("ptb-char-paper", "ptb-word-paper"))
        assert (characters.num_hidden_layers, characters.hidden_size, characters.num_attention_heads) == (3, 512, 8)
        assert (characters.local_rnn_type, characters.local_window, characters.hidden_dropout) == ("gru", 7, 0.15)
        assert (words.local_rnn_type, words.local_window, words.hidden_size) == ("lstm", 9, 128)


class TestMnist:
    def load(self, folder, **settings):
        return mnist.load(mnist.Options("mnist", str(folder), **settings)).with_format("numpy")

    def test_images_are_normalised_sequences_and_the_last_5000_are_held_out(self, tmp_path):
        splits = self.load(write_images(tmp_path))
        assert {split: len(rows) for split, rows in splits.items()} == {"train": 10, "validation": 5_000, "test": 7}
        pixels = gzip.decompress((tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes())[16 : 16 + 16]
        expected = (np.frombuffer(pixels, dtype=np.uint8) / 255 - 0.1307) / 0.3081
        np.testing.assert_allclose(splits["test"][0]["input_values"][:, 0], expected, rtol=1e-5, atol=1e-6)
        assert splits["test"]["label"][:].tolist() == list(range(7))
        assert len(self.load(tmp_path, max_train_rows=3)["train"]) == 3

    def test_a_permutation_is_the_same_for_every_image_and_split(self, tmp_path):
        plain = self.load(write_images(tmp_path))
        first, again = (self.load(tmp_path, permutation_seed=seed) for seed in (1, 1))
        order = np.random.default_rng(1).permutation(16)
        assert (order != np.arange(16)).any()
        for split in ("train", "test"):
            expected = plain[split][0]["input_values"][order]
            np.testing.assert_array_equal(first[split][0]["input_values"], expected)
            np.testing.assert_array_equal(again[split][0]["input_values"], expected)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("t10k-labels-idx1-ubyte.gz", b"no gzip", "cannot be read as a gzip file"),
            ("t10k-images-idx3-ubyte.gz", gzip.compress(b"\0\0\x0d\3"), "is no IDX file of bytes in 3 dimensions"),
            ("t10k-labels-idx1-ubyte.gz", gzip.compress(b"\0\0\x08\1\0\0\0\7ab"), r"must hold \(7,\) bytes, got 2"),
            ("t10k-labels-idx1-ubyte.gz", gzip.compress(b"\0\0\x08\1\0\0\0\2ab"), "one label .* each of the 7 images"),
        ],
        ids=["packed", "type", "cut-off", "labels"],
    )
    def test_what_is_no_such_file_is_refused(self, tmp_path, name, content, message):
        (write_images(tmp_path) / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"`data.folder`: .* {message}"):
            self.load(tmp_path)

    @pytest.mark.parametrize(("setting", "value"), [("permutation_seed", -1), ("max_train_rows", 0)])
    def test_wrong_settings_are_refused(self, setting, value):
        with pytest.raises(ValueError, match=rf"`data.{setting}` must be greater than .*, got {value}"):
            read(mnist.Options, {"source": "mnist", setting: value}, "data.")

    @pytest.mark.parametrize("name", ["pixel-mnist", "pixel-mnist-paper"])
    def test_its_recipes_start(self, tmp_path, name):
        settings = [f"data.folder={write_images(tmp_path, train=5_040)}", "model.num_hidden_layers=1"]
        result = run(name, tmp_path / "run", *settings, "training.per_device_eval_batch_size=512")
        assert result["steps"] == 2 and 0 <= result["metrics"]["test"]["accuracy"] <= 1

    @pytest.mark.skipif(not REAL.is_dir(), reason="the real images are not at ../shared/data/mnist")
    def test_the_published_files_have_the_published_sizes(self):
        images, labels = mnist._read(str(REAL / "mnist"), "t10k")
        assert images.shape == (10_000, 784) and np.bincount(labels).tolist()[:3] == [980, 1135, 1032]


class TestWikipedia:
    TEXT = "".join(f"<p>{n * 7919 % 10007} wölfe</p>\n" for n in range(400))

    def archive(self, folder: Path) -> Path:
        with zipfile.ZipFile(folder / "enwik8.zip", "w") as file:
            file.writestr("enwik8", self.TEXT)
        return folder / "enwik8.zip"

    def test_every_byte_is_a_character_and_the_splits_are_90_5_5(self, tmp_path, monkeypatch):
        monkeypatch.setattr(wikipedia, "DOCUMENT", 1000)
        content, texts = self.TEXT.encode("utf-8"), {}
        (tmp_path / "plain").write_bytes(content)
        for file in (self.archive(tmp_path), tmp_path / "plain"):
            splits = wikipedia.load(wikipedia.Options("wikipedia", "enwik8", str(file)))
            texts = {split: "".join(rows["text"]).encode("latin-1") for split, rows in splits.items()}
            assert b"".join(texts.values()) == content
            assert len(texts["test"]) == len(texts["validation"]) == len(content) // 20
            assert {len(text) for text in splits["train"]["text"][:-1]} == {1000}
        few = wikipedia.load(wikipedia.Options("wikipedia", "enwik8", str(tmp_path / "plain"), max_train_bytes=1500))
        assert "".join(few["train"]["text"]).encode("latin-1") == content[:1500]
        assert few["test"]["text"] == splits["test"]["text"]

    def test_an_archive_of_several_files_is_refused(self, tmp_path):
        with zipfile.ZipFile(self.archive(tmp_path), "a") as file:
            file.writestr("more", "x")
        with pytest.raises(ValueError, match="`data.file` 'enwik8.zip' must hold one file, got enwik8, more"):
            wikipedia.load(wikipedia.Options("wikipedia", "enwik8", str(tmp_path / "enwik8.zip")))

    @pytest.mark.parametrize("name", ["enwik8", "text8", "wikitext-103"])
    def test_its_recipes_start_and_resume(self, tmp_path, name):
        settings = ["model.num_hidden_layers=1", "task.window=65", "task.eval_window=65"]
        settings += ["task.eval_stride=32", "training.max_steps=4", "training.save_strategy=steps"]
        settings += ["training.save_steps=2", "training.learning_rate=1e-2", "training.logging_steps=1"]
        if name == "wikitext-103":
            (tmp_path / "data").mkdir()
            for split in ("train", "validation", "test"):
                lines = "".join(f'{{"text": " = {n} =  the cat {n % 3} "}}\n' for n in range(60))
                (tmp_path / "data" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
            settings += [f"data.dataset={tmp_path / 'data'}", "data.config=default"]
        else:
            settings += [f"data.file={self.archive(tmp_path)}"]
        whole = run(name, tmp_path / "run", *settings)
        shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
        arguments = [part for setting in (*QUICK, *settings) for part in ("--set", setting)]
        resumed = train.main([name, "--output-dir", str(tmp_path / "again"), "--resume", *arguments])
        assert resumed["metrics"]["test"] == pytest.approx(whole["metrics"]["test"], rel=1e-5)
        losses = json.loads((tmp_path / "again" / "final" / "curve.json").read_text())["training"]
        assert losses[-1]["loss"] < losses[0]["loss"]


def test_copies_anywhere_below_the_data_folder_are_found_by_their_names(tmp_path, monkeypatch):
    (tmp_path / "some" / "where").mkdir(parents=True)
    (tmp_path / "some" / "where" / "table.csv.gz").write_bytes(gzip.compress(b"a\n1\n"))
    monkeypatch.setenv("RTRANSFORMER_DATA", str(tmp_path))
    path = local_or_downloaded(None, url="https://example.org/x/table.csv", sha256="0" * 64)
    assert path == tmp_path / "some" / "where" / "table.csv.gz"


def test_rows_that_overlap_can_train_each_word_once():
    rows = LanguageModeling("language_modeling", window=9, stride=4, train_once=True).dataset(
        np.arange(40, dtype=np.int32), training=True
    )
    labels = [label for index in range(len(rows)) for label in rows[index]["labels"][1:].tolist() if label != IGNORED]
    assert sorted(labels) == list(range(1, 40))


def test_the_rate_drops_after_every_so_many_epochs():
    class Schedule:
        lr_lambdas = [lambda step: 2.0]

    class State:
        max_steps = 100

    class Arguments:
        num_train_epochs = 10

    EpochDrops(4, 0.5).on_train_begin(Arguments(), State(), None, lr_scheduler=Schedule)
    assert [Schedule.lr_lambdas[0](step) for step in (0, 39, 40, 79, 80)] == [2.0, 2.0, 1.0, 1.0, 0.5]


def test_a_shared_recipe_does_not_name_the_folder_of_the_copies(tmp_path):
    override = f"data.folder={tmp_path}"
    recipe = read_recipe("ptb-char", [override])
    assert recipe.data.folder == str(tmp_path) and "folder" not in public_recipe(recipe).sections["data"]
    assert public_results({"overrides": [override, "training.seed=2"]})["overrides"] == ["training.seed=2"]
