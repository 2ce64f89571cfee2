"""Tables of results: what the file asks for, runs that are made and kept, and the text that comes of them."""

import json

import pytest

from scripts import report
from scripts.results.parameter_matching import read_baselines
from scripts.results.tables import cell, read_tables
from scripts.training.recipe import read_recipe
from tests.tiny_recipe import LANGUAGE_MODELING, write_recipe, write_text


TABLES = """
[tiny]
title = "Tiny"
about = "Nothing much."
suite = "test"
recipe = {recipe}
metrics = ["bits_per_character"]
seeds = [1, 2]
set = ["training.max_steps=2", "training.eval_steps=1", "training.save_steps=1"]

[tiny.columns]
"short" = ["task.window=25"]
"long" = ["task.window=33"]

[tiny.paper]
"theirs" = [1.5, 1.25]

[tiny.rows]
"RSA" = {{set = ["model.num_local_rnns=0"], columns = {{"long" = ["model.rem_gate=head"]}}}}
"GRU" = {{baseline = "gru"}}
"""
BASELINES = """
[gru]
set = ['model={model_type = "recurrent", kind = "gru", num_hidden_layers = 1}']
"""


def result(value, seed=1, threads=1, commit="a" * 40):
    return {
        "metrics": {"test": {"bits_per_character": value}},
        "parameters": 1234,
        "wall_seconds": {"training": 9.6 + 0.1 * seed},  # 10, whichever seed
        "overrides": ["task.window=17", f"training.seed={seed}"],
        "machine": {"threads": threads, "accelerator": None},
        "versions": {"torch": "2", "transformers": "5"},
        "commit": commit,
    }


@pytest.fixture
def tables(tmp_path):
    recipe = write_recipe(tmp_path, LANGUAGE_MODELING, write_text(tmp_path))
    (recipe / "baselines.toml").write_text(BASELINES, encoding="utf-8")
    path = tmp_path / "tables.toml"
    path.write_text(TABLES.format(recipe=json.dumps(str(recipe))), encoding="utf-8")
    return path


def test_a_table_is_every_row_column_and_seed(tables):
    runs = read_tables(tables)["tiny"].runs()
    assert [run.name for run in runs] == [
        "tiny/rsa/short/seed-1",
        "tiny/rsa/long/seed-1",
        "tiny/gru/short/seed-1",
        "tiny/gru/long/seed-1",
        "tiny/rsa/short/seed-2",
        "tiny/rsa/long/seed-2",
        "tiny/gru/short/seed-2",
        "tiny/gru/long/seed-2",
    ]
    assert runs[5].shared[-2:] == ("task.window=33", "training.seed=2")
    assert runs[5].own == ("model.num_local_rnns=0", "model.rem_gate=head")
    assert runs[4].own == ("model.num_local_rnns=0",)


def test_a_row_changes_a_baseline_too(tables):
    tables.write_text(
        tables.read_text().replace('baseline = "gru"', 'baseline = "gru", set = ["model.num_hidden_layers=2"]')
    )
    run = next(run for run in read_tables(tables)["tiny"].runs() if run.row.baseline)
    recipe = read_recipe(run.row.recipe, tuple(report.overrides_of(run)))
    assert (recipe.config().kind, recipe.config().num_hidden_layers) == ("gru", 2)


def test_a_cell_may_have_several_figures(tables):
    tables.write_text(tables.read_text().replace('["bits_per_character"]', '["a", "b"]\nscale = 100.0\ndigits = 1'))
    results = [{"metrics": {"test": {"a": 1.0, "b": value}}} for value in (0.5, 0.75)]
    assert cell(read_tables(tables)["tiny"], results) == "100.0 / 62.5 ± 17.7"
    assert cell(read_tables(tables)["tiny"], []) == "-"


def test_a_table_of_one_column_gives_the_command_of_every_row(tables):
    text = tables.read_text(encoding="utf-8").replace('"long" = ["task.window=33"]', "").replace("[1.5, 1.25]", "[1.5]")
    tables.write_text(text.replace(', columns = {"long" = ["model.rem_gate=head"]}', ""), encoding="utf-8")
    lines = report.markdown(
        read_tables(tables)["tiny"], {"tiny/rsa/short/seed-1": {"result": result(1.0)}}
    ).splitlines()
    command = next(line for line in lines if line.startswith("    python -m scripts.train"))
    assert command.endswith("--set task.window=17 --set training.seed=1")


