"""One update, where it can be read: knobs, forward, loss terms, backward, update, balancers, sums for the next row.

Shapes: B sequences per update, S sequence, T tokens per micro-batch, E experts, L MoE layers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab import seeding
from moe_lab.balance.base import mean_over_layers
from moe_lab.drawing import Drawn, contexts, draw, strength
from moe_lab.model.transformer import Output
from moe_lab.observe.recorder import Recorder, View
from moe_lab.parts import Examples, Parts, examples
from moe_lab.routing import Context, Router
from moe_lab.schedules import Values
from moe_lab.upkeep import Upkeep


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
        return row | self.recorder.row(held=self.upkeep.held())


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
