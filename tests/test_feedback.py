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
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    StaticCache,
)

from modeling_rtransformer import (
    FeedbackTransformerConfig,
    FeedbackTransformerForAudioFrameClassification,
    FeedbackTransformerForCausalLM,
    FeedbackTransformerForSequenceClassification,
    FeedbackTransformerForTokenClassification,
    FeedbackTransformerModel,
)
from modeling_rtransformer.library_versions import CACHE_NAMES


GOLDEN = Path(__file__).parent / "golden"
EXACT = {"rtol": 1e-9, "atol": 1e-12}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LENGTH = 17
VARIANTS = {
    "shared": {},
    "layers": {"feedback_shared_kv": False},
    "window": {"feedback_window": 4},
    "window-layers": {"feedback_window": 4, "feedback_shared_kv": False, "feedback_positions": "layer"},
    "positions": {"feedback_window": 30, "feedback_positions": "shared"},
    "sinusoidal": {"position_embedding": "sinusoidal"},
    "no-norm": {"feedback_norm": False, "initializer_range": 0.1},  # larger weights would amplify rounding
    "rsa": {
        "rem_kinds": ["regular", "none", "first_cyclical", "second_cyclical", "regular"],
        "rem_dilations": [1, 1, 1, 2, 3],
    },
    "rsa-window": {"rem_kinds": ["regular"] * 5, "feedback_window": 3, "rem_layers": [1], "rem_gate": "head"},
    "gru": {"num_local_rnns": 1, "local_window": 5},
    "two-lstm-window": {
        **{"num_local_rnns": 2, "local_rnn_type": "lstm", "local_window": 3, "local_padding": "none"},
        **{"feedback_window": 4, "feedback_shared_kv": False},
    },
    "rnn-window-1": {"num_local_rnns": 1, "local_rnn_type": "rnn", "local_window": 1},
}
GREEDY = {"do_sample": False, "max_new_tokens": 9}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def tiny_config(variant="shared", **fields):
    fields = {
        **{"vocab_size": 37, "hidden_size": 20, "num_attention_heads": 5, "num_hidden_layers": 2},
        **{"pad_token_id": 0, "bos_token_id": 1, "initializer_range": 0.3},
        **VARIANTS[variant],
        **fields,
    }
    return FeedbackTransformerConfig(**fields)


def causal_lm(variant="shared", **fields):
    return FeedbackTransformerForCausalLM(tiny_config(variant, **fields)).eval()


def random_ids(*shape):
    return torch.randint(3, 37, shape)


def padded_batch(rows, side):
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


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


def test_future_tokens_do_not_change_past_outputs(variant):
    model, ids = causal_lm(variant), random_ids(2, LENGTH)
    changed = ids.clone()
    changed[:, 9:] = 3 + (ids[:, 9:] - 2) % 34
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :9], after[:, :9])
    assert ((before - after)[:, 9:].abs().amax(-1) > 1e-4).all()


def test_a_position_sees_so_many_memories_and_through_them_everything():
    """With a window of 1 the first token still reaches the last position, since a memory has seen the one before."""
    model = causal_lm("window", feedback_window=1)
    ids = random_ids(1, 6)
    changed = torch.cat([3 + (ids[:, :1] - 2) % 34, ids[:, 1:]], dim=1)
    assert ((model(ids).logits - model(changed).logits).abs().amax(-1) > 1e-6).all()
    model.set_attn_implementation("eager")
    weights = model(random_ids(1, 6), output_attentions=True).attentions[0][0, 0]
    assert weights.tolist() == torch.eye(6).roll(1, 0).tril(-1).tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_each_row_alone(variant, side, attention):
    model = causal_lm(variant)
    model.set_attn_implementation(attention)
    rows = [random_ids(9), random_ids(LENGTH), random_ids(1)]
    ids, mask = padded_batch(rows, side)
    logits = model(ids, attention_mask=mask).logits
    for index, row in enumerate(rows):
        torch.testing.assert_close(logits[index, mask[index].bool()], model(row[None]).logits[0], **CLOSE)


