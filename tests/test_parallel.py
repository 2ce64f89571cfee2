"""A run on several processes is the run on one: data parallel, sharded and tensor parallel."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_rtransformer import RTransformerConfig, RTransformerForCausalLM
from modeling_rtransformer.head_shard import HeadShard
from scripts import train
from scripts.training.checkpoints import COMPLETE
from scripts.training.launch import is_sharded_checkpoint, set_up
from scripts.training.recipe import read_recipe, recipe_names
from tests.launching import IN_FLOAT32, SETTINGS, environment, work
from tests.tiny_recipe import LANGUAGE_MODELING, write_recipe, write_text


HAS_TENSOR_PARALLEL_TRAINING = Version(transformers.__version__) >= Version("5.23")
NEEDS_NEW_TRANSFORMERS = pytest.mark.skipif(not HAS_TENSOR_PARALLEL_TRAINING, reason="Trainer learned it later")
# 39 rows: ten batches of four in steps of three, so that the last step is a shorter one, and its batch has a row less.
STEPS = [
    "training.max_steps=-1",
    "training.num_train_epochs=1",
    "training.gradient_accumulation_steps=3",
    "training.eval_steps=2",
    "training.save_steps=2",
    "training.save_total_limit=9",
    "training.adam_epsilon=1e-4",  # the keys' biases have no gradient but rounding, which Adam would blow up
    "task.eval_stride=32",
]
AVERAGED = "averaging.decay=0.5"


def with_settings(*settings):
    return [part for setting in settings for part in ("--set", setting)]


def on(processes, name, recipe, folder, *settings, launch=(), resume=False):
    """A step of a plan: the recipe under one of the launch settings, in the global batch of one process."""
    share = 1 if name == "tensor-parallel" else processes
    batch = f"training.per_device_train_batch_size={4 // share}"
    arguments = [str(recipe), "--output-dir", str(folder), *with_settings(*STEPS, batch, *settings)]
    return {
        "environment": environment(name, *IN_FLOAT32, "--num_processes", str(processes), *launch),
        "train": arguments + ["--resume"] * resume,
        "count": str(folder.with_suffix(".json")),
    }


def curve(folder):
    return [row["loss"] for row in json.loads((folder / "final" / "curve.json").read_text())["training"]]


def assert_same_run(ours: Path, theirs: Path, more_tokens: int = 0):
    assert curve(ours) == pytest.approx(curve(theirs), rel=1e-5)
    our_weights, their_weights = (load_file(folder / "final" / "model.safetensors") for folder in (ours, theirs))
    assert our_weights.keys() == their_weights.keys()
    for name, weight in their_weights.items():
        torch.testing.assert_close(
            our_weights[name], weight, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    our_result, their_result = (
        json.loads((folder / "final" / "results.json").read_text()) for folder in (ours, theirs)
    )
    for split in ("validation", "test"):
        assert our_result["metrics"][split] == pytest.approx(their_result["metrics"][split], rel=1e-5)
    for key in ("steps", "best_step", "parameters"):
        assert our_result[key] == their_result[key], key
    assert our_result["tokens_seen"] == their_result["tokens_seen"] + more_tokens


def copy_until(folder, copy, step):
    """A run as it was when it was killed after the checkpoint of `step`."""
    copy.mkdir()
    shutil.copytree(folder / f"checkpoint-{step}", copy / f"checkpoint-{step}")
    return copy


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    shape = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    kinds = ["regular", "none", "first_cyclical", "second_cyclical"]
    return write_recipe(folder, LANGUAGE_MODELING, write_text(folder, lines=53), rem_kinds=kinds, **shape)


@pytest.fixture(scope="module")
def one(recipe, tmp_path_factory):
    """The run on one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    result = train.main([str(recipe), "--output-dir", str(folder), *with_settings(*STEPS)])
    assert result["steps"] == 4 and result["tokens_seen"] == 39 * 33
    return folder


def on_streams(processes, recipe, folder):
    """A step of a plan: training with memory on four streams, and scoring on two."""
    settings = [
        f"training.per_device_train_batch_size={4 // processes}",
        f"training.per_device_eval_batch_size={2 // processes}",
    ]
    return {
        "environment": environment("ddp", *IN_FLOAT32, "--num_processes", str(processes)),
        "train": [str(recipe), "--output-dir", str(folder), *with_settings(*settings)],
        "count": str(folder.with_suffix(".json")),
    }


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """A recipe of a model with memory, recurrent states and LocalRNNs, in two accumulated rows a step."""
    folder = tmp_path_factory.mktemp("streams")
    training = LANGUAGE_MODELING.replace("window = 33\neval_stride = 20", 'rows = "streams"\nwindow = 12')
    training = training.replace("max_steps = 12", "max_steps = 6\ngradient_accumulation_steps = 2\nadam_epsilon = 1e-4")
    shape = {"num_hidden_layers": 2, "memory_length": 7, "recurrent_layers": [1], "block_length": 4}
    return write_recipe(folder, training, write_text(folder), num_state_vectors=3, **shape)


