"""`generate` in all its ways, for LocalRNN windows, REMs and both."""

from functools import partial

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, StaticCache, TextIteratorStreamer
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from modeling_rtransformer import RTransformerForCausalLM
from tests.conftest import tiny_config


CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# An older static cache has no windows when it is offloaded, which the model refuses.
OFFLOADS_STATIC_WINDOWS = Version(transformers.__version__) >= Version("5.24")
GREEDY = {"do_sample": False, "max_new_tokens": 14}


def causal_lm(variant="gru-and-rsa", **fields):
    return RTransformerForCausalLM(tiny_config(variant, **fields)).eval()


def prompt(*shape):
    return torch.randint(3, 37, shape)


def greedy_by_hand(model, ids, steps):
    """The likeliest token each time, from the full forward without a cache."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def test_greedy_is_the_likeliest_token_each_time(variant):
    model, ids = causal_lm(variant), prompt(2, 6)
    assert model.generate(ids, **GREEDY).tolist() == greedy_by_hand(model, ids, 14).tolist()


def test_an_assistant_changes_nothing_but_the_speed(variant):
    model, ids = causal_lm(variant), prompt(1, 6)
    torch.manual_seed(1)
    assistant = causal_lm(variant, num_hidden_layers=1, rem_layers=None)
    assert model.generate(ids, assistant_model=assistant, **GREEDY).tolist() == model.generate(ids, **GREEDY).tolist()


def test_an_assistant_that_is_always_right_changes_nothing(variant):
    model, ids = causal_lm(variant), prompt(1, 6)
    assert model.generate(ids, assistant_model=model, **GREEDY).tolist() == model.generate(ids, **GREEDY).tolist()


def test_the_first_block_alone_can_draft_for_the_whole_model(variant):
    model, ids = causal_lm(variant), prompt(1, 6)
    expected = model.generate(ids, **GREEDY).tolist()
    runs = [0, 0]
    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    assert model.generate(ids, assistant_early_exit=1, **GREEDY).tolist() == expected
    assert runs[0] > runs[1]  # the drafts
    assert model.config.num_hidden_layers == 2


def test_beam_search_reorders_windows_keys_and_values(variant):
    model, ids = causal_lm(variant), prompt(3, 6)
    options = {**GREEDY, "num_beams": 4, "num_return_sequences": 2}
    assert model.generate(ids, **options).tolist() == model.generate(ids, **options, use_cache=False).tolist()


def test_sampling_draws_several_sequences_and_the_seed_decides_them(variant):
    model, ids = causal_lm(variant), prompt(2, 6)
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 14}
    runs = []
    for use_cache in (True, True, False):
        torch.manual_seed(5)
        runs.append(model.generate(ids, use_cache=use_cache, **options).tolist())
    assert len(runs[0]) == 6 and len({tuple(row) for row in runs[0]}) > 2
    assert runs[0] == runs[1] == runs[2]


def test_embeddings_can_be_the_prompt(variant):
    model, ids = causal_lm(variant), prompt(2, 6)
    embedded = model.get_input_embeddings()(ids)
    assert model.generate(inputs_embeds=embedded, **GREEDY).tolist() == model.generate(ids, **GREEDY)[:, 6:].tolist()


def test_tokens_are_streamed_as_they_come(variant):
    class Joined:  # stands in for a tokenizer
        def decode(self, ids, **kwargs):
            return "".join(chr(97 + int(index)) for index in ids)

    model, ids = causal_lm(variant), prompt(1, 6)
    streamer = TextIteratorStreamer(Joined(), skip_prompt=True, timeout=10)
    output = model.generate(ids, streamer=streamer, **GREEDY)
    assert "".join(streamer) == Joined().decode(output[0, 6:])


@pytest.mark.parametrize("turns", [(6, 1, 9), (1, 1, 1), (3, 20, 2)])
def test_a_conversation_goes_on_with_the_kept_cache(variant, turns):
    model = causal_lm(variant)
    cache, ids = DynamicCache(config=model.config), torch.zeros(1, 0, dtype=torch.long)
    for turn in turns:
        ids = torch.cat([ids, prompt(1, turn)], dim=1)
        expected = model.generate(ids, use_cache=False, do_sample=False, max_new_tokens=4)
        ids = model.generate(ids, cache=cache, do_sample=False, max_new_tokens=4)
        assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize("removed", [1, 4, 9])
def test_a_cropped_cache_goes_on_as_if_the_rest_had_not_been(variant, removed):
    model, ids = causal_lm(variant), prompt(2, 23)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids[:, :7], cache=cache)
    model(ids[:, 7:17], cache=cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == 17 - removed
    cropped = torch.cat([ids[:, : 17 - removed], prompt(2, 5)], dim=1)
    continued = model(cropped[:, 17 - removed :], cache=cache).logits
    torch.testing.assert_close(continued, model(cropped).logits[:, 17 - removed :], **CLOSE)


@pytest.mark.parametrize("kept", ["with-config", "without-config"])
def test_a_cache_made_again_from_keys_and_values_is_refused_where_there_are_windows(variant, kept):
    """Iterating over a cache gives its keys and values alone, so that a model without windows may go on with them."""
    model, ids = causal_lm(variant), prompt(2, 11)
    cache = DynamicCache(config=model.config)
    model(ids[:, :7], cache=cache)
    rebuilt = DynamicCache(list(cache), config=model.config if kept == "with-config" else None)
    if "hybrid" in model.config.layer_types:
        reason = "of its 7 positions, got none.*pass that other cache" if kept == "with-config" else "values alone"
        with pytest.raises(ValueError, match=f"`cache` must.* windows.*{reason}"):
            model(ids[:, 7:], cache=rebuilt)
        rebuilt = cache  # which the error leaves as it was
    torch.testing.assert_close(model(ids[:, 7:], cache=rebuilt).logits, model(ids).logits[:, 7:], **CLOSE)


def test_an_empty_cache_must_have_been_made_for_the_windows():
    with pytest.raises(ValueError, match=r"`cache`.*DynamicCache\(config=model.config\)"):
        causal_lm("gru")(prompt(2, 7), cache=DynamicCache())


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_an_emptied_cache_is_as_good_as_new(variant, implementation):
    model, ids = causal_lm(variant), prompt(2, 11)
    if implementation == "static":
        cache = StaticCache(config=model.config, max_cache_len=20)
    elif Version(transformers.__version__) < Version("5.23"):
        pytest.skip("an older DynamicCache.reset leaves the length as it was")
    else:
        cache = DynamicCache(config=model.config)
    model(ids, cache=cache)
    cache.reset()
    parts = [model(part, cache=cache).logits for part in ids.split([2, 1, 8], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, **CLOSE)


@pytest.mark.parametrize("method", ["batch_repeat_interleave", "batch_select_indices"])
def test_the_rows_of_a_cache_are_repeated_and_chosen_where_there_are_no_windows(variant, method):
    """Transformers leaves the windows as they were, so that their rows do not fit and the next step is an error."""
    model, ids = causal_lm(variant), prompt(3, 11)
    rows = torch.arange(3).repeat_interleave(2) if method == "batch_repeat_interleave" else torch.tensor([2, 0])
    cache = DynamicCache(config=model.config)
    model(ids[:, :7], cache=cache)
    getattr(cache, method)(2 if method == "batch_repeat_interleave" else rows)
    if "hybrid" in model.config.layer_types:
        with pytest.raises(RuntimeError, match="Sizes of tensors must match except in dimension 2"):
            model(ids[rows, 7:], cache=cache)
    else:
        continued = model(ids[rows, 7:], cache=cache).logits
        torch.testing.assert_close(continued, model(ids[rows]).logits[:, 7:], **CLOSE)


def test_a_quantized_cache_is_refused_where_there_are_windows():
    """Transformers quantizes keys and values alone; a model without LocalRNN windows may have its cache quantized."""
    with pytest.raises(ValueError, match="only full attention layers.*hybrid"):
        causal_lm("gru").generate(prompt(1, 6), cache_implementation="quantized", **GREEDY)


class Stream:
    """
    Stands in for a CUDA stream: copies that are asked for inside it arrive when another stream waits for it.
    """

    open, copies = False, []  # of the one stream beside the default one

    def __enter__(self):
        Stream.open = True

    def __exit__(self, *error):
        Stream.open = False

    def wait_stream(self, other):
        while Stream.copies:
            Stream.copies.pop()()


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_what_is_offloaded_is_back_before_it_is_read(variant, cache, layers, monkeypatch):
    """What a GPU does, played on a CPU: an offloaded layer holds NaN until its prefetch has been waited for."""
    away = {}

    def tensors(layer):
        states = [(layer.conv_states, index) for index in getattr(layer, "conv_states", {})]
        return [(vars(layer), "keys"), (vars(layer), "values"), *states]

    def offload(layer):
        for place, name in tensors(layer):
            if place[name] is not None and (id(layer), name) not in away:
                away[id(layer), name] = place[name]
                place[name] = torch.full_like(place[name], torch.nan)

    def prefetch(layer):
        for place, name in tensors(layer):
            content = away.pop((id(layer), name), None)
            if content is not None:
                arrive = partial(place.__setitem__, name, content)
                Stream.copies.append(arrive) if Stream.open else arrive()

    def layers_of(cls):
        return [cls, *(below for child in cls.__subclasses__() for below in layers_of(child))]

    model, ids = causal_lm(variant, num_hidden_layers=layers, rem_layers=None), prompt(2, 6)
    options = {**GREEDY, "disable_compile": True}
    expected = model.generate(ids, **options).tolist()
    monkeypatch.setattr(torch, "Stream", Stream)
    for name in ("default_stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: Stream())
    for cls in {*layers_of(CacheLayerMixin), *layers_of(LinearAttentionCacheLayerMixin)}:
        monkeypatch.setattr(cls, "offload", offload)
        monkeypatch.setattr(cls, "prefetch", prefetch)
    if cache == "offloaded_static" and "hybrid" in model.config.layer_types and not OFFLOADS_STATIC_WINDOWS:
        with pytest.raises(ValueError, match="offloaded static cache has no room .* use `cache_implementation` 'offlo"):
            model.generate(ids, cache_implementation=cache, **options)
        return
    assert model.generate(ids, cache_implementation=cache, **options).tolist() == expected
    assert away or Stream.copies  # it was offloaded


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_changes_nothing(variant, cache):
    model, ids = causal_lm(variant).cuda(), prompt(2, 6).cuda()
    if cache == "offloaded_static" and "hybrid" in model.config.layer_types and not OFFLOADS_STATIC_WINDOWS:
        with pytest.raises(ValueError, match="offloaded static cache has no room"):
            model.generate(ids, cache_implementation=cache, **GREEDY)
        return
    assert model.generate(ids, cache_implementation=cache, **GREEDY).tolist() == model.generate(ids, **GREEDY).tolist()


@pytest.mark.parametrize("logits_to_keep", [1, 3, torch.tensor([0, 4])], ids=["last", "three", "chosen"])
def test_only_the_asked_for_logits_are_computed(logits_to_keep):
    model, ids = causal_lm(), prompt(2, 6)
    full = model(ids).logits
    kept = full[:, logits_to_keep] if isinstance(logits_to_keep, torch.Tensor) else full[:, -logits_to_keep:]
    torch.testing.assert_close(model(ids, logits_to_keep=logits_to_keep).logits, kept)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_prompts_of_unequal_length_padded_left(variant, cache):
    model = causal_lm(variant)
    rows = [prompt(n) for n in (2, 11, 7)]
    ids = torch.stack([torch.cat([torch.zeros(11 - len(row), dtype=torch.long), row]) for row in rows])
    mask = (torch.arange(11) >= torch.tensor([[11 - len(row)] for row in rows])).long()
    options = {**GREEDY, "cache_implementation": cache, "disable_compile": True}
    together = model.generate(ids, attention_mask=mask, **options)
    for row, output in zip(rows, together):
        assert output[11:].tolist() == greedy_by_hand(model, row[None], 14)[0, len(row) :].tolist()
