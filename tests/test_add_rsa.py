"""RSA heads as an adapter of existing Transformers models: families x checks, all with open gates."""

import copy
import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from accelerate.state import AcceleratorState
from packaging.version import Version
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.masking_utils import eager_mask, flash_attention_mask

import modeling_rtransformer
from modeling_rtransformer.hub_files import save_code
from modeling_rtransformer.library_versions import CACHE_NAME
from modeling_rtransformer.rsa_attention import QueryPlace, attention_sites, is_cross_attention, rsa_attention_forward
from modeling_rtransformer.rsa_encoding import RsaEncoding, VisibleKeys, read_visible_keys
from tests.rsa_families import (
    BIDIRECTIONAL,
    CAUSAL,
    DECODER,
    FAMILIES,
    GROUPED,
    SEQUENCE_TO_SEQUENCE,
    SERIES,
    SERIES_MODELS,
    build,
    inputs,
    loop_attention,
    open_gates,
    output,
)


peft = pytest.importorskip("peft", reason="PEFT is not installed")

from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

from modeling_rtransformer import RsaConfig, add_rsa  # noqa: E402


# Three heads with a REM of different kinds, one of them dilated, and a plain one.
HEADS = {"regular": 1, "first_cyclical": 0, "second_cyclical": 1, "dilated_first_cyclical": 1, "dilations": [2]}
# The parameters of those three heads: the second and the third are pairs without their partners.
LAYOUT = [("regular", 1, "eta", 0), ("second_cyclical", 1, "nu", 0), ("first_cyclical", 2, "nu", 1)]
SLOW_FAMILIES = ("opt", "gpt-neox", "deepseek-v3", "time-series", "whisper", "roberta")
EAGER_ONLY = (*SERIES_MODELS,)  # these classes have no SDPA
WITHOUT_PADDING = ("vit", "patchtst", "whisper")
COUNTED_FROM_THE_LEFT = ("bert", "roberta", "distilbert")  # position embeddings: left padding moves them
CLOSE = {"rtol": 1e-6, "atol": 2e-6}  # some families compute norms in float32


def marked(families):
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW_FAMILIES else ()) for name in families]


def inject(model, **options):
    """The adapter in the model itself, whatever versions of PEFT the adapters of Transformers need."""
    return peft.inject_adapter_in_model(RsaConfig(**(options or HEADS)), model)


def adapted(family, **options):
    model = inject(build(family), **options)
    open_gates(model)
    return model


@functools.cache
def shared_model(family):
    """A model that tests do not change."""
    return adapted(family)


def as_loops(model):
    """The same model, its attention computed by loops that share no code with the package."""
    model = copy.deepcopy(model)
    for module in attention_sites(model).values():
        module.config = module.config.base_config
        module.rem_layout = LAYOUT
        module._forward_pre_hooks.clear()
    AttentionInterface.register("loops", loop_attention)
    AttentionMaskInterface.register("loops", eager_mask)
    for module in model.modules():
        if isinstance(module, hf.PreTrainedModel):
            module.config._attn_implementation = "loops"
    for name, module in model.named_modules():
        if is_cross_attention(name, module) and isinstance(getattr(module, "config", None), hf.PreTrainedConfig):
            module.config = copy.copy(module.config)
            module.config._attn_implementation = "eager"
    return model


def right_padding(batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 3 :] = 0
    return mask


@pytest.mark.parametrize("family", marked(FAMILIES))
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


@pytest.mark.parametrize("family", marked(FAMILIES))
def test_outputs_are_those_of_loops_in_float64(family):
    model, arguments = shared_model(family), inputs(family)
    with torch.no_grad():
        torch.testing.assert_close(output(model, **arguments), output(as_loops(model), **arguments), **CLOSE)


@pytest.mark.parametrize("family", marked([*CAUSAL, *BIDIRECTIONAL, *SEQUENCE_TO_SEQUENCE]))
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
        pytest.param(name, padded, marks=pytest.mark.slow if name in SLOW_FAMILIES else ())
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
        pytest.param(name, side, marks=pytest.mark.slow if name in SLOW_FAMILIES else ())
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
@pytest.mark.parametrize("family", marked([*CAUSAL, "opt", "gpt-neox", "deepseek-v3"]))
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
@pytest.mark.parametrize("family", marked([*CAUSAL, "opt", "gpt-neox", "deepseek-v3"]))
def test_generation_is_the_uncached_one(family, mode):
    model, prompt = shared_model(family), inputs(family, batch=1, length=6)["input_ids"]
    with torch.no_grad():
        expected = greedy(model, prompt, 9)
        made = model.generate(prompt, max_new_tokens=9, do_sample=False, **MODES[mode])
    assert made.tolist() == expected.tolist()


