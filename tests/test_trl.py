"""TRL's SFTTrainer in packing mode, where TRL is installed."""

import pytest
import torch
from datasets import Dataset

from modeling_rtransformer import RTransformerForCausalLM
from tests.conftest import tiny_config


trl = pytest.importorskip("trl", reason="TRL is not installed")


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = {
        token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz "])
    }
    backend = Tokenizer(models.WordLevel(characters, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token=" "
    )


def test_packed_fine_tuning_learns(tokenizer, tmp_path):
    model = RTransformerForCausalLM(tiny_config(vocab_size=len(tokenizer), eos_token_id=2))
    texts = ["the cat sat on the mat", "a dog", "the dog ran to the cat", "who is it"] * 8
    args = trl.SFTConfig(
        output_dir=str(tmp_path), packing=True, max_length=48, max_steps=25, learning_rate=1e-2, logging_steps=1,
        per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["input_ids"] == 2).sum() > 2  # several sequences in a row
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_what_the_packing_collator_gives_keeps_sequences_apart(tokenizer):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collator([{"input_ids": row} for row in rows])
    model = RTransformerForCausalLM(tiny_config()).eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    together = model(**inputs).logits[0]
    alone = torch.cat([model(torch.tensor([row])).logits[0] for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
