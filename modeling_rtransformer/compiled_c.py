# Copyright 2026 The R-Transformer package authors. Licensed under the Apache License, Version 2.0.
"""
C functions, compiled on first use by the machine's compiler, as Triton does for its launchers.

A library is compiled for the instruction set that PyTorch itself uses on this processor, and kept in the user's cache
under a hash of its source, flags and processor. Its parallel loops run in PyTorch's threads: it is not linked with an
OpenMP runtime and takes the one that PyTorch has loaded.
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
# By torch.backends.cpu.get_cpu_capability(); others get the instructions that every processor of the architecture has.
INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
}


class NoCompiler(ImportError):
    """There is no C compiler, or it fails, or what it compiles does not load."""


def cache_folder() -> Path:
    """Where libraries are kept: `$XDG_CACHE_HOME/rtransformer`, or `~/.cache/rtransformer`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "rtransformer"


def make(source: str, flags: tuple[str, ...], library: Path) -> None:
    """Compile C into `library` with `$CC` or `gcc`. The file is written whole or not at all. Raises [`NoCompiler`]."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["gcc"]
    if shutil.which(compiler[0]) is None:
        raise NoCompiler(f"there is no C compiler `{compiler[0]}`: install gcc, or name another in $CC")
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        (Path(work) / "source.c").write_text(source, encoding="utf-8")
        for step in (*flags, "-c", "source.c"), ("-shared", "source.o", "-o", library.name):  # linked without OpenMP
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
    origin = "\0".join([source, *flags, capability, platform.machine(), os.environ.get("CC", "")])
    name = f"{hashlib.sha256(origin.encode()).hexdigest()[:32]}.so"
    folder = cache_folder()
    with contextlib.suppress(OSError):  # the next lines ask whether it can be written
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if not folder.is_dir() or not os.access(folder, os.W_OK) and not (folder / name).exists():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))  # for this process alone
        if not (folder / name).exists():
            make(source, flags, folder / name)
        return open_library(folder / name)
