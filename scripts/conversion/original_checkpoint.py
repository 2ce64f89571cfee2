"""
Convert a checkpoint of the original R-Transformer code into a model that `from_pretrained` loads.

Reads a state dict from a PyTorch file (with `weights_only=True`, which runs no code of the file) or a safetensors file.
The widths, the numbers of blocks and LocalRNNs, the RNN type, the vocabulary or the number of labels and the tying of
embeddings are inferred from the parameters. The number of heads and the window cannot be inferred and must be given, as
must the task of a piano roll model (`--task token-classification`), whose parameters have the names of a classifier's.
Parameters that the original forward pass never uses are left out and listed.

Source: the code published with Wang et al. 2019 (arXiv 1907.05572).
"""

import pickle
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling_rtransformer import (
    RTransformerConfig,
    RTransformerForCausalLM,
    RTransformerForSequenceClassification,
    RTransformerForTokenClassification,
    RTransformerPreTrainedModel,
)


RNN_TYPES = {1: "rnn", 3: "gru", 4: "lstm"}  # by the number of gates
TASKS = {
    "causal-lm": RTransformerForCausalLM,
    "sequence-classification": RTransformerForSequenceClassification,
    "token-classification": RTransformerForTokenClassification,
}
# The original code creates these parameters and never uses them in a forward pass.
UNUSED = re.compile(r"rt\.norm\.|rt\.feed_forward\.|rt\.forward_net\.\d+\.layers\.\d+\.local_rnn\.output\.")
# Patterns of the original names and what takes their place, one after the other.
NAMES = {
    r"^rt\.forward_net\.": r"model.layers.",
    r"\.layers\.(\d+)\.connection\.norm\.": r".local_rnn_norms.\1.",
    r"\.layers\.(\d+)\.local_rnn\.rnn\.(weight|bias)_ih_l0$": r".local_rnns.\1.rnn.input_proj.\2",
    r"\.layers\.(\d+)\.local_rnn\.rnn\.(weight|bias)_hh_l0$": r".local_rnns.\1.rnn.recurrent_proj.\2",
    r"\.connections\.0\.norm\.": ".self_attn_norm.",
    r"\.connections\.1\.norm\.": ".mlp_norm.",
    r"\.pooling\.linears\.0\.": ".self_attn.q_proj.",
    r"\.pooling\.linears\.1\.": ".self_attn.k_proj.",
    r"\.pooling\.linears\.2\.": ".self_attn.v_proj.",
    r"\.pooling\.linears\.3\.": ".self_attn.o_proj.",
    r"\.feed_forward\.w_1\.": ".mlp.up_proj.",
    r"\.feed_forward\.w_2\.": ".mlp.down_proj.",
    r"\.a_2$": ".weight",
    r"\.b_2$": ".bias",
    r"^decoder\.": "lm_head.",
    r"^linear\.": "score.",
}


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The parameters in a safetensors or PyTorch file, without the prefixes `module.` and `state_dict.`."""
    if not path.is_file():
        raise FileNotFoundError(f"the checkpoint must be a file, got {path}")
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} holds more than tensors (the original scripts save the whole model object), and running what "
                "is in a file is not safe. In the original environment write its parameters alone: "
                "torch.save(model.state_dict(), 'model.pt')"
            ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a state dict, parameter names to tensors, got {type(state).__name__}")
    if any(name.startswith("state_dict.") for name in state):
        state = {name: value for name, value in state.items() if name.startswith("state_dict.")}
    return {re.sub(r"^(state_dict\.|module\.)+", "", name): value for name, value in state.items()}


def head_fields(state: dict[str, torch.Tensor], task: str) -> dict:
    """The fields of the configuration that follow from the embedding and the head."""
    head = "decoder" if task == "causal-lm" else "linear"
    if f"{head}.weight" not in state:
        raise ValueError(
            f"`{head}.weight` is missing, which a {task} checkpoint has; is it of another task "
            f"({', '.join(other for other in TASKS if other != task)})?"
        )
    fields = {"lm_head_bias": True}
    if task == "causal-lm":
        fields["vocab_size"] = state["encoder.weight"].shape[0]
        fields["tie_word_embeddings"] = torch.equal(state["encoder.weight"], state["decoder.weight"])
    else:
        fields["num_input_features"] = state["encoder.weight"].shape[1]
        fields["num_labels"] = state["linear.weight"].shape[0]
    if task == "token-classification":
        fields["problem_type"] = "multi_label_classification"
    return fields


def infer_config(state: dict[str, torch.Tensor], task: str, **given) -> RTransformerConfig:
    """The configuration, inferred from the shapes of the original parameters; `given` fields are taken as they are."""
    blocks = {int(m[1]) for name in state if (m := re.match(r"rt\.forward_net\.(\d+)\.", name))}
    if not blocks or "encoder.weight" not in state:
        raise ValueError(
            "not a checkpoint of the original R-Transformer: there must be `encoder.weight` and `rt.forward_net.0.*`, "
            f"got {', '.join(sorted(state)[:5]) or 'no parameters'}"
        )
    rnns = {int(m[1]) for name in state if (m := re.match(r"rt\.forward_net\.0\.layers\.(\d+)\.", name))}
    gates_and_width = state["rt.forward_net.0.layers.0.local_rnn.rnn.weight_hh_l0"].shape
    hidden_size = gates_and_width[1]
    fields = {
        "hidden_size": hidden_size,
        "intermediate_size": state["rt.forward_net.0.feed_forward.w_1.weight"].shape[0],
        "num_hidden_layers": len(blocks),
        "num_local_rnns": len(rnns),
        "local_rnn_type": RNN_TYPES[gates_and_width[0] // hidden_size],
        "hidden_act": "relu",
        "final_norm": False,
        "layer_norm_type": "original",
        "layer_norm_eps": 1e-6,
        **head_fields(state, task),
    }
    return RTransformerConfig(**{**fields, **given})


def convert_names(state: dict[str, torch.Tensor], task: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The parameters under the names of this package, and the original names of the unused ones."""
    embedding = "model.embed_tokens." if task == "causal-lm" else "model.embed_values."
    converted, unused = {}, []
    for name, value in state.items():
        if UNUSED.match(name):
            unused.append(name)
            continue
        for pattern, replacement in {**NAMES, r"^encoder\.": embedding}.items():
            name = re.sub(pattern, replacement, name)
        converted[name] = value
    return converted, unused


