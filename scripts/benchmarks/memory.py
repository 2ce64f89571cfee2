"""Models with memory: a token decoded far into a text, and the cost of RSA heads and states in a training step."""

from functools import partial

import torch
from transformers import DynamicCache

from modeling_rtransformer import RTransformerConfig, RTransformerForCausalLM
from modeling_rtransformer.memory import detach_memory
from scripts.benchmarks.measuring import Case
from scripts.benchmarks.models import decode_one


SHARED = {"vocab_size": 256, "num_attention_heads": 8, "num_local_rnns": 0, "lm_head_bias": False}
REM = {
    "rem_kinds": ["first_cyclical"] * 2 + ["second_cyclical"] * 2 + ["none"] * 4,
    "rem_dilations": [3, 6, 9, 12, 1, 1, 1, 1],
}
XL = {"position_embedding": "relative", "norm_position": "post", "final_norm": False, "attention_bias": False}
BRT = {"position_embedding": "t5", "layer_norm_type": "rms", "normalize_keys": True}


def model_of(device: torch.device, **fields) -> RTransformerForCausalLM:
    torch.manual_seed(0)
    return RTransformerForCausalLM(RTransformerConfig(**SHARED, **fields)).to(device)


def decode_several(model, token, cache):
    for _ in range(16):  # one alone takes too short a time
        decode_one(model, token, cache)


def build_far(fields, size, layers, memory, positions, device, small):
    """Sixteen decoded tokens after two numbers of others, batch 1; every call adds them to the cache."""
    if small:
        size, layers, memory, positions = 16, 2, 24, (300, 60)
    fields = {"hidden_size": size, "num_hidden_layers": layers, "memory_length": memory, **fields}
    model = model_of(device, **fields).eval()
    functions = []
    for position in positions:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for begin in range(0, position, 256):
                text = torch.randint(256, (1, min(256, position - begin)), device=device)
                model(text, cache=cache, logits_to_keep=1)
        functions.append(partial(decode_several, model, text[:, :1], cache))
    return tuple(functions)


def train_one(model, optimizer, ids, cache):
    """A step of a stream in its course: the memory is full."""
    model(ids, labels=ids, cache=cache).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    detach_memory(cache)


def build_steps(ours, theirs, sizes, device, small):
    """A training step of two models, each with its memory."""
    batch, length = (2, 16) if small else (sizes["B"], sizes["L"])
    functions = []
    for fields in (ours, theirs):
        if small:
            tiny = {"hidden_size": 16, "num_hidden_layers": 2, "memory_length": min(16, fields["memory_length"])}
            if "recurrent_layers" in fields:
                tiny |= {"recurrent_layers": [1], "block_length": 4, "num_state_vectors": 3}
            fields = {**fields, **tiny}
        model = model_of(device, **fields).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        ids = torch.randint(256, (batch, length), device=device)
        functions.append(partial(train_one, model, optimizer, ids, DynamicCache(config=model.config)))
    return tuple(functions)


def cases(device_type: str) -> list[Case]:
    recurrent = {"recurrent_layers": [1], "block_length": 512, "num_state_vectors": 512}
    found = [
        Case(
            f"16 decoded tokens at position 100,000, {name}, memory 1024, 2 layers of width 512",
            "the same at position 2,000",
            partial(build_far, fields, 512, 2, 1024, (100_000, 2_000)),
            quantity="time",
            target=1.1,
        )
        for name, fields in (("RSA-XL", {**XL, **REM}), ("Block-Recurrent Transformer", {**BRT, **recurrent}))
    ]
    xl = {"hidden_size": 512, "num_hidden_layers": 3, "memory_length": 512, **XL}
    # one of twelve layers is recurrent, as in the published model; the sizes are smaller
    sliding = {"hidden_size": 256, "num_hidden_layers": 12, "memory_length": 255, **BRT}
    states = {"recurrent_layers": [9], "block_length": 256, "num_state_vectors": 256}
    for name, against, ours, theirs, sizes, target in (
        ("RSA-XL", "Transformer-XL", {**xl, **REM}, xl, {"B": 4, "L": 512}, 1.15),
        (
            "Block-Recurrent Transformer",
            "the same sliding window",
            {**sliding, **states},
            sliding,
            {"B": 1, "L": 1024},
            1.35,
        ),
    ):
        size = f"{theirs['num_hidden_layers']} layers of width {theirs['hidden_size']}, B{sizes['B']} L{sizes['L']}"
        found.append(
            Case(
                f"training step, {name}, {size}, memory {theirs['memory_length']}",
                against,
                partial(build_steps, ours, theirs, sizes),
                quantity="time",
                target=target,
            )
        )
    return found
