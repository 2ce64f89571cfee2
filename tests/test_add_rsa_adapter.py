"""RSA heads as an adapter of PEFT: saved, loaded, switched, trained, removed; what is refused, by name."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from accelerate.state import AcceleratorState
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

import modeling_rtransformer
from modeling_rtransformer.hub_files import save_code
from modeling_rtransformer.library_versions import CACHE_NAME
from modeling_rtransformer.rsa_attention import QueryPlace, rsa_attention_forward
from tests.rsa_families import (
    CAUSAL,
    DECODER,
    FAMILIES,
    GROUPED,
    HEADS,
    SERIES,
    adapted,
    build,
    inject,
    inputs,
    open_gates,
    output,
    shared_model,
)


peft = pytest.importorskip("peft", reason="PEFT is not installed")

from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

from modeling_rtransformer import RsaConfig, add_rsa  # noqa: E402


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
