"""What a verdict rests on: the rows of one layer, summed over enough updates to mean something.

Legend: R rows, E experts. Rows are dicts as in metrics.jsonl, so that a resumed run and a finished one read alike.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_lab.observe.thresholds import CHANCE, DEAD, DEAD_WINDOW, HISTORY, PATIENCE, SETTLED, SWING


@dataclass(frozen=True)
class Entry:
    """One layer in one row."""

    step: int
    window: int
    tokens: float
    selected_E: np.ndarray
    mass_E: np.ndarray
    skew: float
    values: dict[str, float]


@dataclass(frozen=True)
class Evidence:
    """The facts about a layer over the last PATIENCE updates. Shares of what is possible; NaN where undefined.

    skew: load CV over its ceiling, by choices or by gate mass, whichever is more even (a soft router may choose one
    expert and weigh all alike). dead: experts with neither choices nor mass. spread: gap of the per-expert losses over
    the task loss. flutter, chance: share of the load that changes hands from update to update, and what differences
    between the batches explain. swing, back: the same between rows, and the part of it that does not come back.
    """

    skew: float
    dead: int
    token_entropy: float
    kind: str
    told: float
    floor: float
    token: float
    position: float
    spread: float
    flutter: float
    chance: float
    swing: float
    back: float
    ratio: float


class Layer:
    """Collects the rows of one layer."""

    def __init__(self, index: int, E: int, k: int, kind: str):
        self.index, self.E, self.k, self.kind = index, E, k, kind
        self.entries: deque[Entry] = deque()
        self.ratio = math.nan

    def add(self, row: Mapping[str, Any]) -> Entry:
        """Take in this layer's part of a row."""
        ratio = row.get("moe/router_grad_ratio")
        if ratio is not None:
            self.ratio = number(ratio[self.index])
        selected_E, mass_E = (np.array(row[f"moe/{name}"][self.index], float) for name in ("selected", "gate_mass"))
        names = ("token_entropy", "load_flutter", "load_flutter_floor")
        names += tuple(f"nmi_{x}{end}" for x in (self.kind, "token", "position") for end in ("", "_floor"))
        values = {name: number(row[f"moe/{name}"][self.index]) for name in names}
        losses = [loss for loss in row["moe/expert_loss"][self.index] if loss is not None]
        values["spread"] = (max(losses) - min(losses)) / row["loss"] if losses and row["loss"] else math.nan
        tokens = selected_E.sum() / self.k
        skew = share_of_ceiling(selected_E, mass_E, self.k)
        self.entries.append(Entry(row["step"], row["window"], tokens, selected_E, mass_E, skew, values))
        while len(self.entries) > HISTORY and self._updates(1) >= DEAD_WINDOW:
            self.entries.popleft()
        return self.entries[-1]

    def _updates(self, skip: int) -> int:
        return sum(entry.window for i, entry in enumerate(self.entries) if i >= skip)

    def last(self, updates: int) -> list[Entry]:
        """The newest settled rows that together hold so many updates, or all of them."""
        found: list[Entry] = []
        for entry in reversed(self.entries):
            if entry.step <= SETTLED or sum(e.window for e in found) >= updates:
                break
            found.append(entry)
        return found[::-1]

    def evidence(self) -> Evidence | None:
        """None while there are too few updates to judge by."""
        rows = self.last(PATIENCE)
        if sum(entry.window for entry in rows) < PATIENCE:
            return None
        weights = np.array([entry.tokens or 1.0 for entry in rows])  # a ReLU gate can be shut to every token

        def mean(name: str) -> float:
            values = np.array([entry.values[name] for entry in rows])
            known = ~np.isnan(values)
            return float(np.average(values[known], weights=weights[known])) if known.any() else math.nan

        def beyond_floor(x: str) -> float:
            """0 where there was nothing to tell."""
            return float(np.nan_to_num(mean(f"nmi_{x}") - mean(f"nmi_{x}_floor")))

        flutter, chance = self._flutter(rows)
        swing, back = self._swing()
        return Evidence(
            skew=share_of_ceiling(sum_of(rows, "selected_E"), sum_of(rows, "mass_E"), self.k),
            dead=self.dead(),
            token_entropy=mean("token_entropy"),
            kind=self.kind,
            told=beyond_floor(self.kind),
            floor=float(np.nan_to_num(mean(f"nmi_{self.kind}_floor"))),
            token=beyond_floor("token"),
            position=beyond_floor("position"),
            spread=mean("spread"),
            flutter=flutter,
            chance=chance,
            swing=swing,
            back=back,
            ratio=self.ratio,
        )

    def dead(self) -> int:
        rows = self.last(DEAD_WINDOW)
        if sum(entry.window for entry in rows) < PATIENCE:
            return 0
        low = [(x < DEAD * x.mean()) | (x == 0) for x in (sum_of(rows, "selected_E"), sum_of(rows, "mass_E"))]
        return int((low[0] & low[1]).sum())

    def _flutter(self, rows: list[Entry]) -> tuple[float, float]:
        """Mean share of the load that changes hands between updates, and what the batches explain of it."""
        seen = [(e.values["load_flutter"], self._chance(e) * math.sqrt(e.window), e.window) for e in rows]
        seen = [triple for triple in seen if not math.isnan(triple[0])]
        if not seen:
            return 0.0, 0.0
        moved, chance, weights = (np.array(column) for column in zip(*seen, strict=True))
        return float(np.average(moved, weights=weights)), float(np.average(chance, weights=weights))

    def _swing(self) -> tuple[float, float]:
        """A slow swing: how much of the load changes hands between rows, and the part of it that stays away.

        The load some rows later against the load more rows later: if it went away and came back, the second is nearer.
        """
        settled = [entry for entry in self.entries if entry.step > SETTLED and entry.tokens][-HISTORY:]
        if not settled:
            return 0.0, 1.0
        load_RE = np.array([entry.selected_E / entry.selected_E.sum() for entry in settled])
        chance = float(np.mean([self._chance(entry) for entry in settled]))
        lags = range(1, len(settled) // 3 + 1)
        square = [float((np.abs(load_RE[lag:] - load_RE[:-lag]).sum(-1) / 2).mean()) ** 2 - chance**2 for lag in lags]
        shift = np.sqrt(np.maximum(square, 0))
        best = (0.0, 1.0)
        for near, moved in enumerate(shift):
            if moved >= max(SWING, CHANCE * chance) and near + 1 < len(shift):
                best = min(best, (float(moved), float(shift[near + 1 :].min() / moved)), key=lambda pair: pair[1])
        return best

    def _chance(self, entry: Entry) -> float:
        """Shift between two rows of this size that the sequences in them explain."""
        known = entry.values["load_flutter_floor"]
        random = math.sqrt(max(self.E / self.k - 1, 0) / (math.pi * (entry.tokens or 1.0)))
        return random if math.isnan(known) else known / math.sqrt(entry.window)


def share_of_ceiling(selected_E: np.ndarray, mass_E: np.ndarray, k: int) -> float:
    """CV over its ceiling, 0 where there is nothing to choose."""
    E = len(selected_E)
    if E == 1:
        return 0.0
    spread = cv(mass_E) if k >= E else min(cv(selected_E), cv(mass_E))
    return min(1.0, spread / ceiling(E, k))


def ceiling(E: int, k: int) -> float:
    """CV when k experts get everything; where every expert is chosen, when one has all the weight."""
    return math.sqrt(E / k - 1) if k < E else math.sqrt(E - 1)


def cv(x_E: np.ndarray) -> float:
    return float(x_E.std() / x_E.mean()) if x_E.any() else 0.0


def sum_of(rows: list[Entry], name: str) -> np.ndarray:
    return np.sum([getattr(entry, name) for entry in rows], axis=0)


def number(value: float | None) -> float:
    return math.nan if value is None else float(value)
