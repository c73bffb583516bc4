"""Validation: the loss as trained and with hard top-1 and top-k, all load metrics, liveness and churn.

Shapes: T tokens, E experts, K chosen per token, L MoE layers.
"""

import math

import torch
from torch import Tensor

from moe_lab import seeding
from moe_lab.drawing import contexts, draw
from moe_lab.loop import forward, perplexity, view
from moe_lab.observe.metric import METRICS, over_layers
from moe_lab.observe.probe import Probe
from moe_lab.observe.recorder import Recorder
from moe_lab.parts import Examples, Parts, examples
from moe_lab.probes.liveness import gradient_ratio
from moe_lab.schedules import Values


class Evaluator:
    """Evaluates the model of `parts`; its only state is that of the probe: the choice its tokens got last time."""

    def __init__(self, parts: Parts):
        self.parts = parts
        s = parts.settings
        self.micro = s.batch_size // parts.optim.accumulate
        self.probe = Probe(parts.model.moes)
        lines = parts.data.ngram()
        if not parts.objective.causal:  # who sees both sides has no use for the token before
            lines.pop("bigram", None)
        self.lines = {f"eval/{name}": nats for name, nats in lines.items()}

    def __call__(self, values: Values) -> dict:
        """eval/... and the moe/... values that only an evaluation gives, with the schedules' values of that step."""
        parts, s = self.parts, self.parts.settings
        recorder = self._recorder()
        total, counted, modes = torch.zeros(3, dtype=torch.float64), 0, self._modes()
        for i, raw in enumerate(parts.data.valid_batches(self.micro, s.seq_len, self._tokens())):
            batch = examples(parts, raw.ids, raw.domain, seeding.generator(s.seed, "eval mask", i))
            drawn = draw(parts, batch.inputs.numel(), s.seed, "eval noise", i, training=False)
            with torch.no_grad():
                for m, hard in enumerate(modes):
                    out, loss_T = forward(parts, batch, contexts(parts, values, batch, drawn, hard))
                    total[m] += loss_T.double().sum().cpu()
                    if hard is None:
                        seen = view(out, batch, loss_T)
                        recorder.see(seen)
                        self.probe.see(seen)
            counted += int(batch.counted.sum())
        row = self.alive(values)
        if not counted:
            return row
        losses = dict(zip(modes, (total / counted).tolist(), strict=False))
        loss, k = losses[None], self.k
        row |= {"eval/loss": loss, "eval/ppl": perplexity(loss), "eval/tokens": counted}
        if parts.model.moes:
            hard = {"top1": losses.get(1, loss), "topk": losses.get(k, loss)}
            row |= {f"eval/loss_{how}": nats for how, nats in hard.items()}
            row |= {f"eval/ppl_{how}": perplexity(nats) for how, nats in hard.items()}
        moe = recorder.row(evaluation=True) | self.probe.row()
        return row | self.lines | {f"eval/{key}": value for key, value in moe.items()}

    def state(self) -> dict[str, Tensor]:
        return self.probe.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.probe.load_state(state)

    @property
    def k(self) -> int:
        return max((m.router.k for m in self.parts.model.moes), default=1)

    def _tokens(self) -> int:
        """Tokens to read so that eval_tokens carry a loss; which do is random, hence five standard deviations more."""
        wanted, counted = self.parts.settings.eval_tokens, self.parts.objective.counted
        return wanted if counted == 1 else math.ceil((wanted + 5 * math.sqrt(wanted)) / counted)

    def _modes(self) -> list[int | None]:
        """As trained, then the hard choices that differ from it."""
        moes = self.parts.model.moes
        if not moes:
            return [None]
        soft = any(m.router.every_expert or m.router.ragged for m in moes)
        return [None, *([1] if self.k > 1 or soft else []), *([self.k] if self.k > 1 and soft else [])]

    def _recorder(self) -> Recorder:
        p = self.parts
        vocabulary = p.data.vocab_size + p.objective.extra_tokens
        return Recorder(p.model.moes, vocabulary, len(p.data.domains), p.settings.seq_len, p.device)

    def alive(self, values: Values) -> dict:
        """moe/router_grad_ratio: the task's gradient on one fixed batch, with the router's training noise."""
        parts, s = self.parts, self.parts.settings
        if not parts.model.moes:
            return {}
        batch = self._probe()
        drawn = draw(parts, batch.inputs.numel(), s.seed, "probe noise", training=True)
        out, loss_T = forward(parts, batch, contexts(parts, values, batch, drawn, training=True))
        task = loss_T.sum() / batch.counted.sum()
        for moe, routing in zip(parts.model.moes, out.routings, strict=True):
            if moe.router.wants_losses:  # others' objectives are none of the task's, as little as balance losses
                own = moe.router.objective(routing, loss_T.detach(), batch.counted.flatten())
                task = task if own is None else task + own
        ratio = gradient_ratio(parts.model.moes, task)
        overall = over_layers(METRICS["router_grad_ratio"], ratio)
        return {"moe/router_grad_ratio": ratio} | {f"moe/router_grad_ratio/{how}": v for how, v in overall.items()}

    def _probe(self) -> Examples:
        """The first validation batch, or the first training batch where there is no validation."""
        parts, s = self.parts, self.parts.settings
        raw = next(parts.data.valid_batches(self.micro, s.seq_len, self.micro * s.seq_len), None)
        raw = raw or parts.data.train_batch(s.seed, 0, self.micro, s.seq_len)
        return examples(parts, raw.ids, raw.domain, seeding.generator(s.seed, "probe mask"))
