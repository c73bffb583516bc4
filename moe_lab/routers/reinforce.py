"""REINFORCE: experts are sampled, and the router learns from the task loss that followed."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.config import option
from moe_lab.precise import linear
from moe_lab.routing import Assignments, Choices, Context, Plan, Routing, Scored
from moe_lab.schedules import Schedule, constant
from moe_lab.scores import log_softmax
from moe_lab.seeding import parameter

SILENT = 1e-6  # noise below this scale samples nothing: the choice is the argmax, which has no policy gradient


@option("router", "reinforce")
class Reinforce(Scored):
    """k experts sampled from softmax(logits) without replacement, each with weight 1/k; the best k in evaluation.

    Its objective, a mean over the tokens that count: (loss_t - baseline_t) log pi(a_t) - entropy * H(softmax(z_t)), z_t
    the logits, a_t the ordered sample, no gradient through the loss. Sources: Clark et al. (arXiv 2202.01169: learned
    baseline and entropy bonus), Bengio et al. (arXiv 1511.06297).

    Ours: the loss of a token is its own cross-entropy, not what its choice does to later tokens through attention;
    the running mean weighs updates by rate (0 before the first); the critic is linear, reads the router's input
    without a gradient to it, and is the deviation from the running mean, so that it need not learn the loss's size.
    schedule.noise scales the Gumbel noise to s, which samples softmax(logits / s); a selection bias shifts the policy.
    Explorers that perturb the input or forbid experts are part of the policy; one that overrules the ranking is not,
    and biases the gradient.
    """

    noise = "gumbel"
    wants_losses = True
    running_2: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: Choices = 1,
        baseline: Literal["none", "mean", "critic"] = "critic",
        rate: Schedule = constant(0.05),
        entropy: Schedule = constant(0.01),
        **common: Any,
    ):
        super().__init__(dim, num_experts, k=k, **common)
        self.baseline, self.rate, self.curves = baseline, rate, {"entropy": entropy}
        self.register_buffer("running_2", torch.zeros(2))  # the loss of an update's tokens and their number
        self.critic_1D = parameter(1, dim, std=0.0) if baseline == "critic" else None

    def merit(self, noisy_TE: Tensor) -> Tensor:
        return noisy_TE  # so that a bias shifts the logits of what is sampled

    def choose(self, rank_TE: Tensor, gates_TE: Tensor, ctx: Context) -> Plan:
        top = self.top_k(rank_TE, gates_TE.detach())
        return Assignments(top.expert_TK, torch.full_like(top.weight_TK, 1 / self.k), self.num_experts)

    def extras(self, x_TD: Tensor, seen_TX: Tensor, noisy_TE: Tensor, plan: Plan, ctx: Context) -> dict[str, Tensor]:
        if ctx.noise_TE is None:
            return {}
        assert isinstance(plan, Assignments)
        scale = ctx.knobs.noise
        policy_TE = noisy_TE - scale * ctx.noise_TE  # with -inf where an explorer forbids, which is never sampled
        if ctx.bias_E is not None:
            policy_TE = policy_TE + ctx.bias_E
        log_prob_T = ordered_log_prob(policy_TE / scale.clamp_min(SILENT), plan.expert_TK) * (scale > SILENT)
        bonus = ctx.strengths.get("entropy", scale.new_zeros(()))
        return {"log_prob_T": log_prob_T, "baseline_T": self._baseline(x_TD), "bonus": bonus}

    def _baseline(self, x_TD: Tensor) -> Tensor:
        """What the loss of each token is expected to be."""
        if self.baseline == "none":
            return self.running_2.new_zeros(x_TD.shape[0])
        mean = self.running_2[0] / self.running_2[1].clamp_min(1e-20)
        if self.critic_1D is None:
            return mean.expand(x_TD.shape[0])
        return mean + linear(x_TD.detach(), self.critic_1D).squeeze(1)

    def objective(self, routing: Routing, loss_T: Tensor, counted_T: Tensor) -> Tensor:
        surprise_T = loss_T - routing.extra["baseline_T"]
        log_p_TE = log_softmax(routing.logits_TE)
        entropy_T = -(log_p_TE.exp() * log_p_TE).sum(-1)
        total_T = surprise_T.detach() * routing.extra["log_prob_T"] - routing.extra["bonus"] * entropy_T
        if self.critic_1D is not None:
            total_T = total_T + surprise_T.square()
        return (total_T * counted_T).sum() / counted_T.sum().clamp_min(1)

    def statistics(self, x_TD: Tensor, routing: Routing) -> dict[str, Tensor]:
        loss_T, counted_T = routing.extra["loss_T"], routing.extra["counted_T"]
        return {"loss_2": torch.stack([(loss_T * counted_T).sum(), counted_T.sum()])}

    def after_step(self, stats: Mapping[str, Tensor], progress: float) -> None:
        self.running_2.lerp_(stats["loss_2"].to(self.running_2.dtype), self.rate.at(progress))


def ordered_log_prob(logits_TE: Tensor, expert_TK: Tensor) -> Tensor:
    """log of the probability of drawing these experts in this order, without replacement, fp32 [T]."""
    drawn_TKE = F.one_hot(expert_TK, logits_TE.shape[1])
    gone_TKE = drawn_TKE.cumsum(1) > drawn_TKE
    left_TKE = logits_TE[:, None].masked_fill(gone_TKE, -torch.inf)
    return log_softmax(left_TKE).gather(2, expert_TK[:, :, None]).sum((1, 2))
