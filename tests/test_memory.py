"""Memory of the last M positions: any cut of a text, documents, padding, the masks and what is refused."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.models.t5.modeling_t5 import T5Attention

from modeling_rtransformer import RTransformerConfig, RTransformerForCausalLM, rem_heads
from modeling_rtransformer.memory import detach_memory
from modeling_rtransformer.positions import same_segment
from modeling_rtransformer.recurrence_encoding import (
    RemHeads,
    rem_matrix,
    rem_scan_window,
)
from modeling_rtransformer.relative_positions import (
    RelativeBias,
    RelativePositions,
    by_distance,
    by_distance_at_the_end,
    t5_buckets,
)
from tests.conftest import MEMORY_VARIANTS, tiny_config
from tests.texts import in_calls, random_ids


LENGTH = 23
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=MEMORY_VARIANTS)
def variant(request):
    return request.param


def causal_lm(variant, **fields):
    return RTransformerForCausalLM(tiny_config(variant, **fields)).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("lengths", [[1] * LENGTH, [6] + [1] * 17, [2, 7, 1, 13], [20, 3]], ids=str)
def test_any_cut_of_a_text_gives_the_same_outputs(variant, lengths, attention):
    model, ids = causal_lm(variant), random_ids(2, LENGTH)
    model.set_attn_implementation(attention)
    torch.testing.assert_close(in_calls(model, ids, lengths), model(ids).logits, **CLOSE)
    torch.testing.assert_close(model(ids, use_cache=False).logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("room", [8, LENGTH + 8])
def test_a_static_cache_gives_the_same(variant, room):
    model, ids = causal_lm(variant), random_ids(2, LENGTH)
    cache = StaticCache(config=model.config, max_cache_len=room)
    torch.testing.assert_close(in_calls(model, ids, [2, 1, 3, 9, 1, 1, 6], cache), model(ids).logits, **CLOSE)


def test_only_the_last_positions_are_seen(variant):
    """Each block looks back M positions and a LocalRNN's window; a token further back changes nothing."""
    model, ids = causal_lm(variant), random_ids(1, LENGTH)
    config = model.config
    reach = config.num_hidden_layers * (config.memory_length + config.num_local_rnns * (config.local_window - 1))
    far, near = ids.clone(), ids.clone()
    far[:, LENGTH - 2 - reach :][:, :1] = 3 + (far[:, LENGTH - 2 - reach :][:, :1] - 2) % 34
    near[:, LENGTH - 2] = 3 + (near[:, LENGTH - 2] - 2) % 34
    last = model(ids).logits[:, -1]
    torch.testing.assert_close(model(far).logits[:, -1], last, rtol=0, atol=1e-6)
    assert not torch.allclose(model(near).logits[:, -1], last, atol=1e-3)


def test_the_segment_mask_sees_the_memory_and_the_whole_segment():
    model, ids = causal_lm("xl", num_hidden_layers=1, memory_mask="segment"), random_ids(1, LENGTH)
    window = causal_lm("xl", num_hidden_layers=1, memory_length=LENGTH)
    window.load_state_dict(model.state_dict())
    cache = DynamicCache(config=model.config)
    model(ids[:, :9], cache=cache)
    segment = model(ids[:, 9:], cache=cache).logits
    torch.testing.assert_close(segment, window(ids[:, 3:]).logits[:, 6:], **CLOSE)
    assert not torch.allclose(segment, model(ids).logits[:, 9:], atol=1e-3)