@pytest.mark.parametrize("family", marked([*CAUSAL, "opt", "gpt-neox"]))
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


def test_unloaded_model_is_the_base_model():
    base, arguments = build("llama"), inputs("llama")
    expected, keys, config = output(base, **arguments), base.state_dict().keys(), base.model.layers[0].self_attn.config
    model = peft.get_peft_model(base, RsaConfig(**HEADS))
    open_gates(model)
    changed = output(model, **arguments)
    assert not torch.allclose(changed, expected)
    with model.disable_adapter():
        assert torch.equal(output(model, **arguments), expected)
    assert torch.equal(output(model, **arguments), changed)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    unloaded = model.unload()
    assert torch.equal(output(unloaded, **arguments), expected) and unloaded.state_dict().keys() == keys
    attention = unloaded.model.layers[0].self_attn
    assert attention.config is config and not attention._forward_pre_hooks


def test_saved_adapter_is_small_and_loads(tmp_path):
    base_folder, folder = tmp_path / "base", tmp_path / "adapter"
    build("llama").save_pretrained(base_folder)
    base = hf.AutoModelForCausalLM.from_pretrained(base_folder)
    model, arguments = peft.get_peft_model(base, RsaConfig(**HEADS, task_type="CAUSAL_LM")), inputs("llama")
    open_gates(model)
    expected = output(model.eval(), **arguments)
    model.save_pretrained(folder)
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert files["adapter_model.safetensors"] < 4096
    assert "import modeling_rtransformer" in (folder / "README.md").read_text()
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert saved["dilations"] == [2] and saved["gate_form"] == "zero"
    fresh = hf.AutoModelForCausalLM.from_pretrained(base_folder)
    for loaded in (
        peft.PeftModel.from_pretrained(fresh, folder),
        peft.PeftModel.from_pretrained(
            hf.AutoModelForCausalLM.from_pretrained(base_folder), folder, low_cpu_mem_usage=True
        ),
        hf.AutoModelForCausalLM.from_pretrained(folder),
        peft.AutoPeftModelForCausalLM.from_pretrained(folder),
    ):
        assert torch.equal(output(loaded.eval(), **arguments), expected)


def test_an_adapter_of_many_layers_loads(tmp_path):
    """PEFT shortens the names of 20 and more modules."""
    torch.manual_seed(0)
    base, arguments = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "num_hidden_layers": 21})), inputs("llama")
    model = peft.get_peft_model(copy.deepcopy(base), RsaConfig(**HEADS))
    open_gates(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(output(loaded, **arguments), output(model.eval(), **arguments))


def test_several_rsa_adapters_are_switched_and_deleted():
    model, arguments = peft.get_peft_model(build("llama"), RsaConfig(**HEADS), adapter_name="first"), inputs("llama")
    open_gates(model)
    first = output(model, **arguments)
    model.add_adapter("second", RsaConfig(regular=4, first_cyclical=0, second_cyclical=0, layers=[1]))
    assert torch.equal(output(model, **arguments), first)
    model.set_adapter("second")
    assert not torch.allclose(output(model, **arguments), first)
    with pytest.raises(ValueError, match="one RSA adapter can be active at a time, got first, second"):
        model.base_model.set_adapter(["first", "second"])
    model.set_adapter("first")
    model.delete_adapter("second")
    assert torch.equal(output(model, **arguments), first)
    assert not any("second" in name for name in model.state_dict())


def test_lora_works_beside_it():
    model, arguments = build("llama"), inputs("llama")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    peft.inject_adapter_in_model(lora, model, "lora")
    only_lora = output(model, **arguments)
    peft.inject_adapter_in_model(RsaConfig(**HEADS), model, "rsa")
    open_gates(model)
    for names, parts in ((["lora", "rsa"], ("lora_", ".rsa.")), (["lora"], ("lora_",))):
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(names)
        result = output(model, **arguments)
        assert torch.allclose(result, only_lora) == (names == ["lora"])
        model.zero_grad()
        result.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == any(part in name for part in parts), name


def test_copies_are_independent_and_follow_the_config():
    model, arguments = adapted("llama"), inputs("llama")
    twin = copy.deepcopy(model)
    expected = output(model, **arguments)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.set_attn_implementation("eager")
    assert torch.equal(output(model, **arguments), expected)
    assert model.model.layers[0].self_attn.config._attn_implementation == "rsa|sdpa"
    assert twin.model.layers[0].self_attn.config._attn_implementation == "rsa|eager"
    assert json.loads(twin.config.to_json_string())["hidden_size"] == 32


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


def test_parameters_stay_float32_in_a_bfloat16_model():
    model = peft.get_peft_model(build("llama").to(torch.bfloat16), RsaConfig(**HEADS))
    kinds = {parameter.dtype for name, parameter in model.named_parameters() if ".rsa." in name}
    assert kinds == {torch.float32}
    open_gates(model)
    model(**inputs("llama")).logits.float().sum().backward()
    assert output(model, **inputs("llama")).dtype == torch.bfloat16


def trainer(folder, steps):
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED))
    model = peft.get_peft_model(model, RsaConfig(**HEADS, task_type="CAUSAL_LM"))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 37, (16, 12)).tolist()]
    arguments = hf.TrainingArguments(
        **{"output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4, "save_steps": 2},
        **{"learning_rate": 0.1, "lr_scheduler_type": "constant", "report_to": "none", "use_cpu": True},
        disable_tqdm=True,
    )
    return hf.Trainer(model, arguments, train_dataset=rows, data_collator=hf.default_data_collator)


def rsa_parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if ".rsa." in name}


