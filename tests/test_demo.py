"""`make demo`: the whole keeps to its time on fast and slow machines, and it ends with scores, curve and text."""

import json
import math

import pytest

from scripts import demo, generate
from scripts.sharing.folder import write_folder
from scripts.training.budget import CLOCKS, RowsInTime
from scripts.training.recipe import Recipe
from scripts.training.trainer import RecipeTrainer
from tests.tiny_recipe import LANGUAGE_MODELING, write_recipe, write_text


pytestmark = pytest.mark.usefixtures("one_thread")

LSTM = {
    "result": {
        "metrics": {"test": {"bits_per_character": 2.5}},
        "parameters": 1234,
        "wall_seconds": {"training": 240.4},
        "versions": {"python": "3.11.7"},
    }
}


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def costs(self, monkeypatch, owner, name, seconds):
        """Calling `owner.name` takes so many seconds, or `seconds(arguments)`."""
        call = getattr(owner, name)

        def slow(*arguments, **options):
            self.now += seconds(*arguments) if callable(seconds) else seconds
            return call(*arguments, **options)

        monkeypatch.setattr(owner, name, slow)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder, LANGUAGE_MODELING, write_text(folder, 300))


@pytest.mark.parametrize("slower", [1, 4, 16])
def test_all_of_it_takes_at_most_one_and_a_half_times_the_seconds_of_training(
    recipe, tmp_path, monkeypatch, capsys, slower
):
    clock = Clock()
    monkeypatch.setitem(CLOCKS, "wall", clock)
    clock.costs(monkeypatch, Recipe, "prepare", 1.0 * slower)
    clock.costs(monkeypatch, RecipeTrainer, "training_step", 0.5 * slower)
    clock.costs(monkeypatch, RecipeTrainer, "prediction_step", 0.25 * slower)
    clock.costs(monkeypatch, demo.train, "save_final", 0.25 * slower)
    clock.costs(monkeypatch, generate, "generate", lambda options: options.max_seconds)
    (tmp_path / "results").mkdir()
    kept = {"name": "tiny/lstm/seed-1", **LSTM}
    (tmp_path / "results" / "tiny.jsonl").write_text(json.dumps(kept) + "\n", encoding="utf-8")
    settings = ["training.max_steps=100000", "training.eval_steps=100000", "training.save_steps=100000"]
    settings += ["training.per_device_eval_batch_size=4", "task.max_eval_rows=4"]
    begun, spent = clock.now, 1.0 * slower  # on imports
    result = demo.main(
        [str(recipe), "--seconds", "80", "--output-dir", str(tmp_path / "run"), "--prompt", "line "]
        + ["--max-new-tokens", "9", *[part for setting in settings for part in ("--set", setting)]],
        spent=spent,
        results=tmp_path / "results",
    )
    assert spent + clock.now - begun <= 120
    most = 80 / (0.5 * slower)
    assert 0.75 * most <= result["steps"] <= most + 1
    for scored, rows in result["rows_scored"].values():
        assert scored == rows if slower == 1 else 0 < scored < rows
    output = capsys.readouterr().out
    lines = output.splitlines()
    figures = {line.split()[0]: line.split()[1] for line in lines if line.startswith("  ") and "this" not in line}
    ours = next(line for line in lines if line.startswith("  this model"))
    scored, rows = result["rows_scored"]["test"]
    assert f"{result['metrics']['test']['bits_per_character']:.3f}" in ours
    assert ("the whole test split" if slower == 1 else f"{scored} of {rows} rows, evenly spread") in ours
    assert figures["LSTM"] == "2.500" and figures["xz"] == f"{result['metrics']['test']['xz']:.3f}"
    assert f"curve: {tmp_path / 'run' / 'final' / 'curve.png'}" in lines
    write_folder(tmp_path / "run" / "final", tmp_path / "card", "someone/tiny")
    card = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    assert (f"Of test, {scored} of {rows} rows were scored" in card) == (slower > 1)
    assert output.endswith(f"\n{result['text']}\n") and result["text"].startswith("line ")


def test_without_kept_results_no_lstm_is_named():
    result = {"recipe": "tiny", "metrics": {"test": {"bits_per_character": 1.0, "xz": 2.0}}}
    lines = demo.scores({**result, "rows_scored": {"test": [3, 3]}}, {"other/lstm/seed-1": LSTM})
    assert not any("LSTM" in line for line in lines) and any("xz" in line for line in lines)


@pytest.mark.parametrize("rows", [1, 2, 7, 100, 1597])
def test_rows_in_time_are_each_row_once_and_spread_evenly_wherever_they_end(monkeypatch, rows):
    clock = Clock()
    monkeypatch.setitem(CLOCKS, "wall", clock)
    assert sorted(RowsInTime(range(rows), math.inf)) == list(range(rows))
    part = RowsInTime(range(rows), seconds=(rows + 1) // 2)
    given = []
    for row in part:
        given.append(row)
        clock.now += 1
    assert len(given) == part.given == (rows + 1) // 2
    gaps = [after - before for before, after in zip([-1, *sorted(given)], [*sorted(given), rows])]
    assert max(gaps) <= 6
    clock.now += 100
    assert len(list(RowsInTime(range(rows), seconds=0.0))) == 1
