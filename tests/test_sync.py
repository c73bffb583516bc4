"""`moe-lab sync`: what W&B gets of a run afterwards is what it would have got live, and nothing else."""

import fcntl
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from canaries import ENVIRONMENT, found
from command import moe_lab, tree
from harmed_records import HARMS, all_of, empty, rewrite
from hostile import CANARY, CODE, PLACES, SHAPES
from made_rows import made_facts, made_rows, made_summary
from tiny import tiny
from wandb_reader import Recorded, read, records
from wandb_server import Server

from moe_lab.recorded import read as read_run
from moe_lab.replay import calls, plan
from moe_lab.sinks import wandb
from moe_lab.sinks.record import chunks_joined
from moe_lab.train import train
from moe_lab.verbs import sync

KEY = "a" * 40  # the right shape, known to nobody


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No key and no server of the person who runs the tests; servers of the tests answer within a second."""
    home = tmp_path_factory.mktemp("home")
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    quick = {name: "1" for name in sync.PATIENCE if "TIMEOUT" in name or "MAX" in name}
    monkeypatch.setattr(sync, "PATIENCE", sync.PATIENCE | quick)


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of a sweep, with the record that the live mirror wrote offline."""
    folder = tmp_path_factory.mktemp("live") / "sweeps/study/run"
    folder.parent.mkdir(parents=True)
    (folder.parent / "sweep.json").write_text("{}")  # as in a sweep's folder, whose name is the group
    overrides = ["logger=[wandb]", "wandb.tags=[mine]", "wandb.project=p", "steps=20", "eval_every=10", "log_every=4"]
    train(tiny(*overrides), folder, [], {})
    return folder


@pytest.fixture
def run(mirrored: Path, tmp_path: Path) -> Path:
    """A copy of that run to do things to, under the same name."""
    return Path(shutil.copytree(mirrored.parent, tmp_path / "sweeps/study", symlinks=True)) / "run"


@pytest.fixture
def bare(run: Path) -> Path:
    """The run as if W&B had never been told of it."""
    shutil.rmtree(run / "wandb")
    return run


def the_record(run: Path) -> Path:
    (path,) = run.glob("wandb/*run-*/*.wandb")
    return path


