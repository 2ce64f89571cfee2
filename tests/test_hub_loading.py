"""A pushed model loads anywhere: without our package, every head by every Auto class, pinned, sharded, offline."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from transformers import PreTrainedTokenizerFast

import modeling_rtransformer
from modeling_rtransformer import model_classes
from scripts import push_to_hub, train
from scripts.data.tokenization import Options, build_tokenizer
from tests.conftest import tiny_config
from tests.hub_server import WRITE_TOKEN, HubServer


LOAD = """
import json, sys
import torch, transformers
options = json.loads(sys.argv[1])
if options["package"]:
    import modeling_rtransformer
else:
    try:
        import modeling_rtransformer
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("the package is there")
trust = {} if options["package"] else {"trust_remote_code": True}
found = {}
for place, auto_class, arguments in options["loads"]:
    auto_class = getattr(transformers, auto_class)
    model = auto_class.from_pretrained(place, **trust, **arguments).eval()
    ids, values = torch.arange(3, 14)[None], torch.arange(33.0).view(1, 11, 3).sin()
    output = model(**{model.main_input_name: ids if model.main_input_name == "input_ids" else values})[0]
    module = type(model).__module__
    made = auto_class.from_config(model.config, **trust)
    assert type(made) is type(model)
    key = " ".join([place, auto_class.__name__, *arguments.values()])
    found[key] = {"module": module, "output": output.flatten()[:30].tolist()}
print(json.dumps(found))
"""


def library_folders():
    return {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A fresh virtual environment with this one's libraries and without this package, even if it is installed here."""
    folder = tmp_path_factory.mktemp("venv") / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    where = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], capture_output=True, text=True
    ).stdout.strip()
    # Folders that a .pth file names are searched, but their own .pth files, which editable installs are, are not read.
    (Path(where) / "libraries.pth").write_text("\n".join(library_folders()) + "\n")
    return python


def elsewhere(python, program, *arguments, cwd, **environment):
    """What a fresh process in an empty folder, outside the checkout, prints in its last line."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "OMP_NUM_THREADS", "LANG")}
    env = {**kept, "HF_HOME": str(cwd / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITE_TOKEN, **environment}
    (cwd / "empty").mkdir(exist_ok=True)
    command = [str(python), "-c", program, *arguments]
    done = subprocess.run(command, cwd=cwd / "empty", env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def load(python, places, auto_classes, cwd, package=False, each=({},), **environment):
    """
    Module and output of each model, all loaded in one fresh process. `each` are arguments of `from_pretrained` to load
    each of them with, whose values are in the key, after the place and the Auto class.
    """
    loads = [(place, auto_class, more) for place in places for auto_class in auto_classes for more in each]
    options = {"loads": loads, "package": package}
    if package:
        environment["PYTHONPATH"] = str(Path(modeling_rtransformer.__file__).parent.parent)
    return json.loads(elsewhere(python, LOAD, json.dumps(options), cwd=cwd, **environment).splitlines()[-1])


@pytest.fixture
def pushed(hub, tmp_path):
    """Every head, pushed, and what its base gives here; of numbers, which all of them read."""
    expected = {}
    for auto_class, model_class in model_classes().items():
        config = tiny_config(is_causal=False, num_input_features=3)
        model = model_class(config).eval()
        model.save_pretrained(tmp_path / auto_class)
        push_to_hub.push(tmp_path / auto_class, f"someone/{auto_class}")
        values = torch.arange(33.0).view(1, 11, 3).sin()
        output = model(**{model.main_input_name: values})[0].flatten()[:30]
        expected[f"someone/{auto_class} {auto_class}"] = output.detach()
    return expected


def test_every_head_by_every_auto_class_with_and_without_the_package_then_offline(hub, pushed, bare_python, tmp_path):
    auto_classes = list(model_classes())
    places = [f"someone/{auto_class}" for auto_class in auto_classes]
    folders = [str(tmp_path / auto_class) for auto_class in auto_classes]
    ways = {
        "remote code": load(bare_python, places, auto_classes, tmp_path, HF_ENDPOINT=hub.url),
        "offline": load(bare_python, places + folders, auto_classes, tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1"),
        "package": load(bare_python, places, auto_classes, tmp_path, True, HF_ENDPOINT=hub.url),
    }
    for way, found in ways.items():
        assert len(found) == (98 if way == "offline" else 49)
        prefix = "modeling_rtransformer." if way == "package" else "transformers_modules."
        assert all(loaded["module"].startswith(prefix) for loaded in found.values()), way
        for place, output in pushed.items():
            torch.testing.assert_close(torch.tensor(found[place]["output"]), output, rtol=1e-5, atol=1e-6)


def test_a_pinned_revision_has_its_own_weights_and_code(hub, bare_python, tmp_path):
    outputs, commits = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        model = model_classes()["AutoModel"](tiny_config()).eval()
        model.save_pretrained(tmp_path / str(seed))
        commits.append(push_to_hub.push(tmp_path / str(seed), "someone/model")["commit"])
        outputs.append(model(torch.arange(3, 14)[None])[0].flatten()[:30].detach())
    each = [{"revision": commit, "code_revision": commit} for commit in commits] + [{"revision": "main"}]
    found = load(bare_python, ["someone/model"], ["AutoModel"], tmp_path, each=each, HF_ENDPOINT=hub.url)
    for arguments, output in zip(each, [*outputs, outputs[1]]):
        key = " ".join(["someone/model", "AutoModel", *arguments.values()])
        torch.testing.assert_close(torch.tensor(found[key]["output"]), output, rtol=1e-5, atol=1e-6)


def test_sharded_weights_and_a_model_that_was_pushed_by_itself_load(hub, bare_python, tmp_path):
    """`model.push_to_hub` carries the code too."""
    model = model_classes()["AutoModelForCausalLM"](tiny_config()).eval()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    push_to_hub.push(tmp_path / "model", "someone/sharded")
    model.push_to_hub("someone/direct")
    places, auto_classes = ["someone/sharded", "someone/direct"], ["AutoModelForCausalLM", "AutoModel"]
    found = load(bare_python, places, auto_classes, tmp_path, HF_ENDPOINT=hub.url)
    assert len(found) == 4
    ids = torch.arange(3, 14)[None]
    for place in places:
        for auto_class, ours in (("AutoModelForCausalLM", model), ("AutoModel", model.model)):
            output = ours(ids)[0].flatten()[:30]
            theirs = torch.tensor(found[f"{place} {auto_class}"]["output"])
            torch.testing.assert_close(theirs, output, rtol=1e-5, atol=1e-6)
    assert HfApi(endpoint=hub.url).model_info("someone/direct").config["model_type"] == "rtransformer"


def a_tokenizer(mask=False) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer(
        Options(kind="character"), ["The quick brown fox jumps over the lazy dog. question context with answer"]
    )
    if mask:
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
        tokenizer.split_special_tokens = False
    return tokenizer


CARDS = {
    "causal language model": ("AutoModelForCausalLM", True, {}),
    "language model without tokenizer": ("AutoModelForCausalLM", False, {}),
    "masked language model": ("AutoModelForMaskedLM", True, {"is_causal": False}),
    "text classifier": ("AutoModelForSequenceClassification", True, {"num_labels": 3}),
    "classifier of numbers": ("AutoModelForSequenceClassification", False, {"num_input_features": 2, "num_labels": 3}),
    "token classifier": ("AutoModelForTokenClassification", True, {"is_causal": False, "num_labels": 4}),
    "frame classifier": ("AutoModelForAudioFrameClassification", False, {"num_input_features": 2, "num_labels": 3}),
    "frame classifier of tokens": ("AutoModelForAudioFrameClassification", True, {"num_labels": 3}),
    "forecaster": ("AutoModelForTimeSeriesPrediction", False, {"num_input_features": 2, "prediction_length": 5}),
    "question answering": ("AutoModelForQuestionAnswering", True, {"is_causal": False}),
    "base model": ("AutoModel", True, {}),
}


def test_the_examples_of_every_card_run_as_printed(hub, bare_python, tmp_path):
    """Each card's Python blocks, one after another, in an environment without the package."""
    programs = {}
    for title, (auto_class, has_tokenizer, fields) in CARDS.items():
        name = title.replace(" ", "-")
        if has_tokenizer:
            tokenizer = a_tokenizer(mask=auto_class == "AutoModelForMaskedLM")
            tokenizer.save_pretrained(tmp_path / name)
            fields = {**fields, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        config = tiny_config(**fields)
        model_classes(type(config))[auto_class](config).save_pretrained(tmp_path / name)
        push_to_hub.push(tmp_path / name, f"someone/{name}")
        card = hub.files(f"someone/{name}")["README.md"].decode()
        programs[title] = re.findall(r"```python\n(.*?)```", card, re.S)
        assert len(programs[title]) == (3 if "pipeline(" in card else 2)
    with_pipeline = {title for title, blocks in programs.items() if len(blocks) == 3}
    assert with_pipeline == {
        "causal language model", "masked language model", "text classifier", "token classifier", "base model",
    }  # fmt: skip
    program = "import json, sys\nfor title, blocks in json.loads(sys.argv[1]).items():\n    names = {}\n"
    program += "    for block in blocks:\n        exec(block, names)\n    print('ran', title)\n"
    printed = elsewhere(bare_python, program, json.dumps(programs), cwd=tmp_path, HF_ENDPOINT=hub.url)
    assert all(f"ran {title}\n" in printed for title in CARDS)
    assert "custom code" not in printed  # a question whether to run it, which trust_remote_code=True answers
    assert "torch.Size([1, 64, 37])" in printed  # the logits of the one without a tokenizer


def test_a_pushed_metric_is_found_by_evaluate(hub, bare_python, tmp_path):
    pytest.importorskip("evaluate")
    scores = {"perplexity": {"nll": [2.0], "count": [4]}, "string_accuracy": {"right": [True, False]}}
    for name in scores:  # as the commands of docs/SHARING.md do, which test_metrics.py runs
        HfApi().create_repo(f"someone/{name}", repo_type="space", space_sdk="static")
        folder = Path(push_to_hub.__file__).parent / "metrics" / name
        HfApi().upload_folder(
            repo_id=f"someone/{name}", folder_path=folder, repo_type="space", ignore_patterns="__pycache__/*"
        )
    program = (
        "import json, sys, evaluate\n"
        "for name, given in json.loads(sys.argv[1]).items():\n"
        "    print(json.dumps(evaluate.load(f'someone/{name}').compute(**given)))\n"
    )
    printed = elsewhere(bare_python, program, json.dumps(scores), cwd=tmp_path, HF_ENDPOINT=hub.url).splitlines()
    assert json.loads(printed[-2])["perplexity"] == pytest.approx(2.0 ** (0.5 / 0.6931471805599453))
    assert json.loads(printed[-1]) == {"string_accuracy": 0.5}


@pytest.mark.slow
def test_a_trained_model_writes_code_in_a_new_environment_of_released_packages(tmp_path, monkeypatch):
    """The recipe stdlib-code for some seconds, pushed; then `pip install torch transformers`, load and generate."""
    import transformers

    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
    packages = [f"torch=={torch.__version__.split('+')[0]}", f"transformers=={transformers.__version__}"]
    for package in packages:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", package], check=True)
    with HubServer() as server:
        settings = ["budget.max_seconds=20", "task.max_eval_rows=4", "training.use_cpu=true", "data.max_files=6"]
        settings += ["tokenizer.min_frequency=1"]
        arguments = [part for setting in settings for part in ("--set", setting)]
        train.main(["stdlib-code", "--output-dir", str(tmp_path / "run"), *arguments])
        env = {**os.environ, "HF_ENDPOINT": server.url, "HF_TOKEN": WRITE_TOKEN, "HF_HUB_OFFLINE": "0"}
        script = [sys.executable, "-m", "scripts.push_to_hub", str(tmp_path / "run" / "final"), "someone/stdlib-code"]
        done = subprocess.run(script, env={**env, "HF_HUB_DISABLE_XET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        card = server.files("someone/stdlib-code")["README.md"].decode()
        blocks = re.findall(r"```python\n(.*?)```", card, re.S)
        assert len(blocks) == 3 and "bits per character" in card
        printed = elsewhere(python, "\n".join(blocks), cwd=tmp_path, HF_ENDPOINT=server.url)
    assert printed.count("def read_file(path):") == 2 and len(printed) > 150
    assert "custom code" not in printed  # a question whether to run it, which trust_remote_code=True answers
