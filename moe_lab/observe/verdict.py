"""The verdict on each layer: a fixed rule over the metrics, with the numbers that decided it and what to try next.

The rules, in order; the first that holds is the verdict (thresholds.py has the numbers and their reasons):
  unlearned                 the router has nothing that could be trained
  frozen                    the task's gradient does not reach the router, unless a collapse came before and explains it
  collapsed                 few experts get nearly everything: skewed load, or many dead experts
  oscillating               the load moves between experts and comes back
  healthy                   the choice tells the domain (without domains: the token) more than the position
  undecided                 the gate is close to uniform, or the load is uneven without meaning
  balanced but unspecialised  even load, sure gate, and the choice tells nothing

A pure function of the rows of metrics.jsonl: a resumed run feeds them again and stands where it stood.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_lab.observe import thresholds as at
from moe_lab.observe.evidence import Evidence, Layer, ceiling
from moe_lab.observe.remedies import remedies, router_of

HEALTHY, UNDECIDED, COLLAPSED = "healthy", "undecided", "collapsed"
UNSPECIALISED, OSCILLATING, FROZEN = "balanced but unspecialised", "oscillating", "frozen"
UNLEARNED = "unlearned"
VERDICTS = (UNLEARNED, FROZEN, COLLAPSED, OSCILLATING, HEALTHY, UNDECIDED, UNSPECIALISED)


@dataclass(frozen=True)
class Change:
    """A layer's verdict from `step` on; since: the step at which what it says began."""

    step: int
    layer: int
    old: str | None
    new: str
    since: int | None
    why: str
    remedies: list[str]


class Judge:
    """`see` each row in order. `changes` holds what the last row changed, `report()` where every layer stands.

    k: experts that shape a token's output, E where all of them do and their weights are what is uneven or not.
    config: the run's config, so that the remedies start from what it has.
    """

    def __init__(self, num_experts: int, k: int, num_domains: int, config: Mapping[str, Any] | None = None):
        self.E, self.k, self.kind = num_experts, k, "domain" if num_domains > 1 else "token"
        self.config = config or {}
        self.layers: list[Standing] = []
        self.changes: list[Change] = []

    def see(self, row: Mapping[str, Any]) -> list[str | None]:
        """The verdicts after this row, one per layer, None where it is too early."""
        L, learns = len(row.get("moe/selected") or []), router_of(self.config).learns
        self.layers = self.layers or [Standing(Layer(i, self.E, self.k, self.kind), learns) for i in range(L)]
        self.changes = []
        for standing in self.layers:
            old = standing.verdict
            standing.see(row)
            if standing.verdict is not None and standing.verdict != old:
                told = standing.report(self.config)
                self.changes.append(Change(row["step"], old=old, new=told.pop("verdict"), **told))
        return [standing.verdict for standing in self.layers]

    def report(self) -> list[dict[str, Any]]:
        """For summary.json: layer, verdict, since, why, remedies, with the newest numbers."""
        return [standing.report(self.config) for standing in self.layers]


class Standing:
    """Where one layer stands, and since when."""

    def __init__(self, layer: Layer, learns: bool):
        self.layer, self.learns = layer, learns
        self.verdict: str | None = None
        self.since: int | None = None
        self.evidence: Evidence | None = None
        self.candidate: str | None = None  # what the last `agreed` rows say, from the step `candidate_since`
        self.candidate_since = self.agreed = 0
        self.skewed_since: int | None = None  # start of the unbroken rows that look collapsed

    def see(self, row: Mapping[str, Any]) -> None:
        """Take in one row. A new verdict must hold for a while (STEADY); a frozen router is a fact at once."""
        entry = self.layer.add(row)
        first = entry.step - entry.window + 1
        skewed = entry.skew >= at.COLLAPSED.leave or self.layer.dead() >= at.DEAD_SHARE * self.layer.E
        self.skewed_since = (self.skewed_since or first) if skewed else None
        self.evidence = self.layer.evidence()
        if self.learns or self.layer.E == 1:
            new = decide(self.evidence, self.verdict or self.candidate, self.layer.E, self.layer.ratio)
        else:
            new = UNLEARNED if self.evidence else None
        if new != self.candidate:
            self.candidate, self.candidate_since, self.agreed = new, first, 0
        self.agreed += 1
        steady = self.agreed >= at.STEADY or entry.step - self.candidate_since + 1 >= at.STEADY_UPDATES
        certain = new in (FROZEN, UNLEARNED) or self.layer.E == 1
        if new is not None and new != self.verdict and (certain or steady):
            self.verdict = new
            self.since = self.skewed_since if new == COLLAPSED and self.skewed_since else self.candidate_since

    def report(self, config: Mapping[str, Any]) -> dict[str, Any]:
        verdict, e = self.verdict, self.evidence
        found = {"layer": self.layer.index, "verdict": verdict, "since": self.since}
        if verdict is None:
            return found | {"why": "too early to say", "remedies": []}
        tips = remedies(verdict, e.spread if e else 0.0, e.dead if e else 0, config)
        why = explain(verdict, e, self.layer)
        if self.candidate not in (None, verdict):
            why += f"; since step {self.candidate_since} the rows say {self.candidate}, not yet for long enough"
        return found | {"why": why, "remedies": tips}


