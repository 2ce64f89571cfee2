"""Forecasting: tables and their split by months, the metrics, the linear baselines, and recipes from file to score."""

import gzip
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import EvalPrediction

from scripts import evaluate, train
from scripts.baselines import LinearForecaster, LinearForecasterConfig
from scripts.data.sources import time_series
from scripts.tasks.forecasting import Forecasts, Options, forecast_metrics, row_errors, standardised
from scripts.training.recipe import read_recipe
from tests.tiny_recipe import write_recipe


REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "ett"
TRAINING = """
[task]
name = "forecasting"
prediction_length = 3
context_length = 12

[data]
source = "time_series"
dataset = "table"
file = {train}

[training]
max_steps = 40
per_device_train_batch_size = 8
learning_rate = 1e-2
logging_steps = 1
eval_steps = 20
save_steps = 20
use_cpu = true
disable_tqdm = true

[report]
metrics = ["mse", "mae"]
"""
FORECASTER = {
    "model_type": "rtransformer_forecaster",
    "num_input_features": 1,
    "channel_independent": True,
    "instance_norm": "reversible",
}


def waves(steps):
    """A table of two waves and the hour, as the public files have them."""
    hours = np.arange(steps)
    return pd.DataFrame(
        {
            "date": pd.date_range("2016-07-01", periods=steps, freq="h"),
            "a": 5 + np.sin(hours / 3),
            "b": 100 * np.cos(hours / 5) - 300,
        }
    )


def write_waves(folder, steps=300, **columns):
    waves(steps).assign(**columns).to_csv(folder / "waves.csv", index=False)
    return folder / "waves.csv"


def load(file, dataset="table", **settings):
    return time_series.load(time_series.Options("time_series", dataset=dataset, file=str(file), **settings))


@pytest.mark.parametrize(("dataset", "hour"), [("ETTh1", 1), ("ETTm1", 4)])
def test_ett_is_split_by_months(tmp_path, dataset, hour):
    month = 30 * 24 * hour
    pd.DataFrame({"date": "x", "OT": np.arange(20 * month + 7)}).to_csv(tmp_path / "ett.csv.gz", index=False)
    splits = load(tmp_path / "ett.csv.gz", dataset)
    spans = {split: (rows["OT"][0], rows["OT"][-1] + 1) for split, rows in splits.items()}
    assert spans == {"train": (0, 12 * month), "validation": (12 * month, 16 * month), "test": (16 * month, 20 * month)}


def test_other_tables_are_split_70_10_20_and_keep_the_columns_asked_for(tmp_path):
    splits = load(write_waves(tmp_path, 305))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 213, "validation": 31, "test": 61}
    assert splits["train"].column_names == ["a", "b"]
    assert load(tmp_path / "waves.csv", columns=["b"])["test"].column_names == ["b"]


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"c": "warm"}, {}, "column 'c' of 'waves.csv' holds 'warm', not a number, in line 2; .* `data.columns`"),
        ({"c": [None, 1.0] * 150}, {}, "column 'c' .* has 150 cells that are empty or not finite, the first in line 2"),
        ({}, {"columns": ["aa"]}, "`data.columns` names 'aa', .* has the columns date, a, b; did you mean `a`"),
        ({}, {"dataset": "ETTh1"}, "has 300 rows, too few for ETTh1 .train 8640, validation 2880, test 2880"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path, columns, settings, message):
    with pytest.raises(ValueError, match=message):
        load(write_waves(tmp_path, **columns), **settings)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="`data.file` 'empty.csv' has no row"):
        load(tmp_path / "empty.csv")
    (tmp_path / "dates.csv").write_text("date\n2016\n")
    with pytest.raises(ValueError, match="`data.file` 'dates.csv' has no column but 'date'"):
        load(tmp_path / "dates.csv")
    with pytest.raises(ValueError, match="`data.file` is missing: WTH is not downloaded"):
        time_series.Options("time_series", dataset="WTH")