def test_the_cache_does_not_grow(variant):
    model = causal_lm(variant)
    cache = DynamicCache(config=model.config)
    in_calls(model, random_ids(1, 60), [7] * 8 + [4], cache)
    assert {layer.keys.shape[2] for layer in cache.layers} == {model.config.memory_length}
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [[LENGTH], [5, 1, 12, 5]], ids=str)
def test_a_padded_batch_equals_each_row_alone(variant, side, lengths):
    model = causal_lm(variant)
    rows = [random_ids(9), random_ids(LENGTH), random_ids(2)]
    ids, mask = torch.zeros(3, LENGTH, dtype=torch.long), torch.zeros(3, LENGTH, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(LENGTH - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    logits = in_calls(model, ids, lengths, attention_mask=mask)
    for index, row in enumerate(rows):
        torch.testing.assert_close(logits[index, mask[index].bool()], model(row[None]).logits[0], **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("lengths", [[LENGTH], [1] * LENGTH, [5, 1, 12, 5]], ids=str)
def test_documents_begin_anywhere_and_each_row_on_its_own(variant, lengths, attention):
    model = causal_lm(variant)
    model.set_attn_implementation(attention)
    ids, begins = random_ids(2, LENGTH), [[0, 4, 5, 19, LENGTH], [0, 11, 12, 13, LENGTH]]
    numbers = torch.zeros_like(ids)
    alone = []
    for row, places in enumerate(begins):
        for begin, end in zip(places, places[1:]):
            numbers[row, begin:end] = begin
        parts = [model(ids[row : row + 1, begin:end]).logits for begin, end in zip(places, places[1:])]
        alone.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(in_calls(model, ids, lengths, seq_idx=numbers), torch.cat(alone), **CLOSE)
    torch.testing.assert_close(model(ids, seq_idx=numbers).logits, torch.cat(alone), **CLOSE)


def test_only_the_numbers_of_what_can_be_seen_are_needed(variant):
    model, ids = causal_lm(variant), random_ids(1, LENGTH)
    numbers = (torch.arange(LENGTH)[None] >= 15).long()
    cache = DynamicCache(config=model.config)
    window = model.config.local_window - 1 if model.config.num_local_rnns else 0
    past = max(model.config.memory_length, window)
    model(ids[:, :17], cache=cache, seq_idx=numbers[:, :17])
    with pytest.raises(ValueError, match=f"`seq_idx` must have .* the last {past + 6} .* got 6 columns for 6"):
        model(ids[:, 17:], cache=cache, seq_idx=numbers[:, 17:])
    logits = model(ids[:, 17:], cache=cache, seq_idx=numbers[:, 17 - past :]).logits
    torch.testing.assert_close(logits, model(ids[:, 15:]).logits[:, 2:], **CLOSE)


def test_documents_beside_a_cache_of_all_keys():
    model, ids = causal_lm("gru-and-rsa"), random_ids(1, LENGTH)
    numbers = (torch.arange(LENGTH)[None] >= 11).long()
    logits = in_calls(model, ids, [5, 1, 12, 5], seq_idx=numbers)
    expected = torch.cat([model(ids[:, :11]).logits, model(ids[:, 11:]).logits], dim=1)
    torch.testing.assert_close(logits, expected, **CLOSE)
    with pytest.raises(ValueError, match="`seq_idx` cannot be used with a StaticCache of all keys"):
        in_calls(model, ids, [5, 18], StaticCache(config=model.config, max_cache_len=30), seq_idx=numbers)


def test_a_detached_memory_has_no_graph_and_the_same_values(variant):
    model, ids = causal_lm(variant).train(), random_ids(2, 12)
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], cache=cache)
    before = [layer.keys.clone() for layer in cache.layers]
    detach_memory(cache)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before))
    loss = model(ids[:, 6:], labels=ids[:, 6:], cache=cache).loss
    loss.backward()
    detach_memory(cache)
    model(ids[:, 6:], labels=ids[:, 6:], cache=cache).loss.backward()  # nothing of the former graph is needed


def test_every_parameter_learns(variant):
    model = causal_lm(variant).train()
    ids = random_ids(2, LENGTH)
    model(ids, labels=ids).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_gradient_checkpointing_equals_training_without_and_refuses_a_memory(variant):
    model, ids = causal_lm(variant).train(), random_ids(2, LENGTH)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients[0], gradients[1])
    with pytest.raises(ValueError, match="`cache` cannot be given with gradient checkpointing"):
        model(ids, cache=DynamicCache(config=model.config))


GREEDY = {"do_sample": False, "max_new_tokens": 14}


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

    def test_prompts_of_unequal_length(self, variant):
        model, ids = causal_lm(variant), random_ids(2, 9)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        together = model.generate(ids, attention_mask=mask, **GREEDY)
        assert together[0, 5:].tolist() == self.by_hand(model, ids[:1, 5:])[0]

    @pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["beam", "lookup"])
    def test_search_and_lookup_do_not_depend_on_the_cache(self, variant, options):
        model, ids = causal_lm(variant), random_ids(1, 6).repeat(1, 3)
        cached = model.generate(ids, **GREEDY, **options)
        options.pop("prompt_lookup_num_tokens", None)  # lossless: the same as greedy
        assert cached.tolist() == model.generate(ids, **GREEDY, **options, use_cache=False).tolist()

    def test_an_assistant_changes_nothing(self, variant):
        model, ids = causal_lm(variant), random_ids(1, 6)
        assistant = causal_lm(variant, num_hidden_layers=1)
        assert model.generate(ids, assistant_model=assistant, **GREEDY).tolist() == self.by_hand(model, ids)

    def test_a_conversation_goes_on_with_the_kept_cache(self, variant):
        model, ids = causal_lm(variant), torch.zeros(1, 0, dtype=torch.long)
        cache = DynamicCache(config=model.config)
        for turn in (6, 1, 9):
            ids = torch.cat([ids, random_ids(1, turn)], dim=1)
            expected = model.generate(ids, use_cache=False, do_sample=False, max_new_tokens=4)
            ids = model.generate(ids, cache=cache, do_sample=False, max_new_tokens=4)
            assert ids.tolist() == expected.tolist()


