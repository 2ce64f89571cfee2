"""
Make training rows from a stream of documents that need not fit into memory or onto the disk.

Each data-parallel process reads its own part of the documents (`datasets.distributed.split_dataset_by_node`: whole
files if their number is a multiple of the processes, else every n-th document), and each of its
`dataloader_num_workers` reads a part of that. One block of documents is in memory at a time. A block is a stream as in
`windows.py`, with `<eos>` first and after each document. It is cut into rows across documents, its last row is padded,
and its rows are shuffled.

All processes end a pass over the data together. A process whose part is exhausted yields rows without labels, which add
nothing to the loss or its gradient, until the others have finished. So in each pass every token is predicted once, by
one process, whatever the sizes of the parts.

The state of the stream after a batch is small and travels with the batch: it is `datasets.IterableDataset.state_dict`,
the position in the documents before the block and the number of its rows that were read. Each worker of a `DataLoader`
has its own, which a plain `DataLoader` does not collect.
"""

# N rows of a block, W window

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, get_worker_info
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ExportableState

from scripts.data.windows import IGNORED, positions_in_documents


class StreamError(ValueError):
    """An error of a stream or of its saved state; the message has the remedy."""


@dataclasses.dataclass(eq=False)
class StreamedWindows(torch.utils.data.IterableDataset):
    """
    The rows of one process, for one pass over its part of the documents.

    Args:
        documents: rows with `text`.
        tokenizer: gives the ids.
        window, stride, separate: as for [`scripts.data.windows.Windows`].
        block: documents that are in memory, tokenised and shuffled together.
        seed: of the order of the rows in a block.
    """

    documents: IterableDataset
    tokenizer: PreTrainedTokenizerBase
    _: dataclasses.KW_ONLY
    window: int
    stride: int
    block: int
    seed: int
    separate: bool = False
    epoch: int = 0
    begin_at: list[dict | None] | None = None  # a state for each worker, to resume a pass
    begin_with: int = 0  # the worker that yields first
    turn: int = 1  # rows that a worker yields at a time: a batch

    def split(self, rank: int, processes: int) -> "StreamedWindows":
        """The part of the stream for one of several processes."""
        return dataclasses.replace(self, documents=split_dataset_by_node(self.documents, rank, processes))

    def __iter__(self) -> Iterator[tuple[dict[str, np.ndarray] | None, dict[str, Any]]]:
        """Rows, each with the state after it; None for rows that a worker yielded before the pass was resumed."""
        info = get_worker_info()
        worker = 0 if info is None else info.id
        if worker < self.begin_with:
            yield from [(None, {})] * self.turn
        columns = {"input_columns": "text", "remove_columns": "text"}
        rows = self.documents.map(self._rows, with_indices=True, batched=True, batch_size=self.block, **columns)
        rows.load_state_dict(None if self.begin_at is None else self.begin_at[worker])
        for row in rows:
            yield row, rows.state_dict()

    def _rows(self, texts: list[str], numbers: list[int]) -> dict[str, Any]:
        """The shuffled rows of a block of documents, given their texts and numbers.  each column (N, W)"""
        for text in texts:
            if not isinstance(text, str):
                raise StreamError(
                    f"`data.text_column` holds {text!r}, not text, in a row of the train split; correct or remove such "
                    "rows"
                )
        eos = self.tokenizer.eos_token_id
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
        tokens = np.concatenate([[eos], *([*ids, eos] for ids in encoded)])
        starts = range(0, max(1, len(tokens) - self.window + self.stride), self.stride)
        padding = (0, starts[-1] + self.window - len(tokens))
        columns = {
            "input_ids": np.pad(tokens, padding, constant_values=eos),
            "labels": np.pad(tokens, padding, constant_values=IGNORED),
        }
        if self.separate:
            begins = np.cumsum([0, *(len(ids) + 1 for ids in encoded)])  # an `<eos>` is a document's first token
            columns["position_ids"] = positions_in_documents(begins, len(columns["labels"])).numpy()
        order = np.random.default_rng([self.seed, self.epoch, numbers[0]]).permutation(starts)
        windows = np.lib.stride_tricks.sliding_window_view
        rows = {name: windows(column, self.window)[order] for name, column in columns.items()}
        if self.separate:  # the first document of a row may have begun before it
            rows["position_ids"] = np.minimum(rows["position_ids"], np.arange(self.window))
        return rows

    def blank(self) -> dict[str, torch.Tensor]:
        """The shortest batch without labels, which adds nothing to a loss.  (1, 2)"""
        batch = {"input_ids": torch.full((1, 2), self.tokenizer.eos_token_id), "labels": torch.full((1, 2), IGNORED)}
        return {**batch, "position_ids": torch.arange(2)[None]} if self.separate else batch


