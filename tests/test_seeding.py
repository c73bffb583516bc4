"""Randomness by position: what two runs do not differ in, they share to the bit.

Shapes: T tokens, D width, E experts.
"""

import math
from typing import Any

import pytest
import torch
import yaml
from layers import CONF, preset, router_cases
from torch import Tensor

from moe_lab import seeding
from moe_lab.assemble import assemble
from moe_lab.config import build
from moe_lab.drawing import draw
from moe_lab.model.transformer import Transformer
from moe_lab.parts import Parts


def stream(*key: int | str, n: int = 8) -> Tensor:
    return torch.randn(n, generator=seeding.generator(*key))


def test_equal_keys_give_equal_streams_in_any_order():
    keys = [(0, "data", 3), (0, "noise", 3), (1, "data", 3), (0, "data", 4)]
    forwards = {key: stream(*key) for key in keys}
    for key in reversed(keys):
        torch.rand(5)  # the global stream has no part in it
        assert torch.equal(stream(*key), forwards[key])


def test_different_keys_give_different_streams():
    """Also where their letters are the same: the parts of a key cannot run into each other."""
    keys = [(0, "a"), ("0", "a"), (0, "b"), (0, "a", 0), ("0a",), (0, 1, 2), (0, 12), (1, 0, 2), ("a", 0)]
    streams = torch.stack([stream(*key) for key in keys])
    assert len(streams.unique(dim=0)) == len(keys)
    many = torch.stack([stream(0, "noise", step, layer, n=2) for step in range(100) for layer in range(4)])
    assert len(many.unique(dim=0)) == 400


def model(router: dict[str, Any], seed: int = 0, **experts: Any) -> Transformer:
    transformer: Transformer = build(
        "model",
        preset("model", "nano", dim=16, heads=2),
        32,
        True,
        router,
        preset("experts", "swiglu", num=4, width=16, **experts),
    )
    seeding.initialise(transformer, seed)
    return transformer


@pytest.mark.parametrize("node", router_cases())
def test_models_that_differ_in_the_router_share_every_other_weight(node: dict[str, Any]):
    first, second = (dict(m.named_parameters()) for m in (model(preset("router", "topk")), model(node)))
    shared = {name for name in first if ".router." not in name}
    assert shared == {name for name in second if ".router." not in name} and len(shared) > 10
    for name in shared:
        assert torch.equal(first[name], second[name]), name
    spread = [name for name in shared if first[name].ndim >= 2]
    assert len({first[name].flatten()[0].item() for name in spread}) == len(spread), "two parameters drew alike"


def test_adding_parameters_moves_no_other():
    plain, more = (dict(model(preset("router", "topk"), shared_experts=n).named_parameters()) for n in (0, 1))
    assert set(plain) < set(more)
    assert all(torch.equal(p, more[name]) for name, p in plain.items())


def test_another_seed_is_another_model():
    first, second = (dict(model(preset("router", "topk"), seed).named_parameters()) for seed in (0, 1))
    assert all(torch.equal(p, second[name]) == (p.ndim < 2) for name, p in first.items())


def test_initial_scales():
    """Each weight's own standard deviation, within four standard errors; gains are 1, Shazeer's matrices 0."""
    m = model(preset("router", "noisy_topk"))
    for name, p in m.named_parameters():
        std: float = p.init_std  # pyright: ignore[reportAttributeAccessIssue]
        if math.isinf(std):
            assert (p == 1).all(), name
        elif std == 0:
            assert (p == 0).all() and ".router." in name, name
        else:
            assert abs(p.std().item() / std - 1) < 4 / math.sqrt(2 * p.numel()), name


@pytest.fixture
def cfg() -> dict[str, Any]:
    """A whole config, read without Hydra."""
    root = yaml.safe_load((CONF / "train.yaml").read_text())
    names = {"dataset": "clusters", "objective": "clm", "optim": "adamw", "schedule": "constant"}
    small = {"model": preset("model", "nano", dim=16, heads=2), "experts": preset("experts", "mlp", num=4, width=16)}
    small |= {group: preset(group, name) for group, name in names.items()}
    return root | small | {"balance": {}, "explore": {}, "seq_len": 32, "batch_size": 2, "steps": 4, "device": "cpu"}


def test_runs_that_differ_in_router_and_balancers_share_weights_batches_and_noise(cfg: dict[str, Any]):
    balance = {name: preset("balance", name) for name in ("switch", "z_loss", "loss_free")}
    runs: list[Parts] = [
        assemble(cfg | {"router": preset("router", "switch"), "explore": {"gumbel": preset("explore", "gumbel")}}),
        assemble(cfg | {"router": preset("router", "gumbel_ste"), "balance": balance}),
    ]
    weights = [dict(parts.model.named_parameters()) for parts in runs]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(p, weights[1][name]) for name, p in weights[0].items())
    for step in (0, 3):
        first, second = (parts.data.train_batch(0, step, 2, 32) for parts in runs)
        assert torch.equal(first.ids, second.ids) and torch.equal(first.domain, second.domain)
        for one, other in zip(*(draw(parts, 64, 0, "noise", step, training=True) for parts in runs), strict=True):
            assert other.noise_TE is not None and torch.equal(one.explorers[0]["logits"], other.noise_TE)
    assert not torch.equal(runs[0].data.train_batch(0, 0, 2, 32).ids, runs[0].data.train_batch(0, 1, 2, 32).ids)


def test_layers_draw_their_own_noise(cfg: dict[str, Any]):
    parts = assemble(cfg | {"router": preset("router", "gumbel_ste")})
    first, second = (d.noise_TE for d in draw(parts, 64, 0, "noise", 0, training=True))
    assert first is not None and second is not None and first.shape == (64, 4)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("kind", "mean", "variance", "kurtosis"),
    [("gaussian", 0.0, 1.0, 3.0), ("gumbel", 0.5772157, math.pi**2 / 6, 5.4)],
)
def test_moments_of_the_noise(kind: str, mean: float, variance: float, kurtosis: float):
    """Gumbel: mean Euler's constant, variance pi^2/6, excess kurtosis 12/5. Within four standard errors."""
    n = 200_000
    x = seeding.noise(kind, (n // 4, 4), 0, "noise").double()
    assert torch.isfinite(x).all()
    assert abs(x.mean().item() - mean) < 4 * math.sqrt(variance / n)
    assert abs(x.var().item() - variance) < 4 * variance * math.sqrt((kurtosis - 1) / n)
