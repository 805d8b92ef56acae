# SPDX-License-Identifier: Apache-2.0
"""The baseline, a linear probe of frozen features, and the scores to compare it with the fine-tuned model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # of the L2 penalty, to try
HELD_OUT = 5  # one in so many training texts is held out to choose the strength


@dataclass(frozen=True)
class Scores:
    """Scores on all validation texts. `macro_f1` weighs classes equally, however many texts they have."""

    accuracy: float
    macro_f1: float

    @staticmethod
    def of(confusion: Tensor) -> Scores:
        """From counts (true class, predicted class). Ignores classes that neither occur nor are predicted."""
        confusion = confusion.double()
        right, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        occurs = true + predicted > 0
        f1 = 2 * right[occurs] / (true + predicted)[occurs]
        return Scores((right.sum() / confusion.sum()).item(), f1.mean().item())


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(classes, classes) counts: rows are true, columns predicted."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def probe(features: Tensor, labels: Tensor, other: Tensor, classes: int) -> tuple[Tensor, float]:
    """Trains multinomial logistic regression on `features` (texts, size) and predicts the classes of `other`.

    Chooses the L2 strength that scores best on every fifth training text when trained on the others, then trains on
    all. Returns the predictions and that strength. Runs in float64 to convergence, without randomness.
    """
    mean, deviation = features.double().mean(0), features.double().std(0) + 1e-6
    features, other = ((one.double() - mean) / deviation for one in (features, other))
    held_out = torch.arange(len(labels)) % HELD_OUT == 0
    right = {}
    for strength in STRENGTHS:
        weights = logistic_regression(features[~held_out], labels[~held_out], classes, strength)
        right[strength] = (predict(weights, features[held_out]) == labels[held_out]).sum().item()
    best = max(STRENGTHS, key=lambda strength: right[strength])
    return predict(logistic_regression(features, labels, classes, best), other), best


def logistic_regression(features: Tensor, labels: Tensor, classes: int, strength: float) -> Tensor:
    """(size + 1, classes) weights that minimise mean loss + strength * |weights|^2, without the bias, the last row."""
    weights = torch.zeros(features.shape[1] + 1, classes, dtype=features.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=200, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = cross_entropy(features @ weights[:-1] + weights[-1], labels)
        value = value + strength * weights[:-1].square().sum()
        value.backward()
        return value

    solver.step(loss)
    return weights.detach()


def predict(weights: Tensor, features: Tensor) -> Tensor:
    return (features @ weights[:-1] + weights[-1]).argmax(1)