def decide(e: Evidence | None, was: str | None, E: int, ratio: float) -> str | None:
    """The verdict that the evidence gives by itself, with the looser thresholds for the one that stands."""
    if E == 1:
        return HEALTHY
    frozen = ratio < at.FROZEN
    if e is None:
        return FROZEN if frozen else was
    collapsed = e.skew >= pick(at.COLLAPSED, was == COLLAPSED) or e.dead >= at.DEAD_SHARE * E
    if frozen and not (was == COLLAPSED and collapsed):
        return FROZEN
    if collapsed:
        return COLLAPSED
    if flutters(e) or (e.swing >= at.SWING and e.back <= pick(at.BACK, was == OSCILLATING)):
        return OSCILLATING
    specialised = at.SPECIALISED if e.kind == "domain" else at.SPECIALISED_BY_TOKEN
    told = e.told >= max(pick(specialised, was == HEALTHY), e.floor) and e.told >= e.position
    if told and e.skew < at.COLLAPSED.leave:
        return HEALTHY
    if e.token_entropy >= pick(at.UNDECIDED, was == UNDECIDED) or e.skew >= pick(at.UNEVEN, was == UNDECIDED):
        return UNDECIDED
    return UNSPECIALISED


def flutters(e: Evidence) -> bool:
    """Load changes hands from update to update, for so long that it must have come back, and the data is not why."""
    return e.flutter >= max(at.SWING, at.CHANCE * e.chance)


def pick(threshold: at.Threshold, stands: bool) -> float:
    return threshold.leave if stands else threshold.enter


def explain(verdict: str, e: Evidence | None, layer: Layer) -> str:
    """One sentence with the numbers that decided."""
    if layer.E == 1:
        return "one expert: nothing to route"
    if e is None:
        return f"router gradient {layer.ratio:.0e} of the experts' (alive above {at.FROZEN:.0e})"
    most = ceiling(layer.E, layer.k)
    load = (
        f"{'load' if layer.k < layer.E else 'weight'} CV {e.skew * most:.2f} is {e.skew:.0%} of its ceiling {most:.2f}"
    )
    dead = f"{e.dead} of {layer.E} experts are dead"
    told = f"the choice tells {max(0, e.told):.1%} of the {e.kind} beyond a chance level of {e.floor:.1%}"
    told += f" ({max(0, e.token):.0%} of the token)" if e.kind == "domain" else ""
    artefact = e.position > max(e.told, at.SPECIALISED.enter)
    position = f"; what the experts learned is position ({e.position:.0%} of it)" if artefact else ""
    return {
        UNLEARNED: f"nothing to train in this router; {load}, {told}" + (f", {dead}" if e.dead else ""),
        FROZEN: f"router gradient {layer.ratio:.0e} of the experts' (alive above {at.FROZEN:.0e}); {load}",
        COLLAPSED: f"{load}, {dead}",
        OSCILLATING: f"{e.flutter:.0%} of the load changes hands from update to update ({e.chance:.0%} by chance)"
        if flutters(e)
        else f"{e.swing:.0%} of the load moves between experts and {1 - e.back:.0%} of that comes back",
        HEALTHY: f"{load}, {told}" + (f", but {dead}" if e.dead else ""),
        UNDECIDED: f"gate entropy {e.token_entropy:.2f} of 1, {told}, {load}",
        UNSPECIALISED: f"{load}, gate entropy {e.token_entropy:.2f} of 1, but {told}{position}",
    }[verdict]
