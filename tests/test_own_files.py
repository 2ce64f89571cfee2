"""
People's own files, as public reports describe them: each is read as its owner means it, or refused in one line that
names the file, the place and the remedy.
"""

import bz2
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig, AutoModelForTimeSeriesPrediction, DataCollatorForLanguageModeling

import scripts.baselines  # noqa: F401  registers the linear forecaster
from modeling_rtransformer import RTransformerForCausalLM, RTransformerForSequenceClassification
from scripts import evaluate, predict, train
from scripts.data.sources import files, time_series
from scripts.data.tokenization import Options as TokenizerOptions
from scripts.data.tokenization import build_tokenizer
from scripts.tasks.sequence_classification import (
    REGRESSION,
    SEVERAL,
    SINGLE,
    Options,
    balanced_weights,
    class_index,
    label_texts,
    multi_hot,
    number_labels,
    problem_type,
    weighted_loss,
)
from tests.conftest import tiny_config
from tests.test_forecasting import FORECASTER
from tests.test_forecasting import TRAINING as FORECASTING
from tests.tiny_recipe import CLASSIFICATION, LANGUAGE_MODELING, write_recipe, write_text


ROOT = Path(__file__).resolve().parents[1]


TEXTS = [f"text number {n} about things" for n in range(40)]


def table(path, texts=TEXTS, labels=None, delimiter=",", encoding="utf-8"):
    labels = labels or [("good", "bad")[n % 2] for n in range(len(texts))]
    frame = pd.DataFrame({"body": texts, "kind": labels})
    frame.to_csv(path, index=False, sep=delimiter, encoding=encoding)
    return path


def load(path, **settings):
    given = {"train": str(path), "text_column": "body", "label_column": "kind", **settings}
    return files.load(files.Options("files", **given))


def everything(splits):
    return sorted((row["text"], row["label"]) for split in splits.values() for row in split)


def classes_of(path, given=None, **settings):
    labels = label_texts(load(path, **settings)["train"], "train")
    return class_index(labels, given)


def series(path, **settings):
    return time_series.read_series(time_series.Options("time_series", dataset="table", file=str(path), **settings))


