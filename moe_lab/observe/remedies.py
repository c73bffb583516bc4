"""What to try next: overrides that differ from the run's own config, each with a word why."""

from collections.abc import Iterator, Mapping
from typing import Any

from moe_lab.config import registered
from moe_lab.observe.thresholds import SPREAD
from moe_lab.routing import Router


def remedies(verdict: str, spread: float, dead: int, config: Mapping[str, Any]) -> list[str]:
    """Overrides for `moe-lab train`, most promising first.

    spread: gap between the per-expert losses over the loss. config: the run's, {} takes the defaults.
    """
    if not router_of(config).learns:
        return []
    if verdict == "collapsed" or (verdict == "healthy" and dead):
        return [*push(config, 10), *sample(config), *soften(config)]
    if verdict == "frozen":
        return [*connect(config), *soften(config)]
    if verdict == "oscillating":
        return [*push(config, 0.1), *slow(config)]
    if verdict == "undecided":
        return [*harden(config), *push(config, 0.1), *longer(config)]
    if verdict == "balanced but unspecialised":
        reason = f": the experts' losses differ by {spread:.0%}" if spread >= SPREAD else ""
        return [*sample(config, reason), *push(config, 0.1), *longer(config)]
    return []


def router_of(config: Mapping[str, Any]) -> type[Router]:
    """The class of the run's router."""
    return registered("router").get((config.get("router") or {}).get("name") or "gumbel_ste", Router)


def push(config: Mapping[str, Any], factor: float) -> Iterator[str]:
    """A stronger (factor > 1) or weaker balance, where the load is not even by itself."""
    if router_of(config).even:
        return
    balance = config.get("balance") or {}
    how = "larger" if factor > 1 else "smaller"
    known = {name: registered("balance")[name] for name in balance}
    losses = [n for n, kind in known.items() if kind.spreads(balance[n]) and balance[n].get("weight")]
    movers = [name for name, kind in known.items() if kind.moves_bias]
    moves = [(f"balance.{name}.weight", balance[name]["weight"], "balance", "balance weight") for name in losses]
    moves += [
        (f"balance.{name}.rate", balance[name]["rate"], "bias_rate", "step of the selection bias")
        for name in movers
        if balance[name].get("rate")
    ]
    tips = {}
    for word, value, knob, what in moves:
        if isinstance(value, Mapping):  # a curve keeps its shape: the schedule of them all multiplies it
            word, value = f"schedule.{knob}", level(config, knob) or level(config, knob, "end")
        tips[word] = f"{word}={value * factor:g} (a {how} {what})"
    yield from tips.values()
    if factor > 1 and not losses and not movers:
        yield f"balance=[{','.join([n for n in balance if n != 'switch'] + ['switch'])}] (a balance loss)"


def sample(config: Mapping[str, Any], reason: str = "") -> Iterator[str]:
    """Noise, so that tokens try experts that the router would not pick."""
    name, explore = (config.get("router") or {}).get("name"), config.get("explore") or {}
    router = router_of(config)
    noise = f"(noise{reason or ': every expert is tried'})"
    if name == "softmax_ste":
        yield f"router=gumbel_ste {noise}"
    elif name == "dense":
        yield f"router=gumbel_softmax {noise}"
    elif router.noise != "none" or explore.keys() & {"gaussian", "gumbel"}:
        yield f"schedule.noise={2 * level(config, 'noise'):g} (more noise{reason})"
    elif "logits" not in router.unexplored(config.get("router") or {}):
        yield f"explore=[{','.join([*explore, 'gumbel'])}] {noise}"


def soften(config: Mapping[str, Any]) -> Iterator[str]:
    yield f"schedule.temperature={2 * level(config, 'temperature'):g} (a higher temperature)"


def harden(config: Mapping[str, Any]) -> Iterator[str]:
    """Let the gate decide towards the end."""
    temperature = (config.get("schedule") or {}).get("temperature")
    if not isinstance(temperature, Mapping) or temperature.get("end") is None:  # a bare number stays what it is
        yield "schedule=anneal (soft and noisy first, hard and quiet later)"
    else:
        yield f"schedule.temperature.end={level(config, 'temperature', 'end') / 2:g} (a lower temperature at the end)"


def longer(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("steps"):
        yield f"steps={2 * config['steps']} (more time to specialise)"


def slow(config: Mapping[str, Any]) -> Iterator[str]:
    lr = (config.get("optim") or {}).get("lr")
    if lr:
        yield f"optim.lr={lr / 3:g} (smaller steps)"


def connect(config: Mapping[str, Any]) -> Iterator[str]:
    """Give the task a way to the router."""
    router = config.get("router") or {}
    first = router.get("order") == "topk_first" and router.get("gate") != "sigmoid"
    changes = ["router.renormalise=false"] * bool(router.get("renormalise")) + ["router.order=gate_first"] * first
    if router.get("k") == 1 and changes:
        yield f"{' '.join(changes)} (a renormalised top-1 weight is always 1)"
    if router.get("k") == 1 and (changes or router.get("name") not in ("switch", "base")):
        yield "router.k=2 (two weights can trade against each other)"
    bound = (config.get("balance") or {}).keys() & {"load", "l1_adaptive"}  # to noisy routers, and to relu
    if router.get("name") != "switch" and not bound:
        yield "router=switch (the output is scaled by its probability, which trains the router)"


def level(config: Mapping[str, Any], knob: str, end: str = "start") -> float:
    """A schedule's value as configured; a schedule may be a bare number."""
    node = (config.get("schedule") or {}).get(knob, 1.0)
    value = node.get(end) if isinstance(node, Mapping) else node
    return 1.0 if value is None else float(value)
