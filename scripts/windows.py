"""
A stream of tokens cut into rows for language modelling.

A row of W tokens predicts all of them but its first. Rows begin every `stride` tokens. Labels of a row for training are
its tokens; for scoring, only the positions that no earlier row has predicted, so each position of the stream but the
very first is scored exactly once, in as much context as its row gives: at least W - 1 - stride tokens after the start.
"""

import numpy as np
import torch
from torch.utils.data import Dataset


IGNORED = -100  # a label that is not scored


class Windows(Dataset):
    """
    Rows of `input_ids` and `labels` (unshifted: the model shifts them itself) over a stream of token ids.

    Args:
        stream: ids of all documents, one after another.  (N,)
        window: tokens W of a row; the whole stream is one row if it is shorter.
        stride: tokens between the beginnings of two rows, at most W - 1.
        score_once: a label for what no earlier row has predicted alone; False for all labels in every row.
    """

    def __init__(self, stream: np.ndarray, *, window: int, stride: int, score_once: bool) -> None:
        self.stream, self.window, self.stride, self.score_once = stream, window, stride, score_once

    def __len__(self) -> int:
        return 1 + max(0, -(-(len(self.stream) - self.window) // self.stride))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # The last row is moved back to end with the stream, so all rows are equally long.
        end = min(index * self.stride + self.window, len(self.stream))
        start = max(0, end - self.window)
        row = torch.from_numpy(self.stream[start:end].astype(np.int64))  # (W,)
        labels = row.clone()
        if self.score_once and index > 0:
            scored_before = (index - 1) * self.stride + self.window
            labels[: scored_before - start] = IGNORED
        return {"input_ids": row, "labels": labels}
