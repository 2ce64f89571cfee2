"""A recipe that streams, over files in which no word is there twice, so that what was read can be counted."""

import json
from collections import Counter
from pathlib import Path

import pandas as pd

from tests.tiny_recipe import LANGUAGE_MODELING, write_recipe


SIZES = (9, 2, 14, 5)  # documents of each file
STREAMED = LANGUAGE_MODELING.replace(
    "train = {train}",
    'train = {train}\nstreaming = true\nshuffle_documents = 4\nvalidation = "{rest}"\ntest = "{rest}"',
)
STREAMED = STREAMED.replace('kind = "character"', 'kind = "word"').replace('"bits_per_character", ', "")
STREAMED = (
    STREAMED.replace('compressors = ["gzip", "bzip2", "xz"]', "")
    .replace("window = 33", "window = 9")
    .replace("= 20", "= 4")
)


def write_files(folder: Path, suffix: str = "jsonl", sizes: tuple[int, ...] = SIZES) -> list[str]:
    """Files of documents of 1 to 12 words each, of unequal sizes."""
    paths = []
    for number, size in enumerate(sizes):
        path = folder / f"part{number}.{suffix}"
        texts = [" ".join(f"w{number}_{n}_{m}" for m in range(1 + n * 5 % 12)) for n in range(size)]
        if suffix == "txt":
            path.write_text("\n".join(texts) + "\n")
        elif suffix == "parquet":
            pd.DataFrame({"text": texts}).to_parquet(path, row_group_size=3)
        else:
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        paths.append(str(path))
    return paths


def words_of(paths: list[str]) -> Counter:
    """Each word of the files, once."""
    text = "".join(Path(path).read_text() for path in paths)
    return Counter(word for word in text.replace('"', " ").split() if word.startswith("w"))


def write_streamed(folder: Path, paths: list[str], **model) -> Path:
    """The recipe with these files; the first of them is what it is scored on."""
    training = STREAMED.replace("{rest}", paths[0]).replace("{train}", json.dumps(paths).replace("{", "{{"))
    return write_recipe(
        folder, training.replace("{", "{{").replace("}", "}}"), Path("unused"), name="streamed", **model
    )