@pytest.mark.parametrize("described_by", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_packed_sequences_equal_each_alone_with_gradients(variant, described_by):
    model = causal_lm(variant).double()
    rows = [random_ids(n) for n in (7, 1, 5, 3)]
    packed = torch.cat(rows)[None]
    description = {
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "seq_idx": torch.cat([torch.full((len(row),), i, dtype=torch.int32) for i, row in enumerate(rows)])[None],
        "cu_seq_lens_q": torch.tensor([0, 7, 8, 13, 16], dtype=torch.int32),
    }
    together = model(packed, **{described_by: description[described_by]}).logits[0]
    alone = torch.cat([model(row[None]).logits[0] for row in rows])
    torch.testing.assert_close(together, alone, **CLOSE)
    weights, parameters = torch.randn_like(alone), list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad((together * weights).sum(), parameters),
        torch.autograd.grad((alone * weights).sum(), parameters),
    ):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_decoding_equals_the_full_forward_at_every_step(variant, attention):
    model = causal_lm(variant)
    model.set_attn_implementation(attention)
    ids = random_ids(2, LENGTH)
    full = model(ids).logits
    for chunks in ([1] * LENGTH, [6] + [1] * (LENGTH - 6), [2, 7, 1, 7]):
        cache, logits = DynamicCache(config=model.config), []
        for chunk in ids.split(chunks, dim=1):
            logits.append(model(chunk, cache=cache).logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), full, **CLOSE)


@pytest.mark.parametrize("room", [0, 8])
def test_a_static_cache_gives_the_same(variant, room):
    model, ids = causal_lm(variant), random_ids(2, LENGTH)
    cache, logits = StaticCache(config=model.config, max_cache_len=LENGTH + room), []
    with torch.no_grad():
        for chunk in ids.split([6, 1, 1, 3, 6], dim=1):
            logits.append(model(chunk, cache=cache).logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, **CLOSE)


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_cache_is_filled_and_read_under_both_names(variant, name):
    model, ids = causal_lm(variant), random_ids(2, 9)
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :5], **{name: cache})
    last = model(ids[:, 5:], **{name: cache})
    torch.testing.assert_close(last.logits[:, -1], model(ids, use_cache=False).logits[:, -1], **CLOSE)
    for output in (first, last):
        assert output.cache is output.past_key_values is output["cache"] is output["past_key_values"] is cache


def test_the_cache_holds_one_key_and_value_a_memory_or_one_a_layer():
    for variant, filled in (("shared", [9, 0]), ("layers", [9, 9]), ("window", [4, 0]), ("window-layers", [4, 4])):
        model = causal_lm(variant)
        cache = model(random_ids(2, 9)).cache
        lengths = [0 if layer.keys is None else layer.keys.shape[2] for layer in cache.layers]
        assert lengths == filled[: len(lengths)] and sum(lengths) == sum(filled)  # 5.17 makes no empty layers


