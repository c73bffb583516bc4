"""The recorder: sums while it trains, ratios once per row, one transfer to the host.

Shapes: L layers, E experts, R rows of history. Everything here runs on the device until `_to_host`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lab.model.moe import MoE
from moe_lab.observe import confidence, dynamics, geometry, load, specialisation
from moe_lab.observe.metric import METRICS, MOST_EXPERTS, over_layers
from moe_lab.observe.window import Sizes, View, Window

__all__ = ["Recorder", "View"]
INTEGERS = {"selected", "kept", "dropped", "top1", "dead_experts", "domain_counts"}


class Recorder:
    """`see` each micro-batch, `row` on each log row; `state` is all that a resumed run needs for the same rows."""

    def __init__(self, moes: list[MoE], vocab_size: int, num_domains: int, seq_len: int, device: torch.device | str):
        self.moes = moes
        self.window: Window | None = None
        if moes:
            first = moes[0]
            sizes = Sizes(
                len(moes), first.experts.num, first.router.k, first.router.dim, num_domains, vocab_size, seq_len
            )
            self.window = Window(sizes, torch.device(device))
        self.recent: list[tuple[int, Tensor]] = []  # updates and counts [L, E] of the last rows, for dead experts
        self.before_LE: Tensor | None = None  # counts of the window before

    def see(self, view: View) -> None:
        """Add one micro-batch to the window."""
        if self.window is not None:
            self.window.add(view)

    @torch.no_grad()
    def row(self, evaluation: bool = False, held: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """The window's "moe/..." values, and the start of the next window.

        An evaluation leaves out what only makes sense from one training update to the next, and adds the matrices.
        held: what balancers hold, [L] by metric.
        """
        if self.window is None:
            return {}
        sums, sizes = self.window.sums, self.window.sizes
        found = {**self._load(sums, self.window.tokens, sizes.k), **self._gate(sums, self.window.tokens, sizes.E)}
        found |= self._known(self.window)
        found |= self._geometry()
        if evaluation:
            found |= self._matrices()
        else:
            found |= self._coupling()
            found |= self._dynamics(self.window)
        found["expert_loss"] = specialisation.expert_loss(sums["loss"], sums["counted"])
        row = to_host(found | dict(held or {}))
        self.before_LE = sums["selected"].clone()
        self.window.reset()
        return row

    def _load(self, sums: dict[str, Tensor], tokens: int, k: int) -> dict[str, Tensor]:
        selected_LE, kept_LE = sums["selected"], sums["kept"]
        self._remember(selected_LE.clone())
        found = {
            "load_cv": load.cv(selected_LE),
            "load_cv_of_ceiling": load.cv_of_ceiling(selected_LE, k),
            "importance_cv": load.cv(sums["importance"]),
            "gate_mass_cv": load.cv(sums["gate_mass"]),
            "max_vio": load.max_vio(selected_LE),
            "load_gini": load.gini(selected_LE),
            "load_min_max": load.min_max(selected_LE),
            "load_entropy": load.load_entropy(selected_LE),
            "effective_experts": load.effective_experts(selected_LE),
            "experts_per_token": selected_LE.sum(-1) / tokens,
            "dead_experts": self._dead(),
            "dropped_fraction": load.dropped_fraction(selected_LE, kept_LE),
        }
        arrays = {"selected": selected_LE, "kept": kept_LE, "dropped": selected_LE - kept_LE, "top1": sums["top1"]}
        return found | arrays | {"gate_mass": sums["gate_mass"]}

    def _gate(self, sums: dict[str, Tensor], tokens: int, E: int) -> dict[str, Tensor]:
        return {
            "importance": sums["importance"] / tokens,
            "token_entropy": confidence.token_entropy(sums["entropy"], tokens, E),
            "mutual_information": confidence.mutual_information(sums["importance"], sums["entropy"], tokens),
            "logit_norm": sums["logit_norm"] / tokens,
            "logsumexp": sums["logsumexp"] / tokens,
        }

    def _known(self, window: Window) -> dict[str, Tensor]:
        found = {}
        for name in ("domain", "token", "position"):
            joint = specialisation.Joint(window.sums[name], window.sizes.k)
            found |= {f"nmi_{name}": joint.nmi(), f"nmi_{name}_floor": joint.floor()}
            if name == "domain":
                in_window_L, _ = window.sequence_information()
                found["nmi_domain_floor"] = joint.floor_by_sequence(in_window_L, window.sequences)
        return found

    def _geometry(self) -> dict[str, Tensor]:
        assert self.window is not None
        running, layers = self.window.running, []
        for moe, sum_ED, count_E in zip(self.moes, running["centroid_sum"], running["centroid_count"], strict=True):
            router_ED = moe.router.directions_ED()
            if router_ED is None:
                layers.append(torch.full((4,), math.nan, dtype=torch.float64, device=sum_ED.device))
                continue
            cosines = (
                *geometry.router_cosines(router_ED),
                *geometry.centroid_cosines(router_ED, sum_ED, count_E),
            )
            layers.append(torch.stack(cosines))
        names = ("router_cos", "router_cos_abs", "centroid_cos", "centroid_cos_raw")
        return dict(zip(names, torch.stack(layers, -1), strict=True))

    def _matrices(self) -> dict[str, Tensor]:
        """Who serves which domain [L, E, C], and the cosines between router rows [L, E, E]."""
        assert self.window is not None
        if self.window.sizes.E > MOST_EXPERTS:
            return {}
        layers = []
        for moe in self.moes:
            router_ED = moe.router.directions_ED()
            if router_ED is None:
                router_ED = torch.full((moe.experts.num, 1), math.nan, device=moe.bias_E.device)
            layers.append(geometry.cosine_matrix(router_ED))
        return {"domain_counts": self.window.sums["domain"], "router_cos_matrix": torch.stack(layers).round(decimals=4)}

    def _coupling(self) -> dict[str, Tensor]:
        """Each layer's router rows against its experts' input-side rows: a property of the weights as they stand."""
        layers = [layer_coupling(moe) for moe in self.moes]
        return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}

    def _dynamics(self, window: Window) -> dict[str, Tensor]:
        sums, before = window.sums, self.before_LE
        _, in_update_L = window.sequence_information()
        unknown_L = torch.full_like(sums["flutter"], math.nan)
        return {
            "load_flutter": sums["flutter"] / sums["pairs"],  # 0 / 0 is NaN: no update before
            "load_flutter_floor": dynamics.flutter_floor(in_update_L, window.sequences / max(window.updates, 1)),
            "load_shift": unknown_L if before is None else dynamics.total_variation(sums["selected"], before),
        }

    def _dead(self) -> Tensor:
        """Dead experts per layer [L]; NaN where all experts shape every token, chosen or not."""
        dead_L = load.dead_experts(torch.stack([counts_LE for _, counts_LE in self.recent]).sum(0)).double()
        soft_L = torch.tensor([moe.router.active > moe.router.k for moe in self.moes])
        return dead_L.masked_fill(soft_L.to(dead_L.device), math.nan)

    def _remember(self, counts_LE: Tensor) -> None:
        """Keep the newest rows that together hold DEAD_WINDOW updates."""
        assert self.window is not None
        self.recent.append((self.window.updates, counts_LE))
        while sum(n for n, _ in self.recent[1:]) >= load.DEAD_WINDOW:
            self.recent.pop(0)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, of this recorder alone."""
        if self.window is None:
            return {}
        held = {f"sums.{name}": t for name, t in self.window.sums.items()}
        held |= {f"running.{name}": t for name, t in self.window.running.items()}
        held["size"] = torch.tensor([self.window.tokens, self.window.sequences, self.window.updates])
        if self.before_LE is not None:
            held["before"] = self.before_LE
            held["recent.updates"] = torch.tensor([n for n, _ in self.recent])
            held["recent.counts"] = torch.stack([counts_LE for _, counts_LE in self.recent])
        return {name: t.clone() for name, t in held.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        if self.window is None:
            return
        for part, held in (("sums", self.window.sums), ("running", self.window.running)):
            for name, t in held.items():
                t.copy_(state[f"{part}.{name}"])
        self.window.tokens, self.window.sequences, self.window.updates = state["size"].tolist()
        device = self.window.sums["selected"].device
        self.before_LE, self.recent = None, []
        if "before" in state:
            self.before_LE = state["before"].to(device)
            counts_RLE = state["recent.counts"].to(device)
            self.recent = list(zip(state["recent.updates"].tolist(), counts_RLE.unbind(0), strict=True))


def layer_coupling(moe: MoE) -> dict[str, Tensor]:
    """Coupling of one layer's networks; NaN throughout for a router without directions."""
    experts, router_ED = moe.experts, moe.router.directions_ED()
    if router_ED is None:
        router_ED = torch.full((experts.num, moe.router.dim), math.nan, device=experts.w_in_EID.device)
    return geometry.coupling(router_ED[: experts.networks], experts.read_in_EFD(), experts.real_EF)


def to_host(found: dict[str, Tensor]) -> dict[str, Any]:
    """Values [L], [L, E] or [L, E, n] by metric name -> plain row entries, crossing to the host as one flat tensor.

    Undefined values become None. [L] metrics also get their mean and worst layer.
    """
    flat = torch.cat([t.double().flatten() for t in found.values()]).tolist()
    row: dict[str, Any] = {}
    at = 0
    for name, t in found.items():
        values = [plain(v, name in INTEGERS) for v in flat[at : at + t.numel()]]
        at += t.numel()
        metric = METRICS[name]
        if metric.shape != "L":
            row[f"moe/{name}"] = nested(values, t.shape[1:])
            continue
        row[f"moe/{name}"] = values
        row |= {f"moe/{name}/{how}": v for how, v in over_layers(metric, values).items()}
    return row


def nested(values: list[Any], shape: Sequence[int]) -> list[Any]:
    """A flat list, cut into lists of that shape."""
    if len(shape) > 1:
        values = nested(values, shape[1:])
    return [values[i : i + shape[0]] for i in range(0, len(values), shape[0])]


def plain(value: float, integer: bool) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if integer else value
