"""A saved model carries its code: it loads in a fresh process that never imports the package."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers.dynamic_module_utils import get_imports

from modeling_rtransformer import (
    FeedbackTransformerConfig,
    FeedbackTransformerForCausalLM,
    FeedbackTransformerModel,
    RTransformerForCausalLM,
    RTransformerForecasterModel,
    RTransformerForSequenceClassification,
    RTransformerForTimeSeriesPrediction,
    RTransformerModel,
    TemporalLatentBottleneckConfig,
    TemporalLatentBottleneckForSequenceClassification,
    TemporalLatentBottleneckModel,
)
from tests.conftest import tiny_config


PROGRAM = """
import json, sys
import torch, transformers
found = {}
for folder, auto_classes in json.loads(sys.argv[1]).items():
    found[folder] = {}
    for auto_class in auto_classes:
        model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
        ids, values = torch.arange(3, 14)[None], torch.arange(33.0).view(1, 11, 3).sin()
        output = model(**{model.main_input_name: ids if model.main_input_name == "input_ids" else values})[0]
        found[folder][auto_class] = {"module": type(model).__module__, "output": output.flatten()[:40].tolist()}
assert "modeling_rtransformer" not in sys.modules, "the installed package was used"
print(json.dumps(found))
"""
HEADS = [RTransformerModel, RTransformerForCausalLM, RTransformerForSequenceClassification]
FORECASTERS = [RTransformerForecasterModel, RTransformerForTimeSeriesPrediction]
SMALL = {"vocab_size": 37, "hidden_size": 20, "num_attention_heads": 5, "num_hidden_layers": 2}
# the model and its config; every Auto class of its map must load it
ATTENTIVE = {"attentive_steps": 2, "attentive_layers": [0, -1]}
CHECKPOINTS = [
    *[(head, tiny_config(is_causal=False)) for head in HEADS],
    *[(head, tiny_config(is_causal=False, num_input_features=3)) for head in HEADS],
    *[(head, tiny_config(is_causal=False, num_input_features=3, prediction_length=2)) for head in FORECASTERS],
    (FeedbackTransformerForCausalLM, FeedbackTransformerConfig(**SMALL)),
    (FeedbackTransformerModel, FeedbackTransformerConfig(**SMALL, num_input_features=3)),
    (TemporalLatentBottleneckForSequenceClassification, TemporalLatentBottleneckConfig(**SMALL, chunk_length=4)),
    (TemporalLatentBottleneckModel, TemporalLatentBottleneckConfig(**SMALL, num_input_features=3)),
    (RTransformerModel, tiny_config(is_causal=False, linear_structure="monarch")),
]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """
    A causal model and each of `CHECKPOINTS`, loaded in a fresh process outside the checkout: module and outputs by Auto
    class. One process loads them all, since starting takes longest.
    """
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    RTransformerForCausalLM(tiny_config(**ATTENTIVE)).save_pretrained(folder / "causal")
    wanted = {str(folder / "causal"): ["AutoModelForCausalLM", "AutoModel"]}
    for number, (saved, config) in enumerate(CHECKPOINTS):
        saved(config).save_pretrained(folder / str(number))
        wanted[str(folder / str(number))] = sorted(config.auto_map.keys() - {"AutoConfig"})
    cwd = tmp_path_factory.mktemp("elsewhere")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["HF_MODULES_CACHE"] = str(cwd / "modules")
    command = [sys.executable, "-c", PROGRAM, json.dumps(wanted)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {os.path.basename(place): found for place, found in json.loads(done.stdout.splitlines()[-1]).items()}


def test_it_loads_without_the_package_and_gives_the_same(elsewhere):
    torch.manual_seed(0)
    model = RTransformerForCausalLM(tiny_config(**ATTENTIVE)).eval()  # the one that was saved
    for auto_class, ours in (("AutoModelForCausalLM", model), ("AutoModel", model.model)):
        found = elsewhere["causal"][auto_class]
        assert found["module"].startswith("transformers_modules.")
        output = ours(torch.arange(3, 14)[None])[0].flatten()[:40]
        torch.testing.assert_close(torch.tensor(found["output"]), output, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", range(len(CHECKPOINTS)), ids=lambda number: CHECKPOINTS[number][0].__name__)
def test_every_auto_class_of_the_map_loads_from_a_checkpoint_of_any_head(number, elsewhere):
    found = elsewhere[str(number)]
    assert len(found) == len(CHECKPOINTS[number][1].code) - 1
    assert all(place["module"].startswith("transformers_modules.") for place in found.values())


def test_the_kernels_travel_with_a_checkpoint_and_are_no_requirement_of_it(tmp_path):
    RTransformerModel(tiny_config()).save_pretrained(tmp_path)
    files = {path.name: get_imports(path) for path in tmp_path.glob("*.py")}
    assert {f"local_rnn_triton{part}.py" for part in ("", "_cells", "_large", "_small")} <= files.keys()
    assert {"local_rnn_steps.py", "local_rnn_c.py", "local_rnn_c_source.py", "compiled_c.py"} <= files.keys()
    assert "triton" not in {name for imports in files.values() for name in imports}
