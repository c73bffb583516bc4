"""A disk that is full, read-only or somebody else's: exit code 5, one line that names the path, nothing lost."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Fault
from processes import Ended, start
from runs import STATEFUL, assert_same_run, result

from moe_lab.checkpoint import newest

SHAPE = ("steps=24", "log_every=2", "eval_every=12", "checkpoint.every=10")
DATA = "dataset.tokens=150000"  # a byte for each, and one for its domain


def mounted(folder: Path, options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command here")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted(folder, "size=2m")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder / "run", folder)
    return result(folder / "run")


def run(folder: Path, home: Path) -> Ended:
    words = (*STATEFUL, *SHAPE, DATA, f"hydra.run.dir={folder}")
    return start(home.parent / "out", "train", *words, env={"MOE_LAB_CACHE": str(home / "cache")}).end()


def resume(folder: Path, home: Path) -> Ended:
    cache = {"MOE_LAB_CACHE": str(home / "cache")}
    return start(home.parent / "out", "train", f"resume={folder}", env=cache).end()


def fill(disk: Path, free: int) -> Path:
    """Leave so many bytes."""
    ballast = disk / "ballast"
    ballast.write_bytes(b"\0" * (shutil.disk_usage(disk).free - free))
    return ballast


def line(ended: Ended) -> str:
    """The one line of complaint."""
    assert ended.code == 5 and "Traceback" not in ended.said, ended.said
    (said,) = [line for line in ended.said.splitlines() if line.startswith("moe-lab: ")]
    return said


def test_full_while_data_is_prepared(disk: Path, undisturbed: dict[str, bytes]) -> None:
    ballast = fill(disk, 60_000)
    said = line(run(disk / "run", disk))
    assert said.startswith(f"moe-lab: {disk}/cache/") and said.endswith(": No space left on device")
    assert sorted(path.name for path in disk.iterdir()) == ["ballast", "cache"], "an empty run is left"
    assert list((disk / "cache").iterdir()) == [], "half a cache is left"
    ballast.unlink()
    assert run(disk / "run", disk).code == 0
    assert_same_run(disk / "run", undisturbed)


@pytest.mark.parametrize(
    "free, where, kept",
    [
        (8_000, "run/", None),
        (60_000, "run/", None),
        (150_000, "run/checkpoints/", None),
        (340_000, "run/checkpoints/", 10),
    ],
    ids=["beginning", "metrics", "first checkpoint", "second checkpoint"],
)
def test_full_while_it_trains(
    free: int, where: str, kept: int | None, disk: Path, undisturbed: dict[str, bytes]
) -> None:
    assert run(disk / "prepared", disk).code == 0  # the cache
    shutil.rmtree(disk / "prepared")
    ballast = fill(disk, free)
    said = line(run(disk / "run", disk))
    assert said.startswith(f"moe-lab: {disk}/{where}") and said.endswith(": No space left on device")
    found = newest(disk / "run/checkpoints")
    assert (found and found.step) == kept
    ballast.unlink()
    again = resume(disk / "run", disk) if (disk / "run/env.json").exists() else run(disk / "run", disk)
    assert again.code == 0, again.said
    assert_same_run(disk / "run", undisturbed)


def test_read_only(disk: Path, undisturbed: dict[str, bytes]) -> None:
    """A new run, one that has begun, one that is finished."""
    assert run(disk / "finished", disk).code == 0
    ballast = fill(disk, 340_000)
    assert run(disk / "half", disk).code == 5
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for ended in (run(disk / "new", disk), resume(disk / "half", disk)):
        assert "Read-only file system" in (said := line(ended)) and str(disk) in said
    assert resume(disk / "finished", disk).code == 0
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert resume(disk / "half", disk).code == 0
    assert_same_run(disk / "half", undisturbed)


def test_no_permission(tmp_path: Path) -> None:
    """Root may write anywhere: then the system's answer is made up."""
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o555)
    fault = None if os.getuid() else Fault(1, "EACCES")
    words = (*STATEFUL, *SHAPE, f"hydra.run.dir={folder}/run")
    said = line(start(tmp_path / "out", "train", *words, fault=fault).end())
    assert said == f"moe-lab: {folder}/run: Permission denied; output_dir= names another place for runs"
    assert list(folder.iterdir()) == []
