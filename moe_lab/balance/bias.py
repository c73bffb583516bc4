"""What balancers that move a layer's selection bias have in common."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe_lab.balance.base import Balancer, Layer
from moe_lab.config import registered


class MovesBias(Balancer):
    """The bias enters the choice and never the weight of an expert; it follows the loads of earlier updates."""

    moves_bias = True

    def held(self, layer: Layer) -> dict[str, Tensor]:
        assert layer.moe is not None
        return {"bias_range": layer.moe.bias_E.max() - layer.moe.bias_E.min()}

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        name, router = node["name"], cfg["router"]["name"]
        kind = registered("router")[router]
        if kind.every_expert or not kind.scored:
            return [f"balance.{name}: router={router} makes no choice by scores that a bias could move"]
        movers = sorted(other for other in cfg["balance"] if registered("balance")[other].moves_bias)
        if len(movers) > 1 and name == movers[0]:
            return [f"balance=[{','.join(movers)}]: both move the same selection bias; take one of them"]
        return []
