"""
Predict with a trained model: the class or the number of each text of a table, or the next steps of a time series.

    python -m scripts.predict runs/mine/final letters.csv
    python -m scripts.predict runs/ett/final ETTh1.csv --output next_day.csv

CHECKPOINT is the final/ of a run. FILE is read like the recipe's data, with the same columns and settings; a table of
texts needs no labels. The result is a CSV file: of each text its class and the class's probability, its classes, or its
number; of a series the `prediction_length` steps after its end, in the units and with the times of the table. The last
line of stdout is one JSON object.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTimeSeriesPrediction, AutoTokenizer

from modeling_rtransformer.configuration_rtransformer import nearest
from scripts.data.sources.files import examples
from scripts.data.sources.reader import ReaderOptions, find_files, say
from scripts.data.sources.time_series import frequency_of, read_series
from scripts.tasks.sequence_classification import REGRESSION, SEVERAL
from scripts.training.checkpoints import load_model, saved_model
from scripts.training.recipe import Recipe, add_overrides, read_recipe


BATCH = 32


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the folder of a saved model with its training.toml")
    parser.add_argument("file", help="a table of texts, a text, or a time series")
    parser.add_argument("--output", type=Path, default=Path("predictions.csv"), help="the CSV file that is written")
    add_overrides(parser, "a setting of training.toml, as section.key=value")
    return parser.parse_args(arguments)


def predict_texts(recipe: Recipe, checkpoint: Path, file: str) -> pd.DataFrame:
    """A row for each text, with what the model says of it."""
    data = recipe.data
    options = data.reading() if isinstance(data, ReaderOptions) else ReaderOptions()
    texts = [row["text"] for row in examples(find_files(file, "FILE", options), {data.text_column: "text"}, options)]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = load_model(AutoModelForSequenceClassification, checkpoint).eval()
    length = recipe.task.max_length
    encoded = tokenizer(texts, truncation=length is not None, max_length=length, verbose=False)["input_ids"]
    empty = [str(row) for row, ids in enumerate(encoded) if not ids]
    if empty:
        raise ValueError(f"{len(empty)} texts of {file} have no token, first in rows {', '.join(empty[:9])}; fill them")
    logits = torch.cat(list(_logits(model, tokenizer, encoded)))
    names = np.array([model.config.id2label[index] for index in range(model.config.num_labels)])
    table = pd.DataFrame({data.text_column: texts})
    if model.config.problem_type == REGRESSION:
        return table.assign(**{names[0]: logits[:, 0].numpy()})
    if model.config.problem_type == SEVERAL:
        return table.assign(
            labels=[(recipe.task.label_delimiter or "|").join(names[row > 0]) for row in logits.numpy()]
        )
    best = logits.softmax(dim=-1).max(dim=-1)
    return table.assign(label=names[best.indices.numpy()], probability=best.values.numpy())


@torch.no_grad()
def _logits(model, tokenizer, encoded: list[list[int]]) -> Iterator[torch.Tensor]:
    for start in range(0, len(encoded), BATCH):
        batch = tokenizer.pad({"input_ids": encoded[start : start + BATCH]}, return_tensors="pt")
        yield model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def predict_series(recipe: Recipe, checkpoint: Path, file: str) -> pd.DataFrame:
    """The steps after the end of a table, in its units; the index has their times, if the table has times."""
    series = read_series(dataclasses.replace(recipe.data, dataset="table", file=file))
    model = load_model(AutoModelForTimeSeriesPrediction, checkpoint).eval()
    names, past = model.config.channel_names, recipe.task.context_length
    if names is None:
        raise ValueError(f"{checkpoint} has no `channel_means` in its config.json; train it again with this version")
    for name in names:
        if name not in series.columns:
            raise ValueError(
                f"{file} has no channel {name!r}{nearest(name, series.columns)}; it needs {', '.join(names)}"
            )
    if len(series) < past:
        raise ValueError(f"{file} must have at least `task.context_length` = {past} rows, got {len(series)}")
    means, deviations = np.array(model.config.channel_means), np.array(model.config.channel_deviations)
    values = (series[names].to_numpy()[-past:] - means) / deviations
    with torch.no_grad():
        steps = model(past_values=torch.from_numpy(values).float()[None]).prediction_outputs[0].double().numpy()
    return pd.DataFrame(steps * deviations + means, columns=names, index=times_after(series.index, len(steps)))


def times_after(times: pd.Index, steps: int) -> pd.Index:
    """The times of the steps after the last one; numbers from 1 for a table without times."""
    if pd.api.types.is_string_dtype(times):
        return pd.RangeIndex(1, steps + 1, name="step")
    frequency = frequency_of(times)
    if frequency is not None:
        return pd.date_range(times[-1], periods=steps + 1, freq=frequency, name=times.name)[1:]
    differences = pd.Series(times).diff().dropna()
    if differences.nunique() > 1:
        say(f"the times are uneven: the forecast goes on in their median step, {differences.median()}")
    return pd.Index([times[-1] + number * differences.median() for number in range(1, steps + 1)], name=times.name)


PREDICT = {"sequence_classification": predict_texts, "forecasting": predict_series}


def main(arguments: list[str] | None = None) -> dict:
    """Predict and write the table; what was written."""
    options = parse_arguments(arguments)
    options.checkpoint = saved_model(options.checkpoint)
    try:
        recipe = read_recipe(options.checkpoint.resolve(), options.overrides)
        if recipe.task.name not in PREDICT:
            raise ValueError(f"`task.name` must be one of {', '.join(PREDICT)} to predict, got {recipe.task.name!r}")
        table = PREDICT[recipe.task.name](recipe, options.checkpoint, options.file)
        table.to_csv(options.output, index=recipe.task.name == "forecasting")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    return {"output": str(options.output), "rows": len(table), "columns": list(table.columns)}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = main()
    print(json.dumps(result))
