"""Faults, each caused on purpose: what a run does about them, what it says, and how it goes on."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from scripts import train
from scripts.training.checkpoints import COMPLETE, newest_complete
from scripts.training.interruptions import describe_batch, explain_full_disk, require_writable
from scripts.training.recipe import read_recipe
from scripts.training.trainer import RecipeTrainer
from tests.recorded_run import read, recorded
from tests.streamed_recipe import words_of, write_files, write_streamed
from tests.tiny_recipe import LANGUAGE_MODELING, write_recipe, write_text


ROOT = Path(__file__).resolve().parent.parent
RUN = "tests.recorded_run"
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder, LANGUAGE_MODELING, write_text(folder), hidden_dropout=0.1)


@pytest.fixture
def harm(monkeypatch, tmp_path):
    """Train in this process with a harm of tests/recorded_run.py."""

    def train_with(kind, *arguments):
        with monkeypatch.context() as patch:
            step, loss = recorded(tmp_path / "records", kind)
            patch.setattr(RecipeTrainer, "training_step", step)
            patch.setattr(RecipeTrainer, "compute_loss", loss)
            return train.main([str(argument) for argument in arguments])

    return train_with


def launch(records, harm, *arguments, launcher=LAUNCH):
    """Train in two processes of their own; what came of it."""
    command = [sys.executable, *launcher, "-m", RUN, *map(str, (records, harm, *arguments))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def losses(folder):
    return [row["loss"] for row in json.loads((folder / "final" / "curve.json").read_text())["training"]]


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_a_signal_saves_the_step_and_says_how_to_go_on(recipe, tmp_path, harm, capfd):
    whole = harm("none", recipe, "--output-dir", tmp_path / "whole")
    expected = read(tmp_path / "records")
    (tmp_path / "records.0").unlink()
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        harm("terminate:0:6", recipe, "--output-dir", run)
    assert stopped.value.code == 143
    error = capfd.readouterr().err
    assert "SIGTERM: stopping after this step; Ctrl-C again stops at once" in error
    assert f"SIGTERM: stopped after step 7, which is saved in {run}/checkpoint-7; go on with the same command" in error
    assert checkpoints(run) == ["checkpoint-4", "checkpoint-7"] and newest_complete(run) == run / "checkpoint-7"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was before
    result = harm("none", recipe, "--output-dir", run, "--resume")
    assert losses(run) == losses(tmp_path / "whole") and result["metrics"] == whole["metrics"]
    assert read(tmp_path / "records") == expected and list(expected[0]) == list(range(12))


def test_a_second_interrupt_stops_at_once(recipe, tmp_path, harm):
    with pytest.raises(KeyboardInterrupt):
        harm("interrupt:0:6", recipe, "--output-dir", tmp_path / "run")
    assert checkpoints(tmp_path / "run") == ["checkpoint-4"]


def test_a_stop_is_no_end_of_an_epoch(recipe, tmp_path, harm):
    settings = ["training.eval_strategy=epoch", "training.save_strategy=epoch", "training.max_steps=100"]
    settings = [part for setting in settings for part in ("--set", setting)]
    with pytest.raises(SystemExit):
        harm("terminate:0:1", recipe, "--output-dir", tmp_path / "run", *settings)
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    history = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert not [entry for entry in history if "eval_loss" in entry]


def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(recipe, tmp_path, harm):
    with pytest.raises(SystemExit) as stopped:
        harm("nan:0:6", recipe, "--output-dir", tmp_path / "run")
    message = stopped.value.code
    row = read(tmp_path / "records")[0][6]["input_ids"][0]
    begin = AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoint-4").decode(row)[:60]
    known = f"error: step 7 was not made: the loss is nan on process 0, for the batch that begins with {begin!r}. "
    assert message.startswith(known)
    assert f"The last checkpoint is {tmp_path / 'run' / 'checkpoint-4'}; mend the data or lower" in message
    assert checkpoints(tmp_path / "run") == ["checkpoint-4"] and not (tmp_path / "run" / "final").exists()
    # Without the harm the run goes on from there.
    assert harm("none", recipe, "--output-dir", tmp_path / "run", "--resume")["steps"] == 12


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step(recipe, tmp_path, monkeypatch):
    step = RecipeTrainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = step(self, model, inputs, num_items_in_batch)
        if self.state.global_step == 5:
            next(model.parameters()).grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(RecipeTrainer, "training_step", training_step)
    with pytest.raises(
        SystemExit, match="step 6 was not made: the norm of the gradient is .* on process 0, for the batch that"
    ):
        train.main([str(recipe), "--output-dir", str(tmp_path)])
    assert checkpoints(tmp_path) == ["checkpoint-4"]


def test_weights_that_are_not_finite_are_never_saved(recipe, tmp_path, monkeypatch):
    step = RecipeTrainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step == 7:  # the step after which a checkpoint is due
            overflow = lambda *_: model.lm_head.weight.data.fill_(float("inf"))  # noqa: E731
            self.optimizer.optimizer.register_step_post_hook(overflow)
        return step(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(RecipeTrainer, "training_step", training_step)
    message = "error: a weight is not finite after step 8, which is not saved. The last checkpoint is .*checkpoint-4;"
    with pytest.raises(SystemExit, match=message):
        train.main([str(recipe), "--output-dir", str(tmp_path)])
    assert checkpoints(tmp_path) == ["checkpoint-4"]


def test_rows_with_numbers_that_are_not_finite_are_named():
    values = torch.zeros(4, 5, 2)
    values[2, 3, 1] = float("nan")
    assert describe_batch({"input_values": values}, None) == "has numbers that are not finite in rows [2] of 4"
    assert describe_batch({"input_values": torch.zeros(4, 5, 2)}, None) == "is finite"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that not even root may write to")
def test_a_folder_that_cannot_be_written_is_found_at_the_start(recipe):
    with pytest.raises(SystemExit, match="error: `--output-dir` /proc/run/here cannot be written to .*; name another"):
        train.main([str(recipe), "--output-dir", "/proc/run/here"])


def test_a_folder_below_a_file_is_found_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="`--output-dir` .*/file/run cannot be written to"):
        require_writable(tmp_path / "file" / "run")
    require_writable(tmp_path / "new" / "run")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device"),
        RuntimeError("unexpected pos 64 vs 0"),
        OSError(errno.EACCES, "Permission denied"),
    ],
    ids=lambda error: str(error),
)
def test_a_full_disk_is_told_from_other_errors(tmp_path, monkeypatch, error):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(SystemExit, match="no space left for a checkpoint in `--output-dir` .*; make room"):
        with explain_full_disk(tmp_path):
            raise error
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    with pytest.raises(SystemExit if "No space left" in str(error) else type(error)):
        with explain_full_disk(tmp_path):
            raise error


def test_a_restart_goes_on_with_its_own_run(recipe, tmp_path, harm, monkeypatch):
    with pytest.raises(SystemExit):
        harm("terminate:0:6", recipe, "--output-dir", tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.prepare_output(tmp_path / "run", resume=False) == tmp_path / "run" / "checkpoint-7"


def predicted(records, processes) -> Counter:
    """How often each id was predicted, by all processes."""
    return Counter(
        id for process in read(records, processes) for step in process.values()
        for row in step["predicted"] for id in row if id > 2
    )  # fmt: skip


def test_two_processes_stop_at_one_step_and_go_on_without_a_sample_twice_or_never(tmp_path):
    paths = write_files(tmp_path, sizes=(40, 9, 3))
    recipe = write_streamed(tmp_path, paths)
    stream = read_recipe(recipe).prepare(None, ("train",)).datasets["train"]
    steps = max(math.ceil(len(list(stream.split(rank, 2))) / 2) for rank in (0, 1))  # of one pass, two rows a batch
    arguments = [recipe, "--output-dir", tmp_path / "run"]
    for setting in (f"training.max_steps={steps}", "training.per_device_train_batch_size=2"):
        arguments += ["--set", setting]
    stopped = launch(tmp_path / "records", "terminate:1:5", *arguments)
    assert stopped.returncode != 0 and "SIGTERM: stopped after step 6" in stopped.stderr
    assert "exitcode  : 143" in stopped.stderr
    assert checkpoints(tmp_path / "run") == ["checkpoint-4", "checkpoint-6"]
    assert [max(process) for process in read(tmp_path / "records", 2)] == [5, 5]
    gone_on = launch(tmp_path / "records", "none", *arguments, "--resume")
    assert gone_on.returncode == 0, gone_on.stderr
    result = json.loads(gone_on.stdout)  # one line, from the first process only
    assert result["processes"] == 2 and result["steps"] == steps > 8
    seen = predicted(tmp_path / "records", 2)
    assert set(seen.values()) == {1} and len(seen) == len(words_of(paths))


@pytest.mark.slow
def test_two_processes_stop_together_when_the_time_is_up(recipe, tmp_path):
    settings = ["--set", "training.max_steps=100000", "--set", "budget.max_seconds=3"]
    done = launch(tmp_path / "records", "none", recipe, "--output-dir", tmp_path / "run", *settings)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 2 < result["steps"] < 100_000 and result["wall_seconds"]["training"] >= 3


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    """Two processes without harm: folder and records."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = launch(folder / "records", "none", recipe, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        [*LAUNCH, "--max_restarts", "1"],
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "1"],
    ],
    ids=["accelerate", "torchrun"],
)
def test_a_killed_process_is_started_anew_and_ends_as_if_nothing_had_been(recipe, tmp_path, uninterrupted, launcher):
    arguments = [recipe, "--output-dir", tmp_path / "run", "--resume"]
    done = launch(tmp_path / "records", "kill:1:6", *arguments, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(uninterrupted)
    assert read(tmp_path / "records", 2) == read(uninterrupted / "records", 2)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_which_names_it(recipe, tmp_path):
    killed = launch(tmp_path / "records", "kill:1:6", recipe, "--output-dir", tmp_path / "run")
    assert killed.returncode != 0
    assert "rank      : 1 (local_rank: 1)" in killed.stderr and "Signal 9 (SIGKILL)" in killed.stderr
    assert newest_complete(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"


@pytest.mark.slow
def test_a_bad_loss_of_one_process_ends_all(recipe, tmp_path):
    stopped = launch(tmp_path / "records", "nan:1:6", recipe, "--output-dir", tmp_path / "run")
    assert stopped.returncode != 0
    assert (
        stopped.stderr.count("error: step 7 was not made: the loss is nan on process 1, for the batch that begins") == 2
    )
    assert checkpoints(tmp_path / "run") == ["checkpoint-4"]
    assert [max(process) for process in read(tmp_path / "records", 2)] == [6, 6]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_the_launcher_saves_what_all_processes_have_done(tmp_path, number):
    """With workers that load the data, which get the signal too."""
    paths = write_files(tmp_path, sizes=(40, 9, 3, 20))
    recipe = write_streamed(tmp_path, paths)
    settings = ["training.max_steps=100000", "training.dataloader_num_workers=1", "training.eval_steps=100000"]
    settings = [part for setting in [*settings, "training.save_steps=100000"] for part in ("--set", setting)]
    command = [sys.executable, *LAUNCH, "-m", RUN, tmp_path / "records", "none", recipe]
    command += ["--output-dir", tmp_path / "run"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(list(map(str, [*command, *settings])), env=environment, stderr=subprocess.PIPE, text=True)
    for line in job.stderr:
        if "'percent'" in line:  # it trains
            break
    job.send_signal(number)
    error = job.communicate(timeout=120)[1]
    assert job.returncode != 0
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert (saved / COMPLETE).is_file()
    step = int(saved.name.removeprefix("checkpoint-"))
    assert error.count(f"{number.name}: stopped after step {step}") == 2
    assert len(json.loads((saved / "trainer_state.json").read_text())["log_history"]) == step
