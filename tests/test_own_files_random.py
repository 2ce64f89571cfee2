"""Random tables in random dialects, and damaged files: a result that is right, or one clear line."""

import bz2
import csv
import gzip
import json
import random
import string

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.data.sources import files, time_series
from scripts.data.sources.files import examples
from scripts.data.sources.reader import ReaderOptions, rows


NAMES = st.text(string.ascii_letters + string.digits + "_ äö", min_size=1, max_size=8).map(str.strip).filter(bool)
CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1, max_size=12)
DIALECTS = st.fixed_dictionaries(
    {
        "delimiter": st.sampled_from(",;\t|"),
        "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
        "lineterminator": st.sampled_from(["\n", "\r\n"]),
        "encoding": st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
        "compress": st.sampled_from([bytes, gzip.compress, bz2.compress]),
    }
)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def tables(draw):
    names = draw(st.lists(NAMES, min_size=2, max_size=5, unique=True))
    return names, draw(st.lists(st.lists(CELLS, min_size=len(names), max_size=len(names)), min_size=3, max_size=8))


def write(path, names, cells, dialect):
    text = path.with_suffix(".text")
    form = {key: dialect[key] for key in ("delimiter", "quoting", "lineterminator")}
    with open(text, "w", encoding=dialect["encoding"], newline="") as file:
        csv.writer(file, **form).writerows([names, *cells])
    path.write_bytes(dialect["compress"](text.read_bytes()))
    return str(path)


@QUICK
@given(table=tables(), dialect=DIALECTS)
def test_a_named_dialect_gives_back_every_cell(tmp_path, table, dialect):
    names, cells = table
    path = write(tmp_path / "t.csv", names, cells, dialect)
    found = [row for _, row in rows(path, ReaderOptions(delimiter=dialect["delimiter"]))]
    assert [list(row.values()) for row in found] == cells and list(found[0]) == names


@QUICK
@given(
    cells=st.lists(
        st.tuples(st.text(string.ascii_letters + " ,;|.'", min_size=1, max_size=20), NAMES), min_size=3, max_size=9
    ),
    dialect=DIALECTS,
)
def test_a_recognised_dialect_gives_back_texts_and_labels(tmp_path, cells, dialect):
    path = write(tmp_path / "t.csv", ["body", "kind"], cells, dialect)
    found = [
        (row["text"], row["label"]) for row in examples([path], {"body": "text", "kind": "label"}, ReaderOptions())
    ]
    assert found == cells


@QUICK
@given(
    values=st.lists(st.tuples(*[st.floats(-1e6, 1e6).map(lambda x: round(x, 4))] * 2), min_size=4, max_size=12),
    decimal=st.sampled_from(".,"),
    dialect=DIALECTS,
)
def test_numbers_of_every_dialect_are_the_numbers(tmp_path, values, decimal, dialect):
    texts = [[f"2024-01-{n + 1:02}", *(f"{x:.4f}".replace(".", decimal) for x in row)] for n, row in enumerate(values)]
    path = write(tmp_path / "t.csv", ["date", "a", "b"], texts, dialect)
    found = time_series.read_series(time_series.Options("time_series", dataset="table", file=path))
    np.testing.assert_array_equal(found.to_numpy(), np.array(values, dtype=float))
    assert found.index[0] == pd.Timestamp("2024-01-01")


@QUICK
@given(table=tables(), suffix=st.sampled_from(["json", "jsonl", "parquet"]))
def test_json_and_parquet_give_back_every_cell(tmp_path, table, suffix):
    names, cells = table
    records = [dict(zip(names, row, strict=True)) for row in cells]
    path = tmp_path / f"t.{suffix}"
    if suffix == "parquet":
        pd.DataFrame(records).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, records)) if suffix == "jsonl" else json.dumps(records, indent=1))
    assert [row for _, row in rows(str(path), ReaderOptions())] == records


# --- damaged files ---


def whole_files():
    """Valid files of every kind, by their suffix, with the columns date, body, kind, a."""
    frame = pd.DataFrame(
        {
            "date": pd.date_range("2024-01-01", periods=60).astype(str),
            "body": [f"täxt {n}, of things" for n in range(60)],
            "kind": [f"k{n % 3}" for n in range(60)],
            "a": np.arange(60) % 7 / 4,
        }
    )
    text = frame.to_csv(index=False)
    return {
        "csv": text.encode(),
        "tsv": frame.to_csv(index=False, sep="\t").encode("utf-16"),
        "csv.gz": gzip.compress(text.encode(), mtime=0),
        "json": frame.to_json(orient="records").encode(),
        "jsonl": frame.to_json(orient="records", lines=True).encode(),
        "parquet": frame.to_parquet(),
        "txt": text.encode(),
    }


def damaged(content, dice):
    """The content cut, with flipped or inserted bytes, doubled, or as it is."""
    content, kind = bytearray(content), dice.randrange(6)
    if kind == 0:
        return bytes(content[: dice.randrange(len(content))])
    if kind == 1:
        return bytes(content[dice.randrange(len(content)) :])
    if kind == 2:
        return bytes(content) * 2
    for _ in range(dice.randrange(1, 9) if kind < 5 else 0):
        place = dice.randrange(len(content))
        if kind == 3:
            content[place] ^= 1 << dice.randrange(8)
        else:
            content[place:place] = dice.randbytes(dice.randrange(1, 4))
    return bytes(content)


def outcome(read):
    """What reading gives: a result, or one line that names the data."""
    try:
        return read()
    except (ValueError, OSError) as error:
        message = str(error)
        assert "\n" not in message and len(message) < 900, message
        assert "`data" in message or "fuzz" in message, message
        return message


def fuzz(folder, seed):
    dice, kinds = random.Random(seed), whole_files()
    written, named = dice.choice(list(kinds)), dice.choice(list(kinds))
    path = folder / f"fuzz.{written if dice.random() < 0.7 else named}"
    path.write_bytes(damaged(kinds[written], dice))
    columns = {"body": "text", "kind": "label"} if not path.name.endswith("txt") else {"text": "text"}

    def read_table():
        return [row for row in examples(files.find_files(str(path), "data.train", options), columns, options)]

    def read_series():
        return time_series.read_series(
            time_series.Options("time_series", dataset="table", file=str(path), columns=["a"], time_column="date")
        )

    options = ReaderOptions()
    return [outcome(read_table), outcome(read_series)]


def test_a_damaged_file_gives_a_result_or_one_clear_line(tmp_path):
    found = [result for seed in range(150) for result in fuzz(tmp_path, seed)]
    assert sum(isinstance(result, str) for result in found) > 50
    assert sum(not isinstance(result, str) for result in found) > 50


@pytest.mark.slow
def test_two_thousand_damaged_files_give_a_result_or_one_clear_line(tmp_path):
    for seed in range(1000, 3000):
        fuzz(tmp_path, seed)
