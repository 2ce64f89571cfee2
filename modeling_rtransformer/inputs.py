# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""The input of a model: checks of ids and shapes, and the embedding."""

# B batch, T positions of this call, D hidden size, F numbers of a position

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_tracing


def check_ids(name: str, ids: torch.Tensor, size: int, what: str) -> None:
    """
    Raise a ValueError that names an id outside [0, size); in labels -100 is valid. Only ids on a CPU are checked:
    reading values of an accelerator would make it wait.
    """
    if ids.device.type != "cpu" or is_tracing(ids) or ids.numel() == 0:
        return
    lowest, highest = torch.aminmax(ids)
    bad = highest if highest >= size else lowest
    if highest >= size or (lowest < 0 and not (name.endswith("labels") and lowest == -100)):
        raise ValueError(f"`{name}` must lie in [0, {size - 1}] ({what} is {size}), got {bad.item()}")


def embed_inputs(
    model: PreTrainedModel,
    input_ids: torch.LongTensor | None,
    inputs_embeds: torch.FloatTensor | None,
    input_values: torch.FloatTensor | None,
) -> torch.Tensor:
    """
    `(B, T, D)` from the one input that is given: `input_ids` `(B, T)` by the model's `embed_tokens`, `input_values`
    `(B, T, F)` by its `embed_values`, or `inputs_embeds` `(B, T, D)` as they are. F is `config.input_size`.

    Raises:
        ValueError: none or several of the inputs, or one of the wrong shape, or ids outside the vocabulary.
    """
    config: PreTrainedConfig = model.config
    widths = {"inputs_embeds": ("hidden_size", config.hidden_size)}
    if config.num_input_features is None:
        widths["input_ids"] = None
    else:
        widths["input_values"] = ("num_input_features", config.input_size)
    given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "input_values": input_values}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1 or not given.keys() <= widths.keys():
        raise ValueError(
            f"exactly one of {' and '.join(f'`{name}`' for name in widths)} must be given "
            f"(`num_input_features` is {config.num_input_features}), got {' and '.join(given) or 'neither'}"
        )
    [(name, values)] = given.items()
    if values.dim() > 1 and values.shape[1] == 0:
        raise ValueError(f"`{name}` must have at least one position, got the shape {tuple(values.shape)}")
    if name == "input_ids":
        check_ids("input_ids", values, config.vocab_size, "`vocab_size`")
        return model.embed_tokens(values)
    field, width = widths[name]
    if values.dim() != 3 or values.shape[-1] != width:
        raise ValueError(
            f"`{name}` must have the shape (batch, length, `{field}` = {width}), got {tuple(values.shape)}"
        )
    return values if name == "inputs_embeds" else model.embed_values(values)
