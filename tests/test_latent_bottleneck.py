"""
The Temporal Latent Bottleneck: equal to the reference outputs, and what its chunks and latents do.

The files `tests/golden/tlb_*.safetensors` are float64 outputs, latents and gradients on random weights: `encoder` of
the code for Long Range Arena by an author of the paper, `causal_lm` of a loop that agrees with it.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import DynamicCache

from modeling_rtransformer import (
    TemporalLatentBottleneckConfig,
    TemporalLatentBottleneckForCausalLM,
    TemporalLatentBottleneckForSequenceClassification,
    TemporalLatentBottleneckModel,
)
from tests.scheduled_models import BOTTLENECK, CLOSE, EXACT, causal_lm, random_ids, tiny_config


GOLDEN = Path(__file__).parent / "golden"


class TestReference:
    SIZES = {
        **{"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2},
        **{"intermediate_size": 12, "chunk_length": 5, "num_latents": 3},
    }

    @staticmethod
    def our_name(name, every):
        """A parameter's name in our model with a head, of its name in the file."""
        if name.startswith("head."):
            return name.replace("head.up", "latent_proj").replace("head.out", "latent_score")
        if name.startswith("lm_head"):
            return name
        name = (
            name.replace("state_norm", "norm")
            .replace("embed.weight", "embed_tokens.weight")
            .replace("initial_state", "initial_latents.weight")
        )
        parts = name.split(".")
        if parts[0] == "fast" and parts[2] == "self":
            layer = int(parts[1]) * every + int(parts[3])
            rest = ".".join(parts[4:]).replace("attn_norm", "self_attn_norm")
            name = f"layers.{layer}.{rest.replace('attn.', 'self_attn.') if rest.startswith('attn.') else rest}"
        elif parts[0] == "fast" or parts[0] == "slow":
            rest = ".".join(parts[1:] if parts[0] == "slow" else parts[3:])
            place = "latent_layer" if parts[0] == "slow" else f"cross_layers.{parts[1]}"
            name = f"{place}.{rest.replace('attn.', 'cross_attn.') if rest.startswith('attn.') else rest}"
        return f"model.{name}"

    def load(self, file, model_class, every, **fields):
        """Our model with the file's weights, the file, and its gradients by our names; biases that it lacks are 0."""
        golden = load_file(GOLDEN / f"tlb_{file}.safetensors")
        config = TemporalLatentBottleneckConfig(**self.SIZES, cross_attention_every=every, **fields)
        model = model_class(config).double().eval()
        groups = {
            kind: {
                self.our_name(name.removeprefix(f"{kind}."), every): tensor
                for name, tensor in golden.items()
                if name.startswith(f"{kind}.")
            }
            for kind in ("weight", "grad")
        }
        state = model.state_dict()
        missing = {name for name in state.keys() - groups["weight"].keys() if name != "lm_head.weight"}
        assert all(name.endswith("bias") for name in missing)
        assert groups["weight"].keys() <= state.keys()
        zeros = {name: torch.zeros_like(state[name]) for name in missing}
        model.load_state_dict({**state, **zeros, **groups["weight"]})
        return model, golden, groups["grad"]

    @staticmethod
    def check_gradients(model, loss, expected):
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, [parameters[name] for name in expected])
        for (name, theirs), ours in zip(expected.items(), gradients):
            torch.testing.assert_close(ours, theirs, **EXACT, msg=lambda text, name=name: f"{name}: {text}")

    def test_a_causal_language_model_whose_last_chunk_is_not_full(self):
        model, golden, gradients = self.load("causal_lm", TemporalLatentBottleneckForCausalLM, 1)
        base = model.model(golden["input_ids"], output_latents=True)
        torch.testing.assert_close(base.latent_states, golden["states"], **EXACT)
        torch.testing.assert_close(base.last_hidden_state, model.model.norm(golden["fast_output"]), **EXACT)
        logits = model(golden["input_ids"]).logits
        torch.testing.assert_close(logits, golden["logits"], **EXACT)
        # by hand: Transformers computes the loss in float32
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), golden["input_ids"][:, 1:].flatten())
        torch.testing.assert_close(loss, golden["loss"][0], **EXACT)
        self.check_gradients(model, loss, gradients)

    def test_the_authors_classifier_with_positions_in_chunks_and_latents(self):
        fields = {
            **{"is_causal": False, "latent_init": "zeros", "latent_positions": True, "chunk_positions": True},
            **{"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_labels": 3},
        }
        model, golden, gradients = self.load(
            "encoder_local_positions", TemporalLatentBottleneckForSequenceClassification, 2, **fields
        )
        base = model.model(golden["input_ids"], output_latents=True)
        states = torch.cat([base.latent_states, base.latents[:, None]], dim=1)
        torch.testing.assert_close(states, golden["states"], **EXACT)
        logits = model(golden["input_ids"]).logits
        torch.testing.assert_close(logits, golden["output"], **EXACT)
        loss = (logits * golden["loss_coefficients"]).sum()
        torch.testing.assert_close(loss, golden["loss"][0], **EXACT)
        self.check_gradients(model, loss, gradients)


