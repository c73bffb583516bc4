"""One update, where it can be read: knobs, forward, loss terms, backward, update, balancers, sums for the next row.

Shapes: B sequences per update, S sequence, T tokens per micro-batch, E experts, L MoE layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab import seeding
from moe_lab.balance.base import Balancer, mean_over_layers
from moe_lab.datasets.base import Data
from moe_lab.model.transformer import Output, Transformer
from moe_lab.objectives import CLM, MLM
from moe_lab.observe.recorder import Recorder, View
from moe_lab.optim import AdamW
from moe_lab.routing import Context, Knobs
from moe_lab.schedules import Schedules, Values
from moe_lab.settings import Settings


@dataclass
class Parts:
    """What a run is made of, built from its config."""

    settings: Settings
    data: Data
    model: Transformer
    objective: CLM | MLM
    balancers: Mapping[str, Balancer]
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


def contexts(
    parts: Parts, values: Values, noise_TE: list[Tensor | None] | None = None, hard: int | None = None
) -> list[Context]:
    """One Context per MoE layer; without noise for evaluation."""
    return contexts_of(parts.model, values, parts.balancers, noise_TE, hard)


def contexts_of(
    model: Transformer,
    values: Values,
    balancers: Mapping[str, Balancer],
    noise_TE: list[Tensor | None] | None = None,
    hard: int | None = None,
) -> list[Context]:
    # Filled on the device: copying a number there would wait for it.
    knobs = Knobs(*(torch.full((), v, device=model.embed.device) for v in (values.temperature, values.noise)))
    biased = any(balancer.moves_bias for balancer in balancers.values())
    return [
        Context(knobs, noise_TE[i] if noise_TE else None, moe.bias_E if biased else None, hard)
        for i, moe in enumerate(model.moes)
    ]


def draw_noise(parts: Parts, tokens: int, *key: int | str) -> list[Tensor | None]:
    """Each layer's standard noise for `tokens` tokens [T, E] by position; None where the router has none."""
    return [
        send(seeding.noise(m.router.noise, (tokens, m.experts.num), *key, layer), parts.device)
        if m.router.noise != "none"
        else None
        for layer, m in enumerate(parts.model.moes)
    ]


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
        self.tokens, self.lr = 0, 0.0  # trained on so far; of the last update
        # Losses, gradient norm and updates since the last row, then the first update that was not finite (or 0).
        self.sums = torch.zeros(4 + len(parts.balancers), device=parts.device, dtype=torch.float64)

    def step(self, step: int) -> None:
        """Update number `step`, counted from 0."""
        parts, s = self.parts, self.parts.settings
        values = parts.schedules.at(step, s.steps)
        raw = parts.data.train_batch(s.seed, step, s.batch_size, s.seq_len)
        batch = examples(parts, raw.ids, raw.domain, seeding.generator(s.seed, "mask", step))
        # Drawn for the whole update, then cut: how it is split into micro-batches does not change the numbers.
        noise = draw_noise(parts, batch.inputs.numel(), s.seed, "noise", step)
        n = parts.optim.accumulate
        noise_by_part = [[None if t is None else t.chunk(n)[i] for t in noise] for i in range(n)]
        counted = batch.counted.sum()
        selected_LE = [torch.zeros_like(m.bias_E, dtype=torch.int64) for m in parts.model.moes]
        for i, (part, part_noise) in enumerate(zip(batch.split(n), noise_by_part, strict=True), 1):
            out, loss_T = forward(parts, part, contexts(parts, values, part_noise))
            task = loss_T.sum() / counted
            terms = self._terms(out, values.balance / n)
            total = task + sum(terms)
            total.backward()
            self.sums[: 2 + len(terms)] += torch.stack([task, total, *terms]).detach()
            self.recorder.see(view(out, part, loss_T.detach(), closes=i == n))
            for total_E, routing in zip(selected_LE, out.routings, strict=True):
                total_E += routing.plan.selected_E
        self._update(step)
        for balancer in parts.balancers.values():
            if balancer.moves_bias:
                for moe, selected_E in zip(parts.model.moes, selected_LE, strict=True):
                    balancer.after_step(moe.bias_E, selected_E, values.bias_rate)
        self.tokens += batch.inputs.numel()

    def _terms(self, out: Output, scale: float) -> list[Tensor]:
        """Weighted balance terms in the order of the balancers; a term of weight 0 is skipped, not multiplied."""
        zero = torch.zeros((), device=self.parts.device)
        return [
            mean_over_layers(b, out.routings) * (b.weight * scale) if b.weight and scale and out.routings else zero
            for b in self.parts.balancers.values()
        ]

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
        weighted = [(name, b) for name, b in parts.balancers.items()]
        row |= {f"term/{name}": term for (name, b), term in zip(weighted, terms, strict=True) if b.weight is not None}
        row |= {f"knob/{name}": value for name, value in vars(values).items()}
        return row | self.recorder.row()


def perplexity(nats: float) -> float:
    return math.exp(min(nats, 700.0))


def view(out: Output, batch: Examples, loss_T: Tensor, closes: bool = True) -> View:
    """What observers see of a forward pass; `closes` with the last micro-batch of an update."""
    S = batch.inputs.shape[1]
    ids_T, domain_T, counted_T = (t.reshape(-1) for t in (batch.inputs, batch.domain, batch.counted))
    return View(out.routings, out.inputs, ids_T, domain_T, S, loss_T, counted_T, closes)
