"""What W&B gets is what metrics.jsonl holds, and nothing that goes wrong with W&B reaches the training."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import moe_lab
from made_rows import made_facts, made_rows, made_summary
from PIL import Image
from tiny import TINY, tiny
from wandb_reader import Recorded, read
from wandb_server import Server

from moe_lab.places import leads_out
from moe_lab.sinks import mirror
from moe_lab.sinks.account import has_key
from moe_lab.sinks.heatmap import ANCHORS, DEAD, heatmap
from moe_lab.sinks.upload import Upload
from moe_lab.sinks.wandb import Wandb, resolve_mode, scalars
from moe_lab.train import train

KEY = "a" * 40  # the right shape, known to nobody
LISTS = {
    "balance": {"switch": {"name": "switch", "weight": 0.01}},
    "explore": {"jitter": {"name": "jitter", "strength": 0.01}},
}
CFG = {"router": {"name": "topk", "k": 1}, **LISTS, "seed": 3}


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No key, no settings and no server of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


def play(run_dir: Path, rows: list, *, status: str = "completed", **options: Any) -> Wandb:
    run_dir.mkdir(exist_ok=True)
    sink = Wandb(**options)
    layers = len(rows[0][0].get("moe/selected", []))
    sink.open(run_dir, CFG, made_facts(layers))
    for row, timing in rows:
        sink.row(row, timing)
    sink.close(status, made_summary(layers, status))
    sink.wait()
    return sink


def recorded(run_dir: Path) -> Recorded:
    """What lies where `wandb sync` is said to find it."""
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    return read(path)


def test_rows_arrive_as_they_were_and_runs_of_one_process_stay_apart(tmp_path: Path):
    fed = {name: made_rows(layers=n, steps=6 + n) for name, n in (("a", 2), ("b", 3), ("c", 0))}
    opened = [Wandb(tags=["mine"]) for _ in fed]
    for (name, rows), sink in zip(fed.items(), opened, strict=True):
        (tmp_path / name).mkdir()
        sink.open(tmp_path / name, CFG, made_facts(len(rows[0][0].get("moe/selected", []))))
    for i in range(9):  # interleaved
        for rows, sink in zip(fed.values(), opened, strict=True):
            if i < len(rows):
                sink.row(*rows[i])
    for sink, status in zip(opened, ("completed", "diverged", "preempted"), strict=True):
        sink.close(status, made_summary(2, status))
    for sink in opened:
        sink.wait()

    found = {name: recorded(tmp_path / name) for name in fed}
    assert len({run.id for run in found.values()}) == 3
    assert [run.exit_code for run in found.values()] == [0, 1, 0]
    for name, rows in fed.items():
        run = found[name]
        assert run.id == (tmp_path / name / "wandb_run_id.txt").read_text()
        assert [h["_step"] for h in run.history] == [row["step"] for row, _ in rows]
        for got, (row, _) in zip(run.history, rows, strict=True):
            for key in ("tokens", "loss", "ppl", "lr"):
                assert got[key] == row[key]
            assert ("eval/loss" in got) == ("eval/loss" in row)
            if "moe/selected" in row:
                assert got["moe/dead_experts/total"] == sum(row["moe/dead_experts"])
                assert got["moe/load_cv/worst"] == row["moe/load_cv/worst"]
                assert got["moe/token_entropy/mean"] == row["moe/token_entropy/mean"]
                for layer, value in enumerate(row["moe/max_vio"]):
                    assert got[f"moe_layer/L{layer:02d}/max_vio"] == value
                    assert got[f"moe_layer/L{layer:02d}/coupling_gap"] == row["moe/coupling_gap"][layer]
                assert not any("nmi_domain" in key for key in got)  # undefined in these rows
    assert any("eval/gap_top1" in h and h["eval/gap_top1"] == 0.125 for h in found["a"].history)


def test_the_run_can_be_grouped_and_compared(tmp_path: Path):
    play(tmp_path / "run", made_rows(), group="study", tags=["mine"], project="p")
    run = recorded(tmp_path / "run")
    assert (run.project, run.group, run.job_type, run.name) == ("p", "study", "train", "run")
    assert run.config["router"]["name"] == "topk" and run.config["seed"] == 3
    assert {"topk", "clusters", "switch", "jitter", "mine", "verdict:healthy", "verdict:collapsed"} == set(run.tags)
    assert run.metrics["tokens"].options.hidden
    assert run.metrics["*"].step_metric == "tokens"
    assert run.metrics["eval/loss"].summary.min and run.metrics["eval/loss"].summary.last
    assert run.summary["verdict/L01"] == "collapsed" and run.summary["status"] == "completed"
    assert run.summary["eval/bigram"] == 4.5


def test_pictures_come_at_evaluations_only_and_hold_the_loads(tmp_path: Path):
    rows = made_rows(layers=2, experts=4, steps=6, eval_every=3)
    play(tmp_path / "run", rows)
    run = recorded(tmp_path / "run")
    with_image = [h for h in run.history if any(key.startswith("moe/load_heatmap") for key in h)]
    assert [h["_step"] for h in with_image] == [3, 6]
    pictures = list((tmp_path / "run").rglob("media/images/**/*.png"))
    assert len(pictures) == 2
    assert {Image.open(p).size for p in pictures} == {(4 * 24, 2 * 24)}
    values, bins = (with_image[0][f"moe_layer/L01/load/{part}"] for part in ("values", "bins"))
    assert len(bins) == len(values) + 1 == 9 and (bins[0], bins[-1]) == (0, 4)
    assert values == [0, 2, 2, 0, 0, 0, 0, 0]  # 68 70 72 74 in units of their mean, in bins of a half


def test_the_number_of_charts_does_not_grow_with_the_experts():
    row, _ = made_rows(layers=12, experts=64, steps=3)[-1]
    row["moe/nmi_domain"] = [0.5] * 12
    keys = scalars(row)
    per_layer = [key for key in keys if key.startswith("moe_layer/")]
    assert len(keys) - len(per_layer) <= 10 and len(per_layer) == 12 * 9
    assert all(isinstance(value, int | float) for value in keys.values())


def test_resume_goes_on_under_the_same_id(tmp_path: Path):
    rows = made_rows(steps=6)
    play(tmp_path / "run", rows[:3], status="preempted")
    play(tmp_path / "run", rows[3:])
    found = [read(path) for path in (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")]
    assert len(found) == 2 and found[0].id == found[1].id
    assert sorted(h["_step"] for run in found for h in run.history) == [1, 2, 3, 4, 5, 6]


def test_an_id_that_was_lost_to_a_full_disk_is_made_anew(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/wandb_run_id.txt").touch()
    play(tmp_path / "run", made_rows())
    assert recorded(tmp_path / "run").id == (tmp_path / "run/wandb_run_id.txt").read_text() != ""


def test_a_run_goes_on_beside_what_wandb_left(alone: bytes, tmp_path: Path):
    folder = Real(tmp_path, "checkpoint.every=20").folder
    (folder / "status.json").unlink()
    shutil.rmtree(folder / "checkpoints/step-00000040")
    said = moe_lab("train", f"resume={folder}")
    assert said.code == 0, said.err
    assert (folder / "metrics.jsonl").read_bytes() == alone
    assert len({read(path).id for path in folder.glob("wandb/offline-run-*/*.wandb")}) == 1
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2
    log = min(folder.glob("wandb/*/logs/debug-core.log"))
    assert log.is_symlink() and leads_out(folder) is None
    log.rename(log.with_name("another.log"))
    assert "leads out" in str(leads_out(folder))


def test_heatmap_shows_balance_death_and_overload():
    image = np.asarray(heatmap([[5, 5, 5, 5], [0, 0, 0, 20]]))
    assert image.shape == (2 * 24, 4 * 24, 3)
    neutral = dict(ANCHORS)[0.0]
    assert (image[:24] == neutral).all()
    assert (image[24:, : 3 * 24] == DEAD).all()
    red, _, blue = image[-1, -1].astype(int)
    assert red > blue + 80
    assert np.asarray(heatmap([[1.0]])).shape == (24, 24, 3)
    assert np.asarray(heatmap([[1.0] * 256])).shape == (4, 4 * 256, 3)
    assert (np.asarray(heatmap([[0, 0]])) == DEAD).all()


@pytest.mark.parametrize(
    ("env", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": KEY}, "", "online"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "", "offline"),
        ({"WANDB_MODE": "disabled"}, "", "disabled"),
        ({"WANDB_MODE": "dryrun"}, "", "offline"),
        ({}, f"machine api.wandb.ai login user password {KEY}\n", "online"),
        ({}, f"machine example.org login user password {KEY}\n", "offline"),
        ({}, f"default login user password {KEY}\n", "offline"),
        ({"WANDB_BASE_URL": "https://w.example.org"}, f"machine w.example.org login u password {KEY}\n", "online"),
        ({"WANDB_BASE_URL": "https://w.example.org"}, f"machine api.wandb.ai login u password {KEY}\n", "offline"),
        ({}, "machine ", "offline"),
        ({}, "machine api.wandb.ai login user\n", "offline"),
    ],
)
def test_auto_is_online_only_where_a_key_is_configured(
    env: dict[str, str], netrc: str, mode: str, nobody: Path, monkeypatch: pytest.MonkeyPatch
):
    (nobody / "netrc").write_text(netrc)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert resolve_mode("auto") == mode
    assert resolve_mode("offline") == "offline"


def test_the_settings_file_counts_too(nobody: Path):
    folder = nobody / ".config/wandb"
    folder.mkdir(parents=True)
    (folder / "settings").write_text(f"[default]\nbase_url = https://w.example.org\napi_key = {KEY}\n")
    assert has_key()
    (folder / "settings").write_text("[default]\nbase_url = https://w.example.org\n")
    (nobody / "netrc").write_text(f"machine w.example.org login u password {KEY}\n")
    assert has_key()


def test_online_without_a_key_is_offline_and_never_asks(tmp_path: Path):
    sink = play(tmp_path / "run", made_rows(), mode="online")
    assert "no key" in sink.describe() and "wandb sync" in sink.describe()
    assert len(recorded(tmp_path / "run").history) == 6


def test_disabled_writes_nothing(tmp_path: Path):
    sink = play(tmp_path / "run", made_rows(), mode="disabled")
    assert sink.describe() == "W&B: disabled" and list((tmp_path / "run").iterdir()) == []


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The metrics of the run that the tests below make, without a logger."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(tiny(), folder, [], {})
    return (folder / "metrics.jsonl").read_bytes()


class Real:
    """`moe-lab train` with W&B, in a process of its own, watched by tests/watched_run.py."""

    def __init__(self, tmp_path: Path, *overrides: str, env: dict[str, str] | None = None, **given: Any):
        self.folder, report = tmp_path / "run", tmp_path / "report.json"
        watched = [sys.executable, str(Path(__file__).parent / "watched_run.py"), str(report), json.dumps(given)]
        words = [*TINY, "logger=[wandb]", f"hydra.run.dir={self.folder}", f"hydra.sweep.dir={self.folder}", *overrides]
        paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        told = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **(env or {})}
        done = subprocess.run(
            [*watched, "train", *words], env={**os.environ, **told}, capture_output=True, text=True, timeout=120
        )
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr
        self.spent = json.loads(report.read_text())

    def is_untouched(self, alone: bytes) -> bool:
        """The same metrics, exit code 0, at least 95 % as fast, and not long after its last step it was over."""
        assert self.code == 0, self.err
        assert (self.folder / "metrics.jsonl").read_bytes() == alone
        assert self.spent["mirror"] <= 0.05 * self.spent["training"], self.spent
        assert self.spent["end"] < 10.0, self.spent
        return True

    def warning(self) -> str:
        """The one line that went to stderr."""
        (line,) = self.err.splitlines()
        assert line.startswith("WARNING: W&B: ") and "metrics.jsonl has every row" in line, line
        return line

    def sync(self, kind: str) -> str:
        return f"wandb sync {self.folder}/wandb/{kind}-*"


def online(url: str) -> dict[str, str]:
    return {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY}


@pytest.mark.parametrize("behaviour", ["refuses", "silent", "500", "slow"])
def test_a_server_that_is_not_there_means_offline(behaviour: str, alone: bytes, tmp_path: Path) -> None:
    with Server(behaviour) as server:
        if behaviour == "refuses":
            server.close()
        run = Real(tmp_path, "wandb.mode=online", env=online(server.url), limit=1.0)
    assert run.is_untouched(alone)
    assert "going online failed" in run.warning() and run.sync("offline-run") in run.warning()
    assert run.out.startswith("W&B: online, project moe-lab\n")
    assert f"W&B: offline, since going online failed; to upload later: {run.sync('offline-run')}" in run.out
    record = recorded(run.folder)
    assert len(record.history) == len(alone.splitlines()) and record.exit_code == 0
    assert record.id == (run.folder / "wandb_run_id.txt").read_text()


@pytest.mark.parametrize("behaviour", ["500", "slow"])
def test_a_server_that_fails_on_the_way_leaves_a_whole_record(behaviour: str, alone: bytes, tmp_path: Path) -> None:
    with Server(behaviour, well_for=2) as server:
        run = Real(tmp_path, "wandb.mode=online", env=online(server.url), limit=2.0)
    assert run.is_untouched(alone)
    assert "did not take the rest of the run within 2 s" in run.warning() and run.sync("run") in run.warning()
    (path,) = run.folder.glob("wandb/run-*/*.wandb")
    assert len(read(path).history) == len(alone.splitlines())


def test_a_server_that_is_well_gets_everything(alone: bytes, tmp_path: Path) -> None:
    with Server("well") as server:
        run = Real(tmp_path, "wandb.mode=online", env=online(server.url))
    assert run.is_untouched(alone) and run.err == ""
    assert [row["_step"] for row in server.history] == [json.loads(line)["step"] for line in alone.splitlines()]
    assert f"W&B: online at {server.url}/me/moe-lab/runs/" in run.out


def test_offline_connects_to_nobody(alone: bytes, tmp_path: Path) -> None:
    """wandb-core, wandb's helper process, is reached by a unix socket (on Windows by loopback): that is no network."""
    with Server("well") as server:
        run = Real(tmp_path, "wandb.mode=offline", env=online(server.url))
    assert run.is_untouched(alone) and run.err == "" and server.connections == 0
    first = run.out.splitlines()[0]
    assert first == f"W&B: offline; to upload later: {run.sync('offline-run')}"
    with Server("well") as server:  # and the command that the first line gives is right
        words = f"{sys.executable} -m {first.partition('later: ')[2]}"
        env = {**os.environ, **online(server.url)}
        subprocess.run(words, shell=True, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=60)
        assert [row["_step"] for row in server.history] == [json.loads(line)["step"] for line in alone.splitlines()]


