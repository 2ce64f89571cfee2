"""RSA heads in existing Transformers models: families x checks, all with open gates."""

import copy

import pytest
import torch
import transformers as hf
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from modeling_rtransformer.rsa_encoding import RsaEncoding, VisibleKeys, read_visible_keys
from tests.rsa_families import (
    BIDIRECTIONAL,
    CAUSAL,
    FAMILIES,
    SEQUENCE_TO_SEQUENCE,
    SERIES_MODELS,
    as_loops,
    build,
    inject,
    inputs,
    open_gates,
    output,
    shared_model,
)


pytest.importorskip("peft", reason="PEFT is not installed")

EAGER_ONLY = (*SERIES_MODELS,)  # these classes have no SDPA
WITHOUT_PADDING = ("vit", "patchtst", "whisper")
COUNTED_FROM_THE_LEFT = ("bert", "roberta", "distilbert")  # position embeddings: left padding moves them
CLOSE = {"rtol": 1e-6, "atol": 2e-6}  # some families compute norms in float32


def right_padding(batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 3 :] = 0
    return mask


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_gates_change_nothing_and_open_ones_learn(family):
    model, arguments = build(family).requires_grad_(False), inputs(family)  # PyTorch folds products of frozen weights
    expected = output(model, **arguments)
    inject(model)
    assert torch.equal(output(model, **arguments), expected)
    open_gates(model)
    result = output(model, **arguments)
    assert (result - expected).abs().max() > 1e-2
    result.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".rsa." in name)
        assert not parameter.requires_grad or (parameter.grad != 0).all(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_loops_in_float64(family):
    model, arguments = shared_model(family), inputs(family)
    with torch.no_grad():
        torch.testing.assert_close(output(model, **arguments), output(as_loops(model), **arguments), **CLOSE)


@pytest.mark.parametrize("family", [*CAUSAL, *BIDIRECTIONAL, *SEQUENCE_TO_SEQUENCE])
def test_padded_outputs_are_those_of_loops_in_float64(family):
    model, arguments = shared_model(family), inputs(family)
    mask = right_padding(*arguments["input_ids"].shape)
    with torch.no_grad():
        ours, loops = (output(m, **arguments, attention_mask=mask) for m in (model, as_loops(model)))
    if family not in SEQUENCE_TO_SEQUENCE:
        ours, loops = ours[mask.bool()], loops[mask.bool()]
    torch.testing.assert_close(ours, loops, **CLOSE)


@pytest.mark.parametrize(
    ("family", "padded"),
    [
        (name, padded)
        for name in FAMILIES
        for padded in (False, True)
        if name not in EAGER_ONLY and not (padded and name in WITHOUT_PADDING)
    ],
)
def test_eager_is_sdpa(family, padded):
    model, arguments = copy.deepcopy(shared_model(family)), inputs(family)
    mask = None
    if padded:
        mask = arguments["attention_mask"] = right_padding(*arguments["input_ids"].shape)
    results, gradients = [], []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        result = output(model, **arguments)
        if mask is not None and family not in SEQUENCE_TO_SEQUENCE:
            result = result[mask.bool()]
        model.zero_grad()
        result.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        results.append(result)
    torch.testing.assert_close(*results, **CLOSE)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "side"),
    [
        (name, side)
        for name in (*CAUSAL, "opt", *BIDIRECTIONAL)
        for side in ("left", "right")
        if not (side == "left" and name in COUNTED_FROM_THE_LEFT)
    ],
)
def test_padding_changes_no_position(family, side):
    model, ids = shared_model(family), inputs(family)["input_ids"]
    short = ids[:1, :7]
    padding = torch.zeros(1, 4, dtype=torch.long)
    row = torch.cat([padding, short] if side == "left" else [short, padding], dim=1)
    mask = (row != 0).long()
    arguments = {"input_ids": torch.cat([row, ids[1:]]), "attention_mask": torch.cat([mask, torch.ones_like(mask)])}
    if family in ("gpt2", "gpt-neox", "mistral", "llama", "qwen3", "gemma3"):
        arguments["position_ids"] = (arguments["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        result = output(model, **arguments)[:1]
        result = result[:, 4:] if side == "left" else result[:, :7]
        torch.testing.assert_close(result, output(model, input_ids=short), **CLOSE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*CAUSAL])
def test_nothing_crosses_the_boundary_of_packed_sequences(family, implementation):
    model, ids = copy.deepcopy(shared_model(family)), inputs(family)["input_ids"][:1]
    model.set_attn_implementation(implementation)
    positions = torch.tensor([[*range(4), *range(7)]])
    with torch.no_grad():
        packed = output(model, input_ids=ids, position_ids=positions, use_cache=False)
        apart = [output(model, input_ids=part, use_cache=False) for part in (ids[:, :4], ids[:, 4:])]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), **CLOSE)


