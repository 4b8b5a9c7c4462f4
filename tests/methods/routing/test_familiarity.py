from __future__ import annotations

import pytest
import torch

from cit_fast.methods.routing.familiarity import Familiarity


def clouds(width: int) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.1, 2, width)
    return [4 * centre + spread * torch.randn(30, width, generator=chance) for centre in torch.eye(3, width)]


def test_is_the_equation():
    classes = clouds(8)
    familiarity = Familiarity()
    for own in classes:
        familiarity.learn(own)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    rows = [own.double() for own in classes]
    covariance = sum((own - own.mean(0)).T @ (own - own.mean(0)) for own in rows) / 90
    precision = torch.linalg.inv(covariance + 0.3 * covariance.trace() / 8 * torch.eye(8, dtype=torch.float64))
    far = torch.stack([x.double() - own.mean(0) for own in rows])
    expected = -torch.einsum("cnd,de,cne->cn", far, precision, far).amin(0)
    torch.testing.assert_close(familiarity(x), expected, rtol=1e-6, atol=0)  # means are kept in float32


@pytest.mark.parametrize("width", [8, 600])
def test_what_was_learned_is_more_familiar(width):
    classes = clouds(width)
    familiarity = Familiarity()
    for own in classes[:2]:
        familiarity.learn(own[:20])
    assert familiarity.scatter.shape == (min(width, 256),) * 2
    known = torch.cat([familiarity(own[20:]) for own in classes[:2]])
    assert known.max() <= 0
    assert familiarity(classes[2] + 3).max() < known.min()


def test_one_prompt_and_equal_prompts():
    familiarity = Familiarity()
    familiarity.learn(torch.ones(1, 4))
    familiarity.learn(torch.zeros(3, 4))
    found = familiarity(torch.tensor([[1.0] * 4, [0.0] * 4, [0.5] * 4]))
    assert found[:2].tolist() == [0, 0]
    assert torch.isfinite(found).all()
    assert found[2] < -1e9


def test_tensors_bring_it_back():
    familiarity = Familiarity()
    for own in clouds(300):
        familiarity.learn(own)
    again = Familiarity.from_tensors(familiarity.tensors())
    x = torch.randn(4, 300)
    assert torch.equal(again(x), familiarity(x))
    with pytest.raises(KeyError, match="means"):
        Familiarity.from_tensors({"counts": familiarity.counts})
