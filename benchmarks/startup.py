"""CPU seconds of commands as a shell starts them, their child processes included.

The first training step is a whole run of one update, so that its figure also holds an evaluation of one batch, a
checkpoint and the summary. The token cache is warm: the round before the first one builds it.
"""

import os
import resource
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import AA, goal, interleave

ROUNDS = 7
STEP = "moe-lab train steps=1 eval_tokens=1 logger=[]"
WANDB = "moe-lab train steps=1 eval_tokens=1 wandb.mode=offline"
COMMANDS = {  # and the most CPU seconds that each may take
    "python -c ''": None,
    "python -c 'import torch'": None,
    "python -c 'import torch._dynamo'": None,  # what building an optimiser of torch.optim imports
    "moe-lab --help": 0.1,
    "moe-lab list": None,
    "moe-lab train --help": None,
    "moe-lab train routr=topk": None,
    STEP: 5.0,
    WANDB: None,
}
WANDB_ADDS = 2.0
MISTAKES = {"moe-lab train routr=topk": 2}  # exit codes other than 0


def command(line: str, folder: str) -> None:
    """Run a command to its end with the programs of this Python's environment."""
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": search, "MOE_LAB_CACHE": f"{folder}/cache"}
    words = shlex.split(line)
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != MISTAKES.get(line, 0):
        raise SystemExit(f"{line}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        calls = {line: lambda line=line: command(line, folder) for line in COMMANDS}
        timings = {t.name: t for t in interleave(calls, STEP, ROUNDS, clock=children_seconds)}
    width = max(map(len, timings))
    for name, t in timings.items():
        most = COMMANDS.get(name)
        print(f"  {name:<{width}}  {t.seconds:6.3f} s" + ("" if most is None else goal(t.seconds, most, " s")))
    added, twice = (timings[name].seconds - timings[STEP].seconds for name in (WANDB, AA))
    print(f"  W&B adds {added:.3f} s (A/A {twice:+.3f} s)" + goal(added, WANDB_ADDS, " s"))


if __name__ == "__main__":
    main()
