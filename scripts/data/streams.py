"""
Cut a text into streams that a model with memory reads side by side, row after row.

The text is cut into B parts of equal length, the streams of a batch of B rows. Row s of a stream has the tokens s T to
s T + T - 1 of its part and, as labels, the tokens that follow them, so that every token of the text but the first is
predicted once. Rows are in step-major order: row i is of stream i mod B and step i div B, so that batches of B rows in
this order continue each other. With several processes of b rows each, B is b times the processes, and batches dealt out
one after the other give each process its own b streams.
"""

# N tokens of the text, B streams, T tokens of a row, S steps

import torch
from torch.utils.data import Dataset

from scripts.data.windows import IGNORED, TokenStream


class Streams(Dataset):
    """
    Rows of `input_ids` and `labels`, the tokens that follow; `shift_labels`, which the model's loss takes as they are,
    has the same. The last row of a stream is filled up with label -100, of which nothing follows.

    Args:
        stream: the text.  (N,)
        segment: tokens T of a row.
        separate: add `seq_idx`, the number of the document that each token belongs to; a document's first token is
            the `<eos>` before it.
        max_rows: leave out the end of the text so that there are at most about so many rows; all of it if None.
    """

    def __init__(
        self, stream: TokenStream, *, segment: int, separate: bool = False, max_rows: int | None = None
    ) -> None:
        self.stream, self.segment, self.separate = stream, segment, separate
        self.tokens = len(stream) if max_rows is None else min(len(stream), max_rows * segment + 1)
        self.streams = 1  # B; the trainer knows it

    @property
    def part(self) -> int:
        """Predicted tokens of a stream; the last stream may have fewer."""
        return -(-(self.tokens - 1) // self.streams)

    def __len__(self) -> int:
        return self.streams * -(-self.part // self.segment)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        step, stream = divmod(index, self.streams)
        last = min((stream + 1) * self.part, self.tokens - 1)  # the last token that this stream predicts
        start = min(stream * self.part + step * self.segment, last)
        tokens = torch.from_numpy(self.stream[start : min(start + self.segment, last) + 1].astype("int64"))
        inputs = tokens.new_full((self.segment,), int(tokens[-1]))
        labels = tokens.new_full((self.segment,), IGNORED)
        inputs[: len(tokens) - 1], labels[: len(tokens) - 1] = tokens[:-1], tokens[1:]
        row = {"input_ids": inputs, "labels": labels, "shift_labels": labels}
        if self.separate:
            begins = torch.zeros(self.segment, dtype=torch.long)
            begins[torch.from_numpy(self.stream.document_begins(start, start + len(tokens) - 1))] = 1
            row["seq_idx"] = self.stream.documents_before(start) + begins.cumsum(0)
        return row

    def beginning(self, rows: int) -> "Streams":
        """The same over the beginning of the text, so that there are at most about so many rows."""
        return Streams(self.stream, segment=self.segment, separate=self.separate, max_rows=rows)
