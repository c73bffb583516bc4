"""Commands on a run directory: resume, diff, export, verify."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import moe_lab.train
from tests.command import moe_lab as command
from tests.command import tree

ROOT = Path(__file__).parents[1]
TINY = "dataset=clusters dataset.tokens=20000 logger=[] fast=true model.dim=32 model.heads=2 experts.num=4"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run through the command line, to its end."""
    folder = tmp_path_factory.mktemp("finished")
    said = command("train", "router=topk", *TINY.split(), f"output_dir={folder}")
    assert said.code == 0, said.err
    (run,) = folder.glob("*/*")
    return run


# --- resume


def test_resume_of_a_finished_run(finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    said = command("train", f"resume={finished}")
    assert (said.code, said.err) == (0, "")
    assert said.out == f"{finished}: was completed before; its summary is {finished / 'summary.json'}\n"
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "words, code, told",
    [
        ("steps=100", 4, "steps=100: this run has steps="),
        ("router=switch", 4, "router=switch: this run has router=topk"),
        ("router=topk", 0, ""),
        ("checkpoint.keep=3", 0, ""),
        ("checkpoint.keep=0", 2, "checkpoint.keep=0: must be at least 1"),
        ("stepz=3", 2, "stepz: no such key in this run; did you mean steps?"),
        ("steps=[", 2, "not understood"),
    ],
)
def test_what_may_change_when_a_run_goes_on(
    words: str, code: int, told: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed: list[dict[str, Any]] = []
    monkeypatch.setattr(moe_lab.train, "resume", lambda folder, cfg: resumed.append(cfg) or {})
    before = tree(finished)
    said = command("train", f"resume={finished}", *words.split())
    assert said.code == code and told in said.err, said.err
    assert len(resumed) == (code == 0)
    assert code == 0 or tree(finished) == before
    if words == "checkpoint.keep=3":
        assert resumed[0]["checkpoint"]["keep"] == 3


def _stopped_before_its_first_checkpoint(finished: Path, to: Path) -> Path:
    """What kill -9 leaves: rows, and a status that says running."""
    run = shutil.copytree(finished, to)
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"status": "running", "step": 0}))
    for name in ("metrics.jsonl", "timing.jsonl"):
        (run / name).write_text((run / name).read_text().splitlines(keepends=True)[0])
    return run


def test_resume_before_the_first_checkpoint_starts_from_step_0(finished: Path, tmp_path: Path) -> None:
    run = _stopped_before_its_first_checkpoint(finished, tmp_path / "run")
    said = command("train", f"resume={run}")
    assert said.code == 0, said.err
    assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert json.loads((run / "status.json").read_text())["status"] == "completed"