def test_series_are_standardised_by_the_training_part_and_begin_with_their_past(tmp_path):
    parts = load(write_waves(tmp_path))
    series, means, deviations = standardised(parts, Options("forecasting", prediction_length=3, context_length=12))
    assert {split: values.shape for split, values in series.items()} == {
        "train": (210, 2), "validation": (42, 2), "test": (72, 2),
    }  # fmt: skip
    np.testing.assert_allclose(series["train"].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(series["train"].std(0), 1)
    np.testing.assert_array_equal(series["validation"][:12], series["train"][-12:])
    np.testing.assert_array_equal(series["test"][:12], series["validation"][-12:])
    raw = waves(300)["b"].to_numpy()
    np.testing.assert_allclose((means[1], deviations[1]), (raw[:210].mean(), raw[:210].std()))
    np.testing.assert_allclose(series["test"][:, 1], (raw[228:] - raw[:210].mean()) / raw[:210].std())


def test_every_stretch_of_a_series_is_a_row():
    rows = Forecasts(np.arange(20)[:, None], context_length=5, prediction_length=3)
    assert len(rows) == len(list(rows)) == 13
    for index, row in enumerate(rows):
        assert row["past_values"].flatten().tolist() == list(range(index, index + 5))
        assert row["future_values"].flatten().tolist() == list(range(index + 5, index + 8))


def test_the_errors_are_means_over_all_values():
    prediction, future = torch.randn(5, 3, 2), torch.randn(5, 3, 2)
    sums = row_errors((prediction, torch.zeros(1)), future)
    score = forecast_metrics(EvalPrediction(sums.numpy(), future.numpy()), metrics=["mse", "mae"])
    error = prediction - future
    assert score == {
        "mse": pytest.approx(error.square().mean().item()),
        "mae": pytest.approx(error.abs().mean().item()),
    }


class TestLinearForecaster:
    @pytest.mark.parametrize("kind", ["nlinear", "dlinear"])
    def test_it_is_the_equation(self, kind):
        model = LinearForecaster(
            LinearForecasterConfig(kind=kind, context_length=7, prediction_length=3, trend_window=3)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        past = torch.randn(2, 7, 4)
        for row, channel in ((0, 1), (1, 3)):
            x = past[row, :, channel]
            if kind == "nlinear":
                expected = x[-1] + model.remainder.weight @ (x - x[-1]) + model.remainder.bias
            else:
                padded = torch.cat([x[:1], x, x[-1:]])
                trend = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
                expected = model.trend.weight @ trend + model.trend.bias
                expected = expected + model.remainder.weight @ (x - trend) + model.remainder.bias
            torch.testing.assert_close(model(past).prediction_outputs[row, :, channel], expected)

    def test_the_first_forecast_of_dlinear_is_the_mean_of_the_past(self):
        model = LinearForecaster(LinearForecasterConfig(kind="dlinear", context_length=7, prediction_length=3))
        past = torch.randn(2, 7, 4)
        torch.testing.assert_close(model(past).prediction_outputs, past.mean(1, keepdim=True).expand(2, 3, 4))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"kind": "linear"}, "`kind` must be one of nlinear, dlinear, got 'linear'; did you mean"),
            ({"trend_window": 4}, "`trend_window` must be odd, got 4"),
            ({"context_length": 0}, "`context_length` must be at least 1, got 0"),
        ],
    )
    def test_a_wrong_config_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            LinearForecasterConfig(**fields)

    def test_another_length_is_refused(self):
        with pytest.raises(ValueError, match=r"`context_length` = 96, channels\), got \(1, 9, 2\)"):
            LinearForecaster(LinearForecasterConfig())(torch.ones(1, 9, 2))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a small table: its recipe, folder and result."""
    folder = tmp_path_factory.mktemp("waves")
    recipe = write_recipe(folder, TRAINING, write_waves(folder), **FORECASTER)
    return recipe, folder / "run", train.main([str(recipe), "--output-dir", str(folder / "run")])


def test_a_recipe_learns_and_its_model_scores_the_same(run):
    _, folder, result = run
    assert result["metrics"]["test"]["mse"] < 0.5  # the mean of the training part would have about 1
    config = json.loads((folder / "final" / "config.json").read_text())
    assert config["architectures"] == ["RTransformerForTimeSeriesPrediction"] and config["prediction_length"] == 3
    scored = evaluate.main([str(folder / "final"), "--set", "training.per_device_eval_batch_size=7"])["metrics"]
    assert scored == pytest.approx(result["metrics"]["test"], rel=1e-4)


def test_a_resumed_run_ends_as_if_it_had_not_stopped(run, tmp_path):
    recipe, folder, result = run
    shutil.copytree(folder / "checkpoint-20", tmp_path / "checkpoint-20")
    resumed = train.main([str(recipe), "--output-dir", str(tmp_path), "--resume"])
    assert resumed["metrics"]["test"] == pytest.approx(result["metrics"]["test"], rel=1e-4)


def test_channels_can_be_read_together(run, tmp_path):
    settings = ["model.channel_independent=false", "training.max_steps=2", "task.max_eval_rows=5"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    train.main([str(run[0]), "--output-dir", str(tmp_path / "run"), *arguments])
    assert json.loads((tmp_path / "run" / "final" / "config.json").read_text())["num_input_features"] == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('report.metrics=["rmse"]', "`report.metrics` of forecasting are of mse, mae, got 'rmse'; did you mean `mse`"),
        ('report.compressors=["gzip"]', "`report.compressors` is for language_modeling"),
        ("tokenizer.kind=character", r"section `\[tokenizer\]` is for text"),
        ("task.prediction_length=0", "`task.prediction_length` must be greater than 0, got 0"),
        ("task.prediction_length=31", "`task.prediction_length` must be at most the 30 steps of the validation part"),
        ("task.context_length=208", "must fit into the 210 steps of the training part together, got 208 . 3"),
        ("data.dataset=ETTh3", "`data.dataset` must be 'ETTh1', .* or 'table', got 'ETTh3'"),
        ("data.file=missing.csv", "`data.file` names 'missing.csv', which is not a file"),
    ],
)
def test_settings_that_do_not_fit_are_refused(run, tmp_path, setting, message):
    with pytest.raises(SystemExit, match=message):
        train.main([str(run[0]), "--output-dir", str(tmp_path / "run"), "--set", setting])


def test_a_channel_that_never_changes_is_named(tmp_path):
    recipe = write_recipe(tmp_path, TRAINING, write_waves(tmp_path, c=1.5), **FORECASTER)
    with pytest.raises(SystemExit, match="column 'c' never changes in the training part"):
        train.main([str(recipe), "--output-dir", str(tmp_path / "run")])


@pytest.mark.parametrize("name", ["ett", "ett-linear"])
def test_the_recipes_of_the_repository_start_with_another_horizon(tmp_path, name):
    file = json.dumps(str(write_waves(tmp_path, 400)))
    settings = [f"data.file={file}", "data.dataset=table", "task.prediction_length=7", "task.context_length=40"]
    settings += ["training.max_steps=2", "training.use_cpu=true"]
    result = train.main([name, "--output-dir", str(tmp_path / "run"), *[p for s in settings for p in ("--set", s)]])
    assert result["steps"] == 2 and 0 < result["metrics"]["test"]["mse"] < 10
    assert evaluate.main([str(tmp_path / "run" / "final")])["metrics"] == pytest.approx(result["metrics"]["test"])


def test_both_ett_recipes_have_the_same_task_and_data():
    ours, linear = read_recipe("ett"), read_recipe("ett-linear")
    assert (ours.task, ours.data, ours.report) == (linear.task, linear.data, linear.report)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real series are not at ../shared/data/ett")
@pytest.mark.parametrize("name", ["ETTh1", "ETTh2"])
def test_the_published_files_are_those_that_are_expected(name):
    content = gzip.decompress((REAL / f"{name}.csv.gz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == time_series.SHA256[name]
    splits = load(REAL / f"{name}.csv.gz", name)
    assert {split: rows.shape for split, rows in splits.items()} == {
        "train": (8640, 7), "validation": (2880, 7), "test": (2880, 7),
    }  # fmt: skip
