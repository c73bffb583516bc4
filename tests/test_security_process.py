"""Nothing dangerous in the source, no code from configs, no permissions of its own, no network."""

import ast
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import moe_lab, tree

ROOT = Path(__file__).parents[1]
TINY = "dataset=clusters dataset.tokens=5000 logger=[] fast=true steps=1 model.dim=32 model.heads=2 experts.num=4"

# --- the source

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "pty", "code", "codeop"}
NAMES = {"eval", "exec", "compile", "__import__", "instantiate"}
METHODS = {
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.load", "np.load", "numpy.load"),
    *("os.system", "os.popen", "hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_method"),
    *("hydra.utils.get_class", "hydra.utils.get_object", "torch.hub.load", "pd.read_pickle", "tarfile.open"),
    *("zipfile.ZipFile", "shutil.unpack_archive", "subprocess.getoutput", "subprocess.getstatusoutput"),
}
ARGUMENTS = {"shell", "trust_remote_code", "weights_only", "allow_pickle"}


def dangers(source: str) -> Iterator[str]:
    """Imports, calls and arguments by which data becomes code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found = {alias.name.split(".")[0] for alias in node.names} | {
                (getattr(node, "module", "") or "").split(".")[0]
            }
            yield from (f"import {name}" for name in found & (MODULES | NAMES))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in NAMES | METHODS or name.endswith((".instantiate", ".UnsafeLoader", ".FullLoader")):
                yield f"{name}()"
            yield from (f"{k.arg}=" for k in node.keywords if k.arg in ARGUMENTS)


def test_the_source_turns_no_data_into_code() -> None:
    files = sorted((ROOT / "moe_lab").rglob("*.py"))
    assert len(files) > 80
    assert [(str(path), danger) for path in files for danger in dangers(path.read_text())] == []


@pytest.mark.parametrize(
    "line",
    [
        *("eval('1')", "exec(text)", "import pickle", "from pickle import loads", "torch.load(path)", "yaml.load(f)"),
        *("subprocess.run(words, shell=True)", "load_dataset(x, trust_remote_code=True)", "os.system('x')"),
        *("hydra.utils.instantiate(cfg)", "from hydra.utils import instantiate", "np.load(f, allow_pickle=True)"),
        *("read(f, weights_only=False)", "__import__('os')", "zipfile.ZipFile(path)"),
    ],
)
def test_the_source_is_searched_for(line: str) -> None:
    assert list(dangers(f"def f():\n    if True:\n        {line}\n"))
    assert not list(dangers("# eval(x)\nmodel.eval()\nmodel.compile()\ntext = 'pickle.load(f)'\n"))


# --- configs

TARGETS = [
    *("+{}._target_=os.system", "+router.{}._target_=os.system", "+a={{b:[{{_target_:os.system,_args_:[{}]}}]}}"),
    *("+hydra.{}._target_=os.system", "hydra.launcher._target_=os.{}", "-m hydra.sweeper._target_=os.{}"),
    *("+hydra.callbacks.{}._target_=os.system", "hydra.job_logging.handlers.file.class=os.{}", "+{}.a.b._target_=x"),
    *("+hydra.job.env_set.{}=x", "+balance.switch._target_=os.{}", "+wandb._target_=os.{}", "sweep.name=${{{}:x}}"),
]


@pytest.mark.parametrize("words", TARGETS)
def test_nothing_that_a_config_names_is_executed(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = moe_lab("train", *words.format("system").split(), *TINY.split()[:3])
    assert said.code == 2 and "Traceback" not in said.err, said
    assert tree(tmp_path) == set()


# --- permissions


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_permissions_are_those_of_the_umask(mask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOE_LAB_CACHE", str(tmp_path / "cache"))
    before = os.umask(mask)
    try:
        assert moe_lab("train", *TINY.split()).code == 0
        (run,) = tmp_path.glob("outputs/*/*")
        assert moe_lab("export", str(run)).code == 0
    finally:
        os.umask(before)
    paths = [*(tmp_path / "outputs").rglob("*"), *(tmp_path / "cache").rglob("*")]
    assert len(paths) > 20
    for path in paths:
        whole = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == whole & ~mask, path


# --- network

AUDITED = """
import sys
def watch(event, args):
    if event == "socket.connect" and not isinstance(args[1], (str, bytes)):
        print("connects to", args[1], file=sys.stderr)
    elif event == "socket.getaddrinfo":
        print("looks up", args[0], file=sys.stderr)
sys.addaudithook(watch)
"""
RUN = "from moe_lab.cli import main\nsys.exit(main())\n"
CALL = "import socket\nsocket.socket().connect_ex(('127.0.0.1', 9))\n"


def connections(code: str, words: list[str], folder: Path) -> list[str]:
    """The connections of a Python program and its children; of the children only where there is strace."""
    traced = ["strace", "-f", "-qq", "-e", "trace=connect", "-o", "calls"]
    alone = ["unshare", "--map-root-user", "--net"]  # there is no network to fall back on
    prefix = [word for tool in (alone, traced) if usable([*tool, "true"], folder) for word in tool]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "HF_"))}
    env |= {"HOME": str(folder), "PYTHONPATH": str(ROOT)}
    command = [*prefix, sys.executable, "-c", AUDITED + code, *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    said = [line for line in done.stderr.splitlines() if line.startswith(("connects to", "looks up"))]
    return said + [line for line in calls if "AF_INET" in line]


def usable(command: list[str], folder: Path) -> bool:
    return (
        shutil.which(command[0]) is not None and not subprocess.run(command, cwd=folder, capture_output=True).returncode
    )


def test_a_default_run_connects_to_nobody(tmp_path: Path) -> None:
    assert connections(RUN, ["train", "fast=true"], tmp_path) == []
    assert list(tmp_path.glob("outputs/*/*/wandb/offline-run-*/*.wandb"))
    assert connections(CALL, [], tmp_path)
