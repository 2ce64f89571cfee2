"""Results as JSON lines: one object a line, added as soon as it is known, so that an interrupted command can resume."""

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file; a ValueError that names the file if a line is damaged."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Add a line to the file, which is made if there is none; completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    partial.write_text(before + json.dumps(content) + "\n", encoding="utf-8")
    partial.replace(path)