class TestFastFormsAndTheirDefinitions:
    @pytest.mark.parametrize(
        ("window", "dilation"), [(1, 1), (1, 2), (5, 1), (5, 2), (5, 5), (12, 2), (12, 5), (200, 1), (200, 5)]
    )
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("length", [7, 150])
    def test_two_scans_are_the_windowed_matrix(self, window, dilation, packed, length):
        eigenvalues = [torch.tensor(numbers).double() for numbers in ([-0.9, 0.99, 0.7, 0.8], [0.0, 0.0, 0.9, 1.7])]
        decay, angle = (values.requires_grad_() for values in eigenvalues)
        heads = RemHeads(decay, angle, torch.tensor([False, False, False, True]))
        values = torch.randn(2, 4, length, 3).double().requires_grad_()
        gates = torch.rand(4).double().requires_grad_()
        ids = (torch.arange(length) // 40 + torch.arange(2)[:, None]) if packed else None
        matrix = rem_matrix(heads, torch.arange(length), length, dilation, True, window) * gates[:, None, None]
        expected = (matrix if ids is None else matrix * same_segment(ids)) @ values
        product = rem_scan_window(heads, values, dilation, window, ids, gates)
        torch.testing.assert_close(product, expected)
        inputs, weights = (decay, angle, values, gates), torch.randn_like(expected)
        for ours, theirs in zip(
            torch.autograd.grad((product * weights).sum(), inputs),
            torch.autograd.grad((expected * weights).sum(), inputs),
        ):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize(
        ("queries", "length", "distances"), [(5, 5, 5), (5, 12, 4), (5, 12, 12), (1, 9, 3), (7, 9, 5)]
    )
    def test_a_shift_is_the_index_by_distance(self, queries, length, distances):
        scores = torch.randn(2, 3, queries, distances)
        rows = torch.arange(length - queries, length)
        expected = by_distance(scores, rows, length)
        gap = rows[:, None] - torch.arange(length)
        seen = (gap >= 0) & (gap < distances)
        shifted = by_distance_at_the_end(scores, length)
        assert torch.equal(shifted[..., seen], expected[..., seen])
        assert torch.equal(
            expected[..., seen], scores[:, :, rows.new_tensor(range(queries))[:, None].expand_as(gap)[seen], gap[seen]]
        )

    def test_the_projection_goes_to_few_queries_or_to_the_distances(self):
        bias = RelativeBias(tiny_config("xl"))
        shared = RelativePositions(torch.randn(9, 20), torch.randn(5, 4), torch.randn(5, 4))
        query = torch.randn(1, 5, 8, 4)
        _, many = bias(query, shared, 9)
        few = torch.cat([bias(query[:, :, place : place + 1], shared, 9)[1] for place in range(8)], dim=2)
        torch.testing.assert_close(few, many)

    def test_the_buckets_are_those_of_t5(self):
        theirs = T5Attention._relative_position_bucket(-torch.arange(300), bidirectional=False)
        assert torch.equal(t5_buckets(300, torch.device("cpu")), theirs)


def test_the_papers_models_have_the_papers_parameters():
    """RSA-XL of 14 layers: 47,789,665, 70 more than the same Transformer-XL (text8, 27 symbols)."""
    fields = {
        "vocab_size": 27,
        "num_hidden_layers": 14,
        "num_local_rnns": 0,
        "position_embedding": "relative",
        "attention_bias": False,
        "norm_position": "post",
        "final_norm": False,
        "memory_length": 512,
    }
    rsa = rem_heads(8, dilated_first_cyclical=2, dilated_second_cyclical=2, dilations=[6, 6, 12, 12])
    with torch.device("meta"):
        plain, with_rsa = (RTransformerForCausalLM(RTransformerConfig(**fields, **more)) for more in ({}, rsa))
    assert (plain.num_parameters(), with_rsa.num_parameters()) == (47_789_595, 47_789_665)


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"memory_length": -1}, "`memory_length` must be at least 1, or None for the whole past, got -1"),
            ({"memory_length": 0}, "`memory_length` must be at least 1"),
            ({"memory_mask": "segments"}, "`memory_mask` must be one of window, segment, .*did you mean `segment`"),
            ({"clamp_length": 3}, "`clamp_length` must be None without `position_embedding` 'relative', got 3"),
            ({"clamp_length": 0, "position_embedding": "relative"}, "`clamp_length` must be at least 1"),
            ({"norm_position": "post"}, "`final_norm` must be False with `norm_position` 'post', got True"),
            ({"memory_length": 3, "is_causal": False}, "`memory_length` must be None with `is_causal` False, got 3"),
            ({"position_embedding": "t5", "is_causal": False}, "`position_embedding` must be 'none' or 'sinusoidal'"),
            ({"see_own_position": False, "is_causal": False}, "`see_own_position` must be True"),
            ({"normalize_keys": True, "position_embedding": "relative"}, "`normalize_keys` must be False"),
        ],
    )
    def test_fields(self, fields, message):
        with pytest.raises(ValueError, match=message):
            RTransformerConfig(**fields)

    def test_a_cache_of_another_setting(self, variant):
        model, ids = causal_lm(variant), random_ids(1, 5)
        kept = model.config.memory_length
        with pytest.raises(ValueError, match="`cache` must keep the last keys of each block"):
            model(ids, cache=DynamicCache())
        if model.config.num_local_rnns == 0:
            longer = DynamicCache(config=tiny_config(variant, memory_length=kept + 1))
            with pytest.raises(ValueError, match=f"{kept} of each block, got one that keeps {kept + 1}"):
                model(ids, cache=longer)
        short = StaticCache(config=model.config, max_cache_len=3)
        with pytest.raises(ValueError, match=f"{kept} of each block, got one that keeps 2"):
            in_calls(model, ids, [3, 2], short)
        whole = causal_lm(variant, memory_length=None)
        with pytest.raises(ValueError, match="`cache` must keep all keys, since `memory_length` is None"):
            whole(ids, cache=DynamicCache(config=model.config))

    @pytest.mark.parametrize(
        ("variant", "attention", "message"),
        [
            ("xl", "flex_attention", "must be 'eager' or 'sdpa' with `position_embedding`"),
            ("gru-and-rsa-with-memory", "flash_attention_2", "must be one of eager, sdpa, flex_attention"),
        ],
    )
    def test_attention_implementations(self, variant, attention, message):
        model = causal_lm(variant)
        model.config._attn_implementation_internal = attention
        with pytest.raises(ValueError, match=f"`attn_implementation` {message}.*{attention}"):
            model(random_ids(1, 5))

    def test_tensor_parallelism(self):
        config = tiny_config("xl")
        config.distributed_config = type("Distributed", (), {"tp_size": 5})()
        with pytest.raises(ValueError, match="`tp_size` must be 1 with `position_embedding` 'relative'"):
            RTransformerForCausalLM(config)


