"""Loading in all the ways that large models are loaded."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from modeling_rtransformer import RTransformerForCausalLM
from tests.conftest import tiny_config


CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def saved(variant, folder, **options):
    model = RTransformerForCausalLM(tiny_config(variant)).eval()
    model.save_pretrained(folder, **options)
    return model, torch.randint(3, 37, (2, 11))


def test_a_sharded_checkpoint_is_the_same_model(variant, tmp_path):
    model, ids = saved(variant, tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_a_device_map_places_it(variant, device_map, tmp_path):
    model, ids = saved(variant, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **CLOSE)


def test_weights_that_lie_on_disk_are_fetched_when_they_are_needed(variant, tmp_path):
    from accelerate import disk_offload

    model, ids = saved(variant, tmp_path / "model")
    expected = model(ids).logits
    disk_offload(model, tmp_path / "offload", execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"], ids=str)
def test_it_loads_in_another_dtype(dtype, tmp_path):
    _, ids = saved("gru-and-rsa", tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == (torch.float32 if dtype == "auto" else dtype)
    assert loaded(ids).logits.isfinite().all()


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForMaskedLM], ids=["causal", "masked"])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_can_be_resized(tied, auto_class, tmp_path):
    model = auto_class.from_config(tiny_config(tie_word_embeddings=tied)).eval()
    ids = torch.randint(3, 37, (2, 11))
    before = model(ids).logits
    model.resize_token_embeddings(45)
    assert model.config.vocab_size == 45 and model.lm_head.bias.shape == (45,)
    torch.testing.assert_close(model(ids).logits[..., :37], before)
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert loaded(torch.tensor([[44]])).logits.shape == (1, 1, 45)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied
