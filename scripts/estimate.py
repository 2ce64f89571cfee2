"""
Estimate what training a recipe needs of each of N GPUs: memory, arithmetic and bytes sent, and which settings fit.

    python -m scripts.estimate stdlib-code --gpus 8
    python -m scripts.estimate stdlib-code --gpus 64 --sequence-length 131072 --batch 1 --set model.hidden_size=2048
    python -m scripts.estimate stdlib-code --gpus 8 --strategy fsdp2 --json

Computed, not measured: from the formulae of training/scaling.py, which tests hold against what processes really use.
--batch is the rows of a GPU at a time. Without --strategy the first that fits is taken: ddp, hsdp (several machines),
fsdp2, these with activation checkpointing, tensor-parallel. A tokenizer that is made from the data says its vocabulary
only then: give it with --set model.vocab_size=N. The last line of stdout, and with --json the only one, is one JSON
object.
"""

import argparse
import dataclasses
import json
import math
import sys

from transformers import AutoModelForCausalLM

from modeling_rtransformer import RTransformerConfig
from scripts.training import scaling
from scripts.training.recipe import Recipe, add_overrides, read_recipe
from scripts.training.scaling import FLOAT32, Layout


@dataclasses.dataclass(frozen=True)
class Machine:
    """
    A machine of 8 H100 SXM, after NVIDIA's "H100 Tensor Core GPU" data sheet (80 GB; 989 TFLOP/s in bfloat16 without
    sparsity; NVLink 900 GB/s, 450 each way) and the "DGX H100 User Guide" (one 400 Gb/s adapter a GPU).
    """

    gpus: int = 8
    memory: float = 80e9
    operations: float = 989e12
    within: float = 450e9
    between: float = 50e9


H100 = Machine()
USABLE = 0.8  # of the memory: the rest is for CUDA, the allocator's gaps and what is there only for a moment


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a folder of configuration/ by name, or the path of a recipe")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs in all, 8 a machine")
    parser.add_argument("--sequence-length", type=int, help="positions of a row; the recipe's window if left out")
    parser.add_argument("--batch", type=int, help="rows of a GPU at a time; the recipe's if left out")
    parser.add_argument("--strategy", choices=scaling.STRATEGIES, help="left out: the first that fits")
    parser.add_argument("--checkpointing", action="store_true", help="with --strategy: compute blocks again")
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    add_overrides(parser)
    return parser.parse_args(arguments)


