"""Scoring a model on a split, exactly: the same for a model that was just trained and for one that was saved."""

from collections.abc import Sequence

from transformers import PreTrainedModel, TrainingArguments

from modeling_rtransformer.hub_files import HubFilesCallback
from scripts.tasks.prepared import Prepared
from scripts.trainer import RecipeTrainer


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


def score(trainer: RecipeTrainer, prepared: Prepared, split: str, metrics: Sequence[str]) -> dict[str, float]:
    """The named metrics on a whole split."""
    scored = trainer.predict(prepared.datasets[split], metric_key_prefix=split).metrics
    return {name: scored[f"{split}_{name}"] for name in metrics}
