"""A damaged or a foreign checkpoint: one line, and the run goes on from the one before with the same numbers."""

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from command import moe_lab
from runs import STATEFUL, assert_same_run, dying_before, result
from safetensors.torch import load_file, save_file
from tiny import tiny

from moe_lab.checkpoint import FILES, damage
from moe_lab.run import Stop
from moe_lab.train import train

SHAPE = ("steps=9", "log_every=2", "eval_every=4", "checkpoint.every=3")
NEWEST = "step-00000006"  # of a run that died after update 7


@cache
def config() -> dict[str, Any]:
    return tiny(*STATEFUL, *SHAPE)


def go(folder: Path) -> None:
    train(copy.deepcopy(config()), folder, [], {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    go(folder)
    return result(folder)


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("died")
    with dying_before(8):
        go(folder)
    return folder


@pytest.fixture
def half(died: Path, tmp_path: Path) -> Path:
    return shutil.copytree(died, tmp_path / "run")


def write(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def cut(part: float) -> Callable[[Path], None]:
    return lambda path: write(path, lambda b: b[: int(part * len(b)) if part != 1 else 1])


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def zeroed(path: Path) -> None:
    write(path, lambda b: b"\0" * min(4096, len(b)) + b[4096:])


HOW: dict[str, Callable[[Path], None]] = {
    "empty": cut(0),
    "one byte": cut(1),
    "half": cut(0.5),
    "99 %": cut(0.99),
    "4 KiB of zeros": zeroed,
    "dangling link": dangling,
    "missing": Path.unlink,
    "a folder": folder_instead,
}


def falls_back(run: Path, whole: dict[str, bytes], caplog: pytest.LogCaptureFixture) -> str:
    """Go on; the one line that it cost."""
    caplog.clear()
    go(run)
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert f"{NEWEST} is damaged" in said and "trying the one before" in said and "\n" not in said
    assert_same_run(run, whole)
    return said


@pytest.mark.parametrize("how", HOW)
def test_damage_falls_back(how: str, half: Path, whole: dict[str, bytes], caplog: pytest.LogCaptureFixture) -> None:
    """Each kind of damage, each time to another file of the checkpoint."""
    names = sorted([*FILES, "manifest.json"])
    HOW[how](half / "checkpoints" / NEWEST / names[list(HOW).index(how) % len(names)])
    falls_back(half, whole, caplog)


@pytest.mark.parametrize("how", HOW)
def test_damage_to_any_file_is_found(how: str, half: Path) -> None:
    for name in (*FILES, "manifest.json"):
        path = shutil.copytree(half / "checkpoints" / NEWEST, half / "checkpoints" / f"{name}-" / NEWEST)
        HOW[how](path / name)
        assert damage(path), name


def test_a_flipped_bit_is_found_wherever_it_is(half: Path) -> None:
    path = half / "checkpoints" / NEWEST
    rng = random.Random(0)
    for name in (*FILES, "manifest.json"):
        content = (path / name).read_bytes()
        for at in [0, len(content) - 1, *rng.sample(range(len(content)), 40)]:
            flipped = bytearray(content)
            flipped[at] ^= 1 << rng.randrange(7)  # the eighth is another way to write nothing in a text
            (path / name).write_bytes(flipped)
            assert damage(path), f"{name} at {at}"
        (path / name).write_bytes(content)
    assert damage(path) is None


# --- whole, and yet not a checkpoint of this run


def sealed(path: Path) -> None:
    """Make the manifest match what stands there now."""
    said = {n: (path / n).read_bytes() for n in FILES}
    sums = {n: {"sha256": hashlib.sha256(b).hexdigest(), "bytes": len(b)} for n, b in said.items()}
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"files": sums}))


