"""From a study and a command line to jobs: settings, scale, arm, grid point, command line; by key the last one wins."""

import itertools
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from hydra.core.override_parser.types import Override

from moe_lab.hydra_app import Refused, parsed, refuse, told
from moe_lab.hydra_jobs import Asked, count, values
from moe_lab.study.files import Study, key_of
from moe_lab.wording import nearest


@dataclass(frozen=True)
class Point:
    """A job before it is composed."""

    arm: str  # as in folder.Job
    seed: int
    words: list[str]
    name: list[str]  # words to name its directory by


def scale_of(study: Study, given: str | None) -> str:
    """The scale that was asked for; without one `gpu` where there is a GPU and the study has that scale, else `cpu`."""
    name = given or ("gpu" if "gpu" in study.scales and has_gpu() else "cpu")
    if name not in study.scales:
        raise Refused([f"scale={name}: this study has none of this name{nearest(name, study.scales)}"])
    return name


def has_gpu() -> bool:
    """Whether the NVIDIA driver lists a GPU; torch is not asked, since the driver of a sweep does not import it."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0 and "GPU" in done.stdout


def points(asked: Asked, study: Study, scale: str, params: Mapping[str, str], given: list[str]) -> list[Point]:
    """Every job of a study, seed by seed, so that an unfinished sweep has whole comparisons."""
    settings, sized, ours = (_parsed(asked, words) for words in (study.settings, study.scales[scale], given))
    swept = _parsed(asked, [f"{key}={value}" for key, value in params.items() if key != "arm"])
    fixed = {o.key_or_group: o for o in (*settings, *sized) if not o.is_sweep_override()}
    points = {o.key_or_group for o in swept}
    wide = _by_key([*swept, *(o for o in (*settings, *sized) if o.is_sweep_override() or o.key_or_group in points)])
    typed = _by_key(o for o in ours if o.key_or_group != "arm")
    chosen = [str(o.input_line).partition("=")[2] for o in ours if o.key_or_group == "arm"]
    arms = _arms(study, chosen[-1] if chosen else params["arm"])
    refuse(list(_taken(study, arms, {**wide, **typed})))
    grid = wide | typed
    count(asked, list(grid.values()), len(arms))
    found = []
    for point in itertools.product(*([(key, value) for value in values(o)] for key, o in _seed_first(grid).items())):
        for arm in arms:
            at = dict(point)
            own = _by_key(_parsed(asked, study.arms[arm]))
            words = {k: str(o.input_line) for k, o in {**fixed, **own}.items() if k not in at}
            words |= {key: f"{grid[key].get_key_element()}={value}" for key, value in at.items()}
            apart = [words[key] for key in at if key != "seed" and len(values(grid[key])) > 1]
            seed = int(at["seed"]) if at.get("seed", "0").isdecimal() else 0
            label = " ".join([arm, *apart])
            found.append(Point(label, seed, list(words.values()), [f"arm={arm}", *apart, f"seed={seed}"]))
    return found


def _parsed(asked: Asked, words: list[str]) -> list[Override]:
    return told(lambda: parsed(asked.app, words), asked.app, asked.config_name, words)


def _by_key(overrides) -> dict[str, Override]:
    return {o.key_or_group: o for o in overrides}


def _seed_first(grid: dict[str, Override]) -> dict[str, Override]:
    return {key: grid[key] for key in sorted(grid, key=lambda key: key != "seed")}


def _arms(study: Study, text: str) -> list[str]:
    """The arms of `a,b`; all of them for `*`."""
    names = [name.strip() for name in text.strip("'\"[]").split(",")]
    if names == ["*"]:
        return list(study.arms)
    unknown = [name for name in names if name not in study.arms]
    refuse([f"arm={name}: this study has none of this name{nearest(name, study.arms)}" for name in unknown])
    return list(dict.fromkeys(names))


def _taken(study: Study, arms: list[str], keys: Mapping[str, Override]):
    """Keys of the grid or the command line that make the arms what they are."""
    for key, override in keys.items():
        if owner := [arm for arm in arms if key in map(key_of, study.arms[arm])]:
            yield f"{override.input_line}: arm {owner[0]} sets {key} itself; choose arms with arm="
