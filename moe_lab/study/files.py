"""A study file, sweeps/NAME.yaml: read as data and held against what may stand there, a line for every mistake."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moe_lab import presets, reading
from moe_lab.wording import complaint, nearest, shown

Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,39}$")]
Override = Annotated[str, Field(pattern=r"^\+{0,2}[A-Za-z_][\w./@-]*=")]
RESERVED = ("hydra", "sweep", "output_dir", "resume", "arm", "scale")  # say where and how jobs run, not what they are


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Reduce(Strict):
    """How a metric of many steps, layers and experts becomes one number."""

    steps: Literal["last", "last_20_percent", "first_100", "all"] = "last"  # mean over the rows in it
    layers: Literal["max", "mean", "min"] = "mean"  # of [L] and [L][E] values
    experts: Literal["max", "mean", "min", "std"] = "mean"  # of [L][E] values, before the layers


class Claim(Strict):
    """Something that a study's runs may refute: of one arm's metric, or of two arms' over the same seeds."""

    says: Text
    source: Text
    metric: Text
    reduce: Reduce = Reduce()
    arm: str | None = None
    compare: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    by: Literal["difference", "ratio"] = "difference"  # of the first arm to the second
    at_least: float | None = None
    at_most: float | None = None
    within: Annotated[float, Field(gt=0)] | None = None  # equivalence

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.arm is None) == (self.compare is None):
            raise ValueError("needs either arm: NAME or compare: [NAME, NAME]")
        if self.compare and self.compare[0] == self.compare[1]:
            raise ValueError("compare: needs two different arms")
        if sum(bound is not None for bound in (self.at_least, self.at_most, self.within)) != 1:
            raise ValueError("needs exactly one of at_least, at_most and within")
        if self.within is not None and self.compare is None:
            raise ValueError("within: holds two arms against each other; it needs compare: [NAME, NAME]")
        if self.by == "ratio" and self.compare is None:
            raise ValueError("by: ratio needs compare: [NAME, NAME]")
        if self.by == "ratio" and any(b is not None and b <= 0 for b in (self.at_least, self.at_most)):
            raise ValueError("by: ratio needs a bound above 0")
        return self

    def arms(self) -> list[str]:
        return self.compare or [str(self.arm)]


class Study(Strict):
    """The `study:` node. Overrides are put together as settings, scale, arm, grid, command line; later ones win."""

    question: Text
    source: Text
    settings: list[Override] = []  # of every job
    arms: Annotated[dict[Name, list[Override]], Field(min_length=1)]
    scales: dict[Name, list[Override]]
    unequal: dict[Literal["active_params", "flops_per_token", "tokens"], Text] = {}  # why arms may differ in cost
    claims: list[Claim] = []

    @model_validator(mode="after")
    def _whole(self) -> Self:
        named = [arm for claim in self.claims for arm in claim.arms()]
        if unknown := [arm for arm in named if arm not in self.arms]:
            raise ValueError(f"a claim's arm={unknown[0]} is not there{nearest(unknown[0], self.arms)}")
        parts = (self.settings, *self.arms.values(), *self.scales.values())
        for override in (override for part in parts for override in part):
            if key_of(override).split(".")[0].split("/")[0] in RESERVED:
                raise ValueError(f"{override}: says where jobs run; that is for the command line")
        if seeded := [name for name, overrides in self.arms.items() if "seed" in map(key_of, overrides)]:
            raise ValueError(f"arm {seeded[0]} sets a seed: arms are compared over the same seeds")
        return self


class _Sweeper(Strict):
    params: dict[Text, str | int | float | bool]


class _Hydra(Strict):
    sweeper: _Sweeper


class _File(Strict):
    study: Study
    hydra: _Hydra | None = None


def read_study(path: Path) -> tuple[Study, dict[str, str]]:
    """A study and its grid, each key with its values as they would be typed. ValueError, a line for every mistake."""
    try:
        found = _File.model_validate(reading.yaml_file(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such study") from None
    except ValidationError as error:
        raise ValueError("\n".join(f"{path}: {line}" for line in _lines(error))) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.parent}/{error}" if isinstance(error, ValueError) else f"{path}: {error}") from None
    params = found.hydra.sweeper.params if found.hydra else {}
    return found.study, {"arm": "*"} | {key: _typed(value) for key, value in params.items()}


def _typed(value: str | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _lines(error: ValidationError) -> list[str]:
    """Each mistake with its place in the file."""
    told = []
    for e in error.errors(include_url=False):
        where = ".".join(map(str, e["loc"]))
        if e["type"] in ("extra_forbidden", "missing"):
            told.append(f"{where}: {'no such key' if e['type'] == 'extra_forbidden' else 'missing'}")
        elif e["type"] == "value_error":
            told.append(f"{where}: {e['msg'].removeprefix('Value error, ')}")
        else:
            told.append(f"{where}={shown(e['input'])}: {complaint(e)}")
    return told


def key_of(override: str) -> str:
    """`steps` of `steps=5`, and of `+steps=5`."""
    return override.lstrip("+~").partition("=")[0]


def claims_sha256(study: Study) -> str:
    """Of the claims alone: whether they were edited after the results came in."""
    claims = [claim.model_dump(exclude_none=True) for claim in study.claims]
    return hashlib.sha256(json.dumps(claims, sort_keys=True).encode()).hexdigest()


def dump(study: Study) -> dict[str, Any]:
    return study.model_dump(exclude_none=True)


def studies() -> dict[str, Path]:
    """The study files by name: those of ./sweeps, and those that come with moe-lab."""
    folders = (presets.sweeps_dir(), Path("sweeps"))
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def find(name: str) -> Path:
    """The file of a study that is named, or given as a path. ValueError where there is none."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = studies()
    if name not in known:
        raise ValueError(f"{name}: no such study{nearest(name, known)}")
    return known[name]
