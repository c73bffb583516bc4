"""Curves over training: pure functions from the step to a number, asked once per step."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from moe_lab.config import option

Fraction = Annotated[float, Field(ge=0, le=1)]


class Curve(BaseModel, extra="forbid", frozen=True):
    """`start` until the fraction `begin` of the run, then along the curve, `end` from the fraction `until` on.

    exponential is linear in the logarithm; step jumps from start to end at `until`.
    """

    curve: Literal["constant", "linear", "cosine", "exponential", "step"] = "constant"
    start: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    end: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    begin: Fraction = 0.0
    until: Fraction = 1.0

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.curve == "constant":
            return self
        if self.end is None:
            raise ValueError(f"curve={self.curve} needs an end value")
        if self.begin >= self.until and self.curve != "step":
            raise ValueError(f"begin={self.begin} must come before until={self.until}")
        if self.curve == "exponential" and not (self.start > 0 and self.end > 0):
            raise ValueError("curve=exponential needs start and end above 0")
        return self

    def at(self, progress: float) -> float:
        """The value at a fraction of the run in [0, 1]."""
        if self.curve == "constant" or self.end is None:
            return self.start
        if self.curve == "step":
            return self.end if progress >= self.until else self.start
        x = min(max((progress - self.begin) / (self.until - self.begin), 0.0), 1.0)
        if self.curve == "exponential":
            return self.start * (self.end / self.start) ** x
        if self.curve == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        return self.start + (self.end - self.start) * x


def _number_is_constant(value: Any) -> Any:
    return {"start": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


def _stays_positive(curve: Curve) -> Curve:
    if curve.start <= 0 or (curve.end is not None and curve.end <= 0):
        raise ValueError("must stay above 0")
    return curve


def _is_probability(curve: Curve) -> Curve:
    if max(curve.start, curve.end or 0.0) > 1:
        raise ValueError("a probability must be at most 1")
    return curve


Schedule = Annotated[Curve, BeforeValidator(_number_is_constant)]
Positive = Annotated[Schedule, AfterValidator(_stays_positive)]
Probability = Annotated[Schedule, AfterValidator(_is_probability)]


def constant(value: float) -> Curve:
    """A number that stays: the default of an option that may be scheduled."""
    return Curve(start=value)


@dataclass(frozen=True)
class Values:
    """What the schedules say at one step."""

    temperature: float
    noise: float
    balance: float
    bias_rate: float
    progress: float  # fraction of the run, for curves that belong to an option


@option("schedule", "curves")
class Schedules:
    """Temperature of the gate, and multipliers for router noise, balance weights and the selection bias's rate."""

    def __init__(self, *, temperature: Positive, noise: Schedule, balance: Schedule, bias_rate: Schedule):
        self.curves = {"temperature": temperature, "noise": noise, "balance": balance, "bias_rate": bias_rate}

    def at(self, step: int, steps: int) -> Values:
        """Values for the update after `step` updates of `steps`; the last update sits at the end of every curve."""
        progress = step / max(1, steps - 1)
        return Values(**{name: curve.at(progress) for name, curve in self.curves.items()}, progress=progress)