class StreamLoader:
    """
    Batches of a stream, pass after pass without end, with `Trainer`'s settings. Its state can be saved and loaded.

    Args:
        stream: the part of this process.
        collator: makes a batch of rows.
        batch_size: rows of a batch; the last batch of a part may have fewer.
        everywhere: whether a condition holds on all data-parallel processes; each of them calls it once a batch.
        options: of `torch.utils.data.DataLoader`, such as `num_workers` and `pin_memory`.
    """

    def __init__(
        self,
        stream: StreamedWindows,
        collator: Callable[[list], dict[str, torch.Tensor]],
        batch_size: int,
        everywhere: Callable[[bool], bool] = bool,
        **options: Any,
    ) -> None:
        self.stream, self.collator, self.everywhere = stream, collator, everywhere
        self.stream.turn = batch_size
        self.epoch = self.yielded = self.next_worker = 0
        self.workers: list[dict | None] = [None] * max(1, options.get("num_workers", 0))
        self.ended = False  # no training step is left
        # A separate generator: the workers' seeds must not advance the one that a checkpoint restores.
        generator = torch.Generator().manual_seed(stream.seed)
        self.options = {**options, "batch_size": batch_size, "collate_fn": self._collate, "generator": generator}

    def _collate(self, rows: list[tuple]) -> tuple[dict[str, torch.Tensor] | None, dict, int]:
        info = get_worker_info()
        batch = None if rows[0][0] is None else self.collator([row for row, _ in rows])
        return batch, rows[-1][1], 0 if info is None else info.id

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while not self.ended:
            self.stream.epoch, self.stream.begin_at, self.stream.begin_with = self.epoch, self.workers, self.next_worker
            loaded = (item for item in DataLoader(self.stream, **self.options) if item[0] is not None)
            while not self.everywhere((item := next(loaded, None)) is None):
                self.yielded += 1
                if item is not None:
                    batch, state, worker = item
                    self.workers[worker], self.next_worker = state, (worker + 1) % len(self.workers)
                yield self.stream.blank() if item is None else batch
            if not self.yielded:
                raise StreamError("the train split of `data` gives no row; name files that hold more text")
            self.epoch, self.workers, self.next_worker = self.epoch + 1, [None] * len(self.workers), 0

    def state_dict(self) -> dict[str, Any]:
        """The state of the stream after the last batch, made of numbers, lists and dicts only."""
        return copy.deepcopy({name: getattr(self, name) for name in ("epoch", "yielded", "workers", "next_worker")})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume after the last batch of another loader with the same number of workers."""
        if "yielded" not in state:
            raise StreamError("a stream of an older version cannot be resumed; begin a new run in another --output-dir")
        if len(state["workers"]) != len(self.workers):
            raise StreamError(
                f"the checkpoint was written with {len(state['workers'])} workers reading the stream, now there are "
                f"{len(self.workers)}; set `training.dataloader_num_workers` as it was"
            )
        for name, value in state.items():
            setattr(self, name, value)


class StreamState(TrainerCallback, ExportableState):
    """Saves the state of each process's stream in the `trainer_state.json` of every checkpoint, and restores it."""

    def __init__(self) -> None:
        self.processes: list[dict[str, Any]] = []

    def state(self) -> dict:
        return {"args": {}, "attributes": {"processes": self.processes}}

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.ended = state.global_step >= state.max_steps
        if not self.processes:
            return
        if len(self.processes) != args.world_size:
            raise StreamError(
                f"the checkpoint was written by {len(self.processes)} processes, now there are {args.world_size}: the "
                "documents of a stream stay divided among the processes that started the run"
            )
        train_dataloader.load_state_dict(self.processes[args.process_index])

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        if control.should_save or control.should_evaluate:  # an evaluation may decide to save
            self.processes = gather_object([train_dataloader.state_dict()])
        state.epoch = state.global_step / state.max_steps  # Trainer would count from the last resume

    on_epoch_end = on_step_end