def online(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def shown(told: Recorded) -> dict[str, Any]:
    """All that W&B has of a run, but how long the mirror ran and wandb's notes about itself."""
    history = [{k: v for k, v in row.items() if k != "_runtime"} for row in told.history]
    summary = {k: v for k, v in told.summary.items() if k not in ("_runtime", "_wandb/runtime")}
    config = {k: v for k, v in told.config.items() if k != "_wandb"}
    metrics = {name: metric.SerializeToString() for name, metric in told.metrics.items()}
    return {**vars(told), "history": history, "summary": summary, "config": config, "metrics": metrics}


def test_a_record_made_anew_is_the_live_one(mirrored: Path, bare: Path):
    said = moe_lab("sync", str(bare))
    assert said.code == 0 and "it has no wandb folder" in said.out and "is recorded offline" in said.out, said
    live, anew = shown(read(the_record(mirrored))), shown(read(the_record(bare)))
    assert anew == live
    assert live["group"] and live["project"] == "p" and "mine" in live["tags"]
    assert live["id"] == (bare / "wandb_run_id.txt").read_text()
    rows = [json.loads(line) for line in (bare / "metrics.jsonl").read_text().splitlines()]
    clocks = [json.loads(line) for line in (bare / "timing.jsonl").read_text().splitlines()]
    assert [(h["_step"], h["loss"]) for h in live["history"]] == [(row["step"], row["loss"]) for row in rows]
    assert [h["_timestamp"] for h in live["history"]] == [clock["time"] for clock in clocks]
    again = moe_lab("sync", str(bare))
    assert again.code == 0 and "rebuilt" not in again.out and the_record(bare)


def test_every_call_is_the_mirrors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where rows are sparse and a run failed, as made-up rows can show."""
    rows, summary, facts = made_rows(), made_summary(2, "diverged"), made_facts(tags=["leaks the future"])
    cfg = {"router": {"name": "topk"}, "dataset": {"name": "clusters"}, "balance": {"switch": {"name": "switch"}}}
    (tmp_path / "config.yaml").write_text(json.dumps(cfg))
    (tmp_path / "env.json").write_text(json.dumps(facts | {"cost": facts["params"]}))
    (tmp_path / "status.json").write_text('{"status": "diverged"}')
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"leaks": True}))
    for name, which in (("metrics.jsonl", 0), ("timing.jsonl", 1)):
        (tmp_path / name).write_text("".join(json.dumps(pair[which]) + "\n" for pair in rows))
    sent: list[tuple[str, tuple[Any, ...]]] = []
    monkeypatch.setattr(wandb.Wandb, "start", lambda self: None)
    monkeypatch.setattr(wandb.Wandb, "send", lambda self, name, *values: sent.append((name, values)))
    monkeypatch.setattr(wandb.Wandb, "end", wandb.Wandb.send)
    mirror = wandb.Wandb()
    mirror.open(tmp_path, cfg, facts)
    for row, timing in rows:
        mirror.row(row, timing)
    mirror.close("diverged", summary | {"leaks": True})
    assert list(calls(read_run(tmp_path))) == sent
    assert sent[-1][1][0]["leaks"] == 1 and sent[-1][1][2] == 1 and "leaks the future" in sent[0][1][1]["tags"]


@pytest.mark.parametrize(("harm", "why"), HARMS, ids=lambda h: getattr(h, "__name__", ""))
def test_only_a_whole_record_of_this_run_is_uploaded(harm: Any, why: str, run: Path):
    path = the_record(run)
    rewrite(path, all_of(path))
    assert plan(read_run(run), rebuild=False).files == [path]  # written by this test's own hand it is still whole
    harm(path)
    found_plan = plan(read_run(run), rebuild=False)
    assert found_plan.files == [] and why in (found_plan.why or "")


def test_records_longer_than_a_block_are_read(run: Path):
    path = the_record(run)
    assert path.stat().st_size > 32768  # what wandb itself wrote spans blocks
    long = empty()
    long.telemetry.cli_version = "x" * 100_000
    rewrite(path, [long, *all_of(path)])
    assert len(next(chunks_joined(path))) > 100_000
    assert list(chunks_joined(path))[1:] == [r.SerializeToString() for r in all_of(path)][1:]


def test_what_was_recorded_is_uploaded_once(run: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    with Server("well") as server:
        online(monkeypatch, server)
        said = moe_lab("sync", str(run.parent))
        assert said.code == 0 and f"uploaded {len(rows)} rows to (your entity)/p, {server.url}" in said.out, said
        assert "rebuilt" not in said.out and [row["_step"] for row in server.history] == rows
        again = moe_lab("sync", str(run.parent))
        assert again.code == 0 and "was uploaded before" in again.out and len(server.history) == len(rows)
        shutil.rmtree(run / "wandb")  # and the same without a record
        server.history.clear()
        said = moe_lab("sync", str(run))
        assert said.code == 0 and "record rebuilt (it has no wandb folder)" in said.out, said
        assert [row["_step"] for row in server.history] == rows


@pytest.mark.parametrize("behaviour", ["refuses", "silent", "500", "500 on the way"])
def test_a_dead_server_is_told_in_one_line(behaviour: str, run: Path, monkeypatch: pytest.MonkeyPatch):
    with Server(behaviour.split()[0], well_for=2 if "way" in behaviour else 0) as server:
        if behaviour == "refuses":
            server.close()
        online(monkeypatch, server)
        began = time.monotonic()
        said = moe_lab("sync", str(run))
    assert time.monotonic() - began < 15
    assert said.code == 5 and said.out == "" and KEY not in said.err
    (line,) = said.err.splitlines()
    assert line.startswith(f"moe-lab: {run}: W&B did not take it: ")
    assert not list(run.rglob("*.synced"))


def test_without_a_key_nothing_happens(run: Path, bare: Path, monkeypatch: pytest.MonkeyPatch):
    with Server("well") as server:
        online(monkeypatch, server)
        monkeypatch.delenv("WANDB_API_KEY")
        before = tree(bare)
        said = moe_lab("sync", str(bare))
        assert said.code == 5 and len(said.err.splitlines()) == 1 and "wandb login" in said.err
        assert tree(bare) == before and server.connections == 0


def test_settings_in_a_run_send_the_key_nowhere(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(run.parent)
    with Server("well") as server, Server("well") as evil:
        online(monkeypatch, server)
        monkeypatch.delenv("WANDB_BASE_URL")
        settings = f"[default]\nbase_url = {server.url}\n"
        home = Path.home() / ".config/wandb"
        home.mkdir(parents=True)
        (home / "settings").write_text(settings)
        (run.parent / "wandb").mkdir()
        (run.parent / "wandb/settings").write_text(settings.replace(server.url, evil.url))
        said = moe_lab("sync", "run")
        assert said.code == 0 and server.url in said.out and evil.connections == 0, said
        assert tree(run.parent / "wandb") == {"settings"}  # nothing is left where it ran
        (run / "wandb/settings").write_text(settings)
        said = moe_lab("sync", "run", "--rebuild")
        assert said.code == 4 and "settings" in said.err and len(said.err.splitlines()) == 1


def test_dry_run_tells_and_does_nothing(run: Path, monkeypatch: pytest.MonkeyPatch):
    with Server("well") as server:
        online(monkeypatch, server)
        monkeypatch.delenv("WANDB_API_KEY")
        before = tree(run)
        for words, what in (([], "would upload"), (["--rebuild"], "would rebuild the record (asked for) and upload")):
            said = moe_lab("sync", str(run), "--dry-run", *words)
            assert said.code == 0 and what in said.out and "rows to (your entity)/p" in said.out, said
        assert tree(run) == before and server.connections == 0


def test_all_runs_of_a_folder_and_a_bad_one_does_not_stop_the_rest(bare: Path):
    for name in ("a", "z"):
        shutil.copytree(bare, bare.parent / name)
    (bare.parent / "a/config.yaml").write_text("router: [")
    said = moe_lab("sync", str(bare.parents[1]), str(bare.parent / "z"))
    assert said.code == 4 and len(said.err.splitlines()) == 1 and "study/a: damaged" in said.err
    assert [line.partition(":")[0].rpartition("/")[2] for line in said.out.splitlines()] == ["run", "run", "z", "z"]
    assert moe_lab("sync", str(bare / "checkpoints")).code == 2


def test_a_run_that_goes_on_is_left_alone(bare: Path):
    with open(bare / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = moe_lab("sync", str(bare))
    assert said.code == 4 and "is running" in said.err and not (bare / "wandb").exists()


def test_wandb_mode_disabled_means_no(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert moe_lab("sync", str(run)).code == 2


READ = ("config", "row", "status", "metrics", "clocks", "summary", "env", "line", "Python", "_target_", "link", "pipe")
ATTACKS = {name: attack for name, attack in (CODE | SHAPES | PLACES).items() if any(word in name for word in READ)}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_run_is_read_as_data(name: str, bare: Path, monkeypatch: pytest.MonkeyPatch):
    """Refused in one line, or data like any other: never a traceback, never code."""
    monkeypatch.chdir(bare.parent)
    (bare.parent / "victim").write_text("precious")
    (bare.parent / "house").mkdir()
    made = []
    monkeypatch.setattr("moe_lab.replay.make", lambda run: made.append(list(calls_of(run))) or run.folder / "x/y")
    ATTACKS[name](bare)
    said = moe_lab("sync", "run")
    assert said.code in (0, 2, 4), said
    assert said.code == 0 or (len(said.err.splitlines()) == 1 and not made)
    assert not CANARY.exists() and (bare.parent / "victim").read_text() == "precious"


def calls_of(run: Any) -> Any:
    from moe_lab import reading

    with reading.of_a_run(run.folder):
        return list(calls(run))


MANY = {"step": 1, "eval/loss": 1, "moe/selected": [9 * [1]] * 9000}


@pytest.mark.parametrize(
    "harm",
    [
        lambda run: (run / "stolen").symlink_to("/etc/passwd"),
        lambda run: (run / "wandb_run_id.txt").write_text("../../x"),
        lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss": {"_type": "image-file"}}\n'),
        lambda run: (run / "metrics.jsonl").write_text(json.dumps(MANY)),
        lambda run: (run / "config.yaml").write_text((run / "config.yaml").read_text() + "wandb: {project: [1]}\n"),
    ],
)
def test_what_no_run_writes_is_refused(harm: Any, bare: Path):
    harm(bare)
    with open(bare / "metrics.jsonl", "a") as rows:
        rows.write("\n")
    said = moe_lab("sync", str(bare))
    assert said.code == 4 and len(said.err.splitlines()) == 1, said
    assert not list(bare.glob("wandb/**/*.wandb"))


def test_secrets_in_an_edited_run_are_not_sent(bare: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_TOKEN", "PGPASSWORD", "DATABASE_URL", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    config = (bare / "config.yaml").read_text()
    lines = [f"note: my {ENVIRONMENT['HF_TOKEN']}", f"api_token: {ENVIRONMENT['OPENAI_API_KEY']}"]
    lines += [f"where: {ENVIRONMENT['DATABASE_URL']}", f"said: {json.dumps(ENVIRONMENT['PGPASSWORD'])}"]
    (bare / "config.yaml").write_text(config.replace("- mine", f"- {ENVIRONMENT['HF_TOKEN']}") + "\n".join(lines))
    assert found((bare / "config.yaml").read_bytes())  # they are there
    assert moe_lab("sync", str(bare)).code == 0
    made = b"".join(r.SerializeToString() for r in records(the_record(bare)))
    assert b"note" in made and not found(made)
    for path in bare.rglob("wandb/**/*"):
        assert not path.is_file() or not found(path.read_bytes()), path
