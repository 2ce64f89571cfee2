"""Training a recipe: the result, the saved folder, stopping, resuming, and what evaluate and generate make of it."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts import evaluate, generate, train
from scripts.tasks.prepared import spread
from scripts.training import budget
from scripts.training.checkpoints import COMPLETE, newest_complete
from tests.tiny_recipe import CLASSIFICATION, LANGUAGE_MODELING, write_recipe, write_table, write_text


ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder, LANGUAGE_MODELING, write_text(folder))


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """A finished run: its folder and its result."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train.main([str(recipe), "--output-dir", str(folder), "--set", "training.seed=3"])


def script(name, *arguments, cwd, **environment):
    command = [sys.executable, "-m", f"scripts.{name}", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def curve(folder, kind="training", value="loss"):
    return [row[value] for row in json.loads((folder / "final" / "curve.json").read_text())[kind]]


def test_the_result_tells_what_was_done_where_and_how_well(run):
    folder, result = run
    assert json.loads((folder / "final" / "results.json").read_text()) == result
    assert result["recipe"] == "tiny" and result["overrides"] == ["training.seed=3"] and result["seed"] == 3
    assert result["steps"] == 12 and result["tokens_seen"] == 12 * 4 * 33
    assert set(result["metrics"]["test"]) == {"bits_per_character", "perplexity", "gzip", "bzip2", "xz"}
    assert 0 < result["metrics"]["test"]["bits_per_character"] < 6
    assert result["parameters"] == AutoModelForCausalLM.from_pretrained(folder / "final").num_parameters()
    assert set(result["versions"]) == {"python", "torch", "transformers", "modeling_rtransformer"}
    assert result["wall_seconds"]["total"] >= result["wall_seconds"]["training"] > 0
    assert result["processor_seconds"]["training"] > 0
    assert result["machine"]["processors"] >= 1
    assert str(Path.home()) not in json.dumps(result) and str(folder) not in json.dumps(result)


def test_the_loss_comes_down_and_the_curve_has_step_and_seconds(run):
    folder, result = run
    losses = curve(folder)
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    evaluations = json.loads((folder / "final" / "curve.json").read_text())["evaluation"]
    assert [row["step"] for row in evaluations] == [4, 8, 12]
    assert all(row["seconds"] > 0 for row in evaluations)
    best = min(evaluations, key=lambda row: row["bits_per_character"])
    assert result["best_step"] == best["step"]
    assert result["metrics"]["validation"]["bits_per_character"] == pytest.approx(best["bits_per_character"], rel=1e-6)


def test_the_final_folder_is_a_model_a_tokenizer_and_a_recipe_without_pickles(run):
    final = run[0] / "final"
    assert not [path.name for path in final.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert {"curve.png", "generation_config.json", "training.toml", "model.safetensors"} <= set(os.listdir(final))
    assert [path.name for path in run[0].iterdir() if path.name.startswith(".")] == []
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.use_cache
    assert model.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])


def test_evaluate_gives_the_figures_of_the_result(run):
    folder, result = run
    for split in ("validation", "test"):
        scored = evaluate.main([str(folder / "final"), "--split", split])["metrics"]
        for name, value in result["metrics"][split].items():
            assert scored[name] == pytest.approx(value, rel=1e-5)


def test_the_score_does_not_depend_on_the_batches(run):
    final = str(run[0] / "final")
    scores = [
        evaluate.main([final, "--set", f"training.per_device_eval_batch_size={size}"])["metrics"]["bits_per_character"]
        for size in (1, 3, 64)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-5)


def test_generate_writes_text_and_one_line_of_json(run, capsys):
    result = generate.main([str(run[0] / "final"), "--prompt", "line ", "--max-new-tokens", "7", "--seed", "5"])
    assert capsys.readouterr().out.startswith("line ")
    again = generate.main([str(run[0] / "final"), "--prompt", "line ", "--max-new-tokens", "7", "--seed", "5"])
    assert 0 < result["new_tokens"] <= 7 and again["completion"] == result["completion"]
    greedy = generate.main([str(run[0] / "final"), "--prompt", "Ω", "--temperature", "0", "--max-new-tokens", "3"])
    assert greedy["do_sample"] is False
    assert "not in the vocabulary" in capsys.readouterr().err


def test_a_run_that_exists_is_not_written_over(run, recipe):
    before = sorted(run[0].rglob("*"))
    with pytest.raises(
        SystemExit, match="is not empty; add --resume to go on with that run, name another, or remove it"
    ):
        train.main([str(recipe), "--output-dir", str(run[0])])
    assert sorted(run[0].rglob("*")) == before


def test_what_is_no_recipe_is_refused():
    with pytest.raises(SystemExit, match="error: recipe 'no-such-recipe' is neither a folder nor a name"):
        train.main(["no-such-recipe"])


