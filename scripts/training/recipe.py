"""
Recipes: a folder with `config.json` (the model, as `AutoConfig` reads it) and `training.toml` (everything else).

Each section of `training.toml` is read into a frozen dataclass. pydantic checks the types and bounds that its fields
declare; nothing is converted, and an error names the key, the value and what is valid.

| section | its keys |
|---|---|
| `[task]` | `name`, one of `scripts/tasks/`, and the fields of that task's `Options` |
| `[data]` | `source`, one of `scripts/data/sources/`, and the fields of that source's `Options` |
| `[tokenizer]` | [`scripts.data.tokenization.Options`]; left out where the input is numbers |
| `[training]` | any field of `transformers.TrainingArguments` except `output_dir`, over [`TRAINING_DEFAULTS`] |
| `[schedule]` | [`Schedule`]; mostly left out: the schedule is `training.lr_scheduler_type` |
| `[averaging]` | [`Averaging`] |
| `[budget]` | [`Budget`] |
| `[report]` | [`Report`] |
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
from datasets import DatasetDict
from pydantic import Field, PositiveFloat, PositiveInt
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from modeling_rtransformer.configuration_rtransformer import nearest
from scripts.data.sources import SOURCES
from scripts.data.tokenization import Options as TokenizerOptions
from scripts.tasks import TASKS
from scripts.tasks.prepared import Prepared


try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

CONFIGURATION = Path(__file__).resolve().parents[2] / "configuration"

# Written into every saved config by Transformers, so a saved model's config.json is a recipe's config.json too.
CONFIG_EXTRAS = ("model_type", "architectures", "transformers_version", "auto_map", "dtype", "_name_or_path")

# With AdamW, which is the default: a short linear warm-up, a cosine down to zero, and the best checkpoint kept.
TRAINING_DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.02,  # below 1: a share of all steps
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "include_num_input_tokens_seen": "all",
    "dataloader_pin_memory": torch.cuda.is_available(),
}
# Fields of TrainingArguments that a recipe must not set, with what to use instead. A token would be saved and pushed.
NOT_IN_A_RECIPE = {
    "output_dir": "use --output-dir",
    "hub_token": "log in with `hf auth login` or set HF_TOKEN",
    "push_to_hub_token": "log in with `hf auth login` or set HF_TOKEN",
}
Training = dataclasses.make_dataclass(
    "Training", [(f.name, f.type, None) for f in dataclasses.fields(TrainingArguments) if f.init], frozen=True
)


@dataclasses.dataclass(frozen=True)
class Budget:
    """
    When to stop before the steps run out.

    Args:
        max_seconds: stop after this time, evaluations included; the learning rate follows the clock down. The seconds
            of an interrupted run count when it is resumed.
        total_seconds: end the whole run, start-up and scoring included, within this time. Training ends after 5/6 of it
            at the latest, and of each split as many rows, evenly spread, are scored as there is time for; the result
            says how many. It is counted anew when a run is resumed.
        clock: `wall` time, or `processor`: CPU time of this process over all threads, independent of other load.
        early_stopping_patience: stop after this many evaluations without a better score.
    """

    max_seconds: PositiveFloat | None = None
    total_seconds: PositiveFloat | None = None
    clock: Literal["wall", "processor"] = "wall"
    early_stopping_patience: PositiveInt | None = None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """
    What Transformers' learning rate schedules lack.

    Args:
        drop_every_epochs: multiply the rate by `drop_factor` after every so many epochs; never if left out.
        drop_factor: above 0 and below 1.
    """

    drop_every_epochs: PositiveInt | None = None
    drop_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1


@dataclasses.dataclass(frozen=True)
class Averaging:
    """
    Score, save and return an exponential moving average of the weights (`averaging.py`).

    Args:
        decay: the share of the average that a step keeps, above 0 and below 1; no average if left out.
    """

    decay: Annotated[float, Field(gt=0, lt=1)] | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """
    What the result contains.

    Args:
        metrics: names of `scripts/metrics/`; the first one picks the best checkpoint.
        compressors: of `gzip`, `bzip2` and `xz`, those to compare a language model's bits per character with.
    """

    metrics: list[str]
    compressors: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe. `sections` holds the settings of `training.toml` with every override, as plain values."""

    name: str
    model: Mapping[str, Any]
    sections: Mapping[str, Mapping[str, Any]]
    tokenizer: TokenizerOptions | None
    overrides: tuple[str, ...]
    task: Any
    data: Any
    training: Mapping[str, Any]
    schedule: Schedule
    averaging: Averaging
    budget: Budget
    report: Report

    def config(self, **values: Any) -> PreTrainedConfig:
        """The model's config: `config.json`, completed by what the task found in the data."""
        settings = {**self.model, **values}
        return CONFIG_MAPPING[settings.pop("model_type")](**settings)

    def load_data(self) -> DatasetDict:
        """The splits of the recipe's source."""
        return SOURCES[self.data.source].load(self.data)

    def prepare(self, tokenizer: PreTrainedTokenizerBase | None, splits: Sequence[str]) -> Prepared:
        """The recipe's task with its data; builds a tokenizer where none is given."""
        return TASKS[self.task.name].prepare(self, tokenizer, splits)

    def save(self, folder: Path) -> None:
        """Write `training.toml` into `folder`; beside a saved model's `config.json` this makes the folder a recipe."""
        lines = []
        for section, values in self.sections.items():
            lines += [f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items()), ""]
        (folder / "training.toml").write_text("\n".join(lines), encoding="utf-8")


