"""Mixtures of experts: the router's balance loss is part of every objective's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cit_fast.errors import ConfigError
from cit_fast.key_parts.hidden import honours_4d_mask, pair_collator, pair_hidden
from cit_fast.key_parts.pairs import encode_pairs
from cit_fast.methods.objectives import KPIG, CrossEntropy
from cit_fast.models.collation import PaddingCollator
from cit_fast.models.forward import router_loss

MIXTURE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": 8,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}


@pytest.fixture
def batch():
    rows = [([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9]), ([10, 11, 12], [-100, 11, 12])]
    return PaddingCollator(0, (5,))([{"input_ids": ids, "labels": labels} for ids, labels in rows])


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "Olmoe"])
def test_equals_the_models_own_loss_and_gradients(make_model, batch, name):
    model = make_model(name, **MIXTURE).train()
    theirs = model(**batch)
    assert 0.5 * theirs.aux_loss > 0.1
    gates = [p for path, p in model.named_parameters() if "gate.weight" in path or "router" in path]
    expected = torch.autograd.grad(theirs.loss, gates)
    ours = CrossEntropy()(model, batch, None)
    torch.testing.assert_close(ours, theirs.loss)
    for one, other in zip(torch.autograd.grad(ours, gates), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_micro_batches_have_the_mean_by_their_tokens(make_model, batch):
    model = make_model("Mixtral", **MIXTURE)
    halves = [{key: value[row : row + 1] for key, value in batch.items()} for row in (0, 1)]
    balances = [0.5 * model(**half).aux_loss for half in halves]
    losses = [model(**half, output_router_logits=False).loss for half in halves]
    together = sum(CrossEntropy()(model, half, 5) for half in halves)
    torch.testing.assert_close(together, (3 * (losses[0] + balances[0]) + 2 * (losses[1] + balances[1])) / 5)


def test_only_where_the_configuration_asks_for_it(make_model, batch):
    model = make_model("Mixtral", **{**MIXTURE, "output_router_logits": False})
    torch.testing.assert_close(CrossEntropy()(model, batch, None), model(**batch).loss)
    llama = make_model("Llama")  # which knows no coefficient
    with pytest.raises(ConfigError, match="LlamaForCausalLM: has a router's loss and no router_aux_loss_coef"):
        router_loss(llama, SimpleNamespace(aux_loss=torch.tensor(1.0)))


def test_pairs_have_it_too(make_model, encoder, examples):
    model = make_model("Mixtral", **MIXTURE)
    pairs = encode_pairs(encoder, examples).pairs
    collate = pair_collator(model, 0)
    hidden = pair_hidden(model, collate(pairs))
    assert hidden.router_loss > 0.1
    assert hidden.only_scored().router_loss is hidden.router_loss
    # The loss reads a mask of two dimensions: a model that asks for it cannot have shared rows.
    assert not honours_4d_mask(model)
    assert not collate.share_prefix
    batch = collate(pairs)
    with_router = KPIG()(model, {**batch, "frozen": hidden.masked, **_nothing(hidden)}, None)
    model.config.output_router_logits = False
    without = KPIG()(model, {**batch, "frozen": hidden.masked, **_nothing(hidden)}, None)
    torch.testing.assert_close(with_router - without, hidden.router_loss)


def _nothing(hidden):
    return {"temperature": torch.zeros(0), "compared": torch.zeros(0, dtype=torch.int64)}