@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", [*CAUSAL, "opt", "gpt-neox", "deepseek-v3"])
def test_cached_outputs_are_uncached_outputs(family, cache_kind):
    model, ids = shared_model(family), inputs(family, length=16)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        if cache_kind == "static":
            cache = hf.StaticCache(config=model.config, max_cache_len=20)
        else:
            cache = hf.DynamicCache(config=model.config)
        steps, start = [], 0
        for size in (4, 3, 1, 1, 1, 2, 1, 1, 1, 1):  # past the windows of 5
            options = {"attention_mask": mask[:, : start + size], "past_key_values": cache, "use_cache": True}
            if family not in ("opt",):
                options["position_ids"] = positions[:, start : start + size]
                whole_options = {"position_ids": positions}
            else:
                whole_options = {}
            steps.append(model(ids[:, start : start + size], **options).logits)
            start += size
        whole = model(ids, attention_mask=mask, use_cache=False, **whole_options).logits
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(steps, dim=1)[seen], whole[seen], **CLOSE)


def greedy(model, prompt, steps):
    ids = prompt
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


MODES = {
    "greedy": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "without cache": {"use_cache": False},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", [*CAUSAL, "opt", "gpt-neox", "deepseek-v3"])
def test_generation_is_the_uncached_one(family, mode):
    model, prompt = shared_model(family), inputs(family, batch=1, length=6)["input_ids"]
    with torch.no_grad():
        expected = greedy(model, prompt, 9)
        made = model.generate(prompt, max_new_tokens=9, do_sample=False, **MODES[mode])
    assert made.tolist() == expected.tolist()


@pytest.mark.parametrize("family", [*CAUSAL, "opt", "gpt-neox"])
def test_padded_and_beam_generation(family):
    model, prompts = shared_model(family), inputs(family, length=8)["input_ids"]
    mask = torch.ones_like(prompts)
    mask[0, :3] = 0
    with torch.no_grad():
        padded = model.generate(prompts, attention_mask=mask, max_new_tokens=7, do_sample=False)
        alone = model.generate(prompts[:1, 3:], max_new_tokens=7, do_sample=False)
        assert padded[0, 3:].tolist() == alone[0].tolist()
        beams = [model.generate(prompts[1:], max_new_tokens=7, num_beams=3, use_cache=use) for use in (True, False)]
        assert beams[0].tolist() == beams[1].tolist()


@pytest.mark.parametrize("family", SEQUENCE_TO_SEQUENCE)
def test_generation_of_encoder_decoder_models(family):
    model, ids = shared_model(family), inputs(family)["input_ids"]
    for options in ({}, {"num_beams": 3}):
        made = [
            model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use_cache, **options)
            for use_cache in (True, False)
        ]
        assert made[0].tolist() == made[1].tolist()


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both-sides"])
@pytest.mark.parametrize("reach", [None, 0, 1, 4, 150])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_scan_is_the_product_with_rows(is_causal, reach, packed):
    torch.manual_seed(0)
    kinds = [(0, "regular", 1), (1, "first_cyclical", 1), (2, "second_cyclical", 1), (3, "first_cyclical", 3)]
    encoding = RsaEncoding(kinds, 6, "head", is_causal, "zero").double()
    encoding.init_parameters()
    torch.nn.init.normal_(encoding.mu)
    value = torch.randn(2, 3, 163, 5, dtype=torch.float64, requires_grad=True)  # three value heads for six heads
    padding_mask = torch.rand(2, 163) < 0.9
    segment_ids = (torch.rand(2, 163) < 0.03).cumsum(1) if packed else None
    keys = VisibleKeys(padding_mask, segment_ids, reach)
    visible = keys.matrix(163, is_causal, value.device)[:, None]
    rows = encoding.rows(torch.arange(163), 163) * visible
    results = [encoding.scan(value, keys), encoding.times_values(rows, value)]
    torch.testing.assert_close(*results)
    weight = torch.randn_like(results[0])
    gradients = [torch.autograd.grad(r, [value, *encoding.parameters()], weight, retain_graph=True) for r in results]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both-sides"])
