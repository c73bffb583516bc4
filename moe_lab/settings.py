"""The root keys of a run: what belongs to no group."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from moe_lab.config import complete, option, registered

PosInt = Annotated[int, Field(ge=1)]
MOST_TOKENS = 2**26  # at once: a byte vocabulary's logits alone are 64 GB then


class Checkpointing(BaseModel, extra="forbid"):
    every: PosInt  # steps between checkpoints
    keep: PosInt  # newest checkpoints kept


class Sweeping(BaseModel, extra="forbid", allow_inf_nan=False):
    """Where the jobs of a sweep go and how many run at a time: nothing that a job itself depends on."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,39}$")]
    max_jobs: PosInt
    jobs: PosInt | None
    timeout: Annotated[float, Field(gt=0)] | None


@option("root", "train")
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Root keys; conf/train.yaml holds their defaults and says what each is."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    steps: PosInt
    batch_size: PosInt
    seq_len: PosInt
    log_every: PosInt
    eval_every: PosInt
    eval_tokens: PosInt
    checkpoint: Checkpointing
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "float32", "bfloat16"]
    compile: bool
    resume: str | None
    output_dir: Annotated[str, Field(min_length=1)]
    sweep: Sweeping
    fast: bool
    allow_leak: bool

    @classmethod
    def conflicts(cls, node: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        if leaks(cfg) and not node["allow_leak"]:
            return [
                f"{_leak(cfg)}: looks at later tokens, so that objective={cfg['objective']['name']} "
                "means little; take objective=mlm, or say allow_leak=true and every table will name it"
            ]
        accumulate = cfg["optim"]["accumulate"]
        if node["batch_size"] % accumulate:
            return [f"optim.accumulate={accumulate}: must divide batch_size={node['batch_size']}"]
        if node["batch_size"] // accumulate * node["seq_len"] > MOST_TOKENS:
            each = f"batch_size={node['batch_size']} of seq_len={node['seq_len']}, optim.accumulate={accumulate}"
            return [f"{each}: more than {MOST_TOKENS:,} tokens at once fit no machine; raise optim.accumulate"]
        return []

    def logs_at(self, step: int) -> bool:
        """Whether `step` updates end a row: densely in the first 100, where collapse happens, then every log_every."""
        dense = step <= 10 or (step <= 100 and step % 5 == 0)
        return dense or step % self.log_every == 0 or self.evaluates_at(step)

    def evaluates_at(self, step: int) -> bool:
        return step % self.eval_every == 0 or step == self.steps


def leaks(cfg: Mapping[str, Any]) -> bool:
    """Whether the MoE layers show a causal model its future: such a loss cannot be compared with others."""
    cfg = complete(cfg)
    causal = registered("objective")[cfg["objective"]["name"]].causal
    return cfg["model"]["moe"] and causal and _leak(cfg) is not None


def _leak(cfg: Mapping[str, Any]) -> str | None:
    """What looks at later tokens: the router, or a full expert that gives an earlier token's place to a heavier one."""
    router, experts = cfg["router"], cfg["experts"]
    if not registered("router")[router["name"]].traits(router, experts["num"]).causal:
        return f"router={router['name']}"
    by_weight = experts["capacity_factor"] is not None and experts["drop"] == "probability"
    return "experts.drop=probability" if by_weight else None


def idle(cfg: Mapping[str, Any]) -> list[str]:
    """A line for balance losses that have nothing to do with this router."""
    cfg = complete(cfg)
    name, kinds = cfg["router"]["name"], registered("balance")
    router, weighed = registered("router")[name], [n for n, node in cfg["balance"].items() if node.get("weight")]
    if not cfg["model"]["moe"]:
        return []
    if not router.learns and (names := [n for n in weighed if kinds[n].for_router]):
        return [f"balance=[{','.join(names)}] reaches no parameter: router={name} has none that is trained"]
    if router.even and (names := [n for n in weighed if kinds[n].spreads(cfg["balance"][n])]):
        return [f"balance=[{','.join(names)}] has little to do: router={name} loads all experts alike by itself"]
    return []


def quick(cfg: dict[str, Any]) -> dict[str, Any]:
    """fast=true: the same config cut down to a few steps that still log, evaluate and write a checkpoint."""
    steps = min(6, cfg["steps"])
    small = {"steps": steps, "batch_size": 2 * cfg["optim"]["accumulate"], "seq_len": min(32, cfg["seq_len"])}
    every = {"log_every": 2, "eval_every": math.ceil(steps / 2), "eval_tokens": 256}
    return cfg | small | every | {"checkpoint": cfg["checkpoint"] | {"every": math.ceil(steps / 2)}}