class TestTables:
    @pytest.mark.parametrize("delimiter", [";", "\t", "|"])
    def test_the_delimiter_is_recognised_and_said(self, tmp_path, capsys, delimiter):
        path = table(tmp_path / f"t{ord(delimiter)}.csv", delimiter=delimiter)
        assert everything(load(path)) == everything(load(table(tmp_path / "t.csv")))
        assert f"t{ord(delimiter)}.csv: delimiter {delimiter!r}" in capsys.readouterr().err

    def test_a_comma_in_a_column_of_decimal_commas_is_no_delimiter(self, tmp_path):
        (tmp_path / "t.csv").write_text("body;kind\n" + "a, b, c;1,5\nd, e;2,5\n" * 9)
        assert everything(load(tmp_path / "t.csv"))[0] == ("a, b, c", "1,5")

    def test_a_first_line_of_spreadsheets_names_the_delimiter(self, tmp_path):
        content = table(tmp_path / "t.csv", delimiter="|").read_text()
        (tmp_path / "t.csv").write_text("sep=|\n" + content + "x\n")
        with pytest.raises(ValueError, match="line 43 of .*t.csv has 1 cells, and the header has 2"):
            load(tmp_path / "t.csv")
        (tmp_path / "t.csv").write_text("sep=|\n" + content)
        assert len(everything(load(tmp_path / "t.csv"))) == 40

    @pytest.mark.parametrize(("row", "count"), [("hello, dear,a", 3), ("hello", 1)])
    def test_a_row_with_more_or_fewer_cells_is_refused_by_its_line(self, tmp_path, row, count):
        (tmp_path / "t.csv").write_text('body,kind\n"two\nlines",a\n\nx,b\n' + row + "\n")
        with pytest.raises(ValueError, match=f"line 6 of .*t.csv has {count} cells, and the header has 2; put texts"):
            load(tmp_path / "t.csv")

    def test_a_comma_too_many_in_every_row_is_refused(self, tmp_path):
        (tmp_path / "t.csv").write_text("body,kind\n" + "".join(f"hello {n}, dear,a\n" for n in range(40)))
        with pytest.raises(ValueError, match="line 2 of .*t.csv has 3 cells, and the header has 2"):
            load(tmp_path / "t.csv")

    @pytest.mark.parametrize("suffix", ["csv", "tsv"])
    def test_na_null_and_none_are_words(self, tmp_path, suffix):
        words = ["NA", "null", "None", "nan", "EU", "True", "01", "1e5"] * 5
        path = table(tmp_path / f"t.{suffix}", words, words[::-1], "\t" if suffix == "tsv" else ",")
        assert everything(load(path)) == sorted(zip(words, words[::-1], strict=True))

    def test_na_values_are_empty(self, tmp_path):
        path = table(tmp_path / "t.csv", ["x", "NA", "y"])
        with pytest.raises(ValueError, match="`data.text_column` 'body' is empty, in line 3 of .*t.csv"):
            load(path, na_values=["NA"])

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
    def test_a_byte_order_mark_decides_the_encoding(self, tmp_path, encoding):
        texts = [f"naïve 木 {n}" for n in range(40)]
        assert everything(load(table(tmp_path / "t.csv", texts, encoding=encoding))) == everything(
            load(table(tmp_path / "u.csv", texts))
        )

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("suffix", ["csv", "txt"])
    def test_another_encoding_is_named_as_a_setting(self, tmp_path, suffix, streaming):
        path = table(tmp_path / f"t.{suffix}", ["naïve"] * 40, encoding="latin-1")
        columns = {} if suffix == "csv" else {"text_column": "text", "label_column": None}
        more = {"streaming": True, "validation": str(path), "test": str(path)} if streaming else {}
        with pytest.raises(ValueError, match=f't.{suffix} cannot be read as .*utf-8.*`data.encoding`, such as "latin'):
            load(path, **columns, **more)
        splits = load(path, **columns, **more, encoding="latin-1")
        assert "naïve" in next(iter(splits["train"]))["text"]
        with pytest.raises(ValueError, match="`data.encoding` must be an encoding of Python, got 'latin1o'"):
            load(path, **columns, encoding="latin1o")

    def test_utf_16_without_a_mark_is_no_text_of_zero_characters(self, tmp_path):
        path = table(tmp_path / "t.csv", encoding="utf-16-le")
        with pytest.raises(ValueError, match="t.csv holds zero characters.*`data.encoding`"):
            load(path)
        assert len(everything(load(path, encoding="utf-16-le"))) == 40

    def test_a_name_is_literal_where_such_a_file_is_there(self, tmp_path):
        (tmp_path / "part1.txt").write_text("another text\n" * 50)
        with pytest.raises(FileNotFoundError, match="names '.*part.1..txt.x', which is not a file"):
            files.load(files.Options("files", str(tmp_path / "part[1].txt.x")))
        (tmp_path / "part[1].txt").write_text("wanted text\n" * 50)
        splits = files.load(files.Options("files", str(tmp_path / "part[1].txt")))
        assert set(splits["train"]["text"][0].splitlines()) == {"wanted text"}

    def test_wildcards_and_folders_name_files(self, tmp_path, capsys):
        for name in ("a.csv", "b.csv"):
            table(tmp_path / name, [f"{name} {n}" for n in range(20)])
        (tmp_path / "notes.docx").write_bytes(b"x")
        by_folder, by_wildcard = load(tmp_path), load(tmp_path / "*.csv")
        assert len(everything(by_folder)) == 40 and everything(by_folder) == everything(by_wildcard)
        assert "2 files, a.csv, b.csv" in capsys.readouterr().err
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match="'.*empty', a folder without a file of a known format"):
            load(tmp_path / "empty")

    def test_each_file_is_read_by_its_own_kind(self, tmp_path):
        table(tmp_path / "a.csv", TEXTS[:20])
        (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": t, "kind": "good"}) + "\n" for t in TEXTS[20:]))
        splits = load(tmp_path / "a.csv", train=[str(tmp_path / "a.csv"), str(tmp_path / "b.jsonl")])
        assert sorted(text for text, _ in everything(splits)) == sorted(TEXTS)

    @pytest.mark.parametrize("suffix", ["csv.gz", "csv.bz2", "csv.xz", "csv.zip", "csv"])
    def test_compressed_files_are_read_by_their_first_bytes(self, tmp_path, suffix):
        content = table(tmp_path / "plain.csv").read_bytes()
        path = tmp_path / f"t.{suffix}"
        if suffix == "csv.zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("t.csv", content)
        else:
            path.write_bytes({"bz2": bz2.compress, "xz": lzma.compress}.get(suffix[4:], gzip.compress)(content))
        assert everything(load(path)) == everything(load(tmp_path / "plain.csv"))

    def test_an_archive_of_several_files_is_refused(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
            archive.writestr("a.csv", "body,kind\n")
            archive.writestr("b.csv", "body,kind\n")
        with pytest.raises(ValueError, match="t.zip must hold one file, got a.csv, b.csv"):
            load(tmp_path / "t.zip", format="csv")

    def test_compressed_texts_are_streamed(self, tmp_path):
        (tmp_path / "t.txt.gz").write_bytes(gzip.compress("wörds and words\n".encode() * 9000))
        name = str(tmp_path / "t.txt.gz")
        stream = files.load(files.Options("files", name, name, name, streaming=True))["train"]
        assert "".join(row["text"] for row in stream) == "wörds and words\n" * 9000

    def test_a_damaged_stream_names_its_file(self, tmp_path):
        (tmp_path / "t.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(90000).hex().encode())[:-5000])
        (tmp_path / "v.txt").write_text("words\n" * 50)
        name, other = str(tmp_path / "t.txt.gz"), str(tmp_path / "v.txt")
        stream = files.load(files.Options("files", name, other, other, streaming=True))["train"]
        with pytest.raises(ValueError, match="t.txt.gz cannot be read as text .*end-of-stream"):
            list(stream)

    def test_only_the_named_columns_are_needed_in_every_split(self, tmp_path):
        table(tmp_path / "a.csv")
        pd.read_csv(table(tmp_path / "b.csv")).assign(more=1).to_csv(tmp_path / "b.csv", index=False)
        splits = load(tmp_path / "a.csv", test=str(tmp_path / "b.csv"))
        assert splits["test"].column_names == ["text", "label"] and len(splits["test"]) == 40

    def test_a_column_of_the_same_name_twice_is_refused(self, tmp_path):
        (tmp_path / "t.csv").write_text("body,kind,kind\n" + "x,a,b\n" * 9)
        with pytest.raises(ValueError, match="t.csv has 2 columns 'kind'"):
            load(tmp_path / "t.csv")

    @pytest.mark.parametrize("content", ["body,kind\n", "body,kind\n\n\n"])
    def test_a_table_of_one_header_is_refused(self, tmp_path, content):
        (tmp_path / "t.csv").write_text(content)
        with pytest.raises(ValueError, match="the train split of `data` has no row .*t.csv"):
            load(tmp_path / "t.csv")

    def test_rows_in_a_key_of_json_are_found(self, tmp_path):
        records = [{"body": text, "kind": "a"} for text in TEXTS]
        (tmp_path / "t.json").write_text(json.dumps({"version": 1, "data": records}))
        assert len(everything(load(tmp_path / "t.json"))) == 40
        (tmp_path / "list.json").write_text(json.dumps(records, indent=1))
        assert len(everything(load(tmp_path / "list.json"))) == 40
        (tmp_path / "nested.jsonl").write_text("".join(json.dumps({**r, "more": [{"x": 1}]}) + "\n" for r in records))
        assert len(everything(load(tmp_path / "nested.jsonl"))) == 40
        (tmp_path / "columns.json").write_text(json.dumps({"body": TEXTS, "kind": TEXTS}, indent=1))
        with pytest.raises(ValueError, match="columns.json holds one dict with the keys body, kind; its rows must be"):
            load(tmp_path / "columns.json")

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (['{"body": {"en": "x"}, "kind": "a"}'] * 9, "'body' holds dict, not text, in line 1 of"),
            (['{"body": "x", "kind": {"a": 1}}'] * 9, "'kind' holds dict, not label, in line 1 of"),
            (['{"body": "x", "kind": "a"},'] * 9, "cannot be read as json .Extra data: line 1"),
            (['{"body": "x", "kind": "a"}', '{"body": "x"'], "cannot be read as json .line 2: "),
            (['{"body": "x", "kind": "a"}', "[1]"], "line 2 of .* must be an object with named values, got '.1.'"),
            (['{"body": "x", "kind": "a"}', '{"body": "x"}'], "'kind' is empty, in line 2 of"),
            (['{"body": "x", "kind": "a"}', '{"body": "x", "kind": ["a"]}'], "one label in some rows and a list in"),
            (['{"text": "x", "kind": "a"}'] * 9, "`data.text_column` is 'body', but .* has the columns text, kind"),
        ],
    )
    def test_a_wrong_line_of_json_is_named(self, tmp_path, lines, message):
        (tmp_path / "t.jsonl").write_text("\n".join(lines))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "t.jsonl")

    @pytest.mark.parametrize(
        "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
    )
    def test_every_kind_of_text_of_parquet_is_text(self, tmp_path, kind):
        column = pa.array(TEXTS).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(TEXTS, kind)
        pq.write_table(pa.table({"body": column, "kind": [1, 2] * 20}), tmp_path / "t.parquet")
        assert {label for _, label in everything(load(tmp_path / "t.parquet"))} == {"1", "2"}

    def test_a_parquet_file_by_another_name_is_refused(self, tmp_path):
        pd.DataFrame({"body": TEXTS, "kind": "a"}).to_parquet(tmp_path / "t.parquet")
        (tmp_path / "t.parquet").rename(tmp_path / "t.csv")
        with pytest.raises(ValueError, match="t.csv .*`data.format`"):
            load(tmp_path / "t.csv")
        assert len(everything(load(tmp_path / "t.csv", format="parquet"))) == 40


