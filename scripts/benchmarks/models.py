"""Whole models: a decoded token against a Llama, and a training step against the authors' computation."""

import tempfile
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from modeling_rtransformer import RTransformerConfig, RTransformerForCausalLM
from modeling_rtransformer.block import RTransformerLocalRNN
from modeling_rtransformer.library_versions import CACHE_NAME, named_cache
from scripts.benchmarks.local_rnn import UnfoldedLocalRNN
from scripts.benchmarks.measuring import Case


REM_KINDS = ["regular", "regular", "first_cyclical", "second_cyclical", "none", "none", "none", "none"]


@torch.no_grad()
def decode_one(model, token, cache):
    model(token, use_cache=True, **named_cache(cache))


def build_decoding(size, layers, context, device, small):
    """One decoded token after `context` others, batch 1; every call adds one token to the cache."""
    if small:
        size, layers, context = 16, 1, 12
    torch.manual_seed(0)
    shared = {
        "vocab_size": 1000,
        "hidden_size": size,
        "intermediate_size": 4 * size,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
    }
    ours = RTransformerForCausalLM(RTransformerConfig(**shared, rem_kinds=REM_KINDS))
    llama = LlamaForCausalLM(LlamaConfig(**shared, max_position_embeddings=2 * context))
    functions = []
    for model in (ours, llama):
        model.to(device).eval()
        prompt = torch.randint(1000, (1, context), device=device)
        with torch.no_grad():
            cache = model(prompt, use_cache=True, logits_to_keep=1)[CACHE_NAME]
        functions.append(partial(decode_one, model, prompt[:, :1], cache))
    return tuple(functions)


def train_one(trainer, batch):
    trainer.accelerator.backward(trainer.compute_loss(trainer.model, batch))
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def unfold_local_rnns(model: RTransformerForCausalLM) -> None:
    """Replace every LocalRNN by its definition, as the authors compute it."""
    for module in model.modules():
        if isinstance(module, RTransformerLocalRNN):
            module.rnn = UnfoldedLocalRNN(module.rnn).to(module.rnn.input_proj.weight.device)


def build_training_step(device, small):
    """The authors' PTB-character setting, in the same Trainer: forward, backward and an optimizer step."""
    size, length, batch = (16, 20, 2) if small else (512, 400, 16)
    functions = []
    for authors in (False, True):
        torch.manual_seed(0)
        config = RTransformerConfig(
            vocab_size=50,
            hidden_size=size,
            intermediate_size=4 * size,
            num_hidden_layers=3,
            num_attention_heads=8,
            hidden_dropout=0.15,
            rem_kinds=None,
            use_cache=False,
        )
        model = RTransformerForCausalLM(config)
        if authors:
            model.set_attn_implementation("eager")
            unfold_local_rnns(model)
        settings = {"use_cpu": device.type == "cpu", "max_steps": 1, "learning_rate": 1e-4, "report_to": "none"}
        trainer = Trainer(model, TrainingArguments(tempfile.gettempdir(), **settings))  # nothing is written to it
        trainer.create_optimizer()
        ids = torch.randint(50, (batch, length), device=device)
        functions.append(partial(train_one, trainer, {"input_ids": ids, "labels": ids}))
    return tuple(functions)


def cases(device_type: str) -> list[Case]:
    on_gpu = device_type == "cuda"
    return [
        Case(
            "one decoded token, context 4096, 6 layers of width 512",
            "a Llama of the same layers and width",
            partial(build_decoding, 512, 6, 4096),
            quantity="time",
            target=1.5 if on_gpu else 2,
            tokens=1,
        ),
        Case(
            "training step, PTB-character setting (3 layers of width 512, B16 L400)",
            "the authors' computation",
            build_training_step,
            target=3 if on_gpu else 2,
            tokens=16 * 400,
        ),
    ]