def convert(checkpoint: Path, task: str | None = None, **given) -> tuple[RTransformerPreTrainedModel, dict]:
    """
    Args:
        checkpoint: a file for [`read_state_dict`].
        task: one of `TASKS`; None for a language model or, without a decoder, sequence classification.
        given: fields of [`RTransformerConfig`]; `num_attention_heads` and `local_window` are needed.

    Returns:
        The model, in evaluation mode, and `class` and `unused`, the names of the parameters that the original never
        used.

    Raises:
        ValueError: parameters are missing, unknown or of shapes that do not fit together.
    """
    state = read_state_dict(checkpoint)
    # A language model has a decoder; the parameters of a classifier and of a frame labeller have the same names.
    task = task or ("causal-lm" if "decoder.weight" in state else "sequence-classification")
    config = infer_config(state, task, **given)
    converted, unused = convert_names(state, task)
    model = TASKS[task](config).eval()
    try:
        model.load_state_dict(converted)
    except RuntimeError as error:  # torch's message lists every parameter that is missing, unknown or of another shape
        raise ValueError(f"the checkpoint does not fit a {task} model: {error}") from error
    print(f"left {len(unused)} parameters that the original never used: {', '.join(unused)}", file=sys.stderr)
    return model, {"class": type(model).__name__, "unused": unused}
