"""The data that come with the installation: the standard library's source and scikit-learn's digits."""

import sysconfig
from pathlib import Path, PurePosixPath

import pytest

from scripts.data.sources import digits, stdlib_code


def test_the_library_is_split_by_path_without_tests_or_packages():
    splits = stdlib_code.load(stdlib_code.Options("stdlib_code", max_files=5))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 5, "validation": 5, "test": 5}
    assert all(row["text"] for rows in splits.values() for row in rows)
    kept, left_out = PurePosixPath("json/decoder.py"), ["test/test_json.py", "site-packages/x.py", "lib2to3/tests/a.py"]
    assert stdlib_code.is_source(kept)
    assert not any(
        stdlib_code.is_source(PurePosixPath(path))
        for path in [*left_out, "this.pyc", "_sysconfigdata_x.py", "idlelib/idle_test/a.py"]
    )


def test_the_split_of_a_file_never_changes():
    paths = ["ast.py", "stat.py", "pickle.py", "asyncio/streams.py"]
    assert [stdlib_code.split_of(PurePosixPath(path)) for path in paths] == ["train", "validation", "test", "test"]
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    shares = [stdlib_code.split_of(name) for name in names if stdlib_code.is_source(name)]
    assert shares.count("train") / len(shares) == pytest.approx(0.9, abs=0.04)


def test_files_that_are_not_utf8_are_left_out(tmp_path):
    (tmp_path / "latin.py").write_bytes(b"# na\xefve\n")
    (tmp_path / "good.py").write_text("x = 'ï'\r\n", encoding="utf-8", newline="")
    rows = list(stdlib_code.read(str(tmp_path), (("latin.py",), ("good.py",))))
    assert rows == [{"text": "x = 'ï'\r\n"}]


def test_digits_are_sequences_of_64_pixels_split_evenly():
    splits = digits.load(digits.Options("digits"))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 1437, "validation": 180, "test": 180}
    row = splits["test"].with_format("numpy")[0]
    assert row["input_values"].shape == (64, 1)
    assert 0 <= row["input_values"].min() and row["input_values"].max() <= 1
    for rows in splits.values():
        counts = [rows["label"][:].count(label) for label in range(10)]
        assert max(counts) - min(counts) <= 0.02 * len(rows) + 1
    assert splits["test"]["label"][:] == digits.load(digits.Options("digits"))["test"]["label"][:]
