"""
Write the card of a model: `hub_card.md`, filled in from the checkpoint's config, weights, results and recipe.

The card has measured figures only; without results.json it says that there are none.
"""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_rtransformer import model_classes
from scripts.data.sources import SOURCES
from scripts.metrics import METRIC_FUNCTIONS
from scripts.training.recipe import Recipe


TEMPLATE = Path(__file__).resolve().parents[2] / "hub_card.md"


class Head(NamedTuple):
    """How a model class is loaded and what it is for: the pipeline's name on the Hub, and a noun for readers."""

    auto_class: str
    pipeline: str
    purpose: str


HEADS = [
    Head("AutoModel", "feature-extraction", "encoder"),
    Head("AutoModelForCausalLM", "text-generation", "causal language model"),
    Head("AutoModelForMaskedLM", "fill-mask", "masked language model"),
    Head("AutoModelForSequenceClassification", "text-classification", "sequence classifier"),
    Head("AutoModelForTokenClassification", "token-classification", "token classifier"),
    Head("AutoModelForAudioFrameClassification", "audio-classification", "frame classifier"),
    Head("AutoModelForTimeSeriesPrediction", "time-series-forecasting", "forecaster of time series"),
    Head("AutoModelForQuestionAnswering", "question-answering", "extractive question answering model"),
]
# Transformers 5 has no pipeline for questions, for the frames of a recording or for forecasts.
NO_PIPELINES = {"question-answering", "audio-classification", "time-series-forecasting"}


def head_of(config) -> Head:
    """The head that the checkpoint was saved with; a ValueError if its config does not name exactly one."""
    auto_classes = {model_class.__name__: name for name, model_class in model_classes(type(config)).items()}
    names = config.architectures or []
    if len(names) != 1 or names[0] not in auto_classes:
        raise ValueError(f"`architectures` of config.json must be one of {', '.join(auto_classes)}, got {names}")
    return next(head for head in HEADS if head.auto_class == auto_classes[names[0]])


def own_metrics(split: Mapping[str, float]) -> dict[str, float]:
    """The figures of a split that are metrics of the model; the others are those of compressors to compare with."""
    return {name: value for name, value in split.items() if name in METRIC_FUNCTIONS}


def eval_results(results: Mapping[str, Any], dataset: str, head: Head) -> list[EvalResult]:
    """The measured metrics as entries of the Hub's `model-index`."""
    kept = {"task_type": head.pipeline, "dataset_type": dataset, "dataset_name": dataset.replace("_", " ")}
    return [
        EvalResult(
            **kept, dataset_split=split, metric_type=name, metric_name=name.replace("_", " "), metric_value=value
        )
        for split, scores in results["metrics"].items()
        for name, value in own_metrics(scores).items()
    ]


def gate_rows(model: PreTrainedModel) -> list[dict[str, Any]]:
    """One row for each REM head: layer, head, kind, dilation, gate, and the eigenvalue as `decay` and `angle`."""
    rows = []
    for index, layer in enumerate(model.base_model.layers):
        recurrence = layer.self_attn.recurrence
        if recurrence is None:
            continue
        learned, gates = recurrence.heads(), recurrence.gates()
        for place, head in enumerate(recurrence.head_indices):
            decay, angle = learned.decay[place].item(), learned.angle[place].item()
            rows.append(
                {
                    "layer": index,
                    "head": head,
                    "kind": recurrence.kinds[place].replace("_", " "),
                    "dilation": recurrence.dilations[place],
                    "gate": gates[head].item(),
                    "decay": decay,
                    "angle": angle,
                }
            )
    return sorted(rows, key=lambda row: (row["layer"], row["head"]))


def has_pipeline(config, tokenizer: PreTrainedTokenizerBase | None, head: Head) -> bool:
    """Whether Transformers has a pipeline for the model. One that fills masks has to read them as the mask token."""
    if tokenizer is None or config.num_input_features is not None or head.pipeline in NO_PIPELINES:
        return False
    mask = tokenizer.mask_token
    return head.pipeline != "fill-mask" or (mask is not None and tokenizer.mask_token_id in tokenizer(mask).input_ids)


def render(
    repo_id: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    results: Mapping[str, Any] | None,
    recipe: Recipe | None,
    files: list[str],
    license: str = "apache-2.0",
) -> ModelCard:
    """
    The card of `model` in the repository `repo_id`.

    Args:
        results: the content of results.json; None if nothing was measured.
        recipe: the recipe that the model was trained with; None if it is unknown.
        files: names of the other files in the repository; the card shows plots that are among them.
    """
    config, head = model.config, head_of(model.config)
    sections = recipe.sections if recipe is not None else {}
    data = dict(sections.get("data", {}))
    source = data.pop("source", None)
    dataset = data.get("dataset", source or (results or {}).get("recipe"))
    measured = eval_results(results, dataset, head) if results else None
    name = repo_id.split("/")[-1]
    card_data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=head.pipeline if config.num_input_features is None else None,
        tags=["r-transformer", "rsa", "recurrence", "custom_code"],
        datasets=[dataset] if source == "hub" else None,
        metrics=sorted({result.metric_type for result in measured}) if measured else None,
        model_name=name,
        eval_results=measured,
    )
    return ModelCard.from_template(
        card_data,  # which gives the template `license` too
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        head=head,
        model=model,
        tokenizer=tokenizer,
        has_pipeline=has_pipeline(config, tokenizer, head),
        source=source,
        about_data=inspect.getdoc(SOURCES[source]) if source in SOURCES else None,
        data=data,
        sections=sections,
        results=results,
        own_metrics=own_metrics,
        gates=gate_rows(model),
        files=files,
        json=json.dumps,
    )
