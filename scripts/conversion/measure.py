"""
What a tanh RNN loses as RSA heads, on a real task: the digits that scikit-learn ships, read pixel by pixel.

Trains a tanh RNN with a linear read-out of its last state, converts it (rnn_to_rsa.py says how) and scores the whole
converted classifier: as it stands, with the read-out fitted anew, and trained on for a few epochs, beside the same
architecture trained as long from random weights. The result has the share of right answers on the test split.
"""

import sys

import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from modeling_rtransformer import RTransformerForSequenceClassification
from modeling_rtransformer.linear_rnn import LinearRNN, rsa_from_linear_rnn
from scripts.data.sources.digits import Options, load
from scripts.results.provenance import machine, versions


LARGEST = 0.999  # larger eigenvalues, which a REM does not reach, are brought down to this size


class Classifier(nn.Module):
    """A tanh RNN over (B, L, 1) and a linear read-out of its last state."""

    def __init__(self, units: int):
        super().__init__()
        self.rnn = nn.RNN(1, units, batch_first=True)
        self.score = nn.Linear(units, 10)
        nn.init.orthogonal_(self.rnn.weight_hh_l0, gain=0.97)

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        return self.score(self.rnn(input_values)[0][:, -1])


def fit(logits_of, parameters, split, epochs: int, learning_rate: float) -> None:
    """Adam with a cosine down to zero, on shuffled batches of 32."""
    inputs, labels = split
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for rows in torch.randperm(len(inputs)).split(32):
            optimizer.zero_grad()
            loss = F.cross_entropy(logits_of(inputs[rows]), labels[rows])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        schedule.step()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}", file=sys.stderr)


@torch.no_grad()
def accuracy(logits_of, split) -> float:
    return (logits_of(split[0]).argmax(-1) == split[1]).double().mean().item()


def converted(classifier: Classifier, linear: LinearRNN) -> RTransformerForSequenceClassification:
    """The RNN as RSA heads with the same read-out, which sees the first coordinates of the last hidden state."""
    model = rsa_from_linear_rnn(linear, RTransformerForSequenceClassification, largest=LARGEST, num_labels=10)
    with torch.no_grad():
        model.score.weight.zero_()
        model.score.weight[:, : len(linear.bias)] = classifier.score.weight
        model.score.bias.copy_(classifier.score.bias)
    return model


@torch.no_grad()
def refit_readout(model: RTransformerForSequenceClassification, units: int, split) -> None:
    """Logistic regression of the labels on the last states."""
    states = model.model(input_values=split[0].double()).last_hidden_state[:, -1, :units]
    mean, scale = states.mean(0), states.std(0)
    regression = LogisticRegression(max_iter=5000).fit(((states - mean) / scale).numpy(), split[1].numpy())
    weight = torch.from_numpy(regression.coef_) / scale
    model.score.weight[:, :units] = weight
    model.score.bias.copy_(torch.from_numpy(regression.intercept_) - weight @ mean)


def measure(units: int, epochs: int, more_epochs: int, seed: int) -> dict:
    """
    Train, convert, score.

    Args:
        epochs: of the RNN.
        more_epochs: of the converted model and of its twin with random weights.

    Returns:
        The shares of right answers on the test split, with what they were measured on.
    """
    torch.manual_seed(seed)
    splits = {}
    for name, rows in load(Options(source="digits")).with_format("torch").items():
        splits[name] = (rows["input_values"][:].float(), rows["label"][:])
    classifier = Classifier(units)
    fit(classifier, list(classifier.parameters()), splits["train"], epochs, 3e-3)
    result = {"units": units, "parameters": sum(p.numel() for p in classifier.parameters())}
    scores = {"tanh RNN": accuracy(classifier, splits["test"])}
    for name, inputs in (("tangent", None), ("fit", splits["train"][0])):
        linear = LinearRNN.from_torch(classifier.rnn, inputs)
        result[f"largest eigenvalue, {name}"] = torch.linalg.eigvals(linear.recurrent).abs().max().item()
        model = converted(classifier, linear)
        logits_of = lambda values, model=model: model(input_values=values.to(model.dtype)).logits  # noqa: E731
        scores[f"linear part, {name}"] = accuracy(logits_of, splits["test"])
        refit_readout(model, units, splits["train"])
        scores[f"{name}, read-out fitted anew"] = accuracy(logits_of, splits["test"])
        result["parameters, converted"] = model.num_parameters()
    twin = RTransformerForSequenceClassification(
        type(model.config).from_dict({**model.config.to_dict(), "layer_norm_eps": 1e-5, "dtype": "float32"})
    )
    for name, start in (("converted", model.float()), ("random weights", twin)):
        start.train()
        logits_of = lambda values, start=start: start(input_values=values).logits  # noqa: E731
        fit(logits_of, list(start.parameters()), splits["train"], more_epochs, 1e-3)
        scores[f"{name}, {more_epochs} epochs"] = accuracy(logits_of, splits["test"])
    return {**result, "accuracy": scores, "seed": seed, "machine": machine(), "versions": versions()}
