"""Made-up results of a made-up study, for tests of the judge: no file is written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_lab.recorded import Recorded
from moe_lab.study.files import Claim, Study, claims_sha256
from moe_lab.study.folder import Job, Sweep
from moe_lab.study.results import Result, Results

METRIC = "eval/moe/max_vio"


def claim(**of: Any) -> Claim:
    """A claim about METRIC, of arm a or of a against b."""
    of = {"says": "so it is", "source": "made up", "metric": METRIC, **of}
    return Claim(**of if "arm" in of or "compare" in of else {**of, "compare": ["a", "b"]})


def study(*claims: Claim) -> Study:
    return Study(question="Is it so?", source="made up", arms={"a": [], "b": []}, scales={}, claims=list(claims))


def run(*rows: dict[str, Any]) -> Recorded:
    """Rows of steps 10, 20, ... where they do not say it."""
    numbered = [{"step": 10 * i, **row} for i, row in enumerate(rows, 1)]
    return Recorded(Path("made-up"), {}, {}, {}, {}, numbered, [])


def results(
    of: Study, arms: Mapping[str, Sequence[Any]], states: Mapping[tuple[str, int], str] | None = None
) -> Results:
    """A run per arm and seed, whose one row holds that value as METRIC, or is that row."""
    found = []
    for arm, values in arms.items():
        for seed, value in enumerate(values):
            row = value if isinstance(value, dict) else {METRIC: value}
            state = (states or {}).get((arm, seed), "completed")
            job = Job(arm, seed, [], f"{arm}-{seed}")
            found.append(Result(job, run(row), state, None, claims_sha256(of), "sources"))
    return Results(Sweep(Path("made-up"), "made up", None, of, [r.job for r in found], ""), found, [])