# The sections that are the same for all tasks and sources; `Training` only checks, TrainingArguments come later.
SETTINGS = {
    "training": Training,
    "schedule": Schedule,
    "averaging": Averaging,
    "budget": Budget,
    "report": Report,
}
SECTIONS = ("task", "data", "tokenizer", *SETTINGS)


def add_overrides(
    parser: argparse.ArgumentParser,
    what: str = "a setting of training.toml, as section.key=value, or model.key=value for config.json",
) -> None:
    """The argument `--set` of the scripts that take a recipe: `overrides` for [`read_recipe`]."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=f"{what}; may be repeated"
    )


def recipe_names() -> list[str]:
    """The folders of configuration/ except accelerate/, which holds launch settings."""
    return sorted(path.name for path in CONFIGURATION.iterdir() if path.is_dir() and path.name != "accelerate")


def recipe_folder(recipe: str | Path) -> Path:
    """The folder of a recipe, given by its name or its path."""
    known = recipe_names()
    folder = CONFIGURATION / recipe if str(recipe) in known else Path(recipe)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"recipe {str(recipe)!r} is neither a folder nor a name in configuration/ ({', '.join(known)})"
            f"{nearest(str(recipe), known)}"
        )
    for name in ("config.json", "training.toml"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"recipe {str(recipe)!r} has no {name}; a recipe is config.json and training.toml")
    return folder.resolve()


def read_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """
    Read a recipe and apply `--set` overrides.

    Args:
        recipe: a folder of `configuration/` by name, or the path of any folder with the two files.
        overrides: `section.key=value` in TOML, where a bare word is a string and the section `model` is `config.json`;
            `model={model_type = "recurrent", ...}` replaces the whole of `config.json`, `averaging={}` that section.

    Raises:
        ValueError, FileNotFoundError: the recipe is no such folder, a file is missing or cannot be parsed, or a
            key or value is not valid; the message has the key, the value and the remedy.
    """
    folder = recipe_folder(recipe)
    model = parse_file(folder / "config.json", json.loads)
    described = model.get("model_type")
    sections = parse_file(folder / "training.toml", tomllib.loads)
    refuse_unknown(sections, SECTIONS, "section `[{}]` of training.toml is not known")
    for section, values in sections.items():
        if not isinstance(values, dict):
            raise ValueError(f"`{section}` of training.toml must be a section, `[{section}]`, got {values!r}")
    sections["model"] = model
    for override in overrides:
        _override(override, sections)
    for section in ("task", "data", "report"):
        if section not in sections:
            raise ValueError(f"section `[{section}]` is missing from {folder / 'training.toml'}")
    model = sections.pop("model")
    _check_model(model, described)
    for name in set(NOT_IN_A_RECIPE) & set(sections.get("training", {})):
        raise ValueError(f"`training.{name}` is not a setting of a recipe; {NOT_IN_A_RECIPE[name]}")

    kinds = {
        "task": _chosen(sections, "task", "name", TASKS).Options,
        "data": _chosen(sections, "data", "source", SOURCES).Options,
        **SETTINGS,
    }
    settings = {name: read(kind, sections.get(name, {}), f"{name}.") for name, kind in kinds.items()}
    settings["training"] = {**TRAINING_DEFAULTS, **sections.get("training", {})}
    tokenizer = read(TokenizerOptions, sections["tokenizer"], "tokenizer.") if "tokenizer" in sections else None
    result = Recipe(folder.name, model, sections, tokenizer, tuple(overrides), **settings)
    result.config()  # the config class checks its values
    _check_stream(result)
    return result


def parse_file(path: Path, loads) -> dict[str, Any]:
    """What `loads` makes of a file; the error names the file if it cannot be read."""
    try:
        return loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and TOMLDecodeError are ValueErrors
        raise ValueError(f"{path} cannot be read: {error}") from error


def read(kind: type, values: Mapping[str, Any], before: str = "", after: str = "") -> Any:
    """
    A dataclass of `kind` from a table of TOML, checked by pydantic without any conversion.

    Args:
        kind: a dataclass; its annotations may hold pydantic's bounds, such as `PositiveInt`.
        before, after: what surrounds a key in errors: `before` is part of its name, as in `budget.max_seconds`.

    Raises:
        ValueError: a key is unknown or missing, or a value is not valid, with the valid ones and the nearest key.
    """
    try:
        return _checked(kind)(**values)
    except pydantic.ValidationError as error:
        raise ValueError(_explanation(error.errors(), kind, before, after)) from None


@functools.cache
def _checked(kind: type) -> type:
    options = pydantic.ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
    return pydantic.dataclasses.dataclass(kind, frozen=True, config=options)


def _explanation(errors: list[Any], kind: type, before: str, after: str) -> str:
    """One sentence on the first error. An unknown key goes first, since a key may be missing because it is misspelt."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    error = min(errors, key=lambda error: error["type"] != "unexpected_keyword_argument")
    if not error["loc"]:
        return str(error["ctx"]["error"])  # raised by `__post_init__`, which names the key itself
    key, *inside = error["loc"]
    name = f"`{before}{key}{''.join(f'[{place}]' for place in inside if isinstance(place, int))}`{after}"
    if error["type"] == "unexpected_keyword_argument":
        return f"{name} is not a setting" + (nearest(key, fields) or f"; known are {', '.join(fields)}")
    if error["type"] == "missing":
        return f"{name} is missing, and it has no default"
    valid = " or ".join(e["msg"].removeprefix("Input should be ") for e in errors if e["loc"][0] == key)
    optional = ", or left out" if fields[key].default is None else ""
    return f"{name} must be {valid}{optional}, got {error['input']!r}"


