"""scripts/profile_training.py: where the time of a training step goes."""

import json
from types import SimpleNamespace

import pytest

from scripts import profile_training
from scripts.profile_training import PARTS
from tests.tiny_recipe import LANGUAGE_MODELING, write_recipe, write_text


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path, LANGUAGE_MODELING, write_text(tmp_path))


def test_the_parts_make_up_the_step_and_a_slow_one_shows(recipe, tmp_path, monkeypatch, capsys):
    before = set(tmp_path.rglob("*"))
    now = 0.0

    def pass_time(seconds=0.001):  # a clock of our own, by which looking at it takes a millisecond
        nonlocal now
        now += seconds
        return now

    monkeypatch.setattr(profile_training, "time", SimpleNamespace(perf_counter=pass_time))
    steps = 3
    make_trainer = profile_training.make_trainer

    def slow(model, args, prepared, **options):
        trainer = make_trainer(model, args, prepared, **options)
        inner = trainer.data_collator
        trainer.data_collator = lambda rows: (pass_time(0.5), inner(rows))[1]
        return trainer

    monkeypatch.setattr(profile_training, "make_trainer", slow)
    trace = tmp_path / "new" / "trace.json"
    result = profile_training.main([str(recipe), "--steps", str(steps), "--trace", str(trace)])
    parts = result["parts"]
    assert list(parts) == list(PARTS) and all(seconds >= 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(result["step_seconds"])
    assert parts["data"] == pytest.approx(0.501)
    others = {name: seconds for name, seconds in parts.items() if name not in ("data", "rest")}
    assert others == pytest.approx(dict.fromkeys(others, 0.001) | {"watch": 0.002})
    assert result["tokens_per_second"] == pytest.approx(4 * 33 / result["step_seconds"])
    assert 0 < sum(result["operations"].values()) <= 1
    assert json.loads(trace.read_text())["traceEvents"]
    assert "| data |" in capsys.readouterr().err
    assert set(tmp_path.rglob("*")) - before == {trace, trace.parent}


def test_a_number_of_steps_below_one_is_refused(recipe):
    with pytest.raises(SystemExit, match="`--steps` must be at least 1, got 0"):
        profile_training.main([str(recipe), "--steps", "0"])
