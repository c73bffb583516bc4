"""`moe-lab check`: what it prints, what it writes for programs, and its exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
from command import moe_lab, tree
from made_sweep import made_run, made_sweep

from moe_lab import durable
from moe_lab.run import encode
from moe_lab.study.files import read_study
from moe_lab.study.folder import Sweep, write
from moe_lab.study.judge import judge
from moe_lab.study.measure import known
from moe_lab.study.results import load

UNEVEN = "without balancing the load is uneven"
NO_COST = "balancing costs no loss"


def rows(run: Path, cv: float, loss: float) -> None:
    """Let a run have ended with one row of these."""
    row = {"step": 6, "moe/load_cv_of_ceiling": [0.1, cv], "eval/loss": loss}
    durable.write(run / "metrics.jsonl", encode(row))


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Three seeds of each arm: uneven by 0.5 or so, and a loss that balancing moves by 0.1 or so; one run is gone."""
    sweep = made_sweep(tmp_path / "tiny", seeds=4)
    for job in sweep.jobs:
        gone = (job.arm, job.seed) == ("switch", 3)
        run = made_run(sweep, job, "oom" if gone else "completed", "out of memory" if gone else None)
        rows(run, 0.5 + job.seed / 100, 4 + job.seed + (0.1 + job.seed / 50 if job.arm == "switch" else 0))
    return sweep


