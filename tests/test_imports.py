"""Imports run one way (DESIGN, section 2), and what only reads text imports nothing heavy."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moe_lab"
HEAVY = {"torch", "wandb", "datasets", "transformers", "pandas", "numpy"}

# What each part (a module or folder of moe_lab) may import of ours, in the order in which they build on each other.
MAY: dict[str, set[str]] = {
    "secrecy": set(),
    "allocator": set(),
    "slurm": set(),
    "wording": set(),
    "config": {"secrecy", "wording"},
    "seeding": set(),
    "durable": set(),
    "reading": set(),
    "places": set(),
    "presets": set(),
    "sources": {"presets"},
    "run": {"durable", "places", "reading", "secrecy", "sources", "slurm"},
    "checkpoint": {"durable", "reading"},
    "counting": set(),
    "precise": set(),
    "scores": set(),
    "plans": {"counting"},
    "rows": {"plans"},
    "slots": {"counting", "plans"},
    "context": {"plans", "rows", "slots"},
    "assignment": set(),
    "traits": set(),
    "sizes": set(),
    "settings": {"config"},
    "schedules": {"config"},
    "routing": {"context", "plans", "precise", "rows", "schedules", "scores", "seeding", "sizes", "slots", "traits"},
    "optim": {"config"},
    "objectives": {"config"},
    "routers": {
        *("assignment", "config", "plans", "precise", "routing", "schedules", "scores", "seeding", "sizes", "slots"),
    },
    "explore": {"config", "plans", "routing", "schedules", "sizes"},
    "model": {"config", "plans", "routing", "schedules", "seeding", "sizes"},
    "balance": {"config", "counting", "model", "plans", "routing", "schedules", "sizes"},
    "upkeep": {"balance", "model", "schedules"},
    "conventions": set(),
    "worth": {"balance", "config", "conventions", "model", "routing", "seeding"},
    "datasets": {"config", "durable", "reading", "seeding"},
    "sinks": {"config", "durable", "reading", "secrecy"},
    "observe": {"config", "counting", "plans", "routing", "model"},
    "probes": {"routing", "model"},
    "parts": {"balance", "datasets", "explore", "model", "objectives", "optim", "schedules", "settings"},
    "drawing": {"balance", "explore", "model", "parts", "routing", "schedules", "seeding"},
    "loop": {
        *("balance", "drawing", "model", "observe", "parts", "routing", "schedules", "seeding", "upkeep"),
    },
    "cost": {"model", "parts"},
    "evaluate": {"drawing", "loop", "observe", "parts", "probes", "schedules", "seeding"},
    "assemble": {"config", "settings", "model", "objectives", "parts", "seeding", "datasets"},
    "state": {"checkpoint", "evaluate", "loop", "reading"},
    "train": {
        *("run", "checkpoint", "state", "config", "settings", "assemble", "loop", "evaluate", "cost", "observe"),
        *("allocator", "parts", "sinks", "reading", "secrecy"),
    },
    "loading": {"reading", "run", "checkpoint", "assemble", "config", "datasets", "drawing", "model"},
    "recorded": {"reading"},
    "replay": {"config", "reading", "recorded", "secrecy", "sinks"},
    "workspace": set(),
    "naming": {"run", "secrecy", "settings"},
    "mistakes": {"config", "presets", "secrecy"},
    "hydra_app": {"config", "presets", "naming", "mistakes", "places", "secrecy"},
    "hydra_jobs": {"config", "hydra_app", "naming", "places"},
    "cli": {"secrecy"},
    "study": {
        *("assemble", "cli", "config", "cost", "durable", "hydra_app", "hydra_jobs", "naming", "places", "presets"),
        *("observe", "reading", "recorded", "run", "secrecy", "settings", "slurm", "sources", "wording"),
    },
    "methods": {"config", "presets", "traits"},
    "spreadsheet": {"cli"},
    "report": {"cli", "durable", "reading", "recorded", "secrecy", "spreadsheet", "study"},
    "completion": {"cli", "presets"},
    "verbs": {
        *("cli", "config", "presets", "naming", "hydra_app", "hydra_jobs", "recorded", "run", "train", "checkpoint"),
        *("assemble", "sinks", "reading", "places", "secrecy", "methods", "conventions", "worth", "study"),
        *("replay", "workspace"),
        *("report", "slurm", "spreadsheet"),
    },
    "__main__": {"cli"},
    "__init__": {"loading"},
}


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """The parts of moe_lab that a file imports anywhere, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        inside = [name.split(".")[1] for name in names if name.startswith("moe_lab.")]
        found |= {name for name in inside if name in MAY or (PACKAGE / name).is_dir()}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in MAY, f"say in MAY what {part} may import"
    assert imported_parts(path) - {part} <= MAY[part]


def test_the_table_itself_has_no_circle() -> None:
    done: set[str] = set()
    for part, may in MAY.items():
        assert may <= done, f"{part} may import {may - done}, which stand below it"
        done.add(part)


def test_every_part_is_there() -> None:
    assert {part_of(path) for path in PACKAGE.rglob("*.py")} == set(MAY)


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "--version",
        "list",
        "list router",
        "train --help",
        "losses --help",
        "check --help",
        "sync --help",
        "dashboard --help",
        "train --cfg job --resolve",
        "train --info searchpath",
        "train routr=topk",
        "-sc query=bash",
    ],
)
def test_what_only_reads_text_imports_nothing_heavy(line: str, tmp_path: Path) -> None:
    code = f"""
import sys
sys.argv = ["moe-lab", *{line.split()!r}]
from moe_lab.cli import main
try:
    main()
finally:
    print("\\nheavy:", *sorted({HEAVY!r} & set(sys.modules)))
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "COMP_LINE": "moe-lab train router="}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.splitlines()[-1] == "heavy:", done.stdout + done.stderr
    assert len(done.stdout) > 20 or done.stderr


def test_training_imports_neither_the_compiler_nor_what_others_need(tmp_path: Path) -> None:
    """torch._dynamo and sympy are half of the start, and come with the first torch.optim optimiser that is built."""
    code = """
import sys
from moe_lab.cli import main
words = "train dataset=clusters logger=[] steps=2 batch_size=2 seq_len=16 eval_tokens=32 model.layers=1 model.dim=32"
sys.argv = ["moe-lab", *words.split()]
assert main() == 0
unneeded = {"torch._dynamo", "torch._inductor", "sympy", "networkx", "wandb", "datasets", "transformers", "pandas"}
assert "torch" in sys.modules and not unneeded & set(sys.modules), unneeded & set(sys.modules)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "completed after 2 steps" in done.stdout


def test_help_and_completion_do_not_even_import_hydra(tmp_path: Path) -> None:
    code = """
import sys
from moe_lab.cli import main
for words in (["--help"], ["train", "--help"], ["-sc", "query=bash"]):
    sys.argv = ["moe-lab", *words]
    assert main() == 0
assert not {"hydra", "omegaconf", "pydantic", "yaml", "rich"} & set(sys.modules), sys.modules.keys()
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "COMP_LINE": "moe-lab train router="}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path, env=env)
