"""Engines that keep keys and values themselves: a model is right there, or it is refused before the first token."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from modeling_rtransformer import RTransformerForCausalLM, RTransformerModel, engines
from scripts.baselines.recurrent import RecurrentConfig
from tests.conftest import tiny_config


PLAIN = ("plain-sinusoidal", "rnn-window-1")
WITHOUT_WINDOWS = (*PLAIN, "rsa", "rsa-one-layer-gate-a-head", "rsa-attentive-lstm-in-two-blocks")
NEEDS_PAGES = pytest.mark.skipif(not engines.HAS_PAGED_UPDATE, reason="needs Transformers 5.23")


def causal_lm(variant, **fields):
    return RTransformerForCausalLM(tiny_config(variant, **fields)).eval()


class Backend:
    """An attention implementation that keeps keys and values itself, as those of vLLM and SGLang do."""

    name = "engine_of_a_test"

    def __init__(self):
        self.kept = {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        past = self.kept.get(module.layer_idx)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        self.kept[module.layer_idx] = key, value
        sees = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=sees, scale=scaling)
        return output.transpose(1, 2), None


@pytest.fixture
def backend():
    made = Backend()
    AttentionInterface.register(Backend.name, made)
    yield made
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop(Backend.name)


def test_an_engine_that_asks_a_class_is_told_no_and_a_model_answers_for_itself(variant):
    assert RTransformerForCausalLM.is_backend_compatible() is False
    assert RTransformerModel.is_backend_compatible() is False
    assert causal_lm(variant).is_backend_compatible() is (variant in PLAIN)


def test_a_foreign_attention_backend_runs_plain_models_and_is_refused_by_others(variant, backend):
    ids = torch.randint(3, 37, (1, 20))
    if variant not in PLAIN:
        with pytest.raises(NotImplementedError, match=f"`attn_implementation` is '{Backend.name}'.*(windows|REMs)"):
            RTransformerForCausalLM._from_config(tiny_config(variant), attn_implementation=Backend.name)
        model = causal_lm(variant)
        model.set_attn_implementation(Backend.name)
        with pytest.raises(NotImplementedError, match="`attn_implementation` is"):
            model(ids, use_cache=False)
        return
    model = causal_lm(variant)
    expected = model(ids).logits
    model.set_attn_implementation(Backend.name)
    positions = torch.arange(20)[None]
    first = model(ids[:, :19], position_ids=positions[:, :19], use_cache=False).logits
    last = model(ids[:, 19:], position_ids=positions[:, 19:], use_cache=False).logits
    torch.testing.assert_close(torch.cat([first, last], dim=1), expected, rtol=1e-5, atol=1e-5)


def test_a_backend_that_keeps_keys_at_each_call_is_refused_where_a_block_attends_several_times(backend):
    model = causal_lm("plain-sinusoidal", attentive_steps=2)
    assert model.is_backend_compatible() is False
    model.set_attn_implementation(Backend.name)
    with pytest.raises(NotImplementedError, match="attend again to the first block's keys .`attentive_steps`."):
        model(torch.randint(3, 37, (1, 20)))


@NEEDS_PAGES
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", WITHOUT_WINDOWS)
def test_generate_batch_gives_what_generate_gives(variant, attention):
    """Prompts of different lengths, longer than a page and than a batch, and two that begin alike."""
    model = causal_lm(variant)
    model.set_attn_implementation(attention)
    prompts = [torch.randint(3, 37, (length,)).tolist() for length in (5, 41, 1, 23)]
    prompts.append(prompts[1][:36] + [7, 8])
    config = ContinuousBatchingConfig(page_size=16, num_blocks=40, max_batch_tokens=32)
    generation = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=-1, pad_token_id=0)
    outputs = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=config)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)
        assert output.error is None
        assert output.generated_tokens == expected[0, len(prompt) :].tolist()
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("entry", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
@pytest.mark.parametrize("variant", ["gru", "lstm-unpadded-over-the-sequence", "gru-and-rsa"])
def test_continuous_batching_is_refused_with_windows_before_a_request_is_taken(variant, entry):
    model = causal_lm(variant)
    with pytest.raises(NotImplementedError, match="continuous batching.*windows of LocalRNNs; use `generate`"):
        if entry == "generate_batch":
            model.generate_batch([[3, 4, 5]])
        elif entry == "init_continuous_batching":
            model.init_continuous_batching()
        else:
            with model.continuous_batching_context_manager():
                pytest.fail("a request could be taken")


def test_a_baseline_refuses_continuous_batching():
    model = AutoModelForCausalLM.from_config(RecurrentConfig(vocab_size=37, hidden_size=8))
    with pytest.raises(NotImplementedError, match="continuous batching.*'recurrent'"):
        model.generate_batch([[3, 4, 5]])


@pytest.mark.skipif(engines.HAS_PAGED_UPDATE, reason="of an older Transformers")
def test_continuous_batching_names_the_version_that_it_needs():
    with pytest.raises(NotImplementedError, match="needs Transformers 5.23 or newer"):
        causal_lm("plain-sinusoidal").generate_batch([[3, 4, 5]])
