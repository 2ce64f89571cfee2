"""Pushing a checkpoint: what goes up, what stays at home, and what happens when the Hub or the network fails."""

import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import load_file

import modeling_rtransformer
from modeling_rtransformer import RTransformerForCausalLM, RTransformerForSequenceClassification, model_classes
from modeling_rtransformer.hub_files import HUB_FILES, PICKLES, HubFilesCallback
from scripts import push_to_hub, train
from scripts.metrics import SHARED
from scripts.sharing.upload import PushError
from scripts.training.averaging import UNAVERAGED
from tests.conftest import tiny_config
from tests.hub_server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN
from tests.tiny_recipe import LANGUAGE_MODELING, write_recipe, write_text


PACKAGE = Path(modeling_rtransformer.__file__).parent
ROOT = PACKAGE.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The final folder of a short training on a file that lies somewhere private, with what else might lie there."""
    folder = tmp_path_factory.mktemp("secret-place")
    recipe = write_recipe(folder, LANGUAGE_MODELING, write_text(folder))
    train.main([str(recipe), "--output-dir", str(folder / "run"), "--set", f"data.train={folder / 'corpus.txt'}"])
    final = folder / "run" / "final"
    for name in ("training_args.bin", "optimizer.pt", "corpus.txt", "train.parquet", "notes.md", "events.out.tfevents"):
        (final / name).write_bytes(b"not for the Hub")
    (final / "wandb").mkdir()
    (final / "wandb" / "config.json").write_text("{}")
    return final


def run(*arguments):
    return push_to_hub.main([str(argument) for argument in arguments])


def test_everything_that_belongs_to_the_model_goes_up_in_one_commit(hub, checkpoint):
    result = run(checkpoint, "someone/tiny", "--message", "The first")
    files = hub.files("someone/tiny")
    code = {path for path in files if path.endswith(".py")}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= files.keys()
    assert {"results.json", "curve.json", "curve.png", "gates.png", "training.toml"} <= files.keys()
    assert {"modeling_rtransformer.py", "configuration_rtransformer.py", "classification.py", "block.py"} <= code
    assert all(files[name] == (PACKAGE / name).read_bytes() for name in code), "the code is not that of the package"
    assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert hub.commits("someone/tiny") == ["initial commit", "The first"]
    assert result["repo_id"] == "someone/tiny" and result["url"] == f"{hub.url}/someone/tiny"
    assert result["commit"] == hub.repos["model", "someone/tiny"].commit_at("main").oid and result["changed"]
    assert sorted(files.keys() - {".gitattributes"}) == result["files"]


def test_nothing_else_goes_up(hub, checkpoint):
    run(checkpoint, "someone/tiny")
    files = hub.files("someone/tiny")
    assert not {"corpus.txt", "train.parquet", "notes.md", "training_args.bin", "optimizer.pt"} & files.keys()
    assert not [name for name in files if "/" in name or "events" in name]
    private = [str(checkpoint.parent.parent), str(Path.home()) + "/", "secret-place", WRITE_TOKEN]
    for name, content in files.items():
        assert not [secret for secret in private if secret.encode() in content], name
    results = json.loads(files["results.json"])
    assert results["overrides"] == []  # the one of the command line is a path
    assert b'train = "corpus.txt"' in files["training.toml"]


def test_the_card_is_valid_and_tells_what_was_measured(hub, checkpoint):
    run(checkpoint, "someone/tiny")
    card = ModelCard(hub.files("someone/tiny")["README.md"].decode())
    measured = json.loads((checkpoint / "results.json").read_text())["metrics"]
    told = {(result.dataset_split, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert told == {
        (split, name): measured[split][name]
        for split in ("validation", "test")
        for name in ("bits_per_character", "perplexity")
    }
    assert card.data.pipeline_tag == "text-generation" and card.data.license == "apache-2.0"
    assert "@inproceedings{huang2023encoding" in card.text and "@article{wang2019rtransformer" in card.text
    assert "(curve.png)" in card.text and "(gates.png)" in card.text
    assert "{{" not in card.content and "{%" not in card.content


def test_a_second_push_changes_nothing_and_a_third_only_what_changed(hub, checkpoint, tmp_path):
    run(checkpoint, "someone/tiny")
    first = hub.repos["model", "someone/tiny"].commit_at("main").oid
    again = run(checkpoint, "someone/tiny")
    assert again["commit"] == first and not again["changed"]
    uploads = hub.count("PUT", "/lfs/")
    copy = tmp_path / "final"
    copy.mkdir()
    for path in checkpoint.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**config, "max_new_tokens": 9}))
    assert run(copy, "someone/tiny")["changed"]
    commit = next(body for (_, path), body in zip(hub.requests[::-1], hub.bodies[::-1]) if "/commit/" in path)
    sent = [json.loads(line)["value"].get("path") for line in commit.splitlines()[1:]]
    assert sent == ["generation_config.json"]
    assert hub.count("PUT", "/lfs/") == uploads


def test_weights_in_shards_replace_a_single_file_and_pickles_go(hub, tmp_path):
    model = RTransformerForCausalLM(tiny_config())
    model.save_pretrained(tmp_path / "one")
    run(tmp_path / "one", "someone/tiny")
    repo = hub.repos["model", "someone/tiny"]
    repo.add("main", "by hand", {**repo.commit_at("main").files, "training_args.bin": b"pickle", "notes.md": b"kept"})
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    result = run(tmp_path / "shards", "someone/tiny")
    files = hub.files("someone/tiny")
    shards = {name for name in files if name.endswith(".safetensors")}
    assert len(shards) > 1 and "model.safetensors" not in shards
    assert set(json.loads(files["model.safetensors.index.json"])["weight_map"].values()) == shards
    assert result["deleted"] == ["model.safetensors", "training_args.bin"] and files["notes.md"] == b"kept"


def test_what_was_not_measured_is_not_written(hub, tmp_path):
    RTransformerForSequenceClassification(tiny_config("rsa", num_labels=3)).save_pretrained(tmp_path / "model")
    run(tmp_path / "model", "unmeasured")
    card = ModelCard(hub.files("someone/unmeasured")["README.md"].decode())
    assert card.data.eval_results is None and "No measured results come with this checkpoint." in card.text
    assert "AutoModelForSequenceClassification" in card.text and "LABEL_0, LABEL_1, LABEL_2" in card.text


def test_a_forecaster_is_pushed_again_to_its_own_repository(hub, tmp_path):
    config = tiny_config(num_input_features=3, prediction_length=2)
    model_classes(type(config))["AutoModelForTimeSeriesPrediction"](config).save_pretrained(tmp_path / "model")
    assert run(tmp_path / "model", "someone/series")["changed"]
    assert not run(tmp_path / "model", "someone/series")["changed"]


def test_a_dry_run_sends_nothing(hub, checkpoint, tmp_path, capsys):
    result = run(checkpoint, "someone/tiny", "--dry-run", tmp_path / "look")
    assert sorted(os.listdir(tmp_path / "look")) == result["files"]
    assert hub.requests == []
    assert re.search(r"[\d,]+  model.safetensors", capsys.readouterr().err)
    with pytest.raises(SystemExit, match="must be a new or empty folder"):
        run(checkpoint, "someone/tiny", "--dry-run", tmp_path / "look")


def test_private_branch_and_pull_request(hub, checkpoint):
    run(checkpoint, "someone/tiny", "--private", "--revision", "longer")
    assert hub.repos["model", "someone/tiny"].private
    assert "README.md" not in hub.files("someone/tiny") and "README.md" in hub.files("someone/tiny", "longer")
    result = run(checkpoint, "someone/tiny", "--create-pr", "--message", "Try this")
    assert result["pull_request"] == f"{hub.url}/someone/tiny/discussions/1"
    assert hub.commits("someone/tiny", "refs/pr/1") == ["Try this"] and hub.commits("someone/tiny") == [
        "initial commit"
    ]


def test_a_name_without_an_owner_is_ones_own(hub, checkpoint):
    assert run(checkpoint, "tiny")["repo_id"] == "someone/tiny"


REFUSED = [
    ("nobody", None, "not logged in; log in with `hf auth login`, or set HF_TOKEN"),
    ("a wrong token", "hf_" + "x" * 34, "the Hub does not accept the token; log in"),
    ("a token to read", READ_TOKEN, "the token has no right to write to someone/tiny; use one with write access"),
]


@pytest.mark.parametrize(("token", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_who_may_not_push_is_told_what_to_do(hub, checkpoint, monkeypatch, token, message):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        run(checkpoint, "someone/tiny")
    assert hub.repos == {} and (token is None or token not in str(error.value))


def test_no_right_to_write_to_what_is_there(hub, checkpoint, monkeypatch):
    run(checkpoint, "someone/tiny")
    before = hub.commits("someone/tiny")
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    changed = re.escape("the token has no right to write to someone/tiny; use one with write access, or propose")
    with pytest.raises(SystemExit, match=changed):
        run(checkpoint, "someone/tiny", "--license", "mit")
    assert hub.commits("someone/tiny") == before
    assert run(checkpoint, "someone/tiny", "--license", "mit", "--create-pr")["pull_request"]


def test_a_repository_that_is_there_is_not_replaced_by_another_kind_or_shown_to_all(hub, checkpoint):
    api = HfApi()
    api.create_repo("someone/bert")
    repo = hub.repos["model", "someone/bert"]
    repo.add("main", "theirs", {"config.json": b'{"model_type": "bert"}'})
    with pytest.raises(SystemExit, match="exists and holds a model of type 'bert', which this push would replace"):
        run(checkpoint, "someone/bert")
    with pytest.raises(SystemExit, match="exists and is public; make it private in its settings"):
        run(checkpoint, "someone/bert", "--private")
    with pytest.raises(SystemExit, match="nowhere does not exist, so there is nothing to propose"):
        run(checkpoint, "someone/nowhere", "--create-pr")
    assert hub.commits("someone/bert") == ["initial commit", "theirs"]


@pytest.mark.parametrize(
    "failure",
    [
        ("PUT", "/lfs/", {"status": 503, "times": 2}),
        ("PUT", "/lfs/", {"drop": "before"}),
        ("POST", "/preupload/", {"status": 429, "headers": {"Retry_After": "1"}}),
        ("POST", "/objects/batch", {"status": 500}),
    ],
    ids=lambda failure: "-".join([failure[1].strip("/"), *map(str, failure[2].values())][:2]),
)
def test_uploads_are_tried_again_and_happen_once(hub, checkpoint, failure):
    method, path, how = failure
    hub.fail(method, path, **how)
    result = run(checkpoint, "someone/tiny", "--message", "Once")
    assert hub.commits("someone/tiny") == ["initial commit", "Once"] and result["changed"]
    assert result["commit"] == hub.repos["model", "someone/tiny"].commit_at("main").oid
    assert all(fault.times == 0 for fault in hub.faults)


NOTHING = "Nothing was pushed: someone/tiny was made and is empty"
WHOLE = "The push was made whole or not at all; push again"


@pytest.mark.parametrize(
    ("method", "path", "how", "message"),
    [
        ("PUT", "/lfs/", {"status": 503, "times": 99}, rf"the Hub answered 503 .*{WHOLE}"),
        ("POST", "/commit/", {"status": 500}, rf"the Hub answered 500 .*{WHOLE}"),
        ("POST", "/commit/", {"status": 429}, rf"the Hub takes no more requests for now \(429\).*{NOTHING}"),
        ("POST", "/commit/", {"status": 409}, rf"was changed by someone else meanwhile \(409\); look at it.*{NOTHING}"),
        ("POST", "/commit/", {"status": 401}, f"the Hub does not accept the token; log in.*{NOTHING}"),
        ("POST", "/commit/", {"drop": "before"}, rf"no connection to http://127.0.0.1:.*{WHOLE}"),
        (
            "GET",
            "/whoami",
            {"status": 429},
            r"the Hub takes no more requests .* Nothing was pushed: nothing was changed",
        ),
    ],
    ids=["upload-503", "commit-500", "commit-429", "commit-409", "commit-401", "commit-dropped", "whoami-429"],
)
def test_what_does_not_pass_leaves_nothing_half_pushed_and_says_so(hub, checkpoint, method, path, how, message):
    hub.fail(method, path, **how)
    with pytest.raises(SystemExit, match=message) as error:
        run(checkpoint, "someone/tiny")
    assert WRITE_TOKEN not in str(error.value)
    assert path == "/whoami" or hub.commits("someone/tiny") == ["initial commit"]
    hub.faults.clear()
    assert run(checkpoint, "someone/tiny")["changed"]


@pytest.mark.parametrize("path", ["/repos/create", "/commit/"])
def test_a_second_push_after_a_lost_answer_sends_what_is_missing(hub, checkpoint, path):
    hub.fail("POST", path, drop="after")
    with pytest.raises(SystemExit, match=f"no connection to http://127.0.0.1:.*{WHOLE}"):
        run(checkpoint, "someone/tiny", "--message", "Once")
    assert run(checkpoint, "someone/tiny", "--message", "Once")["changed"] == (path == "/repos/create")
    assert hub.commits("someone/tiny") == ["initial commit", "Once"]


def test_a_pull_request_is_not_made_twice(hub, checkpoint):
    run(checkpoint, "someone/tiny")
    hub.fail("POST", "/commit/", drop="after")
    with pytest.raises(SystemExit, match=r"look at .*/someone/tiny/discussions before pushing again"):
        run(checkpoint, "someone/tiny", "--create-pr", "--license", "mit")
    branches = hub.repos["model", "someone/tiny"].branches
    assert [name for name in branches if name.startswith("refs/pr/")] == ["refs/pr/1"]


def test_a_commit_of_someone_else_in_between_is_not_written_over(hub, checkpoint, monkeypatch):
    run(checkpoint, "someone/tiny")
    create_commit = HfApi.create_commit

    def theirs_first(self, *arguments, **options):
        repo = hub.repos["model", "someone/tiny"]
        repo.add("main", "theirs", repo.commit_at("main").files)
        return create_commit(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", theirs_first)
    with pytest.raises(SystemExit, match=r"changed by someone else meanwhile \(412\).*nothing was changed there"):
        run(checkpoint, "someone/tiny", "--license", "mit")
    assert hub.commits("someone/tiny")[-1] == "theirs"


def test_without_network_or_offline_the_error_says_so(hub, checkpoint, monkeypatch):
    hub.__exit__()
    with pytest.raises(SystemExit, match=r"no connection to http://127.0.0.1:\d+ \(.+\)\. The push was made whole"):
        run(checkpoint, "someone/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="HF_HUB_OFFLINE is set, so the Hub is out of reach; unset it"):
        run(checkpoint, "someone/tiny")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", json.dumps({"note": WRITE_TOKEN}), "generation_config.json has a Hub token in it"),
        ("chat_template.jinja", "{# /home/jane/chat #}", "chat_template.jinja names this machine or its user"),
        ("curve.json", json.dumps({"x": str(Path.home() / "x")}), "curve.json names this machine or its user"),
    ],
    ids=["token", "home", "this-home"],
)
def test_a_token_or_a_path_in_a_file_stops_the_push(hub, tmp_path, name, content, message):
    RTransformerForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / name).write_text(content)
    with pytest.raises(SystemExit, match=message) as error:
        run(tmp_path / "model", "someone/tiny")
    assert WRITE_TOKEN not in str(error.value) and hub.repos == {}


def test_a_token_among_the_settings_is_refused_before_it_is_written_anywhere(tmp_path):
    recipe = write_recipe(tmp_path, LANGUAGE_MODELING, write_text(tmp_path))
    with pytest.raises(SystemExit, match="`training.hub_token` is not a setting of a recipe; log in with") as error:
        train.main([str(recipe), "--output-dir", str(tmp_path / "run"), "--set", f"training.hub_token={WRITE_TOKEN}"])
    assert WRITE_TOKEN not in str(error.value) and not (tmp_path / "run").exists()


def test_what_is_no_model_of_ours_is_refused(hub, tmp_path):
    with pytest.raises(SystemExit, match="is no saved model: it has no config.json"):
        run(tmp_path, "someone/tiny")
    model = RTransformerForCausalLM(tiny_config())
    model.save_pretrained(tmp_path / "model")
    torch.save(load_file(tmp_path / "model" / "model.safetensors"), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="has no model.safetensors; save the model with"):
        run(tmp_path / "model", "someone/tiny")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SystemExit, match="must hold a model of type 'rtransformer' or .*, got 'bert'"):
        run(tmp_path / "model", "someone/tiny")
    with pytest.raises(SystemExit, match="Repo id must"):
        run(tmp_path / "model", "some one/tiny")


@pytest.fixture
def pushes_in_turn(monkeypatch):
    """Trainer pushes while it trains on; here each push ends first, so that the clock does not say what is pushed."""

    def run_now(self, function, *arguments, **options):
        future = Future()
        future.set_result(function(*arguments, **options))
        return future

    monkeypatch.setattr(HfApi, "run_as_future", run_now)


@pytest.mark.usefixtures("pushes_in_turn")
def test_training_with_push_to_hub_carries_the_code_and_no_pickle_from_the_first_push_on(hub, checkpoint, tmp_path):
    recipe = write_recipe(tmp_path, LANGUAGE_MODELING, write_text(tmp_path))
    pushing = {"push_to_hub": "true", "hub_model_id": "someone/live", "hub_always_push": "true"}
    settings = [part for key, value in pushing.items() for part in ("--set", f"training.{key}={value}")]
    train.main([str(recipe), "--output-dir", str(tmp_path / "run"), *settings])
    commits = hub.repos["model", "someone/live"].branches["main"]
    assert [commit.title for commit in commits[1:4]] == [f"Training in progress, step {step}" for step in (4, 8, 12)]
    for commit in commits[1:]:
        assert {"config.json", "model.safetensors", "modeling_rtransformer.py", "block.py"} <= commit.files.keys()
        assert commit.files["block.py"] == (PACKAGE / "block.py").read_bytes()
        assert not [name for name in commit.files if Path(name).suffix in {rule[1:] for rule in PICKLES}]
    assert {"README.md", "results.json", "curve.png"} <= commits[-1].files.keys()
    assert ".gitignore" not in commits[-1].files and b"hub_model_id" not in commits[-1].files["training.toml"]
    assert not any(WRITE_TOKEN.encode() in content for content in commits[-1].files.values())


@pytest.mark.usefixtures("pushes_in_turn")
def test_whole_checkpoints_with_their_optimizer_are_never_pushed(hub, tmp_path):
    recipe = write_recipe(tmp_path, LANGUAGE_MODELING, write_text(tmp_path))
    pushing = {"push_to_hub": "true", "hub_model_id": "someone/live", "hub_strategy": "all_checkpoints"}
    settings = [part for key, value in pushing.items() for part in ("--set", f"training.{key}={value}")]
    settings += ["--set", "averaging.decay=0.9"]
    train.main([str(recipe), "--output-dir", str(tmp_path / "run"), *settings])
    commits = hub.repos["model", "someone/live"].branches["main"]
    assert any(b"/optimizer.pt" in body for body in hub.bodies), "Trainer did not try to push a whole checkpoint"
    assert not [name for commit in commits for name in commit.files if "/" in name or name.endswith((".pt", ".pth"))]
    assert (tmp_path / "run" / "checkpoint-12" / UNAVERAGED).is_file()
    assert not [name for commit in commits for name in commit.files if UNAVERAGED in name]
    assert "which these weights are | `0.9` |" in commits[-1].files["README.md"].decode()


def test_the_callback_keeps_to_the_list(tmp_path):
    from transformers import TrainingArguments

    model = RTransformerForCausalLM(tiny_config())
    HubFilesCallback().on_push_begin(TrainingArguments(output_dir=str(tmp_path)), None, None, model=model)
    lines = (tmp_path / ".gitignore").read_text().splitlines()
    assert lines[0] == "/*" and lines[1:] == [f"!/{pattern}" for pattern in (".gitignore", *HUB_FILES)]
    assert (tmp_path / "modeling_rtransformer.py").read_bytes() == (PACKAGE / "modeling_rtransformer.py").read_bytes()


@pytest.mark.parametrize("name", SHARED)
def test_a_metric_goes_to_a_space_with_the_documented_commands(hub, name):
    commands = [line for line in (ROOT / "docs" / "SHARING.md").read_text().splitlines() if line.startswith("    hf ")]
    for command in commands[1:]:  # the first one logs in
        arguments = shlex.split(command.replace("bits_per_character", name))[1:]
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": WRITE_TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-m", "huggingface_hub.cli.hf", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    files = hub.files(f"someone/{name}", repo_type="space")
    assert files[f"{name}.py"] == (ROOT / "scripts" / "metrics" / name / f"{name}.py").read_bytes()
    assert files.keys() == {f"{name}.py", "README.md", ".gitattributes"}
    data = ModelCard(files["README.md"].decode()).data
    assert data.title == name and data.sdk == "static" and "metric" in data.tags


def test_the_library_function_raises_what_the_script_prints(hub, checkpoint):
    with pytest.raises(PushError, match="leave --revision out"):
        push_to_hub.push(checkpoint, "someone/tiny", create_pr=True, revision="x")
