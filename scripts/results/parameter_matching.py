"""
Match the number of parameters of a recipe's baselines to that of the recipe's model.

    python -m scripts.results.parameter_matching stdlib-code
    python -m scripts.results.parameter_matching digits --set model.hidden_size=32

A recipe's baselines.toml names models to compare with, each by the settings that change the recipe's model into it:

    [lstm]
    set = ['model={model_type = "recurrent", kind = "lstm", num_hidden_layers = 2}']

This program finds the width, `hidden_size`, and for models with an inner width then the `intermediate_size` that comes
nearest. The last line of stdout is one JSON object: for each name the overrides for `train --set` and the parameters.
"""

import argparse
import bisect
import contextlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from scripts.tasks.prepared import Prepared
from scripts.training.recipe import add_overrides, parse_file, read_recipe, recipe_folder, tomllib


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


def match(
    recipe: str | Path, overrides: tuple[str, ...], parameters: int, prepared: Prepared, tolerance: float = TOLERANCE
) -> tuple[tuple[str, ...], int]:
    """
    The overrides of a baseline, completed by a width that gives it `parameters`, and the parameters it has with it.

    Args:
        prepared: the recipe's data, on which the baseline is trained too.
        tolerance: the largest relative difference to `parameters`; or half a step of width, if that is more.

    Raises:
        ValueError: no width is within the tolerance.
    """
    baseline = read_recipe(recipe, overrides)
    config = baseline.config()
    heads = getattr(config, "num_attention_heads", 1)
    step = math.lcm(heads, 2) if getattr(config, "position_embedding", None) == "sinusoidal" else heads

    def count(width: int) -> int:
        return count_parameters(baseline, prepared, hidden_size=width)

    width = nearest_width(count, parameters, step)
    found = {"hidden_size": width}
    if hasattr(config, "intermediate_size"):
        inner = baseline.config(**found).intermediate_size
        first, second = (
            count_parameters(baseline, prepared, **found, intermediate_size=size) for size in (inner, inner + 1)
        )
        found["intermediate_size"] = max(1, inner + round((parameters - first) / (second - first)))
    total = count_parameters(baseline, prepared, **found)
    if abs(total - parameters) > max(tolerance * parameters, (count(width + step) - count(width)) / 2):
        raise ValueError(
            f"no `hidden_size` gives the baseline {parameters} parameters within {tolerance:.0%}; "
            f"the nearest, {width}, gives {total}"
        )
    return (*overrides, *(f"model.{name}={value}" for name, value in found.items())), total


def match_all(recipe: str | Path, overrides: tuple[str, ...] = ()) -> dict[str, dict]:
    """`overrides` and `parameters` of every baseline of a recipe and, as `recipe`, of the recipe's model."""
    own = read_recipe(recipe, overrides)
    prepared = own.prepare(None, ("train",))
    parameters = count_parameters(own, prepared)
    table = {"recipe": {"overrides": list(overrides), "parameters": parameters}}
    for name, changes in read_baselines(recipe).items():
        found, total = match(recipe, (*overrides, *changes), parameters, prepared)
        table[name] = {"overrides": list(found), "parameters": total}
    return table


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    """Match all baselines; `match_all`'s result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a folder of configuration/ by name, or the path of a recipe")
    add_overrides(parser, "a setting of the recipe and of its baselines, as for train.py")
    options = parser.parse_args(arguments)
    try:
        return match_all(options.recipe, tuple(options.overrides))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = main()
    print(json.dumps(result))
