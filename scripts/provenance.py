"""Where a result was obtained: the versions, the commit and the kind of machine."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

import modeling_rtransformer


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "modeling_rtransformer": modeling_rtransformer.__version__,
    }


def commit() -> str | None:
    """The commit of the checkout, with `-dirty` behind it if files were changed; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        root = Path(__file__).resolve().parent.parent
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """The kind of machine, without its name."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
