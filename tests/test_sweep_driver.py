"""The driver with real processes: whatever a job does ends that job alone, and the same command finishes the rest.

Jobs are `moe-lab` with a stub in the place of training, so that a dozen take a second. MOE_LAB_EVERY_FAULT=1 runs the
sizes of a hundred jobs.
"""

import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_lab.run import read_status
from moe_lab.study import worker
from moe_lab.study.results import load

ROOT = Path(__file__).parents[1]
LARGE = bool(os.environ.get("MOE_LAB_EVERY_FAULT"))
JOBS = 100 if LARGE else 10
SWEEP = Path("outputs/sweeps/multirun")


class Sweeper:
    """`python stub_sweep.py ...`: the command line in a process of its own, with stubs for its jobs."""

    def __init__(self, here: Path, *words: str, **env: str):
        command = [sys.executable, str(ROOT / "tests/stub_sweep.py"), *words]
        env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | env
        self.process = subprocess.Popen(command, cwd=here, env=env, stdout=-1, stderr=-1, text=True)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


def sweep(here: Path, *words: str, **env: str) -> tuple[int, str, str]:
    return Sweeper(here, "train", "-m", *words, **env).end()


def ran(here: Path) -> list[str]:
    """The seeds of the jobs that ran to their end, in order, as often as they did."""
    log = here / "ran.txt"
    return log.read_text().split() if log.exists() else []


def wait_for(what, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


# seed -> what the job does, and what must be said of it
HARM = {
    1: ("kill", "failed", "killed by SIGKILL"),
    2: ("exit", "failed", "ended with exit code 7"),
    3: ("raise", "failed", "RuntimeError: on purpose"),
    4: ("hang", "timeout", "took longer than 4 s"),
    5: ("oom", "oom", "MemoryError"),
    6: ("refuse", "failed", "on purpose"),
    7: ("deaf", "timeout", "took longer than 4 s"),
}


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[int, str, str]]:
    here = tmp_path_factory.mktemp("harmed")
    harm = json.dumps({str(seed): what for seed, (what, *_) in HARM.items()})
    words = (f"seed=range({JOBS})", "sweep.timeout=0.0667", "sweep.jobs=4")
    return here, sweep(here, *words, HARM=harm)


def test_what_a_job_does_ends_that_job_alone(harmed: tuple[Path, tuple[int, str, str]]) -> None:
    here, (code, out, err) = harmed
    assert code == 1, err
    results = {r.job.seed: r for r in load(here / SWEEP).results}
    for seed, (_, state, why) in HARM.items():
        assert (results[seed].state, why in str(results[seed].why)) == (state, True), (seed, results[seed])
        (line,) = (line for line in err.splitlines() if f" seed={seed}: " in line)
        assert line.startswith(f"moe-lab: {state}: ") and why in line
        assert Path(here, line.partition("; its log is ")[2]).is_file()
    others = set(range(JOBS)) - set(HARM)
    assert {seed for seed, r in results.items() if r.state == "completed"} == others == set(map(int, ran(here)))
    assert err.splitlines()[-1] == f"moe-lab: {len(HARM)} of {JOBS} runs failed"
    assert f"[{len(others)}/{JOBS}] completed: " in out


def test_the_same_command_runs_again_what_failed_and_nothing_else(harmed: tuple[Path, tuple[int, str, str]]) -> None:
    here, _ = harmed
    before = ran(here)
    code, out, err = sweep(here, f"seed=range({JOBS})", "sweep.jobs=4")
    assert code == 0, err
    assert sorted(map(int, ran(here)[len(before) :])) == sorted(HARM)
    assert f"{JOBS - len(HARM)} of {JOBS} jobs were completed before" in out
    done, began = ran(here), resource.getrusage(resource.RUSAGE_CHILDREN)
    assert sweep(here, f"seed=range({JOBS})") == (0, f"{JOBS} of {JOBS} jobs were completed before\n", "")
    assert ran(here) == done and resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began.ru_utime < 5


@pytest.mark.parametrize("after", [0.6] if not LARGE else [i / 5 for i in range(1, 21)])
def test_a_killed_driver_loses_and_repeats_nothing(after: float, tmp_path: Path) -> None:
    driver = Sweeper(tmp_path, "train", "-m", f"seed=range({JOBS})", "sweep.jobs=3", SECONDS="0.3")
    wait_for(lambda: ran(tmp_path))
    time.sleep(after)
    driver.process.kill()
    driver.process.wait()
    done = ran(tmp_path)
    assert len(done) < JOBS
    code, _, err = sweep(tmp_path, f"seed=range({JOBS})", "sweep.jobs=3", SECONDS="0")
    assert code == 0, err
    assert sorted(map(int, ran(tmp_path))) == list(range(JOBS))  # each once: a job that ends is not repeated


