"""Runs that are none, and what would take the process down: one line, nothing written; the same from a shell."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.command import moe_lab, tree
from tests.edges import SMALL
from tests.refusals import CLUSTERS, lay_out, refused

ROOT = Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    lay_out(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# --- runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    for name, more in {"run": [], "wider": ["experts.num=8"]}.items():
        assert moe_lab("train", *SMALL, *more, f"hydra.run.dir={folder / name}").code == 0
    return folder


def unfinished(run: Path) -> Path:
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"status": "running"}))
    return next((run / "checkpoints").glob("step-*"))


def pickled(run: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, unfinished(run) / "model.safetensors")


def of_another_model(run: Path) -> None:
    unfinished(run)
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(run.parents[1] / "wider/checkpoints", run / "checkpoints")
    shutil.copy(run.parents[1] / "wider/metrics.jsonl", run)


def bomb(run: Path) -> None:
    (run / "config.yaml").write_text(BOMB)


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickle": (pickled, "every checkpoint is damaged"),
    "another model": (of_another_model, "every checkpoint is damaged (the newest: does not fit this run"),
    "a bomb": (bomb, "config.yaml or env.json is damaged; see moe-lab verify"),
    "half a config": (lambda run: (run / "config.yaml").write_text("a: ["), "config.yaml or env.json is damaged"),
    "no choices": (lambda run: (run / "env.json").write_text("{}"), "config.yaml or env.json is damaged"),
    "a target": (
        lambda run: (run / "config.yaml").write_text((run / "config.yaml").read_text() + "_target_: os.system\n"),
        "_target_: configs are data here",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_run_is_not_gone_on_with(name: str, here: Path, finished: Path) -> None:
    (here / "a").mkdir()
    shutil.copytree(finished / "wider", here / "wider")
    run = shutil.copytree(finished / "run", here / "a/run")
    damage, told = FOREIGN[name]
    damage(run)
    before = tree(here)
    said = moe_lab("train", "resume=a/run")
    assert said.code == 4 and said.out == "" and "Traceback" not in said.err, said
    assert [line for line in said.err.splitlines() if line.startswith("moe-lab: ")] == said.err.splitlines()[-1:]
    assert told in said.err and tree(here) == before


NO_RUNS = {
    "verify": ["nowhere", "afile", "empty", "loop", "pipe", "/proc/1", "x" * 300],
    "export": ["nowhere", "afile", "empty", "loop", "pipe", "/dev/zero", "x" * 300],
    "diff RUN": ["nowhere", "afile", "empty", "x" * 300],
    "train": [f"resume={name}" for name in ("nowhere", "afile", "empty", "loop", "/proc/1", "[a]", "x" * 300)],
}


@pytest.mark.parametrize(
    "words", [f"{verb} {run}" for verb, runs in NO_RUNS.items() for run in runs], ids=lambda words: words[:30]
)
def test_what_is_no_run(words: str, here: Path, finished: Path) -> None:
    told = "File name too long" if "xxx" in words else "no such directory" if "verify" in words else "no run directory"
    told = "no run directory" if words in ("verify empty", "verify /proc/1") else told
    refused(2, here, *words.replace("RUN", str(finished / "run")).split(), told=[told])


@pytest.mark.parametrize(
    "words, code, told",
    [
        ("export RUN --out empty", 5, "empty: Is a directory"),
        ("export RUN --out no/where.csv", 5, "no/where.csv: No such file or directory"),
        ("export RUN --format xlsx", 2, "invalid choice: 'xlsx'"),
        ("export RUN --format parquet --out -", 2, "parquet is binary; give it a file"),
        ("export", 2, "the following arguments are required: RUN; see moe-lab export --help"),
        ("diff RUN", 2, "diff needs two runs"),
        ("list router experts", 2, "unrecognized arguments: experts; see moe-lab list --help"),
        ("train -m resume=RUN", 2, "resume=: goes on with one run at a time, without -m"),
        ("train resume=RUN resume=RUN", 2, "resume=: goes on with one run at a time"),
        ("train resume=RUN stepz=3", 2, "stepz: no such key in this run; did you mean steps?"),
        ("train resume=RUN steps=4", 4, "steps=4: this run has steps=3"),
        ("verfy RUN", 2, "no such command: verfy; did you mean verify?"),
    ],
)
def test_wrong_words_for_a_run(words: str, code: int, told: str, here: Path, finished: Path) -> None:
    refused(code, here, *words.replace("RUN", str(finished / "run")).split(), told=[told])


def test_a_sweep_is_no_run(here: Path) -> None:
    assert moe_lab("train", "-m", *SMALL, "steps=1", "seed=1,2").code == 0
    refused(2, here, "train", "resume=outputs/sweeps/multirun", told=["multirun: no run directory"])


# --- resources

BOMB = "\n".join(["a0: &a0 [x,x,x,x,x,x,x,x,x,x]", *(f"a{i}: &a{i} [{f'*a{i - 1},' * 10}]" for i in range(1, 9))])
CONFIGS = {
    "bomb": (f"name: topk\n{BOMB}\n", "own/router/mine.yaml: holds more than 10,000 values, its aliases written out"),
    "itself": ("name: topk\nk: &k [*k]\n", "router=mine: nested too deep, or it leads back to itself"),
    "large": ("name: topk\n" + "# nothing\n" * 1_000_000, "mine.yaml: 10,000,011 bytes, 262,144 at most"),
    "deep": (f"name: topk\nk: {'[' * 9000}{']' * 9000}\n", "nested too deep"),
    "mappings": (f"name: topk\nk: {'{a: ' * 99}1{'}' * 99}\n", "mine.yaml: nested too deep"),
    "many": ("name: topk\n" + "".join(f"k{i}: 1\n" for i in range(11_000)), "holds more than 10,000 values"),
    "in a circle": ("defaults: [mine]\nname: topk\n", "router=mine: nested too deep, or it leads back to itself"),
    "two documents": ("name: topk\n---\nname: topk\n", "expected a single document in the stream, but found another"),
    "a number": ("42\n", "router=mine: Invalid loaded object type: int"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_would_take_the_process_down(name: str, here: Path) -> None:
    text, told = CONFIGS[name]
    (here / "own/router").mkdir(parents=True)
    (here / "own/router/mine.yaml").write_text(text)
    refused(2, here, "train", "--config-dir", "own", "router=mine", told=[told])


def test_a_config_may_have_aliases_and_its_neighbour_mistakes(here: Path) -> None:
    (here / "own/experts").mkdir(parents=True)
    (here / "own/experts/mine.yaml").write_text("name: swiglu\nnum: &n 2\nshared_experts: *n\n")
    (here / "own/experts/broken.yaml").write_text("name: [")
    (here / "own/experts/gone.yaml").symlink_to("nowhere")
    assert "shared_experts: 2" in moe_lab("train", "--config-dir", "own", "experts=mine", "--cfg", "job").out


def test_a_config_folder_may_be_a_whole_project(here: Path) -> None:
    """Only what can be chosen is weighed: not the data, the environment and the runs that lie beside it."""
    for name in ("router/mine.yaml", "data/large.yaml", ".venv/lib/large.yaml", "outputs/run/config.yaml"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("name: topk\nk: 2\nrenormalise: true\n" + "# large\n" * 40_000 * ("mine" not in name))
    said = moe_lab("train", "--config-dir", ".", "router=mine", "--cfg", "job")
    assert said.code == 0 and "k: 2" in said.out, said.err


MANY = "; at most 65,536 and 500): a config of your own takes more (--config-dir)"
COMMANDS = {
    "a long value": (["sweep.name=" + "x" * 1_000_000], f"is too long (1,000,011 characters, words: 1{MANY}"),
    "a long key": (["x" * 1_000_000 + "=1"], MANY),
    "a long list": ([f"dataset.paths=[{'x,' * 200_000}]"], MANY),
    "many overrides": ([f"x{i}=1" for i in range(5000)], f"(33,890 characters, words: 5,000{MANY}"),
    "a long number": (["steps=" + "9" * 60_000], "99...: cannot be read"),
    "a number": (["steps=" + "9" * 4000], "99...: must be below 9223372036854775808"),
    "nested lists": (["router.k=" + "[" * 3000 + "]" * 3000], "[[...: cannot be read"),
    "nested mappings": (["router.k=" + "{a:" * 3000 + "1" + "}" * 3000], "...: cannot be read"),
    "a deep key": (["+" + ".".join("a" * 3000) + "=1"], "a....: File name too long"),
    "10^12 jobs": (["-m", "seed=range(0,1000000)", "steps=range(1,1000001)"], "has 1,000,000,000,000 jobs; the limit"),
    "10^18 jobs": (["-m", "seed=range(0,1000000000000000000)"], "has 1,000,000,000,000,000,000 jobs; the limit"),
    "shuffled": (["-m", "seed=shuffle(range(0,100000000000))"], "has 100,000,000,000 jobs; the limit is 2,000"),
    "no end": (["-m", "optim.lr=interval(0,1)"], "optim.lr=interval(0,1): has no end; sweep over a,b,c or range"),
    "no step": (["-m", "seed=range(0,10,0)"], "seed=range(0,10,0): a range needs a step other than 0"),
    "no job": (["-m", "seed=range(10,0)"], "seed=range(10,0): there is nothing in it to sweep over"),
    "no match": (["-m", "router=glob(zzz*)"], "router=glob(zzz*): there is nothing in it to sweep over"),
    "a wide model": (["model.dim=8388608"], "1.1e+16 weights fit no machine; make model.dim or experts.num smaller"),
    "many experts": (["experts.num=1000000000000"], "weights fit no machine"),
    "many layers": (["model.layers=1000000000"], "model.layers=1000000000: must be at most 1000"),
    "many tokens": ([*CLUSTERS, "dataset.tokens=1000000000000"], "must be at most 1000000000"),
    "a long segment": ([*CLUSTERS, "dataset.segment=1000000000000"], "must be at most 1000000"),
    "a large batch": (["batch_size=1000000000"], "more than 67,108,864 tokens at once fit no machine"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_line_that_asks_for_too_much(name: str, here: Path) -> None:
    words, told = COMMANDS[name]
    refused(2, here, "train", *words, told=[told])


def test_many_mistakes_are_not_a_flood(here: Path) -> None:
    said = moe_lab("train", *[f"+x{i}=1" for i in range(30)])
    assert said.code == 2 and len(said.err.splitlines()) == 21
    assert said.err.splitlines()[-1] == "moe-lab: and 10 more mistakes"


def test_memory_that_is_not_there_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moe_lab.train as story

    def full(cfg: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 250 GB\nstack")

    monkeypatch.setattr(story, "assemble", full)
    said = moe_lab("train", *SMALL)
    assert said.code == 1 and len(said.err.splitlines()) == 1 and "Traceback" not in said.err
    assert "out of memory ([enforce fail]" in said.err and "make the model, the batch or the data smaller" in said.err


# --- the same from a shell

SHELL = {
    "train routr=topk": (2, "did you mean router?"),
    "train 'router=[topk'": (2, "router=[topk: cannot be read"),
    'train dataset=text dataset.paths="[no such file.txt]"': (2, "there is no no such file.txt"),
    "train dataset=text 'dataset.paths=[latin.txt]' seq_len=8": (2, "latin.txt: byte 442 (0xef) is not valid UTF-8"),
    "train +model._target_=os.system": (2, "model._target_: configs are data here"),
    "train -m seed='range(0,1000000)' 'steps=range(1,1000001)'": (2, "has 1,000,000,000,000 jobs"),
    'train resume="$NOT_SET"': (2, "resume=: is empty"),
    "train dataset=clusters output_dir=afile/runs logger='[]'": (5, "Not a directory; output_dir="),
    "train dataset=tinystories logger='[]'": (5, "dataset roneneldan/TinyStories cannot be reached"),
    'train resume="$RUN" seed=7': (4, "seed=7: this run has seed=0; only "),
}


@pytest.mark.parametrize("line", SHELL)
def test_the_same_from_a_shell(line: str, here: Path, finished: Path) -> None:
    code, told = SHELL[line]
    env = os.environ | {"PYTHONPATH": str(ROOT), "RUN": str(finished / "run"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    env |= {"HF_HOME": str(here.parent / "hf")}
    env.pop("HF_HUB_OFFLINE", None)
    before = tree(here)
    command = ["bash", "-c", f'"{sys.executable}" -m moe_lab {line}']
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=env, timeout=120)
    assert done.returncode == code and done.stdout == "", done
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("moe-lab: ") and told in done.stderr
    assert tree(here) == before
