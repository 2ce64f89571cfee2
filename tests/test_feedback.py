"""
The Feedback Transformer: equal to the reference outputs, and what every causal model must do.

The files `tests/golden/feedback_*.safetensors` are float64 outputs, memories and gradients of other code on random
weights: `window_layer_kv` of the authors' (facebookresearch/transformer-sequential), `empty_shared_kv` of labml's,
`plain_lm` of a loop that agrees with both.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import DynamicCache

from modeling_rtransformer import FeedbackTransformerConfig, FeedbackTransformerForCausalLM
from tests.scheduled_models import CLOSE, EXACT, FEEDBACK, LENGTH, causal_lm, random_ids


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(params=FEEDBACK)
def variant(request):
    return f"feedback-{request.param}"


class TestReference:
    CONFIG = {
        **{"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3},
        "intermediate_size": 12,
    }

    @staticmethod
    def our_name(name):
        """A parameter's name in our causal language model, of its name in the file."""
        renamed = {"embed.weight": "model.embed_tokens.weight", "key_pe": "model.positions.keys"}
        if name in renamed:
            return renamed[name]
        name = name.replace("memory_weights", "memory.layer_weights").replace("attn_norm", "self_attn_norm")
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            if name.startswith("layers"):
                name = name.replace(f".{projection}", f".self_attn.{projection}")
        name = name.replace("up_proj", "mlp.up_proj").replace("down_proj", "mlp.down_proj")
        for theirs, ours in (("key_pe_bias", "bias"), ("key_pe", "keys"), ("query_bias", "query_bias")):
            if name.endswith(theirs):
                name = name.removesuffix(theirs) + f"self_attn.positions.{ours}"
        return name if name.startswith("lm_head") else f"model.{name}"

    def load(self, file, **fields):
        """Our model with the file's weights, the file, and its gradients by our names; biases that it lacks are 0."""
        golden = load_file(GOLDEN / f"feedback_{file}.safetensors")
        model = FeedbackTransformerForCausalLM(FeedbackTransformerConfig(**self.CONFIG, **fields)).double().eval()
        state = model.state_dict()
        groups = {}
        for kind in ("weight", "grad"):
            groups[kind] = {}
            for name, tensor in golden.items():
                if name.startswith(f"{kind}."):
                    # the file has the oldest memory first, ours distance 1; input's gradients keep their names
                    name = name.removeprefix(f"{kind}.")
                    name = name if name in golden else self.our_name(name)
                    if name.endswith(("positions.keys", "positions.bias")):
                        tensor = tensor.flip(-1)
                    groups[kind][name] = tensor.flatten() if name.endswith("layer_weights") else tensor
        missing = {name for name in state.keys() - groups["weight"].keys() if not name.startswith("lm_head")}
        assert all(name.endswith(("bias", "embed_tokens.weight")) for name in missing)
        assert groups["weight"].keys() <= state.keys()
        zeros = {name: torch.zeros_like(state[name]) for name in missing}
        model.load_state_dict({**state, **zeros, **groups["weight"]})
        return model, golden, groups["grad"]

    @staticmethod
    def check_gradients(model, loss, expected, **inputs):
        parameters = {**dict(model.named_parameters()), **inputs}
        gradients = torch.autograd.grad(loss, [parameters[name] for name in expected])
        for (name, theirs), ours in zip(expected.items(), gradients):
            torch.testing.assert_close(ours, theirs, **EXACT, msg=lambda text, name=name: f"{name}: {text}")

    def test_a_language_model_with_shared_keys_and_values(self):
        model, golden, gradients = self.load("plain_lm")
        base = model.model(golden["input_ids"], output_hidden_states=True)
        torch.testing.assert_close(base.memories, golden["memories"], **EXACT)
        torch.testing.assert_close(base.last_hidden_state, model.model.norm(golden["layer_output"]), **EXACT)
        logits = model(golden["input_ids"]).logits
        torch.testing.assert_close(logits, golden["logits"], **EXACT)
        # by hand: Transformers computes the loss in float32
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), golden["input_ids"][:, 1:].flatten())
        torch.testing.assert_close(loss, golden["loss"][0], **EXACT)
        self.check_gradients(model, loss, gradients)

    def test_the_authors_code_with_a_window_positions_and_a_memory_to_begin_with(self):
        fields = {"feedback_shared_kv": False, "feedback_window": 5, "feedback_positions": "shared"}
        model, golden, gradients = self.load("window_layer_kv", **fields, tie_word_embeddings=False)
        initial = golden["initial_memory"].requires_grad_()
        base = model.model(golden["input_ids"], cache=model.model.cache_of(initial))
        torch.testing.assert_close(base.memories, golden["memories"], **EXACT)
        torch.testing.assert_close(base.last_hidden_state, model.model.norm(golden["layer_output"]), **EXACT)
        output = model(golden["input_ids"], cache=model.model.cache_of(initial))
        log_probs = output.logits.log_softmax(-1)
        torch.testing.assert_close(log_probs, golden["log_probs"], **EXACT)
        loss = (log_probs * golden["loss_coefficients"]).sum()
        torch.testing.assert_close(loss, golden["loss"][0], **EXACT)
        self.check_gradients(model, loss, gradients, initial_memory=initial)

    def test_labmls_code_with_positions_in_each_layer_and_no_norm_of_the_memory(self):
        fields = {"feedback_window": 8, "feedback_positions": "layer", "feedback_norm": False}
        model, golden, gradients = self.load("empty_shared_kv", **fields)
        inputs = golden["inputs_embeds"].requires_grad_()
        output = model.model(inputs_embeds=inputs)
        torch.testing.assert_close(output.memories, golden["memories"], **EXACT)
        torch.testing.assert_close(output.last_hidden_state, golden["output"], **EXACT)
        loss = (output.last_hidden_state * golden["loss_coefficients"]).sum()
        torch.testing.assert_close(loss, golden["loss"][0], **EXACT)
        self.check_gradients(model, loss, gradients, inputs_embeds=inputs)


