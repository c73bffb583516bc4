"""A sweep's folder: what is written is read back; what is damaged, foreign or half done is a state or a line."""

import json
import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest
from made_sweep import made_run, made_sweep

from moe_lab import durable
from moe_lab.reading import Damaged
from moe_lab.run import Run
from moe_lab.study import folder as folders
from moe_lab.study.folder import SWEEP, Job, Sweep, read, write
from moe_lab.study.results import load, of_runs


def test_what_was_asked_is_read_back_and_nothing_asked_before_is_forgotten(tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path)
    assert read(tmp_path) == sweep and len(sweep.jobs) == 4
    more = [Job("switch", 9, ["seed=9"], "switch-9"), replace(sweep.jobs[0], overrides=["seed=0", "steps=3"])]
    united = write(replace(sweep, jobs=more))
    assert read(tmp_path) == united and united.jobs == [*sweep.jobs[1:], *more]


def test_a_wider_grid_takes_no_seed_from_a_studys_arm(tmp_path: Path) -> None:
    """optim.lr=0.003,0.01 comes upon the run that a study's arm has at the default of 0.003."""
    sweep = made_sweep(tmp_path)
    first = sweep.jobs[0]
    wider = [replace(first, arm=f"{first.arm} lr=3", overrides=["lr=3"]), Job(f"{first.arm} lr=9", 0, ["lr=9"], "new")]
    assert write(replace(sweep, jobs=wider)).jobs == [*sweep.jobs[1:], first, wider[1]]


def test_arms_of_an_ad_hoc_grid_are_what_sets_them_apart(tmp_path: Path) -> None:
    def asked(*lines: str) -> Sweep:
        jobs = [Job("", int(line[-1]), line.split(), line.replace("=", "_")) for line in lines]
        return write(Sweep(tmp_path, "multirun", None, None, jobs, "moe-lab train -m"))

    first = asked("steps=9 router=a seed=0", "steps=9 router=a seed=1", "steps=9 router=b seed=0")
    assert [job.arm for job in first.jobs] == ["router=a", "router=a", "router=b"]
    united = asked("steps=5 router=b seed=0", "steps=9 router=b seed=0")
    assert [(job.arm, job.seed) for job in united.jobs] == [
        ("steps=9 router=a", 0),
        ("steps=9 router=a", 1),
        ("steps=5 router=b", 0),
        ("steps=9 router=b", 0),
    ]
    assert [job.arm for job in folders.labelled([Job("", s, [f"seed={s}"], str(s)) for s in (0, 1)])] == ["default"] * 2