VARIANTS = {
    "fused": {"checkpointing": True},
    "eager": {"options": {"attn_implementation": "eager"}, "config": {"rem_gate": "head", "num_local_rnns": 0}},
}


@pytest.fixture(scope="module")
def two(recipe, streams, tmp_path_factory):
    """All that is run on two processes; the folder has a run of each name."""
    folder = tmp_path_factory.mktemp("two")
    plan = [
        on(2, "ddp", recipe, folder / "ddp"),
        on(2, "ddp", recipe, folder / "averaged", AVERAGED),
        on(2, "fsdp2", recipe, folder / "fsdp2", launch=("--fsdp_activation_checkpointing", "true")),
        {"environment": {}, "shard": str(folder / "shard.json"), "variants": VARIANTS},
        on_streams(2, streams, folder / "streams"),
    ]
    if HAS_TENSOR_PARALLEL_TRAINING:
        plan.append(on(2, "tensor-parallel", recipe, folder / "tensor-parallel"))
    work(plan, folder, processes=2)
    return folder


def tensor_parallel_style(model, parameter):
    """How tensor parallelism shards a parameter; empty where every process has all of it."""
    return model.tp_plan.get(re.sub(r"\.\d+\.", ".*.", parameter).rpartition(".")[0], "")


def held_by_a_process(model, name, shards):
    """Numbers of each parameter on the first process, which has the most: parts are rounded up."""
    counts = {}
    for parameter, shape in ((name, value.shape) for name, value in model.named_parameters()):
        axis = 0
        if name == "tensor-parallel":
            style = tensor_parallel_style(model, parameter)
            axis = 0 if style.startswith(("colwise", "embedding")) else 1 if style == "rowwise" else None
        whole = axis is None or axis >= len(shape)
        counts[parameter] = shape.numel() if whole else shape.numel() // shape[axis] * -(-shape[axis] // shards)
    return counts