def test_a_position_sees_so_many_memories_and_through_them_everything():
    """With a window of 1 the first token still reaches the last position, since a memory has seen the one before."""
    model = causal_lm("feedback-window", feedback_window=1)
    ids = random_ids(1, 6)
    changed = torch.cat([3 + (ids[:, :1] - 2) % 34, ids[:, 1:]], dim=1)
    assert ((model(ids).logits - model(changed).logits).abs().amax(-1) > 1e-6).all()
    model.set_attn_implementation("eager")
    weights = model(random_ids(1, 6), output_attentions=True).attentions[0][0, 0]
    assert weights.tolist() == torch.eye(6).roll(1, 0).tril(-1).tolist()


def test_the_cache_holds_one_key_and_value_a_memory_or_one_a_layer():
    for variant, filled in (("shared", [9, 0]), ("layers", [9, 9]), ("window", [4, 0]), ("window-layers", [4, 4])):
        model = causal_lm(f"feedback-{variant}")
        cache = model(random_ids(2, 9)).cache
        lengths = [0 if layer.keys is None else layer.keys.shape[2] for layer in cache.layers]
        assert lengths == filled[: len(lengths)] and sum(lengths) == sum(filled)  # 5.17 makes no empty layers


def test_segments_that_hand_on_their_memories_equal_one_call(variant):
    model, ids = causal_lm(variant).model, random_ids(2, LENGTH)
    whole = model(ids, use_cache=False)
    cache = model.cache_of(whole.memories[:, :10])
    if model.config.num_local_rnns == 0 or model.config.local_window == 1:
        continued = model(ids[:, 10:], cache=cache)
        torch.testing.assert_close(continued.last_hidden_state, whole.last_hidden_state[:, 10:], **CLOSE)
    else:
        with pytest.raises(ValueError, match="`cache` must hold the LocalRNNs' windows"):
            model(ids[:, 10:], cache=cache)


