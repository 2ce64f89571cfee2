"""A saved model carries its code: it loads in a fresh process that never imports the package."""

import json
import os
import subprocess
import sys

import pytest
import torch

from modeling_rtransformer import RTransformerForCausalLM
from tests.conftest import tiny_config


PROGRAM = """
import json, sys
import transformers
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1], trust_remote_code=True).eval()
import torch
ids = torch.arange(3, 14)[None]
assert "modeling_rtransformer" not in sys.modules, "the installed package was used"
print(json.dumps({"module": type(model).__module__, "output": model(ids)[0].flatten()[:40].tolist()}))
"""


def load_elsewhere(folder, auto_class, cwd):
    """Class and outputs of the model in `folder`, loaded in a fresh process outside the checkout."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["HF_MODULES_CACHE"] = str(cwd / "modules")
    command = [sys.executable, "-c", PROGRAM, str(folder), auto_class]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "AutoModel"])
def test_it_loads_without_the_package_and_gives_the_same(auto_class, tmp_path):
    model = RTransformerForCausalLM(tiny_config()).eval()
    model.save_pretrained(tmp_path / "model")
    elsewhere = load_elsewhere(tmp_path / "model", auto_class, tmp_path)
    assert elsewhere["module"].startswith("transformers_modules.")
    ours = (model if auto_class == "AutoModelForCausalLM" else model.model)(torch.arange(3, 14)[None])[0]
    torch.testing.assert_close(torch.tensor(elsewhere["output"]), ours.flatten()[:40], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("auto_class", ["AutoModelForSequenceClassification", "AutoModelForTokenClassification"])
def test_every_head_of_the_auto_map_loads_from_a_checkpoint_of_another(auto_class, tmp_path):
    RTransformerForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    assert load_elsewhere(tmp_path / "model", auto_class, tmp_path)["module"].startswith("transformers_modules.")
