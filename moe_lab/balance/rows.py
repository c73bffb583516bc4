"""The router's own rows, for losses that see no token."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe_lab.config import registered
from moe_lab.model.moe import MoE
from moe_lab.routing import Scored


def router_rows(moe: MoE | None) -> Tensor:
    """The learned row of each expert, [E, D]."""
    assert moe is not None and isinstance(moe.router, Scored)
    return moe.router.weight_ED


def without_rows(name: str, cfg: Mapping[str, Any]) -> list[str]:
    """A line where the router does not score tokens by one learned row per expert."""
    router = cfg["router"]
    if registered("router")[router["name"]].directions_ED is not Scored.directions_ED:
        return [f"balance.{name}: router={router['name']} has no learned row per expert; try router=topk"]
    if router.get("scoring", "linear") != "linear":
        return [
            f"balance.{name}: router.scoring={router['scoring']} puts a layer between tokens and rows; linear does not"
        ]
    return []
