"""
Cut a stream of tokens into rows for language modelling.

In a row of W tokens every token but the first is predicted. A row begins every `stride` tokens. For training all tokens
of a row are labels. For scoring only the positions that no earlier row has predicted are labels: every position of the
stream but the first is scored exactly once, with a context of at least W - 1 - stride tokens except at the start.

With separate documents a row also has `position_ids`, which restart at 0 with every document; they keep attention, REMs
and LocalRNN windows inside a document. The `<eos>` between two documents is predicted in the first one and is the first
token of the second one, so every token is still predicted once.
"""

# N tokens of the stream, W window

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset


IGNORED = -100  # the label of a position that is not scored


class TokenStream:
    """
    `<eos>`, then the tokens of all documents, each followed by `<eos>`: a sequence of N ids that is not copied.

    Only slices are copied, so a stream over memory-mapped Arrow files may be larger than the memory; 8 bytes a document
    are kept.

    Args:
        documents: lists of ids, each with its `<eos>`, in Arrow's chunks.
        eos_token_id: the first id of the stream; it is never predicted.
    """

    def __init__(self, documents: Sequence[pa.ListArray], eos_token_id: int) -> None:
        first = pa.array([eos_token_id], pa.int32())
        self._tokens = pa.chunked_array([first, *(chunk.flatten() for chunk in documents)])
        lengths = [np.zeros(1, dtype=np.int64), *(chunk.value_lengths().to_numpy() for chunk in documents)]
        self._begins = np.cumsum(np.concatenate(lengths), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, span: slice) -> np.ndarray:
        start, end, _ = span.indices(len(self))
        return self._tokens.slice(start, max(0, end - start)).to_numpy()

    def document_begins(self, start: int, end: int) -> np.ndarray:
        """Positions, relative to `start`, of the `<eos>` between `start` and `end` that begin a document."""
        first, last = np.searchsorted(self._begins, [start, end])
        return self._begins[first:last] - start

    def documents_before(self, end: int) -> int:
        """How many documents begin before the position `end`."""
        return int(np.searchsorted(self._begins, end))


def positions_in_documents(begins: np.ndarray, length: int) -> torch.Tensor:
    """
    Positions that restart at 0 with every document in a row.  (W,)

    Args:
        begins: positions in the row at which a document begins.
    """
    last_begin = np.zeros(length, dtype=np.int64)
    last_begin[begins] = begins
    return torch.from_numpy(np.arange(length) - np.maximum.accumulate(last_begin))


class Windows(Dataset):
    """
    Rows of `input_ids` and `labels` (unshifted: the model shifts them itself) over a stream of token ids.

    Args:
        stream: ids of all documents, concatenated.  (N,)
        window: tokens W of a row; a shorter stream is one row.
        stride: tokens between the starts of two rows, at most W - 1.
        score_once: label only positions that no earlier row has predicted; False to label all positions of every row.
        separate: add `position_ids` that keep documents separate; the stream must be a [`TokenStream`] then.
    """

    def __init__(
        self, stream: TokenStream | np.ndarray, *, window: int, stride: int, score_once: bool, separate: bool = False
    ) -> None:
        self.stream, self.window, self.stride = stream, window, stride
        self.score_once, self.separate = score_once, separate

    def __len__(self) -> int:
        return 1 + max(0, -(-(len(self.stream) - self.window) // self.stride))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)  # ends an iteration
        # The last row is shifted back to end with the stream, so all rows have the same length.
        end = min(index * self.stride + self.window, len(self.stream))
        start = max(0, end - self.window)
        row = torch.from_numpy(self.stream[start:end].astype(np.int64))  # (W,)
        labels = row.clone()
        if self.score_once and index > 0:
            scored_before = (index - 1) * self.stride + self.window
            labels[: scored_before - start] = IGNORED
        if not self.separate:
            return {"input_ids": row, "labels": labels}
        positions = positions_in_documents(self.stream.document_begins(start, end), len(row))
        return {"input_ids": row, "labels": labels, "position_ids": positions}
