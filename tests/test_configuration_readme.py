"""The recipes that configuration/README.md tells a newcomer to write do what it says."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scripts import predict, train
from tests.tiny_recipe import write_text


README = Path(__file__).resolve().parent.parent / "configuration" / "README.md"


def block(heading: str, starts_with: str, nth: int = 0) -> str:
    """The n-th indented block below a heading that starts with the given text."""
    section = README.read_text(encoding="utf-8").split(f"## {heading}")[1].split("\n## ")[0]
    blocks = ["".join(match) for match in re.findall(r"(?:^    .*\n)+", section, flags=re.MULTILINE)]
    blocks = [text for text in blocks if text.strip().startswith(starts_with)]
    return blocks[nth].replace("\n    ", "\n").strip()


FORECASTS = "Your own table: forecasts"
CLASSIFIER = "Your own table: a text classifier"


@pytest.mark.parametrize(
    ("heading", "nth", "settings"),
    [
        ("Your own text: a language model", 0, ["task.window=33"]),
        (CLASSIFIER, 0, ["tokenizer.vocab_size=280", "model.is_causal=false"]),
        (CLASSIFIER, 1, ["tokenizer.vocab_size=280", "data.label_column=stars"]),
        (CLASSIFIER, 2, ["tokenizer.vocab_size=280", "data.label_column=colours"]),
        (FORECASTS, 0, ["task.context_length=12", "task.prediction_length=3"]),
    ],
    ids=["text", "table", "regression", "several-labels", "forecasts"],
)
def test_a_recipe_copied_from_the_readme_trains_on_messy_files(tmp_path, monkeypatch, heading, nth, settings):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path).rename("book.txt")
    write_letters("letters.csv")
    write_sensors("sensors.csv")
    Path("mine").mkdir()
    config = heading if heading == FORECASTS else "Your own text: a language model"
    Path("mine/config.json").write_text(block(config, '{"model_type"'))
    recipe = block(heading, "task =")
    if nth:  # these show only what differs
        changed = dict(line.split(" = ", 1) for line in block(heading, "task =", nth).splitlines())
        recipe = "\n".join(f"{key} = {changed.get(key, value)}" for key, value in map(split_key, recipe.splitlines()))
    Path("mine/training.toml").write_text(recipe, encoding="utf-8")
    settings = [*settings, "model.hidden_size=16", "training.max_steps=2", "training.use_cpu=true"]
    settings += [
        "training.eval_strategy=steps",
        "training.save_strategy=steps",
        "training.eval_steps=1",
        "training.save_steps=1",
    ]
    result = train.main(["mine", *[part for setting in settings for part in ("--set", setting)]])
    assert Path("runs/mine/final/results.json").is_file()
    assert set(result["metrics"]) == {"validation", "test"}
    if heading != "Your own text: a language model":
        file = "sensors.csv" if heading == FORECASTS else "letters.csv"
        assert predict.main(["runs/mine/final", file])["rows"] == (3 if heading == FORECASTS else 60)


def split_key(line):
    return line.split(" = ", 1)


def write_letters(path):
    """Semicolons, a byte-order mark, quoted line ends and delimiters, words that pandas takes for empty, an index."""
    lines = [";body;kind;stars;colours\r\n"]
    for n in range(60):
        kind = ("NA", "null", "1")[n % 3]
        colours = ("red", "green|red", "blue")[n % 3]
        lines.append(f'{n};"Letter {n}; with ""marks""\r\nand {kind}";{kind};{n % 5 + 0.5};{colours}\r\n')
    Path(path).write_bytes("".join(lines).encode("utf-8-sig"))


def write_sensors(path):
    """Semicolons, decimal commas, latin days first, an index."""
    hours = pd.date_range("2024-01-01", periods=200, freq="h")
    table = pd.DataFrame(
        {"when": hours.strftime("%d.%m.%Y %H:%M"), "a": np.sin(np.arange(200) / 3), "b": 1e3 + np.arange(200) % 7 / 2}
    )
    table.to_csv(path, sep=";", decimal=",", encoding="utf-16")
