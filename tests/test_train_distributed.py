"""Training with two processes is training with one and the doubled batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import train
from tests.tiny_recipe import LANGUAGE_MODELING, write_recipe, write_text


ROOT = Path(__file__).resolve().parent.parent
# accelerate starts several processes only with --multi_gpu; the recipe's `use_cpu` keeps them on the processor.
TWO_PROCESSES = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def train_with_two_processes(*arguments):
    command = [sys.executable, *TWO_PROCESSES, "-m", "scripts.train", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # one line, from the first process only


def losses(folder):
    return [row["loss"] for row in json.loads((folder / "final" / "curve.json").read_text())["training"]]


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path, LANGUAGE_MODELING, write_text(tmp_path))


def test_two_processes_give_the_curve_of_one_with_the_doubled_batch(recipe, tmp_path):
    one = train.main([str(recipe), "--output-dir", str(tmp_path / "one")])
    halved = ["--set", "training.per_device_train_batch_size=2"]
    two = train_with_two_processes(recipe, "--output-dir", tmp_path / "two", *halved)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["tokens_seen"] == one["tokens_seen"]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert two["metrics"]["test"] == pytest.approx(one["metrics"]["test"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_stop_together_when_the_time_is_up(recipe, tmp_path):
    settings = ["--set", "training.max_steps=100000", "--set", "budget.max_seconds=3"]
    result = train_with_two_processes(recipe, "--output-dir", tmp_path / "two", *settings)
    assert result["steps"] > 2 and 3 <= result["wall_seconds"]["training"] < 30
