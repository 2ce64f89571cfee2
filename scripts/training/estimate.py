"""
Estimate the memory and the arithmetic of one training step of a language model recipe on each of N GPUs.

    python -m scripts.training.estimate stdlib-code --gpus 8
    python -m scripts.training.estimate stdlib-code --gpus 64 --sequence-length 131072 --batch 1

The forward pass runs once on PyTorch's meta device, where tensors have shapes and no data. What autograd keeps for the
backward pass and the operations of all matrix products are counted there, in bfloat16. Weights, gradients and AdamW's
two moments take 16 bytes a parameter. Nothing is measured. The LocalRNN is counted in its plain form; its kernels keep
less. Attention is counted as a fused kernel, with the positions that the causal mask hides. A tokenizer that is built
from the data has its vocabulary size only then: give it with --set model.vocab_size=N. docs/SCALING.md has the formulae
and what each strategy sends. The last line of stdout is one JSON object.
"""

import argparse
import json
import re
import sys
from collections import Counter

import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from modeling_rtransformer import RTransformerConfig
from scripts.training.recipe import Recipe, add_overrides, read_recipe


GPU_BYTES, USABLE = 80e9, 0.8  # an H100; the rest of the memory is for CUDA, fragmentation and temporary buffers
GPUS_A_MACHINE = 8
# Paths of the modules of each part, searched in this order; everything else is "embedding and head".
PARTS = {
    "LocalRNN": r"\.local_rnns\.\d+",
    "REM": r"\.self_attn\.recurrence",
    "attention": r"\.self_attn",
    "feed-forward": r"\.mlp",
    "norms": r"norms?(\.\d+)?",
}
OTHER = "embedding and head"


def meta_attention(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
    """Fused attention by its operator: on the meta device PyTorch's own choice would keep every softmax."""
    output = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout, True, scale=scaling)[0]
    return output.transpose(1, 2), None


AttentionInterface.register("fused_on_meta", meta_attention)


