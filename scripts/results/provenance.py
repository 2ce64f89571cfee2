"""The versions, the commit and the kind of machine of a result."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

import modeling_rtransformer


ROOT = Path(__file__).resolve().parents[2]


def provenance() -> dict[str, Any]:
    """The kind of machine without its name, the versions and the commit that a result depends on."""
    return {
        "machine": {
            "platform": f"{platform.system()} {platform.machine()}",
            "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "modeling_rtransformer": modeling_rtransformer.__version__,
        },
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of the checkout, with `-dirty` appended if files outside `docs/` were changed; None without git."""
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs")
        return _git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
