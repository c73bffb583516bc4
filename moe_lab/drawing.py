"""What an update draws, by position, and what each layer's router is told of it.

Shapes: T tokens, E experts, D width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_lab import seeding
from moe_lab.balance.base import Balancer
from moe_lab.explore.base import Explorer
from moe_lab.model.moe import MoE
from moe_lab.model.transformer import Transformer
from moe_lab.parts import Examples, Parts, send
from moe_lab.routing import Context, Draw, Exploring, Knobs, Router
from moe_lab.schedules import Values


@dataclass(frozen=True)
class Drawn:
    """Random numbers of one MoE layer for a batch: the router's logit noise [T, E], its other draws, the explorers'
    and the balancers'."""

    noise_TE: Tensor | None
    router: dict[str, Tensor]
    explorers: list[dict[str, Tensor]]
    balancers: dict[str, dict[str, Tensor]]

    def chunk(self, parts: int, i: int, router: Router, explorers: Iterable[Explorer]) -> "Drawn":
        """The i-th of equal micro-batches; what is drawn per expert is the same in each."""

        def cut(drawn: dict[str, Tensor], wanted: Mapping[str, Draw]) -> dict[str, Tensor]:
            return {n: t if wanted[n].shape in ("E", "ED") else t.chunk(parts)[i] for n, t in drawn.items()}

        noise_TE = None if self.noise_TE is None else self.noise_TE.chunk(parts)[i]
        tried = [cut(drawn, e.draws) for drawn, e in zip(self.explorers, explorers, strict=True)]
        return Drawn(noise_TE, cut(self.router, router.draws), tried, self.balancers)


def contexts(
    parts: Parts, values: Values, batch: Examples, drawn: list[Drawn], hard: int | None = None, training: bool = False
) -> list[Context]:
    """One Context per MoE layer; without explorers and noise for evaluation."""
    found = contexts_of(parts.model, values, parts.balancers, batch.inputs, hard)
    explorers = parts.explorers.values() if training else ()
    strengths = [(e, _scalar(parts, strength(e, values))) for e in explorers]
    layers = []
    for ctx, d, moe in zip(found, drawn, parts.model.moes, strict=True):
        exploring = tuple(Exploring(e, by, mine) for (e, by), mine in zip(strengths, d.explorers, strict=True))
        told = replace(ctx, noise_TE=d.noise_TE, draws=d.router, exploring=exploring, training=training)
        own = {name: _scalar(parts, curve.at(values.progress)) for name, curve in moe.router.curves.items()}
        layers.append(replace(told, strengths=own))
    return layers


def contexts_of(
    model: Transformer, values: Values, balancers: Mapping[str, Balancer], ids_BS: Tensor, hard: int | None = None
) -> list[Context]:
    """The same without anything drawn."""
    # Filled on the device: copying a number there would wait for it.
    temperature, noise = (torch.full((), v, device=model.embed.device) for v in (values.temperature, values.noise))
    biased = any(balancer.moves_bias for balancer in balancers.values())
    ids_T, S = ids_BS.reshape(-1).to(model.embed.device), ids_BS.shape[1]
    found = []
    for moe in model.moes:
        curve = moe.experts.capacity_factor
        capacity = None if curve is None else torch.full((), curve.at(values.progress), device=model.embed.device)
        knobs = Knobs(temperature, noise, capacity)
        found.append(Context(knobs, bias_E=moe.bias_E if biased else None, hard=hard, seq_len=S, ids_T=ids_T))
    return found


LOGIT_NOISE = {"gaussian": Draw("gaussian", "TE"), "gumbel": Draw("gumbel", "TE")}


def draw(parts: Parts, tokens: int, *key: int | str, training: bool) -> list[Drawn]:
    """What each layer's router, explorers and balancers need for `tokens` tokens, by position; in evaluation only what
    asks so."""

    def take(wanted: Draw, moe: MoE, *name: int | str) -> Tensor:
        sizes = {
            "TE": (tokens, moe.experts.num),
            "TD": (tokens, moe.router.dim),
            "T": (tokens,),
            "E": (moe.experts.num,),
            "ED": (moe.experts.num, moe.router.dim),
        }
        return send(seeding.noise(wanted.kind, sizes[wanted.shape], *key, *name), parts.device)

    found = []
    for layer, moe in enumerate(parts.model.moes):
        router, noise_TE = moe.router, None
        if training and router.noise != "none":
            noise_TE = take(LOGIT_NOISE[router.noise], moe, layer)
        own = {n: take(d, moe, layer, n) for n, d in router.draws.items() if training or d.evaluate}
        # Noise on the logits is that of a router with such noise of its own: runs can be compared draw by draw.
        others = [
            {n: take(d, moe, layer, *((name, n) if n != "logits" else ())) for n, d in e.draws.items()}
            for name, e in parts.explorers.items()
            if training
        ]
        losses = {
            name: {n: take(d, moe, layer, "balance", name, n) for n, d in b.draws.items()}
            for name, b in parts.balancers.items()
            if training
        }
        found.append(Drawn(noise_TE, own, others, losses))
    return found


def strength(explorer: Explorer, values: Values) -> float:
    return explorer.strength.at(values.progress) * values.noise


def _scalar(parts: Parts, value: float) -> Tensor:
    return torch.full((), value, device=parts.device)
