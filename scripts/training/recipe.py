"""
Recipes: a folder with `config.json` (the model, as `AutoConfig` reads it) and `training.toml` (everything else).

A recipe is read into frozen dataclasses that refuse what they do not know, naming the key and the nearest valid one.
`training.toml` has these sections:

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
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import torch
from datasets import DatasetDict
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
SECTIONS = ("task", "data", "tokenizer", "training", "schedule", "averaging", "budget", "report")

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


@dataclasses.dataclass(frozen=True)
class Budget:
    """
    When to stop before the steps run out.

    Args:
        max_seconds: stop after this time, evaluations included; the learning rate comes down with the clock. The time
            of an interrupted run counts on when it is resumed.
        clock: whether these are seconds on the `wall` or of the `processor`, all threads of the process together, of
            which a machine that does other work as well takes nothing away.
        total_seconds: end the whole run, start-up and scoring included, in this time: training ends after 5/6 of it at
            the latest, and as many rows of a split are scored, evenly spread, as there is time for; the result says
            how many.
        early_stopping_patience: stop after this many evaluations without a better score.
    """

    max_seconds: float | None = None
    total_seconds: float | None = None
    clock: Literal["wall", "processor"] = "wall"
    early_stopping_patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_seconds", "total_seconds", "early_stopping_patience"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`budget.{name}` must be above 0, or left out for no limit, got {value}")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """
    What Transformers' learning rate schedules lack.

    Args:
        drop_every_epochs: multiply the rate by `drop_factor` after each so many epochs; never if left out.
        drop_factor: above 0 and below 1.
    """

    drop_every_epochs: int | None = None
    drop_factor: float = 0.1

    def __post_init__(self) -> None:
        if self.drop_every_epochs is not None and self.drop_every_epochs < 1:
            raise ValueError(f"`schedule.drop_every_epochs` must be at least 1, got {self.drop_every_epochs}")
        if not 0 < self.drop_factor < 1:
            raise ValueError(f"`schedule.drop_factor` must be above 0 and below 1, got {self.drop_factor}")


@dataclasses.dataclass(frozen=True)
class Averaging:
    """
    What is scored and kept: an exponential moving average of the weights (`averaging.py`) in place of the last.

    Args:
        decay: the share of the average that a step leaves, above 0 and below 1; no average if left out.
    """

    decay: float | None = None

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 < self.decay < 1:
            raise ValueError(
                f"`averaging.decay` must be above 0 and below 1, or left out for no average, got {self.decay}"
            )


@dataclasses.dataclass(frozen=True)
class Report:
    """
    What the result tells.

    Args:
        metrics: names of `scripts/metrics/`; the first one picks the best checkpoint.
        compressors: of `gzip`, `bzip2` and `xz`, those to compare a language model's bits per character with.
    """

    metrics: list[str]
    compressors: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One recipe, checked. `sections` holds the settings of `training.toml` with every override, as plain values."""

    name: str
    model: Mapping[str, Any]
    task: Any
    data: Any
    tokenizer: TokenizerOptions | None
    training: Mapping[str, Any]
    schedule: Schedule
    averaging: Averaging
    budget: Budget
    report: Report
    sections: Mapping[str, Mapping[str, Any]]
    overrides: tuple[str, ...] = ()

    def config(self, **values: Any) -> PreTrainedConfig:
        """The model's config: `config.json`, completed by what the task found in the data."""
        settings = {**self.model, **values}
        return CONFIG_MAPPING[settings.pop("model_type")](**settings)

    def load_data(self) -> DatasetDict:
        """The splits of the recipe's source."""
        return SOURCES[self.data.source].load(self.data)

    def prepare(self, tokenizer: PreTrainedTokenizerBase | None, splits: Sequence[str]) -> Prepared:
        """The recipe's task with its data; the tokenizer is made where none is given."""
        return TASKS[self.task.name].prepare(self, tokenizer, splits)

    def save(self, folder: Path) -> None:
        """Write `training.toml` into `folder`; beside a saved model's `config.json` this makes the folder a recipe."""
        lines = []
        for section, values in self.sections.items():
            lines += [f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items()), ""]
        (folder / "training.toml").write_text("\n".join(lines), encoding="utf-8")


