"""
An exponential moving average of the weights, which is what a run is scored by and what it gives in the end:

    average <- decay * average + (1 - decay) * weights        after each step, beginning with the first weights

A checkpoint's `model.safetensors` is the average; the weights to go on from lie beside it, in `unaveraged.safetensors`.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState


UNAVERAGED = "unaveraged.safetensors"


class WeightAverage(TrainerCallback, ExportableState):
    """
    Keeps the average while a [`scripts.training.trainer.RecipeTrainer`] trains; after that it is the model's weights.

    Every process of several averages for itself, and alike, so each must have all weights. Buffers are not averaged.

    Args:
        decay: above 0 and below 1; None for no average.
    """

    def __init__(self, decay: float | None = None) -> None:
        self.decay = decay
        self.weights: list[torch.Tensor] = []  # tied ones once; empty before and after training
        self.averages: list[torch.Tensor] = []

    def state(self) -> dict:
        return {"args": {"decay": self.decay}, "attributes": {}}

    def begin(self, model: PreTrainedModel) -> None:
        """Begin with the weights that the model has."""
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.averages = [weight.detach().clone() for weight in self.weights]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not self.averages:  # else it was loaded
            self.begin(model)

    def on_optimizer_step(self, args, state, control, **kwargs):
        get_ema_multi_avg_fn(self.decay)(self.averages, self.weights, None)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average for its weights here."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, average in zip(self.weights, self.averages):
            kept = weight.clone()
            weight.copy_(average)  # in its own memory, where compiled code may look for it
            average.copy_(kept)

    def finish(self) -> None:
        """The model has the average for good."""
        self._exchange()
        self.weights, self.averages = [], []

    def on_train_end(self, args, state, control, **kwargs):
        self.finish()

    def save(self, model: PreTrainedModel, checkpoint: str) -> None:
        """Write the weights to go on from, if there is an average."""
        if self.averages:
            save_model(model, str(Path(checkpoint, UNAVERAGED)))

    def load(self, model: PreTrainedModel, checkpoint: str) -> None:
        """Go on from a checkpoint, whose average the model has for its weights."""
        if self.decay is not None:
            self.begin(model)
            load_model(model, Path(checkpoint, UNAVERAGED))
