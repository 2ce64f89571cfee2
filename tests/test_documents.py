"""The documents name commands, options, recipes, files, tests and links that exist, and programs that run."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import modeling_rtransformer
from modeling_rtransformer import RTransformerConfig, RTransformerForCausalLM
from scripts.data.tokenization import Options, build_tokenizer
from scripts.results.tables import read_tables
from scripts.training.recipe import read_recipe
from tests.tiny_recipe import write_text


ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "configuration" / "README.md"]
)
WRITTEN_BY_HAND = [name for name in DOCUMENTS if name != "docs/RESULTS.md"]
CODE = re.compile(r"^```.*?^```|^(?: {4}.*\n)+|`[^`\n]+`", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(
    r"[A-Z]+|\.\.\.|mine|runs/.*|scripts/metrics/.*"
)  # what a reader puts in, or what a run writes


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(name: str) -> list[list[str]]:
    """The words of each command in the code of a document; a comment ends it, a backslash continues it."""
    found = []
    for code in CODE.findall(read(name)):
        for line in re.split(r"[\n`]", code.replace("\\\n", " ")):
            if re.match(r" *(?:[A-Z_]+=\S+ )*(?:python|make|pytest|accelerate|torchrun) ", line):
                found.append(shlex.split(line, comments=True))
    return found


def module_of(words: list[str]) -> str | None:
    """The module of this repository that a command runs."""
    after = [word for flag, word in zip(words, words[1:]) if flag == "-m" and word.startswith("scripts.")]
    return after[0] if after else None


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_relative_link_leads_to_a_file_and_a_heading(name):
    text = re.sub(r"^```.*?^```", "", read(name), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or (name == "hub_card.md" and target in ("curve.png", "gates.png")):
            continue
        file = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        if not file.exists():
            broken.append(target)
        elif anchor and anchor not in map(
            slug, re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
        ):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("name", WRITTEN_BY_HAND)
def test_each_command_names_a_module_its_options_and_a_recipe(name):
    wrong = []
    for words in commands(name):
        module = module_of(words)
        if module is None or PLACEHOLDER.fullmatch(module.split(".")[-1]):
            continue
        file = ROOT / Path(*module.split(".")).with_suffix(".py")
        if not file.is_file() or "__main__" not in file.read_text(encoding="utf-8"):
            wrong.append(words)
            continue
        arguments = words[words.index(module) + 1 :]
        source = file.read_text(encoding="utf-8")
        options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        known = {*re.findall(r"\"(--[a-z-]+)\"", source), *({"--set"} if "add_overrides" in source else ())}
        if not options <= known:
            wrong.append(words)
        overrides = [value for flag, value in zip(arguments, arguments[1:]) if flag == "--set"]
        written_out = not any("$" in value or value == "..." for value in overrides)
        if "add_overrides" in source and arguments and written_out and not PLACEHOLDER.fullmatch(arguments[0]):
            read_recipe(arguments[0], overrides)
    assert wrong == []


@pytest.mark.parametrize("name", WRITTEN_BY_HAND)
def test_each_make_command_names_a_target_and_its_variables(name):
    makefile = read("Makefile")
    targets = set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):", makefile, re.MULTILINE))
    targets = {target for group in targets for target in group.split()}
    wrong = []
    for words in commands(name):
        if words[0] != "make":
            continue
        for word in words[1:]:
            variable, equals, value = word.partition("=")
            if not (f"$({variable})" in makefile if equals else word in targets):
                wrong.append(words)
            if variable == "ONLY" and value.split("/")[0] not in read_tables():
                wrong.append(words)
    assert wrong == []


@pytest.mark.parametrize("name", [name for name in WRITTEN_BY_HAND if name != "CHANGELOG.md"])
def test_each_file_and_test_that_is_named_exists(name):
    folders = "modeling_rtransformer|scripts|tests|configuration|docs"
    named = {
        path
        for code in CODE.findall(read(name))
        for path in re.findall(rf"(?<![\w./])(?:{folders})/[\w./-]*\w(?:\.\w+)?", code)
    }
    missing = sorted(path for path in named if not (ROOT / path).exists())
    ours = read(name).split("## Transformers' own tests")[0]
    tests = re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::([\w:]+))?`", ours)
    for file, item in tests:
        path = ROOT / "tests" / file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if not text or not all(re.search(rf"(?:def|class) {part}\b", text) for part in item.split("::") if part):
            missing.append(f"{file}::{item}")
    assert missing == []


def test_the_results_in_the_readme_are_those_of_the_report():
    rows = [row.split("|") for row in re.findall(r"^\| \*\*.*", read("README.md").split("## Results")[1], re.MULTILINE)]
    report = read("docs/RESULTS.md")
    assert rows
    for _, model, figure, _ in rows:
        model = re.match(r" \*\*.*?\*\*", model)[0].strip()
        assert f"| {model} | {figure.strip()} |" in report


def programs(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", read(name), re.MULTILINE | re.DOTALL)


def test_the_first_program_of_the_readme_learns_its_sentence(capsys):
    torch.manual_seed(0)
    exec(compile(programs("README.md")[0], "README.md", "exec"), {})
    sentence = re.search(r'b"(.*?)\. "', programs("README.md")[0])[1]
    assert capsys.readouterr().out.startswith(sentence)


def test_the_readme_fine_tunes_a_trained_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = write_text(tmp_path).rename("book.txt")
    tokenizer = build_tokenizer(Options(kind="character"), [text.read_text()])
    fields = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "pad_token_id": tokenizer.pad_token_id,
    }
    RTransformerForCausalLM(RTransformerConfig(vocab_size=len(tokenizer), **fields)).save_pretrained("runs/demo/final")
    tokenizer.save_pretrained("runs/demo/final")
    names = {}
    exec(compile(programs("README.md")[1], "README.md", "exec"), names)
    assert names["trainer"].state.global_step > 0


def test_a_forecaster_is_built_as_its_document_says():
    names = {}
    exec(compile(programs("docs/FORECASTING.md")[0], "FORECASTING.md", "exec"), names)
    assert names["forecast"].shape == (8, 24, 7)


def test_the_two_other_recurrent_transformers_are_built_as_their_document_says():
    names = {}
    exec(
        compile(programs("docs/FEEDBACK_AND_LATENT_BOTTLENECK.md")[0], "FEEDBACK_AND_LATENT_BOTTLENECK.md", "exec"),
        names,
    )
    ids = torch.randint(256, (1, 40))
    for model in (names["feedback"], names["bottleneck"]):
        assert model(ids).logits.shape == (1, 40, 256)


def test_the_layout_names_every_file_of_the_package():
    table = read("CONTRIBUTING.md").split("| file of `modeling_rtransformer/` |")[1].split("\n\n")[0]
    named = re.findall(r"`(\w+\.py)`", table)
    assert sorted(named) == sorted(path.name for path in (ROOT / "modeling_rtransformer").glob("*.py"))


def test_the_citation_has_the_version_of_the_package():
    version = modeling_rtransformer.__version__
    assert f"\nversion: {version}\n" in read("CITATION.cff") and f"version = {{{version}}}" in read("README.md")
