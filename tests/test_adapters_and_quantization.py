"""LoRA with PEFT and integer weights, where these optional libraries are installed."""

import pytest
import torch

from modeling_rtransformer import RTransformerForCausalLM
from tests.conftest import tiny_config


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
LOCAL_RNN = ["input_proj", "recurrent_proj"]


def lora(variant, targets, **options):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, **options)
    return peft.get_peft_model(RTransformerForCausalLM(tiny_config(variant)), config)


@pytest.mark.parametrize("targets", [ATTENTION, LOCAL_RNN, ["recurrent_proj"]], ids=["attention", "rnn", "recurrent"])
@pytest.mark.parametrize("variant", ["gru", "two-lstm", "gru-and-rsa"])
def test_an_adapter_learns_and_merges(variant, targets):
    model = lora(variant, targets)
    ids = torch.randint(3, 37, (4, 12))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    touched = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(any(target in name for target in targets) for name in touched)
    model.eval()
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=ids).logits, adapted, atol=1e-3)
        merged = model.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)


def test_an_adapter_is_saved_and_loaded_alone(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = lora("gru-and-rsa", ATTENTION + LOCAL_RNN, init_lora_weights=False).eval()
    ids = torch.randint(3, 37, (2, 12))
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    base = RTransformerForCausalLM(tiny_config("gru-and-rsa"))
    base.load_state_dict(model.unload().state_dict())
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("variant", ["gru-and-rsa", "two-lstm"])
def test_integer_weights_give_nearly_the_same_logits(variant, weights, tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import TorchAoConfig

    model = RTransformerForCausalLM(tiny_config(variant, hidden_size=160, initializer_range=0.05)).eval()
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 37, (2, 12))
    expected = model(ids).logits
    recipe = {
        "int8": lambda: torchao.Int8WeightOnlyConfig(),
        "int4": lambda: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    }[weights]()
    quantized = RTransformerForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(recipe))
    recurrent = quantized.model.layers[0].local_rnns[0].rnn.recurrent_proj.weight
    assert type(recurrent) is not torch.nn.Parameter or "int" in str(recurrent)
    error = (quantized(ids).logits - expected).abs().max() / expected.abs().max()
    assert 0 < error < {"int8": 0.05, "int4": 0.5}[weights]
