"""The head for frames: several labels each, or one; what is padded or unlabelled is not scored."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForAudioFrameClassification

from modeling_rtransformer import RTransformerForAudioFrameClassification
from tests.conftest import tiny_config


CLOSE = {"rtol": 1e-5, "atol": 1e-5}
FEATURES, LABELS = 3, 4


def frame_model(variant="gru-and-rsa", **fields):
    fields = {"num_input_features": FEATURES, "num_labels": LABELS, **fields}
    return RTransformerForAudioFrameClassification(tiny_config(variant, **fields)).eval()


def padded(lengths, side, filler):
    """Values and multi-label targets of rows of these lengths, and both as one padded batch with its mask."""
    rows = [(torch.randn(n, FEATURES), torch.randint(0, 2, (n, LABELS)).float()) for n in lengths]
    longest = max(lengths)
    values, labels = filler * torch.randn(len(rows), longest, FEATURES), torch.ones(len(rows), longest, LABELS)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, (row, targets) in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        values[index, place], labels[index, place], mask[index, place] = row, targets, 1
    return rows, values, labels, mask


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_the_logits_nor_the_loss(variant, side, is_causal):
    model = frame_model(variant, is_causal=is_causal)
    rows, values, labels, mask = padded((9, 17, 1), side, filler=5.0)
    output = model(input_values=values, attention_mask=mask, labels=labels)
    losses = []
    for index, (row, targets) in enumerate(rows):
        alone = model(input_values=row[None]).logits[0]
        torch.testing.assert_close(output.logits[index, mask[index].bool()], alone, **CLOSE)
        losses.append(F.binary_cross_entropy_with_logits(alone, targets, reduction="none"))
    torch.testing.assert_close(output.loss, torch.cat(losses).mean(), **CLOSE)
    ignored = labels.masked_fill(mask[..., None] == 0, -100)
    torch.testing.assert_close(model(input_values=values, attention_mask=mask, labels=ignored).loss, output.loss)


def test_the_loss_is_the_mean_over_the_labels_that_are_there():
    model = frame_model()
    values, labels = torch.randn(2, 7, FEATURES), torch.rand(2, 7, LABELS)
    labels[0, 2:5, 1] = labels[1, 6] = -100
    output = model(input_values=values, labels=labels)
    known = labels != -100
    expected = F.binary_cross_entropy_with_logits(output.logits[known], labels[known])
    torch.testing.assert_close(output.loss, expected)
    summed = model(input_values=values, labels=labels, num_items_in_batch=torch.tensor(10)).loss
    torch.testing.assert_close(summed, expected * known.sum() / 10)


@pytest.mark.parametrize("dtype", [torch.int8, torch.long, torch.float16], ids=str)
def test_labels_of_any_type_give_the_same_loss(dtype):
    model = frame_model()
    values, labels = torch.randn(2, 7, FEATURES), torch.randint(0, 2, (2, 7, LABELS))
    labels[1, 3:] = -100
    expected = model(input_values=values, labels=labels.float()).loss
    torch.testing.assert_close(model(input_values=values, labels=labels.to(dtype)).loss, expected)


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_one_label_a_frame_is_scored_by_the_cross_entropy(problem_type):
    model = frame_model(problem_type=problem_type)
    _, values, _, mask = padded((9, 5), "right", filler=1.0)
    labels = torch.randint(0, LABELS, (2, 9))
    labels[0, 4] = -100
    output = model(input_values=values, attention_mask=mask, labels=labels)
    known = mask.bool() & (labels != -100)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits[known], labels[known]))


def test_a_batch_without_a_scored_label_has_the_loss_zero_and_no_gradient():
    model = frame_model()
    loss = model(input_values=torch.randn(1, 3, FEATURES), labels=torch.full((1, 3, LABELS), -100.0)).loss
    loss.backward()
    assert loss.item() == 0 and not model.score.weight.grad.any()


def test_a_causal_model_does_not_look_ahead(variant):
    model = frame_model(variant)
    values = torch.randn(1, 17, FEATURES)
    changed = values.clone()
    changed[:, 11:] += 1
    before, after = model(input_values=values).logits, model(input_values=changed).logits
    assert torch.equal(before[:, :11], after[:, :11]) and not torch.allclose(before[:, 11:], after[:, 11:])


def test_every_parameter_learns(variant):
    model = frame_model(variant, is_causal=False).train()
    model(input_values=torch.randn(2, 9, FEATURES), labels=torch.ones(2, 9, LABELS)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("features", [FEATURES, None], ids=["values", "ids"])
def test_a_saved_model_is_loaded_by_its_auto_class(variant, features, tmp_path):
    model = frame_model(variant, num_input_features=features)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForAudioFrameClassification.from_pretrained(tmp_path)
    assert type(loaded) is RTransformerForAudioFrameClassification
    inputs = {"input_ids": torch.randint(3, 37, (2, 7))} if features is None else {"input_values": torch.randn(2, 7, 3)}
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("fields", "labels", "message"),
    [
        ({}, torch.ones(2, 7), r"`labels` must lie in \[0, 3\]"),
        ({}, torch.ones(2, 6, 4), r"`labels` must have the shape \(batch, length = 7\) or .* got \(2, 6, 4\)"),
        ({}, torch.ones(2, 7, 5), r"`num_labels` = 4\) .* got \(2, 7, 5\)"),
        ({"problem_type": "multi_label_classification"}, torch.ones(2, 7), r"`num_labels` = 4\) .* got \(2, 7\)"),
        ({"problem_type": "single_label_classification"}, torch.ones(2, 7, 4), r"length = 7\) .* got \(2, 7, 4\)"),
        ({"problem_type": "regression"}, torch.ones(2, 7, 4), "`problem_type` must be .* got 'regression'"),
        ({}, torch.full((2, 7, 4), 2.0), r"`labels` must lie in \[0, 1\], or be -100 where not scored, got 2.0"),
        ({}, torch.full((2, 7, 4), float("nan")), r"`labels` must lie in \[0, 1\], .* got nan"),
    ],
)
def test_labels_that_do_not_fit_are_refused(fields, labels, message):
    if labels.dim() == 2:
        labels = labels.long() + 9
    with pytest.raises(ValueError, match=message):
        frame_model(**fields)(input_values=torch.randn(2, 7, FEATURES), labels=labels)
