"""What the shipped studies came to, for the repository: `make studies` runs them and writes docs/results.

python -m benchmarks.studies FOLDER ... writes, for each sweep folder, docs/results/NAME.md (the command, the machine,
the time, the verdicts and the report), its pictures with few colours, NAME.csv (a row per run), NAME.json (the
verdicts, for `moe-lab check DIR --expect docs/results/NAME.json`), and docs/results/README.md, a table of all there is.
"""

import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.harness import surroundings
from moe_lab.cli import main
from moe_lab.reading import rows
from moe_lab.study.results import Results, load

HERE = Path(__file__).parents[1] / "docs/results"
PICTURES = ("load", "balance", "frontier")


def moe_lab(*words: str) -> str:
    """What a command prints; it must succeed."""
    sys.argv = ["moe-lab", *words]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main() == 0, words
    return out.getvalue()


def minutes(found: Results) -> float:
    """From the first job's beginning to the last one's end."""
    clocks = [rows(found.sweep.folder / result.job.dir / "timing.jsonl") for result in found.results]
    began = min(first["time"] - first["elapsed"] for first, *_ in clocks)
    return (max(last["time"] for *_, last in clocks) - began) / 60


def write(folder: Path) -> dict[str, Any]:
    """One study's files; the line that stands for it in the table."""
    found = load(folder)
    assert not found.notes, found.notes  # one version of the sources, the claims as they were, every run completed
    name, (sources,) = found.sweep.name, {result.sources for result in found.results}
    verdicts = json.loads(moe_lab("check", str(folder), "--json"))
    verdicts["studies"][0]["folder"] = str(folder)
    with tempfile.TemporaryDirectory() as out:
        moe_lab("report", str(folder), "--out", out)
        report = (Path(out) / "report.md").read_text()
        (HERE / f"{name}.csv").write_bytes((Path(out) / "summary.csv").read_bytes())
        for picture in PICTURES:
            with Image.open(Path(out) / "figures" / f"{name}-{picture}.png") as image:
                image.convert("RGB").quantize(64).save(HERE / f"{name}-{picture}.png", optimize=True)
    (HERE / f"{name}.json").write_text(json.dumps(verdicts, indent=1) + "\n")
    line = {
        "study": name,
        "runs": len(found.results),
        "minutes": round(minutes(found), 1),
        "sources": sources,
        "verdicts": [verdict["verdict"] for verdict in verdicts["studies"][0]["verdicts"]],
    }
    head = f"`{found.sweep.command}`, {line['runs']} runs in {line['minutes']} minutes, sources {sources}\n\n"
    (HERE / f"{name}.md").write_text(head + f"```\n{surroundings()}\n```\n\n" + _with_its_pictures(report, name))
    return line


def _with_its_pictures(report: str, name: str) -> str:
    """The report with the pictures that are kept here; the others are in the page that `moe-lab report` makes."""
    kept = [f"figures/{name}-{picture}.png" for picture in PICTURES]
    told = re.sub(r"!\[[^\]]*\]\(([^)]*)\)\n*", lambda m: m[0] if m[1] in kept else "", report)
    return told.replace("(figures/", "(")


def table() -> None:
    """README.md over all results that are there; the lines are read back from them."""
    lines = []
    for path in sorted(HERE.glob("*.json")):
        told = re.match(r"`(.*)`, (\d+) runs in ([\d.]+) minutes, sources (\w+)", path.with_suffix(".md").read_text())
        assert told is not None, path
        found = [verdict["verdict"] for verdict in json.loads(path.read_text())["studies"][0]["verdicts"]]
        counts = " | ".join(str(found.count(word)) for word in ("supported", "refuted", "inconclusive"))
        lines.append(f"| [{path.stem}]({path.stem}.md) | {told[2]} | {told[3]} | {counts} | {told[4]} |")
    (HERE / "README.md").write_text("\n".join([HEAD, *lines, ""]))


HEAD = """# Results
What the studies of [sweeps/](../../sweeps) came to at `scale=cpu`, as `make studies` wrote it. What they ask and what
such small models can show: [studies.md](../studies.md). How claims are judged: [judging.md](../judging.md).

| study | runs | minutes | supported | refuted | inconclusive | sources |
|---|---|---|---|---|---|---|"""

if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for told in sys.argv[1:]:
        print(write(Path(told)))
    table()
