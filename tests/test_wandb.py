"""What W&B gets is what metrics.jsonl holds, and nothing that goes wrong with W&B reaches the training."""

import json
import logging
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_rows import made_facts, made_rows, made_summary
from PIL import Image
from wandb_reader import Recorded, read

from moe_lab.sinks import wandb as mirror
from moe_lab.sinks.account import has_key
from moe_lab.sinks.heatmap import ANCHORS, DEAD, heatmap
from moe_lab.sinks.wandb import Wandb, resolve_mode, scalars

KEY = "a" * 40  # the right shape, known to nobody
CFG = {"router": {"name": "topk", "k": 1}, "balance": {"switch": {"name": "switch", "weight": 0.01}}, "seed": 3}


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
    return sink


def recorded(run_dir: Path) -> Recorded:
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    return finished(path)


def finished(path: Path) -> Recorded:
    """`finish` comes back some milliseconds before its last records are in the file."""
    for _ in range(200):
        if (run := read(path)).exit_code is not None:
            return run
        time.sleep(0.02)
    raise AssertionError(f"{path} has no end")


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
    assert {"topk", "clusters", "switch", "mine", "verdict:healthy", "verdict:collapsed"} == set(run.tags)
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
    assert len(keys) - len(per_layer) <= 10 and len(per_layer) == 12 * 8
    assert all(isinstance(value, int | float) for value in keys.values())


def test_resume_goes_on_under_the_same_id(tmp_path: Path):
    rows = made_rows(steps=6)
    play(tmp_path / "run", rows[:3], status="preempted")
    play(tmp_path / "run", rows[3:])
    found = [finished(path) for path in (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")]
    assert len(found) == 2 and found[0].id == found[1].id
    assert sorted(h["_step"] for run in found for h in run.history) == [1, 2, 3, 4, 5, 6]


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


def test_without_wandb_installed_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    sink = play(tmp_path / "run", made_rows())
    assert "not usable here" in sink.describe() and list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("method", ["log", "finish"])
def test_an_exception_inside_wandb_is_said_once(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    import wandb

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ConnectionResetError("the service\nis gone")

    original = getattr(wandb.Run, method)
    monkeypatch.setattr(wandb.Run, method, broken)
    with caplog.at_level(logging.WARNING, logger="moe_lab"):
        sink = Wandb()
        sink.open(tmp_path, CFG, made_facts())
        run = sink.run
        for row, timing in made_rows():
            sink.row(row, timing)
        sink.close("completed", made_summary())
    if method == "finish":
        original(run)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("moe_lab")] == [
        "Wandb is switched off, the run goes on: ConnectionResetError: the service is gone"
    ]


class Listener:
    """A server that takes connections, counts them and never answers."""

    def __enter__(self) -> "Listener":
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.taken: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def _serve(self) -> None:
        try:
            while True:
                self.taken.append(self.socket.accept()[0])
        except OSError:
            return  # closed below

    def __exit__(self, *error: object) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        for taken in self.taken:
            taken.close()


PROGRAM = """
    import sys
    from pathlib import Path
    from made_rows import made_facts, made_rows, made_summary
    from moe_lab.sinks import wandb as mirror
    mirror.INIT_TIMEOUT = 2.0
    sink = mirror.Wandb(mode=sys.argv[2])
    sink.open(Path(sys.argv[1]), {"seed": 1}, made_facts())
    for row, timing in made_rows():
        sink.row(row, timing)
    sink.close("completed", made_summary())
    print(sink.describe())
"""


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_offline_connects_to_nobody_and_a_dead_server_means_offline(mode: str, tmp_path: Path):
    """wandb-core, wandb's helper process, is reached by a unix socket (on Windows by loopback): that is no network."""
    with Listener() as server:
        env = {
            **os.environ,
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": KEY,
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path), mode]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
        connections = len(server.taken)
    assert "wandb sync" in done.stdout
    assert len(recorded(tmp_path).history) == 6
    assert (connections == 0) == (mode == "offline"), done.stderr
    if mode == "online":
        assert f"wandb sync --id {(tmp_path / 'wandb_run_id.txt').read_text()}" in done.stdout


def test_yaml_and_signature_say_the_same():
    import inspect

    from omegaconf import OmegaConf

    path = Path(__file__).parents[1] / "conf/logger/wandb.yaml"
    assert path.read_text().startswith("# @package wandb\n# ")
    node = json.loads(json.dumps(OmegaConf.to_container(OmegaConf.load(path))))
    defaults = {p.name: p.default for p in inspect.signature(mirror.Wandb).parameters.values()}
    assert node == {"name": "wandb", **defaults}
