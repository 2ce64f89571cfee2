"""A recipe small enough for tests: a model of a few thousand parameters and a text of a few thousand characters."""

import json
from pathlib import Path


MODEL = {
    "model_type": "rtransformer",
    "hidden_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "local_window": 3,
    "rem_kinds": ["regular", "none"],
    "embedding_dropout": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
LANGUAGE_MODELING = """
[task]
name = "language_modeling"
window = 33
eval_stride = 20

[data]
source = "files"
train = {train}

[tokenizer]
kind = "character"

[training]
max_steps = 12
per_device_train_batch_size = 4
learning_rate = 1e-2
logging_steps = 1
eval_steps = 4
save_steps = 4
use_cpu = true
disable_tqdm = true

[report]
metrics = ["bits_per_character", "perplexity"]
compressors = ["gzip", "bzip2", "xz"]
"""
CLASSIFICATION = """
[task]
name = "sequence_classification"

[data]
source = "files"
train = {train}
text_column = "body"
label_column = "kind"
held_out = 0.2

[tokenizer]
kind = "word"
min_frequency = 2

[training]
max_steps = 60
per_device_train_batch_size = 8
learning_rate = 1e-2
eval_steps = 20
save_steps = 20
use_cpu = true
disable_tqdm = true

[report]
metrics = ["accuracy", "f1"]
"""


def write_text(folder: Path, lines: int = 120) -> Path:
    """A text that a model can learn a little of."""
    path = folder / "corpus.txt"
    path.write_text("".join(f"line {n}: {n * 7919 % 10007} bottles of beer\n" for n in range(lines)), encoding="utf-8")
    return path


def write_table(folder: Path, rows: int = 60) -> Path:
    """
    A CSV file whose label is the second word of its text. The last word is different in each row: a tokenizer with
    `min_frequency` 1 would know it in training alone, where a model could learn the rows by heart.
    """
    kinds = ("apple", "bread", "cheese")
    path = folder / "table.csv"
    body = "".join(f"some {kinds[n % 3]} for {n},{kinds[n % 3]}\n" for n in range(rows))
    path.write_text("body,kind\n" + body, encoding="utf-8")
    return path


def write_recipe(folder: Path, training: str, train: Path, name: str = "tiny", **model) -> Path:
    """Write the two files of a recipe."""
    recipe = folder / name
    recipe.mkdir()
    (recipe / "config.json").write_text(json.dumps({**MODEL, **model}), encoding="utf-8")
    (recipe / "training.toml").write_text(training.format(train=json.dumps(str(train))), encoding="utf-8")
    return recipe