@pytest.fixture(params=BOTTLENECK)
def variant(request):
    return f"bottleneck-{request.param}"


def test_the_past_of_a_chunk_comes_through_the_latents_alone():
    model = causal_lm("bottleneck-chunks")
    ids = random_ids(1, 15)
    changed = ids.clone()
    changed[:, :5] = 3 + (ids[:, :5] - 2) % 34
    assert not torch.allclose(model(ids).logits[:, 5:], model(changed).logits[:, 5:], atol=1e-4)
    for layer in model.model.cross_layers:
        nn.init.zeros_(layer.cross_attn.o_proj.weight)
    assert torch.equal(model(ids).logits[:, 5:], model(changed).logits[:, 5:])


def test_a_bidirectional_model_sees_the_rest_of_its_chunk_and_nothing_behind_it():
    model = causal_lm("bottleneck-chunks", is_causal=False)
    ids = random_ids(1, 15)
    for place, sees in ((9, True), (10, False)):  # chunks of 5: position 5 is in the chunk of 5 to 9
        changed = ids.clone()
        changed[:, place] = 3 + (ids[:, place] - 2) % 34
        assert torch.allclose(model(ids).logits[:, 5], model(changed).logits[:, 5], atol=1e-6) is not sees


@pytest.mark.parametrize("side", ["left", "right"])
def test_chunks_of_padding_change_nothing(side):
    model = causal_lm("bottleneck-one-block", is_causal=False).double()
    ids = random_ids(1, 12)
    expected = model.model(ids, output_latents=True)
    filler = random_ids(1, 23)
    both = torch.cat([filler, ids] if side == "left" else [ids, filler], dim=1)
    mask = torch.zeros(1, 35, dtype=torch.long)
    mask[:, slice(23, None) if side == "left" else slice(0, 12)] = 1
    padded = model.model(both, attention_mask=mask, output_latents=True)
    torch.testing.assert_close(padded.latents, expected.latents)
    torch.testing.assert_close(padded.last_hidden_state[mask.bool()], expected.last_hidden_state[0])


def test_the_last_tokens_are_read_by_a_classifier_though_they_fill_no_chunk():
    model = TemporalLatentBottleneckForSequenceClassification(tiny_config("bottleneck-chunks", num_labels=3)).eval()
    ids = random_ids(1, 7)
    changed = torch.cat([ids[:, :6], 3 + (ids[:, 6:] - 2) % 34], dim=1)
    assert not torch.allclose(model(ids).logits, model(changed).logits, atol=1e-4)


def test_what_is_kept_of_a_long_text_does_not_grow(variant):
    model = causal_lm(variant, chunk_length=5)
    cache, sizes = DynamicCache(config=model.config), []
    for length in (40, 1, 39, 1, 1):
        model(random_ids(2, length), cache=cache)
        kept = [layer.keys for layer in cache.layers]
        for layer in cache.layers:
            kept += list(getattr(layer, "conv_states", {}).values())
        sizes.append(sum(tensor.numel() for tensor in kept))
    assert len(set(sizes)) == 1


