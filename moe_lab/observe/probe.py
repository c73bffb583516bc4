"""What only an evaluation measures: scores against activations, churn on fixed tokens.

Shapes: L layers, T tokens of the probe batch, D width, E experts, K chosen per token, N = T K pairs.
"""

import math
from typing import Any

import torch
from torch import Tensor

from moe_lab.counting import count
from moe_lab.model.moe import MoE
from moe_lab.observe import dynamics, geometry
from moe_lab.observe.recorder import to_host
from moe_lab.observe.window import View

PROBE_TOKENS = 4096  # the first of the validation batches, which are the same at every evaluation


class Probe:
    """`see` the views of an evaluation (the first tokens are the probe batch), then `row` once.

    Its state is the choice that the probe batch got at the evaluation before.
    """

    def __init__(self, moes: list[MoE]):
        self.moes = moes
        self.before_LTK: Tensor | None = None
        self._start()

    def _start(self) -> None:
        self.tokens = 0
        self.choices: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.activations: list[Tensor] = []

    @torch.no_grad()
    def see(self, view: View) -> None:
        """Take the tokens that the probe batch still lacks."""
        T = min(PROBE_TOKENS - self.tokens, len(view.ids_T))
        if T == 0 or not self.moes:
            return
        self.tokens += T
        selected_LTK = torch.stack([r.plan.selected_TK[:T] for r in view.routings])
        logits_LTE = torch.stack([r.logits_TE[:T] for r in view.routings])
        self.choices.append(selected_LTK)
        E = logits_LTE.shape[2]  # stands for no choice: no pair
        scores_LTK = logits_LTE.gather(2, selected_LTK.clamp_max(E - 1))
        self.scores.append(scores_LTK.masked_fill(selected_LTK == E, math.nan).flatten(1))
        layers = zip(self.moes, view.inputs, selected_LTK, strict=True)
        self.activations.append(torch.stack([mean_activation(moe, x_TD[:T], s_TK) for moe, x_TD, s_TK in layers]))

    @torch.no_grad()
    def row(self) -> dict[str, Any]:
        """The "moe/..." values of this evaluation, on the host."""
        if not self.moes:
            return {}
        found = {}
        pairs = list(zip(torch.cat(self.scores, 1), torch.cat(self.activations, 1), strict=True))
        pairs = [(z_N[None, known_N], a_N[None, known_N]) for z_N, a_N in pairs for known_N in [~(z_N + a_N).isnan()]]
        for name, of in {"pearson": geometry.pearson, "spearman": geometry.spearman}.items():
            layers = [of(z_1N, a_1N)[0] for z_1N, a_1N in pairs]
            found[f"score_act_{name}"] = torch.stack(layers)
        choices_LTK, before = torch.cat(self.choices, 1), self.before_LTK
        unknown_L = torch.full((len(self.moes),), math.nan, device=choices_LTK.device)
        found["churn"] = unknown_L if before is None else dynamics.churn(before, choices_LTK, self.moes[0].experts.num)
        self.before_LTK = choices_LTK
        self._start()
        return to_host(found)

    def state(self) -> dict[str, Tensor]:
        return {} if self.before_LTK is None else {"choices": self.before_LTK}

    def load_state(self, state: dict[str, Tensor]) -> None:
        choices = state.get("choices")
        self.before_LTK = None if choices is None else choices.to(self.moes[0].bias_E.device)


def mean_activation(moe: MoE, x_TD: Tensor, selected_TK: Tensor) -> Tensor:
    """Mean over neurons of the input-side activations of each (token, chosen expert), [T * K] in token order; NaN where
    there is no choice, or where it has no neurons."""
    K = selected_TK.shape[1]
    key_N = selected_TK.flatten()
    order_N = key_N.argsort(stable=True)
    mean_N = torch.empty(len(key_N), dtype=torch.float64, device=x_TD.device)
    mean_N[order_N] = moe.experts.mean_activation(x_TD[order_N // K], count(key_N, moe.experts.num + 1)[:-1])
    return mean_N