class TestGenerate:
    def test_greedy_is_the_likeliest_token_each_time(self, variant):
        model, ids = causal_lm(variant), random_ids(2, 6)
        expected = ids
        for _ in range(9):
            expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert model.generate(ids, **GREEDY).tolist() == expected.tolist()

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_prompts_of_unequal_length_padded_left(self, variant, cache):
        model = causal_lm(variant)
        rows = [random_ids(n) for n in (2, 9, 7)]
        ids, mask = padded_batch(rows, "left")
        options = {**GREEDY, "cache_implementation": cache, "disable_compile": True}
        together = model.generate(ids, attention_mask=mask, **options)
        for row, output in zip(rows, together):
            alone = model.generate(row[None], use_cache=False, **GREEDY)[0, len(row) :]
            assert output[9:].tolist() == alone.tolist()

    def test_beam_search_reorders_the_memories(self, variant):
        model, ids = causal_lm(variant), random_ids(3, 6)
        options = {**GREEDY, "num_beams": 4, "num_return_sequences": 2}
        assert model.generate(ids, **options).tolist() == model.generate(ids, **options, use_cache=False).tolist()

    def test_sampling_is_decided_by_the_seed(self, variant):
        model, ids = causal_lm(variant), random_ids(2, 6)
        runs = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 9}
            runs.append(model.generate(ids, use_cache=use_cache, **options).tolist())
        assert runs[0] == runs[1] and len({tuple(row) for row in runs[0]}) > 2

    def test_an_assistant_or_a_look_up_changes_nothing_but_the_speed(self, variant):
        model, ids = causal_lm(variant), random_ids(1, 6).repeat(1, 2)
        expected = model.generate(ids, **GREEDY).tolist()
        torch.manual_seed(1)
        other = causal_lm(variant)
        for assistant in (other, model):
            assert model.generate(ids, assistant_model=assistant, **GREEDY).tolist() == expected
        assert model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY).tolist() == expected
        assert model.generate(ids, assistant_early_exit=1, **GREEDY).tolist() == expected

    def test_embeddings_can_be_the_prompt(self, variant):
        model, ids = causal_lm(variant), random_ids(2, 6)
        embedded = model.get_input_embeddings()(ids)
        assert (
            model.generate(inputs_embeds=embedded, **GREEDY).tolist() == model.generate(ids, **GREEDY)[:, 6:].tolist()
        )


@pytest.mark.parametrize("removed", [1, 4, 9])
def test_a_cropped_cache_goes_on_as_if_the_rest_had_not_been(variant, removed):
    model, ids = causal_lm(variant), random_ids(2, 23)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids[:, :7], cache=cache)
    model(ids[:, 7:17], cache=cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == 17 - removed
    cropped = torch.cat([ids[:, : 17 - removed], random_ids(2, 5)], dim=1)
    continued = model(cropped[:, 17 - removed :], cache=cache).logits
    torch.testing.assert_close(continued, model(cropped).logits[:, 17 - removed :], **CLOSE)


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


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradient_checkpointing_gives_the_same_gradients(variant, attention, monkeypatch):
    monkeypatch.setattr("modeling_rtransformer.modeling_feedback.CHECKPOINTED_STEPS", 5)
    for reentrant in (False, True):
        model = causal_lm(variant).train()
        model.set_attn_implementation(attention)
        ids, mask = padded_batch([random_ids(9), random_ids(13)], "left")
        gradients = []
        for _ in range(2):
            model.zero_grad()
            model(ids, attention_mask=mask, labels=ids).loss.backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for plain, checkpointed in zip(*gradients):
            torch.testing.assert_close(plain, checkpointed)


def test_every_parameter_learns(variant):
    model = causal_lm(variant).train()
    ids = random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


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


def test_hidden_states_are_the_embedding_and_each_layer(variant):
    model = causal_lm(variant)
    output = model(random_ids(2, 9), output_hidden_states=True)
    assert [state.shape for state in output.hidden_states] == [(2, 9, 20)] * 3
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


class TestHeads:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_does_not_change_a_prediction(self, variant, side):
        model = FeedbackTransformerForSequenceClassification(tiny_config(variant, num_labels=4)).eval()
        rows = [random_ids(9), random_ids(LENGTH)]
        ids, mask = padded_batch(rows, side)
        logits = model(ids, attention_mask=mask).logits
        for index, row in enumerate(rows):
            torch.testing.assert_close(logits[index], model(row[None]).logits[0], **CLOSE)

    def test_values_go_through_a_linear_layer_in_base_and_heads(self, variant):
        config = tiny_config(variant, num_input_features=3, num_labels=4)
        values = torch.randn(2, 9, 3)
        for model_class, shape in (
            (FeedbackTransformerModel, (2, 9, 20)),
            (FeedbackTransformerForCausalLM, (2, 9, 37)),
            (FeedbackTransformerForSequenceClassification, (2, 4)),
            (FeedbackTransformerForTokenClassification, (2, 9, 4)),
            (FeedbackTransformerForAudioFrameClassification, (2, 9, 4)),
        ):
            model = model_class(config).eval()
            assert model.main_input_name == "input_values" and model(input_values=values)[0].shape == shape

    def test_frames_may_have_several_labels(self):
        config = tiny_config(num_input_features=3, num_labels=4, problem_type="multi_label_classification")
        model = FeedbackTransformerForAudioFrameClassification(config).eval()
        labels = torch.randint(0, 2, (2, 9, 4)).float()
        output = model(input_values=torch.randn(2, 9, 3), labels=labels)
        torch.testing.assert_close(output.loss, nn.functional.binary_cross_entropy_with_logits(output.logits, labels))


class TestSavingAndLoading:
    def test_loaded_weights_are_those_saved(self, variant, tmp_path):
        model = causal_lm(variant)
        with torch.no_grad():  # away from every initial value, so that a second initialisation would show
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is FeedbackTransformerForCausalLM
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        ids = random_ids(2, 9)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids)[0], model.model(ids)[0])
        head = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
        assert type(head) is FeedbackTransformerForSequenceClassification
        assert torch.equal(head.model.memory.layer_weights, model.model.memory.layer_weights)

    def test_the_files_that_it_needs_are_saved_beside_it(self, tmp_path):
        causal_lm().save_pretrained(tmp_path)
        names = {path.name for path in tmp_path.glob("*.py")}
        assert {"modeling_feedback.py", "configuration_feedback.py", "feedback.py", "block.py"} <= names


