"""
Fold the factors of a model with structured weights into dense weights.

Reads the folder of a saved model. The dense model computes the same, up to rounding. It can do what a structured one
cannot: tensor parallelism, quantization and LoRA.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from modeling_rtransformer import CONFIGS, model_classes
from modeling_rtransformer.structured_linear import StructuredLinear


def load_saved(folder: Path) -> PreTrainedModel:
    """The model that `save_pretrained` wrote into a folder, with its head; a ValueError if it is not one of ours."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the checkpoint must be a folder with a config.json, got {folder}")
    config = AutoConfig.from_pretrained(folder)
    classes = {each.__name__: each for each in model_classes(type(config)).values()} if type(config) in CONFIGS else {}
    names = config.architectures or []
    if len(names) != 1 or names[0] not in classes:
        raise ValueError(
            f"`architectures` in the config.json of {folder} must name one of "
            f"{', '.join(classes) or 'the models of this package'}, got {names}"
        )
    return classes[names[0]].from_pretrained(folder).eval()


def with_fields(model: PreTrainedModel, **fields) -> PreTrainedModel:
    """A model of the same class, with other fields in its config and all parameters that both have."""
    config = type(model.config).from_dict({**model.config.to_dict(), **fields})
    changed = type(model)(config).to(model.dtype).eval()
    ours, theirs = changed.state_dict(), model.state_dict()
    changed.load_state_dict({**ours, **{name: theirs[name] for name in theirs if name in ours}})
    return changed


@torch.no_grad()
def convert(checkpoint: Path) -> tuple[PreTrainedModel, dict]:
    """The dense model, and `parameters_before`."""
    model = load_saved(checkpoint)
    if not model.config.structured_parts:
        raise ValueError("`linear_structure` of the checkpoint is 'dense': there is nothing to fold")
    dense = with_fields(model, linear_structure="dense", linear_structure_in=None)
    for name, module in model.named_modules():
        if isinstance(module, StructuredLinear):
            dense.get_submodule(name).weight.copy_(module.fold())
    return dense, {"parameters_before": model.num_parameters()}
