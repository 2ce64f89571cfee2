"""Recipes: what they hold, what overrides do, and what is refused, with which words."""

import dataclasses
import json
import re

import pytest
from transformers import AutoConfig, TrainingArguments

from scripts.training.recipe import CONFIGURATION, read_recipe, recipe_names
from tests.tiny_recipe import CLASSIFICATION, LANGUAGE_MODELING, write_recipe


RECIPES = recipe_names()


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path, LANGUAGE_MODELING, tmp_path / "corpus.txt")


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_of_the_repository_is_valid(name, tmp_path):
    recipe = read_recipe(name)
    found = AutoConfig.from_pretrained(CONFIGURATION / name)
    assert type(found) is type(recipe.config())
    found._name_or_path = recipe.config()._name_or_path
    assert found.to_diff_dict() == recipe.config().to_diff_dict()
    TrainingArguments(output_dir=str(tmp_path), **{**recipe.training, "metric_for_best_model": "x"})


def test_overrides_reach_every_section_and_the_model(recipe):
    read = read_recipe(
        recipe,
        [
            "training.learning_rate=1e-3",
            "model.hidden_size=24",
            "model.rem_kinds=['none', 'regular']",
            "budget.max_seconds=30",
            "averaging.decay=0.9",
            "tokenizer.kind=word",
            'data.train=["a.txt", "b.txt"]',
            'report.metrics=["perplexity"]',
        ],
    )
    assert read.training["learning_rate"] == 1e-3
    assert read.config().hidden_size == 24 and read.config().rem_kinds == ["none", "regular"]
    assert read.budget.max_seconds == 30
    assert read.averaging.decay == 0.9 and read_recipe(recipe).averaging.decay is None
    assert read.tokenizer.kind == "word"
    assert read.data.train == ["a.txt", "b.txt"]
    assert read.report.metrics == ["perplexity"]


def test_an_override_replaces_a_whole_section(recipe):
    overrides = ["averaging.decay=0.9", "averaging={}", "budget={max_seconds = 30}", "budget.clock=processor"]
    read = read_recipe(recipe, overrides)
    assert read.averaging.decay is None
    assert dict(read.sections["budget"]) == {"max_seconds": 30, "clock": "processor"}
    read.save(recipe)
    assert read_recipe(recipe).sections == read.sections


def test_a_saved_recipe_reads_back_with_its_overrides(recipe):
    read = read_recipe(
        recipe, ["task.window=41", 'data.train=["ä \\"b\\".txt"]', "training.lr_scheduler_kwargs={a=1.5}"]
    )
    read.save(recipe)
    again = read_recipe(recipe)
    assert again.sections == read.sections and again.task == read.task and again.data == read.data


