"""
What a training step needs of each process: bytes kept, arithmetic, bytes sent. All formulae are here.

What processes hold and what they send is counted in tests/test_scaling.py on real ones, in float32; in bfloat16 it is
computed. Arithmetic is that of the products alone, two operations for a multiplication and an addition.
"""

# B rows a process, L positions, D hidden size, F feed-forward, H heads, d head size, K window, G gates, V vocabulary,
# R heads with a REM, N processes, T of them tensor parallel

import dataclasses
import math
import re

import torch
from transformers import PreTrainedModel

from modeling_rtransformer import RTransformerConfig
from modeling_rtransformer.local_rnn_steps import NUM_GATES
from modeling_rtransformer.recurrence_encoding import chunk_length


PARTS = {
    "LocalRNN": r"\.local_rnns\.",
    "REM": r"\.recurrence\.",
    "attention": r"\.self_attn\.",
    "feed-forward": r"\.mlp\.",
    "norms": r"norm",
    "embedding": r"embed_(tokens|values)\.",
    "head": r"",  # what is left
}
STRATEGIES = ("ddp", "fsdp2", "hsdp", "tensor-parallel")
FLOAT32 = 4
KEPT_BY_ONE_RUN = {"gru": 8, "lstm": 17.6, "rnn": 2}  # by torch on a CPU, values a position and unit, as measured


