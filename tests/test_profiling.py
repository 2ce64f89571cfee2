"""scripts/train.py --profile: what it prints and writes."""

import json

import pytest

from scripts import train
from tests.tiny_recipe import LANGUAGE_MODELING, write_recipe, write_text


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path, LANGUAGE_MODELING, write_text(tmp_path))


def test_the_profile_has_the_steps_asked_for_and_training_ends_as_without(recipe, tmp_path, capsys):
    profiled = train.main([str(recipe), "--output-dir", str(tmp_path / "profiled"), "--profile", "2"])
    events = json.loads((tmp_path / "profiled" / "profile.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}
    assert any("Optimizer.step" in event["name"] for event in events)
    printed = capsys.readouterr().err
    assert "Self CPU time total" in printed and "the trace of 2 steps is in" in printed
    plain = train.main([str(recipe), "--output-dir", str(tmp_path / "plain")])
    assert profiled["steps"] == plain["steps"] and profiled["metrics"] == plain["metrics"]


def test_a_number_of_steps_below_one_is_refused(recipe, tmp_path):
    with pytest.raises(SystemExit, match="`--profile` must be at least 1 step, got 0"):
        train.main([str(recipe), "--output-dir", str(tmp_path / "run"), "--profile", "0"])
