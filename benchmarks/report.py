"""CPU seconds, megabytes and bytes of the report of a hundred runs: twenty arms of five seeds, copies of one real run.

As many rows as a study of scale=cpu writes; each copy has a seed and a router of its own in its config.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks.harness import goal

ARMS, SEEDS, STEPS = 20, 5, 400
RUN = "dataset=clusters logger=[] model.dim=32 model.heads=2 experts.width=32 batch_size=4 seq_len=32 eval_tokens=2048"


def command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "moe_lab", *words], check=True, capture_output=True)


def copies(run: Path, folder: Path) -> None:
    """Runs that differ in a number of their config, and in nothing that they wrote."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for arm in range(ARMS):
        for seed in range(SEEDS):
            copy = folder / f"{arm}-{seed}"
            shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "*.log"))
            changed = config | {"seed": seed, "optim": config["optim"] | {"lr": 0.001 * (arm + 1)}}
            (copy / "config.yaml").write_text(yaml.safe_dump(changed))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command("train", *RUN.split(), f"steps={STEPS}", f"hydra.run.dir={folder / 'run'}")
        copies(folder / "run", folder / "runs")
        before = os.times()
        command("report", str(folder / "runs"))
        after = os.times()
        seconds = after.children_user + after.children_system - before.children_user - before.children_system
        page = (folder / "runs" / "report" / "report.html").stat().st_size / 1e6
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"  report of {ARMS * SEEDS} runs: {seconds:5.1f} s of CPU{goal(seconds, 20, ' s')}")
    print(f"  its page: {page:.2f} MB{goal(page, 3, ' MB')}")
    print(f"  most memory: {peak:,.0f} MiB (of the training before it, or of the report)")


if __name__ == "__main__":
    main()
