# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
C functions that the compiler of the machine at hand makes on first use, as Triton does for its launchers.

A library is made for the instructions that PyTorch itself uses on this processor, and kept in the user's cache under a
name that its source, flags and processor decide. Its parallel loops run in PyTorch's own threads: the OpenMP runtime
is left out of the linking and found at loading, since PyTorch has brought one.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch


FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
# By what torch.backends.cpu.get_cpu_capability() says; without an entry, what every processor of the architecture has.
INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
}


class NoCompiler(ImportError):
    """There is no C compiler, or what it makes is of no use."""


def cache_folder() -> Path:
    """Where libraries are kept: `$XDG_CACHE_HOME/rtransformer`, or `~/.cache/rtransformer`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "rtransformer"


def make(source: str, flags: tuple[str, ...], library: Path) -> None:
    """Compile C into `library`, by `$CC` or `gcc`; the file is there whole or not at all. Raises [`NoCompiler`]."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["gcc"]
    if shutil.which(compiler[0]) is None:
        raise NoCompiler(f"there is no C compiler `{compiler[0]}`: install gcc, or name another in $CC")
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        (Path(work) / "source.c").write_text(source, encoding="utf-8")
        for step in (*flags, "-c", "source.c"), ("-shared", "source.o", "-o", library.name):  # in two: no OpenMP linked
            ran = subprocess.run([*compiler, *step], cwd=work, capture_output=True, text=True)
            if ran.returncode:
                raise NoCompiler(f"`{shlex.join([*compiler, *step])}` failed: {ran.stderr.strip()[-1000:]}")
        os.replace(Path(work) / library.name, library)


def open_library(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoCompiler(f"what the C compiler made does not load: {error}") from error


@functools.cache
def load(source: str, *defines: str) -> ctypes.CDLL:
    """The functions of `source`, compiled with `-D` for each of `defines`; raises [`NoCompiler`]."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = (*FLAGS, *INSTRUCTIONS.get(capability, ()), *(f"-D{define}" for define in defines))
    made_of = "\0".join([source, *flags, capability, platform.machine(), os.environ.get("CC", "")])
    name = f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.so"
    folder = cache_folder()
    with contextlib.suppress(OSError):  # whether there is one to write to is asked below
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as own:
        if not folder.is_dir() or not os.access(folder, os.W_OK) and not (folder / name).exists():
            folder = Path(own.enter_context(tempfile.TemporaryDirectory()))  # for this process alone
        if not (folder / name).exists():
            make(source, flags, folder / name)
        return open_library(folder / name)
