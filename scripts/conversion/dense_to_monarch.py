"""
Project the dense weights of a trained model onto Monarch matrices.

Reads the folder of a saved model. Each weight, square or not, becomes the Monarch matrix that is nearest in the
Frobenius norm. The relative error of each layer is printed; the result's `error` is that of all of them together. The
error of a trained weight is large where its blocks are not of low rank: train the converted model further.

Source: Dao et al. 2022, "Monarch" (arXiv 2204.00595), section 3.3.
"""

import sys
from pathlib import Path

from transformers import PreTrainedModel

from modeling_rtransformer.structured_linear import MonarchLinear
from scripts.conversion.fold_structure import load_saved, with_fields


def convert(checkpoint: Path, **fields) -> tuple[PreTrainedModel, dict]:
    """
    Args:
        checkpoint: the folder of a dense model.
        fields: `linear_blocks` and `linear_structure_in` of its new config.

    Returns:
        The model, and `parameters_before`, `error`, and `largest_error`, of one layer.
    """
    model = load_saved(checkpoint)
    if model.config.structured_parts:
        raise ValueError(
            f"`linear_structure` of the checkpoint must be 'dense', got {model.config.linear_structure!r}; "
            "`python -m scripts.convert fold` makes it dense"
        )
    structured = with_fields(model, linear_structure="monarch", **fields)
    errors, squares = [], []
    for name, module in structured.named_modules():
        if isinstance(module, MonarchLinear):
            weight = model.get_submodule(name).weight.detach()
            errors.append(module.project(weight))
            squares.append(weight.double().square().sum().item())
            print(f"{name} {tuple(weight.shape)}: relative error {errors[-1]:.3f}", file=sys.stderr)
    if not errors:
        raise ValueError(f"`linear_structure_in` must name a part that the model has, got {fields}")
    total = sum(error**2 * square for error, square in zip(errors, squares)) / sum(squares)
    return structured, {
        "parameters_before": model.num_parameters(),
        "error": total**0.5,
        "largest_error": max(errors),
    }