def test_a_bad_setting_leaves_nothing_behind(recipe, tmp_path):
    with pytest.raises(SystemExit, match="error: `hidden_size` must be divisible"):
        train.main([str(recipe), "--output-dir", str(tmp_path / "run"), "--set", "model.hidden_size=21"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("harm", [False, True], ids=["whole", "newest-cut-off"])
def test_a_resumed_run_ends_as_if_it_had_not_stopped(run, recipe, tmp_path, harm, caplog):
    # The run as a kill after step 8 leaves it; and one killed while the checkpoint of step 8 was being written.
    for path in run[0].glob("checkpoint-*"):
        if path.name != "checkpoint-12":
            shutil.copytree(path, tmp_path / path.name)
    assert (tmp_path / "checkpoint-8").is_dir()
    if harm:
        shutil.copytree(tmp_path / "checkpoint-8", tmp_path / "checkpoint-9")
        (tmp_path / "checkpoint-9" / COMPLETE).unlink()
        content = (tmp_path / "checkpoint-9" / "model.safetensors").read_bytes()
        (tmp_path / "checkpoint-9" / "model.safetensors").write_bytes(content[: len(content) // 2])
    result = train.main([str(recipe), "--output-dir", str(tmp_path), "--resume", "--set", "training.seed=3"])
    assert ("checkpoint-9 is passed over" in caplog.text) == harm
    assert curve(tmp_path) == pytest.approx(curve(run[0]), rel=1e-5)
    assert result["metrics"]["test"] == pytest.approx(run[1]["metrics"]["test"], rel=1e-5)


def test_resuming_without_a_checkpoint_begins_anew(recipe, tmp_path, capsys):
    result = train.main([str(recipe), "--output-dir", str(tmp_path), "--resume", "--set", "training.max_steps=2"])
    assert result["steps"] == 2
    assert "training starts from the beginning" in capsys.readouterr().err


def test_a_full_disk_is_explained_and_the_last_whole_checkpoint_stays(recipe, tmp_path, monkeypatch):
    save, full = torch.save, shutil.disk_usage(tmp_path)._replace(free=100)

    def save_until_full(content, path, *arguments, **options):
        if "checkpoint-8" in str(path) and "optimizer" in str(path):
            Path(path).write_bytes(b"half")
            monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
            raise RuntimeError("unexpected pos 64 vs 0")
        save(content, path, *arguments, **options)

    monkeypatch.setattr(torch, "save", save_until_full)
    with pytest.raises(SystemExit, match="no space left for a checkpoint in `--output-dir` .*--resume"):
        train.main([str(recipe), "--output-dir", str(tmp_path)])
    assert not (tmp_path / "final").exists()
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-4"


@pytest.fixture
def clocks(monkeypatch):
    """Clocks of our own, so that no machine's speed decides: each advances by its number whenever it is read."""
    ticks = {"wall": 0.05, "processor": 0.05}
    for name in ticks:
        now = itertools.count()
        monkeypatch.setitem(budget.CLOCKS, name, lambda name=name, now=now: next(now) * ticks[name])
    return ticks


def test_the_time_budget_ends_training_with_an_evaluation_and_a_small_learning_rate(recipe, tmp_path, clocks):
    settings = ["budget.max_seconds=2", "training.max_steps=100000", "training.eval_steps=100000"]
    settings += ["training.save_steps=100000", "training.warmup_steps=0.1"]
    result = train.main(
        [str(recipe), "--output-dir", str(tmp_path), *[part for setting in settings for part in ("--set", setting)]]
    )
    assert 2 <= result["wall_seconds"]["training"] < 2.5
    assert result["best_step"] == result["steps"] > 10
    rates = curve(tmp_path, value="learning_rate")
    assert max(rates) > 0.009 and rates[-1] < 1e-3 and rates[0] < 5e-3


def test_the_time_before_a_resume_counts(recipe, tmp_path, clocks):
    settings = [
        "--set",
        "training.max_steps=100000",
        "--set",
        "training.eval_steps=10",
        "--set",
        "training.save_steps=10",
    ]
    arguments = [str(recipe), "--output-dir", str(tmp_path), *settings]
    first = train.main([*arguments, "--set", "budget.max_seconds=1.5"])
    second = train.main([*arguments, "--resume", "--set", "budget.max_seconds=2.5"])
    assert second["steps"] > first["steps"]
    assert 2.5 <= second["wall_seconds"]["training"] < 3


def test_a_budget_goes_by_the_clock_it_names(recipe, tmp_path, clocks):
    clocks["wall"] = 10.0
    settings = ["budget.max_seconds=1", "budget.clock=processor", "training.max_steps=100000"]
    result = train.main(
        [str(recipe), "--output-dir", str(tmp_path), *[part for setting in settings for part in ("--set", setting)]]
    )
    assert 1 <= result["processor_seconds"]["training"] < 1.5 and result["steps"] > 5
    assert result["wall_seconds"]["training"] >= 10
    assert max(curve(tmp_path, value="seconds")) < 1.5


def test_the_processors_clock_leaves_out_waiting():
    before = {name: now() for name, now in budget.CLOCKS.items()}
    time.sleep(0.3)
    passed = {name: now() - before[name] for name, now in budget.CLOCKS.items()}
    assert passed["processor"] < 0.2 and passed["wall"] >= 0.3


def test_early_stopping_stops_when_the_score_gets_no_better(recipe, tmp_path):
    settings = ["--set", "training.learning_rate=0.0", "--set", "budget.early_stopping_patience=1"]
    result = train.main([str(recipe), "--output-dir", str(tmp_path), *settings])
    assert (result["steps"], result["best_step"]) == (8, 4)


@pytest.mark.parametrize("kind", ["word", "byte_bpe"])
def test_other_tokenizers_train_and_score(recipe, tmp_path, kind):
    metrics = ["perplexity"] if kind == "word" else ["perplexity", "bits_per_character"]
    settings = [f"tokenizer.kind={kind}", "tokenizer.vocab_size=280", f"report.metrics={json.dumps(metrics)}"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    result = train.main([str(recipe), "--output-dir", str(tmp_path), *arguments])
    assert set(metrics) <= set(result["metrics"]["test"])
    with pytest.raises(SystemExit, match="bits_per_character, which this tokenizer cannot give, .* use perplexity"):
        word = ["--set", "tokenizer.kind=word", "--set", 'report.metrics=["bits_per_character"]']
        train.main([str(recipe), "--output-dir", str(tmp_path / "word"), *word])


def test_a_table_of_texts_is_classified(tmp_path):
    recipe = write_recipe(tmp_path, CLASSIFICATION, write_table(tmp_path), name="kinds")
    result = train.main([str(recipe), "--output-dir", str(tmp_path / "run")])
    assert result["metrics"]["test"]["accuracy"] > 0.9
    config = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert config["id2label"] == {"0": "apple", "1": "bread", "2": "cheese"}
    scored = evaluate.main([str(tmp_path / "run" / "final"), "--split", "validation"])["metrics"]
    assert scored == pytest.approx(result["metrics"]["validation"])
    with pytest.raises(SystemExit, match="is not a checkpoint for AutoModelForCausalLM"):
        generate.main([str(tmp_path / "run" / "final"), "--prompt", "x"])


@pytest.mark.parametrize("kind", [list, lambda rows: Dataset.from_dict({"row": list(rows)})])
@pytest.mark.parametrize(
    ("rows", "places"), [(3, [0, 4, 9]), (1, [0]), (10, range(10)), (11, range(10)), (None, range(10))]
)
def test_what_is_scored_during_training_is_spread_over_the_split(kind, rows, places):
    found = spread(kind(range(10)), rows)
    assert [row["row"] if isinstance(row, dict) else row for row in found] == list(places)
    assert spread(None, rows) is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            'report.metrics=["accuracy", "f2"]',
            "`report.metrics` of sequence_classification are of .*'f2'; did you mean `f1`",
        ),
        ('report.compressors=["gzip"]', "`report.compressors` is for language_modeling"),
        ("data.label_column=sort", "`data.label_column` is 'sort', but .*table.csv has the columns body, kind"),
        ('task.labels=["apple", "bread"]', "label 'cheese' in row .* is outside the 2 classes"),
        ("task.max_length=0", "`task.max_length` must be greater than 0, or left out, got 0"),
        ("task.max_eval_rows=0", "`task.max_eval_rows` must be greater than 0, or left out, got 0"),
    ],
)
def test_what_does_not_fit_the_table_is_named(tmp_path, setting, message):
    recipe = write_recipe(tmp_path, CLASSIFICATION, write_table(tmp_path))
    with pytest.raises(SystemExit, match=message):
        train.main([str(recipe), "--output-dir", str(tmp_path / "run"), "--set", setting])


def test_digits_train_on_continuous_input(tmp_path):
    settings = ["model.hidden_size=16", "training.max_steps=2", "training.use_cpu=true"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    result = train.main(["digits", "--output-dir", str(tmp_path), *arguments])
    assert result["tokens_seen"] == 2 * 32 * 64
    assert set(result["metrics"]["test"]) == {"accuracy", "f1"}
    assert evaluate.main([str(tmp_path / "final")])["metrics"] == pytest.approx(result["metrics"]["test"])


def test_the_scripts_run_from_anywhere_and_end_with_one_line_of_json(recipe, tmp_path):
    trained = script("train", recipe, "--set", "training.max_steps=2", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout)  # nothing else is on stdout
    assert json.loads((tmp_path / "runs" / "tiny" / "final" / "results.json").read_text()) == result
    scored = script("evaluate", "runs/tiny/final", cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    test = json.loads(scored.stdout)["metrics"]
    assert test["bits_per_character"] == pytest.approx(result["metrics"]["test"]["bits_per_character"], rel=1e-5)
    written = script("generate", "runs/tiny/final", "--prompt", "line", "--max-new-tokens", "9", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert json.loads(written.stdout.splitlines()[-1])["prompt"] == "line"