class TestLabels:
    @pytest.mark.parametrize(
        ("values", "names"),
        [
            ([1, 2, 3, 4, 5], ["1", "2", "3", "4", "5"]),
            ([10, 200, 3000], ["10", "200", "3000"]),
            ([1, -1], ["-1", "1"]),
            ([True, False], ["False", "True"]),
            (["NA", "EU"], ["EU", "NA"]),
            (["10", "9", "x"], ["10", "9", "x"]),
        ],
    )
    @pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
    def test_classes_are_the_values_of_train_by_their_text(self, tmp_path, suffix, values, names):
        frame = pd.DataFrame({"body": TEXTS * 2, "kind": (values * 80)[:80]})
        path = tmp_path / f"t.{suffix}"
        if suffix == "csv":
            frame.to_csv(path, index=False)
        elif suffix == "jsonl":
            frame.to_json(path, orient="records", lines=True)
        else:
            frame.to_parquet(path)
        assert classes_of(path) == (names, {name: place for place, name in enumerate(names)})

    @pytest.mark.parametrize(
        ("values", "given", "index"),
        [
            (["1", "-1"], ["-1", "1"], {"-1": 0, "1": 1}),
            (["0", "1"], ["bad", "good"], {"0": 0, "1": 1}),
            (["1", "2", "3"], ["bad", "so so", "good"], {"1": 0, "2": 1, "3": 2}),
            (["b", "a"], ["b", "a", "c"], {"b": 0, "a": 1, "c": 2}),
            (["2", "0"], ["a", "b", "c"], {"0": 0, "1": 1, "2": 2}),
        ],
    )
    def test_task_labels_names_the_classes(self, values, given, index):
        assert class_index(values, given) == (given, index)

    def test_a_label_that_task_labels_lacks_is_named(self):
        _, index = class_index(["a", "b", "x"], ["a", "b", "c"])
        with pytest.raises(ValueError, match="label 'x' in row 1 of the train split is outside the 3 classes"):
            number_labels(["a", "x"], index, "train")
        with pytest.raises(ValueError, match="`task.labels` must name each class once, got a, a"):
            class_index(["a"], ["a", "a"])

    @pytest.mark.parametrize(
        ("labels", "settings", "expected"),
        [
            (["a", "b"], {}, SINGLE),
            (["1", "2"], {}, SINGLE),
            (["1", "2.5"], {}, REGRESSION),
            (["1,25", "2"], {}, REGRESSION),
            (["1.5", "2.5"], {"problem_type": SINGLE}, SINGLE),
            (["1", "2"], {"problem_type": REGRESSION}, REGRESSION),
            ([["a"], ["a", "b"], []], {}, SEVERAL),
            (["1.5", "x"], {}, SINGLE),
        ],
    )
    def test_the_problem_follows_from_the_labels(self, labels, settings, expected):
        assert problem_type(labels, Options("x", **settings), ["mse"]) == expected

    def test_metrics_of_another_problem_are_refused(self):
        with pytest.raises(ValueError, match="such as 4.857, so this is a regression, .* mse, mae, r2, got accuracy"):
            problem_type(["1", "4.857"], Options("x"), ["accuracy"])
        with pytest.raises(ValueError, match="each row has one label; name the `task.label_delimiter`"):
            problem_type(["a"], Options("x", problem_type=SEVERAL), ["f1"])
        with pytest.raises(ValueError, match="`task.problem_type` is regression, but the label of a row is a list"):
            problem_type([["a"]], Options("x", problem_type=REGRESSION), ["mse"])

    def test_rows_of_zeros_and_ones_are_several_labels(self):
        assert multi_hot([["1", "0", "1"], ["0", "0", "0"]]) == 3
        assert multi_hot([["a", "b"], ["b", "a"]]) is None and multi_hot([["1"], ["0", "1"]]) is None
        assert multi_hot(["1", "0"]) is None
        found = number_labels([["a", "c"], []], {"a": 0, "b": 1, "c": 2}, "train", several=True)
        assert found.tolist() == [[1, 0, 1], [0, 0, 0]]

    def test_each_class_keeps_its_share_and_rare_ones_are_said(self, tmp_path, capsys):
        labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 9 + ["rare"]
        splits = load(table(tmp_path / "t.csv", [f"t {n}" for n in range(100)], labels))
        for split in ("validation", "test"):
            counts = pd.Series(splits[split]["label"][:]).value_counts()
            assert len(splits[split]) == 10 and counts["a"] in (5, 6, 7) and counts["b"] in (2, 3, 4)
        assert "rare" in set(splits["train"]["label"])
        assert "too rare to be in the held-out validation split: " in (said := capsys.readouterr().err)
        assert "rare (1 rows)" in said

    def test_balanced_weights_make_classes_count_alike(self):
        weights = balanced_weights(np.array([0, 0, 0, 1]), 3)
        assert weights.tolist() == pytest.approx([4 / 9, 4 / 3, 4 / 3])
        logits = torch.randn(4, 3)
        labels = torch.tensor([0, 0, 2, 1])
        expected = torch.nn.CrossEntropyLoss(weight=weights)(logits, labels)
        assert weighted_loss(type("Outputs", (), {"logits": logits}), labels, weights=weights) == expected


