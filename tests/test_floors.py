"""Sampling floors against a simulation of routers that choose at random.

Shapes: T tokens, E experts, k chosen per token, R repetitions (in the place of layers), C classes.
"""

import math

import pytest
import torch
from torch import Tensor

from moe_lab.observe import dynamics, load
from moe_lab.observe.metric import METRICS
from moe_lab.observe.specialisation import Joint, n_log_n


def random_choices(R: int, T: int, E: int, k: int) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.rand(R, T, E, generator=g).topk(k, -1).indices


def counts_of(choice_RTK: Tensor, E: int) -> Tensor:
    flat = choice_RTK.flatten(1)
    return torch.zeros(len(flat), E, dtype=torch.int64).scatter_add_(1, flat, torch.ones_like(flat))


@pytest.mark.parametrize(("T", "E", "k"), [(512, 4, 1), (1024, 8, 1), (1024, 8, 2), (1024, 32, 4)])
def test_load_floors(T: int, E: int, k: int):
    counts = counts_of(random_choices(150, T, E, k), E)
    means = {
        "load_cv": load.cv(counts).square().mean().sqrt(),
        "load_cv_of_ceiling": load.cv_of_ceiling(counts, k).square().mean().sqrt(),
        "max_vio": load.max_vio(counts).mean(),
        "load_gini": load.gini(counts).mean(),
        "load_min_max": load.min_max(counts).mean(),
        "load_shift": dynamics.total_variation(counts[1:], counts[:-1]).mean(),
        "load_flutter": dynamics.total_variation(counts[1:], counts[:-1]).mean(),
    }
    for name, mean in means.items():
        floor_at = METRICS[name].floor_at
        assert floor_at is not None
        assert mean.item() == pytest.approx(floor_at(T, E, k), rel=0.1), name
    deficit = 1 - load.load_entropy(counts).mean().item()  # 1 minus it, or any rel. tolerance would pass
    assert deficit == pytest.approx(1 - load.entropy_floor(T, E, k), rel=0.15)
    lost = E - load.effective_experts(counts).mean().item()
    assert lost == pytest.approx(E - load.effective_floor(T, E, k), rel=0.15)
    assert load.dead_experts(counts).sum() == 0


@pytest.mark.parametrize(("E", "k", "C"), [(8, 1, 5), (8, 2, 5), (4, 3, 20)])
def test_floor_of_information(E: int, k: int, C: int):
    R, T = 60, 2000
    choice = random_choices(R, T, E, k)
    known = torch.randint(C, (R, T, 1), generator=torch.Generator().manual_seed(1)).expand_as(choice)
    joint = counts_of((choice * C + known), E * C).view(R, E, C)
    found = Joint(joint, k)
    assert found.nmi().mean().item() == pytest.approx(found.floor().mean().item(), rel=0.1)
    collapsed = joint.clone()
    collapsed[:, 1:] = 0
    assert Joint(collapsed, k).floor().sum() == 0


def by_sequence(choice_RT: Tensor, S: int, E: int) -> Tensor:
    """Counts [R, B, E] of sequences of S tokens."""
    R, T = choice_RT.shape
    return counts_of(choice_RT.view(-1, S), E).view(R, T // S, E)


@pytest.mark.parametrize("alike", [False, True])
def test_domains_of_few_sequences_look_told(alike: bool):
    """Random domains for whole sequences: where sequences differ by themselves, only the floor by sequence holds."""
    R, B, S, E, C = 40, 40, 64, 8, 5
    g = torch.Generator().manual_seed(2)
    taste = torch.full((R * B, E), 1 / E) if alike else torch.rand(R * B, E, generator=g) ** 3
    counts_RBE = by_sequence(taste.multinomial(S, replacement=True, generator=g).view(R, -1), S, E)
    domain_RB = torch.randint(C, (R, B), generator=g)
    joint = torch.zeros(R, C, E, dtype=torch.int64).scatter_add_(1, domain_RB[..., None].expand(R, B, E), counts_RBE)
    joint_REC, N = joint.transpose(1, 2), B * S
    told = n_log_n(counts_RBE).sum((1, 2)) - B * S * math.log(S) - n_log_n(counts_RBE.sum(1)).sum(-1)
    found = Joint(joint_REC, 1)
    floor = found.floor_by_sequence(told / N + math.log(N), B).mean().item()
    assert found.nmi().mean().item() == pytest.approx(floor, rel=0.15)  # tastes differ too much for exactness
    naive = found.floor().mean().item()
    assert naive == pytest.approx(floor, rel=0.1) if alike else naive < floor / 3


@pytest.mark.parametrize("alike", [False, True])
def test_flutter_that_the_batches_explain(alike: bool):
    """Updates of B sequences, each with its own taste; the router stands still."""
    R, B, S, E = 300, 16, 64, 8
    g = torch.Generator().manual_seed(3)
    taste = torch.full((R * B, E), 1 / E) if alike else torch.rand(R * B, E, generator=g)
    counts_RBE = by_sequence(taste.multinomial(S, replacement=True, generator=g).view(R, -1), S, E)
    load_RE = counts_RBE.sum(1)
    N = B * S
    within = (n_log_n(counts_RBE).sum((1, 2)) - n_log_n(load_RE).sum(-1)) / N - math.log(S) + math.log(N)
    floor = dynamics.flutter_floor(within.mean()[None], B).item()
    moved = dynamics.total_variation(load_RE[1:], load_RE[:-1]).mean().item()
    assert moved == pytest.approx(floor, rel=0.1)
