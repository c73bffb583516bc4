"""`moe-lab sweep` in this process: a study expands to jobs, is checked before the first, and costs are held equal."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import Said, moe_lab, tree
from made_sweep import TINY

from moe_lab.sinks.wandb import Wandb
from moe_lab.study import costs, room, worker
from moe_lab.study.folder import read
from moe_lab.study.results import load

FOLDER = Path("outputs/sweeps/tiny_study-quick")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker, "ask", lambda function, *args: function(*args))
    return tmp_path


def edited(here: Path, **study: Any) -> str:
    """The tiny study with other parts, and the place of its file."""
    content = yaml.safe_load(TINY.read_text())
    content["study"] |= study
    (here / "tiny_study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return "tiny_study.yaml"


def sweep(*words: str, study: str = str(TINY)) -> Said:
    return moe_lab("sweep", study, *words)


def test_a_study_runs_and_is_finished_by_the_same_command(here: Path) -> None:
    said = sweep("scale=quick", "arm=switch")
    assert said.code == 0, said.err
    asked = read(FOLDER)
    assert [(job.arm, job.seed) for job in asked.jobs] == [("switch", 0), ("switch", 1)]
    assert asked.command == f"moe-lab sweep {TINY} scale=quick arm=switch" and asked.scale == "quick"
    before = tree(here)
    assert sweep("scale=quick", "arm=switch").out.splitlines()[0] == "2 of 2 jobs were completed before"
    assert tree(here) == before
    assert sweep("scale=quick").code == 0
    results = load(FOLDER)
    assert {arm: list(runs) for arm, runs in results.by_arm().items()} == {"switch": [0, 1], "switch_balanced": [0, 1]}
    assert results.notes == [] and {r.claims for r in results.results} == {results.sweep.claims}
    assert {run.config["sweep"]["name"] for runs in results.by_arm().values() for run in runs.values()} == {FOLDER.name}


def test_a_job_is_a_command_line(here: Path) -> None:
    """What sweep.json says of a job runs by hand, and comes to the same numbers."""
    assert sweep("scale=quick", "arm=switch", "seed=3").code == 0
    (job,) = read(FOLDER).jobs
    assert moe_lab("train", *job.overrides, "hydra.run.dir=by_hand").code == 0
    assert Path("by_hand/metrics.jsonl").read_bytes() == (FOLDER / job.dir / "metrics.jsonl").read_bytes()


def test_the_grid_is_widened_and_later_words_win(here: Path) -> None:
    said = sweep("scale=quick", "seed=5", "arm=switch", "optim.lr=0.01,0.02", "steps=3", "sweep.name=mine")
    assert said.code == 0, said.err
    jobs = read(Path("outputs/sweeps/mine")).jobs
    assert [job.arm for job in jobs] == ["switch optim.lr=0.01", "switch optim.lr=0.02"]
    assert all({"steps=3", "seed=5", "router=switch"} <= set(job.overrides) for job in jobs)
    assert not {"steps=2", "seed=0"} & {override for job in jobs for override in job.overrides}


REFUSED = {
    "a key of an arm": (["router=topk"], "router=topk: arm switch sets router itself; choose arms with arm="),
    "no such arm": (["arm=swich"], "arm=swich: this study has none of this name; did you mean switch?"),
    "no such scale": (["scale=qick"], "scale=qick: this study has none of this name; did you mean quick?"),
    "too many": (["seed=range(10000)"], "this sweep has 20,000 jobs; the limit is 2,000"),
    "explosive": (["seed=range(0,3000000)", "optim.lr=range(0,3000000)"], "this sweep has 18,000,000,000,000 jobs"),
    "one bad job": (["router.capacity=1"], "router.capacity: not a key of what is chosen here"),
    "a bad value": (["seed=range(3)", "steps=2,0"], "steps=0: must be at least 1"),
    "no job at a time": (["--jobs", "0"], "--jobs 0: must be above 0"),
    "no time": (["--timeout", "nan"], "--timeout nan: must be above 0"),
    "two names": (["sweep.name=a,b"], "sweep.name=a,b: a sweep has one of it"),
    "a bad name": (["sweep.name=../x"], "sweep.name=../x: must match"),
    "a target": (["hydra.launcher._target_=os.system"], "not allowed"),
}


@pytest.mark.parametrize("words, told", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_is_said_before_anything_is_written(words: list[str], told: str, here: Path) -> None:
    chosen = [] if any(word.startswith("scale") for word in words) else ["scale=cpu"]
    said = sweep(*chosen, *words)
    assert said.code == 2 and told in said.err and len(said.err.splitlines()) == 1, said
    assert tree(here) == set()


def test_arms_that_are_the_same_run_are_refused(here: Path) -> None:
    arms = {"switch": ["router=switch"], "again": ["router=switch"]}
    said = sweep(study=edited(here, arms=arms, claims=[]))
    assert said.code == 2 and said.err == "moe-lab: arms switch and again are the same run; leave one out\n"


def test_arms_of_unequal_cost_need_a_label(here: Path) -> None:
    arms = {"one": ["router=topk", "router.k=1"], "two": ["router=topk", "router.k=2"]}
    study = edited(here, arms=arms, claims=[], settings=[o for o in _settings() if o != "fast=true"])
    said = sweep("scale=quick", study=study)
    assert said.code == 2 and tree(here) == {"tiny_study.yaml"}
    active, flops = said.err.splitlines()
    assert "the arms differ in active parameters: one has " in active and "study.unequal.active_params" in active
    assert "the arms differ in FLOPs per token: one has " in flops
    assert [line.split()[0] for line in said.out.splitlines()] == ["one", "two"]


def test_equal_means_two_percent_and_a_label_says_why_not() -> None:
    made = {"a": {"active_params": 100.0, "flops_per_token": 100.0, "tokens": 50.0}}
    near, far = made["a"] | {"tokens": 50.9}, made["a"] | {"tokens": 51.1}
    assert list(costs.mismatches(made | {"b": near}, {})) == []
    (line,) = costs.mismatches(made | {"b": far}, {})
    assert line.startswith("the arms differ in tokens: a has 50, b has 51")
    assert list(costs.mismatches(made | {"b": far}, {"tokens"})) == []


def test_claims_about_no_number_are_refused_before_the_first_job(here: Path) -> None:
    claim = {"says": "x", "source": "ours", "arm": "switch", "at_least": 0.0}
    names = ("eval/los", "eval/moe/router_cos_matrix", "eval/moe/domain_counts", "eval/moe/expert_loss")
    said = sweep("scale=quick", study=edited(here, claims=[claim | {"metric": name} for name in names]))
    assert said.code == 2 and tree(here) == {"tiny_study.yaml"}
    assert [line.split(";")[0] for line in said.err.splitlines()] == [
        "moe-lab: study.claims: eval/los: no such metric",
        "moe-lab: study.claims: eval/moe/router_cos_matrix: a matrix per layer",
        "moe-lab: study.claims: eval/moe/domain_counts: a matrix per layer",
    ]


def test_a_mistake_of_one_arm_names_the_job_by_it(here: Path) -> None:
    arms = {"good": ["router=switch"], "bad": ["router=switch", "optim.lrr=1"]}
    said = sweep(study=edited(here, arms=arms, claims=[]))
    assert said.code == 2 and said.err.strip().endswith("(job arm=bad seed=0 and 2 more of 6 jobs)"), said.err


def test_only_arms_of_one_point_of_a_wider_grid_are_held_equal() -> None:
    cost = {"active_params": 1.0, "flops_per_token": 1.0}
    wider = {f"{arm} steps={n}": cost | {"tokens": float(n)} for n in (5, 6) for arm in "ab"}
    assert not list(costs.mismatches(wider, []))
    (line,) = costs.mismatches(wider | {"b steps=6": cost | {"tokens": 7.0}}, [])
    assert line.startswith("the arms differ in tokens: a steps=6 has 6, b steps=6 has 7")


def test_the_cost_of_a_model_without_weights_is_that_of_the_run(here: Path) -> None:
    assert sweep("scale=quick", "arm=switch", "seed=0").code == 0
    (run,) = load(FOLDER).by_arm()["switch"].values()
    found = costs.of_config(run.config)
    assert {key: run.summary["cost"][key] for key in ("active_params", "flops_per_token")} == {
        key: found[key] for key in ("active_params", "flops_per_token")
    }
    assert found["tokens"] == run.summary["tokens"]


def _settings() -> list[str]:
    return yaml.safe_load(TINY.read_text())["study"]["settings"]


def test_a_folder_keeps_to_what_it_was_asked_with(here: Path) -> None:
    assert sweep("scale=quick", "arm=switch", "seed=0").code == 0
    said = sweep("scale=quick", "arm=switch", "seed=1", "batch_size=4")
    assert said.code == 4 and "its arm switch has no batch_size, this asks for batch_size=4; sweep.name=" in said.err
    (FOLDER / "sweep.json").write_text("{")
    said = sweep("scale=quick", "arm=switch", "seed=0")
    assert said.code == 4 and "damaged" in said.err and len(said.err.splitlines()) == 1


def test_a_dry_run_says_what_a_sweep_takes_and_leaves_nothing(here: Path) -> None:
    said = sweep("scale=quick", "steps=40", "--dry-run", "--jobs", "2")
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert lines[2] == "4 jobs, 0 of them completed before; 2 at a time"
    assert [line.split()[0] for line in lines[3:5]] == ["switch", "switch_balanced"]
    assert "6 steps of" not in said.out and "in all" in lines[5]
    assert tree(here) == set()


def test_status_and_watch_show_it_and_change_nothing(here: Path) -> None:
    assert sweep("scale=quick").code == 0
    for status in list(FOLDER.glob("*-seed_1/status.json"))[:1]:
        said = json.loads(status.read_text()) | {"status": "failed", "error": "\x1b[31mboom[/red]"}
        status.write_text(json.dumps(said))
    before = {path: path.read_bytes() for path in FOLDER.rglob("*") if path.is_file()}
    shown = moe_lab("status", str(FOLDER))
    assert shown.code == 0 and "3 of 4 completed, 1 failed" in shown.out and "boom[/red]" in shown.out
    assert "\x1b[31m" not in shown.out and shown.out.splitlines()[0].startswith("1 of 4 runs failed: switch")
    assert moe_lab("status", str(next(FOLDER.glob("*-seed_0")))).code == 0
    assert moe_lab("status", ".").code == 2 and moe_lab("watch", ".").code == 2
    assert {path: path.read_bytes() for path in FOLDER.rglob("*") if path.is_file()} == before


def test_watch_ends_when_all_have(here: Path) -> None:
    assert sweep("scale=quick", "arm=switch").code == 0
    said = moe_lab("watch", str(FOLDER))
    assert (said.code, said.out) == (0, "tiny_study-quick: 2 of 2 completed\n")


def test_help_names_the_studies(here: Path) -> None:
    (here / "sweeps").mkdir()
    (here / "sweeps/mine.yaml").write_text(TINY.read_text())
    said = moe_lab("sweep", "--help")
    assert "mine                 Is two experts' load even?" in said.out
    assert "Is two experts' load even?" in moe_lab("list", "sweeps").out
    assert moe_lab("sweep", "mien").err.strip().endswith("mien: no such study; did you mean mine?")


def test_jobs_that_fit_on_a_gpu() -> None:
    assert room.fitting(each=10_000, free=65_000, most=16) == 6
    assert room.fitting(each=0, free=65_000, most=16) == 16  # nothing was seen: it does not use the GPU
    assert room.fitting(each=90_000, free=65_000, most=16) == 1


def test_a_gpu_runs_one_job_until_its_memory_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = [1000.0]
    monkeypatch.setattr(room, "gpu_memory", lambda: (used[0], 80_000.0))
    monkeypatch.setattr(room, "cores", lambda: 16)
    here = room.Room(None, [{"device": "auto"}])
    here.see([tmp_path])
    assert here.jobs() == 1
    (tmp_path / "metrics.jsonl").write_text("{}\n" * room.ROWS)
    used[0] = 11_000.0
    here.see([tmp_path])
    assert here.jobs() == 7
    assert room.Room(3, [{"device": "auto"}]).jobs() == 3
    assert room.Room(None, [{"device": "cpu"}]).jobs() == 16


def test_a_launcher_of_hydras_takes_the_same_jobs_to_the_same_places(here: Path) -> None:
    """In this process, one after another: Hydra's own. It is given what is not finished."""
    assert sweep("scale=quick", "arm=switch", "seed=0").code == 0
    said = sweep("scale=quick", "hydra/launcher=basic")
    assert said.code == 0, said.err
    assert "1 of 4 jobs were completed before" in said.out
    results = load(FOLDER)
    assert [r.state for r in results.results] == ["completed"] * 4 and results.notes == []
    assert not list(FOLDER.glob("logs/*seed_1*"))  # the driver started none of these


def test_runs_of_a_sweep_are_a_group_of_wandbs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(Wandb, "start", lambda self: None)
    monkeypatch.setattr(Wandb, "send", lambda self, what, *more: opened.append(more[1]) if what == "open" else None)
    assert sweep("scale=quick", "arm=switch", "seed=0", "logger=[wandb]").code == 0
    assert moe_lab("train", *_settings()[:-1], "logger=[wandb]", "steps=1").code == 0
    assert [run["group"] for run in opened] == [FOLDER.name, None]