class TestSeries:
    def test_a_semicolon_table_with_decimal_commas_has_its_numbers(self, tmp_path):
        frame = pd.DataFrame({"date": pd.date_range("2024", periods=40, freq="h"), "a": np.arange(40) / 7, "b": 3.25})
        frame.to_csv(tmp_path / "t.csv", sep=";", decimal=",", index=False)
        found = series(tmp_path / "t.csv")
        assert list(found.columns) == ["a", "b"] and found.index.name == "date"
        np.testing.assert_allclose(found.to_numpy(), frame[["a", "b"]].to_numpy(), rtol=1e-15)

    def test_a_comma_that_may_separate_thousands_asks_for_the_setting(self, tmp_path):
        (tmp_path / "t.csv").write_text("a;b\n" + "1,234;5\n" * 9)
        with pytest.raises(ValueError, match="'1,234', not a number, in line 2; correct it, name `data.decimal`"):
            series(tmp_path / "t.csv")
        assert series(tmp_path / "t.csv", decimal=",")["a"].tolist() == [1.234] * 9

    @pytest.mark.parametrize("name", ["", "Unnamed: 0", "step", "date"])
    def test_an_index_and_epochs_are_times_and_no_channel(self, tmp_path, name):
        pd.DataFrame({name: 3600 * np.arange(9), "a": np.arange(9) % 4, "b": 1}).to_csv(tmp_path / "t.csv", index=False)
        found = series(tmp_path / "t.csv")
        assert list(found.columns) == ["a", "b"] and found.index.tolist() == (3600 * np.arange(9)).tolist()

    def test_epochs_may_rise_unevenly(self, tmp_path):
        times = [1_700_000_000, 1_700_000_060, 1_700_000_200, 1_700_000_300]
        pd.DataFrame({"a": [1, 0, 2, 5], "unix_s": times}).to_csv(tmp_path / "t.csv", index=False)
        found = series(tmp_path / "t.csv")
        assert list(found.columns) == ["a"] and found.index.tolist() == times

    def test_an_empty_column_behind_a_last_delimiter_is_no_channel(self, tmp_path):
        (tmp_path / "t.csv").write_text("a;b;\n1;2;\n0;4;\n")
        assert list(series(tmp_path / "t.csv").columns) == ["a", "b"]

    def test_a_date_goes_before_an_index(self, tmp_path):
        days = pd.date_range("2024-01-01", periods=5)
        pd.DataFrame({"day": days, "a": [1, 0, 2, 5, 1]}).to_csv(tmp_path / "t.csv")
        found = series(tmp_path / "t.csv")
        assert list(found.columns) == ["a"] and found.index.tolist() == days.tolist()

    def test_a_column_that_counts_the_rows_is_no_channel_unless_it_is_named(self, tmp_path, capsys):
        pd.DataFrame({"a": [3.5, 1, 2, 0], "row": range(4)}).to_csv(tmp_path / "t.csv", index=False)
        assert list(series(tmp_path / "t.csv").columns) == ["a"]
        assert "column 'row' counts the rows and is no channel" in capsys.readouterr().err
        assert list(series(tmp_path / "t.csv", columns=["row", "a"]).columns) == ["row", "a"]

    @pytest.mark.parametrize("form", ["%Y-%m-%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "%Y-%m-%dT%H:%M:%S+02:00"])
    def test_dates_are_read_in_the_order_in_which_they_rise(self, tmp_path, form):
        days = pd.date_range("2024-01-01", periods=40)
        pd.DataFrame({"when": days.strftime(form), "a": 1.5}).to_csv(tmp_path / "t.csv", index=False)
        found = series(tmp_path / "t.csv").index
        assert (found[1:] - found[:-1] == pd.Timedelta(days=1)).all()

    @pytest.mark.parametrize(
        ("days", "message"),
        [
            ([1, 2, 2], "line 4 repeats the time of the row before it"),
            ([1, 3, 2], "line 4 is before the time of the row"),
        ],
    )
    def test_times_that_fall_or_are_repeated_are_refused(self, tmp_path, days, message):
        (tmp_path / "t.csv").write_text("date,a\n" + "".join(f"2024-01-0{day},{day / 2}\n" for day in days))
        with pytest.raises(ValueError, match=f"column 'date' of 't.csv': {message}"):
            series(tmp_path / "t.csv")

    def test_uneven_steps_are_said_and_months_are_even(self, tmp_path, capsys):
        days = pd.to_datetime(["2024-01-01", "2024-01-02", "2024-01-05", "2024-01-06"])
        pd.DataFrame({"date": days, "a": 1.5}).to_csv(tmp_path / "uneven.csv", index=False)
        series(tmp_path / "uneven.csv")
        assert "uneven.csv: the steps of 'date' are uneven" in capsys.readouterr().err
        pd.DataFrame({"date": pd.date_range("2024-01-01", periods=9, freq="MS"), "a": 1.5}).to_csv(
            tmp_path / "m.csv", index=False
        )
        series(tmp_path / "m.csv")
        assert "uneven" not in capsys.readouterr().err

    def test_long_format_becomes_one_channel_a_series(self, tmp_path):
        days = pd.date_range("2024-01-01", periods=20)
        long = pd.concat(
            [pd.DataFrame({"unique_id": n, "ds": days, "y": k * np.arange(20)}) for k, n in ((1, "B"), (2, "A"))]
        )
        long.to_csv(tmp_path / "t.csv", index=False)
        found = series(tmp_path / "t.csv")
        assert {name: found[name].tolist() for name in found} == {
            "A": (2.0 * np.arange(20)).tolist(), "B": np.arange(20.0).tolist(),
        }  # fmt: skip
        long.iloc[:-1].to_csv(tmp_path / "t.csv", index=False)
        with pytest.raises(ValueError, match="series 'A' of 't.csv' has no value at 2024-01-20"):
            series(tmp_path / "t.csv")
        pd.concat([long, long[:1]]).to_csv(tmp_path / "t.csv", index=False)
        with pytest.raises(ValueError, match="repeats the time of a series in line 42"):
            series(tmp_path / "t.csv", id_column="unique_id")

    def test_hours_beside_days_are_no_series(self, tmp_path):
        lines = [f"2024-01-0{day},{hour:02}:00,{hour % 5}\n" for day in (1, 2) for hour in range(24)]
        (tmp_path / "t.csv").write_text("date,time,a\n" + "".join(lines))
        with pytest.raises(ValueError, match="column 'date' of 't.csv': line 3 repeats the time of the row before it"):
            series(tmp_path / "t.csv")

    @pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet", "json", "jsonl"])
    def test_every_format_gives_the_same_series(self, tmp_path, suffix):
        frame = pd.DataFrame({"date": pd.date_range("2024", periods=9), "a": np.arange(9) / 8, "b": [1, 3] * 4 + [2]})
        path = tmp_path / f"t.{suffix}"
        if suffix == "parquet":
            frame.set_index("date").to_parquet(path)
        elif suffix.startswith("json"):
            frame.to_json(path, orient="records", lines=suffix == "jsonl", date_format="iso")
        else:
            frame.to_csv(path, index=False)
        found = series(path)
        assert list(found.columns) == ["a", "b"] and found.index.tolist() == frame["date"].tolist()
        np.testing.assert_allclose(found.to_numpy(), frame[["a", "b"]].to_numpy())

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("date,a\n2024-01-01,1\n2024-01-02,-\n", "column 'a' of 't.csv' holds '-', not a number, in line 3"),
            ('a,b\n1,"1,234.5"\n2,"2.5"\n', "column 'b' of 't.csv' holds '1,234.5', not a number, in line 2"),
            ("a,b\n1,2\n3,\n", "column 'b' of 't.csv' has 1 cells that are empty or not finite, the first in line 3"),
            (
                "a,b\n1,2\n3,inf\n",
                "column 'b' of 't.csv' has 1 cells that are empty or not finite, the first in line 3",
            ),
            ("date,a,b\n", "`data.file` 't.csv' has no row"),
            ("1.5,2.5\n1,2\n3,4\n", "has no header: its first line is 1.5, 2.5"),
            ("a,b\n1,2\n3\n", "line 3 of .*t.csv has 1 cells, and the header has 2"),
        ],
    )
    def test_a_cell_that_is_no_number_is_named_with_its_line(self, tmp_path, content, message):
        (tmp_path / "t.csv").write_text(content)
        with pytest.raises(ValueError, match=message):
            series(tmp_path / "t.csv")