def test_trainer_resumes_and_saves_the_adapter_alone(tmp_path):
    whole = trainer(tmp_path / "whole", 4)
    before = rsa_parameters(whole.model)
    whole.train()
    after = rsa_parameters(whole.model)
    assert all((after[name] != before[name]).any() for name in after)
    trainer(tmp_path / "parts", 2).train()
    resumed = trainer(tmp_path / "parts", 4)
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(rsa_parameters(resumed.model), after)
    checkpoint = tmp_path / "parts" / "checkpoint-4"
    assert not list(checkpoint.glob("model*")) and not list(checkpoint.glob("*.py"))
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 4096


OWN_ADAPTERS = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"`add_adapter` of Transformers {hf.__version__} needs PEFT {MIN_PEFT_VERSION}, not {peft.__version__}",
)


@OWN_ADAPTERS
def test_add_rsa_is_the_adapter_of_transformers(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    model, arguments = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), inputs("llama")
    base_keys, base = model.state_dict().keys(), output(model, **arguments)
    assert add_rsa(model, **HEADS) is model
    assert torch.equal(output(model, **arguments), base)
    with pytest.raises(ValueError, match="has an RSA adapter 'default' already"):
        add_rsa(model, **HEADS)
    open_gates(model)
    expected = output(model, **arguments)
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*"))
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(output(loaded, **arguments), expected)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    model.set_adapter(["lora", "default"])
    both = output(model, **arguments)
    for name in ("lora", "default"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for name in ("lora", "default"):
        again.load_adapter(str(tmp_path / name), name)
    again.set_adapter(["lora", "default"])
    torch.testing.assert_close(output(again, **arguments), both)
    again.delete_adapter("lora")
    torch.testing.assert_close(output(again, **arguments), expected)
    loaded.delete_adapter("default")
    assert torch.equal(output(loaded, **arguments), base) and loaded.state_dict().keys() == base_keys


@OWN_ADAPTERS
def test_a_refused_model_is_left_as_it_was():
    model = build("llama")
    with pytest.raises(ValueError, match="has 4 heads, got 9 with a REM"):
        add_rsa(model, regular=9, first_cyclical=0, second_cyclical=0)
    assert not model._hf_peft_config_loaded and not hasattr(model, "peft_config")


def informer_with_sparse_attention():
    return hf.InformerForPrediction(hf.InformerConfig(**SERIES, attention_type="prob"))


def bloom():
    return hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=37))


def upcasting_gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, reorder_and_upcast_attn=True))