def test_resume_never_forgets_rows_whose_checkpoints_are_lost(finished: Path, tmp_path: Path) -> None:
    run = _stopped_before_its_first_checkpoint(finished, tmp_path / "run")
    shutil.copy(finished / "metrics.jsonl", run)
    before = tree(run)
    said = command("train", f"resume={run}")
    assert said.code == 4 and "no checkpoint" in said.err and len(said.err.splitlines()) == 1
    assert tree(run) == before and (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("left", [["status.json"], ["status.json", "config.yaml"]])
def test_resume_of_a_run_stopped_while_preparing_data(left: list[str], finished: Path, tmp_path: Path) -> None:
    for name in left:
        shutil.copy(finished / name, tmp_path)
    said = command("train", f"resume={tmp_path}")
    assert said.code == 4 and "no checkpoint to go on from; start the run again" in said.err


def test_resume_needs_a_whole_run(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "config.yaml").write_text("a: [")
    assert command("train", f"resume={run}").code == 4
    shutil.copy(finished / "config.yaml", run)
    shutil.rmtree(run / "checkpoints")
    said = command("train", f"resume={run}")
    assert said.code == 4 and "no checkpoint" in said.err
    (run / "config.yaml").unlink()
    assert command("train", f"resume={run}").code == 2


def test_stop_from_outside_and_go_on(here: Path) -> None:
    """SIGTERM in the middle: exit code 75; resume ends it; verify finds it whole."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-u", "-m", "moe_lab", "train"]
    small = "steps=400 batch_size=4 seq_len=32 eval_every=400 eval_tokens=256 checkpoint.every=1000"
    words = [word for word in TINY.split() if word != "fast=true"] + small.split()
    running = subprocess.Popen([*start, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert running.stdout is not None
    while "step 10/" not in running.stdout.readline():
        assert running.poll() is None
    running.terminate()
    _, told = running.communicate()
    assert running.returncode == 75 and "resume=" in told.splitlines()[-1], told
    (run,) = here.glob("outputs/*/*")
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "preempted" and 10 <= status["step"] < 400
    done = subprocess.run([*start, f"resume={run}"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert command("verify", str(run)).code == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 400


# --- diff, export, verify


def test_diff_tells_what_differs(finished: Path, tmp_path: Path) -> None:
    other = shutil.copytree(finished, tmp_path / "other")
    cfg = yaml.safe_load((other / "config.yaml").read_text())
    cfg["optim"]["lr"] = 0.5
    (other / "config.yaml").write_text(yaml.safe_dump(cfg))
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps(summary | {"loss": summary["loss"] + 1}))
    told = command("diff", str(finished), str(other)).out
    assert re.search(r"optim\.lr +0\.003 +0\.5 ", told)
    assert re.search(r"loss \(train\) .* \+1 ", told)
    assert "seed" not in told and "surroundings: no difference" in told
    assert re.search(r" seed +0 +0", command("diff", "--all", str(finished), str(other)).out)


def test_diff_of_other_data_is_one_row_of_surroundings(finished: Path, tmp_path: Path) -> None:
    other = shutil.copytree(finished, tmp_path / "other")
    env = json.loads((other / "env.json").read_text())
    first, second = env["dataset"]["fingerprint"], "0123456789abcdef" * 4
    domains = [f"part {i}" for i in range(40)]
    tokens = {f"{part}_tokens_per_domain": dict.fromkeys(domains, 7) for part in ("train", "valid")}
    env["dataset"] = {"fingerprint": second, "domains": domains, **tokens}
    (other / "env.json").write_text(json.dumps(env))
    told = command("diff", str(finished), str(other)).out
    (row,) = [line.split() for line in told.splitlines() if line.startswith("  dataset.")]
    assert row == ["dataset.fingerprint", first[:12], second[:12]]


def test_diff_needs_two_runs(finished: Path, tmp_path: Path) -> None:
    assert command("diff", str(finished)).code == 2
    said = command("diff", str(finished), str(tmp_path))
    assert said.code == 2 and "no run directory" in said.err


def test_export_keeps_every_number(finished: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    table = list(csv.DictReader(io.StringIO(command("export", str(finished), "--out", "-").out)))
    assert [int(row["step"]) for row in table] == [row["step"] for row in rows]
    assert float(table[-1]["loss"]) == rows[-1]["loss"]
    assert float(table[-1]["moe/load_cv[1]"]) == rows[-1]["moe/load_cv"][1]
    assert float(table[-1]["moe/selected[1][3]"]) == rows[-1]["moe/selected"][1][3]
    out = tmp_path / "long.csv"
    assert command("export", str(finished), "--long", "--out", str(out)).code == 0
    tidy = [row for row in csv.DictReader(out.open()) if row["layer"] == "1"]
    loads = [row for row in tidy if row["metric"] == "moe/selected"]
    assert [float(row["value"]) for row in loads][-4:] == rows[-1]["moe/selected"][1]
    cosine = [row for row in tidy if row["metric"] == "eval/moe/router_cos_matrix"][-3]  # of the last row of [4][4]
    assert (cosine["expert"], cosine["other"]) == ("3", "1")
    assert float(cosine["value"]) == rows[-1]["eval/moe/router_cos_matrix"][1][3][1]


def test_parquet_reads_back(finished: Path, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "metrics.parquet"
    assert command("export", str(finished), "--out", str(out)).code == 0
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    table = pq.read_table(out).to_pydict()
    assert table["loss"] == [row["loss"] for row in rows]
    assert table["moe/selected[0][0]"] == [row["moe/selected"][0][0] for row in rows]


def test_a_cell_is_no_formula(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    text = "".join(json.dumps({"step": i, "loss": -1.5, "note": note}) + "\n" for i, note in enumerate("=+-@"))
    (run / "metrics.jsonl").write_text(text)
    rows = list(csv.reader(io.StringIO(command("export", str(run), "--out", "-").out)))[1:]
    assert [row[2] for row in rows] == ["'=", "'+", "'-", "'@"] and rows[0][1] == "-1.5"


def test_verify_holds_for_a_run_and_touches_nothing(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    said = command("verify", str(finished))
    assert said.code == 0 and said.out.endswith("whole\n") and "BAD" not in said.out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def _edit(name: str, old: str, new: str) -> Callable[[Path], object]:
    def edit(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return edit


def _repeat_a_row(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines, lines[-1]]))


def _flip_a_bit(run: Path) -> None:
    path = next((run / "checkpoints").glob("*/model.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a file is gone": ("files", lambda run: (run / "overrides.txt").unlink()),
    "status of no run": ("status", _edit("status.json", '"completed"', '"finished"')),
    "half a status": ("status", lambda run: (run / "status.json").write_text("{")),
    "config edited": ("config", _edit("config.yaml", "lr: 0.003", "lr: 0.004")),
    "a row twice": ("metrics", _repeat_a_row),
    "half a row": ("metrics", lambda run: (run / "metrics.jsonl").write_text('{"step": 1')),
    "not a number": ("metrics", _edit("metrics.jsonl", '"loss":', '"x":NaN,"loss":')),
    "no clocks": ("timing", lambda run: (run / "timing.jsonl").write_text("")),
    "another result": ("summary", _edit("summary.json", '"loss": ', '"loss": 1')),
    "a flipped bit": ("checkpoints", _flip_a_bit),
    "no manifest": ("checkpoints", lambda run: next(run.glob("checkpoints/*/manifest.json")).unlink()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_finds_damage(name: str, finished: Path, tmp_path: Path) -> None:
    check, damage = DAMAGE[name]
    run = shutil.copytree(finished, tmp_path / "run")
    damage(run)
    said = command("verify", str(run))
    assert said.code == 4
    assert any(line.startswith(f"BAD  {check} ") for line in said.out.splitlines()), said.out


def test_verify_of_no_run(tmp_path: Path) -> None:
    assert command("verify", str(tmp_path)).code == 2
    assert command("verify", str(tmp_path / "nowhere")).code == 2
