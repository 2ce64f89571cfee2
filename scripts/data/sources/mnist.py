"""
MNIST read pixel by pixel: 28 x 28 handwritten digits as sequences of 784 steps.

One example is `input_values` of shape (784, 1), the standardised brightness in reading order, and its `label`. The last
5,000 of the 60,000 training images are for validation; the 10,000 test images are the test split.
"""

import dataclasses
import struct
from pathlib import Path

import numpy as np
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features
from pydantic import NonNegativeInt, PositiveInt

from scripts.data.sources.download import local_or_downloaded, read_bytes


ADDRESS = "https://storage.googleapis.com/cvdf-datasets/mnist"
SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
MEAN, STD = 0.1307, 0.3081  # of the training images' brightness between 0 and 1
VALIDATION = 5_000


@dataclasses.dataclass(frozen=True)
class Options:
    """
    Args:
        folder: a folder with the four IDX files, compressed (`.gz`) or not; by default they are downloaded once.
        permutation_seed: draws one order of the pixels for all images (permuted MNIST); reading order by default.
        max_train_rows: only the first training images; all 55,000 by default.
    """

    source: str
    folder: str | None = None
    permutation_seed: NonNegativeInt | None = None
    max_train_rows: PositiveInt | None = None


def load(options: Options) -> DatasetDict:
    """Read the images and split them."""
    images, labels = _read(options.folder, "train")
    if len(images) <= VALIDATION:
        raise ValueError(f"`data.folder` must hold more than {VALIDATION} training images, got {len(images)}")
    end = len(images) - VALIDATION
    parts = {
        "train": (images[:end][: options.max_train_rows], labels[:end][: options.max_train_rows]),
        "validation": (images[end:], labels[end:]),
        "test": _read(options.folder, "t10k"),
    }
    order = slice(None)
    if options.permutation_seed is not None:
        order = np.random.default_rng(options.permutation_seed).permutation(images.shape[1])
    return DatasetDict({split: _dataset(images[:, order], labels) for split, (images, labels) in parts.items()})


def _dataset(images: np.ndarray, labels: np.ndarray) -> Dataset:
    values = ((images / np.float32(255) - np.float32(MEAN)) / np.float32(STD))[:, :, None]  # (N, 784, 1)
    features = Features({"input_values": Array2D(values.shape[1:], "float32"), "label": ClassLabel(num_classes=10)})
    return Dataset.from_dict({"input_values": values, "label": labels}, features=features)


def _read(folder: str | None, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images `(N, 784)` of 0 to 255, and labels `(N,)`."""
    names = (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz")
    paths = [
        local_or_downloaded(folder, url=f"{ADDRESS}/{name}", sha256=SHA256[name], field="data.folder") for name in names
    ]
    images, labels = (read_idx(path, dimensions) for path, dimensions in zip(paths, (3, 1), strict=True))
    if len(images) != len(labels) or labels.max(initial=0) > 9:
        raise ValueError(
            f"`data.folder`: {paths[1].name} must hold one label from 0 to 9 for each of the {len(images)} images, got "
            f"{len(labels)} up to {labels.max(initial=0)}"
        )
    return images.reshape(len(images), -1), labels.astype(np.int64)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """
    The array of bytes in an IDX file: 0, 0, the type (8), the number of dimensions, their sizes, the bytes.

    Raises:
        ValueError: the file has another format.
    """
    content = read_bytes(path)
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise ValueError(f"`data.folder`: {path.name} is no IDX file of bytes in {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != np.prod(shape):
        raise ValueError(f"`data.folder`: {path.name} must hold {shape} bytes, got {len(content) - start}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