def tensor(kind: str, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        held = load_file(path / f"{kind}.safetensors")
        held[name] = change(held[name]).contiguous()
        save_file(held, path / f"{kind}.safetensors")

    return edit


def renamed(kind: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        held = load_file(path / f"{kind}.safetensors")
        held[new] = held.pop(old)
        save_file(held, path / f"{kind}.safetensors")

    return edit


def values(**new: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        held = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({k: v for k, v in (held | new).items() if v != "gone"}))

    return edit


def filled(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: torch.full_like(t, number)


FOREIGN: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights of other shapes": (tensor("model", "embed", lambda t: t[:5]), "embed"),
    "weights of other names": (renamed("model", "embed", "embedding"), "embed"),
    "weights of another kind": (tensor("model", "embed", torch.Tensor.half), "embed"),
    "NaN in the weights": (tensor("model", "embed", filled(float("nan"))), "embed is not finite"),
    "infinite moments": (tensor("optimizer", "embed.exp_avg", filled(float("inf"))), "embed.exp_avg is not finite"),
    "moments of other shapes": (tensor("optimizer", "embed.exp_avg", lambda t: t[:1]), "does not fit this run"),
    "moments of nothing": (renamed("optimizer", "embed.exp_avg", "nothing.exp_avg"), "does not fit this run"),
    "moments without a number": (renamed("optimizer", "embed.exp_avg", "x"), "does not fit this run"),
    "sums that would stretch": (tensor("state", "sums", lambda t: t[:1]), "sums"),
    "no sums": (renamed("state", "sums", "summs"), "sums"),
    "nothing in state.json": (values(tokens="gone", last_row="gone"), "does not fit this run"),
    "text for a number": (values(tokens="many"), "does not fit this run"),
    "no rows": (values(metrics_bytes=None), "state.json"),
    "rows of another run": (values(metrics_sha256="0" * 64), "metrics.jsonl"),
    "more rows than there are": (values(metrics_bytes=10**9), "rows are missing"),
    "no tensors at all": (lambda path: write(path / "model.safetensors", lambda b: b"PK" + b[2:]), ""),
    "a header without end": (lambda path: write(path / "state.safetensors", lambda b: b"\xff" * 8 + b[8:]), ""),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_checkpoint_falls_back(
    name: str, half: Path, whole: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    edit, told = FOREIGN[name]
    edit(half / "checkpoints" / NEWEST)
    sealed(half / "checkpoints" / NEWEST)
    assert told in falls_back(half, whole, caplog)


def test_no_checkpoint_left(half: Path) -> None:
    """Exit code 4 and nothing changed, whether damaged or foreign."""
    for path in (half / "checkpoints").iterdir():
        tensor("model", "embed", lambda t: t[:5])(path)
        sealed(path)
    (half / "checkpoints" / NEWEST / "manifest.json").unlink()
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file() and path.name != "train.log"}
    with pytest.raises(Stop, match="every checkpoint is damaged") as stop:
        go(half)
    assert stop.value.code == 4
    (half / "env.json").write_text(json.dumps(json.loads((half / "env.json").read_text()) | {"choices": {}}))
    before[half / "env.json"] = (half / "env.json").read_bytes()
    said = moe_lab("train", f"resume={half}")
    assert said.code == 4 and "every checkpoint is damaged" in said.err.splitlines()[-1]
    assert "Traceback" not in said.err
    assert {path: path.read_bytes() for path in before} == before


def test_checkpoints_beyond_are_removed_with_the_next(half: Path, whole: dict[str, bytes]) -> None:
    """A damaged one that is not reached again must not count as one of the two that are kept."""
    (half / "checkpoints" / NEWEST / "manifest.json").unlink()
    cfg = copy.deepcopy(config())
    train(cfg | {"checkpoint": {"every": 4, "keep": 2}}, half, [], {})
    assert sorted(path.name for path in (half / "checkpoints").iterdir()) == ["step-00000008", "step-00000009"]
    assert (half / "metrics.jsonl").read_bytes() == whole["metrics.jsonl"]


def test_two_checkpoints_are_kept(died: Path) -> None:
    """The default, and at every moment after the second one."""
    assert tiny()["checkpoint"]["keep"] == 2
    assert len(list((died / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_are_kept_as_asked_for(keep: int, half: Path) -> None:
    train(copy.deepcopy(config()) | {"checkpoint": {"every": 1, "keep": keep}}, half, [], {})
    names = sorted(path.name for path in (half / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in range(10 - keep, 10)]