def recipe_of(folder, path, *replacements, **model):
    training = CLASSIFICATION
    for old, new in (("max_steps = 60", "max_steps = 4"), ("steps = 20", "steps = 2"), *replacements):
        training = training.replace(old, new)
    return write_recipe(folder, training, path, **model)


def run(recipe, folder, *settings):
    return train.main([str(recipe), "--output-dir", str(folder / "run"), *(p for s in settings for p in ("--set", s))])


class TestRuns:
    def test_numbers_are_learnt_scored_and_predicted(self, tmp_path):
        path = table(tmp_path / "t.csv", labels=[f"{n / 7:.3f}".replace(".", ",") for n in range(40)], delimiter=";")
        metrics = ('["accuracy", "f1"]', '["mse", "mae", "r2"]')
        result = run(recipe_of(tmp_path, path, metrics), tmp_path)
        final = tmp_path / "run" / "final"
        assert json.loads((final / "config.json").read_text())["problem_type"] == "regression"
        scores = result["metrics"]["test"]
        assert set(scores) == {"mse", "mae", "r2"} and scores["mae"] ** 2 <= scores["mse"]
        assert evaluate.main([str(final)])["metrics"] == pytest.approx(scores, rel=1e-4)
        written = predict.main([str(final), str(path), "--output", str(tmp_path / "p.csv")])
        assert written["rows"] == 40 and pd.read_csv(tmp_path / "p.csv")["kind"].dtype == float

    def test_several_labels_a_row_are_learnt_scored_and_predicted(self, tmp_path):
        path = table(tmp_path / "t.csv", labels=[("red", "green|red", "blue")[n % 3] for n in range(40)])
        recipe = recipe_of(tmp_path, path)
        result = run(recipe, tmp_path, "task.label_delimiter=|")
        final = tmp_path / "run" / "final"
        config = json.loads((final / "config.json").read_text())
        assert config["problem_type"] == "multi_label_classification"
        assert config["id2label"] == {"0": "blue", "1": "green", "2": "red"}
        assert evaluate.main([str(final)])["metrics"] == pytest.approx(result["metrics"]["test"], rel=1e-4)
        predict.main([str(final), str(path), "--output", str(tmp_path / "p.csv")])
        found = pd.read_csv(tmp_path / "p.csv", keep_default_na=False)["labels"]
        assert {label for cell in found for label in cell.split("|")} <= {"red", "green", "blue", ""}

    def test_stars_stay_stars_and_new_texts_are_predicted(self, tmp_path):
        path = table(tmp_path / "t.csv", labels=[n % 5 + 1 for n in range(40)])
        recipe = recipe_of(tmp_path, path)
        result = run(recipe, tmp_path, "task.class_weights=balanced")
        final = tmp_path / "run" / "final"
        assert [row["class"] for row in result["classes"]] == list("12345")
        assert np.sum(result["confusion"], axis=1).tolist() == [row["rows"] for row in result["classes"]]
        assert np.trace(result["confusion"]) / 8 == result["metrics"]["test"]["accuracy"]
        assert np.mean([row["f1"] for row in result["classes"]]) == pytest.approx(result["metrics"]["test"]["f1"])
        assert (final / "confusion.png").is_file()
        scored = evaluate.main([str(tmp_path / "run")])  # a run in place of its final/
        assert scored["metrics"] == pytest.approx(result["metrics"]["test"])
        with pytest.raises(SystemExit, match="holds a trained model, and train makes a new one; go on with it by"):
            train.main([str(final), "--output-dir", str(tmp_path / "again")])
        config = json.loads((final / "config.json").read_text())
        assert config["id2label"] == {str(n): str(n + 1) for n in range(5)}
        pd.DataFrame({"body": ["things", "about 3"]}).to_csv(tmp_path / "new.csv", index=False)
        predict.main([str(final), str(tmp_path / "new.csv"), "--output", str(tmp_path / "p.csv")])
        found = pd.read_csv(tmp_path / "p.csv")
        assert found["body"].tolist() == ["things", "about 3"] and set(found["label"]) <= {1, 2, 3, 4, 5}
        assert found["probability"].between(0.2, 1).all()

    @pytest.mark.parametrize("kind", ["word", "character"])
    def test_texts_without_a_token_are_refused_before_training(self, tmp_path, kind):
        texts = ["" if kind == "character" else " "] + TEXTS[1:]
        (tmp_path / "t.jsonl").write_text(
            "".join(json.dumps({"body": t, "kind": "ab"[n % 2]}) + "\n" for n, t in enumerate(texts))
        )
        with pytest.raises(SystemExit, match="1 texts of the .* split have no token, first in rows"):
            run(recipe_of(tmp_path, tmp_path / "t.jsonl"), tmp_path, f"tokenizer.kind={kind}")

    def test_cut_rows_are_said(self, tmp_path, capsys):
        texts = TEXTS[:20] + [text * 3 for text in TEXTS[20:]]
        run(recipe_of(tmp_path, table(tmp_path / "t.csv", texts)), tmp_path, "task.max_length=6")
        assert "of the train split are cut to `task.max_length` = 6 tokens: rows " in capsys.readouterr().err

    def test_a_corpus_without_a_character_is_refused(self, tmp_path):
        (tmp_path / "t.jsonl").write_text('{"body": ""}\n' * 40)
        recipe = recipe_of(
            tmp_path, tmp_path / "t.jsonl", ("sequence_classification", "language_modeling"),
            ('label_column = "kind"\n', ""), ('["accuracy", "f1"]', '["perplexity"]'),
        )  # fmt: skip
        with pytest.raises(SystemExit, match="the train split of `data` has no text"):
            run(recipe, tmp_path)

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ('report_to=["wandb"]', "`training.report_to` names wandb, whose package is not installed"),
            ("optim=adamw_bnb_8bit", "`training.optim`: .*bitsandbytes"),
            ("deepspeed=ds.json", "eepspeed"),
        ],
    )
    def test_options_without_their_package_are_refused_before_the_data_are_read(self, tmp_path, setting, message):
        recipe = recipe_of(tmp_path, tmp_path / "missing.csv")
        with pytest.raises(SystemExit, match=message):
            run(recipe, tmp_path, f"training.{setting}")

    def test_a_saved_tokenizer_is_used(self, tmp_path):
        build_tokenizer(TokenizerOptions("byte_bpe", vocab_size=300), TEXTS).save_pretrained(tmp_path / "tokenizer")
        name = f"tokenizer={{kind='pretrained', name='{tmp_path / 'tokenizer'}'}}"
        run(recipe_of(tmp_path, table(tmp_path / "t.csv")), tmp_path, name)
        assert json.loads((tmp_path / "run" / "final" / "config.json").read_text())["vocab_size"] <= 300

    def test_a_home_that_cannot_be_written_and_another_terminal_cost_nothing(self, tmp_path):
        write_text(tmp_path)
        recipe = write_recipe(tmp_path, LANGUAGE_MODELING, tmp_path / "corpus.txt")
        (tmp_path / "corpus.txt").write_text("größe Ωmega\n" * 300)
        environment = {**os.environ, "HOME": "/proc/nonexistent", "PYTHONIOENCODING": "latin-1"}
        for name in ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
            environment.pop(name, None)

        def script(*arguments):
            command = [sys.executable, "-m", *arguments]
            return subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, encoding="latin-1", check=False
            )

        trained = script(
            "scripts.train", str(recipe), "--output-dir", str(tmp_path / "run"), "--set", "training.max_steps=4"
        )
        assert trained.returncode == 0, trained.stderr[-2000:]
        written = script("scripts.generate", str(tmp_path / "run"), "--prompt", "Ω", "--max-new-tokens", "5")
        assert written.returncode == 0 and "\\u03a9" in written.stdout, written.stderr[-2000:]


