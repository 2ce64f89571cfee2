"""
Convert a checkpoint of the published Block-Recurrent Transformer, with or without RSA heads, into a model that
`from_pretrained` loads.

Reads a safetensors file with the parameters of the flax model of google-research/meliad, transformer/memory, by their
flat names (`transformer0.tbase._kvq.keys_layer.kernel`): kernels are (inputs, outputs). The widths, the layers, the
recurrent layers, the states, their gate and their update, and the norm are inferred. The block length must be given,
and the heads where no parameter is of one head. RSA heads have the parameters `rem.LAYER.{eta,nu,theta,mu}`; their
kinds and dilations must be given.

The published model divides the logits by sqrt(D): the final norm's weights are divided here. Its queries see the keys
strictly before their position (`see_own_position` False, `memory_length` = the block).

Source: the code published with Hutchins et al. 2022 (arXiv 2203.07852), commit cc1aef5.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from modeling_rtransformer import RTransformerConfig, RTransformerForCausalLM
from scripts.conversion.original_checkpoint import read_state_dict
from scripts.conversion.transformer_xl import load_converted, read_fields


TOKEN_NAMES = (
    (r"relative_positions\.rel_embedding", "{mixer}.position_bias.table.weight"),
    (r"tbase\._kvq\.(key|value|quer)\w*?s_layer\.kernel", "{mixer}.{proj}_proj.weight"),
    (r"tbase\._kvq\.queries2_layer\.kernel", "{mixer}.state_q_proj.weight"),
    (r"tbase\._kvq\.attention_scale", "{mixer}.scale.weight"),
    (r"tbase\.attention_scale2", "{mixer}.state_scale.weight"),
    (r"tbase\._kvq\.pre_attn_layernorm\.(scale|bias)", "{mixer}_norm.{part}"),
    (r"tbase\.post_attn_mlp\.output_layer\.(kernel|bias)", "{mixer}.o_proj.{part}"),
    (r"tbase\.pre_ffn_layernorm\.(scale|bias)", "mlp_norm.{part}"),
    (r"tbase\.ffn\.hidden0\.(kernel|bias)", "mlp.up_proj.{part}"),
    (r"tbase\.ffn\.output_layer\.(kernel|bias)", "mlp.down_proj.{part}"),
)
STATE_NAMES = (
    (r"recurrent_initial_state", "cell.initial"),
    (r"recurrent_tbase\._kvq\.position_embeddings", "cell.ids"),
    (r"recurrent_tbase\._kvq\.(key|value|quer)\w*?s_layer\.kernel", "cell.{proj}_proj.weight"),
    (r"recurrent_tbase\._kvq\.queries2_layer\.kernel", "cell.token_q_proj.weight"),
    (r"recurrent_tbase\._kvq\.attention_scale", "cell.scale.weight"),
    (r"recurrent_tbase\.attention_scale2", "cell.token_scale.weight"),
    (r"recurrent_tbase\._kvq\.pre_attn_layernorm\.(scale|bias)", "cell.norm.{part}"),
    (r"recurrent_tbase\.post_attn_mlp\.output_layer\.(kernel|bias)", "cell.o_proj.{part}"),
    (r"recurrent_tbase\.post_attn_mlp\.gate_bias", "cell.gate.bias"),
    (r"recurrent_tbase\.post_attn_mlp\.(forget|input)_gate\.(kernel|bias)", "cell.gate.{gate}_proj.{part}"),
    (r"recurrent_tbase\.pre_ffn_layernorm\.(scale|bias)", "cell.mlp_norm.{part}"),
    (r"recurrent_tbase\.ffn\.hidden0\.(kernel|bias)", "cell.up_proj.{part}"),
    (r"recurrent_tbase\.ffn\.output_layer\.(kernel|bias)", "cell.down_proj.{part}"),
    (r"recurrent_tbase\.ffn\.gate_bias", "cell.mlp_gate.bias"),
    (r"recurrent_tbase\.ffn\.(forget|input)_gate\.(kernel|bias)", "cell.mlp_gate.{gate}_proj.{part}"),
)
PARTS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
PROJECTIONS = {"key": "k", "value": "v", "quer": "q"}


def infer_config(state: dict[str, torch.Tensor], **given) -> RTransformerConfig:
    """The configuration, inferred from names and shapes; `given` fields are taken as they are."""
    layers = {int(match[1]) for name in state if (match := re.match(r"transformer(\d+)\.tbase\.", name))}
    if "embed.embedding" not in state or not layers:
        raise ValueError(
            "not a Block-Recurrent Transformer: `embed.embedding` and `transformer0.tbase.*` must be there, got "
            f"{', '.join(sorted(state)[:5]) or 'no parameters'}"
        )
    vocab_size, hidden_size = state["embed.embedding"].shape
    recurrent = sorted(layer for layer in layers if f"transformer{layer}.recurrent_initial_state" in state)
    has_bias = "final_layernorm.bias" in state
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "intermediate_size": state["transformer0.tbase.ffn.hidden0.kernel"].shape[1],
        "num_local_rnns": 0,
        "position_embedding": "none",
        "layer_norm_type": "standard" if has_bias else "rms",
        "layer_norm_eps": 1e-6,
        "attention_bias": "transformer0.tbase.post_attn_mlp.output_layer.bias" in state,
        "mlp_bias": "transformer0.tbase.ffn.hidden0.bias" in state,
        "normalize_keys": "transformer0.tbase._kvq.attention_scale" in state,
        "lm_head_bias": False,
    }
    if "transformer0.relative_positions.rel_embedding" in state:
        table = state["transformer0.relative_positions.rel_embedding"]
        fields |= {"position_embedding": "t5", "num_attention_heads": table.shape[0]}
    if recurrent:
        cell = f"transformer{recurrent[0]}.recurrent_tbase."
        is_single = f"{cell}post_attn_mlp.output_layer.kernel" not in state
        has_mlp = f"{cell}ffn.hidden0.kernel" in state
        fields |= {
            "recurrent_layers": recurrent,
            "num_state_vectors": state[f"transformer{recurrent[0]}.recurrent_initial_state"].shape[0],
            "state_update": "single" if is_single else "dual" if has_mlp else "skip",
            "state_gate": "fixed"
            if any(name.startswith(cell) and name.endswith("gate_bias") for name in state)
            else "lstm",
        }
    return RTransformerConfig(**{**fields, **given})


def convert_name(name: str, config: RTransformerConfig) -> str:
    """A parameter's name in this package."""
    if match := re.match(r"rem\.(\d+)\.(.*)", name):
        return f"model.layers.{match[1]}.self_attn.recurrence.{match[2]}"
    match = re.match(r"transformer(\d+)\.(.*)", name)
    if match is None:
        final = {"embed.embedding": "model.embed_tokens.weight", "final_layernorm.scale": "model.norm.weight"}
        return {**final, "final_layernorm.bias": "model.norm.bias"}.get(name, name)
    layer, rest = int(match[1]), match[2]
    mixer = "recurrent_attn" if config.is_recurrent(layer) else "self_attn"
    tables = [(pattern, f"{mixer}.{new}") for pattern, new in STATE_NAMES] + list(TOKEN_NAMES)
    for pattern, new in tables:
        if found := re.fullmatch(pattern, rest):
            groups = found.groups()
            words = {"mixer": mixer, "part": PARTS.get(groups[-1]) if groups else None}
            words |= {"proj": PROJECTIONS.get(groups[0]), "gate": groups[0]} if groups else {}
            return f"model.layers.{layer}.{new.format(**words)}"
    return name


