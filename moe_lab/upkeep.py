"""What moves once per update beside the weights: buffers of routers, selection biases and states of balancers.

Each names additive statistics of a micro-batch; they are summed over the update, and ratios are taken from the sums.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moe_lab.balance.base import Balancer, Layer
from moe_lab.model.moe import MoE
from moe_lab.model.transformer import Output
from moe_lab.schedules import Values

Stats = dict[str, Tensor]


class Upkeep:
    """The state of every balancer per MoE layer, and the statistics of the update so far."""

    def __init__(self, moes: list[MoE], balancers: Mapping[str, Balancer]):
        self.moes, self.balancers = moes, balancers
        self.states: dict[str, list[Stats]] = {name: [b.start(m) for m in moes] for name, b in balancers.items()}
        self.begin()

    def begin(self) -> None:
        """Forget the statistics of the update before."""
        self.of_routers: list[Stats] = [{} for _ in self.moes]
        self.of_balancers: dict[str, list[Stats]] = {name: [{} for _ in self.moes] for name in self.balancers}

    def layers(self, name: str, seq_len: int, draws: Sequence[Mapping[str, Tensor]] | None = None) -> list[Layer]:
        """What the balancer `name` knows of each layer at this point of the update, `draws` of each for its loss."""
        known = zip(self.moes, self.of_balancers[name], self.states[name], draws or [{}] * len(self.moes), strict=True)
        return [Layer(moe, seq_len, earlier, state, drawn) for moe, earlier, state, drawn in known]

    def held(self) -> dict[str, Tensor]:
        """What balancers tell of themselves in a row, [L] by metric."""
        found: dict[str, Tensor] = {}
        for name, balancer in self.balancers.items():
            layers = [balancer.held(Layer(m, state=s)) for m, s in zip(self.moes, self.states[name], strict=True)]
            for metric in layers[0] if layers else ():
                found[metric] = torch.stack([layer[metric] for layer in layers])
        return found

    @torch.no_grad()
    def add(self, out: Output, loss_T: Tensor, counted_T: Tensor, seq_len: int) -> None:
        """Sum up one micro-batch, after its losses."""
        for moe, x_TD, routing, total in zip(self.moes, out.inputs, out.routings, self.of_routers, strict=True):
            if moe.router.wants_losses:
                losses = {"loss_T": loss_T, "counted_T": counted_T}
                routing = replace(routing, extra={**routing.extra, **losses})
            _add(total, moe.router.statistics(x_TD, routing))
        for name, balancer in self.balancers.items():
            layers, totals = self.layers(name, seq_len), self.of_balancers[name]
            for layer, routing, total in zip(layers, out.routings, totals, strict=True):
                _add(total, balancer.statistics(routing, replace(layer, earlier={})))

    @torch.no_grad()
    def close(self, values: Values, seq_len: int) -> None:
        """The end of an update."""
        for moe, stats in zip(self.moes, self.of_routers, strict=True):
            if stats:
                moe.router.after_step(stats, values.progress)
        for name, balancer in self.balancers.items():
            if balancer.steers and balancer.weight and not balancer.weight.at(values.progress) * values.balance:
                continue
            layers, stats = self.layers(name, seq_len), self.of_balancers[name]
            balancer.after_update(layers, stats, values.bias_rate, values.progress)
        self.begin()

    def _entries(self) -> Iterator[tuple[str, Stats, str]]:
        for name, layers in self.states.items():
            for i, state in enumerate(layers):
                yield from ((f"{name}.{i}.{key}", state, key) for key in state)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for a checkpoint."""
        return {name: state[key] for name, state, key in self._entries()}

    def load_state(self, found: Mapping[str, Tensor]) -> None:
        for name, state, key in list(self._entries()):
            state[key] = found[name].to(state[key].device)


def _add(total: Stats, more: Mapping[str, Tensor]) -> None:
    for key, t in more.items():
        total[key] = total[key] + t if key in total else t.detach()