def test_rows_at_different_places_of_their_chunks_go_on_with_one_cache(variant):
    model = causal_lm(variant)
    rows = [random_ids(14), random_ids(11), random_ids(2)]
    longest = torch.zeros(3, 14, dtype=torch.long)
    mask = torch.zeros_like(longest)
    for index, row in enumerate(rows):
        longest[index, 14 - len(row) :], mask[index, 14 - len(row) :] = row, 1
    cache, more = DynamicCache(config=model.config), random_ids(3, 12)
    model(longest, attention_mask=mask, cache=cache)
    logits = []
    for chunk in more.split([1, 1, 6, 4], dim=1):
        mask = torch.cat([mask, torch.ones_like(chunk)], dim=1)
        logits.append(model(chunk, attention_mask=mask, cache=cache).logits)
    together = torch.cat(logits, dim=1)
    for index, row in enumerate(rows):
        alone = model(torch.cat([row, more[index]])[None]).logits[0, len(row) :]
        torch.testing.assert_close(together[index], alone, **CLOSE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk_length": 1}, "`chunk_length` must be at least 2, got 1"),
        ({"num_latents": 0}, "`num_latents` must be at least 1, got 0"),
        ({"cross_attention_every": 0}, "`cross_attention_every` must be at least 1, got 0"),
        (
            {"cross_attention_every": 2},
            r"`num_hidden_layers` must be divisible by `cross_attention_every` \(2\), got 3",
        ),
        ({"latent_init": "zero"}, "`latent_init` must be one of learned, zeros, got 'zero'; did you mean `zeros`"),
        ({"latent_init": "zeros"}, "`latent_positions` must be True with `latent_init` 'zeros'.* got False"),
        ({"read_out": "latent"}, "`read_out` must be one of latents, positions, got 'latent'; did you mean `latents`"),
        ({"is_causal": False, "num_local_rnns": 1}, "`num_local_rnns` must be 0 with `is_causal` False, got 1"),
        (
            {"chunk_positions": True, "hidden_size": 15, "num_attention_heads": 5},
            "`hidden_size` must be even .* got 15",
        ),
        ({"chunk_lenght": 4}, "`chunk_lenght` is not a field .* did you mean `chunk_length`"),
    ],
)
def test_a_wrong_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TemporalLatentBottleneckConfig(**fields)


class TestBadInput:
    def test_attentions_are_refused(self):
        with pytest.raises(ValueError, match="`output_attentions` must be False: .* got True"):
            causal_lm("bottleneck-chunks")(random_ids(1, 3), output_attentions=True)

    def test_a_cache_without_room_for_latents_is_refused(self):
        with pytest.raises(
            ValueError, match=r"`cache` must have room for the latents, as `DynamicCache\(config=model.c"
        ):
            causal_lm("bottleneck-chunks")(random_ids(2, 7), cache=DynamicCache())

    def test_a_cache_made_again_from_keys_and_values_is_refused(self):
        model = causal_lm("bottleneck-chunks")
        cache = DynamicCache(config=model.config)
        model(random_ids(2, 7), cache=cache)
        rebuilt = DynamicCache(list(cache), config=model.config)
        with pytest.raises(ValueError, match="`cache` must hold the latents .* positions, got none"):
            model(random_ids(2, 1), cache=rebuilt)

    def test_a_cache_of_other_rows_is_refused(self):
        model = causal_lm("bottleneck-chunks")
        cache = DynamicCache(config=model.config)
        model(random_ids(1, 7), cache=cache)
        cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="`cache` must have the latents of 2 rows, got 1"):
            model(random_ids(2, 1), cache=cache)


def test_a_cache_does_not_go_on_behind_padding_on_the_right():
    model = causal_lm("bottleneck-chunks")
    cache = DynamicCache(config=model.config)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    ids, more = random_ids(2, 7), random_ids(2, 1)
    model(ids, attention_mask=mask, cache=cache)
    longer = torch.cat([mask, torch.ones(2, 1).long()], dim=1)
    with pytest.raises(ValueError, match="`attention_mask` must have no zeros between the ones .* got some"):
        model(more, attention_mask=longer, cache=cache)
    whole = model(torch.cat([ids, more], dim=1), attention_mask=longer).logits  # without a past tokens are counted
    alone = model(torch.cat([ids[1, :5], more[1]])[None]).logits
    torch.testing.assert_close(whole[1, -1], alone[0, -1], **CLOSE)


def test_the_base_model_has_the_latents_that_each_chunk_found():
    model = TemporalLatentBottleneckModel(tiny_config("bottleneck-chunks")).eval()
    output = model(random_ids(2, 13), output_latents=True)
    assert output.latent_states.shape == (2, 3, 3, 20) and output.latents.shape == (2, 3, 20)
    torch.testing.assert_close(output.latent_states[:, 0], model.initial_latents.weight.expand(2, -1, -1))
    assert model(random_ids(2, 13)).latents is None
