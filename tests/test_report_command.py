"""`moe-lab report DIR...`: what it takes, where it writes, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import moe_lab, tree
from made_results import made_run, write_run
from page import Page

from moe_lab.study.files import Claim, Reduce, Study
from moe_lab.study.folder import Job, Sweep, write

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        write_run(folder / f"run-{seed}", made_run(1, seed, rows=6, layers=1))
    return folder


def test_a_folder_of_runs_makes_a_report_inside_it(runs: Path) -> None:
    said = moe_lab("report", str(runs))
    assert said.code == 0, said.err
    assert said.out.startswith(f"{runs}/report/report.html: 2 runs, 0 claims, 0.")
    text = (runs / "report" / "report.html").read_text()
    assert "No claims were made of these runs" in text and f"moe-lab report {runs} --out {runs}/report" in text
    assert moe_lab("report", str(runs)).code == 0  # and again, over itself


def test_runs_are_one_study_and_several_need_a_place(runs: Path, tmp_path: Path) -> None:
    both = [str(runs / "run-0"), str(runs / "run-1")]
    said = moe_lab("report", *both)
    assert (said.code, said.err) == (2, "moe-lab: a report of several needs a place: --out DIR\n")
    assert moe_lab("report", *both, "--out", str(tmp_path / "here")).code == 0
    assert (tmp_path / "here" / "summary.csv").read_text().count("\n2 runs,") == 2


def sweep(folder: Path, metric: str) -> None:
    """A study of two arms and two seeds, with one claim."""
    claim = Claim(says="b is skewed", source="ours", metric=metric, reduce=Reduce(layers="max"), arm="b", at_least=0.1)
    study = Study(question="?", source="ours", arms={"a": [], "b": []}, scales={"cpu": []}, claims=[claim])
    jobs = [Job(arm, seed, [f"seed={seed}"], f"{arm}{seed}") for arm in "ab" for seed in range(2)]
    for job in jobs:
        write_run(folder / job.dir, made_run("ab".index(job.arm), job.seed, rows=6))
    write(Sweep(folder, "mine", "cpu", study, jobs, "moe-lab sweep mine"))


def test_a_studys_claims_are_judged(tmp_path: Path) -> None:
    sweep(tmp_path, "moe/load_cv_of_ceiling")
    said = moe_lab("report", str(tmp_path))
    assert said.code == 0 and "4 runs, 1 claims" in said.out, said
    text = Page((tmp_path / "report" / "report.html").read_text()).text
    assert "Verdicts 1 supported" in text and "of b: 0.6" in text and "claimed at least 0.1" in text
    assert "moe-lab sweep mine" in text


def test_claims_that_cannot_be_judged_are_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    sweep(tmp_path, "moe/load_vc")
    assert moe_lab("report", str(tmp_path)).code == 0
    text = Page((tmp_path / "report" / "report.html").read_text()).text
    assert "its claims cannot be judged: moe/load_vc: no such metric" in text and "Load of every expert" in text


def test_several_studies_are_sections_of_one_page(runs: Path, tmp_path: Path) -> None:
    assert moe_lab("report", str(runs), str(runs), "--out", str(tmp_path)).code == 0
    text = (tmp_path / "report.html").read_text()
    assert text.count('class="study"') == 2
    assert len(set(tmp_path.glob("figures/*-load.svg"))) == 2


@pytest.mark.parametrize(
    "words, code, told",
    [
        (["nowhere"], 2, "nowhere: neither a sweep (it has no sweep.json) nor a run directory"),
        ([], 2, "the following arguments are required: DIR"),
        (["run", "--out", "a\nb"], 2, "--out=a b: holds a control character"),
        (["damaged"], 4, "damaged"),
        (["link"], 4, "link/report: is a link; say --out to write somewhere else"),
        (["run", "--out", "linked"], 4, "linked/figures: is a link"),
        (["run", "--out", "file"], 5, "file"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run", "link", "damaged"):
        write_run(tmp_path / name, made_run(rows=3))
    (tmp_path / "damaged" / "config.yaml").write_text("a: [" * 100)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "link" / "report").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "linked" / "figures").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("")
    before = tree(tmp_path)
    said = moe_lab("report", *words)
    assert said.code == code and told in said.err and said.err.count("\n") == 1, said
    assert tree(tmp_path) == before


def test_a_run_that_holds_something_else_is_listed(runs: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "good", made_run(rows=6))
    for name, line in (
        ("wrong", '{"step": 1, "moe/selected": 3}'),
        ("huge", '{"step": 1, "loss": 1e999}'),
        ("torn", '{"st'),
    ):
        write_run(tmp_path / name, made_run(rows=6))
        (tmp_path / name / "metrics.jsonl").write_text(f"{line}\n")
    assert moe_lab("report", str(tmp_path)).code in (0, 4)
    (tmp_path / "torn" / "metrics.jsonl").write_text('{"st')
    said = moe_lab("report", str(tmp_path))
    assert said.code == 0, said.err
    text = (tmp_path / "report" / "report.html").read_text()
    assert "wrong: holds what no run writes" in text


def test_only_the_report_loads_what_draws_and_nothing_loads_torch(runs: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from moe_lab.cli import main
for words in (["report", "--help"], ["report", {str(runs)!r}, "--out", {str(tmp_path / "out")!r}]):
    sys.argv = ["moe-lab", *words]
    try:
        assert main() == 0
    except SystemExit as left:
        assert left.code == 0 and not {{"matplotlib", "numpy", "scipy", "jinja2"}} & set(sys.modules)
assert "matplotlib" in sys.modules and not {{"torch", "matplotlib.pyplot", "tkinter"}} & set(sys.modules)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_secret_of_the_environment_is_in_no_file(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "canary-8c1f5a0d")
    run = made_run(rows=6)
    run.status.update(status="failed", error="no access with canary-8c1f5a0d")
    write_run(tmp_path / "run", run)
    (tmp_path / "run" / "overrides.txt").write_text("router=switch\n+note=canary-8c1f5a0d\n")
    assert moe_lab("report", str(tmp_path / "run")).code == 0
    written = [path for path in (tmp_path / "run" / "report").rglob("*") if path.is_file()]
    assert len(written) > 10 and not [path for path in written if b"canary-8c1f" in path.read_bytes()]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["error"]
