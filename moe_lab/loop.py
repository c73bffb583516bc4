"""One update, where it can be read: knobs, forward, loss terms, backward, update, balancers, sums for the next row.

Shapes: B sequences per update, S sequence, T tokens per micro-batch, E experts, L MoE layers.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab import seeding
from moe_lab.balance.base import Balancer, mean_over_layers
from moe_lab.datasets.base import Data
from moe_lab.explore.base import Explorer
from moe_lab.model.moe import MoE
from moe_lab.model.transformer import Output, Transformer
from moe_lab.objectives import CLM, MLM
from moe_lab.observe.recorder import Recorder, View
from moe_lab.optim import AdamW
from moe_lab.routing import Context, Draw, Exploring, Knobs, Router
from moe_lab.schedules import Schedules, Values
from moe_lab.settings import Settings
from moe_lab.upkeep import Upkeep


@dataclass
class Parts:
    """What a run is made of, built from its config."""

    settings: Settings
    data: Data
    model: Transformer
    objective: CLM | MLM
    balancers: Mapping[str, Balancer]
    explorers: Mapping[str, Explorer]
    schedules: Schedules
    optim: AdamW
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Examples:
    """A batch as the model takes it: inputs, targets and what counts, each [B, S], and the inputs' domains."""

    inputs: Tensor
    targets: Tensor
    counted: Tensor
    domain: Tensor

    def split(self, parts: int) -> list["Examples"]:
        chunks = [t.chunk(parts) for t in (self.inputs, self.targets, self.counted, self.domain)]
        return [Examples(*fields) for fields in zip(*chunks, strict=True)]


def examples(parts: Parts, ids: Tensor, domain: Tensor, g: torch.Generator) -> Examples:
    """Inputs and targets of token ids [B, S+1], on the run's device."""
    fields = (*parts.objective.targets(ids, parts.data.vocab_size, g), domain)
    return Examples(*(send(t, parts.device) for t in fields))


def send(t: Tensor, device: torch.device) -> Tensor:
    """To the device, and no wait for it: CUDA copies beside its work from whole, page-locked memory alone."""
    ready = t.contiguous().pin_memory() if device.type == "cuda" else t
    return ready.to(device, non_blocking=True)


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


def forward(parts: Parts, batch: Examples, layers: list[Context]) -> tuple[Output, Tensor]:
    """The model's output and the task loss of every token [T], fp32, 0 where the token does not count."""
    out = parts.model(batch.inputs, layers, parts.dtype)
    loss_T = F.cross_entropy(out.logits_BSV.flatten(0, 1).float(), batch.targets.flatten(), reduction="none")
    return out, loss_T * batch.counted.flatten()


