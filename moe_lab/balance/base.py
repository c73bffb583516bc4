"""What balances the load: a loss on the routing, or a selection bias moved after each update.

Shapes: T tokens, E experts, K chosen per token, L MoE layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_lab.model.moe import MoE
from moe_lab.plans import shares
from moe_lab.routing import Draw, Routing
from moe_lab.schedules import Curve


@dataclass(frozen=True)
class Layer:
    """What a balancer knows of one MoE layer beside a micro-batch's routing.

    seq_len: tokens are sequences of so many. earlier: its own statistics, summed over the micro-batches of this update
    that came before. state: its own state of this layer, which checkpoints hold; only `after_step` changes it.
    draws: what the balancer's `draws` ask for, by name.
    """

    moe: MoE | None = None
    seq_len: int | None = None
    earlier: Mapping[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    draws: Mapping[str, Tensor] = field(default_factory=dict)


class Balancer:
    """Every hook does nothing in the base. `loss` is per layer and unweighted; the loop averages layers and weighs it.

    `weight` is None for balancers without a loss. At most one balancer of a run `moves_bias`, the layer's selection
    bias, in `after_step`.
    """

    weight: Curve | None = None
    moves_bias = False
    of_weights = False  # whether its loss sees no token, and is one of the layer's weights alone
    for_router = True  # whether its loss is one of the router's decisions or rows
    steers = False  # whether `after_update` answers to what the loss did; then it rests where the weight is 0
    draws: Mapping[str, Draw] = {}  # what the loop draws for it, per layer

    def loss(self, routing: Routing, layer: Layer = Layer()) -> Tensor:
        """0-dim fp32, with gradients to the router (or to the experts)."""
        raise NotImplementedError

    def start(self, moe: MoE) -> dict[str, Tensor]:
        """The state of one layer before the first update."""
        return {}

    def statistics(self, routing: Routing, layer: Layer) -> dict[str, Tensor]:
        """What `after_step`, or `loss` in a later micro-batch, needs: sums over tokens, detached."""
        return {}

    def after_step(self, layer: Layer, stats: Mapping[str, Tensor], rate: float, progress: float) -> None:
        """Move `layer.moe.bias_E` or `layer.state` from the statistics of an update; rate is schedule.bias_rate."""

    def after_update(
        self, layers: Sequence[Layer], stats: Sequence[Mapping[str, Tensor]], rate: float, progress: float
    ) -> None:
        """The same for all layers together, where one moves by what another did; else layer after layer."""
        for layer, of_layer in zip(layers, stats, strict=True):
            self.after_step(layer, of_layer, rate, progress)

    def held(self, layer: Layer) -> dict[str, Tensor]:
        """What it has moved by itself, for a row: 0-dim each, by the name of a metric (observe/dynamics.py)."""
        return {}

    @classmethod
    def spreads(cls, node: Mapping[str, Any]) -> bool:
        """Whether its loss, with these options, pushes tokens to experts that have few."""
        return False

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        return []


def cv_squared(x_GE: Tensor) -> Tensor:
    """Squared coefficient of variation over experts with the population variance: 0 at balance and where all are 0,
    E - 1 when one holds all.

    From the variance of shares: a gradient through std would be undefined at perfect balance, and the square of a
    small mean is 0 in fp32.
    """
    return x_GE.shape[-1] ** 2 * shares(x_GE).var(-1, unbiased=False)


def mean_over_layers(balancer: Balancer, routings: Sequence[Routing], layers: Sequence[Layer] | None = None) -> Tensor:
    """Each layer's own loss, then their mean: pooling the layers first would hide a collapse in one of them."""
    layers = layers or [Layer()] * len(routings)
    return torch.stack([balancer.loss(r, layer) for r, layer in zip(routings, layers, strict=True)]).mean()
