"""Programs run from a checkout, and what they share. Never installed."""

import os
import sys
import tempfile


# The libraries read this once, when they are imported.
_cache = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
try:
    os.makedirs(os.path.expanduser(_cache), exist_ok=True)
    tempfile.TemporaryFile(dir=os.path.expanduser(_cache)).close()
except OSError as error:
    _temporary = tempfile.TemporaryDirectory(prefix="rtransformer-")  # removed at the end of the program
    os.environ["HF_HOME"] = _temporary.name
    print(f"no cache can be kept between runs ({error}); HF_HOME can name another folder", file=sys.stderr)
