"""`Trainer` as the recipes use it: it takes streams, averages weights, and is watched for what ends a run too soon."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments

from modeling_rtransformer.hub_files import HubFilesCallback
from scripts.data.streaming import StreamedWindows, StreamLoader
from scripts.data.windows import IGNORED
from scripts.tasks.prepared import Prepared
from scripts.training.averaging import WeightAverage
from scripts.training.budget import RowsInTime
from scripts.training.interruptions import Watch, agree, outlive_signals


def _restore_to_numbered_cpu(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    return storage if location.startswith("cpu:") else None


# Transformers 5.17 has an optimizer's state loaded to "cpu:0" in each of several processes on a CPU.
torch.serialization.register_package(100, lambda storage: None, _restore_to_numbered_cpu)


class RecipeTrainer(Trainer):
    """
    A `Trainer` that reads a [`StreamedWindows`] by parts, one for each data-parallel process, tells a [`Watch`] of
    every batch it trains on, and scores, saves and ends with the weights of a [`WeightAverage`], if there is one.
    """

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        callbacks = self.callback_handler.callbacks
        self.watches = [callback for callback in callbacks if isinstance(callback, Watch)]
        averages = [callback for callback in callbacks if isinstance(callback, WeightAverage)]
        self.average = averages[0] if averages else WeightAverage()
        if isinstance(self.train_dataset, StreamedWindows):
            self.args.ignore_data_skip = True  # a stream goes on from its own state, without reading what it gave

    def get_train_dataloader(self) -> DataLoader | StreamLoader:
        if not isinstance(self.train_dataset, StreamedWindows):
            return _patient(super().get_train_dataloader())
        args = self.args
        if args.world_size > 1 and not args.average_tokens_across_devices:
            raise ValueError(
                "`training.average_tokens_across_devices` must be true where several processes read a stream: their "
                "batches need not hold equally many tokens"
            )
        alike = self._processes_alike()
        return StreamLoader(
            self.train_dataset.split(args.process_index // alike, args.world_size // alike),
            self.data_collator,
            self._train_batch_size,
            everywhere=lambda true: not agree(args, int(not true))[0],
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory,
            worker_init_fn=outlive_signals,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = self._without_repeats(epoch_iterator) if self._fills_up() else epoch_iterator
        return super().get_batch_samples(batches, num_batches, device)

    def _processes_alike(self) -> int:
        """Processes that share their batches."""
        return self.get_tp_size() * self.get_cp_size() * self.get_sp_size()

    def _fills_up(self) -> bool:
        """Whether accelerate repeats rows at the end of a pass, in a loss that could do without: a mean over labels."""
        args = self.args
        if args.world_size == 1 or args.dataloader_drop_last or isinstance(self.train_dataset, StreamedWindows):
            return False
        splits = args.accelerator_config
        weighed = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        whole_rows = splits.even_batches and not splits.split_batches and self._processes_alike() == 1
        return whole_rows and weighed and args.average_tokens_across_devices

    def _without_repeats(self, batches):
        """
        The batches of this process. Where rows do not divide by the processes, accelerate fills the last ones of a pass
        up with rows of its beginning: these are taken out again, or, of a batch of nothing else, what they would teach.
        """
        for batch in batches:
            labels = batch.get("labels")
            last = self.accelerator.gradient_state.end_of_dataloader
            yield self._own_rows(batch) if last and labels is not None and not labels.is_floating_point() else batch

    def _own_rows(self, batch):
        rows, processes = self._train_batch_size, self.args.world_size
        last = len(self.train_dataset) % (rows * processes) or rows * processes
        own = min(rows, max(0, last - rows * self.args.process_index))
        batch = type(batch)({name: values[: max(1, own)] for name, values in batch.items()})
        if own == 0:
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        return batch

    def get_eval_dataloader(self, *arguments, **options) -> DataLoader:
        return _patient(super().get_eval_dataloader(*arguments, **options))

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        for watch in self.watches:
            watch.note(loss, inputs)
        return loss

    def evaluation_loop(self, *arguments, **options):
        with self.average.in_place():
            return super().evaluation_loop(*arguments, **options)

    def save_model(self, *arguments, **options) -> None:
        with self.average.in_place():
            super().save_model(*arguments, **options)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.average.save(self.model, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.average.load(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.average.finish()  # before: the best checkpoint's is loaded over it
        super()._load_best_model()


def _patient(loader: DataLoader) -> DataLoader:
    """The same loader, whose workers outlive signals."""
    base = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
    base.worker_init_fn = partial(_init_worker, base.worker_init_fn)
    return loader


def _init_worker(before, worker: int) -> None:
    outlive_signals(worker)
    if before is not None:
        before(worker)


def make_trainer(model: PreTrainedModel, args: TrainingArguments, prepared: Prepared, **options) -> RecipeTrainer:
    """A `Trainer` of the task, for training or only for scoring; what it pushes to the Hub is complete and safe."""
    if args.push_to_hub:
        options["callbacks"] = [*options.get("callbacks", ()), HubFilesCallback()]
    if prepared.label_names is not None:
        args.label_names = list(prepared.label_names)
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
) -> tuple[dict[str, float], int]:
    """
    The named metrics on a whole split, or on as many of its rows, evenly spread, as there are `seconds` for.

    Returns:
        The metrics, and how many rows were scored.
    """
    dataset = prepared.datasets[split]
    if seconds < math.inf:
        dataset = RowsInTime(dataset, seconds, clock)
        trainer.args.dataloader_num_workers = 0  # every worker would give all rows, and none would tell how many
    scored = trainer.predict(dataset, metric_key_prefix=split).metrics
    rows = dataset.given if isinstance(dataset, RowsInTime) else len(dataset)
    return {name: scored[f"{split}_{name}"] for name in metrics}, rows
