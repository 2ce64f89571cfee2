"""What every model must do, whatever its block is made of."""

import math
import shutil

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    LlamaConfig,
    StaticCache,
)

from modeling_rtransformer import (
    RTransformerForAudioFrameClassification,
    RTransformerForCausalLM,
    RTransformerForSequenceClassification,
    RTransformerForTokenClassification,
    RTransformerModel,
)
from modeling_rtransformer.local_rnn import LocalRNN
from modeling_rtransformer.positions import SequenceInfo
from modeling_rtransformer.recurrence_encoding import RecurrenceEncoding
from tests.conftest import VARIANTS, tiny_config
from tests.texts import random_ids


LENGTH = 23
NEEDS_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler"
)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Variants that differ in their attention: without RSA heads and without LocalRNN, with both, and with RSA heads alone.
ATTENTIONS = ["gru", "plain-sinusoidal", "gru-and-rsa", "rsa", "rsa-one-layer-gate-a-head"]


def causal_lm(variant="gru-and-rsa", **fields):
    return RTransformerForCausalLM(tiny_config(variant, **fields)).eval()


def padded_batch(rows, side):
    """Rows of unequal length as one batch padded with zeros, and its attention mask."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def test_future_tokens_do_not_change_past_outputs(variant):
    model = causal_lm(variant)
    ids = random_ids(2, LENGTH)
    changed = ids.clone()
    changed[:, 14:] = random_ids(2, LENGTH - 14)
    assert torch.equal(model(ids).logits[:, :14], model(changed).logits[:, :14])
    assert not torch.allclose(model(ids).logits[:, 14:], model(changed).logits[:, 14:])


def test_a_bidirectional_model_sees_the_future(variant):
    model = causal_lm(variant, is_causal=False)
    ids = random_ids(2, LENGTH)
    changed = ids.clone()
    changed[:, -1] = 3 + (ids[:, -1] - 2) % 34
    assert not torch.allclose(model(ids).logits[:, 0], model(changed).logits[:, 0], atol=1e-7)


def test_a_bidirectional_local_rnn_runs_both_ways():
    model = causal_lm("gru", is_causal=False)
    sublayer = model.model.layers[0].local_rnns[0]
    hidden = torch.randn(1, 9, 20)
    before = sublayer.rnn(torch.cat([torch.zeros(1, 4, 20), hidden], dim=1))
    after = sublayer.reverse_rnn(torch.cat([torch.zeros(1, 4, 20), hidden.flip(1)], dim=1)).flip(1)
    output, _ = sublayer(hidden, SequenceInfo())
    torch.testing.assert_close(output, before + after)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_each_row_alone(variant, side, is_causal, attention):
    model = causal_lm(variant, is_causal=is_causal)
    model.set_attn_implementation(attention)
    rows = [random_ids(9), random_ids(LENGTH), random_ids(1)]
    ids, mask = padded_batch(rows, side)
    logits = model(ids, attention_mask=mask).logits
    for index, row in enumerate(rows):
        torch.testing.assert_close(logits[index, mask[index].bool()], model(row[None]).logits[0], **CLOSE)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("described_by", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_packed_sequences_equal_each_alone_with_gradients(variant, described_by, is_causal):
    model = causal_lm(variant, is_causal=is_causal).double()
    rows = [random_ids(n) for n in (7, 1, 12, 3)]
    packed = torch.cat(rows)[None]
    description = {
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "seq_idx": torch.cat([torch.full((len(row),), i, dtype=torch.int32) for i, row in enumerate(rows)])[None],
        "cu_seq_lens_q": torch.tensor([0, 7, 8, 20, 23], dtype=torch.int32),
    }
    together = model(packed, **{described_by: description[described_by]}).logits[0]
    alone = torch.cat([model(row[None]).logits[0] for row in rows])
    torch.testing.assert_close(together, alone, **CLOSE)
    weights = torch.randn_like(alone)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad((together * weights).sum(), parameters),
        torch.autograd.grad((alone * weights).sum(), parameters),
    ):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_a_batch_of_packed_rows_has_boundaries_of_its_own(variant):
    model = causal_lm(variant)
    ids = random_ids(2, 10)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]])
    logits = model(ids, position_ids=positions).logits
    for row, cut in ((0, 4), (1, 7)):
        torch.testing.assert_close(logits[row, cut:], model(ids[row : row + 1, cut:]).logits[0], **CLOSE)


def test_branches_in_a_4d_mask_need_heads_and_inputs_without_an_order(variant):
    """
    A mask says which tokens a token sees, not in which order: two ends of one beginning, side by side, are one row to a
    LocalRNN window and to a REM, whatever the mask and the positions say.
    """
    model = causal_lm(variant)
    beginning, ends = random_ids(1, 4), random_ids(2, 1)
    row = torch.cat([beginning, ends.T], dim=1)  # (1, 6)
    sees = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    sees[..., 5, 4] = False
    inputs = {"attention_mask": added(sees), "position_ids": torch.tensor([[0, 1, 2, 3, 4, 4]])}
    if variant not in WITHOUT_ORDER:
        with pytest.raises(ValueError, match="`attention_mask` of four dimensions.*branches"):
            model(row, **inputs)
        return
    logits = model(row, **inputs).logits[0, 4:]
    alone = model(torch.cat([beginning.expand(2, -1), ends], dim=1)).logits[:, 4]
    torch.testing.assert_close(logits, alone, **CLOSE)


WITHOUT_ORDER = ("plain-sinusoidal", "rnn-window-1")  # which read the tokens that a mask shows, in any order


def added(sees):
    """The mask that is added to the scores, from the one that says what a token sees."""
    return torch.zeros(sees.shape).masked_fill(sees.logical_not(), torch.finfo(torch.float32).min)


def block_diagonal(segment_ids, is_causal):
    """`(B, 1, T, T)`: a token sees its own sequence, up to itself in a causal model; padding, -1, is seen by none."""
    sees = (segment_ids[:, None, :, None] == segment_ids[:, None, None, :]) & (segment_ids >= 0)[:, None, None, :]
    return sees.tril() if is_causal else sees


@pytest.mark.parametrize("form", ["bool", "added"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_a_4d_mask_that_packs_sequences_equals_each_alone(variant, is_causal, form):
    """With padding before, between and behind them; a second row is packed in another way."""
    model = causal_lm(variant, is_causal=is_causal).double()
    segment_ids = torch.tensor([[-1, 0, 0, 0, 0, 1, -1, 2, 2, 2, 2, -1], [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]])
    places = torch.stack([torch.cat([torch.arange(n) for n in counts]) for counts in ((1, 4, 1, 1, 4, 1), (8, 4))])
    ids = random_ids(2, 12)
    mask = block_diagonal(segment_ids, is_causal)
    mask = added(mask).double() if form == "added" else mask
    logits = model(ids, attention_mask=mask, position_ids=places).logits
    for row, segments in enumerate(segment_ids):
        for segment in segments.unique():
            if segment >= 0:
                alone = model(ids[row : row + 1, segments == segment]).logits[0]
                torch.testing.assert_close(logits[row, segments == segment], alone, **CLOSE)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_4d_mask_that_pads_equals_each_row_alone(variant, side, is_causal):
    model = causal_lm(variant, is_causal=is_causal)
    rows = [random_ids(9), random_ids(LENGTH), random_ids(1)]
    ids, mask = padded_batch(rows, side)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=block_diagonal(mask - 1, is_causal), position_ids=places).logits
    for index, row in enumerate(rows):
        torch.testing.assert_close(logits[index, mask[index].bool()], model(row[None]).logits[0], **CLOSE)


def test_decoding_goes_on_under_a_4d_mask_that_hides_padding_and_nothing_else(variant):
    model = causal_lm(variant)
    ids, mask = padded_batch([random_ids(9), random_ids(12)], "left")
    sees, places = block_diagonal(mask - 1, True), (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask).logits
    cache, logits = DynamicCache(config=model.config), []
    for begin, end in ((0, 7), (7, 8), (8, 12)):
        part = sees[:, :, begin:end, :end]
        inputs = {"attention_mask": part, "position_ids": places[:, begin:end]}
        logits.append(model(ids[:, begin:end], cache=cache, **inputs).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1)[mask.bool()], expected[mask.bool()], **CLOSE)
    if variant not in WITHOUT_ORDER:
        hides = torch.ones(2, 1, 1, 13, dtype=torch.bool)
        hides[..., 10] = False
        with pytest.raises(ValueError, match="`attention_mask` of four dimensions"):
            model(random_ids(2, 1), cache=cache, attention_mask=hides)


@pytest.mark.parametrize("form", ["a window", "prefixes that see themselves whole", "heads that differ"])
def test_other_4d_masks_are_refused_where_there_are_windows_or_rems(variant, form):
    if variant in WITHOUT_ORDER:
        pytest.skip("no windows and no REMs")
    model = causal_lm(variant)
    sees = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    if form == "a window":
        sees = sees.triu(-3)
    elif form == "heads that differ":
        sees = sees.repeat(1, model.config.num_attention_heads, 1, 1)
        sees[:, 1] = sees[:, 1].triu(-3)
    else:
        sees[..., :4, :4] = True
    with pytest.raises(ValueError, match="`attention_mask` of four dimensions must describe"):
        model(random_ids(1, 9), attention_mask=sees)


@pytest.mark.parametrize("described_by", ["position_ids", "cu_seq_lens_q", "attention_mask"])
def test_packed_sequences_with_a_cache_are_refused(described_by):
    model = causal_lm()
    segment_ids = torch.tensor([[0, 0, 0, 0, 1, 1]])
    description = {
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1]]),
        "cu_seq_lens_q": torch.tensor([0, 4, 6]),
        "attention_mask": block_diagonal(segment_ids, True),
    }
    with pytest.raises(ValueError, match=f"`{described_by}` describes packed sequences.*cache"):
        model(random_ids(1, 6), cache=DynamicCache(config=model.config), **{described_by: description[described_by]})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_decoding_equals_the_full_forward_at_every_step(variant, attention):
    model = causal_lm(variant)
    model.set_attn_implementation(attention)
    ids = random_ids(2, LENGTH)
    full = model(ids).logits
    for chunks in ([1] * LENGTH, [6] + [1] * (LENGTH - 6), [2, 7, 1, 13]):
        cache, logits = DynamicCache(config=model.config), []
        for chunk in ids.split(chunks, dim=1):
            logits.append(model(chunk, cache=cache).logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), full, **CLOSE)


def test_a_text_longer_than_a_long_window_is_decoded_alike():
    """Single steps run each window in one go; the full forward runs the windows side by side."""
    model = causal_lm("lstm-unpadded-over-the-sequence")
    ids = random_ids(2, model.config.local_window + 9)
    cache, logits = DynamicCache(config=model.config), []
    for chunk in ids.split([model.config.local_window - 3] + [1] * 12, dim=1):
        logits.append(model(chunk, cache=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, **CLOSE)


def test_a_static_cache_gives_the_same(variant):
    model = causal_lm(variant)
    ids = random_ids(2, LENGTH)
    cache, logits = StaticCache(config=model.config, max_cache_len=LENGTH + 8), []
    for chunk in ids.split([6, 1, 1, 9, 6], dim=1):
        logits.append(model(chunk, cache=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, **CLOSE)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["beam", "prompt-lookup"])
def test_search_and_lookup_do_not_depend_on_the_cache(variant, options):
    model = causal_lm(variant)
    prompt = random_ids(1, 6).repeat(1, 3)
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    cached = model.generate(prompt, **options)
    if "prompt_lookup_num_tokens" in options:  # lossless: the same as greedy
        del options["prompt_lookup_num_tokens"]
    assert cached.tolist() == model.generate(prompt, **options, use_cache=False).tolist()


@pytest.mark.parametrize(
    ("variant", "attention"),
    [(variant, "sdpa") for variant in VARIANTS]
    + [pytest.param(variant, "flex_attention", marks=NEEDS_COMPILER) for variant in ATTENTIONS],
)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@torch.no_grad()  # flex attention has no backward on the CPU
def test_attention_implementations_agree(variant, attention, is_causal):
    model = causal_lm(variant, is_causal=is_causal)
    ids, mask = padded_batch([random_ids(9), random_ids(LENGTH)], "left")
    seq_idx = torch.arange(LENGTH).div(8, rounding_mode="floor").expand(2, -1)
    outputs = {}
    for implementation in ("eager", attention):
        model.set_attn_implementation(implementation)
        outputs[implementation] = torch.cat(
            [model(ids, attention_mask=mask).logits[mask.bool()], model(ids, seq_idx=seq_idx).logits.flatten(0, 1)]
        )
    torch.testing.assert_close(outputs["eager"], outputs[attention], **CLOSE)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_attentions_times_values_are_the_heads_outputs(variant, is_causal):
    model = causal_lm(variant, is_causal=is_causal).double()
    model.set_attn_implementation("eager")
    seen = {}
    attention = model.model.layers[1].self_attn
    attention.v_proj.register_forward_hook(lambda module, args, output: seen.update(values=output))
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(heads=args[0]))
    matrices = model(random_ids(2, LENGTH), output_attentions=True).attentions
    assert len(matrices) == 2 and matrices[1].shape == (2, 5, LENGTH, LENGTH)
    values = seen["values"].view(2, LENGTH, 5, 4).transpose(1, 2)
    heads = seen["heads"].view(2, LENGTH, 5, 4).transpose(1, 2)
    torch.testing.assert_close(matrices[1] @ values, heads)


def test_hidden_states_are_the_embedding_and_each_block(variant):
    output = causal_lm(variant)(random_ids(2, 9), output_hidden_states=True)
    assert [state.shape for state in output.hidden_states] == [(2, 9, 20)] * 3


def test_gradient_checkpointing_gives_the_same_gradients(variant):
    model = causal_lm(variant, hidden_dropout=0.0, attention_dropout=0.0, embedding_dropout=0.0).train()
    ids = random_ids(2, LENGTH)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.gradient_checkpointing_enable()
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


def test_every_parameter_learns(variant):
    model = causal_lm(variant, is_causal=False).train()
    ids = random_ids(2, LENGTH)
    model(ids, labels=ids).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


class TestInitialValues:
    def test_they_are_those_of_the_papers(self):
        config = tiny_config(rem_kinds=["regular"] * 2 + ["first_cyclical", "second_cyclical", "none"], rem_dilations=1)
        config.num_hidden_layers = 50
        model = RTransformerModel(config)
        rems = [module for module in model.modules() if isinstance(module, RecurrenceEncoding)]
        eta = torch.cat([rem.eta for rem in rems])
        assert ((eta.abs() >= 1) & (eta.abs() <= 2)).all() and (eta > 0).any() and (eta < 0).any()
        nu = torch.cat([rem.nu for rem in rems])
        assert ((nu >= 1) & (nu <= 2)).all() and nu.unique().numel() == 50
        assert all((rem.theta == math.pi / 4).all() for rem in rems)
        mu = torch.cat([rem.mu for rem in rems])
        assert ((mu >= -3) & (mu <= 3)).all() and mu.std() > 1
        for local_rnn in (module for module in model.modules() if isinstance(module, LocalRNN)):
            for parameter in local_rnn.parameters():
                assert parameter.abs().max() <= 20**-0.5 and parameter.std() > 0.2 * 20**-0.5

    def test_no_two_layers_start_out_equal(self):
        model = RTransformerModel(tiny_config(num_local_rnns=2))
        weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        for index, weight in enumerate(weights):
            assert not any(weight.shape == other.shape and torch.equal(weight, other) for other in weights[:index])

    def test_the_seed_decides_them(self):
        states = []
        for _ in range(2):
            torch.manual_seed(3)
            states.append(RTransformerModel(tiny_config()).state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class TestSavingAndLoading:
    def test_loaded_weights_are_those_saved(self, variant, tmp_path):
        model = causal_lm(variant)
        with torch.no_grad():  # away from every initial value, so that a second initialisation would show
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is RTransformerForCausalLM
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        ids = random_ids(2, LENGTH)
        assert torch.equal(loaded(ids).logits, model(ids).logits)

    def test_a_base_model_gets_a_new_head_and_keeps_its_weights(self, variant, tmp_path):
        base = RTransformerModel(tiny_config(variant)).eval()
        base.save_pretrained(tmp_path)
        head = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
        for name, value in base.state_dict().items():
            assert torch.equal(head.model.state_dict()[name], value), name
        assert head.score.weight.abs().sum() > 0

    def test_a_head_loads_into_the_base_model(self, tmp_path):
        model = causal_lm()
        model.save_pretrained(tmp_path)
        base = AutoModel.from_pretrained(tmp_path)
        ids = random_ids(1, 5)
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)

    @pytest.mark.parametrize("tied", [True, False])
    def test_embeddings_are_tied_or_not(self, tied, tmp_path):
        model = causal_lm(tie_word_embeddings=tied)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)

    def test_the_code_and_the_auto_map_are_saved_with_the_weights(self, tmp_path):
        causal_lm().save_pretrained(tmp_path)
        names = {path.name for path in tmp_path.iterdir()}
        assert {
            "modeling_rtransformer.py",
            "configuration_rtransformer.py",
            "block.py",
            "classification.py",
            "local_rnn.py",
            "positions.py",
            "recurrence_encoding.py",
        } <= names
        assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)

    def test_a_checkpoint_of_another_model_is_refused(self, tmp_path):
        LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="`model_type` must be 'rtransformer', got 'llama'"):
            RTransformerForCausalLM.from_pretrained(tmp_path)


class TestContinuousInput:
    def test_values_go_through_a_linear_layer_in_base_and_heads(self, variant):
        config = tiny_config(variant, num_input_features=3, num_labels=4)
        values = torch.randn(2, LENGTH, 3)
        for model_class, shape in (
            (RTransformerModel, (2, LENGTH, 20)),
            (RTransformerForCausalLM, (2, LENGTH, 37)),
            (RTransformerForSequenceClassification, (2, 4)),
            (RTransformerForTokenClassification, (2, LENGTH, 4)),
            (RTransformerForAudioFrameClassification, (2, LENGTH, 4)),
        ):
            model = model_class(config).eval()
            assert model.main_input_name == "input_values"
            assert model(input_values=values)[0].shape == shape
            base = getattr(model, "model", model)
            assert model.get_input_embeddings() is base.embed_values  # asked for by FSDP2 and PEFT
            embedded = model(inputs_embeds=base.embed_values(values))[0]
            torch.testing.assert_close(embedded, model(input_values=values)[0])


class TestSequenceClassification:
    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_does_not_change_the_prediction(self, variant, side, is_causal):
        model = RTransformerForSequenceClassification(tiny_config(variant, is_causal=is_causal, num_labels=4)).eval()
        rows = [random_ids(9), random_ids(LENGTH)]
        ids, mask = padded_batch(rows, side)
        logits = model(ids, attention_mask=mask).logits
        for index, row in enumerate(rows):
            torch.testing.assert_close(logits[index], model(row[None]).logits[0], **CLOSE)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_continuous_input_is_read_at_the_last_real_position_too(self, side):
        config = tiny_config(num_input_features=3, num_labels=4)
        model = RTransformerForSequenceClassification(config).eval()
        values = torch.randn(1, 9, 3)
        filler = torch.randn(1, 5, 3)  # not zeros: it must not matter
        padded = torch.cat([filler, values] if side == "left" else [values, filler], dim=1)
        mask = torch.ones(1, 14, dtype=torch.long)
        mask[:, slice(0, 5) if side == "left" else slice(9, None)] = 0
        logits = model(input_values=padded, attention_mask=mask).logits
        torch.testing.assert_close(logits, model(input_values=values).logits, **CLOSE)

    def test_without_a_mask_the_pad_token_says_where_a_row_ends(self):
        model = RTransformerForSequenceClassification(tiny_config(num_labels=4)).eval()
        rows = [random_ids(9), random_ids(LENGTH)]
        ids, _ = padded_batch(rows, "right")
        torch.testing.assert_close(model(ids).logits[0], model(rows[0][None]).logits[0], **CLOSE)

    @pytest.mark.parametrize(
        ("problem_type", "labels"),
        [
            ("single_label_classification", torch.tensor([2, 0])),
            ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
            ("regression", torch.tensor([[0.3, -1, 2], [0, 5, 1]])),
        ],
    )
    def test_the_three_losses(self, problem_type, labels):
        config = tiny_config(num_labels=3, problem_type=problem_type)
        model = RTransformerForSequenceClassification(config).eval()
        output = model(random_ids(2, 7), labels=labels)
        expected = {
            "single_label_classification": nn.functional.cross_entropy,
            "multi_label_classification": nn.functional.binary_cross_entropy_with_logits,
            "regression": nn.functional.mse_loss,
        }[problem_type](output.logits, labels)
        torch.testing.assert_close(output.loss, expected)


class TestBadInput:
    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({}, "exactly one of `inputs_embeds` and `input_ids` must be given .* got neither"),
            (
                {"input_ids": random_ids(1, 3), "inputs_embeds": torch.randn(1, 3, 20)},
                "got input_ids and inputs_embeds",
            ),
            ({"input_values": torch.randn(1, 3, 2)}, "`num_input_features` is None.* got input_values"),
            ({"inputs_embeds": torch.randn(1, 3, 19)}, r"`hidden_size` = 20\), got \(1, 3, 19\)"),
            ({"input_ids": torch.tensor([[3, 37]])}, r"`input_ids` must lie in \[0, 36\] .* got 37"),
            ({"input_ids": torch.tensor([[3, -1]])}, r"`input_ids` must lie in \[0, 36\] .* got -1"),
            (
                {"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([[3, 99]])},
                "`labels` must lie in .* got 99",
            ),
        ],
    )
    def test_input_of_a_language_model(self, inputs, message):
        with pytest.raises(ValueError, match=message):
            causal_lm()(**inputs)

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({"input_values": torch.randn(2, 3, 4)}, r"`num_input_features` = 3\), got \(2, 3, 4\)"),
            ({"input_values": torch.randn(2, 3)}, r"\(batch, length, `num_input_features` = 3\), got \(2, 3\)"),
            ({"input_ids": random_ids(2, 3)}, "exactly one of `inputs_embeds` and `input_values`"),
            ({"input_values": torch.randn(2, 5, 3), "labels": torch.tensor([0, 4])}, r"`labels` .*\[0, 3\].* got 4"),
            ({"input_values": torch.randn(2, 5, 3), "labels": torch.tensor([0, -1])}, "`labels` .* got -1"),
        ],
    )
    def test_continuous_input_and_labels_of_a_classifier(self, inputs, message):
        model = RTransformerForSequenceClassification(tiny_config(num_input_features=3, num_labels=4))
        with pytest.raises(ValueError, match=message):
            model(**inputs)

    def test_a_bidirectional_model_takes_no_cache(self):
        model = causal_lm(is_causal=False)
        with pytest.raises(ValueError, match="`cache` needs a causal model"):
            model(random_ids(1, 3), cache=DynamicCache(config=model.config))

    def test_the_directions_are_built_in(self):
        with pytest.raises(ValueError, match="`is_causal` must be True, .* got False"):
            causal_lm()(random_ids(1, 3), is_causal=False)

    def test_ignored_labels_are_no_error(self):
        assert causal_lm()(random_ids(1, 3), labels=torch.tensor([[-100, 3, 4]])).loss.isfinite()
