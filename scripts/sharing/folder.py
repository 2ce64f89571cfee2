"""
Write the folder that is pushed for a model: weights, code, tokenizer, card, results and recipe, and nothing else.

Only names in `HUB_FILES` are copied. Settings with paths of the training machine are cut down to file names or left
out. Then every file is searched for this machine's paths and names and for tokens; a push that contains one is refused
with the file's name and what was found.
"""

import dataclasses
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import get_token
from transformers import AutoConfig, AutoTokenizer

from modeling_rtransformer import CONFIGS
from modeling_rtransformer.hub_files import TOKENIZER_FILES, WEIGHT_FILES
from scripts.results.plots import plot_gates
from scripts.sharing.card import gate_rows, head_of, render
from scripts.training.checkpoints import load_model
from scripts.training.recipe import Recipe, read_recipe


COPIED = ("generation_config.json", *WEIGHT_FILES, *TOKENIZER_FILES, "curve.json", "curve.png")
PRIVATE = ("hub_", "push_to_hub", "logging_dir", "run_name", "resume_from", "report_to")  # beginnings, in [training]
DATA_FILES = ("train", "validation", "test", "file")  # settings of [data] that name files
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
HOME = re.compile(r"(?:/home|/Users|[A-Za-z]:\\+Users)[/\\]+[\w.-]+")


def write_folder(checkpoint: Path, folder: Path, repo_id: str, license: str = "apache-2.0") -> list[str]:
    """
    Write the files of the model in `checkpoint` into the new or empty `folder`; their names.

    Raises:
        ValueError, OSError: not a model of this package, no safetensors, missing weights, a path or a token in a file.
    """
    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"{checkpoint} is no saved model: it has no config.json")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} must be a new or empty folder")
    config = AutoConfig.from_pretrained(checkpoint)
    if type(config) not in CONFIGS:
        known = " or ".join(repr(config_class.model_type) for config_class in CONFIGS)
        raise ValueError(f"{checkpoint} must hold a model of type {known}, got {config.model_type!r}")
    if not list(checkpoint.glob("model*.safetensors")):
        raise ValueError(f"{checkpoint} has no model.safetensors; save the model with `save_pretrained`")
    model = load_model(getattr(transformers, head_of(config).auto_class), checkpoint).eval()
    has_tokenizer = (checkpoint / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint) if has_tokenizer else None
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in COPIED):
            shutil.copyfile(path, folder / path.name)
    config.save_pretrained(folder)  # and the code, by which it has registered itself
    results, recipe = None, None
    if (checkpoint / "training.toml").is_file():
        recipe = public_recipe(read_recipe(checkpoint.resolve()))
        recipe.save(folder)
    if (checkpoint / "results.json").is_file():
        results = public_results(json.loads((checkpoint / "results.json").read_text(encoding="utf-8")))
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    gates = gate_rows(model)
    if gates:
        plot_gates(gates, folder / "gates.png")
    card = render(repo_id, model, tokenizer, results, recipe, files=os.listdir(folder), license=license)
    card.save(folder / "README.md")
    refuse_secrets(folder, checkpoint, repo_id)
    return sorted(os.listdir(folder))


def public_recipe(recipe: Recipe) -> Recipe:
    """The recipe without folders of this machine and without the settings of pushing and logging."""

    def name_of(value: str | list[str]) -> str | list[str]:
        return [name_of(item) for item in value] if isinstance(value, list) else Path(value).name

    data, training = recipe.sections["data"], recipe.sections.get("training", {})
    data = {key: name_of(value) if key in DATA_FILES else value for key, value in data.items() if key != "folder"}
    if "dataset" in data and Path(data["dataset"]).is_dir():  # else its name on the Hub
        data["dataset"] = Path(data["dataset"]).name
    training = {key: value for key, value in training.items() if not key.startswith(PRIVATE)}
    return dataclasses.replace(recipe, sections={**recipe.sections, "data": data, "training": training})


def public_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results without the overrides of the command line that name a path, or set pushing or logging."""
    private = tuple(f"training.{name}" for name in PRIVATE)
    kept = [text for text in results.get("overrides", []) if not (set("/\\") & set(text) or text.startswith(private))]
    return {**results, "overrides": kept}


def refuse_secrets(folder: Path, checkpoint: Path, repo_id: str) -> None:
    """Raise a ValueError that names the file with a path, a name or a token, but never the token itself."""
    places = {str(place) for place in (Path.home(), Path.cwd(), checkpoint.resolve(), checkpoint.resolve().parent)} - {
        "/"
    }
    names = {platform.node(), Path.home().name} - {"root", "user", "admin", "localhost", *repo_id.split("/")}
    token = get_token()
    for path in sorted(folder.iterdir()):
        text = _text(path)
        if (token and token in text) or TOKEN.search(text):
            raise ValueError(f"{path.name} has a Hub token in it; take it out, and revoke the token if it is shared")
        found = [place for place in places if re.search(re.escape(place) + r"(?![\w.-])", text)]
        found += [match[0] for match in HOME.finditer(text)]
        if path.suffix in (".json", ".toml") and path.name != "tokenizer.json":  # a vocabulary may well hold a name
            found += [name for name in names if len(name) > 3 and re.search(rf"\b{re.escape(name)}\b", text)]
        if found:
            raise ValueError(f"{path.name} names this machine or its user ({found[0]!r}); take it out before pushing")


def _text(path: Path) -> str:
    """The readable part of a file: all of it, but only the header of a safetensors file."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            return file.read(int.from_bytes(file.read(8), "little")).decode("utf-8", errors="replace")
        return file.read().decode("utf-8", errors="replace")
