"""Plants one error at a time and demands that a test turns red: `make mutants`, or this file with names of lists.

    python tests/mutants/run.py [LIST ...]      LIST: existing for tests/mutants/existing.toml; all when left out

Each `[[mutant]]` of a list says `what` is wrong in words, the `file`, its `old` text (which occurs there exactly once),
the `new` text with the error, and the `tests` of which at least one must notice. All happens in copies of the tree in a
temporary folder. First the tests run without an error, and must pass; then each mutant must end in a failed assertion
(pytest's exit code 1). A copy that cannot even be collected proves nothing: that mutant is broken.
"""

import argparse
import ast
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[2]
LEFT_OUT = (".git", ".venv", ".whl", "outputs", "wandb", "build", "dist", "__pycache__", "*.pyc", ".*_cache")
TIMEOUT = 300  # seconds for one mutant; the run without an error gets as much for each


@dataclass(frozen=True)
class Mutant:
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    verdict: str  # caught, SURVIVED, BROKEN
    said: str  # the test that noticed, or the end of what pytest said
    seconds: float


def lists(root: Path = ROOT) -> list[Path]:
    return sorted((root / "tests/mutants").glob("*.toml"))


def read(path: Path) -> list[Mutant]:
    """The mutants of a list. ValueError where an entry has other keys than those of Mutant, or other types."""
    names = {field.name for field in fields(Mutant)}
    found = []
    for i, entry in enumerate(tomllib.loads(path.read_text()).get("mutant", []), 1):
        if set(entry) != names:
            raise ValueError(f"{path.name} mutant {i}: has the keys {sorted(entry)}, needs {sorted(names)}")
        if not isinstance(entry["tests"], list) or not all(isinstance(entry[name], str) for name in names - {"tests"}):
            raise ValueError(f"{path.name} mutant {i}: tests is a list, all else is text")
        found.append(Mutant(**entry | {"tests": tuple(entry["tests"])}))
    return found


def problems(mutant: Mutant, root: Path = ROOT) -> list[str]:
    """What has rotted: the text that it changes is gone or stands twice, or a test has another name now."""
    found = [] if mutant.tests else [f"{mutant.what}: names no test"]
    text = (root / mutant.file).read_text() if (root / mutant.file).is_file() else ""
    if (n := text.count(mutant.old)) != 1:
        found.append(f"{mutant.what}: the old text occurs {n} times in {mutant.file}")
    if mutant.new == mutant.old:
        found.append(f"{mutant.what}: changes nothing")
    for test in mutant.tests:
        file, _, function = test.partition("[")[0].partition("::")
        there = _functions(root / file) if (root / file).is_file() else set()
        if not there or (function and function not in there):
            found.append(f"{mutant.what}: there is no test {test}")
    return found


def _functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def pytest(tree: Path, tests: tuple[str, ...], timeout: float) -> tuple[int | None, str]:
    """Exit code (None: out of time) and output of these tests on a copy; it imports from the copy alone."""
    env = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",  # a bytecode file is told from its source by size and whole second
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *tests]
    with subprocess.Popen(
        words, cwd=tree, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=timeout)
            return process.returncode, said
        except subprocess.TimeoutExpired:
            return None, f"no answer in {timeout:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what the tests started too


def plant(mutant: Mutant, tree: Path, timeout: float = TIMEOUT) -> Found:
    """Run the mutant's tests on a copy that has its error, and take the error out again."""
    path, start = tree / mutant.file, time.monotonic()
    whole = path.read_text()
    path.write_text(whole.replace(mutant.old, mutant.new))
    try:
        code, said = pytest(tree, mutant.tests, timeout)
    finally:
        path.write_text(whole)
    verdict = {0: "SURVIVED", 1: "caught"}.get(code if code is not None else -1, "BROKEN")
    told = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))] or said.splitlines()[-1:]
    return Found(verdict, told[0] if told else "", time.monotonic() - start)


def run(mutants: list[Mutant], root: Path = ROOT, jobs: int = 1) -> Iterator[tuple[Mutant, Found]]:
    """Every mutant with what became of it, in order. ValueError where its tests fail without any error."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for i in range(jobs):
            trees.put(shutil.copytree(root, Path(folder, str(i)), ignore=shutil.ignore_patterns(*LEFT_OUT)))

        def one(mutant: Mutant) -> Found:
            tree = trees.get()
            try:
                return plant(mutant, tree)
            finally:
                trees.put(tree)

        tree = trees.get()
        tests = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        code, said = pytest(tree, tests, TIMEOUT * len(mutants))
        if code != 0:
            raise ValueError(f"without an error these tests must pass, and do not:\n{said}")
        trees.put(tree)
        with ThreadPoolExecutor(jobs) as pool:
            yield from zip(mutants, pool.map(one, mutants), strict=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Plant one error at a time and see a test turn red.")
    parser.add_argument("lists", nargs="*", metavar="LIST", help=", ".join(path.stem for path in lists()))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at the same time (default: all cores)")
    asked = parser.parse_args(argv)
    there = {path.stem: path for path in lists()}
    if unknown := set(asked.lists) - set(there):
        parser.error(f"no such list: {', '.join(sorted(unknown))}; there are: {', '.join(there)}")
    mutants = [mutant for name in asked.lists or there for mutant in read(there[name])]
    if rotten := [line for mutant in mutants for line in problems(mutant)]:
        print(*rotten, sep="\n")
        return 1
    print(f"{len(mutants)} mutants; first their tests without an error", flush=True)
    escaped, start = 0, time.monotonic()
    try:
        for mutant, found in run(mutants, jobs=asked.jobs):
            escaped += found.verdict != "caught"
            print(f"{found.verdict:<9}{found.seconds:5.0f} s  {mutant.file}: {mutant.what}")
            print(f"{'':18}{found.said}", flush=True)
    except ValueError as error:
        print(error)
        return 1
    print(f"{len(mutants) - escaped} of {len(mutants)} caught in {time.monotonic() - start:.0f} s")
    return int(escaped > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
