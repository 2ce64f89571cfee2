"""A Llama with RSA heads added by `add_rsa` against the same Llama: a training step and a decoded token."""

from collections.abc import Iterator
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_rtransformer import HAS_PEFT
from modeling_rtransformer.library_versions import CACHE_NAME
from scripts.benchmarks.measuring import Case
from scripts.benchmarks.models import decode_one, sizes


LENGTH = 512
# width, batch, most of the base model's time in training and for a decoded token
SHAPES = [(256, 4, 1.10, 1.25), (1024, 1, 1.05, 1.05)]


def build_models(size, device, small):
    """A Llama of 4 layers with a REM in each of its 8 heads, all parameters trained, and the Llama alone."""
    from peft import inject_adapter_in_model

    from modeling_rtransformer import RsaConfig

    config = LlamaConfig(**sizes(32 if small else size, 4, 1000), max_position_embeddings=2 * LENGTH)
    models = []
    for has_rsa in (True, False):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        if has_rsa:
            inject_adapter_in_model(RsaConfig(regular=4, first_cyclical=2, second_cyclical=2), model)
            for name, parameter in model.named_parameters():
                if name.endswith("mu"):
                    torch.nn.init.constant_(parameter, 0.5)
        models.append(model.requires_grad_(True).to(device))
    return models


def train_one(model, batch):
    model(**batch, use_cache=False).loss.backward()
    model.zero_grad()


def build_training_step(size, batch, padded, device, small):
    """Forward and backward; with padding, the rows begin with 0, 40, 80, ... padded positions."""
    length = 24 if small else LENGTH
    ids = torch.randint(1000, (max(batch, 2) if padded else batch, length), device=device)
    arguments = {"input_ids": ids, "labels": ids}
    if padded:
        starts = torch.arange(len(ids), device=device)[:, None] * (length // 12)
        arguments["attention_mask"] = (torch.arange(length, device=device) >= starts).long()
    return tuple(partial(train_one, model.train(), arguments) for model in build_models(size, device, small))


def build_decoding(size, device, small):
    """One decoded token after `LENGTH` others, batch 1; every call adds one token to the cache."""
    functions = []
    for model in build_models(size, device, small):
        prompt = torch.randint(1000, (1, 24 if small else LENGTH), device=device)
        with torch.no_grad():
            cache = model.eval()(prompt, use_cache=True, logits_to_keep=1)[CACHE_NAME]
        functions.append(partial(decode_one, model, prompt[:, :1], cache))
    return tuple(functions)


def cases(device_type: str) -> Iterator[Case]:
    for size, batch, training, decoding in SHAPES if HAS_PEFT else ():
        for padded in (False, True):
            name = f"training step with add_rsa, width {size}" + (", padded rows" if padded else "")
            build = partial(build_training_step, size, batch, padded)
            yield Case(name, "the Llama alone", build, quantity="time", target=training)
        name = f"decoded token with add_rsa, width {size}"
        yield Case(name, "the Llama alone", partial(build_decoding, size), quantity="time", target=decoding)
