"""`moe-lab report DIR...`: what runs, sweeps and studies came to, as a page for people."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_lab import places
from moe_lab.cli import arguments, complain, printable, quiet_pipe
from moe_lab.reading import Damaged

ABOUT = """Write report.html (one file: no network, no script, light and dark, phone and print), report.md, summary.csv
and the figures as SVG and PNG. DIR is a sweep's folder, a run directory, or a folder of run directories; several make
one report, run directories as one study."""


def main(argv: list[str]) -> int:
    parser = arguments("report", ABOUT)
    parser.add_argument(
        "dirs", nargs="+", type=Path, metavar="DIR", help="a sweep's folder, a run, or a folder of runs"
    )
    parser.add_argument("--out", metavar="DIR", help="default: DIR/report; needed where there are several DIRs")
    asked = parser.parse_args(argv)
    if len(asked.dirs) > 1 and asked.out is None:
        return complain(["a report of several needs a place: --out DIR"])
    if problems := [] if asked.out is None else places.named("--out", asked.out):
        return complain(problems)
    out = asked.dirs[0] / "report" if asked.out is None else Path(asked.out)
    if link := next((p for p in (out, out / "figures") if p.is_symlink() and p != asked.out), None):
        return complain([f"{link}: is a link; say --out to write somewhere else"], 4)
    try:
        results = _loaded(asked.dirs)
    except ValueError as error:
        return complain([str(error)], 4 if isinstance(error, Damaged) else 2)
    judged = [_judged(found) for found in results]
    results, verdicts = [found for found, _ in judged], [verdicts for _, verdicts in judged]
    from moe_lab.report.write import report

    written = report(results, verdicts, out)
    quiet_pipe()
    runs, claims = sum(len(found.results) for found in results), sum(map(len, verdicts))
    print(f"{printable(str(written[0]))}: {runs} runs, {claims} claims, {written[0].stat().st_size / 1e6:.1f} MB")
    return 0


def _loaded(dirs: list[Path]) -> list[Any]:
    from moe_lab.study.folder import SWEEP
    from moe_lab.study.results import load, of_runs

    runs = [path for path in dirs if (path / "config.yaml").is_file() and not (path / SWEEP).exists()]
    return [load(path) for path in dirs if path not in runs] + ([of_runs(runs)] if runs else [])


def _judged(found: Any) -> tuple[Any, list[Any]]:
    """Results and their verdicts; a study that cannot be judged says so first."""
    if found.sweep.study is None or not found.sweep.study.claims:
        return found, []
    from moe_lab.study.judge import judge

    try:
        return found, judge(found.sweep.study, found)
    except ValueError as error:
        return replace(found, notes=[*found.notes, f"its claims cannot be judged: {error}"]), []
