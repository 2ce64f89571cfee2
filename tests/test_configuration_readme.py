"""The recipes that configuration/README.md tells a newcomer to write do what it says."""

import re
from pathlib import Path

import pytest

from scripts import train
from tests.tiny_recipe import write_table, write_text


README = Path(__file__).resolve().parent.parent / "configuration" / "README.md"


def block(heading: str, starts_with: str) -> str:
    """The indented block below a heading that starts with the given text."""
    section = README.read_text(encoding="utf-8").split(f"## {heading}")[1].split("\n## ")[0]
    blocks = ["".join(match) for match in re.findall(r"(?:^    .*\n)+", section, flags=re.MULTILINE)]
    return next(text for text in blocks if text.strip().startswith(starts_with)).replace("\n    ", "\n").strip()


@pytest.mark.parametrize(
    ("heading", "settings"),
    [
        ("Your own text: a language model", ["task.window=33"]),
        ("Your own table: a text classifier", ["tokenizer.vocab_size=280", "model.is_causal=false"]),
    ],
    ids=["text", "table"],
)
def test_a_recipe_copied_from_the_readme_trains(tmp_path, monkeypatch, heading, settings):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path).rename("book.txt")
    write_table(tmp_path).rename("letters.csv")
    Path("mine").mkdir()
    Path("mine/config.json").write_text(block("Your own text: a language model", '{"model_type"'))
    Path("mine/training.toml").write_text(block(heading, "task ="))
    settings += ["model.hidden_size=16", "training.max_steps=2", "training.use_cpu=true"]
    result = train.main(["mine", *[part for setting in settings for part in ("--set", setting)]])
    assert Path("runs/mine/final/results.json").is_file()
    assert set(result["metrics"]) == {"validation", "test"}
