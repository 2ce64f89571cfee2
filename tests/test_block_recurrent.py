"""The block-recurrent mixer: states carried across calls of any length, documents, padding, and what is refused."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_rtransformer import RTransformerConfig, RTransformerForCausalLM
from modeling_rtransformer.memory import detach_memory
from tests.conftest import RECURRENT_VARIANTS, tiny_config
from tests.texts import in_calls, random_ids


LENGTH = 23
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
GREEDY = {"do_sample": False, "max_new_tokens": 14}


@pytest.fixture(params=RECURRENT_VARIANTS)
def variant(request):
    return request.param


def causal_lm(variant, **fields):
    model = RTransformerForCausalLM(tiny_config(variant, **fields)).eval()
    with torch.no_grad():  # states that matter
        for name, parameter in model.named_parameters():
            if ".cell." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("lengths", [[1] * LENGTH, [6] + [1] * 17, [2, 7, 1, 13], [20, 3]], ids=str)
def test_any_cut_of_a_text_gives_the_same_outputs(variant, lengths, attention):
    model, ids = causal_lm(variant), random_ids(2, LENGTH)
    model.set_attn_implementation(attention)
    whole = model(ids).logits
    torch.testing.assert_close(in_calls(model, ids, lengths), whole, **CLOSE)
    with torch.no_grad():  # the keys and values of the states are remembered inside a block
        torch.testing.assert_close(in_calls(model, ids, lengths), whole, **CLOSE)
    torch.testing.assert_close(model(ids, use_cache=False).logits, whole, **CLOSE)


def test_any_cut_is_exact_in_float64(variant):
    model, ids = causal_lm(variant).double(), random_ids(2, LENGTH)
    for lengths in ([1] * LENGTH, [2, 7, 1, 13]):
        torch.testing.assert_close(in_calls(model, ids, lengths), model(ids).logits, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("room", [9, LENGTH + 8])
def test_a_static_cache_gives_the_same_also_when_it_is_used_again(variant, room):
    model = causal_lm(variant)
    cache = StaticCache(config=model.config, max_cache_len=room)
    for _ in range(2):
        ids = random_ids(2, LENGTH)
        torch.testing.assert_close(in_calls(model, ids, [2, 1, 3, 9, 1, 1, 6], cache), model(ids).logits, **CLOSE)
        cache.reset()


def test_the_states_carry_what_attention_has_forgotten(variant):
    """With one block attention sees `memory_length` tokens; a token before those matters through the states alone."""
    fields = {"num_hidden_layers": 1, "recurrent_layers": [0]}
    model, ids = causal_lm(variant, **fields).double(), random_ids(1, LENGTH)
    changed = ids.clone()
    changed[:, 0] = 3 + (ids[:, 0] - 2) % 34
    difference = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]
    config = model.config
    windows = config.num_local_rnns * (config.local_window - 1)
    assert difference[max(config.block_length, config.memory_length + 1 + windows) :].min() > 0
    forgotten = slice(config.memory_length + 1 + windows, config.block_length)
    assert difference[forgotten].numel() == 0 or difference[forgotten].max() < 1e-6


def test_the_state_is_updated_when_a_block_is_full(variant):
    model, ids = causal_lm(variant), random_ids(1, LENGTH)
    layer_idx, block = model.config.recurrent_layers[0], model.config.block_length
    cache = DynamicCache(config=model.config)
    states = []
    for token in ids.split(1, dim=1):
        model(token, cache=cache)
        states.append(cache.layers[layer_idx].recurrent_states[0].clone())
    changes = [place + 1 for place in range(1, LENGTH) if not torch.equal(states[place], states[place - 1])]
    assert changes == list(range(block, LENGTH + 1, block))


def test_gradients_flow_through_all_blocks_of_a_call(variant):
    model, ids = causal_lm(variant).train(), random_ids(2, LENGTH)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded).logits[:, -1].sum().backward()
    assert (embedded.grad.abs().amax(-1) > 0).all()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_memory_is_carried_through_training_steps(variant):
    model, ids = causal_lm(variant).train(), random_ids(2, 24)
    cache = DynamicCache(config=model.config)
    losses = []
    for part in ids.split(12, dim=1):
        loss = model(part, labels=part, cache=cache).loss
        loss.backward()
        losses.append(loss.item())
        detach_memory(cache)
    assert not any(layer.keys.requires_grad for layer in cache.layers)
    alone = model(ids[:, 12:], labels=ids[:, 12:]).loss.item()
    assert abs(losses[1] - alone) > 1e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("lengths", [[24], [1] * 24, [5, 1, 12, 6]], ids=str)
def test_documents_begin_at_a_block_each_row_on_its_own(variant, lengths, attention):
    model = causal_lm(variant)
    model.set_attn_implementation(attention)
    block, ids = model.config.block_length, random_ids(2, 24)
    numbers, alone = torch.zeros_like(ids), []
    for row, blocks in enumerate(([0, 1, 5], [0, 4, 6])):
        places = [block * number for number in blocks if block * number < 24] + [24]
        for begin, end in zip(places, places[1:]):
            numbers[row, begin:end] = begin
        parts = [model(ids[row : row + 1, begin:end]).logits for begin, end in zip(places, places[1:])]
        alone.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(in_calls(model, ids, lengths, seq_idx=numbers), torch.cat(alone), **CLOSE)
    torch.testing.assert_close(model(ids, seq_idx=numbers).logits, torch.cat(alone), **CLOSE)


def test_documents_inside_a_block_are_refused(variant):
    model, ids = causal_lm(variant), random_ids(1, LENGTH)
    block = model.config.block_length
    numbers = (torch.arange(LENGTH)[None] >= block + 1).long()
    with pytest.raises(ValueError, match=rf"`block_length` \({block}\) .* begins at position {block + 1}"):
        model(ids, seq_idx=numbers)
    with pytest.raises(ValueError, match=f"begins at position {block + 1}"):
        in_calls(model, ids, [block, LENGTH - block], seq_idx=numbers)


@pytest.mark.parametrize("lengths", [[24], [5, 1, 12, 6]], ids=str)
def test_padding_by_whole_blocks_or_on_the_right(variant, lengths):
    model = causal_lm(variant)
    block = model.config.block_length
    for side in ("left", "right"):
        rows = [random_ids(24), random_ids(24 - 2 * block if side == "left" else 10)]
        ids, mask = torch.zeros(2, 24, dtype=torch.long), torch.zeros(2, 24, dtype=torch.long)
        for index, row in enumerate(rows):
            place = slice(24 - len(row), None) if side == "left" else slice(0, len(row))
            ids[index, place], mask[index, place] = row, 1
        logits = in_calls(model, ids, lengths, attention_mask=mask)
        for index, row in enumerate(rows):
            torch.testing.assert_close(logits[index, mask[index].bool()], model(row[None]).logits[0], **CLOSE)


def test_padding_that_shifts_the_blocks_is_refused(variant):
    model, ids = causal_lm(variant), random_ids(2, 12)
    block, mask = model.config.block_length, torch.ones(2, 12, dtype=torch.long)
    mask[1, : block + 1] = 0
    with pytest.raises(ValueError, match=rf"multiple of `block_length` \({block}\), got {block + 1} padded positions"):
        model(ids, attention_mask=mask)
    mask[1] = 1
    mask[1, 6] = 0
    with pytest.raises(ValueError, match="must not have padded positions between real ones"):
        model(ids, attention_mask=mask)


class TestGenerate:
    def by_hand(self, model, ids):
        for _ in range(14):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        return ids.tolist()

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_greedy(self, variant, cache):
        model, ids = causal_lm(variant), random_ids(2, 6)
        options = {"cache_implementation": cache, "disable_compile": True}
        assert model.generate(ids, **GREEDY, **options).tolist() == self.by_hand(model, ids)

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_prompts_padded_by_whole_blocks(self, variant, cache):
        model = causal_lm(variant)
        ids, mask = random_ids(2, 2 * model.config.block_length + 1), None
        mask = torch.ones_like(ids)
        mask[0, : model.config.block_length] = 0
        options = {"cache_implementation": cache, "disable_compile": True}
        together = model.generate(ids, attention_mask=mask, **GREEDY, **options)
        alone = ids[:1, model.config.block_length :]
        assert together[0, model.config.block_length :].tolist() == self.by_hand(model, alone)[0]

    def test_beam_search(self, variant):
        model, ids = causal_lm(variant), random_ids(3, 6)
        options = {**GREEDY, "num_beams": 4, "num_return_sequences": 2}
        assert model.generate(ids, **options).tolist() == model.generate(ids, **options, use_cache=False).tolist()

    def test_assisted_decoding_is_refused(self, variant):
        """It takes tokens back, which states cannot."""
        model, ids = causal_lm(variant), random_ids(1, 6)
        with pytest.raises(ValueError, match="(?i)assist"):
            model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY)

    def test_a_conversation_goes_on_with_the_kept_cache(self, variant):
        model, ids = causal_lm(variant), torch.zeros(1, 0, dtype=torch.long)
        cache = DynamicCache(config=model.config)
        for turn in (6, 1, 9):
            ids = torch.cat([ids, random_ids(1, turn)], dim=1)
            expected = model.generate(ids, use_cache=False, do_sample=False, max_new_tokens=4)
            ids = model.generate(ids, cache=cache, do_sample=False, max_new_tokens=4)
            assert ids.tolist() == expected.tolist()


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"recurrent_layers": [3]}, r"`recurrent_layers` must be indices of the blocks, from 0 to 2, got \[3\]"),
            ({"block_length": None}, "`block_length` must be at least 1 with `recurrent_layers`, got None"),
            ({"block_length": 0}, "`block_length` must be at least 1 with `recurrent_layers`, got 0"),
            ({"num_state_vectors": 0}, "`num_state_vectors` must be at least 1, got 0"),
            ({"memory_length": None}, "`memory_length` must be a number with `recurrent_layers`, got None"),
            ({"memory_mask": "segment"}, "`memory_mask` must be 'window' with `recurrent_layers`, got segment"),
            ({"state_gate": "lstmm"}, "`state_gate` must be one of fixed, lstm, .* did you mean `lstm`"),
            ({"state_update": "dul"}, "`state_update` must be one of skip, dual, single, .* did you mean `dual`"),
            ({"rem_kinds": ["regular"] * 8, "rem_layers": [0, 1]}, "`rem_layers` must be without 1"),
        ],
    )
    def test_fields(self, fields, message):
        fields = {"recurrent_layers": [1], "block_length": 4, "memory_length": 8, **fields}
        with pytest.raises(ValueError, match=message):
            RTransformerConfig(**fields)

    def test_a_cache_without_the_states(self, variant):
        model, ids = causal_lm(variant), random_ids(2, 11)
        cache = DynamicCache(config=model.config)
        model(ids, cache=cache)
        rebuilt = DynamicCache(list(cache), config=model.config)
        with pytest.raises(ValueError, match="`cache` must hold the (recurrent states|LocalRNNs' windows)"):
            model(ids, cache=rebuilt)
        with pytest.raises(
            (ValueError, RuntimeError), match="must hold the recurrent states|Sizes of tensors must match"
        ):
            model(ids[:1], cache=cache)


@pytest.mark.parametrize("update", ["skip", "dual", "single"])
@pytest.mark.parametrize("gate", ["fixed", "lstm"])
def test_the_cell_is_its_equations(update, gate):
    """One block from S_0, written out head by head."""
    fields = {"num_hidden_layers": 1, "recurrent_layers": [0], "state_update": update, "state_gate": gate}
    model = causal_lm("brt", position_embedding="none", **fields).double()
    mixer, config = model.model.layers[0].recurrent_attn, model.config
    cell, block = mixer.cell, config.block_length
    hidden = torch.randn(1, block, 20).double()
    keys, values = (proj(hidden)[0] for proj in (mixer.k_proj, mixer.v_proj))
    memory = cell.norm(cell.initial) + cell.ids

    def attend(query, key, value):
        heads = [
            torch.softmax(q @ k.T / 2, dim=-1) @ v  # sqrt(d) is 2
            for q, k, v in zip(query.split(4, dim=-1), key.split(4, dim=-1), value.split(4, dim=-1))
        ]
        return torch.cat(heads, dim=-1)

    own = attend(cell.q_proj(memory), cell.k_proj(memory), cell.v_proj(memory))
    found = torch.cat([own, attend(cell.token_q_proj(memory), keys, values)], dim=-1)

    def gated(module, states, new, features):
        if gate == "fixed":
            share = torch.sigmoid(module.bias)
            return states * share + new * (1 - share)
        forget = torch.sigmoid(module.forget_proj(features) + 1)
        return states * forget + new * torch.sigmoid(module.input_proj(features) - 1)

    states = cell.initial
    if update == "single":
        inner = torch.relu(cell.up_proj(found))
        states = gated(cell.mlp_gate, states, torch.tanh(cell.down_proj(inner)), inner)
    else:
        states = gated(cell.gate, states, cell.o_proj(found), found)
    if update == "dual":
        inner = torch.relu(cell.up_proj(cell.mlp_norm(states)))
        states = gated(cell.mlp_gate, states, cell.down_proj(inner), inner)
    shaped = (tensor.unflatten(-1, (5, 4)).transpose(0, 1)[None] for tensor in (keys, values))
    initial = cell.initial[None]
    torch.testing.assert_close(cell(initial, cell.keys_and_values(initial), *shaped, None)[0], states)


def test_a_recurrent_layer_has_the_authors_number_of_parameters_more():
    """8 D^2 + 2 S D + 2 D + 3 H more than a plain layer (fixed gate, skip, no biases, unit keys)."""
    size, heads, states = 64, 4, 10
    fields = {
        "vocab_size": 10,
        "hidden_size": size,
        "num_attention_heads": heads,
        "num_hidden_layers": 1,
        "num_local_rnns": 0,
        "memory_length": 8,
        "layer_norm_type": "rms",
        "normalize_keys": True,
        "attention_bias": False,
        "mlp_bias": False,
    }
    recurrent = {"recurrent_layers": [0], "block_length": 8, "num_state_vectors": states}
    counts = [
        RTransformerForCausalLM(RTransformerConfig(**fields, **more)).num_parameters() for more in ({}, recurrent)
    ]
    assert counts[1] - counts[0] == 8 * size**2 + 2 * states * size + 2 * size + 3 * heads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_near_float32(variant, dtype):
    model, ids = causal_lm(variant, initializer_range=0.1), random_ids(2, LENGTH)
    expected = model(ids).logits
    with torch.autocast("cpu", dtype):
        logits = in_calls(model, ids, [8, 1, 14])
        model.train()(ids, labels=ids).loss.backward()
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.05)
    model = model.eval().to(dtype)
    torch.testing.assert_close(in_calls(model, ids, [8, 1, 14]).float(), expected, rtol=0.05, atol=0.05)
