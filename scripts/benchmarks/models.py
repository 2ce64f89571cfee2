"""Whole models: a decoded token against a Llama, and a training step against the authors' computation."""

from collections.abc import Iterator
from functools import partial

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from modeling_rtransformer import FeedbackTransformerConfig, RTransformerConfig, RTransformerForCausalLM
from modeling_rtransformer.block import RTransformerLocalRNN
from modeling_rtransformer.library_versions import CACHE_NAME, named_cache
from scripts.benchmarks.local_rnn import UnfoldedLocalRNN
from scripts.benchmarks.measuring import Case


REM_KINDS = ["regular", "regular", "first_cyclical", "second_cyclical", "none", "none", "none", "none"]


def sizes(hidden_size, num_hidden_layers, vocab_size):
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 8,
        "vocab_size": vocab_size,
    }


@torch.no_grad()
def decode_one(model, token, cache):
    model(token, use_cache=True, **named_cache(cache))


@torch.no_grad()
def build_decoding(device, small):
    """One decoded token after `context` others, batch 1; every call adds one token to the cache."""
    size, layers, context = (16, 1, 12) if small else (512, 6, 4096)
    torch.manual_seed(0)
    shared = sizes(size, layers, 1000)
    ours = RTransformerForCausalLM(RTransformerConfig(**shared, rem_kinds=REM_KINDS))
    llama = LlamaForCausalLM(LlamaConfig(**shared, max_position_embeddings=2 * context))
    functions = []
    for model in (ours, llama):
        model.to(device).eval()
        prompt = torch.randint(1000, (1, context), device=device)
        cache = model(prompt, use_cache=True, logits_to_keep=1)[CACHE_NAME]
        functions.append(partial(decode_one, model, prompt[:, :1], cache))
    return tuple(functions)


def train_one(model, optimizer, ids):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def unfold_local_rnns(model: RTransformerForCausalLM) -> None:
    """Replace every LocalRNN by its definition, as the authors compute it."""
    for module in model.modules():
        if isinstance(module, RTransformerLocalRNN):
            module.rnn = UnfoldedLocalRNN(module.rnn)


def build_training_step(device, small):
    """The authors' PTB-character setting: forward, backward and a step of AdamW."""
    size, length, batch = (16, 20, 2) if small else (512, 400, 16)
    functions = []
    for authors in (False, True):
        torch.manual_seed(0)
        config = RTransformerConfig(**sizes(size, 3, 50), hidden_dropout=0.15, rem_kinds=None, use_cache=False)
        model = RTransformerForCausalLM(config)
        if authors:
            model.set_attn_implementation("eager")
            unfold_local_rnns(model)
        model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        functions.append(partial(train_one, model, optimizer, torch.randint(50, (batch, length), device=device)))
    return tuple(functions)


def build_feedback_step(form, batch, length, size, device, small):
    """Forward and backward of a Feedback Transformer and of a plain Transformer of the same layers."""
    if small:
        batch, length, size = 2, 12, 16
    functions = []
    for config_class, fields in (
        (FeedbackTransformerConfig, {"feedback_form": form}),
        (RTransformerConfig, {"num_local_rnns": 0}),
    ):
        torch.manual_seed(0)
        config = config_class(**sizes(size, 3, 50), use_cache=False, **fields)
        model = AutoModelForCausalLM.from_config(config).to(device).train()
        functions.append(partial(loss_gradient, model, torch.randint(50, (batch, length), device=device)))
    return tuple(functions)


def loss_gradient(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()


def cases(device_type: str) -> Iterator[Case]:
    on_gpu = device_type == "cuda"
    name, reference = "one decoded token, context 4096, 6 layers of width 512", "a Llama of the same layers and width"
    yield Case(name, reference, build_decoding, "time", 1.5 if on_gpu else 2)
    name = "training step, PTB-character setting (3 layers of width 512, B16 L400)"
    yield Case(name, "the authors' computation", build_training_step, target=3 if on_gpu else 2)
    for batch, length, size in ((16, 128, 64), (8, 256, 256)):
        for form in ("steps", "parallel"):
            name = f"Feedback Transformer ({form}), forward and backward, 3 layers, B{batch} T{length} D{size}"
            build = partial(build_feedback_step, form, batch, length, size)
            yield Case(name, "a plain Transformer of the same layers and width", build, "time", 2.5)