def step(config: RTransformerConfig, rows: int, length: int, layout: Layout) -> dict:
    """What a step needs of a GPU: bytes by kind and part, operations, bytes sent, and the least seconds of each."""
    model = scaling.on_meta(config, AutoModelForCausalLM)
    memory = scaling.states(model, layout)
    numbers = sum(math.prod(shape) for shape in scaling.shapes(model).values())
    if layout.strategy in ("fsdp2", "hsdp"):  # two blocks at a time, the head, and gradients that are not yet reduced
        blocks = scaling.by_part({name: math.prod(shape) for name, shape in scaling.shapes(model).items()})
        outside = blocks["embedding"] + blocks["head"]
        borrowed = outside + 2 * (numbers - outside) // config.num_hidden_layers
        if layout.accumulation > 1:
            borrowed += numbers
        memory["borrowed weights"] = layout.element * borrowed
    elif layout.element < FLOAT32:  # autocast keeps a copy for the products
        memory["borrowed weights"] = layout.element * memory["weights"] // FLOAT32
    activations = scaling.activations(config, rows, length, layout)
    memory["activations"] = sum(activations.values())
    memory["head's moment"] = 2 * rows * length * config.vocab_size * FLOAT32  # logits and their gradient
    forward = scaling.arithmetic(config, length)
    passes = {part: 4 if layout.checkpointing and part != "head" else 3 for part in forward}
    share = {part: layout.tensor_parallel if part != "LocalRNN" else 1 for part in forward}
    batches = layout.accumulation * rows
    operations = {part: batches * passes[part] * n // share[part] for part, n in forward.items()}
    sent = scaling.messages(model, rows, length, layout, H100.gpus)
    seconds = sum(message.sent / (H100.between if message.across else H100.within) for message in sent)
    replicas = layout.processes // layout.tensor_parallel
    return {
        "strategy": layout.strategy,
        "checkpointing": layout.checkpointing,
        "gpus": layout.processes,
        "parameters": numbers,
        "vocab_size": config.vocab_size,
        "rows": rows,
        "sequence_length": length,
        "positions_a_step": batches * length * replicas,
        "memory": {**memory, "total": sum(memory.values())},
        "activations": activations,
        "operations": {**operations, "total": sum(operations.values())},
        "sent": {message.what: round(message.sent) for message in sent},
        "seconds_at_least": {"products": sum(operations.values()) / H100.operations, "messages": seconds},
        "fits": sum(memory.values()) <= USABLE * H100.memory,
    }


def choices(config: RTransformerConfig, gpus: int, accumulation: int) -> list[Layout]:
    """What to try, in order: data parallel, sharded, sharded and computed again, and rows shared out at last."""
    found = []
    for strategy in scaling.STRATEGIES:
        if gpus == 1 and strategy != "ddp":
            continue
        if strategy == "hsdp" and (gpus <= H100.gpus or gpus % H100.gpus):
            continue
        if strategy == "tensor-parallel" and (gpus > H100.gpus or config.num_attention_heads % gpus):
            continue  # its messages are too many to go from machine to machine
        for checkpointing in (False, True):
            options = {"element": 2, "accumulation": accumulation, "checkpointing": checkpointing}
            found.append(Layout.of(strategy, gpus, H100.gpus, **options))
    order = ("ddp", "hsdp", "fsdp2", "tensor-parallel")
    return sorted(found, key=lambda x: (x.strategy == order[-1], x.checkpointing, order.index(x.strategy)))


def estimate(recipe: Recipe, options: argparse.Namespace) -> dict:
    """
    The step under the strategy that is asked for, or the first that fits, with the others beside it.

    Raises:
        ValueError: a recipe of another model or another kind of input, or sizes below 1.
    """
    config = recipe.config()
    if not isinstance(config, RTransformerConfig) or recipe.task.name != "language_modeling":
        raise ValueError(
            f"recipe {recipe.name!r} must be a language model of type 'rtransformer', got the "
            f"task {recipe.task.name!r} and {config.model_type!r}"
        )
    length = options.sequence_length or getattr(recipe.task, "window", None) or 512
    rows = options.batch or recipe.training.get("per_device_train_batch_size", 8)
    accumulation = recipe.training.get("gradient_accumulation_steps", 1)
    for name, value in (("gpus", options.gpus), ("sequence-length", length), ("batch", rows)):
        if value < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {value}")
    if options.strategy:
        layouts = [
            Layout.of(options.strategy, options.gpus, H100.gpus, element=2, accumulation=accumulation,
                      checkpointing=options.checkpointing)
        ]  # fmt: skip
    else:
        layouts = choices(config, options.gpus, accumulation)
    steps = [step(config, rows, length, layout) for layout in layouts]
    best = next((found for found in steps if found["fits"]), None)
    keys = ("strategy", "checkpointing", "fits")
    tried = [
        {**{key: s[key] for key in keys}, "memory": s["memory"]["total"], "sent": sum(s["sent"].values())}
        for s in steps
    ]
    return {"recipe": recipe.name, "overrides": list(recipe.overrides), **(best or steps[-1]), "tried": tried}


def amount(number: float, unit: str) -> str:
    """In thousands, millions, ..., three figures."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 1000 or prefix == "P":
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000


def table(result: dict) -> str:
    """The result as Markdown."""
    name = result["strategy"] + (" with activation checkpointing" if result["checkpointing"] else "")
    lines = [
        f"{result['recipe']}, {result['parameters']:,} parameters, {result['gpus']} GPUs, {result['rows']} x "
        f"{result['sequence_length']:,} positions a GPU: **{name}**" + ("" if result["fits"] else ", **does not fit**"),
        "",
        "| a GPU, computed | bytes |",
        "|---|---|",
        *(f"| {kind} | {amount(size, 'B')} |" for kind, size in result["memory"].items()),
        "",
        "| part | kept for the backward pass | operations |",
        "|---|---|---|",
    ]
    for part in dict.fromkeys([*result["activations"], *result["operations"]]):
        if part != "total":
            kept, operations = result["activations"].get(part, 0), result["operations"].get(part, 0)
            lines.append(f"| {part} | {amount(kept, 'B')} | {amount(operations, 'FLOP')} |")
    lines += ["", "| sent by a GPU in a step | bytes |", "|---|---|"]
    lines += [f"| {what} | {amount(size, 'B')} |" for what, size in result["sent"].items()]
    least = result["seconds_at_least"]
    lines += [
        "",
        f"At least {least['products'] * 1e3:.3g} ms of products and {least['messages'] * 1e3:.3g} ms of messages: "
        "the peak of an H100 and of its network, which are never reached.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict:
    """Estimate; the result."""
    options = parse_arguments(arguments)
    try:
        result = estimate(read_recipe(options.recipe, options.overrides), options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if not options.json:
        print(table(result) + "\n")
    return result


if __name__ == "__main__":
    print(json.dumps(main()))