class Loop:
    """The training state beyond the model: optimiser, learning rate, and sums since the last row."""

    def __init__(self, parts: Parts, recorder: Recorder):
        self.parts, self.recorder = parts, recorder
        self.optimizer = parts.optim.build(parts.model)
        self.upkeep = Upkeep(parts.model.moes, parts.balancers)
        self.tokens, self.lr = 0, 0.0  # trained on so far; of the last update
        # Whether routers have an objective of their own, then the names of what is added to the task loss.
        self.own = any(type(m.router).objective is not Router.objective for m in parts.model.moes)
        self.terms = [*parts.balancers, *(["router"] if self.own else [])]
        # Losses, gradient norm and updates since the last row, then the first update that was not finite (or 0).
        self.sums = torch.zeros(4 + len(self.terms), device=parts.device, dtype=torch.float64)

    def start_from_data(self) -> None:
        """Let routers that start from data see their layer's input of the first batch, layer after layer."""
        parts, s = self.parts, self.parts.settings
        waiting = [moe.router for moe in parts.model.moes if moe.router.data_dependent_init]
        if not waiting:
            return

        def show(router: nn.Module, given: tuple[Tensor, Context]) -> None:
            assert isinstance(router, Router)
            router.init_from(given[0].float())

        hooks = [router.register_forward_pre_hook(show) for router in waiting]
        raw = parts.data.train_batch(s.seed, 0, s.batch_size, s.seq_len)
        batch = examples(parts, raw.ids, raw.domain, seeding.generator(s.seed, "mask", 0))
        drawn = draw(parts, batch.inputs.numel(), s.seed, "start", training=False)
        with torch.no_grad():
            forward(parts, batch, contexts(parts, parts.schedules.at(0, s.steps), batch, drawn))
        for hook in hooks:
            hook.remove()

    def step(self, step: int) -> None:
        """Update number `step`, counted from 0."""
        parts, s = self.parts, self.parts.settings
        values = parts.schedules.at(step, s.steps)
        raw = parts.data.train_batch(s.seed, step, s.batch_size, s.seq_len)
        batch = examples(parts, raw.ids, raw.domain, seeding.generator(s.seed, "mask", step))
        # Drawn for the whole update, then cut: how it is split into micro-batches does not change the numbers.
        tokens, n = batch.inputs.numel(), parts.optim.accumulate
        drawn = draw(parts, tokens, s.seed, "noise", step, training=True)
        counted = batch.counted.sum()
        for i, part in enumerate(batch.split(n)):
            layers = zip(drawn, parts.model.moes, strict=True)
            part_drawn = [d.chunk(n, i, moe.router, parts.explorers.values()) for d, moe in layers]
            out, loss_T = forward(parts, part, contexts(parts, values, part, part_drawn, training=True))
            task = loss_T.sum() / counted
            terms = [term / n for term in self._terms(out, part, loss_T.detach(), values, drawn, counted)]
            total = task + sum(terms)
            total.backward()
            self.sums[: 2 + len(terms)] += torch.stack([task, total, *terms]).detach()
            self.recorder.see(view(out, part, loss_T.detach(), closes=i == n - 1))
            self.upkeep.add(out, loss_T.detach(), part.counted.flatten(), s.seq_len)
        self._update(step)
        self.upkeep.close(values, s.seq_len)
        self.tokens += tokens

    def _terms(
        self, out: Output, batch: Examples, loss_T: Tensor, values: Values, drawn: list[Drawn], counted: Tensor
    ) -> list[Tensor]:
        """What is added to the task loss, by the names of `terms`, of a micro-batch whose update has `counted` tokens
        that count. A weight of 0 is skipped, not multiplied."""
        zero, found = torch.zeros((), device=self.parts.device), []
        for name, balancer in self.parts.balancers.items():
            weight = balancer.weight.at(values.progress) * values.balance if balancer.weight and out.routings else 0
            layers = self.upkeep.layers(name, batch.inputs.shape[1], [d.balancers[name] for d in drawn])
            found.append(weight * mean_over_layers(balancer, out.routings, layers) if weight else zero)
        if self.own:
            counted_T = batch.counted.flatten()
            moes = zip(self.parts.model.moes, out.routings, strict=True)
            # A mean over the tokens that count weighs as many as there are, as the task's does; others weigh all alike.
            share = counted_T.sum() * self.parts.optim.accumulate / counted
            for moe, routing in moes:
                term = moe.router.objective(routing, loss_T, counted_T)
                if term is not None:
                    zero = zero + (term * share if moe.router.wants_losses else term)
            found.append(zero)
        return found

    def _update(self, step: int) -> None:
        """Clip and apply the gradients; where these or the loss are not finite, skip it on the device and remember."""
        clip = self.parts.optim.clip
        norm = torch.nn.utils.clip_grad_norm_(self.parts.model.parameters(), math.inf if clip is None else clip)
        # The sums of the losses stay bad until the next row, and once bad, nothing more is applied.
        bad = ~torch.isfinite(norm + self.sums[1]) | (self.sums[-1] > 0)
        self.lr = self.parts.optim.rate(step, self.parts.settings.steps)
        self.optimizer.step(self.lr, bad.float())
        self.optimizer.zero_grad()
        self.sums[-2] += norm
        self.sums[-1] = torch.where((self.sums[-1] == 0) & bad, step + 1, self.sums[-1])

    def diverged_at(self) -> int | None:
        """The first update whose loss or gradient was not finite; waits for the device."""
        return int(self.sums[-1].item()) or None

    def row(self, done: int, window: int) -> dict:
        """The metrics of the last `window` updates, after `done`; starts the next window."""
        parts, values = self.parts, self.parts.schedules.at(done - 1, self.parts.settings.steps)
        task, total, *terms, norm, _ = (self.sums / window).tolist()
        self.sums[:-1] = 0
        row = {"step": done, "tokens": self.tokens, "window": window, "loss": task, "ppl": perplexity(task)}
        row |= {"loss_total": total, "grad_norm": norm, "lr": self.lr}
        unweighted = {name for name, b in parts.balancers.items() if b.weight is None}
        row |= {f"term/{n}": term for n, term in zip(self.terms, terms, strict=True) if n not in unweighted}
        row |= {f"knob/{name}": value for name, value in knobs(parts, values).items()}
        return row | self.recorder.row()


def knobs(parts: Parts, values: Values) -> dict[str, float]:
    """What moves by schedule: its own curves, each explorer's strength, and the capacity factor where there is one."""
    found = {name: value for name, value in vars(values).items() if name != "progress"}
    found |= {name: strength(explorer, values) for name, explorer in parts.explorers.items()}
    if parts.model.moes and (curve := parts.model.moes[0].experts.capacity_factor) is not None:
        found["capacity_factor"] = curve.at(values.progress)
    return found


def perplexity(nats: float) -> float:
    return math.exp(min(nats, 700.0))


def view(out: Output, batch: Examples, loss_T: Tensor, closes: bool = True) -> View:
    """What observers see of a forward pass; `closes` with the last micro-batch of an update."""
    S = batch.inputs.shape[1]
    ids_T, domain_T, counted_T = (t.reshape(-1) for t in (batch.inputs, batch.domain, batch.counted))
    return View(out.routings, out.inputs, ids_T, domain_T, S, loss_T, counted_T, closes)
