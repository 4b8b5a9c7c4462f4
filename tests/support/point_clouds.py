"""Random weighted point clouds for the tests of wasserstein_matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def random_clouds(
    sizes: tuple[int, ...], d: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    """Clusters around different centres, none near the origin."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [(make(n, d) + 2 * make(1, d)).to(dtype).to(device) for n in sizes]


def random_weights(clouds: list[Tensor], seed: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """From 0.1 to 1.1, on the device of the clouds."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(len(cloud), generator=generator, dtype=dtype) + 0.1).to(cloud.device) for cloud in clouds]
