"""torch.compile without graph breaks, torch.export, and ONNX through the library's exporter."""

import pytest
import torch
import transformers
from packaging.version import Version

from modeling_rtransformer import RTransformerForCausalLM, RTransformerForSequenceClassification
from tests.conftest import tiny_config


CLOSE = {"rtol": 1e-4, "atol": 1e-5}
COMPILED = ["gru-and-rsa", "two-lstm", "rsa"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def causal_lm(variant, **fields):
    return RTransformerForCausalLM(tiny_config(variant, **fields))


@pytest.mark.slow
@pytest.mark.parametrize("variant", COMPILED)
def test_a_compiled_training_step_has_no_graph_breaks_and_the_same_gradients(variant):
    model = causal_lm(variant).train()
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
    model = causal_lm(variant).eval()
    ids = torch.randint(3, 37, (2, 6))
    options = {"do_sample": False, "max_new_tokens": 8}
    assert (
        model.generate(ids, cache_implementation="static", **options).tolist()
        == model.generate(ids, **options).tolist()
    )


@pytest.mark.parametrize("strict", [False, True])
def test_it_has_no_graph_breaks(variant, strict):
    model = causal_lm(variant, is_causal=not strict).eval()
    explanation = torch._dynamo.explain(model)(torch.randint(3, 37, (2, 11)), use_cache=False)
    assert explanation.graph_break_count == 0, explanation.break_reasons


def test_it_exports_with_any_length(variant):
    model = causal_lm(variant).eval()
    ids = torch.randint(3, 37, (2, 70))
    any_length = {"input_ids": {1: torch.export.Dim.DYNAMIC}, "use_cache": None}  # an error if a length were special
    exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=any_length)
    for other in (ids, torch.randint(3, 37, (2, 9)), torch.randint(3, 37, (2, 333))):
        torch.testing.assert_close(
            exported.module()(input_ids=other, use_cache=False).logits, model(other, use_cache=False).logits, **CLOSE
        )


def test_a_classifier_exports_with_its_padding(variant):
    model = RTransformerForSequenceClassification(tiny_config(variant, num_labels=3)).eval()
    ids, mask = torch.randint(3, 37, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[0, 8:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    exported = torch.export.export(model, (), inputs)
    torch.testing.assert_close(exported.module()(**inputs).logits, model(**inputs).logits, **CLOSE)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="the exporters are newer than this")
@pytest.mark.parametrize("model_class", [RTransformerForCausalLM, RTransformerForSequenceClassification])
@pytest.mark.parametrize("variant", ["gru-and-rsa", "two-lstm"])
def test_onnxruntime_gives_what_we_give(variant, model_class, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = model_class(tiny_config(variant, num_labels=3)).eval()
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
