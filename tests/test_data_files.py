"""A user's own files: formats, splits, columns, and what is said when something is wrong."""

import json

import pandas as pd
import pytest

from scripts.data.sources import files
from scripts.tasks.sequence_classification import class_index, label_texts, number_labels
from tests.tiny_recipe import write_table, write_text


ROWS = [{"body": f"text {n}", "kind": n % 3} for n in range(40)]


def write(path):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif path.suffix == ".parquet":
        pd.DataFrame(ROWS).to_parquet(path)
    else:
        pd.DataFrame(ROWS).to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return str(path)


def options(**settings):
    return files.Options(source="files", **settings)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_of_every_format_give_the_same_rows(tmp_path, suffix):
    train = write(tmp_path / f"table.{suffix}")
    splits = files.load(options(train=train, text_column="body", label_column="kind"))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 32, "validation": 4, "test": 4}
    assert set(splits["train"].column_names) == {"text", "label"}
    rows = [(row["text"], row["label"]) for split in splits.values() for row in split]
    assert sorted(rows) == sorted((row["body"], str(row["kind"])) for row in ROWS)


def test_held_out_rows_follow_from_the_seed(tmp_path):
    train = str(write_table(tmp_path))
    first, again, other = (
        files.load(options(train=train, text_column="body", seed=seed))["test"]["text"] for seed in (0, 0, 1)
    )
    assert list(first) == list(again) != list(other)


def test_named_splits_are_used_as_they_are(tmp_path):
    train, test = write(tmp_path / "train.csv"), write(tmp_path / "test.csv")
    splits = files.load(options(train=train, test=test, text_column="body"))
    assert (len(splits["train"]), len(splits["validation"]), len(splits["test"])) == (36, 4, 40)


@pytest.mark.parametrize("lines", [30, 101])
def test_a_text_is_one_document_whose_end_is_held_out_at_a_line_end(tmp_path, lines):
    path = write_text(tmp_path, lines)
    splits = files.load(options(train=str(path)))
    parts = [splits[split]["text"][0] for split in ("train", "validation", "test")]
    assert "".join(parts) == path.read_text()
    assert all(part.endswith("\n") for part in parts)
    assert parts[1].count("\n") == pytest.approx(lines / 10, abs=1)


def test_several_texts_are_several_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\n" * 20)  # line ends are read as Python reads them
    (tmp_path / "b.md").write_text("b\n" * 20)
    splits = files.load(
        options(train=[str(tmp_path / "a.txt"), str(tmp_path / "b.md")], validation=str(tmp_path / "b.md"))
    )
    assert splits["train"]["text"][:] == ["a\n" * 18, "b\n" * 18]
    assert splits["test"]["text"][:] == ["a\n" * 2, "b\n" * 2]


def test_a_missing_file_is_named_with_the_nearest(tmp_path):
    write_text(tmp_path)
    with pytest.raises(FileNotFoundError, match="`data.train` names '.*corpse.txt', which is not a file.*corpus.txt"):
        files.load(options(train=str(tmp_path / "corpse.txt")))


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="`data.validation` names '.*empty.txt', which is empty"):
        files.load(options(train=str(write_text(tmp_path)), validation=str(tmp_path / "empty.txt")))


def test_no_file_at_all_is_refused():
    with pytest.raises(ValueError, match="`data.train` names no file"):
        files.load(options(train=[]))


def test_an_unknown_suffix_asks_for_the_format(tmp_path):
    (tmp_path / "data.dat").write_text("x")
    with pytest.raises(ValueError, match="`data.format` is missing, and the suffix of '.*data.dat' is unknown"):
        files.load(options(train=str(tmp_path / "data.dat")))
    assert files.load(options(train=str(write_text(tmp_path)), format="text"))["train"].num_rows == 1


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    train = str(write_table(tmp_path))
    with pytest.raises(ValueError, match="`data.text_column` is 'text', but .*table.csv has the columns body, kind"):
        files.load(options(train=train))
    with pytest.raises(ValueError, match="`data.label_column` is 'kinds', .*did you mean `kind`"):
        files.load(options(train=train, text_column="body", label_column="kinds"))


def test_cells_that_are_empty_or_no_text_are_named(tmp_path):
    (tmp_path / "gaps.csv").write_text("body,kind\n" + "x,a\n,b\n" * 20)
    with pytest.raises(ValueError, match="`data.text_column` 'body' is empty, in line 3 of .*gaps.csv; correct or"):
        files.load(options(train=str(tmp_path / "gaps.csv"), text_column="body"))
    with pytest.raises(
        ValueError, match="`data.text_column` 'kind' holds int, not text, in line 1 of .* name another column of body"
    ):
        files.load(options(train=write(tmp_path / "t.jsonl"), text_column="kind"))


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "table.parquet").write_text("body,kind\n")
    with pytest.raises(ValueError, match="table.parquet cannot be read as parquet .*`data.format`"):
        files.load(options(train=str(tmp_path / "table.parquet"), text_column="body"))
    (tmp_path / "latin.txt").write_bytes(b"na\xefve\n" * 9)
    with pytest.raises(
        ValueError, match="latin.txt cannot be read as text: 'utf-8' .* name its encoding as `data.encoding`"
    ):
        files.load(options(train=str(tmp_path / "latin.txt")))


def test_an_empty_split_is_named(tmp_path):
    (tmp_path / "table.csv").write_text("body,kind\nonly one,a\n")
    with pytest.raises(ValueError, match="the validation split of `data` is empty .*`data.validation`"):
        files.load(options(train=str(tmp_path / "table.csv"), text_column="body"))


def test_text_labels_are_numbered_in_order(tmp_path):
    splits = files.load(options(train=str(write_table(tmp_path)), text_column="body", label_column="kind"))
    labels = {split: label_texts(rows, split) for split, rows in splits.items()}
    names, index = class_index(labels["train"], None)
    assert names == ["apple", "bread", "cheese"]
    for text, number in zip(splits["test"]["text"], number_labels(labels["test"], index, "test"), strict=True):
        assert names[number] in text
    assert class_index(labels["train"], ["cheese", "bread", "apple"])[1] == {"cheese": 0, "bread": 1, "apple": 2}


def test_labels_outside_the_classes_are_named(tmp_path):
    splits = files.load(options(train=write(tmp_path / "t.csv"), text_column="body", label_column="kind"))
    labels = label_texts(splits["train"], "train")
    assert class_index(labels, None)[0] == ["0", "1", "2"]
    with pytest.raises(
        ValueError, match=r"label '\d' in row \d+ of the train split is outside the 2 classes \(a, b\); mend"
    ):
        number_labels(labels, class_index(labels, ["a", "b"])[1], "train")
    texts = files.load(options(train=str(write_table(tmp_path)), text_column="body", label_column="kind"))
    labels = label_texts(texts["train"], "train")
    with pytest.raises(
        ValueError, match="label 'bread' in row .* did you mean `breads`.*list every class in `task.labels`"
    ):
        number_labels(labels, class_index(labels, ["apple", "breads", "cheese"])[1], "train")