def sent_in_a_step(model, name, shards, rows, batches, checkpointing):
    """The table of messages in docs/SCALING.md in float32, to the byte: rows of 33 positions."""
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if name == "ddp":  # without checkpointing Trainer also asks which parameters were used
        return {"all_reduce": 4 * sum(parameters.values()) + (0 if checkpointing else 4 * len(parameters))}
    config = model.config
    if name == "tensor-parallel":
        replicated = sum(count for key, count in parameters.items() if not tensor_parallel_style(model, key))
        rems = sum(count for key, count in parameters.items() if ".recurrence." in key)
        stream = batches * rows * 33 * config.hidden_size * 4
        reduced = (7 if checkpointing else 6) * config.num_hidden_layers * stream + 2 * stream
        vocabulary = shards * -(-config.vocab_size // shards)
        return {
            "all_reduce": reduced + 4 * (batches * rems + replicated),
            "all_gather": batches * rows * 33 * vocabulary * 4,
        }
    padded = {parameter: 4 * shards * count for parameter, count in held_by_a_process(model, name, shards).items()}
    everything, blocks = sum(padded.values()), sum(size for key, size in padded.items() if ".layers." in key)
    sent = {"all_gather": batches * (everything + blocks), "reduce_scatter": everything}
    return sent | ({"all_reduce": everything // shards} if name == "hsdp" else {})


def check_counts(folder, name, processes, checkpointing=False):
    """What was counted in the run is what docs/SCALING.md says, to the byte."""
    counted = json.loads(folder.with_suffix(".json").read_text())
    shards = {"ddp": 1, "hsdp": 2}.get(name, processes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "final"))
    kept = held_by_a_process(model, name, shards)
    assert counted["weights"] == 4 * sum(kept.values())
    assert counted["optimizer"] == 8 * sum(kept.values()) + 4 * sum(count > 0 for count in kept.values())
    sent = Counter({kind: 0 for kind in ("all_reduce", "all_gather", "reduce_scatter")})
    for batches, rows in ((3, 4), (3, 4), (3, 4), (1, 3)):
        rows = rows if name == "tensor-parallel" else 4 // processes  # to be exact a row less in the last one
        sent.update(sent_in_a_step(model, name, shards, rows, batches, checkpointing))
    assert {kind: counted[kind] for kind in sent} == dict(sent)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", pytest.param("tensor-parallel", marks=NEEDS_NEW_TRANSFORMERS)])
def test_measured_memory_and_traffic_match_the_documented_ones(name, two):
    check_counts(two / name, name, processes=2, checkpointing=name == "fsdp2")


@pytest.mark.parametrize("name", ["ddp", "fsdp2", pytest.param("tensor-parallel", marks=NEEDS_NEW_TRANSFORMERS)])
def test_two_processes_are_one(name, one, two):
    assert_same_run(two / name, one)


def test_two_processes_carry_the_memories_of_their_streams_as_one_does(streams, two, tmp_path):
    train.main(on_streams(1, streams, tmp_path / "one")["train"])
    assert_same_run(two / "streams", tmp_path / "one")
    for rank in range(2):
        memory = load_file(two / "streams" / "checkpoint-4" / f"memory-{rank}.safetensors")
        assert memory["length"] == 4 * 2 * 12 and memory["0.keys"].shape[0] == 2


def test_two_processes_average_the_weights_as_one_does(recipe, one, two, tmp_path):
    train.main([str(recipe), "--output-dir", str(tmp_path), *with_settings(*STEPS, AVERAGED)])
    assert_same_run(two / "averaged", tmp_path)
    averaged, plain = (load_file(folder / "final" / "model.safetensors") for folder in (tmp_path, one))
    assert max((averaged[name] - weight).abs().max() for name, weight in plain.items() if weight.numel()) > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_tensor_parallel_models_equal_whole_ones_and_replicated_parameters_stay_equal(name, two):
    check_shards(json.loads((two / "shard.json").read_text())[name])


def check_shards(found):
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-5)
    assert found["gradients"] < 1e-5 and found["weights"] < 1e-5 and found["saved"] == 0
    assert found["continued"][0] == found["continued"][1]
    assert {"model.layers.0.self_attn.recurrence.mu", "model.norm.weight"} <= set(found["replicated"])
    assert not [name for name in found["replicated"] if "q_proj" in name or "up_proj" in name]
    assert found["unequal"] == []


def test_a_sharded_checkpoint_is_merged_into_a_model(two, tmp_path):
    from accelerate.utils import merge_fsdp_weights

    checkpoint = shutil.copytree(two / "fsdp2" / "checkpoint-4", tmp_path / "checkpoint")
    merge_fsdp_weights(checkpoint / "pytorch_model_fsdp_0", checkpoint)
    merged = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    best = json.loads((two / "fsdp2" / "final" / "results.json").read_text())["best_step"]
    assert best == 4
    for name, weight in AutoModelForCausalLM.from_pretrained(two / "fsdp2" / "final").state_dict().items():
        assert torch.equal(merged[name], weight), name


def test_checkpoints_are_marked_as_complete_where_they_can_be_resumed_from(two):
    assert is_sharded_checkpoint(two / "fsdp2" / "checkpoint-4")
    for name in ("ddp", "averaged", "fsdp2"):
        assert all((folder / COMPLETE).is_file() for folder in (two / name).glob("checkpoint-*")), name
    assert not list((two / "tensor-parallel").glob(f"checkpoint-*/{COMPLETE}"))  # without the optimizer


def test_a_run_of_two_processes_goes_on_with_one(recipe, one, two, tmp_path):
    run = copy_until(two / "ddp", tmp_path / "run", step=2)
    train.main([str(recipe), "--output-dir", str(run), "--resume", *with_settings(*STEPS)])
    assert_same_run_after(2, run, one)


def assert_same_run_after(step, ours, theirs):
    assert curve(ours)[step:] == pytest.approx(curve(theirs)[step:], rel=1e-5)
    our_weights, their_weights = (load_file(folder / "final" / "model.safetensors") for folder in (ours, theirs))
    for name, weight in their_weights.items():
        torch.testing.assert_close(our_weights[name], weight, rtol=1e-5, atol=1e-5)


def test_a_sharded_run_does_not_go_on_without_sharding(recipe, two, tmp_path):
    run = copy_until(two / "fsdp2", tmp_path / "run", step=2)
    with pytest.raises(SystemExit, match="is of a run with FSDP; resume with the launch settings of that run"):
        train.main([str(recipe), "--output-dir", str(run), "--resume", *with_settings(*STEPS)])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"TP_SIZE": "2", "DP_SHARD_SIZE": "2"},
            "`PARALLELISM_CONFIG_TP_SIZE` must be 1 with FSDP or data parallelism",
        ),
        ({"TP_SIZE": "2"}, "`PARALLELISM_CONFIG_TP_SIZE` must be the number of processes \\(1\\), got 2"),
    ],
)
def test_what_cannot_be_had_together_is_refused(recipe, tmp_path, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}", value)
    with pytest.raises(SystemExit, match=message):
        train.main([str(recipe), "--output-dir", str(tmp_path / "run")])