def test_a_recipe_is_frozen(recipe):
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_recipe(recipe).task.window = 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.learning_rat=1",
            "`training.learning_rat` is not a setting; did you mean `learning_rate`",
        ),
        ("training.learning_rate=fast", "`training.learning_rate` must be a valid number, or left out, got 'fast'"),
        ("training.output_dir=x", "use --output-dir"),
        ("task.windw=3", "`task.windw` is not a setting; did you mean `window`"),
        ("task.window=1", "`task.window` must be at least 2, got 1"),
        ("task.window=2.5", "`task.window` must be a valid integer, got 2.5"),
        ("task.eval_stride=33", r"`task.eval_stride` must be from 1 to `eval_window` - 1 \(32\), got 33"),
        ("task.name=language_modelling", "`task.name` must be one of .*; did you mean `language_modeling`"),
        ("data.source=file", "`data.source` must be one of .*, got 'file'; did you mean `files`"),
        ("data.tran=x.txt", "`data.tran` is not a setting; did you mean `train`"),
        ("data.held_out=0.7", "`data.held_out` must be less than 0.5, got 0.7"),
        ("tokenizer.kind=charakter", "`tokenizer.kind` must be 'character', 'word', 'byte_bpe' or 'pretrained', got"),
        ("budget.max_second=3", "`budget.max_second` is not a setting; did you mean `max_seconds`"),
        ("budget.max_seconds=0", "`budget.max_seconds` must be greater than 0, or left out, got 0"),
        ("averaging.decay=1", "`averaging.decay` must be less than 1, or left out, got 1"),
        ("averaging.decay=0.0", "`averaging.decay` must be greater than 0, or left out, got 0.0"),
        ("averaging.decay=slow", "`averaging.decay` must be a valid number, or left out, got 'slow'"),
        ("averaging.deca=0.9", "`averaging.deca` is not a setting; did you mean `decay`"),
        ("report.metrics=accuracy", "`report.metrics` must be a valid list, got 'accuracy'"),
        ("model.hiden_size=3", "`model.hiden_size` is not a field of the model's config; did you mean `hidden_size`"),
        ("model.hidden_size=21", "`hidden_size` must be divisible by `num_attention_heads`"),
        ("model.model_type=rtransfomer", "`model_type` of config.json must be a model type.*, got 'rtransfomer'"),
        ("trainning.seed=3", "--set names the section `trainning`, which is not known; did you mean `training`"),
        ("learning_rate=3", "must read section.key=value"),
        ("training.seed", "must read section.key=value"),
        ("averaging", "must read section.key=value"),
        ("averaging=off", "--set 'averaging=off' must be a table, such as"),
        ("task={}", "`task.name` is missing"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(recipe, override, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(recipe, [override])


def test_unknown_and_missing_sections_are_refused(recipe):
    text = (recipe / "training.toml").read_text()
    (recipe / "training.toml").write_text(text + "\n[optimizer]\nlr = 1\n")
    with pytest.raises(ValueError, match=r"section `\[optimizer\]` of training.toml is not known"):
        read_recipe(recipe)
    (recipe / "training.toml").write_text(text.replace("[report]", "[budget]").split("metrics")[0])
    with pytest.raises(ValueError, match=r"section `\[report\]` is missing"):
        read_recipe(recipe)


def test_a_needed_setting_that_is_missing_is_named(recipe):
    path = recipe / "training.toml"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("train =")))
    with pytest.raises(ValueError, match="`data.train` is missing, and it has no default"):
        read_recipe(recipe)


def test_what_is_not_a_recipe_folder_is_refused(recipe, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="neither a folder nor a name in configuration.*did you mean `stdlib-code`"
    ):
        read_recipe("stdlib-cod")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no config.json; a recipe is config.json and training.toml"):
        read_recipe(tmp_path / "empty")
    (recipe / "training.toml").write_text("[task\n")
    with pytest.raises(ValueError, match="training.toml cannot be read"):
        read_recipe(recipe)
    (recipe / "config.json").write_text(json.dumps({"hidden_size": 3})[:-1])
    with pytest.raises(ValueError, match="config.json cannot be read"):
        read_recipe(recipe)


@pytest.mark.parametrize("training", [LANGUAGE_MODELING, CLASSIFICATION], ids=["language_modeling", "classification"])
def test_text_without_a_tokenizer_is_refused(tmp_path, training):
    from tests.tiny_recipe import write_table, write_text

    train = write_text(tmp_path) if training is LANGUAGE_MODELING else write_table(tmp_path)
    recipe = write_recipe(tmp_path, training, train)
    path = recipe / "training.toml"
    path.write_text(re.sub(r"\[tokenizer\]\n[^[]*", "", path.read_text()))
    with pytest.raises(ValueError, match=r"section `\[tokenizer\]` is missing"):
        read_recipe(recipe).prepare(None, ("train",))


@pytest.mark.parametrize("name", [name for name in RECIPES if (CONFIGURATION / name / "results.json").is_file()])
def test_each_result_is_the_one_that_the_readme_tells(name):
    result = json.loads((CONFIGURATION / name / "results.json").read_text())
    assert result["recipe"] == name and result["overrides"] == []
    figure = result["metrics"]["test"][read_recipe(name).report.metrics[0]]
    shown = f"{figure:.3f}" if figure > 1 else f"{figure:.1%}".replace("%", " %")
    assert f"`python -m scripts.train {name}`" in (readme := (CONFIGURATION / "README.md").read_text())
    assert shown in readme


def test_every_recipe_is_in_the_readme():
    readme = (CONFIGURATION / "README.md").read_text()
    shown = {name for name in RECIPES if f"`{name}`" in readme or f"python -m scripts.train {name}`" in readme}
    assert sorted(set(RECIPES) - shown) == []
