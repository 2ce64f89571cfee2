"""The metrics against values worked out by hand, and the language model's path to them."""

import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from scripts.metrics import METRIC_FUNCTIONS
from scripts.tasks.language_modeling import ESCAPE_NATS, compressed_bits_per_character, language_metrics, row_nll
from scripts.tasks.sequence_classification import classification_metrics


def test_bits_per_character_is_all_bits_over_all_characters():
    result = METRIC_FUNCTIONS["bits_per_character"](nll=[3 * math.log(2), math.log(2)], count=[1, 7])
    assert result == pytest.approx(4 / 8)


def test_perplexity_is_exp_of_the_mean_over_tokens_not_over_parts():
    result = METRIC_FUNCTIONS["perplexity"](nll=[math.log(4), 3 * math.log(2)], count=[1, 3])
    assert result == pytest.approx(2 ** (5 / 4))


def test_accuracy_and_f1_of_a_worked_example():
    prediction = EvalPrediction(predictions=np.array([0, 0, 1, 2]), label_ids=np.array([0, 1, 1, 1]))
    found = classification_metrics(prediction, metrics=["accuracy", "f1"])
    # class 0: precision 1/2, recall 1; class 1: precision 1, recall 1/3; class 2: never right
    macro = (2 / 3 + 1 / 2 + 0) / 3
    assert found == {"accuracy": 0.5, "f1": pytest.approx(macro)}


def test_the_likelihood_of_a_row_sums_its_scored_positions():
    logits = torch.randn(3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    labels = torch.randint(5, (3, 7), generator=torch.Generator().manual_seed(1))
    labels[1, :4] = -100
    labels[2] = -100
    expected = [
        sum(-logits[b, t - 1].double().log_softmax(-1)[labels[b, t]] for t in range(1, 7) if labels[b, t] != -100)
        for b in range(3)
    ]
    assert row_nll(logits, labels).tolist() == pytest.approx([float(value) for value in expected], rel=1e-6)


def prediction(labels):
    return EvalPrediction(predictions=np.array([2.0, 3.0]), label_ids=np.array(labels))


def test_language_metrics_count_what_was_scored():
    # ids: 0 <pad>, 1 <unk>, 2 <eos>, 3 and 4 characters; the first column is never predicted
    labels = [[3, 3, 4, 2], [-100, -100, 4, 3]]
    result = language_metrics(
        prediction(labels), metrics=["bits_per_character", "perplexity"], characters=[0, 1, 0, 1, 1], unknown_id=1
    )
    assert result["bits_per_character"] == pytest.approx(5 / math.log(2) / 4)  # <eos> costs, but is no character
    assert result["perplexity"] == pytest.approx(math.exp(5 / 5))


def test_an_unknown_character_is_not_scored_for_free():
    labels = [[3, 1, 4, 1], [-100, -100, 4, 3]]
    result = language_metrics(
        prediction(labels), metrics=["bits_per_character"], characters=[0, 1, 0, 1, 1], unknown_id=1
    )
    assert result["bits_per_character"] == pytest.approx((5 + 2 * ESCAPE_NATS) / math.log(2) / 5)
    assert ESCAPE_NATS / math.log(2) == pytest.approx(20.0875, abs=1e-4)


@pytest.mark.parametrize("compressor", ["gzip", "bzip2", "xz"])
def test_a_compressor_is_measured_in_bits_per_character(compressor):
    assert 0 < compressed_bits_per_character(["ab" * 5000, "ab" * 5000], compressor) < 0.1
    assert compressed_bits_per_character(["木" * 20000], compressor) < 0.1