def refuse_unknown(keys: Iterable[str], valid: Sequence[str], message: str) -> None:
    """Raise a ValueError with `message` and the nearest valid key if one of `keys` is not valid."""
    for key in keys:
        if key not in valid:
            raise ValueError(message.format(key) + (nearest(key, valid) or f"; known are {', '.join(sorted(valid))}"))


def _override(override: str, sections: dict[str, Any]) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    known = ("model", *SECTIONS)
    if not (equals and (name if dot else section in known)):
        raise ValueError(f"--set {override!r} must read section.key=value, such as training.learning_rate=1e-3")
    refuse_unknown([section], known, "--set names the section `{}`, which is not known")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word
    if dot:
        sections.setdefault(section, {})[name] = value
    elif isinstance(value, dict):
        sections[section] = value
    else:
        raise ValueError(f'--set {override!r} must be a table, such as model={{model_type = "recurrent"}}')


def _chosen(sections: dict[str, Any], section: str, key: str, valid: Mapping[str, Any]) -> Any:
    value = sections[section].get(key)
    if value not in valid:
        problem = "is missing; it" if value is None else "must be"
        hint = "" if value is None else f", got {value!r}{nearest(value, valid)}"
        raise ValueError(f"`{section}.{key}` {problem} one of {', '.join(valid)}{hint}")
    return valid[value]


def _check_model(values: Mapping[str, Any], described: str | None) -> None:
    kind = values.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"`model_type` of config.json must be a model type of Transformers, got {kind!r}")
    message = "`model.{}` is not a field of the model's config"
    if kind != described:  # what is left of config.json belongs to another type
        message += f"; config.json describes {described}, --set 'model={{{{model_type = ...}}}}' replaces all of it"
    refuse_unknown(values, [*CONFIG_MAPPING[kind].__dataclass_fields__, *CONFIG_EXTRAS], message)


def _check_stream(recipe: Recipe) -> None:
    if not getattr(recipe.data, "streaming", False):
        return
    if recipe.task.name != "language_modeling":
        raise ValueError(f"`data.streaming` is for language_modeling, not for {recipe.task.name}; leave it out")
    if recipe.task.train_once:
        raise ValueError("`task.train_once` is not for `data.streaming`; leave one of them out")
    if recipe.training.get("max_steps", -1) <= 0:
        raise ValueError(
            f"`training.max_steps` must be above 0 where `data.streaming` is set, got "
            f"{recipe.training.get('max_steps')}: how long a stream is cannot be known"
        )


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # strings, numbers and booleans are written alike in both