class TestSeriesRuns:
    def test_a_forecast_goes_on_in_the_units_and_times_of_the_table(self, tmp_path):
        hours = pd.date_range("2024-01-01", periods=200, freq="h", name="when")
        frame = pd.DataFrame(
            {"a": 300 + np.sin(np.arange(200) / 3), "b": 1e-3 * np.cos(np.arange(200) / 5)}, index=hours
        )
        frame.to_csv(tmp_path / "t.csv", sep=";", decimal=",")
        recipe = write_recipe(tmp_path, FORECASTING, tmp_path / "t.csv", **FORECASTER)
        result = run(recipe, tmp_path)
        config = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
        assert config["channel_names"] == ["a", "b"]
        np.testing.assert_allclose(config["channel_means"], frame[:140].mean())
        np.testing.assert_allclose(config["channel_deviations"], frame[:140].std(ddof=0))
        predict.main([str(tmp_path / "run"), str(tmp_path / "t.csv"), "--output", str(tmp_path / "p.csv")])
        found = pd.read_csv(tmp_path / "p.csv", index_col="when", parse_dates=True)
        assert found.index.tolist() == pd.date_range(hours[-1], periods=4, freq="h")[1:].tolist()
        assert found["a"].between(295, 305).all() and (found["b"].abs() < 0.01).all()
        in_units = evaluate.main([str(tmp_path / "run"), "--set", "task.units=table"])["metrics"]
        scale = np.square(config["channel_deviations"]).max() / 2
        assert in_units["mse"] != pytest.approx(result["metrics"]["test"]["mse"], rel=1e-3)
        assert in_units["mse"] < 2 * scale * 2 * result["metrics"]["test"]["mse"] + 1e-9

    def test_a_channel_that_changes_by_rounding_alone_is_refused(self, tmp_path):
        values = np.full(200, 0.1)
        values[::2] += 1e-17
        values[150:] = 5.0
        pd.DataFrame({"a": np.arange(200) % 7, "b": values}).to_csv(tmp_path / "t.csv", index=False)
        recipe = write_recipe(tmp_path, FORECASTING, tmp_path / "t.csv", **FORECASTER)
        with pytest.raises(SystemExit, match="column 'b' never changes in the training part"):
            run(recipe, tmp_path)

    @pytest.mark.parametrize("kind", ["rtransformer_forecaster", "linear_forecaster"])
    def test_masks_and_covariates_are_refused_and_so_are_pasts_that_are_not_finite(self, kind):
        config = AutoConfig.for_model(kind, prediction_length=3, context_length=12)
        model = AutoModelForTimeSeriesPrediction.from_config(config)
        past = torch.ones(2, 12, 1)
        for name in ("past_observed_mask", "past_time_features", "future_time_features"):
            with pytest.raises(TypeError, match=f"`{name}` is not an argument of this model"):
                model(past_values=past, **{name: torch.zeros_like(past)})
        if kind == "rtransformer_forecaster":
            with pytest.raises(ValueError, match="`past_values` must be finite"):
                model(past_values=past * float("nan"))