def test_jobs_end_with_a_killed_driver(tmp_path: Path) -> None:
    driver = Sweeper(tmp_path, "train", "-m", "seed=range(2)", "sweep.jobs=2", SECONDS="60")
    wait_for(lambda: len(states(tmp_path)) == 2 and set(states(tmp_path)) == {"running"})
    driver.process.kill()
    wait_for(lambda: set(states(tmp_path)) == {"preempted"}, 10)
    assert ran(tmp_path) == []


def states(here: Path) -> list[str]:
    found = [read_status(path.parent) for path in (here / SWEEP).glob("*/status.json")]
    return [status["status"] for status in found if status]


def test_ctrl_c_stops_resumably_and_twice_at_once(tmp_path: Path) -> None:
    driver = Sweeper(tmp_path, "train", "-m", "seed=range(4)", "sweep.jobs=2", SECONDS="60")
    wait_for(lambda: states(tmp_path).count("running") == 2)
    driver.process.send_signal(signal.SIGINT)
    code, _, err = driver.end()
    assert code == 75 and err.splitlines()[-1] == "moe-lab: stopped by SIGINT; the same command goes on"
    assert states(tmp_path) == ["preempted"] * 2
    deaf = json.dumps({str(seed): "deaf" for seed in range(4)})
    driver = Sweeper(tmp_path, "train", "-m", "seed=range(4)", "sweep.jobs=2", HARM=deaf)
    wait_for(lambda: states(tmp_path).count("running") == 2)
    driver.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert driver.process.poll() is None
    driver.process.send_signal(signal.SIGINT)
    assert driver.end()[0] == 130
    assert sweep(tmp_path, "seed=range(4)", "sweep.jobs=4", SECONDS="0")[0] == 0
    assert sorted(ran(tmp_path)) == ["0", "1", "2", "3"]


def test_a_second_sweeper_is_told(tmp_path: Path) -> None:
    first = Sweeper(tmp_path, "train", "-m", "seed=range(2)", "sweep.jobs=2", SECONDS="60")
    wait_for(lambda: "running" in states(tmp_path))
    code, out, err = sweep(tmp_path, "seed=range(2)")
    assert (code, out) == (4, "")
    assert err == f"moe-lab: {SWEEP}: another sweep is running here; moe-lab watch {SWEEP} shows it\n"
    first.process.send_signal(signal.SIGTERM)
    assert first.end()[0] == 75


def test_a_driver_keeps_nothing_of_its_jobs(tmp_path: Path) -> None:
    """Open files, zombies and memory after many jobs are those after a few."""
    code, _, err = sweep(tmp_path, f"seed=range({200 if LARGE else 24})", "sweep.jobs=4", SECONDS="0", LEAKS="1")
    assert code == 0, err
    found = [json.loads(line) for line in (tmp_path / "leaks.jsonl").read_text().splitlines()]
    early, late = found[4], found[-1]
    assert late["files"] <= early["files"] + 1 and late["zombies"] <= 1
    assert late["kib"] - early["kib"] < 50_000


def test_other_sources_are_said_and_fresh_runs_them_again(tmp_path: Path) -> None:
    study = [str(ROOT / "tests/tiny_study.yaml"), "scale=quick", "sweep.jobs=4"]
    assert Sweeper(tmp_path, "sweep", *study, SECONDS="0").end()[0] == 0
    assert len(ran(tmp_path)) == 4
    for path in list((tmp_path / "outputs/sweeps/tiny_study-quick").glob("*/env.json"))[:3]:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sources": "older"}))
    code, _, err = Sweeper(tmp_path, "sweep", *study, SECONDS="0").end()
    assert code == 0 and "3 of 4 jobs were run by other sources" in err and len(ran(tmp_path)) == 4
    code, _, err = Sweeper(tmp_path, "sweep", *study, "--fresh", SECONDS="0").end()
    assert code == 0 and len(ran(tmp_path)) == 7 and "other sources" not in err


def test_who_measures_for_a_driver_that_is_gone_says_nothing() -> None:
    """A driver that was killed meanwhile reads no answer, neither a number nor an error."""
    for function in (dict, lambda: 1 / 0):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        ours.close()
        worker._answer(theirs, function, ())


def test_ctrl_c_does_not_reach_what_forks_the_jobs(tmp_path: Path) -> None:
    """While it imports what it preloads, too: later it ignores the signal by itself."""
    (tmp_path / "slow.py").write_text("import time; time.sleep(5)")
    script = "from multiprocessing import forkserver as f; from moe_lab.study import worker; worker.HEAVY = ['slow']; "
    script += "worker._forks(); print(f._forkserver._forkserver_pid, flush=True)"
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=env) as asker:
        assert asker.stdout is not None
        status = Path(f"/proc/{asker.stdout.readline().strip()}/status")
        ignored = re.search(r"SigIgn:\s*(\w+)", status.read_text())
    assert ignored and int(ignored[1], 16) & 1 << signal.SIGINT - 1