def test_it_tells_each_verdict_with_its_numbers(sweep: Sweep) -> None:
    before = tree(sweep.folder)
    said = moe_lab("check", str(sweep.folder))
    assert (said.code, said.err, tree(sweep.folder)) == (0, "", before)
    lines = said.out.splitlines()
    assert lines[0] == "tiny: Does a tiny run load its experts alike?"
    assert "note: 1 of 8 runs ran out of memory: switch seed 3" in lines
    # t of 2 degrees of freedom, 2.5 % on each side: 4.3027. The second claim has the smaller p, and half of alpha.
    assert f"supported     {UNEVEN}: 0.51 [0.4852, 0.5348] at 95 %; claimed at least 0.33; 3 seeds" in said.out
    assert f"supported     {NO_COST}: -0.12 [-0.1697, -0.07032] at 95 %; claimed within 0.5; 3 seeds" in said.out
    assert lines.count(f"{'':14}3 of 4 seeds: switch seed 3 ran out of memory") == 2
    assert "eval/loss of switch_balanced minus switch; p " in said.out
    assert "by sign flips 0.125 (at best 0.125); bootstrap [" in said.out
    assert "\x1b" not in said.out and not any(line != line.rstrip() for line in lines)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_terminal_is_never_overrun(sweep: Sweep, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("COLUMNS", str(width)), ("FORCE_COLOR", "1"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    said = moe_lab("check", str(sweep.folder))
    plain = said.out
    for code in ("0m", "1m", "2m", "31m", "32m", "33m"):
        plain = plain.replace(f"\x1b[{code}", "")
    assert "\x1b[32msupported" in said.out and "\x1b" not in plain
    assert max(map(len, plain.splitlines())) <= width
    assert f"{UNEVEN}: 0.51 [" in " ".join(plain.split()) or f"{UNEVEN} 0.51 [" in " ".join(plain.split())


def test_json_holds_everything_that_the_judge_found(sweep: Sweep) -> None:
    (study,) = json.loads(moe_lab("check", "--json", str(sweep.folder)).out)["studies"]
    results = load(sweep.folder)
    assert sweep.study is not None
    told = [verdict.as_json() for verdict in judge(sweep.study, results)]
    assert study["verdicts"] == json.loads(json.dumps(told))
    assert (study["name"], study["scale"], study["claims_sha256"]) == ("tiny", "quick", sweep.claims)
    first = study["verdicts"][0]
    assert set(first["estimate"]) >= {"mean", "low", "high", "level", "p", "n", "boot_low", "sign_flip_floor"}
    assert (first["bound"], first["changed"], first["effects"]["2"]) == ("at least 0.33", False, 0.52)


def test_verdicts_are_held_against_recorded_ones(sweep: Sweep, tmp_path: Path) -> None:
    recorded = tmp_path / "verdicts.json"
    recorded.write_text(moe_lab("check", "--json", str(sweep.folder)).out)
    assert moe_lab("check", str(sweep.folder), "--expect", str(recorded)).code == 0
    other: dict[str, Any] = json.loads(recorded.read_text())
    other["studies"][0]["verdicts"][0]["verdict"] = "refuted"
    other["studies"][0]["verdicts"][1]["claim"]["says"] = "another"
    recorded.write_text(json.dumps(other))
    said = moe_lab("check", str(sweep.folder), "--expect", str(recorded))
    assert said.code == 1 and UNEVEN in said.out
    assert said.err.splitlines() == [
        f"moe-lab: {recorded}: tiny (quick): {UNEVEN}: expected refuted, is supported",
        f"moe-lab: {recorded}: tiny (quick): another: expected supported, is absent",
        f"moe-lab: {recorded}: tiny (quick): {NO_COST}: expected absent, is supported",
    ]


def test_the_code_is_0_whatever_the_verdicts(sweep: Sweep) -> None:
    for job in sweep.jobs[:3]:
        rows(sweep.folder / job.dir, 0.1 + job.seed / 100, 4 + 2 * job.seed)
    said = moe_lab("check", str(sweep.folder))
    assert said.code == 0 and said.out.count("\nrefuted ") == 1 and said.out.count("\ninconclusive ") == 1


def test_claims_that_were_edited_later_are_marked(sweep: Sweep) -> None:
    assert sweep.study is not None
    claims = [claim.model_copy(update={"at_least": 0.2} if claim.arm else {}) for claim in sweep.study.claims]
    edited = sweep.study.model_copy(update={"claims": claims})
    write(Sweep(sweep.folder, sweep.name, sweep.scale, edited, sweep.jobs, sweep.command))
    said = moe_lab("check", str(sweep.folder))
    assert said.out.count("*changed after results*: ") == 2
    assert "note: the claims were changed after 8 of 8 runs began" in said.out


def test_mistakes_are_one_line(sweep: Sweep, tmp_path: Path) -> None:
    wrong = {
        (str(tmp_path / "nowhere"),): "neither a sweep",
        (str(sweep.folder / "switch-0"),): "makes no claims",
        (str(sweep.folder), "--expect", str(tmp_path / "gone")): "gone: no such file",
        (str(sweep.folder), "--expect", str(sweep.folder / "sweep.json")): "not what moe-lab check --json writes",
        (): "required",
    }
    for words, line in wrong.items():
        said = moe_lab("check", *words)
        assert (said.code, said.out) == (2, "") and line in said.err and said.err.count("\n") == 1
    for job in sweep.jobs:
        durable.write(
            sweep.folder / job.dir / "metrics.jsonl", encode({"step": 6, "eval/loss": 1.0, "moe/load_cv": [1.0]})
        )
    said = moe_lab("check", str(sweep.folder))
    assert said.code == 2 and "moe/load_cv_of_ceiling: no such metric" in said.err and said.err.count("\n") == 1


def test_words_of_others_steer_no_terminal(sweep: Sweep) -> None:
    assert sweep.study is not None
    claim = sweep.study.claims[0].model_copy(update={"says": "[bold]\x1b[2J\nso it is"})
    hostile = sweep.study.model_copy(update={"question": "\x1b]0;x\x07?", "claims": [claim]})
    write(Sweep(sweep.folder, sweep.name, sweep.scale, hostile, sweep.jobs, sweep.command))
    said = moe_lab("check", str(sweep.folder))
    assert said.code == 0 and "[bold] [2J so it is *changed after results*: 0.51" in said.out
    assert not {"\x1b", "\x07"} & set(said.out)


@pytest.mark.parametrize("value", [["high"], [1e200], {"a": 1}, [[[1.0]]]], ids=str)
def test_what_no_run_writes_is_refused(sweep: Sweep, value: Any) -> None:
    durable.write(sweep.folder / "switch-0/metrics.jsonl", encode({"step": 6, "moe/load_cv_of_ceiling": value}))
    said = moe_lab("check", str(sweep.folder))
    assert said.code == 4 and "holds what no run writes" in said.err and said.err.count("\n") == 1


def test_the_study_of_the_docs_is_one_and_its_output_names_every_claim(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs/judging.md").read_text()
    text, printed = page.split("```yaml\n")[1].split("```")[0], page.split("```\n")[2]
    (tmp_path / "even.yaml").write_text(text)
    study, grid = read_study(tmp_path / "even.yaml")
    assert grid == {"arm": "*", "seed": "range(5)"}
    for claim in study.claims:
        assert claim.says in " ".join(printed.split()) and known(claim.metric)
