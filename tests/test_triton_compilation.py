"""
Every Triton kernel compiles for the cards that people have, and fits them: registers, spilled registers and shared
memory, read from the machine code. No GPU is needed.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch


triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from modeling_rtransformer import local_rnn_triton_large, local_rnn_triton_small  # noqa: E402


# Compute capability: a card, and the KiB of shared memory that a block can have (CUDA C++ Programming Guide, table of
# technical specifications per compute capability).
CARDS = {80: ("A100", 163), 86: ("A10", 99), 89: ("L4, 4090", 99), 90: ("H100", 227), 120: ("5090", 99)}
REGISTERS = 2**16  # of a multiprocessor, and so the most of a block
SPILLED = 768  # bytes a thread; an LSTM of D 32 in TF32 has the most, 704, and kernels of D 64 had 4,000
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
FLOAT32 = ("grad_inputs", "grad_weight", "grad_projected", "carry")
NUMBERS = ("rows", "all_rows", "first_row", "length", "size", "window", "step", "batch", "blocks")
GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def compile_for(card, kernel, dtype, constants, options):
    """Registers a thread, spilled bytes a thread and shared memory of a block, of the kernel's machine code."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in NUMBERS:
            signature[name] = "i32"
        elif name == "segment_ids" and constants["PACKED"]:
            signature[name] = "*i64"
        elif name in FLOAT32 or (name == "cell" and kernel is local_rnn_triton_large.forward_kernel):
            signature[name] = "*fp32"
        else:
            signature[name] = "*fp64" if name.endswith("_sums") else POINTERS[dtype]
    aligned = [index for index, name in enumerate(kernel.arg_names) if signature[name][0] == "*" or name == "size"]
    source = ASTSource(kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in aligned})
    made = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"{os.getpid()}.cubin"
    path.write_bytes(made.asm["cubin"])
    try:
        told = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
    finally:
        path.unlink()
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", told.stdout).groups())
    return registers, spilled, made.metadata.shared


def check(card, kernel, dtype, constants, options):
    registers, spilled, shared = compile_for(card, kernel, dtype, constants, options)
    assert registers * 32 * options.get("num_warps", 4) <= REGISTERS
    assert spilled <= SPILLED
    assert shared <= CARDS[card][1] * 1024


def small_cases():
    """Sizes that the one kernel of all steps runs, by the type of their products; in every run the largest ones."""
    for size in (16, 32, 64):
        for products in ("float32", "tf32", "bfloat16", "float16"):
            if size <= getattr(local_rnn_triton_small, "EXACT_SIZE" if products == "float32" else "TENSOR_CORE_SIZE"):
                for name, gates in GATES.items():
                    for packed in (False, True):
                        quick = name == "gru" and packed and size == 32 and products in ("tf32", "bfloat16")
                        marks = () if quick else (pytest.mark.slow,)
                        id = f"{name}-D{size}-{products}{'-packed' * packed}"
                        yield pytest.param(size, products, gates, packed, marks=marks, id=id)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("size, products, gates, packed", small_cases())
@pytest.mark.parametrize("card", CARDS, ids=lambda card: f"sm_{card}")
def test_a_kernel_of_all_steps_fits_a_card(card, size, products, gates, packed, direction):
    forward = direction == "forward"
    dtype = torch.float32 if products == "tf32" else getattr(torch, products)
    options = local_rnn_triton_small.options_of(size, products == "float32", forward)
    compiling = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"GATES": gates, "PACKED": packed, **options, **({"KEEP": True} if forward else {})}
    check(card, getattr(local_rnn_triton_small, f"{direction}_kernel"), dtype, constants, compiling)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("gates", [pytest.param(1, marks=pytest.mark.slow), 3, 4], ids=["rnn", "gru", "lstm"])
@pytest.mark.parametrize("kernel", ["forward", "states", "backward"])
@pytest.mark.parametrize("card", CARDS, ids=lambda card: f"sm_{card}")
def test_a_kernel_of_one_step_fits_a_card(card, kernel, gates, dtype):
    if kernel == "states" and gates == 1:
        pytest.skip("a tanh RNN has no states to compute again")
    flags = {"forward": {"FIRST": False, "KEEP": True}, "states": {}, "backward": {"FIRST": False, "LAST": False}}
    constants = {"GATES": gates, "PACKED": True, **flags[kernel], **local_rnn_triton_large.tile_of(512)}
    check(card, getattr(local_rnn_triton_large, f"{kernel}_kernel"), dtype, constants, {})