def part_of(path: str) -> str:
    """The part of the model that a parameter, or a module whose path ends with a dot, belongs to."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern + r"\.", path)), OTHER)


def parameters_by_part(model: PreTrainedModel) -> Counter:
    """Parameters by part, tied ones once."""
    counts = Counter()
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def count_forward(model: PreTrainedModel, **inputs: torch.Tensor) -> tuple[dict[str, Counter], Counter]:
    """
    Run the model once.

    Returns:
        Bytes kept for the backward pass by block (`"0"`, `"1"`, ..., or `""` outside of the blocks) and part, each
        storage once and parameters left out, and floating-point operations by part, two for a multiply-add.
    """
    seen = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    alive, kept, operations = [], {}, Counter()
    tracker = ModuleTracker()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(storage)  # a freed storage would give its identity to the next one
            path = max(tracker.parents, key=len) + "."
            block = re.search(r"\.layers\.(\d+)\.", path)
            kept.setdefault(block[1] if block else "", Counter())[part_of(path)] += storage.nbytes()
        return tensor

    counter = FlopCounterMode(display=False)
    with tracker, counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    for path, by_operator in counter.get_flop_counts().items():
        for part, pattern in PARTS.items():
            if re.search(pattern + "$", path):
                operations[part] += sum(by_operator.values())
    operations["attention"] -= operations["REM"]  # which runs inside of it
    operations[OTHER] = counter.get_total_flops() - operations.total()
    return kept, operations


def with_checkpointing(kept: dict[str, Counter], block_input: int) -> Counter:
    """Bytes kept, by part, if every block keeps its input of `block_input` bytes and is computed again in its turn."""
    blocks = [counts for block, counts in kept.items() if block]
    return kept.get("", Counter()) + max(blocks, key=Counter.total) + Counter(norms=len(blocks) * block_input)


def estimate(recipe: Recipe, gpus: int, length: int | None = None, rows: int | None = None) -> dict:
    """
    The counts, and the memory of a GPU under each strategy that `gpus` allow, in the order to try them.

    Args:
        length, rows: positions of a row and rows of a GPU at a time; the recipe's if None.

    Raises:
        ValueError: not a language model of this package, or a size below 1.
    """
    config = recipe.config()
    if not isinstance(config, RTransformerConfig) or recipe.task.name != "language_modeling":
        raise ValueError(
            f"recipe {recipe.name!r} must be a language model of type 'rtransformer', got the task "
            f"{recipe.task.name!r} and {config.model_type!r}"
        )
    length = getattr(recipe.task, "window", None) or 512 if length is None else length
    rows = recipe.training.get("per_device_train_batch_size", 8) if rows is None else rows
    for name, value in (("gpus", gpus), ("sequence-length", length), ("batch", rows)):
        if value < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {value}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="fused_on_meta", dtype=torch.bfloat16
        ).train()
        ids = torch.zeros(rows, length, dtype=torch.long)
    kept, operations = count_forward(model, input_ids=ids, labels=ids)
    parameters = parameters_by_part(model)
    activations = {False: sum(kept.values(), Counter())}
    activations[True] = with_checkpointing(kept, rows * length * config.hidden_size * 2)
    shards = {"ddp": 1, "hsdp": GPUS_A_MACHINE, "fsdp2": gpus}
    if gpus <= GPUS_A_MACHINE or gpus % GPUS_A_MACHINE:
        del shards["hsdp"]
    total, two_blocks = parameters.total(), 2 * (parameters.total() - parameters[OTHER]) // config.num_hidden_layers
    accumulates = recipe.training.get("gradient_accumulation_steps", 1) > 1
    strategies = []
    for checkpointing in (False, True):
        for strategy, parts in shards.items():
            # autocast's copy of the weights; sharded, the weights gathered at a time and gradients not yet reduced
            working = total if strategy == "ddp" else parameters[OTHER] + two_blocks + accumulates * total
            memory = {
                "states": 16 * total // parts,
                "working weights": 2 * working,
                "activations": activations[checkpointing].total(),
                "logits and gradient": 2 * rows * length * config.vocab_size * 4,
            }
            memory["total"] = sum(memory.values())
            fits = memory["total"] <= USABLE * GPU_BYTES
            strategies.append({"strategy": strategy, "checkpointing": checkpointing, **memory, "fits": fits})
    return {
        "recipe": recipe.name,
        "overrides": list(recipe.overrides),
        "gpus": gpus,
        "rows": rows,
        "sequence_length": length,
        "parameters": dict(parameters),
        "kept": dict(activations[False]),
        "operations": dict(operations),
        "strategies": strategies,
        "first_that_fits": next((found for found in strategies if found["fits"]), None),
    }


def amount(number: float, unit: str) -> str:
    """In thousands, millions, ..., with three figures."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:.3g} P{unit}"


def table(result: dict) -> str:
    """The result as Markdown."""
    memory = ["states", "working weights", "activations", "logits and gradient", "total"]
    lines = [
        f"{result['recipe']}: {sum(result['parameters'].values()):,} parameters, {result['gpus']} GPUs, "
        f"{result['rows']} x {result['sequence_length']:,} positions a GPU; estimated, not measured",
        "",
        "| part | parameters | kept for the backward pass | operations of a forward pass |",
        "|---|---|---|---|",
    ]
    for part in (*PARTS, OTHER):
        counts = [result[key].get(part, 0) for key in ("parameters", "kept", "operations")]
        lines.append(f"| {part} | {counts[0]:,} | {amount(counts[1], 'B')} | {amount(counts[2], 'FLOP')} |")
    lines += ["", f"| strategy | checkpointing | {' | '.join(memory)} | fits |", "|---" * (len(memory) + 3) + "|"]
    for row in result["strategies"]:
        sizes = " | ".join(amount(row[kind], "B") for kind in memory)
        lines.append(f"| {row['strategy']} | {row['checkpointing']} | {sizes} | {row['fits']} |".replace("True", "yes"))
    return "\n".join(lines).replace("False", "no")


def main(arguments: list[str] | None = None) -> dict:
    """Print the estimate as a table; the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a folder of configuration/ by name, or the path of a recipe")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs in all, 8 a machine")
    parser.add_argument("--sequence-length", type=int, help="positions of a row; the recipe's window if left out")
    parser.add_argument("--batch", type=int, help="rows of a GPU at a time; the recipe's if left out")
    add_overrides(parser)
    options = parser.parse_args(arguments)
    try:
        recipe = read_recipe(options.recipe, options.overrides)
        result = estimate(recipe, options.gpus, options.sequence_length, options.batch)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table(result) + "\n")
    return result


if __name__ == "__main__":
    print(json.dumps(main()))
