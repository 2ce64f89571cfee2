"""torch.compile without graph breaks, torch.export, and ONNX through the library's exporter."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache

from modeling_rtransformer import RTransformerForCausalLM, RTransformerForSequenceClassification
from modeling_rtransformer.library_versions import named_cache
from tests.conftest import VARIANTS, tiny_config


CLOSE = {"rtol": 1e-4, "atol": 1e-5}
COMPILED = ["gru-and-rsa", "two-lstm", "rsa"]
needs_exporters = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="the exporters came with Transformers 5.23"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def make(variant, model_class=RTransformerForCausalLM, **fields):
    """A compiler writes each step of a window out, so that long windows get just longer than a short row here."""
    fields = {"local_window": min(VARIANTS[variant].get("local_window", 5), 12), **fields}
    return model_class(tiny_config(variant, **fields))


def one_block(variant, model_class=RTransformerForCausalLM, **fields):
    """What a compiler makes of a block it makes of the next one, so that one will do; two where they differ."""
    if "rem_layers" not in VARIANTS[variant]:
        fields["num_hidden_layers"] = 1
    return make(variant, model_class, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("variant", COMPILED)
def test_a_compiled_training_step_has_no_graph_breaks_and_the_same_gradients(variant):
    model = make(variant).train()
    compiled = torch.compile(model, fullgraph=True)
    ids = torch.randint(3, 37, (2, 70))
    gradients = []
    for forward in (model, compiled):
        model.zero_grad()
        forward(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("variant", COMPILED)
def test_compiled_decoding_with_a_static_cache_equals_eager(variant):
    model = make(variant).eval()
    ids = torch.randint(3, 37, (2, 6))
    options = {"do_sample": False, "max_new_tokens": 8}
    expected = model.generate(ids, **options).tolist()
    compile_config = CompileConfig(fullgraph=True)
    compile_config._compile_all_devices = True  # `generate` compiles for an accelerator alone unless told
    options = {**options, "cache_implementation": "static", "compile_config": compile_config}
    assert model.generate(ids, **options).tolist() == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_it_has_no_graph_breaks(variant, is_causal):
    model = one_block(variant, is_causal=is_causal).eval()
    explanation = torch._dynamo.explain(model)(torch.randint(3, 37, (2, 11)), use_cache=False)
    assert explanation.graph_break_count == 0, explanation.break_reasons


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache], ids=["dynamic", "static"])
@pytest.mark.parametrize("variant", COMPILED)
def test_going_on_with_a_cache_has_no_graph_breaks(variant, cache_class):
    model, ids = one_block(variant).eval(), torch.randint(3, 37, (2, 11))
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # a graph break would be an error
    cache = cache_class(config=model.config, **({"max_cache_len": 20} if cache_class is StaticCache else {}))
    with torch.no_grad():
        parts = [compiled(part, cache=cache).logits for part in ids.split([3, 1, 1, 6], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, **CLOSE)


def test_it_exports_with_any_length(variant):
    model = one_block(variant).eval()
    ids = torch.randint(3, 37, (2, 70))
    any_length = {"input_ids": {1: torch.export.Dim.DYNAMIC}, "use_cache": None}  # an error if a length were special
    exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=any_length)
    module = exported.module()
    for other in (ids, torch.randint(3, 37, (2, 9)), torch.randint(3, 37, (2, 333))):
        torch.testing.assert_close(
            module(input_ids=other, use_cache=False).logits, model(other, use_cache=False).logits, **CLOSE
        )


def test_it_exports_with_any_length_within_named_limits(variant):
    """torch cannot prove a REM's guards for every length between the limits; asked to, it checks them when it runs."""
    model = one_block(variant).eval()
    inputs = {"input_ids": torch.randint(3, 37, (2, 70)), "use_cache": False}
    length = torch.export.Dim("length", min=2, max=512)
    exported = torch.export.export(
        model,
        (),
        inputs,
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    assert [(limits.lower, limits.upper) for limits in exported.range_constraints.values()] == [(2, 512)]
    module = exported.module()
    for other in (2, 9, 12, 13, 64, 65, 333, 512):
        ids = torch.randint(3, 37, (2, other))
        torch.testing.assert_close(
            module(input_ids=ids, use_cache=False).logits, model(ids, use_cache=False).logits, **CLOSE
        )


def test_a_classifier_exports_with_its_padding(variant):
    model = one_block(variant, RTransformerForSequenceClassification, num_labels=3).eval()
    ids, mask = torch.randint(3, 37, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[0, 8:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    exported = torch.export.export(model, (), inputs)
    torch.testing.assert_close(exported.module()(**inputs).logits, model(**inputs).logits, **CLOSE)


@needs_exporters
@pytest.mark.parametrize(
    ("variant", "model_class"),
    [("gru-and-rsa", RTransformerForCausalLM), ("two-lstm", RTransformerForSequenceClassification)],
)
def test_onnxruntime_gives_what_we_give(variant, model_class, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = one_block(variant, model_class, num_labels=3).eval()
    ids, mask = torch.randint(3, 37, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[0, 8:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True))
    exported.save_pretrained(tmp_path)
    [path] = tmp_path.rglob("*.onnx")
    session = onnxruntime.InferenceSession(path)
    for length in (11, 29):
        ids, mask = torch.randint(3, 37, (2, length)), torch.ones(2, length, dtype=torch.long)
        mask[0, 8:] = 0
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        wanted = [output.name for output in session.get_outputs() if output.name == "logits"]
        [logits] = session.run(wanted, {item.name: feed[item.name] for item in session.get_inputs()})
        torch.testing.assert_close(torch.tensor(logits), model(ids, attention_mask=mask).logits, **CLOSE)


def greedy_through_the_graphs(runners, cache, ids, mask, steps):
    """The likeliest token each time: the first from the graph of the prompt, the others from the graph of a step."""
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids, **named_cache(cache)}
    output = runners["prefill"](**inputs)
    tokens = [output.logits[:, -1:].argmax(-1)]
    while len(tokens) < steps:
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        output = runners["decode"](
            input_ids=tokens[-1],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1)[:, -1:],
            **named_cache(output.cache),  # the name of the graph's input is the one that `generate` passes
        )
        tokens.append(output.logits[:, -1:].argmax(-1))
    return torch.cat(tokens, dim=1)


@needs_exporters
@pytest.mark.parametrize("backend", ["dynamo", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", ["gru-and-rsa", "two-lstm"])
def test_the_exported_graphs_of_a_prompt_and_a_step_generate_what_we_generate(variant, backend):
    """For prompts shorter than the window and longer, padded left, and from a graph made with another length."""
    if backend == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        from transformers.exporters import OnnxConfig, OnnxExporter

        exporter, config = OnnxExporter(), OnnxConfig(dynamic=True)
    else:
        from transformers.exporters import DynamoConfig, DynamoExporter

        exporter, config = DynamoExporter(), DynamoConfig(dynamic=True)

    model = make(variant).eval()  # two blocks, each of which has its part of the cache
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    exported = exporter.export_for_generation(
        model,
        {"input_ids": torch.randint(3, 37, (2, 7)), "attention_mask": mask},
        config,
        generation_config=GenerationConfig(do_sample=False, pad_token_id=0),
        multi_token_decode=True,  # a step of one token alone would make one the only length
    )
    for length in (7, 3, 19):
        ids, mask = torch.randint(3, 37, (2, length)), torch.ones(2, length, dtype=torch.long)
        mask[0, :2] = 0
        cache = DynamicCache(config=model.config)
        tokens = greedy_through_the_graphs(exported.runners, cache, ids, mask, 12)
        assert tokens.tolist() == model.generate(ids, attention_mask=mask, max_new_tokens=12)[:, length:].tolist()
