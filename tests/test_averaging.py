"""The average of the weights: what it is, that runs are scored, saved and ended with it, and how they go on."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from modeling_rtransformer import RTransformerForCausalLM
from scripts import evaluate, train
from scripts.training.averaging import UNAVERAGED, WeightAverage, average_callbacks
from scripts.training.checkpoints import COMPLETE
from scripts.training.trainer import RecipeTrainer
from tests.conftest import tiny_config
from tests.test_trainer import pad, rows
from tests.tiny_recipe import LANGUAGE_MODELING, write_recipe, write_text


DECAY = 0.75

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder, LANGUAGE_MODELING, write_text(folder), hidden_dropout=0.1)


def run_of(recipe, folder, *settings, resume=False):
    settings = [f"averaging.decay={DECAY}", "training.save_total_limit=9", *settings]
    arguments = [part for setting in settings for part in ("--set", setting)]
    return train.main([str(recipe), "--output-dir", str(folder), *arguments, *["--resume"] * resume])


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """
    A finished run, its folder and its result. The worst checkpoint is taken for the best, so that what a run ends with
    is not what it has at the end.
    """
    folder = tmp_path_factory.mktemp("run")
    return folder, run_of(recipe, folder, "training.greater_is_better=true")


def assert_equal_weights(ours, theirs):
    ours, theirs = load_file(ours), load_file(theirs)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


def evaluations(folder):
    return json.loads((folder / "final" / "curve.json").read_text())["evaluation"]


def losses(folder):
    return [row["loss"] for row in json.loads((folder / "final" / "curve.json").read_text())["training"]]


class Recorder(TrainerCallback):
    """Copies of the weights at the beginning and after each step."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: weight.detach().clone() for name, weight in model.named_parameters()})

    on_step_end = on_train_begin


def trained(folder, callbacks, **options):
    """A trainer after four steps; its model has its embedding tied to its head, and a norm that is not trained."""
    torch.manual_seed(0)
    model = RTransformerForCausalLM(tiny_config(tie_word_embeddings=True))
    model.model.norm.weight.requires_grad_(False)
    args = TrainingArguments(
        output_dir=str(folder), max_steps=4, learning_rate=0.3, optim="sgd", lr_scheduler_type="constant", report_to=[],
        use_cpu=True, disable_tqdm=True, eval_strategy="steps", eval_steps=1, save_steps=1, **options,
    )  # fmt: skip
    data = rows(8)
    trainer = RecipeTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data[:3], data_collator=pad, callbacks=callbacks
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_average_takes_in_the_weights_once_a_step(tmp_path, accumulated):
    recorder = Recorder()
    batch = {"per_device_train_batch_size": 2 // accumulated, "gradient_accumulation_steps": accumulated}
    model = trained(tmp_path, [recorder, WeightAverage(DECAY)], **batch).model
    assert len(recorder.weights) == 5
    first, *after = recorder.weights
    for name, weight in model.named_parameters():
        expected = first[name]
        for weights in after:
            expected = DECAY * expected + (1 - DECAY) * weights[name]
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.lm_head.weight - after[-1]["model.embed_tokens.weight"]).abs().max() > 1e-3


def test_each_evaluation_and_checkpoint_has_the_average_and_training_has_not(tmp_path):
    recorder, plain = Recorder(), Recorder()
    trainer = trained(tmp_path / "averaged", [recorder, WeightAverage(DECAY)])
    other = trained(tmp_path / "plain", [plain])
    for ours, theirs in zip(recorder.weights, plain.weights, strict=True):
        assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    scores = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(scores) == 4
    for step, score in enumerate(scores, 1):
        checkpoint = tmp_path / "averaged" / f"checkpoint-{step}"
        other.model = other.model_wrapped = RTransformerForCausalLM.from_pretrained(checkpoint)
        assert other.evaluate()["eval_loss"] == pytest.approx(score, rel=1e-6)
        saved = load_file(checkpoint / UNAVERAGED)
        for name, weight in recorder.weights[step].items():
            assert torch.equal(saved.get(name, saved.get("lm_head.weight")), weight), name
    unaveraged = [entry["eval_loss"] for entry in other.state.log_history if "eval_loss" in entry][:4]
    assert all(abs(ours - theirs) > 1e-3 for ours, theirs in zip(scores, unaveraged))


