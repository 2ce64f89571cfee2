"""
What is learned, one module a task.

A task has `Options`, a frozen dataclass of its settings in `[task]`, and `prepare(recipe, tokenizer, splits)`, which
gives a [`Prepared`]. With a tokenizer it is used as it is (a saved model's); without one it is built.
"""

from scripts.tasks import forecasting, frame_prediction, language_modeling, next_symbols, sequence_classification


TASKS = {
    "language_modeling": language_modeling,
    "sequence_classification": sequence_classification,
    "frame_prediction": frame_prediction,
    "forecasting": forecasting,
    "next_symbols": next_symbols,
}
