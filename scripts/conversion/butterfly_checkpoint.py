"""
Convert a checkpoint of the published Butterfly R-Transformer code into a model that `from_pretrained` loads.

Reads a state dict of a language model, a classifier or of the stack of blocks alone (names that begin with
`forward_net.`), which becomes a base model that takes `inputs_embeds`. Attention and feed-forward layers keep their
butterflies. Of `--rnn_type CUSTOM`, an LSTM with hard sigmoids, the one butterfly for [x; h] is folded into two dense
weights, since here x and h have a layer each. Biases that the code lacks are zero. The number of heads and the window
must be given, as must the task of a piano roll model.

Source: sfox14/butterfly-r-transformer, commit 6f8a36f.
"""

import re
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modeling_rtransformer import RTransformerConfig, RTransformerModel
from modeling_rtransformer.structured_linear import ButterflyLinear
from scripts.conversion.original_checkpoint import RNN_TYPES, TASKS, convert_names, head_fields, read_state_dict


GATES = re.compile(r"rt\.forward_net\.(\d+)\.layers\.(\d+)\.local_rnn\.rnn\.lstm\.Gates\.twiddle")
CELL = "rt.forward_net.0.layers.0.local_rnn.rnn."


def split_gates(twiddle: torch.Tensor, hidden_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The weights of x and of h, both `(4 D, D)`, from the butterfly for [x; h]. Its gates are in the order input, forget,
    output, cell, ours input, forget, cell, output.
    """
    butterfly = ButterflyLinear(2 * hidden_size, 4 * hidden_size, bias=False)
    weight = torch.func.functional_call(butterfly, {"twiddle": twiddle}, torch.eye(2 * hidden_size)).T
    weight = weight.view(4, hidden_size, 2 * hidden_size)[[0, 1, 3, 2]].flatten(0, 1)
    return weight[:, :hidden_size].contiguous(), weight[:, hidden_size:].contiguous()


def infer_config(state: dict[str, torch.Tensor], task: str, **given) -> RTransformerConfig:
    """The configuration, inferred from the names and shapes of the parameters; `given` fields are taken as they are."""
    norm = state.get("rt.forward_net.0.connections.0.norm.a_2")
    if norm is None or "rt.forward_net.0.feed_forward.w_1.twiddle" not in state:
        raise ValueError(
            "not a checkpoint of the Butterfly R-Transformer: there must be `forward_net.0.feed_forward.w_1.twiddle` "
            f"and the norms, got {', '.join(sorted(state)[:5]) or 'no parameters'}; `original-checkpoint` converts "
            "dense ones"
        )
    hidden_size = len(norm)
    if f"{CELL}lstm.Gates.twiddle" in state:
        rnn_type = "hard_lstm"
    elif f"{CELL}weight_hh_l0" in state:
        rnn_type = RNN_TYPES[state[f"{CELL}weight_hh_l0"].shape[0] // hidden_size]
    else:
        raise ValueError(f"`{CELL}weight_hh_l0` or `{CELL}lstm.Gates.twiddle` must be in the checkpoint, got neither")
    fields = {
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,  # fixed in that code
        "num_hidden_layers": len({name.split(".")[2] for name in state if name.startswith("rt.forward_net.")}),
        "num_local_rnns": len(
            {m[1] for name in state if (m := re.match(r"rt\.forward_net\.0\.layers\.(\d+)\.", name))}
        ),
        "local_rnn_type": rnn_type,
        "hidden_act": "relu",
        "final_norm": False,
        "layer_norm_type": "original",
        "layer_norm_eps": 1e-6,
        "linear_structure": "butterfly",
        "linear_structure_in": ["attention", "feed_forward"],
        **({} if task == "stack" else head_fields(state, task)),
    }
    return RTransformerConfig(**{**fields, **given})


def convert(checkpoint: Path, task: str | None = None, **given) -> tuple[PreTrainedModel, dict]:
    """
    Args:
        checkpoint: a file for `read_state_dict`.
        task: one of `TASKS`; None for the stack alone, a language model or sequence classification, by what is there.
        given: fields of [`RTransformerConfig`]; `num_attention_heads` and `local_window` are needed.

    Returns:
        The model, in evaluation mode, and `class` and `unused`, the names of parameters that the code never used.

    Raises:
        ValueError: parameters are missing, unknown or of shapes that do not fit together.
    """
    state = read_state_dict(checkpoint)
    if any(name.startswith("forward_net.") for name in state):
        state, task = {f"rt.{name}": value for name, value in state.items()}, task or "stack"
    task = task or ("causal-lm" if "decoder.weight" in state else "sequence-classification")
    config = infer_config(state, task, **given)
    gates = {name: state.pop(name) for name in list(state) if GATES.fullmatch(name)}
    converted, unused = convert_names(state, task)
    for name, twiddle in gates.items():
        block, index = GATES.fullmatch(name).groups()
        for projection, weight in zip(("input_proj", "recurrent_proj"), split_gates(twiddle, config.hidden_size)):
            converted[f"model.layers.{block}.local_rnns.{index}.rnn.{projection}.weight"] = weight
    if task == "stack":
        converted = {name.removeprefix("model."): value for name, value in converted.items()}
    model = (RTransformerModel if task == "stack" else TASKS[task])(config).eval()
    for name, value in model.state_dict().items():
        without_bias = re.search(r"\.(rnn\.(input|recurrent)_proj|mlp\.(up|down)_proj)\.bias$", name)
        if name not in converted and (without_bias or (task == "stack" and name == "embed_tokens.weight")):
            converted[name] = torch.zeros_like(value)
    try:
        model.load_state_dict(converted)
    except RuntimeError as error:  # torch's message lists every parameter that is missing, unknown or of another shape
        raise ValueError(f"the checkpoint does not fit a {task} model: {error}") from error
    print(f"left {len(unused)} parameters that the original never used: {', '.join(unused)}", file=sys.stderr)
    return model, {"class": type(model).__name__, "unused": unused}