def test_attentions_times_values_are_the_heads_outputs(variant):
    model = causal_lm(variant)
    model.set_attn_implementation("eager")
    ids = random_ids(2, 9)
    seen = []
    attention = model.model.layers[1].self_attn
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output = model(ids, output_attentions=True)
    assert [weights.shape for weights in output.attentions] == [(2, 5, 9, 9)] * 2
    _, [*_, values] = model.model._keys_and_values(model.model(ids).memories)
    heads = (output.attentions[1] @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(heads[:, 1:], torch.cat(seen, dim=1)[:, : 9 - 1], **CLOSE)
    assert (output.attentions[1].triu() == 0).all()


class TestParallelForm:
    """The passes give what the steps give, and the same gradients."""

    @staticmethod
    def outputs_and_gradients(model, ids, **options):
        """At the real positions: a LocalRNN gives something else at padded ones."""
        output = model.model(ids, output_hidden_states=True, **options)
        real = options.get("attention_mask", torch.ones_like(ids)).bool()
        torch.manual_seed(1)
        states = [state[real] for state in (*output.hidden_states, output.memories)]
        loss = sum((state * torch.randn_like(state)).sum() for state in states)
        parameters = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
        return [*states, *torch.autograd.grad(loss, parameters, allow_unused=True)]

    @pytest.mark.parametrize("described_by", ["nothing", "left", "right", "packed"])
    def test_in_float64_it_equals_the_steps(self, variant, described_by):
        model = causal_lm(variant, feedback_tolerance=1e-14).double()
        ids = random_ids(2, LENGTH)
        options = {
            "nothing": {},
            "left": {"attention_mask": torch.tensor([[1] * LENGTH, [0] * 5 + [1] * (LENGTH - 5)])},
            "right": {"attention_mask": torch.tensor([[1] * LENGTH, [1] * (LENGTH - 5) + [0] * 5])},
            "packed": {"seq_idx": (torch.arange(LENGTH) > 6).long().expand(2, -1)},
        }[described_by]
        steps = self.outputs_and_gradients(model, ids, **options)
        model.config.feedback_form = "parallel"
        for ours, theirs in zip(self.outputs_and_gradients(model, ids, **options), steps):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)

    def test_in_float32_it_equals_the_steps_to_the_tolerance(self, variant):
        model = causal_lm(variant)
        ids = random_ids(2, LENGTH)
        steps = model(ids).logits
        model.config.feedback_form = "parallel"
        torch.testing.assert_close(model(ids).logits, steps, **CLOSE)
        cache, logits = DynamicCache(config=model.config), []
        for chunk in ids.split([6, 1, 5, LENGTH - 12], dim=1):
            logits.append(model(chunk, cache=cache).logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), steps, **CLOSE)

    def test_what_does_not_settle_is_computed_in_steps_with_a_warning(self, monkeypatch):
        told = []
        monkeypatch.setattr("modeling_rtransformer.modeling_feedback.logger.warning_once", told.append)
        model = causal_lm("feedback-shared", feedback_max_passes=2)
        ids = random_ids(2, LENGTH)
        steps = model(ids).logits
        model.config.feedback_form = "parallel"
        assert torch.equal(model(ids).logits, steps)
        assert "after `feedback_max_passes` (2) the memories still changed" in told[0]

    def test_every_pass_has_the_same_dropout(self, monkeypatch):
        """With other zeros in each pass the memories would never stand still."""
        told = []
        monkeypatch.setattr("modeling_rtransformer.modeling_feedback.logger.warning_once", told.append)
        dropout = {"hidden_dropout": 0.2, "attention_dropout": 0.2, "embedding_dropout": 0.2}
        model = causal_lm("feedback-shared", feedback_form="parallel", **dropout).train()
        first, second = (model(random_ids(2, 9)).logits for _ in range(2))
        assert told == [] and not torch.allclose(first, second)

    def test_few_passes_do_where_the_memories_are_far_from_chaos(self):
        model = causal_lm("feedback-shared", feedback_form="parallel", initializer_range=0.02)
        passes = []
        model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
        model(random_ids(2, 31))
        assert len(passes) < 16  # the steps would be 31


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_causal": False}, "`is_causal` must be True .* got False"),
        ({"feedback_window": 0}, "`feedback_window` must be at least 1, or None for all memories, got 0"),
        (
            {"feedback_positions": "shard", "feedback_window": 3},
            "`feedback_positions` .* got 'shard'; did you mean `share",
        ),
        ({"feedback_positions": "layer"}, "`feedback_window` must be the largest distance .* got None"),
        ({"feedback_form": "parallell"}, "`feedback_form` must be one of steps, parallel, got 'parallell'; did you"),
        ({"feedback_tolerance": -1.0}, r"`feedback_tolerance` must be in \[0, 1\), got -1.0"),
        ({"feedback_max_passes": 0}, "`feedback_max_passes` must be at least 1, got 0"),
        ({"feedback_windw": 3}, "`feedback_windw` is not a field .* did you mean `feedback_window`"),
    ],
)
def test_a_wrong_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FeedbackTransformerConfig(**fields)


def test_a_cache_without_room_for_windows_is_refused():
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        causal_lm("feedback-gru")(random_ids(2, 7), cache=DynamicCache())