class TestLabelsOfAModel:
    """Labels in the types in which people have them, given to the head itself."""

    @staticmethod
    def loss(labels, **fields):
        torch.manual_seed(0)
        model = RTransformerForSequenceClassification(tiny_config(**fields)).eval()
        return model(input_ids=torch.arange(8).view(4, 2), labels=labels).loss

    def test_zeros_and_ones_are_several_labels(self):
        fields = {"num_labels": 3, "problem_type": "multi_label_classification"}
        labels = torch.tensor([[1, 0, 1]] * 4)
        assert self.loss(labels, **fields) == self.loss(labels.float(), **fields) == self.loss(labels.bool(), **fields)
        with pytest.raises(ValueError, match=r"must have the shape \(batch, `num_labels` = 3\).* got \(4,\)"):
            self.loss(torch.zeros(4, dtype=torch.long), **fields)

    def test_several_labels_without_their_problem_type_are_refused(self):
        with pytest.raises(ValueError, match=r"shape \(batch,\), got \(4, 3\); .* multi_label_classification"):
            self.loss(torch.tensor([[1, 0, 1]] * 4), num_labels=3)

    def test_true_and_false_are_two_classes(self):
        labels = torch.tensor([True, False, True, True])
        assert self.loss(labels, num_labels=2) == self.loss(labels.long(), num_labels=2)

    def test_integers_are_targets_of_a_regression(self):
        fields = {"num_labels": 1, "problem_type": "regression"}
        labels = torch.tensor([3, 1, 2, 5])
        assert self.loss(labels, **fields) == self.loss(labels.float(), **fields)


