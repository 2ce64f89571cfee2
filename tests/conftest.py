"""What the tests share: no network, a GPU mark, and small models of every kind."""

import gc
import os
import time


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test that needs the network must fail

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
from huggingface_hub import constants

from modeling_rtransformer import RTransformerConfig, RTransformerForecasterConfig
from tests.hub_server import WRITE_TOKEN, HubServer


RSA = {
    "rem_kinds": ["regular", "none", "first_cyclical", "second_cyclical", "regular"],
    "rem_dilations": [1, 1, 1, 2, 3],
}
# The choices of the block that the behaviours below must hold for.
VARIANTS = {
    "gru": {},
    "two-lstm": {"local_rnn_type": "lstm", "num_local_rnns": 2, "local_window": 4},
    "rnn-window-1": {"local_rnn_type": "rnn", "local_window": 1},
    "window-longer-than-the-sequence": {"local_window": 40},
    "rnn-unpadded": {"local_rnn_type": "rnn", "local_padding": "none"},
    "lstm-unpadded-over-the-sequence": {"local_rnn_type": "lstm", "local_padding": "none", "local_window": 64},
    "rsa": {"num_local_rnns": 0, **RSA},
    "rsa-one-layer-gate-a-head": {"num_local_rnns": 0, **RSA, "rem_gate": "head", "rem_layers": [1]},
    "gru-and-rsa": RSA,
    "hard-lstm-monarch": {"local_rnn_type": "hard_lstm", "linear_structure": "monarch"},
    "plain-sinusoidal": {"num_local_rnns": 0, "position_embedding": "sinusoidal"},
    "attentive": {"attentive_steps": 3},
    "rsa-attentive-lstm-in-two-blocks": {
        "num_local_rnns": 0,
        **RSA,
        "attentive_steps": 2,
        "attentive_rnn_type": "lstm",
        "attentive_start": "zero",
        "attentive_layers": [0, -1],
        "attentive_fusion": "add",
    },  # fmt: skip
    # without a last norm the initial range of the others makes the outputs, and rounding with them, four times as large
    "original-norm": {"layer_norm_type": "original", "final_norm": False, "initializer_range": 0.2},
}

# The same for models that remember: they are causal, and see the last `memory_length` positions.
MEMORY_VARIANTS = {
    "xl": {
        "num_local_rnns": 0,
        "position_embedding": "relative",
        "attention_bias": False,
        "norm_position": "post",
        "final_norm": False,
        "memory_length": 6,
    },
    "rsa-xl": {"num_local_rnns": 0, "position_embedding": "relative", "clamp_length": 4, "memory_length": 7, **RSA},
    "t5-unit-keys": {
        "num_local_rnns": 0,
        "position_embedding": "t5",
        "layer_norm_type": "rms",
        "normalize_keys": True,
        "attention_bias": False,
        "mlp_bias": False,
        "memory_length": 6,
    },
    "gru-and-rsa-with-memory": {"memory_length": 3, **RSA},
    "lstm-unpadded-with-memory": {"local_rnn_type": "lstm", "local_padding": "none", "memory_length": 4},
}
RECURRENT_VARIANTS = {
    "brt": {
        "num_local_rnns": 0,
        "position_embedding": "t5",
        "memory_length": 3,
        "recurrent_layers": [1],
        "block_length": 4,
        "num_state_vectors": 3,
    },
    "rsa-brt-dual-lstm": {
        "num_local_rnns": 0,
        "memory_length": 6,
        "recurrent_layers": [0],
        "block_length": 3,
        "num_state_vectors": 2,
        "state_gate": "lstm",
        "state_update": "dual",
        "normalize_keys": True,
        **RSA,
    },
    "gru-and-brt-single": {
        "memory_length": 4,
        "recurrent_layers": [0, 1],
        "block_length": 4,
        "num_state_vectors": 3,
        "state_update": "single",
    },
}
ALL_VARIANTS = {**VARIANTS, **MEMORY_VARIANTS, **RECURRENT_VARIANTS}


def tiny_config(variant="gru-and-rsa", **fields):
    """A model of two blocks, five heads and width 20, in odd sizes; a forecaster's if it has a `prediction_length`."""
    fields = {
        "vocab_size": 37,
        "hidden_size": 20,
        "num_attention_heads": 5,
        "num_hidden_layers": 2,
        "local_window": 5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "initializer_range": 0.3,
        **ALL_VARIANTS[variant],
        **fields,
    }
    return (RTransformerForecasterConfig if "prediction_length" in fields else RTransformerConfig)(**fields)


@pytest.fixture(params=VARIANTS)
def variant(request):
    """The name of each variant in turn."""
    return request.param


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of our own, in whose reach this process is, logged in as `someone`; waiting takes no time."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # it would keep to the Hub of an earlier test
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """
    What has been imported stays, so that no garbage collection goes through it: each run of `Trainer` and each
    compilation asks for one, which would take longer than most tests.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """The libraries look for what is left over when the process ends."""
    gc.unfreeze()


@pytest.fixture(scope="module")
def one_thread():
    """For models that are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
