"""docs/methods.md and the README's table say what there is, and what checks it; `moe-lab list router --traits`."""

import inspect
import re
from pathlib import Path

import pytest
from command import moe_lab
from mutants import run

from moe_lab import methods
from moe_lab.config import registered

ROOT = Path(__file__).parents[1]


def test_pages_are_up_to_date() -> None:
    assert (ROOT / "docs/methods.md").read_text() == methods.page(), "run: python -m moe_lab.methods"
    readme = (ROOT / "README.md").read_text()
    assert methods.START in readme and readme == methods.readme(readme), "run: python -m moe_lab.methods"


@pytest.mark.parametrize("group", methods.GROUPS)
def test_every_method_says_how_it_was_checked(group: str) -> None:
    entries = methods.checked()[group]
    assert list(entries) == sorted(entries) == methods.names(group)
    for name, entry in entries.items():
        assert set(entry) == {"against", "tests"} and len(entry["against"]) > 15 and entry["tests"], name
        texts = [(ROOT / test).read_text() for test in entry["tests"]]
        assert any(name in text for text in texts), f"none of {entry['tests']} names {name}"


@pytest.mark.parametrize("group", methods.GROUPS)
def test_every_method_has_a_planted_error(group: str) -> None:
    """An entry of tests/mutants that begins with the method's name, in its own file or one that it builds on: a router
    and a balance loss may have the same name."""
    planted = {(re.split("[:,]", m.what)[0], str(ROOT / m.file)) for path in run.lists() for m in run.read(path)}
    for name in methods.names(group):
        own = [cls for cls in registered(group)[name].__mro__ if cls.__module__.startswith("moe_lab")]
        files = {inspect.getfile(cls) for cls in own}
        assert planted & {(name, file) for file in files}, f"no entry of tests/mutants plants an error in {name}"


@pytest.mark.parametrize("group", methods.GROUPS)
def test_every_method_is_described(group: str) -> None:
    for name, cls in registered(group).items():
        assert cls.__doc__ and len(cls.__doc__) > 40, name


def test_the_traits_in_the_terminal() -> None:
    said = moe_lab("list", "router", "--traits")
    assert said.code == 0
    for name in methods.names("router"):
        (line,) = (line for line in said.out.splitlines() if line.split()[:1] == [name])
        assert line.split()[-1] == methods.row(name)[-1].split()[-1]
    assert "all are deterministic in evaluation" in " ".join(said.out.split())
    assert moe_lab("list", "balance", "--traits").code == 2
