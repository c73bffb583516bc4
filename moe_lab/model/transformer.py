"""A small pre-norm transformer language model with MoE layers: RMSNorm, rotary positions, SDPA, tied embeddings.

Shapes: B batch, S sequence, T = B*S tokens (batch-major), D width, H heads, V vocabulary, L MoE layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from moe_lab.config import build, option, registered, schema
from moe_lab.model.experts import FeedForward
from moe_lab.model.moe import MoE
from moe_lab.routing import Context, Routing
from moe_lab.seeding import parameter
from moe_lab.sizes import CHOICES, routed, usual_width

PosInt = Annotated[int, Field(ge=1)]
MOST_WEIGHTS = 10**11


@dataclass(frozen=True)
class Output:
    """logits [B, S, V]; of each MoE layer its Routing and its input [T, D] (detached, for observers)."""

    logits_BSV: Tensor
    routings: tuple[Routing, ...]
    inputs: tuple[Tensor, ...]


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gain_D = parameter(dim, std=math.inf)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.gain_D.to(x.dtype), eps=1e-6)


class Linear(nn.Module):
    """x [..., in] -> [..., out], without a bias."""

    def __init__(self, n_in: int, n_out: int, std: float):
        super().__init__()
        self.weight = parameter(n_out, n_in, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x_BHSC: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) on the two halves of each head's C channels."""
    S, C = x_BHSC.shape[-2:]
    frequency = 10_000.0 ** (-torch.arange(0, C, 2, device=x_BHSC.device, dtype=torch.float32) / C)
    angle_SC = torch.arange(S, device=x_BHSC.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle_SC.cos().to(x_BHSC.dtype), angle_SC.sin().to(x_BHSC.dtype)
    a, b = x_BHSC.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, depth: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = Linear(dim, 3 * dim, std=dim**-0.5)
        self.out = Linear(dim, dim, std=(2 * depth * dim) ** -0.5)

    def forward(self, x_BSD: Tensor) -> Tensor:
        B, S, D = x_BSD.shape
        q, k, v = self.qkv(x_BSD).view(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y_BHSC = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=self.causal)
        return self.out(y_BHSC.transpose(1, 2).reshape(B, S, D))


class Block(nn.Module):
    """Attention, then a MoE layer or a dense feed-forward network, each behind a norm and on the residual stream."""

    def __init__(self, attention: Attention, feed: MoE | FeedForward, dim: int):
        super().__init__()
        self.norm_attention, self.norm_feed = RMSNorm(dim), RMSNorm(dim)
        self.attention, self.feed = attention, feed


@option("model", "transformer")
class Transformer(nn.Module):
    """`forward(ids_BS, contexts)` with one Context per MoE layer -> Output.

    moe=false puts a dense network of the same active size in the place of every MoE layer.
    """

    def __init__(
        self,
        vocab_size: int,
        causal: bool,
        router: Mapping[str, Any],
        experts: Mapping[str, Any],
        *,
        dim: PosInt = 128,
        layers: Annotated[int, Field(ge=1, le=1000)] = 4,
        heads: PosInt = 4,
        moe: bool = True,
        moe_every: PosInt = 1,
    ):
        super().__init__()
        self.embed = parameter(vocab_size, dim, std=0.02)
        blocks = []
        for i in range(layers):
            sparse = (i + 1) % moe_every == 0
            attention = Attention(dim, heads, layers, causal)
            blocks.append(Block(attention, _feed(dim, layers, router, experts, sparse, moe), dim))
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(dim)

    @property
    def moes(self) -> list[MoE]:
        """The MoE layers from input to output."""
        return [m for m in self.modules() if isinstance(m, MoE)]

    def forward(self, ids_BS: Tensor, contexts: list[Context], dtype: torch.dtype = torch.float32) -> Output:
        B, S = ids_BS.shape
        x_BSD = F.embedding(ids_BS, self.embed).to(dtype)
        routings, inputs = [], []
        for block in self.blocks:
            assert isinstance(block, Block)
            x_BSD = x_BSD + block.attention(block.norm_attention(x_BSD))
            h_TD = block.norm_feed(x_BSD).view(B * S, -1)
            if isinstance(block.feed, MoE):
                y_TD, routing = block.feed(h_TD, contexts[len(routings)])
                routings.append(routing)
                inputs.append(h_TD.detach())
            else:
                y_TD = block.feed(h_TD)
            x_BSD = x_BSD + y_TD.view(B, S, -1)
        logits_BSV = F.linear(self.norm(x_BSD), self.embed.to(dtype))
        return Output(logits_BSV, tuple(routings), tuple(inputs))

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        found = []
        if (many := _weights(cfg)) > MOST_WEIGHTS:
            found.append(f"model and experts: {many:.1e} weights fit no machine; make model.dim or experts.num smaller")
        if node["dim"] % (2 * node["heads"]):
            found.append(
                f"model.dim={node['dim']}: must be a multiple of 2 * model.heads = {2 * node['heads']} (rotary)"
            )
        if node["moe"] and node["moe_every"] > node["layers"]:
            found.append(
                f"model.moe_every={node['moe_every']}: no MoE layer in model.layers={node['layers']}; "
                "for a dense baseline say model.moe=false"
            )
        return found


def _weights(cfg: Mapping[str, Any]) -> int:
    """About how many a model has, embeddings apart."""
    model, experts = cfg["model"], cfg["experts"]
    dim, kind = model["dim"], registered("experts")[experts["name"]]
    width = max(experts["widths"] or [experts["width"] or usual_width(dim, kind.sides)])
    sparse, (E, _) = model["layers"] // model["moe_every"], routed(cfg)
    networks = model["layers"] + sparse * (experts["num"] + experts["shared_experts"])
    return 4 * model["layers"] * dim**2 + sparse * E * dim + networks * (kind.sides + 1) * dim * width


def _feed(
    dim: int, depth: int, router: Mapping[str, Any], experts: Mapping[str, Any], sparse: bool, moe: bool
) -> MoE | FeedForward:
    """A MoE layer, or a dense network: as wide as one expert, or as what one token uses where it stands for the MoE."""
    bank = build("experts", experts, dim, depth)
    if not sparse:  # between the MoE layers; the same whatever the router
        return FeedForward(dim, bank.whole, type(bank), depth)
    gate = build("router", finer(router, bank.granularity), dim, bank.num)
    if moe:
        return MoE(gate, bank, depth)
    mean_width = sum(bank.widths) / bank.num  # of what is chosen at even load
    width = round(gate.active * mean_width) + bank.shared_experts * bank.whole
    return FeedForward(dim, width, type(bank), depth)


def finer(router: Mapping[str, Any], granularity: int) -> Mapping[str, Any]:
    """The router's node with `granularity` times the choices."""
    k = router.get("k", schema(registered("router")[router["name"]]).model_fields["k"].default)
    return {**router, **{name: granularity * n for name in CHOICES if (n := {"k": k, **router}.get(name)) is not None}}