class TestBadInput:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"is_causal": False}, "`is_causal` must be True .* got False"),
            ({"feedback_window": 0}, "`feedback_window` must be at least 1, or None for all memories, got 0"),
            (
                {"feedback_positions": "shard", "feedback_window": 3},
                "`feedback_positions` .* got 'shard'; did you mean `sha",
            ),
            ({"feedback_positions": "layer"}, "`feedback_window` must be the largest distance .* got None"),
            ({"feedback_windw": 3}, "`feedback_windw` is not a field .* did you mean `feedback_window`"),
        ],
    )
    def test_a_wrong_config_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            FeedbackTransformerConfig(**fields)

    @pytest.mark.parametrize(
        ("mask", "shape"),
        [(torch.ones(2, 5), r"\(2, 5\)"), (torch.ones(2, 1, 6, 6), r"\(2, 1, 6, 6\)"), ({}, "dict")],
    )
    def test_a_mask_of_another_shape_is_refused(self, mask, shape):
        with pytest.raises(ValueError, match=rf"`attention_mask` must have the shape .* = \(2, 6\), .* got .*{shape}"):
            causal_lm()(random_ids(2, 6), attention_mask=mask)

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({}, "exactly one of .* got neither"),
            ({"input_ids": torch.tensor([[3, 37]])}, r"`input_ids` must lie in \[0, 36\] .* got 37"),
            ({"inputs_embeds": torch.randn(1, 3, 19)}, r"`hidden_size` = 20\), got \(1, 3, 19\)"),
        ],
    )
    def test_input_that_does_not_fit_is_refused(self, inputs, message):
        with pytest.raises(ValueError, match=message):
            causal_lm()(**inputs)

    def test_an_argument_that_no_model_has_is_refused(self):
        with pytest.raises(TypeError, match="`atention_mask` is not an argument .* did you mean `attention_mask`"):
            causal_lm()(random_ids(1, 3), atention_mask=None)

    def test_a_cache_without_room_for_windows_is_refused(self):
        with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
            causal_lm("gru")(random_ids(2, 7), cache=DynamicCache())
