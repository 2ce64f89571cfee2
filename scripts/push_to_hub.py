"""
Push a trained model to the Hugging Face Hub, with its code, card and results.

    python -m scripts.push_to_hub runs/stdlib-code/final someone/stdlib-code --dry-run look/
    python -m scripts.push_to_hub runs/stdlib-code/final someone/stdlib-code --private
    python -m scripts.push_to_hub runs/stdlib-code/final someone/stdlib-code --create-pr --message "Trained for longer"

CHECKPOINT is the final/ of a run or any saved model of this package. The push is one commit with the weights as saved,
the package's code, the tokenizer, the recipe, the results and the card (hub_card.md filled in). --dry-run writes these
files into a folder and sends nothing. Log in first (`hf auth login`, or HF_TOKEN).

The last line of stdout is one JSON object with the repository, the commit and the files.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from modeling_rtransformer.hub_files import HUB_FILES, PICKLES
from scripts.sharing.folder import write_folder
from scripts.sharing.upload import PushError, upload_folder


# Files that an older push, or one by Trainer, may have left in the repository; deleted if this push lacks them.
REPLACED = (*(pattern for pattern in HUB_FILES if pattern != "README.md"), *PICKLES, ".gitignore")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the folder of a saved model")
    parser.add_argument("repo_id", help="name on the Hub, with or without the owner before it")
    parser.add_argument("--dry-run", type=Path, metavar="FOLDER", help="write the files there and push nothing")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="the branch; main by default")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request to an existing repository")
    parser.add_argument("--message", default="Upload the model with its code, card and results")
    parser.add_argument("--license", default="apache-2.0", help="of the code and the weights, as the Hub spells it")
    return parser.parse_args(arguments)


def push(
    checkpoint: Path,
    repo_id: str,
    *,
    license: str = "apache-2.0",
    dry_run: Path | None = None,
    api: HfApi | None = None,
    **options,
) -> dict:
    """
    Write the folder of a model and push it; `options` as in [`scripts.sharing.upload.upload_folder`].

    Raises:
        ValueError, OSError: the checkpoint cannot be pushed as it is.
        PushError: the push failed.
    """
    validate_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = dry_run or Path(temporary)
        names = write_folder(checkpoint.resolve(), folder, repo_id, license)
        if dry_run is not None:
            return {"repo_id": repo_id, "folder": str(folder), "files": names}
        return {**upload_folder(folder, repo_id, replaces=REPLACED, **options, api=api), "files": names}


def main(arguments: list[str] | None = None) -> dict:
    """Push; the result."""
    options = vars(parse_arguments(arguments))
    try:
        result = push(options.pop("checkpoint"), options.pop("repo_id"), **options)
    except (PushError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if "folder" in result:
        for name in result["files"]:
            print(f"{(Path(result['folder']) / name).stat().st_size:>12,}  {name}", file=sys.stderr)
    return result


if __name__ == "__main__":
    print(json.dumps(main()))