@pytest.mark.parametrize(
    "text, told",
    [
        ("{", "damaged"),
        ("[]", "a JSON object is needed"),
        ("{}", "not what a sweep writes"),
        ('{"format": 1, "name": 5}', "not what a sweep writes"),
        ("{" * 100_000, "damaged"),
    ],
)
def test_a_file_that_no_sweep_wrote(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / SWEEP).write_text(text)
    with pytest.raises(Damaged, match=told) as error:
        load(tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("key, value", [("dir", "../../x"), ("dir", "/x"), ("dir", ""), ("seed", True), ("arm", None)])
def test_a_job_that_no_sweep_wrote(key: str, value: object, tmp_path: Path) -> None:
    made_sweep(tmp_path)
    content = json.loads((tmp_path / SWEEP).read_text())
    content["jobs"][1][key] = value
    (tmp_path / SWEEP).write_text(json.dumps(content))
    with pytest.raises(Damaged):
        read(tmp_path)


def test_a_newer_format_is_said(tmp_path: Path) -> None:
    made_sweep(tmp_path)
    content = json.loads((tmp_path / SWEEP).read_text()) | {"format": 2}
    (tmp_path / SWEEP).write_text(json.dumps(content))
    with pytest.raises(Damaged, match="format 2; this moe-lab reads 1"):
        read(tmp_path)


def test_results_by_arm_are_the_completed_runs(tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path)
    for job, status in zip(sweep.jobs, ("completed", "diverged", "completed"), strict=False):
        made_run(sweep, job, status, "it broke" if status == "diverged" else None)
    results = load(tmp_path)
    assert [result.state for result in results.results] == ["completed", "diverged", "completed", "waiting"]
    assert results.results[1].why == "it broke" and results.results[3].run is None
    by_arm = results.by_arm()
    assert {arm: list(runs) for arm, runs in by_arm.items()} == {"switch": [0], "switch_balanced": [0]}
    assert len(by_arm["switch"][0].rows) == 6
    assert results.notes == ["1 of 4 runs diverged: switch seed 1", "1 of 4 runs are not finished"]


def test_mixed_sources_and_changed_claims_are_said_first(tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path)
    assert sweep.study is not None
    for number, job in enumerate(sweep.jobs):
        made_run(sweep, job, sources="a" * 16 if number else "b" * 16)
    results = load(tmp_path)
    assert results.notes[0].startswith("these runs come from 2 versions of moe-lab's sources (aaaaaaaa, bbbbbbbb)")
    assert len(results.notes) == 1
    claims = [sweep.study.claims[0].model_copy(update={"at_least": 0.2})]
    edited = write(replace(sweep, study=sweep.study.model_copy(update={"claims": claims})))
    assert load(tmp_path).notes[1] == "the claims were changed after 4 of 4 runs began"
    folders.mark(edited, edited.jobs[0])  # it goes on: what it began with stands
    assert load(tmp_path).results[0].claims == sweep.claims != edited.claims


def test_a_run_that_was_killed_can_go_on_and_one_that_works_is_running(tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path)
    run = made_run(sweep, sweep.jobs[0])
    status = {"status": "running", "step": 3, "error": None, "attempt": 1, "host": platform.node()}

    def state(pid: int, **more: str) -> str:
        durable.write_json(run / "status.json", status | {"pid": pid} | more)
        return load(tmp_path).results[0].state

    assert state(2**22 + 1) == "preempted"  # above the largest pid
    assert state(os.getpid()) == "preempted"  # a process of that number works, but not here
    assert state(2**22 + 1, host="elsewhere") == "running"
    with Run(run, {"seed": 0, "router": {"name": "switch"}, "balance": {}, "steps": 6}, [], {}):
        assert state(os.getpid()) == "running"


CONTENTS = (b"", b"{", b"\xff\xfe", b"[[]]\n", b'{"a": NaN}\n')
# No row yet, a torn last one, and a mapping that yaml reads as text.
WHOLE = {*(("metrics.jsonl", content) for content in CONTENTS[:3]), ("config.yaml", CONTENTS[4])}


@pytest.mark.parametrize(
    "name", ["status.json", "config.yaml", "metrics.jsonl", "env.json", "job.json", "summary.json"]
)
@pytest.mark.parametrize("content", CONTENTS)
def test_a_damaged_run_is_a_state(name: str, content: bytes, tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path, seeds=1)
    for job in sweep.jobs:
        made_run(sweep, job)
    (tmp_path / sweep.jobs[0].dir / name).write_bytes(content)
    result, other = load(tmp_path).results
    assert other.state == "completed"
    assert (result.state == "failed") == ((name, content) not in WHOLE)
    assert result.state == "completed" or len(str(result.why).splitlines()) == 1


def test_runs_that_no_sweep_asked_for(tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path / "sweep")
    paths = [made_run(sweep, job) for job in sweep.jobs[:3]]
    (paths[2] / "config.yaml").write_text("{seed: 1, router: {name: topk, k: 2}, balance: {}, steps: 6}")
    assert list(load(paths[0]).by_arm()) == ["switch"]
    results = of_runs(paths)
    assert [(r.job.arm, r.job.seed) for r in results.results] == [
        ("router=switch", 0),
        ("router=switch", 1),
        ("router=topk", 1),
    ]
    assert [results.sweep.folder / r.job.dir for r in results.results] == [path.absolute() for path in paths]
    assert results.results[0].job.overrides == sweep.jobs[0].overrides
    assert [r.job.arm for r in of_runs([paths[0], paths[0]]).results] == ["switch", "switch (run 2)"]
    (tmp_path / "sweep" / SWEEP).unlink()
    assert len(load(tmp_path / "sweep").results) == 3
    with pytest.raises(ValueError, match=r"neither a sweep .* nor a run"):
        load(tmp_path)


def test_a_damaged_run_among_others_is_listed(tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path)
    good, bad = (made_run(sweep, job) for job in sweep.jobs[:2])
    (tmp_path / SWEEP).unlink()
    (bad / "config.yaml").write_text("[")
    found = load(tmp_path)
    assert [(r.job.dir, r.state) for r in found.results] == [(good.name, "completed"), (bad.name, "failed")]
    assert "damaged" in str(found.results[1].why) and found.notes == [f"1 of 2 runs failed: {bad.name} seed 0"]
    with pytest.raises(Damaged):
        load(bad)


def test_sources_are_a_hash_of_what_makes_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_lab import sources as module

    package, conf = tmp_path / "moe_lab", tmp_path / "conf"
    for path in (package / "a.py", package / "verbs/b.py", package / "routers/c.py", conf / "router/d.yaml"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    monkeypatch.setattr(module, "__file__", str(package / "sources.py"))
    monkeypatch.setattr(module.presets, "conf_dir", lambda: conf)
    first = module.sources.__wrapped__()
    (package / "verbs/b.py").write_text("2")
    assert module.sources.__wrapped__() == first
    for path in (package / "a.py", package / "routers/c.py", conf / "router/d.yaml"):
        path.write_text("2")
        before, first = first, module.sources.__wrapped__()
        assert first != before
    assert len(first) == 16