def test_masks_are_read_exactly(is_causal):
    torch.manual_seed(0)
    real = torch.rand(3, 41) < 0.9
    real[0] = True
    segments = (torch.rand(3, 41) < 0.1).cumsum(1)
    for padding_mask, segment_ids in ((None, None), (real, None), (None, segments)):
        for reach in (None, 0, 1, 6):
            matrix = VisibleKeys(padding_mask, segment_ids, reach).matrix(41, is_causal, real.device)
            read = read_visible_keys(matrix[:, None], is_causal)
            assert torch.equal(read.matrix(41, is_causal, real.device).expand_as(matrix), matrix)
            assert (read.padding_mask is None) == (padding_mask is None)
            assert reach is not None or read.reach is None
    other = torch.rand(2, 1, 41, 41) < 0.5
    other.diagonal(dim1=2, dim2=3).fill_(True)
    assert read_visible_keys(other, is_causal) is None
    per_head = torch.stack([matrix[0], other[0, 0]])[None]
    assert read_visible_keys(per_head, is_causal) is None


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "bert", "modernbert"])
def test_padding_packing_and_windows_make_no_matrix(family, monkeypatch):
    model, arguments = shared_model(family), inputs(family)
    monkeypatch.setattr(RsaEncoding, "rows", lambda *_: pytest.fail("a matrix of all pairs was made"))
    with torch.no_grad():
        output(model, **arguments)
        output(model, **arguments, attention_mask=right_padding(*arguments["input_ids"].shape))
        if family in CAUSAL:
            positions = torch.tensor([[*range(4), *range(7)]]).expand(2, -1)
            output(model, **arguments, position_ids=positions, use_cache=False)


def test_a_mask_of_any_form_is_applied():
    """A prefix that sees itself on both sides, beside causal positions: no padding, segment or window."""
    model, ids = shared_model("llama"), inputs("llama")["input_ids"]
    visible = torch.ones(11, 11, dtype=torch.bool).tril()
    visible[:4, :4] = True
    visible[7, 2] = False
    mask = visible[None, None].expand(2, 1, -1, -1)
    with torch.no_grad():
        ours = output(model, input_ids=ids, attention_mask=mask)
        loops = as_loops(model)
        hidden = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
        expected = output(loops, input_ids=ids, attention_mask=hidden)
    torch.testing.assert_close(ours, expected, **CLOSE)


def test_changed_parameters_count_in_a_running_generation():
    model, ids = copy.deepcopy(shared_model("llama")), inputs("llama")["input_ids"]
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
        model(ids[:, 8:9], past_key_values=cache)
        with torch.enable_grad():
            expected_cache = copy.deepcopy(cache)
        open_gates(model, seed=5)
        after = model(ids[:, 9:10], past_key_values=cache).logits
    with torch.enable_grad():  # makes its row anew
        expected = model(ids[:, 9:10], past_key_values=expected_cache).logits
    torch.testing.assert_close(after, expected.detach())