@dataclasses.dataclass(frozen=True)
class Layout:
    """
    How processes share a step.

    Args:
        strategy: of [`STRATEGIES`].
        processes: N, all of them.
        shards: processes that share the weights: N for fsdp2 and tensor-parallel, a machine's for hsdp, 1 for ddp.
        element: bytes of a number in the products and in the messages of weights: 4, or 2 for bfloat16.
        accumulation: batches that are accumulated for a step.
        checkpointing: blocks are computed again in the backward pass instead of keeping what they need for it.
    """

    strategy: str
    processes: int
    shards: int
    element: int = FLOAT32
    accumulation: int = 1
    checkpointing: bool = False

    @classmethod
    def of(cls, strategy: str, processes: int, per_machine: int = 8, **options) -> "Layout":
        """
        Raises:
            ValueError: an unknown strategy, or no whole machines for hsdp.
        """
        if strategy not in STRATEGIES:
            raise ValueError(f"`strategy` must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
        if strategy == "hsdp" and (processes % per_machine or processes == per_machine):
            raise ValueError(
                f"`gpus` must be several times {per_machine}, those of a machine, with hsdp, got {processes}"
            )
        shards = {"ddp": 1, "hsdp": per_machine}.get(strategy, processes)
        return cls(strategy, processes, shards, **options)

    @property
    def tensor_parallel(self) -> int:
        """T."""
        return self.processes if self.strategy == "tensor-parallel" else 1


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    return next(part for part, pattern in PARTS.items() if re.search(pattern, name))


def shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The parameters' shapes, tied ones once; the model may be on the meta device."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def by_part(numbers: dict[str, int]) -> dict[str, int]:
    """Summed by part of the model."""
    return {part: sum(n for name, n in numbers.items() if part_of(name) == part) for part in PARTS}


def style_of(name: str, plan: dict[str, str]) -> str | None:
    """How tensor parallelism cuts a parameter; None where every process has it whole."""
    return plan.get(re.sub(r"\.\d+\.", ".*.", name).rpartition(".")[0])


def held(name: str, shape: tuple[int, ...], layout: Layout, plan: dict[str, str]) -> int:
    """Numbers of a parameter that the first process keeps: it has the most, since shards are rounded up."""
    if layout.strategy == "tensor-parallel":
        style = style_of(name, plan) or ""
        axis = 0 if style.startswith(("colwise", "embedding")) else len(shape) - 1 if style == "rowwise" else None
        if axis is None or (style == "rowwise" and len(shape) == 1):
            return math.prod(shape)
        return math.prod(shape) // shape[axis] * math.ceil(shape[axis] / layout.shards)
    return math.prod(shape[1:]) * math.ceil(shape[0] / layout.shards)


def states(model: PreTrainedModel, layout: Layout) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW's moments on the first process, between steps; all are float32."""
    kept = {name: held(name, shape, layout, model.tp_plan) for name, shape in shapes(model).items()}
    numbers = sum(kept.values())
    counters = sum(n > 0 for n in kept.values())  # AdamW counts its steps for each tensor
    return {
        "weights": FLOAT32 * numbers,
        "gradients": FLOAT32 * numbers,
        "optimizer": 2 * FLOAT32 * numbers + FLOAT32 * counters,
    }


def chunks_of(length: int, dilation: int) -> tuple[int, int]:
    """Positions of a chunk, and chunks, of a REM dilated so."""
    chunk = chunk_length((length - 1) // dilation + 1)
    return chunk, (length - 1) // (chunk * dilation) + 1


def runs_once(config: RTransformerConfig, length: int) -> bool:
    """Whether the window holds the row and begins with it, so that a LocalRNN is one run of torch's RNN."""
    return config.local_padding == "none" and length <= config.local_window


def arithmetic(config: RTransformerConfig, length: int, causal_half: bool = True) -> dict[str, int]:
    """
    Operations of a forward pass over one row, by part. A backward pass takes twice as many; blocks that are computed
    again add one more forward pass. `causal_half`: attention leaves out what the mask forbids, as fused kernels do.
    """
    size, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    gates, window = NUM_GATES[config.local_rnn_type], config.local_window
    directions = config.num_local_rnns * (1 if config.is_causal else 2)
    products = 2 * length if runs_once(config, length) else length + window - 1 + (window - 1) * length
    scores = 4 * length * length * size
    if causal_half and config.is_causal:
        scores //= 2
    rem = 0
    for layer in range(layers):
        for _, _, dilation in config.layer_rem_heads(layer):
            chunk, chunks = chunks_of(length, dilation)
            width = chunks * dilation * config.head_dim
            of_chunks = chunk * chunk + (4 * chunk + 4 * chunks if chunks > 1 else 0)
            rem += 2 * of_chunks * width * (1 if config.is_causal else 2)
    head = 0 if config.vocab_size is None else 2 * length * size * config.vocab_size
    return {
        "LocalRNN": layers * directions * 2 * gates * size * size * products,
        "REM": rem,
        "attention": layers * (8 * length * size * size + scores),
        "feed-forward": layers * 4 * length * size * inner,
        "head": head,
    }


def kept_by_block(config: RTransformerConfig, layer: int, rows: int, length: int, layout: Layout) -> dict[str, int]:
    """
    Bytes that a block keeps for its backward pass, by part: fused attention, the LocalRNN in the Triton kernels for
    large D, ReLU, no dropout.
    """
    size, parts = config.hidden_size, layout.tensor_parallel
    inner, element, positions = config.intermediate_size // parts, layout.element, rows * length
    gates, window = NUM_GATES[config.local_rnn_type], config.local_window
    directions = config.num_local_rnns * (1 if config.is_causal else 2)
    steps = window * gates - (1 if config.local_rnn_type == "gru" else 0)
    padded = rows * (length + window - 1)
    local_rnn = directions * size * (padded * (1 + gates) + positions * steps) * element
    if runs_once(config, length):
        local_rnn = round(directions * size * positions * KEPT_BY_ONE_RUN[config.local_rnn_type] * element)
    rem_heads = config.layer_rem_heads(layer)
    rem = positions * size // parts * element if rem_heads else 0  # the mixed heads
    for _, _, dilation in rem_heads:  # and of each with a REM its values, P V and P within a chunk
        chunk, chunks = chunks_of(length, dilation)
        of_head = 2 * rows * chunks * chunk * dilation * config.head_dim + chunk * chunk
        rem += (1 if config.is_causal else 2) * of_head // parts * element
    norms = (config.num_local_rnns + 2) * positions * (size * element + 2 * FLOAT32)  # the residual stream, mean, scale
    logsumexp = positions * config.num_attention_heads // parts * FLOAT32
    return {
        "LocalRNN": local_rnn,
        "REM": rem,
        "attention": positions * (size + 4 * size // parts) * element + logsumexp,
        "feed-forward": positions * (size + inner) * element,
        "norms": norms,
    }


def activations(config: RTransformerConfig, rows: int, length: int, layout: Layout) -> dict[str, int]:
    """Bytes kept for the backward pass of `rows` rows, at the most, by part."""
    blocks = [kept_by_block(config, layer, rows, length, layout) for layer in range(config.num_hidden_layers)]
    positions, size = rows * length, config.hidden_size
    total = {part: sum(block[part] for block in blocks) for part in blocks[0]}
    if layout.checkpointing:  # the inputs of all blocks, and one block at a time
        largest = max(blocks, key=lambda block: sum(block.values()))
        total = dict(largest, norms=largest["norms"] + len(blocks) * positions * size * layout.element)
    if config.final_norm:
        total["norms"] += positions * (size * layout.element + 2 * FLOAT32)
    total["head"] = positions * (size * layout.element + config.vocab_size * FLOAT32)  # its input, log-probabilities
    return total


@dataclasses.dataclass(frozen=True)
class Message:
    """
    One kind of message of a step.

    Args:
        what: what is sent, and why.
        collective: `all_reduce`, `all_gather` or `reduce_scatter`.
        size: bytes of the whole tensor that is reduced, gathered or scattered, over all messages of a step.
        group: how many processes take part.
        across: whether they are on several machines.
    """

    what: str
    collective: str
    size: int
    group: int
    across: bool

    @property
    def sent(self) -> float:
        """Bytes that a process sends in a ring."""
        return (2 if self.collective == "all_reduce" else 1) * self.size * (self.group - 1) / self.group


def messages(model: PreTrainedModel, rows: int, length: int, layout: Layout, per_machine: int = 8) -> list[Message]:
    """What a process sends in a step of `layout.accumulation` batches of `rows` rows."""
    numbers = {name: math.prod(shape) for name, shape in shapes(model).items()}
    everything = sum(numbers.values())
    element, times, count = layout.element, layout.accumulation, layout.processes
    across = count > per_machine
    if layout.strategy == "ddp":
        used = 0 if layout.checkpointing else FLOAT32 * len(numbers)  # Trainer looks for unused ones only without it
        return [
            Message("gradients", "all_reduce", FLOAT32 * everything, count, across),
            Message("which parameters were used", "all_reduce", used, count, across),
        ]
    if layout.strategy == "tensor-parallel":
        return _tensor_parallel_messages(model, rows, length, layout, across)
    # Sharded: what is cut unevenly is padded, so that all processes send as much.
    padded = {name: layout.shards * held(name, shape, layout, {}) for name, shape in shapes(model).items()}
    everything, in_blocks = sum(padded.values()), sum(n for name, n in padded.items() if ".layers." in name)
    within = layout.shards > per_machine
    sent = [
        Message("weights, forward", "all_gather", times * element * everything, layout.shards, within),
        Message("weights of the blocks, backward", "all_gather", times * element * in_blocks, layout.shards, within),
        Message("gradients", "reduce_scatter", element * everything, layout.shards, within),
    ]
    if layout.strategy == "hsdp":
        replicas, share = count // layout.shards, everything // layout.shards
        sent.append(Message("gradients, between machines", "all_reduce", element * share, replicas, True))
    return sent


def _tensor_parallel_messages(
    model: PreTrainedModel, rows: int, length: int, layout: Layout, across: bool
) -> list[Message]:
    config, everything = model.config, shapes(model)
    whole = sum(math.prod(shape) for name, shape in everything.items() if style_of(name, model.tp_plan) is None)
    rems = sum(math.prod(shape) for name, shape in everything.items() if part_of(name) == "REM")
    stream = layout.accumulation * rows * length * config.hidden_size * layout.element
    layers, group = config.num_hidden_layers, layout.processes
    outputs = 3 if layout.checkpointing else 2  # the feed-forward's is the last of a block, and not needed again
    sent = [
        Message("outputs of attention and feed-forward", "all_reduce", outputs * layers * stream, group, across),
        Message("their inputs' gradients: q, k, v and up", "all_reduce", 4 * layers * stream, group, across),
    ]
    sent.append(Message("gradients of REMs", "all_reduce", layout.accumulation * FLOAT32 * rems, group, across))
    sent.append(Message("gradients of what all have, averaged", "all_reduce", FLOAT32 * whole, group, across))
    if config.num_input_features is None:
        vocabulary = group * math.ceil(config.vocab_size / group)
        logits = layout.accumulation * rows * length * vocabulary * layout.element
        sent.append(Message("embedding, and the gradient of the head's input", "all_reduce", 2 * stream, group, across))
        sent.append(Message("logits", "all_gather", logits, group, across))
    return sent


def on_meta(config: RTransformerConfig, auto_class) -> PreTrainedModel:
    """The model without its numbers."""
    with torch.device("meta"):
        return auto_class.from_config(config)
