"""Half precision: the error against float64 is what a plain attention model of the same size has."""

import pytest
import torch

from modeling_rtransformer import RTransformerForCausalLM
from tests.conftest import VARIANTS, tiny_config


PLAIN = {"num_local_rnns": 0, "rem_kinds": None}


def logits_error(dtype, autocast=False, **fields):
    """Largest error of the logits in `dtype` over several seeds, relative to their size in float64."""
    errors = []
    for seed in range(5):
        torch.manual_seed(seed)
        config = tiny_config("gru-and-rsa", hidden_size=80, initializer_range=0.1, **fields)
        model = RTransformerForCausalLM(config).eval()
        ids = torch.randint(3, 37, (2, 50))
        with torch.no_grad():
            exact = model.double()(ids).logits
            model = model.float() if autocast else model.to(dtype)
            with torch.autocast("cpu", dtype=dtype, enabled=autocast):
                logits = model(ids).logits
        assert logits.dtype == dtype
        errors.append(((logits.double() - exact).abs().max() / exact.abs().max()).item())
    return max(errors)


@pytest.mark.parametrize("variant", ["gru", "rsa", "gru-and-rsa", "two-lstm", "attentive"])
@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_as_exact_as_for_plain_attention(dtype, autocast, variant):
    fields = {**PLAIN, **VARIANTS[variant]}
    assert logits_error(dtype, autocast, **fields) <= 2 * logits_error(dtype, autocast, **PLAIN)


def test_gates_and_powers_are_computed_in_float32():
    model = RTransformerForCausalLM(tiny_config("rsa")).to(torch.bfloat16)
    recurrence = model.model.layers[0].self_attn.recurrence
    heads = recurrence.heads()
    assert heads.decay.dtype == heads.angle.dtype == recurrence.gates().dtype == torch.float32
    assert recurrence.matrix(torch.arange(9), 9).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_training_in_autocast_gives_finite_gradients(variant, dtype):
    model = RTransformerForCausalLM(tiny_config(variant)).train()
    ids = torch.randint(3, 37, (2, 23))
    with torch.autocast("cpu", dtype=dtype):
        loss = model(ids, labels=ids).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
