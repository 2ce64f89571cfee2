"""`Trainer` and the libraries around it on the models themselves (the recipes are tested in test_train.py)."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from modeling_rtransformer import RTransformerForCausalLM
from tests.conftest import tiny_config


def rows(count=16, length=None):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist() if length is None else [length] * count
    ids = [torch.randint(3, 37, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


def pad(batch):
    """Right-padded rows; the padding is not scored."""
    longest = max(len(row["input_ids"]) for row in batch)
    columns = {"input_ids": 0, "labels": -100}
    padded = {
        name: torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in batch])
        for name, filler in columns.items()
    }
    return padded | {"attention_mask": (padded["labels"] != -100).long()}


def trained(folder, data, collator=pad, variant="gru-and-rsa", **options):
    """The parameters after four updates from the same beginning."""
    torch.manual_seed(0)
    model = RTransformerForCausalLM(tiny_config(variant))
    args = TrainingArguments(
        output_dir=str(folder), max_steps=4, learning_rate=1e-2, optim="sgd", lr_scheduler_type="constant",
        report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: value.detach().clone() for name, value in model.named_parameters()}, losses


def assert_equal_parameters(ours, theirs):
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_accumulated_gradients_equal_the_large_batch(variant, tmp_path):
    """With rows of unequal length this needs the loss to be divided by the items of the whole batch."""
    large, large_losses = trained(tmp_path, rows(), per_device_train_batch_size=8, variant=variant)
    small, small_losses = trained(
        tmp_path, rows(), per_device_train_batch_size=2, gradient_accumulation_steps=4, variant=variant
    )
    assert_equal_parameters(small, large)
    assert small_losses == pytest.approx(large_losses, abs=1e-4)


def test_padding_free_training_equals_padded_training(variant, tmp_path):
    padded, _ = trained(tmp_path, rows(), per_device_train_batch_size=4, variant=variant)
    for details in ({}, {"return_seq_idx": True}, {"return_flash_attn_kwargs": True}):
        collator = DataCollatorWithFlattening(return_position_ids=not details, **details)
        packed, _ = trained(tmp_path, rows(), collator, per_device_train_batch_size=4, variant=variant)
        assert_equal_parameters(packed, padded)


def test_label_smoothing_runs_and_changes_the_loss(tmp_path):
    _, plain = trained(tmp_path, rows(), per_device_train_batch_size=4)
    _, smoothed = trained(tmp_path, rows(), per_device_train_batch_size=4, label_smoothing_factor=0.1)
    assert all(torch.tensor(smoothed).isfinite()) and smoothed != plain


def test_gradient_checkpointing_trains_the_same(variant, tmp_path):
    plain, _ = trained(tmp_path, rows(), per_device_train_batch_size=4, variant=variant)
    checkpointed, _ = trained(
        tmp_path, rows(), per_device_train_batch_size=4, gradient_checkpointing=True, variant=variant
    )
    assert_equal_parameters(checkpointed, plain)