REFUSED = {
    "no interface": (bloom, {}, "BloomForCausalLM .*BloomAttention.* calls the attention interface"),
    "sparse": (informer_with_sparse_attention, {}, "InformerProbSparseAttention"),
    "upcast": (upcasting_gpt2, {}, "`reorder_and_upcast_attn` must be False"),
    "cross": (FAMILIES["bart"], {"target_modules": ["encoder_attn"]}, "is a cross-attention"),
    "not attention": (CAUSAL["llama"], {"target_modules": ["q_proj"]}, "Linear is no self-attention"),
    "no target": (
        CAUSAL["llama"],
        {"target_modules": ["attn"]},
        r"`target_modules` \['attn'\] are no modules of Llama",
    ),
    "layers": (CAUSAL["llama"], {"layers": [1, 2]}, r"`layers` must be among \[0, 1\], got \[2\]"),
    "heads": (CAUSAL["llama"], {"regular": 5}, "has 4 heads, got 7 with a REM"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_and_targets_that_do_not_fit_are_refused_by_name(case):
    make, options, message = REFUSED[case]
    model = make()
    keys = model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        inject(model, **{"regular": 1, **options})
    assert model.state_dict().keys() == keys
    assert not any(hasattr(module, "rsa") for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regular": -1}, "`regular` must be an integer of at least 0, got -1"),
        ({"regular": 1.5}, "`regular` must be an integer"),
        ({"regular": 0, "first_cyclical": 0, "second_cyclical": 0}, "there is nothing to train"),
        ({"dilated_regular": 1}, "`dilations` must have one entry for each of the 1 dilated heads"),
        ({"dilated_regular": 1, "dilations": [0]}, "`dilations` must be a list of integers of at least 1"),
        ({"gate": "heads"}, "`gate` must be one of layer, head, got 'heads'; did you mean `head`"),
        ({"gate_form": "tanh"}, "`gate_form` must be one of zero, sigmoid, got 'tanh'"),
        ({"layers": []}, "`layers` must be None or a list"),
        ({"regulars": 2}, "`regulars` is not a field of RsaConfig; did you mean `regular`"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RsaConfig(**options)


def test_an_adapter_of_another_version_or_model_is_refused(tmp_path):
    model = peft.get_peft_model(build("llama"), RsaConfig(**HEADS))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`target_modules`"):
        peft.PeftModel.from_pretrained(build("gpt2"), tmp_path)
    wider = hf.LlamaForCausalLM(hf.LlamaConfig(**{**DECODER, "num_attention_heads": 2}))
    with pytest.raises(ValueError, match="has 2 heads, got 3 with a REM"):
        peft.PeftModel.from_pretrained(wider, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "later_field": 1}))
    with pytest.raises(ValueError, match="`later_field` is not a field of RsaConfig"):
        peft.PeftModel.from_pretrained(build("llama"), tmp_path)


def test_calls_that_cannot_be_right_are_refused():
    model, ids = shared_model("llama"), inputs("llama")["input_ids"]
    attention = model.model.layers[0].self_attn
    hidden, rotation = torch.randn(1, 3, 32).double(), (torch.ones(1, 3, 8).double(), torch.zeros(1, 3, 8).double())
    with pytest.raises(ValueError, match="`is_causal` must be True"):
        model(ids, is_causal=False)
    with pytest.raises(ValueError, match="in which keys are not in the order of positions"):
        attention(hidden, rotation, None, **{CACHE_NAME: object()})
    with pytest.raises(ValueError, match="4 queries and 9 keys, where RSA heads need 4"):
        query, key = torch.randn(1, 4, 4, 8).double(), torch.randn(1, 2, 9, 8).double()
        rsa_attention_forward(attention, query, key, key, None, rsa_place=QueryPlace(0, 4, hf.DynamicCache()))
    with pytest.raises(ValueError, match="makes this module a cross-attention"):
        attention(hidden, rotation, None, key_value_states=hidden)
    part = [torch.randn(1, 2, 3, 8).double()] * 3
    with pytest.raises(ValueError, match="has 4 heads, got queries of 2"):
        rsa_attention_forward(attention, *part, None)
    query, key = torch.randn(1, 4, 3, 8).double(), torch.randn(1, 2, 5, 8).double()
    with pytest.raises(ValueError, match="3 queries and 5 keys, where RSA heads need 3"):
        rsa_attention_forward(attention, query, key, key, None)


@pytest.mark.parametrize("field", ["cp_size", "sp_size"])
def test_sequences_split_over_processes_are_refused(field, monkeypatch):
    model, arguments = shared_model("llama"), inputs("llama")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for size in (1, 2):
        monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", SimpleNamespace(**{field: size}))
        if size == 1:
            model(**arguments)
    with pytest.raises(ValueError, match=f"`parallelism_config.{field}` must be 1, got 2"):
        model(**arguments)


def test_a_second_adapter_of_the_same_name_is_refused():
    model = peft.get_peft_model(build("llama"), RsaConfig(**HEADS))
    with pytest.raises(ValueError, match="has an RSA adapter 'default' already"):
        peft.get_peft_model(model.base_model.model, RsaConfig(**HEADS))


def test_the_files_never_go_to_the_hub(tmp_path):
    saved = save_code(tmp_path, modeling_rtransformer.RTransformerConfig())
    assert "recurrence_encoding.py" in saved and not [name for name in saved if name.startswith("rsa_")]


def test_without_peft_the_error_says_what_to_install():
    for name in ("RsaConfig", "add_rsa"):
        with pytest.raises(ImportError, match=f"`{name}` needs PEFT .*pip install 'modeling-rtransformer"):
            modeling_rtransformer.__getattr__(name)


def test_the_script_of_the_document_runs_as_printed(tmp_path, monkeypatch, capsys):
    document = Path(__file__).resolve().parent.parent / "docs" / "ADD_RSA.md"
    [script] = [
        code for code in re.findall(r"```python\n(.*?)```", document.read_text("utf-8"), re.S) if "Trainer" in code
    ]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(script, document.name, "exec"), {})
    assert float(capsys.readouterr().out.split("accuracy at 192 positions:")[1].split()[0]) > 0.9
