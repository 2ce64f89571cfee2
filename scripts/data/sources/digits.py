"""
The 8 x 8 images of handwritten digits that scikit-learn ships, read pixel by pixel. Needs no download.

One example is `input_values` of shape (64, 1), brightness from 0 to 1 in reading order, and its `label`. 80 % of the
1,797 images are for training, 10 % each for validation and test, stratified by digit; the split is always the same.
"""

import dataclasses

from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


@dataclasses.dataclass(frozen=True)
class Options:
    """No settings."""

    source: str


def load(options: Options) -> DatasetDict:
    """Read the images and split them."""
    images, labels = load_digits(return_X_y=True)  # (N, 64) of 0 to 16, (N,)
    sequences = (images / 16).astype("float32")[:, :, None]  # (N, 64, 1)
    train, rest = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    validation, test = train_test_split(rest, test_size=0.5, random_state=0, stratify=labels[rest])
    features = Features({"input_values": Array2D((64, 1), "float32"), "label": ClassLabel(num_classes=10)})
    return DatasetDict(
        {
            split: Dataset.from_dict({"input_values": sequences[rows], "label": labels[rows]}, features=features)
            for split, rows in (("train", train), ("validation", validation), ("test", test))
        }
    )