def convert_parameters(state: dict[str, torch.Tensor], config: RTransformerConfig) -> dict[str, torch.Tensor]:
    """The parameters under the names of this package: kernels transposed, the final norm divided by sqrt(D)."""
    converted = {}
    for name, value in state.items():
        if name.endswith((".kernel", ".rel_embedding")):
            value = value.T.contiguous()
        if name.startswith("final_layernorm."):
            value = value / math.sqrt(config.hidden_size)
        converted[convert_name(name, config)] = value
    return converted


def convert_state(state: dict[str, torch.Tensor], **given) -> RTransformerForCausalLM:
    """
    Args:
        state: the original parameters by their flat names, from
            [`scripts.conversion.original_checkpoint.read_state_dict`].
        given: fields of [`RTransformerConfig`]: `block_length` and `memory_length`, `see_own_position`, and
            `num_attention_heads` and those of RSA heads where they are needed.

    Returns:
        The model, in evaluation mode and in the parameters' dtype.

    Raises:
        ValueError: parameters are missing, unknown or of shapes that do not fit together.
    """
    config = infer_config(state, **given)
    model = RTransformerForCausalLM(config).eval().to(state["embed.embedding"].dtype)
    converted = {}
    for name, value in state.items():
        new = convert_name(name, config)
        if name.endswith((".kernel", ".rel_embedding")):
            value = value.T.contiguous()
        if name.startswith("final_layernorm."):
            value = value / math.sqrt(config.hidden_size)
        converted[new] = value
    for (
        name,
        parameter,
    ) in model.state_dict().items():  # the published projections of keys, values and queries have none
        if name not in converted and name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            converted[name] = torch.zeros_like(parameter)
    load_converted(model, converted)
    return model


def convert(checkpoint: Path, fields: Sequence[str]) -> tuple[RTransformerForCausalLM, dict[str, Any]]:
    """The model of a checkpoint, and what the command reports."""
    model = convert_state(read_state_dict(checkpoint), **read_fields(fields))
    return model, {"memory_length": model.config.memory_length, "recurrent_layers": model.config.recurrent_layers}