class TestLanguageModels:
    @pytest.fixture
    def model(self):
        return RTransformerForCausalLM(tiny_config(pad_token_id=0)).eval()

    def test_prompts_padded_on_either_side_go_on_alike(self, model):
        ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        settings = {"max_new_tokens": 4, "do_sample": False}
        right = model.generate(ids, attention_mask=mask, **settings)[:, 4:]
        left = model.generate(
            ids.gather(1, torch.tensor([[0, 1, 2, 3], [2, 3, 0, 1]])), attention_mask=mask.flip(1), **settings
        )
        alone = model.generate(ids[1:, :2], attention_mask=mask[1:, :2], **settings)[:, 2:]
        assert right.tolist() == left[:, 4:].tolist() and right[1:].tolist() == alone.tolist()

    @pytest.mark.parametrize("kind", ["word", "character", "byte_bpe"])
    def test_stop_strings_work_with_every_tokenizer(self, kind):
        vocabulary = {"vocab_size": 300} if kind == "byte_bpe" else {}
        tokenizer = build_tokenizer(TokenizerOptions(kind, **vocabulary), ["the cat sat on the mat"] * 3)
        model = RTransformerForCausalLM(tiny_config(vocab_size=len(tokenizer))).eval()
        target = tokenizer(" cat" if kind == "word" else "cat", add_special_tokens=False)["input_ids"]
        answer = iter([*tokenizer("sat", add_special_tokens=False)["input_ids"], *target, *[target[0]] * 20])

        def say(input_ids, scores):
            scores = torch.full_like(scores, -1e9)
            scores[:, next(answer)] = 0
            return scores

        prompt = tokenizer("the", return_tensors="pt", add_special_tokens=False).input_ids
        out = model.generate(
            prompt,
            stop_strings=["cat"],
            tokenizer=tokenizer,
            logits_processor=[say],
            max_new_tokens=20,
            do_sample=False,
        )
        assert tokenizer.decode(out[0]).endswith("cat") and tokenizer.decode(out[0]).count("cat") == 1

    def test_an_empty_prompt_is_refused(self, model):
        with pytest.raises(ValueError, match=r"`input_ids` must have at least one position, got the shape \(1, 0\)"):
            model(input_ids=torch.zeros(1, 0, dtype=torch.long))

    def test_our_tokenizers_pad_so_that_a_loss_does_not_depend_on_the_batch(self):
        texts = ["abc on the mat", "a cat"]
        tokenizer = build_tokenizer(TokenizerOptions("character"), texts)
        model = RTransformerForCausalLM(tiny_config(vocab_size=len(tokenizer), pad_token_id=0)).eval()
        batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([tokenizer(text) for text in texts])
        rows = [tokenizer(text, return_tensors="pt") for text in texts]
        alone = sum(model(**row, labels=row["input_ids"]).loss * (row["input_ids"].shape[1] - 1) for row in rows)
        targets = sum(row["input_ids"].shape[1] - 1 for row in rows)
        torch.testing.assert_close(model(**batch).loss, alone / targets)

    def test_a_script_without_spaces_between_words_is_said(self):
        with pytest.warns(UserWarning, match="`tokenizer.kind` word divides text at white space"):
            build_tokenizer(TokenizerOptions("word"), ["今天天气很好\n"] * 60)