def flash_stand_in(module, query, key, value, attention_mask, sliding_window=None, is_causal=None, **kwargs):
    """Attention with the arguments of flash attention: a 2D mask of padded keys, a window, `cu_seq_lens_q`."""
    assert module.config._attn_implementation == "flash_stand_in"
    queries, keys = query.shape[2], key.shape[2]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    visible = (distance >= 0) & (distance < (sliding_window or keys + 1))
    visible = visible[None]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, :].bool()
    if (bounds := kwargs.get("cu_seq_lens_q")) is not None:
        ids = torch.searchsorted(bounds[1:].contiguous(), torch.arange(keys, dtype=bounds.dtype), right=True)
        visible = visible & (ids[:, None] == ids)
    visible = visible | ~visible.any(-1, keepdim=True)
    share = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(share, dim=1) for part in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, visible[:, None], scale=kwargs.get("scaling")
    )
    return out.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_flash_attention_has_the_same_results(family):
    AttentionInterface.register("flash_stand_in", flash_stand_in)
    AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)
    sdpa, flash, ids = shared_model(family), copy.deepcopy(shared_model(family)), inputs(family)["input_ids"]
    flash.config._attn_implementation = "flash_stand_in"
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    bounds = torch.tensor([0, 4, 11], dtype=torch.int32)
    positions = torch.tensor([[*range(4), *range(7)]])
    packed = {"position_ids": positions, "use_cache": False}
    with torch.no_grad():
        torch.testing.assert_close(flash(ids).logits, sdpa(ids).logits, **CLOSE)
        seen = mask.bool()
        left = [model(ids, attention_mask=mask).logits[seen] for model in (flash, sdpa)]
        torch.testing.assert_close(*left, **CLOSE)
        options = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7}
        rows = flash(ids[:1], **packed, **options).logits, sdpa(ids[:1], **packed).logits
        torch.testing.assert_close(*rows, **CLOSE)
        made = [m.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False) for m in (flash, sdpa)]
        assert made[0].tolist() == made[1].tolist()


@pytest.mark.slow  # compiles
def test_flex_attention_has_the_same_results():
    model, ids = shared_model("llama").float(), inputs("llama")["input_ids"]
    flex = copy.deepcopy(model)
    flex.set_attn_implementation("flex_attention")
    mask = right_padding(*ids.shape)
    with torch.no_grad():
        results = [m(ids, attention_mask=mask).logits[mask.bool()] for m in (flex, model)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_compiles_as_one_graph(padded):
    model, ids = copy.deepcopy(shared_model("llama")), inputs("llama")["input_ids"]
    arguments = {"attention_mask": right_padding(*ids.shape)} if padded else {}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        result = compiled(ids, use_cache=False, **arguments).logits
        torch.testing.assert_close(result, model(ids, use_cache=False, **arguments).logits)


def test_static_decoding_compiles_as_one_graph():
    model, ids = copy.deepcopy(shared_model("llama")), inputs("llama")["input_ids"]
    caches = [hf.StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
    step = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :6], past_key_values=cache)
        for place in range(6, 11):
            results = [
                run(ids[:, place : place + 1], past_key_values=cache).logits
                for run, cache in zip((step, model), caches)
            ]
            torch.testing.assert_close(*results)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_has_the_same_gradients(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model, ids = copy.deepcopy(shared_model("llama")).train(), inputs("llama")["input_ids"]
        if checkpointing:
            model.enable_input_require_grads()
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if ".rsa." in name})
    torch.testing.assert_close(*gradients)


def test_eager_weights_multiply_the_values():
    model, arguments = copy.deepcopy(shared_model("llama")), inputs("llama")
    model.set_attn_implementation("eager")
    seen = []
    attention = model.model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attention.v_proj.register_forward_hook(lambda module, args, result: seen.append(result))
    with torch.no_grad():
        weights = model(**arguments, output_attentions=True).attentions[0]
    values = seen[0].view(2, 11, 2, 8).transpose(1, 2).repeat_interleave(2, dim=1)
    torch.testing.assert_close((weights @ values).transpose(1, 2).reshape(2, 11, 32), seen[1])
