"""
Match the number of parameters of a recipe's baselines to that of the recipe's model.

A recipe's baselines.toml names models to compare with, each by the settings that change the recipe's model into it:

    [lstm]
    set = ['model={model_type = "recurrent", kind = "lstm", num_hidden_layers = 2}']

What is found is the width, `hidden_size`, and for models with an inner width then the `intermediate_size` that comes
nearest.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from scripts.tasks.prepared import Prepared
from scripts.training.recipe import parse_file, read_recipe, recipe_folder, refuse_unknown, tomllib


TOLERANCE = 0.02
LARGEST_WIDTH = 2**14  # in steps


def read_baselines(recipe: str | Path) -> dict[str, tuple[str, ...]]:
    """
    The `--set` overrides of a recipe's baselines by name, without a width.

    Raises:
        FileNotFoundError, ValueError: there is no `baselines.toml`, or it has another form.
    """
    path = recipe_folder(recipe) / "baselines.toml"
    if not path.is_file():
        raise FileNotFoundError(f"recipe {str(recipe)!r} has no baselines.toml, which names the models to compare with")
    baselines = {}
    for name, entry in parse_file(path, tomllib.loads).items():
        overrides = entry.get("set") if isinstance(entry, dict) and set(entry) == {"set"} else None
        if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
            raise ValueError(f"[{name}] of {path} must have one key, `set`, a list of section.key=value; got {entry!r}")
        baselines[name] = tuple(overrides)
    return baselines


def count_parameters(recipe, prepared: Prepared, **values) -> int:
    """Parameters of the recipe's model on the prepared data; `values` change its config."""
    with torch.device("meta"):  # shapes without data
        return prepared.auto_class.from_config(recipe.config(**prepared.config_values, **values)).num_parameters()


def nearest_width(count: Callable[[int], int], parameters: int, step: int = 1) -> int:
    """The multiple of `step` whose `count`, an increasing function, is nearest to `parameters`."""
    widths = range(step, step * LARGEST_WIDTH, step)
    place = bisect.bisect_left(widths, parameters, key=count)
    return min(widths[max(0, place - 1) : place + 1], key=lambda width: abs(count(width) - parameters))


def match(recipe: str | Path, overrides: Sequence[str], parameters: int, prepared: Prepared) -> list[str]:
    """
    The overrides of a baseline, completed by a width that gives it `parameters`, within 2 % or half a step of width.

    Args:
        prepared: the recipe's data, on which the baseline is trained too.

    Raises:
        ValueError: no width is within the tolerance.
    """
    baseline = read_recipe(recipe, overrides)
    config = baseline.config()
    heads = getattr(config, "num_attention_heads", 1)
    step = math.lcm(heads, 2) if getattr(config, "position_embedding", None) in ("sinusoidal", "relative") else heads

    def count(width: int, **values: int) -> int:
        return count_parameters(baseline, prepared, hidden_size=width, **values)

    width = nearest_width(count, parameters, step)
    found = {"hidden_size": width}
    if hasattr(config, "intermediate_size"):
        inner = baseline.config(**found).intermediate_size
        first, second = count(width, intermediate_size=inner), count(width, intermediate_size=inner + 1)
        found["intermediate_size"] = max(1, inner + round((parameters - first) / (second - first)))
    total = count_parameters(baseline, prepared, **found)
    if abs(total - parameters) > max(TOLERANCE * parameters, (count(width + step) - count(width)) / 2):
        raise ValueError(
            f"no `hidden_size` gives the baseline {parameters} parameters within {TOLERANCE:.0%}; "
            f"the nearest, {width}, gives {total}"
        )
    return [*overrides, *(f"model.{name}={value}" for name, value in found.items())]


def baseline_overrides(recipe: str | Path, name: str, shared: Sequence[str] = (), own: Sequence[str] = ()) -> list[str]:
    """
    The `--set` overrides of a baseline that give it as many parameters as the recipe's model has.

    Args:
        shared: overrides of the recipe's model and of the baseline.
        own: further overrides of the baseline.
    """
    baselines = read_baselines(recipe)
    refuse_unknown([name], list(baselines), f"recipe {str(recipe)!r} has no baseline {{!r}}")
    own_model = read_recipe(recipe, shared)
    prepared = own_model.prepare(None, ("train",))
    return match(recipe, [*shared, *baselines[name], *own], count_parameters(own_model, prepared), prepared)