@NEEDS_NEW_TRANSFORMERS
def test_a_tensor_parallel_run_is_not_resumed(monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    with pytest.raises(ValueError, match="--resume is not for tensor parallelism"):
        set_up(SimpleNamespace(world_size=2, fsdp=None), resume=True, checkpoint=None)


def test_heads_that_processes_cannot_share_evenly_are_refused():
    config = RTransformerConfig(**{"hidden_size": 24, "num_attention_heads": 3})
    config.distributed_config = transformers.distributed.DistributedConfig(tp_size=2)
    with pytest.raises(ValueError, match="`num_attention_heads` must be divisible by `tp_size` \\(2\\).*got 3"):
        RTransformerForCausalLM(config)
    with pytest.raises(ValueError, match="`v_proj` gives 2 of 4 heads"):
        HeadShard.of(torch.zeros(2, 2), heads=2, all_heads=4)


@pytest.mark.parametrize("path", sorted(SETTINGS.iterdir()), ids=lambda path: path.stem)
def test_accelerate_takes_every_file_of_launch_settings(path):
    found = environment(path.stem, *(("--main_process_ip", "127.0.0.1") if path.stem == "hsdp" else ()))
    assert found["ACCELERATE_MIXED_PRECISION"] == ("no" if path.stem == "cpu" else "bf16")
    assert (found.get("ACCELERATE_USE_FSDP") == "true") == (path.stem in ("fsdp2", "hsdp"))
    assert (found.get("ACCELERATE_USE_CPU") == "True") == (path.stem == "cpu")
    if path.stem in ("fsdp2", "hsdp"):
        assert found["FSDP_VERSION"] == "2" and found["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
    assert found.get("PARALLELISM_CONFIG_TP_SIZE", "1") == ("2" if path.stem == "tensor-parallel" else "1")
    assert found.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", "1") == ("8" if path.stem == "hsdp" else "1")


def test_the_folder_of_launch_settings_is_no_recipe():
    assert "accelerate" not in recipe_names()
    with pytest.raises(FileNotFoundError, match="recipe 'accelerate' is neither a folder nor a name"):
        read_recipe("accelerate")


@pytest.mark.slow
def test_compiled_processes_are_one(recipe, one, tmp_path):
    names = ["ddp", "fsdp2", *(["tensor-parallel"] if HAS_TENSOR_PARALLEL_TRAINING else [])]
    plan = [on(2, name, recipe, tmp_path / name, "training.torch_compile=true") for name in names]
    work(plan, tmp_path, processes=2)
    for name in names:
        assert_same_run(tmp_path / name, one)


@pytest.mark.slow
def test_four_processes_are_one(recipe, one, two, tmp_path):
    """HSDP over 2 x 2, a sharded run of two that goes on with four, data parallel, and tensor parallel models."""
    halves = ("--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", "2")
    copy_until(two / "fsdp2", tmp_path / "fsdp2", step=2)
    hsdp = ("--num_machines", "1", *halves)
    plan = [
        on(4, "ddp", recipe, tmp_path / "ddp"),
        on(4, "hsdp", recipe, tmp_path / "hsdp", launch=hsdp),
        on(4, "fsdp2", recipe, tmp_path / "fsdp2", resume=True),
        {"environment": {}, "shard": str(tmp_path / "shard.json"), "variants": VARIANTS},
    ]
    if HAS_TENSOR_PARALLEL_TRAINING:
        tensor_parallel = ("--parallelism_config_tp_size", "4")
        again = "training.gradient_checkpointing=true"
        plan.append(on(4, "tensor-parallel", recipe, tmp_path / "tensor-parallel", again, launch=tensor_parallel))
    work(plan, tmp_path, processes=4)
    for name in ("ddp", "hsdp", *(["tensor-parallel"] if HAS_TENSOR_PARALLEL_TRAINING else [])):
        # Of the last three rows the fourth process has none, so it reads one of which it learns nothing.
        assert_same_run(tmp_path / name, one, more_tokens=0 if name == "tensor-parallel" else 33)
        check_counts(tmp_path / name, name, processes=4, checkpointing=name == "tensor-parallel")
    assert_same_run_after(2, tmp_path / "fsdp2", one)
    for found in json.loads((tmp_path / "shard.json").read_text()).values():
        check_shards(found)
