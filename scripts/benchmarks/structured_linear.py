"""Blocks with Monarch matrices against dense blocks: training, and decoding with weights that are folded once."""

# B batch, L length, D hidden size

from collections.abc import Iterator
from functools import partial

import torch

from modeling_rtransformer import RTransformerConfig, RTransformerForCausalLM, RTransformerModel
from modeling_rtransformer.library_versions import CACHE_NAME
from modeling_rtransformer.structured_linear import StructuredLinear
from scripts.benchmarks.measuring import Case, backward
from scripts.benchmarks.models import decode_one, sizes


# D, blocks of a Monarch factor, LocalRNNs, B, L, and the target: the time over that of the dense block on a CPU
SHAPES = [(512, 16, 0, 8, 256, 0.45), (512, 16, 1, 8, 256, 0.45), (128, 8, 0, 16, 128, 0.8), (128, 8, 1, 16, 128, 0.8)]


def configs(size: int, blocks: int, num_local_rnns: int, layers: int) -> tuple[RTransformerConfig, RTransformerConfig]:
    """With Monarch matrices, and dense."""
    shared = {**sizes(size, layers, 256), "num_local_rnns": num_local_rnns}
    monarch = RTransformerConfig(**shared, linear_structure="monarch", linear_blocks=blocks)
    return monarch, RTransformerConfig(**shared)


def build_block(size, blocks, num_local_rnns, batch, length, device, small):
    """The forward and backward pass of one block."""
    if small:
        size, blocks, batch, length = 16, 4, 2, 12
    functions = []
    for config in configs(size, blocks, num_local_rnns, 1):
        torch.manual_seed(0)
        model = RTransformerModel(config).to(device).train()
        inputs = torch.randn(batch, length, size, device=device, requires_grad=True)
        wanted = [inputs, *(each for name, each in model.named_parameters() if "embed" not in name)]
        forward = partial(last_hidden_state, model, inputs)
        functions.append(partial(backward, forward, wanted, torch.randn(batch, length, size, device=device)))
    return tuple(functions)


def last_hidden_state(model, inputs):
    return model(inputs_embeds=inputs, use_cache=False).last_hidden_state


@torch.no_grad()
def fold_for_good(model):
    """What `folded_linears` does, without an end."""
    for module in model.modules():
        if isinstance(module, StructuredLinear):
            module.folded = module.fold()


def build_decoding(size, blocks, device, small):
    """One decoded token after 64 others, batch 1; every call adds one token to the cache."""
    size, blocks, context = (16, 4, 12) if small else (size, blocks, 64)
    functions = []
    for config in configs(size, blocks, 1, 1 if small else 3):
        torch.manual_seed(0)
        model = RTransformerForCausalLM(config).to(device).eval()
        fold_for_good(model)
        prompt = torch.randint(256, (1, context), device=device)
        cache = model(prompt, use_cache=True, logits_to_keep=1)[CACHE_NAME]
        functions.append(partial(decode_one, model, prompt[:, :1], cache))
    return tuple(functions)


def cases(device_type: str) -> Iterator[Case]:
    on_gpu = device_type == "cuda"
    for size, blocks, num_local_rnns, batch, length, target in SHAPES:
        mixers = "GRU LocalRNN and attention" if num_local_rnns else "attention"
        name = f"block of {mixers}, B{batch} L{length} D{size}, Monarch {blocks}, forward and backward"
        build = partial(build_block, size, blocks, num_local_rnns, batch, length)
        yield Case(name, "the dense block", build, "time", None if on_gpu else target)
    for size, blocks in ((512, 16), (128, 8)):
        name = f"one decoded token, 3 layers of width {size}, Monarch {blocks}, folded once"
        yield Case(name, "the dense model", partial(build_decoding, size, blocks), "time", 1.05)
