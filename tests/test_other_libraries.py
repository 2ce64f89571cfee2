"""Libraries around Transformers, each tried with a tiny model: what they give equals what the model gives."""

import json

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_rtransformer import RTransformerForCausalLM, RTransformerModel
from scripts.data.tokenization import Options, build_tokenizer
from tests.conftest import tiny_config


TEXTS = ["the fox", "a lazy dog sleeps", "the quick brown fox jumps over the dog"]


def save(folder, model_class, **fields):
    """A tiny model, in eval mode, and its tokenizer of characters, saved."""
    tokenizer = build_tokenizer(Options(kind="character"), TEXTS)
    fields = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **fields}
    model = model_class(tiny_config(pad_token_id=tokenizer.pad_token_id, **fields)).eval()
    tokenizer.model_max_length = 64
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_sentence_transformers_takes_the_mean_over_the_base_model(is_causal, tmp_path):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    model, tokenizer = save(tmp_path, RTransformerModel, is_causal=is_causal)
    encoder = SentenceTransformer(modules=[Transformer(str(tmp_path)), Pooling(20, "mean")], device="cpu")
    alone = [model(tokenizer(text, return_tensors="pt").input_ids).last_hidden_state.mean(1)[0] for text in TEXTS]
    found = torch.tensor(encoder.encode(TEXTS))
    torch.testing.assert_close(found, torch.stack(alone).detach(), rtol=1e-5, atol=1e-5)


def test_lm_evaluation_harness_scores_a_task_of_a_local_file(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model, tokenizer = save(tmp_path / "model", RTransformerForCausalLM)
    rows = [
        {"text": "the", "choices": [" fox", " dog jumps"], "answer": 0},
        {"text": "a", "choices": [" dog", " brown fox"], "answer": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ntarget_delimiter: ''\n"
        "doc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: acc}]\n"
    )
    results = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "model"), "device": "cpu", "batch_size": 4},
        tasks=["own"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        log_samples=True,
    )
    for sample, row in zip(results["samples"]["own"], rows):
        for (score, _), choice in zip(sample["filtered_resps"], row["choices"]):
            ids = torch.tensor([tokenizer(row["text"] + choice).input_ids])
            logits = model(ids).logits[0, -len(choice) - 1 : -1].log_softmax(-1)
            expected = logits.gather(1, ids[0, -len(choice) :, None]).sum().item()
            assert float(score) == pytest.approx(expected, rel=1e-4)


def test_trackio_keeps_what_trainer_logs(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))  # which trackio reads when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setenv("TRACKIO_PROJECT", "own")
    model, tokenizer = save(tmp_path / "model", RTransformerForCausalLM)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 20, (8, 9))]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, logging_steps=1, report_to="trackio", save_strategy="no", use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and any((tmp_path / "kept").rglob("*.db"))


@pytest.mark.parametrize("variant", ["gru-and-rsa", "two-lstm", "rsa", "plain-sinusoidal"])
def test_an_executorch_program_gives_what_the_model_gives(variant, tmp_path):
    pytest.importorskip("executorch", reason="executorch is not installed")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    model = RTransformerForCausalLM(tiny_config(variant, use_cache=False)).eval()
    ids = torch.randint(3, 37, (1, 13))

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids, use_cache=False).logits

    program = to_edge_transform_and_lower(
        torch.export.export(Logits(), (ids,), strict=False), partitioner=[XnnpackPartitioner()]
    ).to_executorch()
    (tmp_path / "model.pte").write_bytes(program.buffer)
    method = Runtime.get().load_program(tmp_path / "model.pte").load_method("forward")
    for _ in range(2):
        [logits] = method.execute([ids])
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        ids = torch.randint(3, 37, (1, 13))
