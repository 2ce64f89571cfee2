"""A dataset by its name on the Hub; here a local folder, which is read in the same way."""

import pytest

from scripts.data.sources import hub


@pytest.fixture
def dataset(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("body,kind\n" + f"{split} text,1\n" * 20)
    return str(tmp_path)


def test_splits_that_are_not_named_are_held_out(dataset):
    splits = hub.load(hub.Options("hub", dataset, test="test", text_column="body", label_column="kind"))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 18, "validation": 2, "test": 20}
    assert splits["test"][0] == {"text": "test text", "label": 1}


def test_a_missing_split_is_named_with_those_there_are(dataset):
    with pytest.raises(
        ValueError, match="`data.test` is 'tests', but .* has the splits train, test; did you mean `test`"
    ):
        hub.load(hub.Options("hub", dataset, test="tests", text_column="body"))
