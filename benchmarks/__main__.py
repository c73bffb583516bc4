"""`python -m benchmarks [name ...]`: run them, each in a process of its own, and print what they measured."""

import os
import subprocess
import sys

from benchmarks.harness import surroundings

EACH = (
    "layer",
    "methods",
    "memory",
    "step",
    "diagnostics",
    "startup",
    "sharing",
    "graph",
    "mirror",
    "reinforce",
    "report",
)


def main(names: list[str]) -> int:
    print(surroundings(), flush=True)
    failed = 0
    for name in names or EACH:
        print(f"\n== {name}", flush=True)
        # As the command line sets them, for every variant alike; huge pages have to be asked for before torch starts.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1"}
        failed |= subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False, env=environment).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