def add_overrides(
    parser: argparse.ArgumentParser,
    what: str = "a setting of training.toml, as section.key=value, or model.key=value for config.json",
) -> None:
    """The argument `--set` of the scripts that take a recipe: `overrides` for [`read_recipe`]."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=f"{what}; may be repeated"
    )


def read_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """
    Read a recipe and apply `--set` overrides.

    Args:
        recipe: a folder of `configuration/` by name, or the path of any folder with the two files.
        overrides: `section.key=value` in TOML, where a bare word is a string and the section `model` is `config.json`;
            `model={model_type = "recurrent", ...}` replaces the whole of `config.json`, `averaging={}` that section.

    Raises:
        ValueError, FileNotFoundError: the recipe is no such folder, a file is missing or cannot be parsed, or a
            key or value is not valid; with the key, the value and the remedy.
    """
    folder = recipe_folder(recipe)
    model = parse_file(folder / "config.json", json.loads)
    described = model.get("model_type")
    sections = parse_file(folder / "training.toml", tomllib.loads)
    for override in overrides:
        _override(override, model, sections)
    _refuse_unknown(sections, SECTIONS, "section `[{}]` of training.toml is not known")
    for section in ("task", "data", "report"):
        if section not in sections:
            raise ValueError(f"section `[{section}]` is missing from {folder / 'training.toml'}")
    _check_model(model, described)
    tokenizer = sections.get("tokenizer")
    recipe = Recipe(
        name=folder.name,
        model=model,
        task=_read(_chosen(sections, "task", "name", TASKS).Options, sections["task"], "task"),
        data=_read(_chosen(sections, "data", "source", SOURCES).Options, sections["data"], "data"),
        tokenizer=None if tokenizer is None else _read(TokenizerOptions, tokenizer, "tokenizer"),
        training={**TRAINING_DEFAULTS, **_check_training(sections.get("training", {}))},
        schedule=_read(Schedule, sections.get("schedule", {}), "schedule"),
        averaging=_read(Averaging, sections.get("averaging", {}), "averaging"),
        budget=_read(Budget, sections.get("budget", {}), "budget"),
        report=_read(Report, sections["report"], "report"),
        sections=sections,
        overrides=tuple(overrides),
    )
    recipe.config()  # the config class checks its values
    _check_stream(recipe)
    return recipe


def recipe_names() -> list[str]:
    """The folders of configuration/; accelerate/ has settings for launching any of them."""
    return sorted(path.name for path in CONFIGURATION.iterdir() if path.is_dir() and path.name != "accelerate")


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


def recipe_folder(recipe: str | Path) -> Path:
    """The folder of a recipe, given by its name or its path."""
    known = recipe_names()
    folder = CONFIGURATION / recipe if str(Path(recipe)) in known else Path(recipe)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"recipe {str(recipe)!r} is neither a folder nor a name in configuration/ ({', '.join(known)})"
            f"{nearest(str(recipe), known)}"
        )
    for name in ("config.json", "training.toml"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"recipe {str(recipe)!r} has no {name}; a recipe is config.json and training.toml")
    return folder.resolve()


def parse_file(path: Path, loads) -> dict[str, Any]:
    """What `loads` makes of a file, whose name is in the error if it cannot be read."""
    try:
        return loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and TOMLDecodeError are ValueErrors
        raise ValueError(f"{path} cannot be read: {error}") from error


def _override(override: str, model: dict[str, Any], sections: dict[str, Any]) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and (name if dot else section in ("model", *SECTIONS))):
        raise ValueError(f"--set {override!r} must read section.key=value, such as training.learning_rate=1e-3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word
    if not dot:
        if not isinstance(value, dict):
            raise ValueError(f'--set {override!r} must be a table, such as model={{model_type = "recurrent"}}')
        if section == "model":
            model.clear()
            model.update(value)
        else:
            sections[section] = value
    elif section == "model":
        model[name] = value
    else:
        _refuse_unknown([section], ("model", *SECTIONS), "--set names the section `{}`, which is not known")
        sections.setdefault(section, {})[name] = value


def _chosen(sections: dict[str, Any], section: str, key: str, valid: Mapping[str, Any]) -> Any:
    if key not in sections[section]:
        raise ValueError(f"`{section}.{key}` is missing; it is one of {', '.join(valid)}")
    value = sections[section][key]
    if value not in valid:
        raise ValueError(f"`{section}.{key}` must be one of {', '.join(valid)}, got {value!r}{nearest(value, valid)}")
    return valid[value]


def _refuse_unknown(keys, valid: Sequence[str], message: str) -> None:
    for key in keys:
        if key not in valid:
            raise ValueError(message.format(key) + (nearest(key, valid) or f"; known are {', '.join(sorted(valid))}"))


def _read(options: type, values: Mapping[str, Any], section: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(options)}
    _refuse_unknown(values, list(fields), f"`{section}.{{}}` is not a setting")
    _check_types(fields, values, section)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"`{section}.{name}` is missing from training.toml; it is needed by this {section}")
    return options(**values)


def _check_training(values: Mapping[str, Any]) -> Mapping[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    if "output_dir" in values:
        raise ValueError("`training.output_dir` is not a setting of a recipe; use --output-dir")
    for name in ("hub_token", "push_to_hub_token"):
        if name in values:  # it would be written into training.toml and results.json
            raise ValueError(
                f"`training.{name}` is not a setting of a recipe; log in with `hf auth login` or set HF_TOKEN"
            )
    _refuse_unknown(values, list(fields), "`training.{}` is not a field of TrainingArguments")
    _check_types(fields, values, "training")
    return values


def _check_model(values: Mapping[str, Any], described: str | None) -> None:
    if values.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"`model_type` of config.json must be a model type of Transformers, got {values.get('model_type')!r}"
        )
    fields = CONFIG_MAPPING[values["model_type"]].__dataclass_fields__
    message = "`model.{}` is not a field of the model's config"
    if values["model_type"] != described:  # what is left of config.json belongs to another type
        message += f"; config.json describes {described}, --set 'model={{{{model_type = ...}}}}' replaces all of it"
    _refuse_unknown(values, [*fields, *CONFIG_EXTRAS], message)


def _check_types(fields: Mapping[str, dataclasses.Field], values: Mapping[str, Any], section: str) -> None:
    for name, value in values.items():
        if not _accepts(value, fields[name].type):
            expected = fields[name].type
            expected = getattr(expected, "__name__", str(expected)) if isinstance(expected, type) else str(expected)
            raise ValueError(f"`{section}.{name}` must be of type {expected.replace('typing.', '')}, got {value!r}")


def _accepts(value: Any, annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return any(_accepts(value, choice) for choice in get_args(annotation))
    if origin is Literal:
        return value in get_args(annotation)
    if origin is list:
        return isinstance(value, list) and all(_accepts(item, get_args(annotation)[0]) for item in value)
    if annotation in (int, float):
        return isinstance(value, (int, annotation)) and not isinstance(value, bool)
    if annotation in (str, bool, dict, list, type(None)):
        return isinstance(value, annotation)
    return True  # an enumeration or class of Transformers, which checks it itself


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # strings, numbers and booleans are written alike in both