def test_a_cell_is_the_mean_of_its_seeds_and_their_spread(tables):
    table = read_tables(tables)["tiny"]
    found = {
        "tiny/rsa/short/seed-1": {"result": result(1.0)},
        "tiny/rsa/short/seed-2": {"result": result(2.0, seed=2)},
        "tiny/gru/long/seed-1": {"result": result(3.0, threads=2)},
        "tiny/unknown/seed-1": {"result": result(99.0)},
    }
    lines = report.markdown(table, found).splitlines()
    assert "| theirs | 1.5 | 1.25 | | | |" in lines
    assert "| **RSA** | 1.500 ± 0.707 | - | 1,234 | 0 to 2 | 10 |" in lines
    assert "| **GRU** | - | 3.000 | 1,234 | 0 to 1 | 10 |" in lines
    assert not any("99" in line for line in lines)
    del found["tiny/gru/long/seed-1"]
    assert not any("GRU" in line for line in report.markdown(table, found).splitlines())
    measured = next(line for line in lines if line.startswith("Measured on"))
    assert "1 CPU thread, torch 2" in measured and "2 CPU threads" in measured and "(at aaaaaaaaaaaa)" in measured


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("metrics =", "metrik =", r"`metrik` in \[tiny\] of tables.toml is not a setting; did you mean `metrics`"),
        ('title = "Tiny"', "", r"`title` in \[tiny\] of tables.toml is missing"),
        ("[1.5, 1.25]", "[1.5]", r"`paper` of \[tiny\] .* each of the 2 columns; 'theirs' has 1"),
        (
            'suite = "test"',
            'suite = "test"\ncurves = "lang"',
            r"`curves` of \[tiny\] must be a column, got 'lang'; did you mean `long`",
        ),
        (
            '"long" = ["model',
            '"lang" = ["model',
            r"`columns` of \[tiny.rows\] 'RSA' has an unknown 'lang'; did you mean `long`",
        ),
        ('baseline = "gru"', "base = 1", r"`base` in \[tiny.rows\] 'GRU' of tables.toml is not a setting"),
    ],
)
def test_a_table_that_is_not_as_it_must_be_is_refused(tables, old, new, message):
    tables.write_text(tables.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_tables(tables)


def test_runs_are_made_once_and_kept_with_curve_and_gates(tables, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "read_tables", lambda: read_tables(tables))
    arguments = ["--run", "test", "--only", "tiny/rsa/short/seed-1", "tiny/gru/short/seed-1"]
    arguments += ["--runs", str(tmp_path / "runs"), "--output-dir", str(tmp_path)]
    report.main(arguments)
    found = report.read_results(tmp_path / "results")
    assert list(found) == ["tiny/rsa/short/seed-1", "tiny/gru/short/seed-1"]
    kept = {name: found[f"tiny/{name}/short/seed-1"] for name in ("rsa", "gru")}
    assert len((tmp_path / "results" / "tiny.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert [row["head"] for row in kept["rsa"]["gates"]] == [0] and kept["gru"]["gates"] == []
    assert len(kept["rsa"]["curve"]["evaluation"]) == 2
    parameters = [content["result"]["parameters"] for content in kept.values()]
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert f"| {parameters[1]:,} | 0 to 1 |" in text
    assert "    make reproduce-test ONLY=tiny/rsa/\n" in text
    assert (tmp_path / "results" / "tiny.png").is_file() and "](results/tiny-gates.png)" in text
    monkeypatch.setattr(report, "make", None)  # nothing is left to make
    report.main(arguments)
    assert "has a result" in capsys.readouterr().err
    assert (tmp_path / "RESULTS.md").read_text(encoding="utf-8") == text


def test_what_cannot_be_run_is_said(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "read_tables", lambda: read_tables(tables))
    with pytest.raises(SystemExit, match="--run names the suite 'gpu'; known are test"):
        report.main(["--run", "gpu"])


def test_the_tables_of_the_repository_name_what_there_is():
    for table in read_tables().values():
        for row in table.rows.values():
            recipe = read_recipe(row.recipe, (*table.set, *row.set))
            assert set(table.metrics) <= set(recipe.report.metrics)
            assert row.baseline is None or row.baseline in read_baselines(row.recipe)


def test_the_recipe_of_the_demo_is_the_first_row_of_its_table_and_every_document_has_its_figure():
    table, recipe = read_tables()["stdlib-code"], read_recipe("stdlib-code")
    run, found = table.runs()[0], report.read_results(report.ROOT / "docs" / "results")
    row = read_recipe(run.row.recipe, report.overrides_of(run))
    assert (run.seed, run.row.baseline) == (recipe.training["seed"], None)
    assert (row.model, row.sections) == (recipe.model, recipe.sections)
    figure = cell(table, [found[other.name]["result"] for other in table.runs() if other.row is run.row])
    for name in ("README.md", "configuration/README.md", "docs/RESULTS.md"):
        assert figure in (report.ROOT / name).read_text(encoding="utf-8"), name
