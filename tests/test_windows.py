"""Rows of a token stream: every position once when scored, and the context that each has."""

import numpy as np
import pytest

from scripts.data.windows import IGNORED, Windows


SHAPES = [(1, 9, 8), (8, 9, 8), (9, 9, 8), (10, 9, 8), (100, 9, 8), (101, 9, 4), (63, 17, 1), (64, 17, 5), (200, 2, 1)]


@pytest.mark.parametrize(("length", "window", "stride"), SHAPES, ids=lambda value: str(value))
def test_scoring_predicts_each_position_exactly_once(length, window, stride):
    stream = np.arange(length, dtype=np.int32)
    rows = Windows(stream, window=window, stride=stride, score_once=True)
    predicted = []
    for row in (rows[index] for index in range(len(rows))):
        assert len(row["input_ids"]) == min(window, length)
        scored = row["labels"][1:]
        predicted += scored[scored != IGNORED].tolist()
    assert sorted(predicted) == list(range(1, length))


@pytest.mark.parametrize(("length", "window", "stride"), SHAPES, ids=lambda value: str(value))
def test_training_predicts_every_position_at_least_once(length, window, stride):
    rows = Windows(np.arange(length), window=window, stride=stride, score_once=False)
    labels = {label for index in range(len(rows)) for label in rows[index]["labels"][1:].tolist()}
    assert labels == set(range(1, length))


def test_a_smaller_stride_gives_each_scored_position_more_context():
    rows = Windows(np.arange(300), window=33, stride=8, score_once=True)
    for index in range(1, len(rows)):
        first_scored = (rows[index]["labels"] != IGNORED).nonzero()[0].item()
        assert first_scored >= 33 - 8


def test_iterating_over_rows_ends():
    rows = Windows(np.arange(300), window=33, stride=8, score_once=True)
    assert len(list(rows)) == len(rows)