@pytest.mark.parametrize("harm, said", [("kill", "ConnectionResetError"), ("stop", "did not end within 3 s")])
def test_a_service_that_dies_on_the_way(harm: str, said: str, alone: bytes, tmp_path: Path) -> None:
    run = Real(tmp_path, harm=harm, deadline=3.0)
    assert run.is_untouched(alone)
    assert said in run.warning() and run.sync("offline-run") in run.warning()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_under_wandb_alone(alone: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "run/wandb"
    if not _may_mount(tmp_path):
        pytest.skip("this container may not mount a small disk")
    try:
        run = Real(tmp_path, harm="fill", disk="200k")
        assert shutil.disk_usage(folder).free == 0
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
    assert run.is_untouched(alone)
    assert "No space left on device" in run.warning()


@pytest.mark.parametrize("call", ["row", "close"])
def test_the_disk_is_watched_since_wandb_may_say_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb complains about a picture or a log file that it cannot write, but not about its record of the run."""
    upload, nothing = Upload(print), types.SimpleNamespace(free=0)
    upload.run = types.SimpleNamespace(dir=str(tmp_path / "files"), summary={}, tags=(), finish=lambda exit_code: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: nothing)
    with pytest.raises(OSError, match="No space left"):
        getattr(upload, call)(*{"row": (1, {}, [], {}), "close": ({}, [], 0)}[call])


def _may_mount(tmp_path: Path) -> bool:
    (trial := tmp_path / "trial").mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(trial)]
    mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
    return mounted and subprocess.run(["umount", trial], check=True).returncode == 0


def test_a_broken_wandb_is_a_warning(alone: bytes, tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("raise ImportError('libssl is\\nmissing')\n")
    run = Real(tmp_path, env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"})
    assert run.is_untouched(alone)
    assert "ImportError: libssl is missing; metrics.jsonl has every row" in run.warning()
    assert not run.warning().endswith("-*")  # there is nothing to upload


def test_without_wandb_the_run_goes_on(alone: bytes, tmp_path: Path) -> None:
    run = Real(tmp_path, without_wandb=True)
    assert run.is_untouched(alone)
    assert "wandb is not installed here" in run.warning() and run.out.startswith("W&B: switched off\n")
    assert not (run.folder / "wandb").exists()


def test_a_second_ctrl_c_does_not_wait_for_a_stuck_service(tmp_path: Path) -> None:
    run = Real(tmp_path, harm="stop and Ctrl-C twice")
    assert run.code == 130 and run.spent["end"] < mirror.DEADLINE / 2


def test_a_dead_service_is_not_the_next_runs(alone: bytes, tmp_path: Path) -> None:
    """Two runs of one process, as Hydra's own launcher makes them; the service of the first is killed."""
    run = Real(tmp_path, "-m", "hydra/launcher=basic", "seed=0,1", harm="kill")
    assert run.code == 0 and "ConnectionResetError" in run.warning()
    first, second = sorted((p.parent for p in run.folder.glob("*/metrics.jsonl")), key=lambda p: p.stat().st_mtime)
    assert (first / "metrics.jsonl").read_bytes() == alone
    assert len(recorded(second).history) == len(alone.splitlines()) and recorded(second).exit_code == 0


def test_yaml_and_signature_say_the_same():
    import inspect

    from omegaconf import OmegaConf

    path = Path(__file__).parents[1] / "conf/logger/wandb.yaml"
    assert path.read_text().startswith("# @package wandb\n# ")
    node = json.loads(json.dumps(OmegaConf.to_container(OmegaConf.load(path))))
    defaults = {p.name: p.default for p in inspect.signature(Wandb).parameters.values()}
    assert node == {"name": "wandb", **defaults}
