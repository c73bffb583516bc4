"""The list of planted errors does not rot, and its runner tells caught from survived. `make mutants` runs the list."""

from dataclasses import replace
from pathlib import Path

import pytest
from mutants import run
from mutants.run import Mutant


@pytest.mark.parametrize("path", run.lists(), ids=lambda path: path.stem)
def test_every_mutant_still_fits(path: Path) -> None:
    mutants = run.read(path)
    assert mutants
    assert [line for mutant in mutants for line in run.problems(mutant)] == []


def test_no_two_mutants_plant_the_same_error() -> None:
    planted = [(mutant.file, mutant.old, mutant.new) for path in run.lists() for mutant in run.read(path)]
    assert len(planted) == len(set(planted))


CODE = "def double(x):\n    return 2 * x\n"
TESTS = "from code_of import double\n\ndef test_zero():\n    assert double(0) == 0\n\n"
TESTS += "def test_three():\n    assert double(3) == 6\n"
GOOD = Mutant("adds in double", "code_of.py", "2 * x", "2 + x", ("tests/test_code.py::test_three",))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project of one function and two tests."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "code_of.py").write_text(CODE)
    (tmp_path / "tests/test_code.py").write_text(TESTS)
    return tmp_path


def test_the_runner_tells_caught_survived_and_broken(tree: Path) -> None:
    mutants = [
        GOOD,
        replace(GOOD, what="unnoticed at zero", new="3 * x", tests=("tests/test_code.py::test_zero",)),
        replace(GOOD, what="no Python", new="2 * x)"),
        replace(GOOD, what="of the same size as the first", new="3 * x"),  # within a second: no stale bytecode
    ]
    found = dict(run.run(mutants, tree))
    assert [f.verdict for f in found.values()] == ["caught", "SURVIVED", "BROKEN", "caught"]
    assert "test_three" in found[GOOD].said
    assert (tree / "code_of.py").read_text() == CODE


def test_a_mutant_that_hangs_is_no_proof(tree: Path) -> None:
    assert run.plant(replace(GOOD, new="[0 for _ in iter(int, 1)]"), tree, timeout=3).verdict == "BROKEN"


def test_tests_that_fail_without_an_error_prove_nothing(tree: Path) -> None:
    (tree / "code_of.py").write_text(CODE.replace("2", "5"))
    with pytest.raises(ValueError, match="must pass"):
        list(run.run([replace(GOOD, old="5 * x")], tree))


def test_what_has_rotted_is_told(tree: Path) -> None:
    assert run.problems(GOOD, tree) == []
    for change in (
        {"old": "4 * x"},
        {"old": "x"},  # stands twice
        {"new": "2 * x"},
        {"file": "gone.py"},
        {"tests": ()},
        {"tests": ("tests/test_code.py::test_four",)},
        {"tests": ("tests/test_gone.py",)},
    ):
        assert len(run.problems(replace(GOOD, **change), tree)) == 1, change
    (tree / "list.toml").write_text('[[mutant]]\nwhat = "half an entry"\n')
    with pytest.raises(ValueError, match="needs"):
        run.read(tree / "list.toml")
