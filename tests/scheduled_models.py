"""Small models of the systems that visit positions in an order of their own, and what the tests of them share."""

import torch

from modeling_rtransformer import (
    FeedbackTransformerConfig,
    FeedbackTransformerForCausalLM,
    TemporalLatentBottleneckConfig,
    TemporalLatentBottleneckForCausalLM,
)
from tests.texts import random_ids as random_ids


CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EXACT = {"rtol": 1e-9, "atol": 1e-12}
LENGTH = 17
RSA = {
    "rem_kinds": ["regular", "none", "first_cyclical", "second_cyclical", "regular"],
    "rem_dilations": [1, 1, 1, 2, 3],
}
TWO_LSTMS = {"num_local_rnns": 2, "local_rnn_type": "lstm", "local_window": 3, "local_padding": "none"}
FEEDBACK = {
    "shared": {},
    "layers": {"feedback_shared_kv": False},
    "window": {"feedback_window": 4},
    "window-layers": {"feedback_window": 4, "feedback_shared_kv": False, "feedback_positions": "layer"},
    "positions": {"feedback_window": 30, "feedback_positions": "shared"},
    "sinusoidal": {"position_embedding": "sinusoidal"},
    "no-norm": {"feedback_norm": False, "initializer_range": 0.1},  # larger weights would amplify rounding
    "rsa": RSA,
    "rsa-window": {"rem_kinds": ["regular"] * 5, "feedback_window": 3, "rem_layers": [1], "rem_gate": "head"},
    "gru": {"num_local_rnns": 1, "local_window": 5},
    "two-lstm-window": {**TWO_LSTMS, "feedback_window": 4, "feedback_shared_kv": False},
    "rnn-window-1": {"num_local_rnns": 1, "local_rnn_type": "rnn", "local_window": 1},
}
BOTTLENECK = {
    "chunks": {},
    "chunks-longer-than-the-sequence": {"chunk_length": 40},
    "blocks-of-two": {"num_hidden_layers": 4, "cross_attention_every": 2, "chunk_length": 3},
    "one-block": {"cross_attention_every": 2, "latent_positions": True, "latent_init": "zeros"},
    "positions": {"chunk_positions": True, "read_out": "positions", "chunk_length": 2},
    "sinusoidal": {"position_embedding": "sinusoidal", "num_latents": 1},
    "rsa": RSA,
    "gru": {"num_local_rnns": 1, "local_window": 4},
    "two-lstm": {**TWO_LSTMS, "num_hidden_layers": 4, "cross_attention_every": 2},
}
VARIANTS = {
    **{f"feedback-{name}": (FeedbackTransformerConfig, fields) for name, fields in FEEDBACK.items()},
    **{f"bottleneck-{name}": (TemporalLatentBottleneckConfig, fields) for name, fields in BOTTLENECK.items()},
}
CAUSAL_LMS = {
    FeedbackTransformerConfig: FeedbackTransformerForCausalLM,
    TemporalLatentBottleneckConfig: TemporalLatentBottleneckForCausalLM,
}


def tiny_config(variant, **fields):
    """Two layers, five heads and width 20; chunks of 5 and three latents."""
    config_class, own = VARIANTS[variant]
    sizes = {"chunk_length": 5, "num_latents": 3} if config_class is TemporalLatentBottleneckConfig else {}
    fields = {
        **{"vocab_size": 37, "hidden_size": 20, "num_attention_heads": 5, "num_hidden_layers": 2},
        **{"pad_token_id": 0, "bos_token_id": 1, "initializer_range": 0.3},
        **sizes,
        **own,
        **fields,
    }
    return config_class(**fields)


def causal_lm(variant, **fields):
    config = tiny_config(variant, **fields)
    return CAUSAL_LMS[type(config)](config).eval()


def padded_batch(rows, side):
    """Rows of unequal length as one batch padded with zeros, and its attention mask."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask
