"""How like the prompts of any learned task a prompt is: the distance of its features to the nearest task's::

    familiarity(x) = - min_c (x - mu_c)' (S + shrinkage tr(S)/d I)^-1 (x - mu_c)

with the mean mu_c of each class and the covariance S that they share: all that is kept of the features. Those are first
brought to at most 256 numbers by a fixed random projection, which keeps distances and bounds what is stored.

Source: Lee et al., A Simple Unified Framework for Detecting Out-of-Distribution Samples, arXiv 1807.03888, equation 2.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_DIMENSIONS = 256
_SHRINKAGE = 0.3


class Familiarity:
    """Means of the classes and the scatter within them, float32; features go in once, class by class."""

    def __init__(self) -> None:
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.means = torch.zeros(0, 0)
        self.scatter = torch.zeros(0, 0)

    def learn(self, features: Tensor) -> None:
        """Add a class: [n, d] float32, n >= 1."""
        own = _projected(features)
        mean = own.mean(0)
        within = (own - mean).T @ (own - mean)
        first = not len(self.counts)
        self.counts = torch.cat([self.counts, torch.tensor([len(own)])])
        self.means = mean.float()[None] if first else torch.cat([self.means, mean.float()[None]])
        self.scatter = within.float() if first else (self.scatter.double() + within).float()

    def __call__(self, features: Tensor) -> Tensor:
        """[N] float64, at most 0, of [N, d] float32; higher is more like what was learned."""
        factor = self._factor()
        whitened, means = (_solved(factor, rows) for rows in (_projected(features), self.means.double()))
        return -torch.cdist(whitened, means).amin(1).square()

    def whitening(self, width: int) -> tuple[Tensor, Tensor]:
        """``familiarity(x) = - min_c |x W - m_c|^2`` in two matrices: W [width, k] and m [C, k], float64.

        Args:
            width: of the features.
        """
        factor = self._factor()
        rows = torch.eye(width, dtype=torch.float64) if width <= _DIMENSIONS else _projection(width)
        return _solved(factor, rows), _solved(factor, self.means.double())

    def _factor(self) -> Tensor:
        """The Cholesky factor of the shrunk covariance."""
        covariance = self.scatter.double() / self.counts.sum()
        size = covariance.diagonal().mean().clamp_min(1e-12)  # all features of a class may be the same
        shrunk = covariance + _SHRINKAGE * size * torch.eye(len(covariance), dtype=torch.float64)
        factor: Tensor = torch.linalg.cholesky(shrunk)
        return factor

    def tensors(self) -> dict[str, Tensor]:
        """What is to be stored."""
        return {"counts": self.counts, "means": self.means, "scatter": self.scatter}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Familiarity:
        """Take it back; a name that is missing is a ``KeyError``."""
        self = cls()
        self.counts, self.means, self.scatter = (tensors[name] for name in ("counts", "means", "scatter"))
        return self


def _solved(factor: Tensor, rows: Tensor) -> Tensor:
    solved: Tensor = torch.linalg.solve_triangular(factor, rows.T, upper=False)
    return solved.T


def _projected(features: Tensor) -> Tensor:
    """[n, min(d, 256)] float64."""
    width = features.shape[1]
    rows = features.double()
    return rows if width <= _DIMENSIONS else rows @ _projection(width)


@functools.lru_cache(maxsize=4)
def _projection(width: int) -> Tensor:
    # numpy promises never to change the numbers of this generator; those of the others may change with the version.
    drawn = np.random.RandomState(0).standard_normal((width, _DIMENSIONS))
    return torch.from_numpy(drawn / _DIMENSIONS**0.5)
