"""What others call the balance loss: their formulas, so that a published coefficient can be read.

Shapes: L MoE layers, T tokens, B sequences of S tokens (T = B * S, batch-major), E experts, K chosen per token.

Each function takes the router's logits and gives what its framework adds to the training loss with a coefficient of 1,
sums and means over layers as there. Formulas alone, written anew. "Run" says against which release the tests hold one;
"read" that nothing could be installed, and that the tests hold it against the formula in plain loops; "noted" the same
of a formula that we know from notes about its source. All readings are of November 2026.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FACTORS: dict[str, Callable[[int, int, int], float]] = {  # of E, k, L, by what the tables call them
    "1": lambda E, k, L: 1,
    "k": lambda E, k, L: k,
    "L": lambda E, k, L: L,
    "L/E^2": lambda E, k, L: L / E**2,
    "L E/(E-1)": lambda E, k, L: L * E / (E - 1) if E > 1 else L,
}

START_STD = math.log(2)  # softplus(0): the deviation of Shazeer's noise before anything is learned


@dataclass(frozen=True)
class Convention:
    """`value(logits_LTE, k, sequences)`. A coefficient c there is `balance.<like>.weight` = factor * c here.

    noisy: whether value takes a fourth argument, standard normal draws [L, T, E] of the noise on the logits.
    like and factor are empty where no loss of ours has the same gradient up to a factor. sequence: whether it balances
    each sequence by itself (ours has it as balance.<like>.scope=sequence).
    """

    name: str
    value: Callable[..., Tensor]
    like: str = ""
    factor: str = ""
    sequence: bool = False
    checked: str = "read"
    noisy: bool = False

    def weight(self, E: int, k: int, L: int) -> float | None:
        """What to multiply a coefficient with."""
        return FACTORS[self.factor](E, k, L) if self.factor else None


def hf_mixtral(logits_LTE: Tensor, k: int, sequences: int = 1) -> Tensor:
    """E sum_i f_i P_i, f the assignments per token (they sum to k), P the mean probability, both over the tokens of
    all layers together (transformers: Mixtral, OLMoE, Qwen, 31 of 33 model files; NLLB too, once for its encoder and
    once for its decoder). Run: transformers 5.23.0.

    k at balance, E at collapse. Layers that collapse onto different experts can read as balanced.
    """
    p_NE = logits_LTE.flatten(0, 1).softmax(-1)
    return _dot(_chosen(p_NE, k), p_NE)


def hf_switch(logits_LTE: Tensor, k: int, sequences: int = 1) -> Tensor:
    """E sum_i f_i P_i of first choices, for each sequence over its tokens of all layers, then the mean over sequences
    (transformers: Switch; encoder and decoder are added). Run: transformers 5.23.0.

    1 at balance, E at collapse.
    """
    p_BNE = _by_sequence(logits_LTE, sequences).softmax(-1).transpose(0, 1).flatten(1, 2)
    return _dot(_chosen(p_BNE, 1), p_BNE).mean()


def olmo_core(logits_LTE: Tensor, k: int, sequences: int = 1) -> Tensor:
    """E / k sum_i f_i P_i of each layer, the mean over layers (OLMo-core, granularity local_batch; its default
    scale_loss_by_num_layers=true divides by the layers, false sums them). Read: allenai/OLMo-core, nn/moe.

    1 at balance, E / k at collapse onto k experts.
    """
    p_LTE = logits_LTE.softmax(-1)
    return _dot(_chosen(p_LTE, k), p_LTE).mean() / k


def megatron(logits_LTE: Tensor, k: int, sequences: int = 1) -> Tensor:
    """E / k sum_i f_i P_i of each layer's micro-batch; every layer adds its own, the log shows their mean
    (Megatron-Core aux_loss; scores are softmax, or sigmoids over their sum). Read: NVIDIA/Megatron-LM, moe_utils.py.

    L at balance, L E / k at collapse onto k experts.
    """
    p_LTE = logits_LTE.softmax(-1)
    return _dot(_chosen(p_LTE, k), p_LTE).sum() / k


def libmoe(logits_LTE: Tensor, k: int, sequences: int = 1) -> Tensor:
    """E / k sum_i f_i P_i of each sequence, the mean over sequences (LibMoE v2, perplexity_reg_mode=standard). Read:
    Fsoft-AIC/LibMoE, moe_layer.py; that layers are summed is what the code it grew from does, and was not read there.

    L at balance, L E / k at collapse onto k experts.
    """
    p_LBSE = _by_sequence(logits_LTE, sequences).softmax(-1)
    return _dot(_chosen(p_LBSE, k), p_LBSE).mean(1).sum() / k


def libmoe_entropy(logits_LTE: Tensor, k: int, sequences: int = 1) -> Tensor:
    """sum_i P_i ln P_i, minus the entropy of each sequence's mean probability, the mean over sequences (LibMoE v2,
    perplexity_reg_mode=time). Read, like libmoe.

    -L ln E at balance, 0 at collapse onto one expert.
    """
    log_p = _by_sequence(logits_LTE, sequences).log_softmax(-1)
    log_mean = log_p.logsumexp(-2) - math.log(log_p.shape[-2])
    return (log_mean.exp() * log_mean).sum(-1).mean(1).sum()


def first_choice(logits_LTE: Tensor, k: int, sequences: int = 1) -> Tensor:
    """E^2 times the mean over experts of f_i P_i, f of first choices only, of each sequence, the mean over sequences;
    every layer adds its own (st-moe-pytorch and mixture-of-experts, after Mesh TensorFlow; Switch, arXiv 2101.03961,
    where k = 1). Run: st-moe-pytorch 0.1.8.

    L at balance, L E at collapse of the first choices, whatever k.
    """
    p_LBSE = _by_sequence(logits_LTE, sequences).softmax(-1)
    return _dot(_chosen(p_LBSE, 1), p_LBSE).mean(1).sum()


def gshard_paper(logits_LTE: Tensor, k: int, sequences: int = 1) -> Tensor:
    """1 / E sum_e (c_e / S) m_e, c_e first choices in a group of S tokens, m_e the mean gate (arXiv 2006.16668,
    algorithm 1; public code multiplies by E^2). Noted; a group is taken to be a sequence.

    L / E^2 at balance, L / E at collapse.
    """
    return first_choice(logits_LTE, k, sequences) / logits_LTE.shape[-1] ** 2


def nano_moe(logits_LTE: Tensor, k: int, sequences: int = 1) -> Tensor:
    """E sum_i f_i P_i, P the mean of the softmax over the k chosen alone; every layer adds its own (nanoMoE). Noted.

    L k at balance, L E at collapse. An expert that nobody chose gets no gradient at all.
    """
    top = logits_LTE.topk(k, -1)
    p_LTE = torch.zeros_like(logits_LTE).scatter(-1, top.indices, top.values.softmax(-1))
    return _dot(_chosen(logits_LTE, k), p_LTE).sum()


def deepseek_v3(logits_LTE: Tensor, k: int, sequences: int = 1) -> Tensor:
    """sum_i f_i P_i of each sequence, f_i = E / (k S) times its tokens, P the mean of sigmoids over their row sum
    (arXiv 2412.19437, the complementary loss). Read; the choice runs against DeepseekV3TopkRouter of transformers,
    which has no balance loss. The paper does not say how layers add up: a sum here.

    L at balance, L E / k at collapse onto k experts.
    """
    p_LBSE = F.logsigmoid(_by_sequence(logits_LTE, sequences)).softmax(-1)
    return _dot(_chosen(p_LBSE, k), p_LBSE).mean(1).sum() / k


def shazeer_importance(logits_LTE: Tensor, k: int, sequences: int = 1) -> Tensor:
    """CV^2 of the sum of gate weights, the softmax over the k chosen, with the population variance; every layer adds
    its own (arXiv 1701.06538, which does not name the variance). Read: tensor2tensor, utils/expert_utils.py.

    0 at balance, L (E - 1) at collapse onto one expert. With k = 1 the gate is 1, and there is no gradient.
    """
    top = logits_LTE.topk(k, -1)
    importance_LE = torch.zeros_like(logits_LTE).scatter(-1, top.indices, top.values.softmax(-1)).sum(-2)
    return (importance_LE.var(-1, unbiased=False) / importance_LE.mean(-1).square()).sum()


def importance_of_samples(logits_LTE: Tensor, k: int, sequences: int = 1) -> Tensor:
    """The same with the sample variance, as in the most copied PyTorch port (read: davidmrau/mixture-of-experts).

    0 at balance, L E at collapse onto one expert.
    """
    E = logits_LTE.shape[-1]
    return shazeer_importance(logits_LTE, k, sequences) * E / max(1, E - 1)


def shazeer_load(logits_LTE: Tensor, k: int, sequences: int = 1, noise_LTE: Tensor | None = None) -> Tensor:
    """CV^2 of the expected number of tokens: of each expert, the chance that fresh noise on it alone would have it
    chosen; population variance, every layer adds its own (arXiv 1701.06538, appendix A; read: tensor2tensor,
    utils/expert_utils.py, which adds 0.01 to the learned deviation). Here the deviation is START_STD.

    0 at balance, L (E / k - 1) at collapse onto k experts. Not for k = E.
    """
    noise_LTE = torch.zeros_like(logits_LTE) if noise_LTE is None else noise_LTE
    noisy_LTE = logits_LTE + START_STD * noise_LTE
    top = noisy_LTE.topk(k + 1, -1).values
    last, next_one = top[..., k - 1 : k], top[..., k:]
    others_LTE = torch.where(noisy_LTE > next_one, next_one, last)
    load_LE = torch.special.ndtr((logits_LTE - others_LTE) / START_STD).sum(-2)
    return (load_LE.var(-1, unbiased=False) / load_LE.mean(-1).square()).sum()


def load_of_samples(logits_LTE: Tensor, k: int, sequences: int = 1, noise_LTE: Tensor | None = None) -> Tensor:
    """The same with the sample variance, as in the same port (read).

    0 at balance, L (E / k - 1) E / (E - 1) at collapse onto k experts.
    """
    E = logits_LTE.shape[-1]
    return shazeer_load(logits_LTE, k, sequences, noise_LTE) * E / max(1, E - 1)


def z_mean(logits_LTE: Tensor, k: int, sequences: int = 1) -> Tensor:
    """Mean of logsumexp^2 over the tokens of all layers (transformers: Switch; OLMo-core with its default division by
    the layers). Run: transformers 5.23.0; OLMo-core read."""
    return logits_LTE.logsumexp(-1).square().mean()


def z_sum(logits_LTE: Tensor, k: int, sequences: int = 1) -> Tensor:
    """Mean of logsumexp^2 over the tokens of a layer; every layer adds its own (st-moe-pytorch; Megatron-Core
    moe_z_loss_coeff). Run: st-moe-pytorch 0.1.8; Megatron-Core read."""
    return logits_LTE.logsumexp(-1).square().mean(-1).sum()


def _chosen(scores: Tensor, k: int) -> Tensor:
    """Assignments per token of each expert, over the last but one dimension: no gradient, sums to k."""
    return torch.zeros_like(scores).scatter(-1, scores.topk(k, -1).indices, 1).mean(-2)


def _dot(f_E: Tensor, p_TE: Tensor) -> Tensor:
    """E sum_i f_i P_i, P the mean of p over tokens."""
    return p_TE.shape[-1] * (f_E * p_TE.mean(-2)).sum(-1)


def _by_sequence(logits_LTE: Tensor, sequences: int) -> Tensor:
    return logits_LTE.unflatten(1, (sequences, -1))


TRANSFORMERS, ST_MOE = "run: transformers 5.23.0", "run: st-moe-pytorch 0.1.8"
CONVENTIONS = (
    Convention("Hugging Face Mixtral", hf_mixtral, "switch", "k", checked=TRANSFORMERS),
    Convention("Hugging Face Switch", hf_switch, "gshard", "1", sequence=True, checked=TRANSFORMERS),
    Convention("OLMo-core", olmo_core, "switch", "1"),
    Convention("Megatron-Core aux_loss", megatron, "switch", "L"),
    Convention("LibMoE standard", libmoe, "switch", "L", sequence=True),
    Convention("LibMoE entropy (time)", libmoe_entropy, "entropy", "L", sequence=True),
    Convention("st-moe, Switch paper", first_choice, "gshard", "L", sequence=True, checked=ST_MOE),
    Convention("GShard paper", gshard_paper, "gshard", "L/E^2", sequence=True, checked="noted"),
    Convention("nanoMoE", nano_moe, checked="noted"),
    Convention("DeepSeek-V3", deepseek_v3, "seq_aux", "L", sequence=True),
    Convention("Shazeer importance", shazeer_importance, "importance", "L"),
    Convention("its port's importance", importance_of_samples, "importance", "L E/(E-1)"),
    Convention("Shazeer load", shazeer_load, "load", "L", noisy=True),
    Convention("its port's load", load_of_samples, "load", "L E/(E-1)", noisy=True),
    Convention("Hugging Face, OLMo-core", z_mean, "z_loss", "1", checked=TRANSFORMERS),
    Convention("st-moe, Megatron-Core", z_sum, "z_loss", "L", checked=ST_MOE),
)
