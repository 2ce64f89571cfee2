"""`Trainer` as the recipes use it, and the scoring of a split."""

import functools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from modeling_rtransformer.hub_files import HubFilesCallback
from scripts.data.streaming import StreamedWindows, StreamLoader
from scripts.data.streams import Streams
from scripts.data.windows import IGNORED
from scripts.tasks.prepared import Prepared
from scripts.training.budget import RowsInTime
from scripts.training.carried_memory import Memory
from scripts.training.interruptions import InterruptionCallback, delay_signals_in_worker, maximum


class RecipeTrainer(Trainer):
    """
    A `Trainer` that reads a [`StreamedWindows`] by parts, one for each data-parallel process, trains on each row once
    a pass with any number of processes, carries a model's memory from row to row of [`Streams`], and records every
    batch for the [`InterruptionCallback`].
    """

    @functools.cached_property
    def memories(self) -> dict[bool, Memory]:
        """What a model that reads [`Streams`] remembers in training (True) and in scoring (False)."""
        config = self.accelerator.unwrap_model(self.model).config
        return {training: Memory(config) for training in (True, False)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "shift_labels" not in inputs:  # not of streams
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        memory = self.memories[model.training]
        loss, outputs = super().compute_loss(model, memory.arguments(inputs), True, num_items_in_batch)
        memory.detach()
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *arguments, **options):
        self.memories[False].clear()
        return super().evaluation_loop(*arguments, **options)

    def _lay_out(self, dataset, rows: int):
        """Tell a dataset of streams how many there are."""
        if isinstance(dataset, Streams):
            if self.is_fsdp_enabled or self._processes_per_batch() > 1:
                raise ValueError(
                    "`task.rows` must be 'windows' with FSDP, tensor, context or sequence parallelism, got 'streams': "
                    "a memory is carried in one process or in data parallelism (DDP)"
                )
            dataset.streams = rows * (self.args.world_size // self._processes_per_batch())
        return dataset

    def get_train_dataloader(self) -> DataLoader | StreamLoader:
        self._lay_out(self.train_dataset, self._train_batch_size)
        if not isinstance(self.train_dataset, StreamedWindows):
            return _delaying_signals(super().get_train_dataloader())
        args = self.args
        if args.world_size > 1 and not args.average_tokens_across_devices:
            raise ValueError(
                "`training.average_tokens_across_devices` must be true where several processes read a stream: their "
                "batches need not hold equally many tokens"
            )
        sharing = self._processes_per_batch()
        return StreamLoader(
            self.train_dataset.split(args.process_index // sharing, args.world_size // sharing),
            self.data_collator,
            self._train_batch_size,  # not args.train_batch_size, which `auto_find_batch_size` leaves as it was
            everywhere=lambda true: not maximum(args, int(not true))[0],
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory,
            worker_init_fn=delay_signals_in_worker,
        )

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        self._lay_out(self.eval_dataset if eval_dataset is None else eval_dataset, self.args.eval_batch_size)
        return _delaying_signals(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        return super().get_test_dataloader(self._lay_out(test_dataset, self.args.eval_batch_size))

    def get_decay_parameter_names(self, model) -> list[str]:
        """Those of `Trainer` without the factors of butterflies, to which their authors apply no weight decay."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("twiddle")]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = map(self._without_repeats, epoch_iterator) if self._repeats_rows() else epoch_iterator
        return super().get_batch_samples(batches, num_batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, InterruptionCallback):
                callback.record_batch(loss, inputs)
        return loss

    def _processes_per_batch(self) -> int:
        """How many processes work on the same batch."""
        return self.get_tp_size() * self.get_cp_size() * self.get_sp_size()

    def _repeats_rows(self) -> bool:
        """Whether accelerate fills the last batches of a pass with rows of its beginning, and they can be taken out."""
        args, loading = self.args, self.args.accelerator_config
        if args.world_size == 1 or args.dataloader_drop_last or isinstance(self.train_dataset, StreamedWindows):
            return False
        filled = loading.even_batches and not loading.split_batches and self._processes_per_batch() == 1
        mean_over_labels = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        return filled and mean_over_labels and args.average_tokens_across_devices

    def _without_repeats(self, batch):
        """The rows of a batch that this process has to train on; one without labels where all are repeated."""
        labels = batch.get("labels")
        if not self.accelerator.gradient_state.end_of_dataloader or labels is None or labels.is_floating_point():
            return batch
        rows, processes = self._train_batch_size, self.args.world_size
        last = len(self.train_dataset) % (rows * processes) or rows * processes
        own = min(rows, max(0, last - rows * self.args.process_index))
        batch = type(batch)({name: values[: max(1, own)] for name, values in batch.items()})
        if own == 0:
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        return batch


def _delaying_signals(loader: DataLoader) -> DataLoader:
    """The same loader with workers that outlive a signal until the step is finished."""
    base = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
    base.worker_init_fn = partial(delay_signals_in_worker, initialise=base.worker_init_fn)
    return loader


def require_packages(args: TrainingArguments) -> None:
    """Refuse options whose package is not installed, which `Trainer` finds out when the data are prepared."""
    for name in set(args.report_to) - set(get_available_reporting_integrations()):
        raise ValueError(
            f"`training.report_to` names {name}, whose package is not installed; install it, or leave it out"
        )
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise ValueError(f"`training.optim`: {error}") from error


def make_trainer(model: PreTrainedModel, args: TrainingArguments, prepared: Prepared, **options) -> RecipeTrainer:
    """A `Trainer` of the task, for training or only for scoring; its pushes to the Hub hold the code and no pickle."""
    if args.push_to_hub:
        options["callbacks"] = [*options.get("callbacks", ()), HubFilesCallback()]
    if prepared.label_names is not None:
        args.label_names = list(prepared.label_names)
    if isinstance(prepared.datasets.get("train"), StreamedWindows):
        args.ignore_data_skip = True  # a stream resumes from its own state, without reading the rows before
    if any(isinstance(dataset, Streams) for dataset in prepared.datasets.values()):
        args.train_sampling_strategy = "sequential"
        args.remove_unused_columns = False  # `shift_labels` and `seq_idx` are no parameters by name
    return RecipeTrainer(
        model=model,
        args=args,
        train_dataset=prepared.datasets.get("train"),
        eval_dataset=prepared.monitor,
        processing_class=prepared.tokenizer,
        data_collator=prepared.collator,
        compute_metrics=prepared.compute_metrics,
        preprocess_logits_for_metrics=prepared.reduce_logits,
        compute_loss_func=prepared.compute_loss,
        **options,
    )


def score(
    trainer: RecipeTrainer,
    prepared: Prepared,
    split: str,
    metrics: Sequence[str],
    seconds: float = math.inf,
    clock: str = "wall",
) -> tuple[dict[str, float], int, dict[str, Any]]:
    """
    The named metrics on a whole split, or on as many of its rows, evenly spread, as there are `seconds` for.

    Returns:
        The metrics, how many rows were scored, and the task's details.
    """
    dataset = prepared.datasets[split]
    if seconds < math.inf:
        dataset = RowsInTime(dataset, seconds, clock)
        trainer.args.dataloader_num_workers = 0  # every worker would give all rows, and none would tell how many
    output = trainer.predict(dataset, metric_key_prefix=split)
    rows = dataset.given if isinstance(dataset, RowsInTime) else len(dataset)
    details = prepared.details(EvalPrediction(output.predictions, output.label_ids))
    return {name: output.metrics[f"{split}_{name}"] for name in metrics}, rows, details