def test_after_training_the_average_stays(tmp_path):
    trainer = trained(tmp_path, [WeightAverage(DECAY)])
    last = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    for _ in range(2):
        assert trainer.evaluate()["eval_loss"] == pytest.approx(last, rel=1e-6)
    trainer.save_model(tmp_path / "saved")
    assert_equal_weights(tmp_path / "saved" / "model.safetensors", tmp_path / "checkpoint-4" / "model.safetensors")
    assert not (tmp_path / "saved" / UNAVERAGED).exists()


def test_the_best_checkpoint_is_what_a_run_gives(run):
    folder, result = run
    first, *_ = evaluations(folder)
    assert result["best_step"] == first["step"] == 4
    assert result["metrics"]["validation"]["bits_per_character"] == pytest.approx(first["bits_per_character"])
    assert_equal_weights(folder / "final" / "model.safetensors", folder / "checkpoint-4" / "model.safetensors")
    assert not (folder / "final" / UNAVERAGED).exists()
    scored = evaluate.main([str(folder / "final"), "--split", "validation"])["metrics"]
    assert scored["perplexity"] == pytest.approx(result["metrics"]["validation"]["perplexity"], rel=1e-6)


def test_without_a_best_checkpoint_a_run_gives_the_last_average(recipe, run, tmp_path):
    result = run_of(recipe, tmp_path, "training.load_best_model_at_end=false")
    assert_equal_weights(tmp_path / "final" / "model.safetensors", run[0] / "checkpoint-12" / "model.safetensors")
    last = evaluations(tmp_path)[-1]
    assert result["metrics"]["validation"]["bits_per_character"] == pytest.approx(last["bits_per_character"])


@pytest.mark.parametrize("harm", [False, True], ids=["complete", "newest-is-incomplete"])
def test_a_resumed_run_is_to_the_bit_the_one_that_was_not_stopped(recipe, run, tmp_path, harm, caplog):
    for step in (4, 8):
        shutil.copytree(run[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    if harm:
        (tmp_path / "checkpoint-8" / UNAVERAGED).unlink()
        (tmp_path / "checkpoint-8" / COMPLETE).unlink()
    run_of(recipe, tmp_path, "training.greater_is_better=true", resume=True)
    assert ("checkpoint-8 is passed over" in caplog.text) == harm
    assert losses(tmp_path) == losses(run[0])
    for name in ("checkpoint-12/model.safetensors", f"checkpoint-12/{UNAVERAGED}", "final/model.safetensors"):
        assert_equal_weights(tmp_path / name, run[0] / name)


def test_a_run_goes_on_with_an_average_if_it_was_begun_with_one(recipe, run, tmp_path):
    shutil.copytree(run[0] / "checkpoint-4", tmp_path / "averaged" / "checkpoint-4")
    plain = [str(recipe), "--set", "training.max_steps=4"]
    with pytest.raises(SystemExit, match="checkpoint-4 is of a run with `averaging.decay`; resume with the recipe of"):
        train.main([*plain, "--output-dir", str(tmp_path / "averaged"), "--resume"])
    train.main([*plain, "--output-dir", str(tmp_path / "plain")])
    with pytest.raises(SystemExit, match="checkpoint-4 is of a run without `averaging.decay`; resume with the recipe"):
        run_of(recipe, tmp_path / "plain", resume=True)


@pytest.mark.parametrize(
    "variable", ["ACCELERATE_USE_FSDP=true", "ACCELERATE_USE_DEEPSPEED=true", "PARALLELISM_CONFIG_CP_SIZE=2"]
)
def test_weights_that_are_shared_out_are_not_averaged(monkeypatch, variable):
    args = SimpleNamespace(fsdp=None, deepspeed=None)
    assert len(average_callbacks(DECAY, args, checkpoint=None)) == 1
    monkeypatch.setenv(*variable.split("="))
    assert average_callbacks(None, args, checkpoint=None) == []
    with pytest.raises(ValueError, match="`averaging.decay` needs all weights in each process: .* DDP.*; leave it out"):
        average_callbacks(DECAY, args, checkpoint=None)
