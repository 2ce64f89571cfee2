"""
Convert a checkpoint of the published Transformer-XL code, with or without RSA heads, into a model that
`from_pretrained` loads.

Reads the state dict of `MemTransformerLM` with `attn_type` 0 and one embedding (`div_val` 1): a safetensors file, or a
PyTorch file that is read with `weights_only=True`. The widths, the layers, the heads and the vocabulary are inferred
from the parameters. RSA heads have the parameters `rem.LAYER.{eta,nu,theta,mu}`; their kinds and dilations must be
given (`--set 'rem_kinds=["regular", "none"]'`). `--set` gives what the parameters do not show: `memory_length`
(`mem_len`), `norm_position` ("post", or "pre" for `pre_lnorm`), `memory_mask` and `clamp_length` (`clamp_len`).

The published code remembers hidden states. The model remembers keys and values, which are functions of one position, so
that the outputs are the same; `memory_mask` "segment" is the mask that the published code trains with, "window" the one
whose outputs do not depend on how a text is cut (its `same_length` with `mem_len` M is the window M - 1).

Source: the code published with Dai et al. 2019 (arXiv 1901.02860), pytorch/mem_transformer.py.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from modeling_rtransformer import RTransformerConfig, RTransformerForCausalLM
from scripts.conversion.original_checkpoint import read_state_dict


LAYER_NAMES = (
    (r"dec_attn\.o_net", "self_attn.o_proj"),
    (r"dec_attn\.r_net", "self_attn.position_bias.proj"),
    (r"dec_attn\.layer_norm", "self_attn_norm"),
    (r"pos_ff\.CoreNet\.0", "mlp.up_proj"),
    (r"pos_ff\.CoreNet\.3", "mlp.down_proj"),
    (r"pos_ff\.layer_norm", "mlp_norm"),
)
NAMES = {
    "word_emb.emb_layers.0.weight": "model.embed_tokens.weight",
    "crit.out_layers.0.weight": "lm_head.weight",
    "crit.out_layers.0.bias": "lm_head.bias",
    "r_w_bias": "model.relative_positions.content_bias",
    "r_r_bias": "model.relative_positions.position_bias",
}


def infer_config(state: dict[str, torch.Tensor], **given) -> RTransformerConfig:
    """The configuration, inferred from the shapes of the parameters; `given` fields are taken as they are."""
    missing = [name for name in ("word_emb.emb_layers.0.weight", "r_w_bias") if name not in state]
    if missing or state["r_w_bias"].dim() != 2:
        raise ValueError(
            "not a Transformer-XL with `attn_type` 0 and `div_val` 1: `word_emb.emb_layers.0.weight` and one "
            f"`r_w_bias` (heads, head size) must be there, got {', '.join(sorted(state)[:5]) or 'no parameters'}"
        )
    vocab_size, hidden_size = state["word_emb.emb_layers.0.weight"].shape
    heads, head_dim = state["r_w_bias"].shape
    if heads * head_dim != hidden_size:
        raise ValueError(
            f"`r_w_bias` must have {hidden_size} numbers, those of a hidden state, got {heads} x {head_dim}"
        )
    layers = {int(match[1]) for name in state if (match := re.match(r"layers\.(\d+)\.", name))}
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "num_hidden_layers": len(layers),
        "intermediate_size": state["layers.0.pos_ff.CoreNet.0.weight"].shape[0],
        "num_local_rnns": 0,
        "position_embedding": "relative",
        "attention_bias": False,
        "final_norm": False,
        "tie_word_embeddings": "crit.out_layers.0.weight" not in state
        or torch.equal(state["crit.out_layers.0.weight"], state["word_emb.emb_layers.0.weight"]),
    }
    return RTransformerConfig(**{**fields, **given})


def convert_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters under the names of this package; `qkv_net` is split into its three projections."""
    converted = {}
    for name, value in state.items():
        if name == "pos_emb.inv_freq":  # a constant
            continue
        if match := re.match(r"rem\.(\d+)\.(.*)", name):
            converted[f"model.layers.{match[1]}.self_attn.recurrence.{match[2]}"] = value
        elif match := re.match(r"layers\.(\d+)\.dec_attn\.qkv_net\.weight", name):
            for proj, part in zip("qkv", value.chunk(3), strict=True):
                converted[f"model.layers.{match[1]}.self_attn.{proj}_proj.weight"] = part.contiguous()
        elif match := re.match(r"layers\.(\d+)\.(.*)", name):
            rest = match[2]
            for pattern, replacement in LAYER_NAMES:
                rest = re.sub(rf"^{pattern}", replacement, rest)
            converted[f"model.layers.{match[1]}.{rest}"] = value
        else:
            converted[NAMES.get(name, name)] = value
    return converted


def load_converted(model: RTransformerForCausalLM, converted: dict[str, torch.Tensor]) -> None:
    """
    Load parameters into a model; gates one a head are put into the order in which the model has them.

    Raises:
        ValueError: parameters are missing or unknown.
    """
    for layer_idx, layer in enumerate(model.model.layers):
        recurrence = getattr(getattr(layer, "self_attn", None), "recurrence", None)
        name = f"model.layers.{layer_idx}.self_attn.recurrence.mu"
        if recurrence is not None and name in converted and len(converted[name]) > 1:
            order = sorted(recurrence.head_indices)
            converted[name] = converted[name][[order.index(head) for head in recurrence.head_indices]]
    if model.config.tie_word_embeddings:
        converted["lm_head.weight"] = converted["model.embed_tokens.weight"]
    expected = model.state_dict()
    converted.update((name, value) for name, value in expected.items() if value.numel() == 0)  # eigenvalues of no head
    missing, unknown = sorted(expected.keys() - converted.keys()), sorted(converted.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"the checkpoint does not fit: missing {', '.join(missing) or 'nothing'}, "
            f"unknown {', '.join(unknown) or 'nothing'}"
        )
    model.load_state_dict(converted)


def convert_state(state: dict[str, torch.Tensor], **given) -> RTransformerForCausalLM:
    """
    Args:
        state: the original parameters, from [`scripts.conversion.original_checkpoint.read_state_dict`].
        given:
            fields of [`RTransformerConfig`]: `memory_length` (`mem_len`), `norm_position` "post" or, for `pre_lnorm`,
            "pre", `clamp_length` (`clamp_len`, None for -1), `memory_mask`, and those of RSA heads.

    Returns:
        The model, in evaluation mode and in the parameters' dtype.

    Raises:
        ValueError: parameters are missing, unknown or of shapes that do not fit together.
    """
    model = RTransformerForCausalLM(infer_config(state, **given)).eval()
    model.to(state["r_w_bias"].dtype)
    load_converted(model, convert_names(state))
    return model


def read_fields(settings: Sequence[str]) -> dict[str, Any]:
    """
    Fields of the config from `FIELD=VALUE`, the value in JSON; a bare word is a string.

    Raises:
        ValueError: another form, or a name that is no field.
    """
    fields = {}
    for setting in settings:
        name, found, value = setting.partition("=")
        if not found or name not in RTransformerConfig.architecture_fields():
            raise ValueError(f"--set must be FIELD=VALUE with a field of RTransformerConfig, got {setting!r}")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def convert(checkpoint: Path, fields: Sequence[str]) -> tuple[RTransformerForCausalLM, dict[str, Any]]:
    """The model of a checkpoint, and what the command reports."""
    model = convert_state(read_state_dict(checkpoint), **read_fields(fields))
    return model, {"memory_length": model.config.memory_length}
