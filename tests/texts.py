"""Random texts of the tests' small models, and a text that is given to a model in several calls."""

import torch
from transformers import DynamicCache


def random_ids(*shape):
    return torch.randint(3, 37, shape)


def in_calls(model, ids, lengths, cache=None, **arguments):
    """The logits of a text that is given in several calls; arguments of all positions go with the past's."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits, end = [], 0
    for part in ids.split(lengths, dim=1):
        end += part.shape[1]
        given = {name: values[:, :end] for name, values in arguments.items()}
        logits.append(model(part, cache=cache, **given).logits)
    return torch.cat(logits, dim=1)
