"""
Make training rows from a stream of documents that need not fit into memory or onto the disk.

Each data-parallel process reads its own part of the documents (`datasets.distributed.split_dataset_by_node`: whole
files if their number is a multiple of the processes, else every n-th document), and each of its
`dataloader_num_workers` reads a part of that. A part is a stream as in `windows.py`: `<eos>`, then each document
followed by `<eos>`, cut into rows across documents. One block of documents is in memory at a time. The rows of a block
are shuffled, its last tokens are carried over into the next block, and the last row of a part is padded.

All processes end a pass over the data together. A process whose part is exhausted yields rows without labels, which add
nothing to the loss or its gradient, until the others have finished. So in each pass every token is predicted once, by
one process, whatever the sizes of the parts.

The state of the stream after a batch is small and travels with the batch: the position in the documents before the
block (`datasets.IterableDataset.state_dict`), the tokens carried over from the block before, and the row.
"""

# W window

import copy
from collections.abc import Callable, Iterator
from itertools import islice
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

    def __init__(
        self,
        documents: IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        window: int,
        stride: int,
        block: int,
        seed: int,
        separate: bool = False,
    ) -> None:
        self.documents, self.tokenizer = documents, tokenizer
        self.window, self.stride, self.block, self.seed, self.separate = window, stride, block, seed, separate
        self.rank = self.epoch = 0
        self.begin_at: list[dict | None] | None = None  # a state for each worker, to resume a pass
        self.begin_with = 0  # the worker that yields first
        self.turn = 1  # rows that a worker yields at a time: a batch

    def split(self, rank: int, processes: int) -> "StreamedWindows":
        """The part of the stream for one of several processes."""
        part = copy.copy(self)
        if processes > 1:
            part.documents = split_dataset_by_node(self.documents, rank=rank, world_size=processes)
        part.rank = rank
        return part

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor] | None, dict[str, Any]]]:
        """Rows, each with the state after it; None for rows that a worker yielded before the pass was resumed."""
        info = get_worker_info()
        worker = 0 if info is None else info.id
        eos = self.tokenizer.eos_token_id
        state = None if self.begin_at is None else self.begin_at[worker]
        if worker < self.begin_with:
            yield from [(None, {})] * self.turn
        state = state or {"documents": None, "left": [eos], "predicted": 1, "begins": [0], "block": 0, "row": 0}
        self.documents.set_epoch(self.epoch)
        self.documents.load_state_dict(state["documents"])
        documents = iter(self.documents)
        while True:
            held = list(islice(documents, self.block))
            tokens, begins = self._joined(held, state)
            starts = list(range(0, len(tokens) - self.window + 1, self.stride))
            end = len(starts) * self.stride  # the start of the next row
            predicted = self.window - self.stride if starts else state["predicted"]
            if not held and len(tokens) - end > predicted:
                starts.append(end)
            seed = [self.seed, self.epoch, self.rank, worker, state["block"]]
            for place, index in enumerate(np.random.default_rng(seed).permutation(len(starts))):
                if place >= state["row"]:
                    yield self._row(tokens, begins, starts[index]), {**state, "row": place + 1}
            if not held:
                return
            state = {
                "documents": self.documents.state_dict(),
                "left": tokens[end:].tolist(),
                "predicted": predicted,
                "begins": (begins[begins >= end] - end).tolist(),
                "block": state["block"] + 1,
                "row": 0,
            }

    def _joined(self, held: list[dict[str, str]], state: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """The carried tokens and those of a block as one stream, and the positions at which documents begin."""
        texts = [row["text"] for row in held]
        for text in texts:
            if not isinstance(text, str):
                raise StreamError(
                    f"`data.text_column` holds {text!r}, not text, in a row of the train split; correct or remove such "
                    "rows"
                )
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        encoded = self.tokenizer(texts, **options)["input_ids"] if texts else []
        eos = self.tokenizer.eos_token_id
        parts = [np.array(ids, dtype=np.int32) for ids in (state["left"], *([*ids, eos] for ids in encoded))]
        begins = np.cumsum([len(part) for part in parts])[1:] - 1  # an `<eos>` is the next document's first token
        return np.concatenate(parts), np.concatenate([np.array(state["begins"], dtype=np.int64), begins])

    def _row(self, tokens: np.ndarray, begins: np.ndarray, start: int) -> dict[str, torch.Tensor]:
        part = tokens[start : start + self.window]
        ids = np.full(self.window, self.tokenizer.eos_token_id, dtype=np.int64)
        labels = np.full(self.window, IGNORED, dtype=np.int64)
        ids[: len(part)] = labels[: len(part)] = part
        row = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if self.separate:
            inside = begins[(begins >= start) & (begins < start + self.window)] - start
            row["position_ids"] = positions_in_documents(inside, self.window)
        return row

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
        self.epoch = self.batches = 0
        self.workers: list[dict | None] = [None] * max(1, options.get("num_workers", 0))
        self.next_worker = 0
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
            loaded = iter(DataLoader(self.stream, **self.options))
            while not self.everywhere((item := self._next(loaded)) is None):
                self.batches += 1
                if item is None:
                    yield self.stream.blank()
                else:
                    batch, state, worker = item
                    self.workers = [state if index == worker else old for index, old in enumerate(self.workers)]
                    self.next_worker = (worker + 1) % len(self.workers)
                    yield batch
            if not self.batches:
                raise StreamError("the train split of `data` gives no row; name files that hold more text")
            self.epoch, self.workers, self.next_worker = self.epoch + 1, [None] * len(self.workers), 0

    @staticmethod
    def _next(loaded: Iterator) -> tuple | None:
        return next((item for item in loaded if item[0] is not None), None)

    def state_dict(self) -> dict[str, Any]:
        """The state of the stream after the last batch, made of numbers, lists and dicts only."""
        return {name: getattr(self, name) for name in ("epoch", "batches", "workers", "next_worker")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume after the last batch of another loader with the same number of workers."""
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