def test_rows_of_p_are_cut_to_the_window_in_attention():
    """The mixing matrix of an RSA head has no entry where the mask hides the key."""
    config = tiny_config("rsa-xl", memory_length=4)
    config._attn_implementation = "eager"
    model = RTransformerForCausalLM(config).eval()
    weights = model(random_ids(1, LENGTH), output_attentions=True).attentions[0]
    gap = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    assert weights[..., (gap < 0) | (gap > 4)].abs().max() == 0


def test_what_a_memory_cannot_tell_is_refused():
    model, ids = causal_lm("xl"), random_ids(1, 5)
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="`cu_seq_lens_q` describes packed sequences"):
        model(ids, cache=cache, cu_seq_lens_q=torch.tensor([0, 2, 5]))
    sinusoidal = causal_lm("gru-and-rsa-with-memory", position_embedding="sinusoidal")
    with pytest.raises(ValueError, match="`position_ids` must be given with `seq_idx`"):
        sinusoidal(ids, cache=DynamicCache(config=sinusoidal.config), seq_idx=torch.zeros_like(ids))


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache], ids=["dynamic", "static"])
def test_a_compiler_finds_no_graph_break(variant, cache_class):
    """Whatever it makes of the graph: prompt, steps until the memory is full, and steps after."""
    torch._dynamo.reset()
    model = causal_lm(variant, num_hidden_layers=1, rem_layers=None)
    compiled, ids = torch.compile(model, backend="eager", fullgraph=True), random_ids(1, LENGTH)
    options = {"max_cache_len": 40} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config, **options)
    with torch.no_grad():
        logits = torch.cat([compiled(part, cache=cache).logits for part in ids.split([4] + [1] * 19, dim=1)], dim=1)
        torch.testing.assert_close(logits, model(ids).logits, **CLOSE)


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


def test_transformers_name_of_the_window():
    config = tiny_config("xl")
    assert config.sliding_window == config.memory_length + 1
    config.sliding_window = 3
    assert config.memory_length == 2
    assert not hasattr(tiny_config("gru"), "sliding_window")
