"""The switch network itself: two layers over a prompt's features, and how they are trained.

Source: Wu et al., arXiv 2407.11780, and the first author's code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class SwitchNetwork:
    """Two layers with a ReLU between them: features [N, d] to scores of C classes [N, C].

    Features are first brought to mean 0 and variance 1 as they were over the training set, or left as they are, by a
    mean of 0 and a scale of 1. All float32 on the CPU.

    Args:
        mean, scale: [d]; ``hidden_weight``: [H, d]; ``hidden_bias``: [H]; ``weight``: [C, H]; ``bias``: [C].
    """

    mean: Tensor
    scale: Tensor
    hidden_weight: Tensor
    hidden_bias: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """[N, d] to [N, C]."""
        hidden = F.linear((features - self.mean) / self.scale, self.hidden_weight, self.hidden_bias).relu()
        return F.linear(hidden, self.weight, self.bias)


def train_switch(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    seed: int,
    hidden: int = 256,
    learning_rate: float = 1e-3,
    epochs: int = 20,
    batch_size: int = 32,
    balanced: bool = True,
    standardised: bool = True,
    optimizer: Literal["adam", "adamw"] = "adam",
) -> SwitchNetwork:
    """A switch network trained from its random start on the cross-entropy.

    The same arguments give the same bits; torch's own random state is neither used nor changed.

    Args:
        features: [N, d] float32; ``labels``: [N] int64 in [0, classes), each class at least once.
        seed: of start and order; ``hidden``: units of the hidden layer.
        learning_rate, epochs, batch_size: as usual; an epoch is N draws.
        balanced: draw every class equally often, however many of its examples were retained; otherwise each example
            once an epoch.
        standardised: bring the features to mean 0 and variance 1.
        optimizer: ``"adam"``, or ``"adamw"`` with torch's weight decay.
    """
    chance = torch.Generator().manual_seed(seed)
    sizes = (hidden, features.shape[1]), (classes, hidden)
    parameters = [  # as torch.nn.Linear starts
        torch.empty(shape).uniform_(-(columns**-0.5), columns**-0.5, generator=chance).requires_grad_()
        for rows, columns in sizes
        for shape in ((rows, columns), (rows,))
    ]
    mean, scale = torch.zeros_like(features[0]), torch.ones_like(features[0])
    if standardised:
        mean, scale = features.mean(0), features.var(0, correction=0).sqrt().clamp_min(1e-6)
    network = SwitchNetwork(mean, scale, *parameters)
    per_class = torch.bincount(labels, minlength=classes)
    weights = (1.0 / per_class)[labels]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    stepper = kind(parameters, lr=learning_rate)
    for _ in range(epochs):
        if balanced:
            order = torch.multinomial(weights, len(labels), replacement=True, generator=chance)
        else:
            order = torch.randperm(len(labels), generator=chance)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            stepper.zero_grad()
            with torch.enable_grad():
                loss = F.cross_entropy(network(features[batch]), labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            stepper.step()
    return SwitchNetwork(mean, scale, *(each.detach() for each in parameters))
