"""Run directories and caches as an attacker would write them: each changes a copy of a real one."""

import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Attack = Callable[[Path], object]
CANARY = Path("pwned")  # in the folder where the command runs; exists only if something was executed


class Evil:
    """Unpickling it leaves the canary."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {CANARY.absolute()}",)


# --- what lies in a file


def pickled(protocol: int) -> bytes:
    return pickle.dumps({"weights": Evil()}, protocol=protocol)


def torch_file(new: bool) -> bytes:
    out = io.BytesIO()
    torch.save({"weights": Evil()}, out, _use_new_zipfile_serialization=new)
    return out.getvalue()


def torch_tar() -> bytes:
    """The oldest format: a tar with pickles in it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(pickled(2))
            tar.addfile(info, io.BytesIO(pickled(2)))
    return out.getvalue()


def zipped(*layers: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in layers:
            archive.writestr(name, content)
    return out.getvalue()


def numpy_file(zip_it: bool) -> bytes:
    out = io.BytesIO()
    (np.savez if zip_it else np.save)(out, np.array([Evil()], dtype=object), allow_pickle=True)
    return out.getvalue()


def tensors(header: str | dict[str, Any], body: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    """A safetensors file with a header of one's own."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def one(dtype: str = "F32", shape: Any = (4,), at: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": at}


# --- how it gets into a run


def in_checkpoints(name: str, content: Callable[[], bytes]) -> Attack:
    """Put it in the place of a file of every checkpoint, with checksums that fit."""

    def attack(run: Path) -> None:
        for step in (run / "checkpoints").iterdir():
            (step / name).write_bytes(content())
            seal(step)

    return attack


def in_run(name: str, content: Callable[[], bytes]) -> Attack:
    def attack(run: Path) -> None:
        for path in run.glob(name):
            path.unlink()
            path.write_bytes(content())

    return attack


def merged(name: str, **changes: Any) -> Attack:
    """Change keys of JSON files of a run, checkpoints sealed again."""

    def attack(run: Path) -> None:
        for path in run.glob(name):
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
            if path.parent.parent.name == "checkpoints" and path.name != "manifest.json":
                seal(path.parent)

    return attack


def appended(name: str, text: str) -> Attack:
    return lambda run: (run / name).write_text((run / name).read_text() + text)


def sparse(name: str, size: int) -> Attack:
    """A file that claims a size and takes no disk."""

    def attack(run: Path) -> None:
        for path in run.glob(name):
            os.truncate(path, size)
            if path.parent.parent.name == "checkpoints":
                manifest = json.loads((path.parent / "manifest.json").read_text())
                manifest["files"][path.name]["bytes"] = size
                (path.parent / "manifest.json").write_text(json.dumps(manifest))

    return attack


def replaced(name: str, make: Callable[[Path], object]) -> Attack:
    """Another kind of thing in the place of a file: a link, a pipe."""

    def attack(run: Path) -> None:
        for path in list(run.glob(name)):
            path.rename(run.parent / f"was-{path.parent.name}-{path.name}")
            make(path)

    return attack


def listed(**files: str) -> Attack:
    """A manifest that names files of others."""

    def attack(run: Path) -> None:
        for step in (run / "checkpoints").iterdir():
            manifest = json.loads((step / "manifest.json").read_text())
            manifest["files"] |= dict.fromkeys(files.values(), manifest["files"]["state.json"])
            (step / "manifest.json").write_text(json.dumps(manifest))

    return attack


def seal(step: Path) -> None:
    """Checksums of what is there now."""
    manifest = json.loads((step / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (step / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (step / "manifest.json").write_text(json.dumps(manifest))


def deep(depth: int, opening: str = '{"a":', closing: str = "}") -> str:
    return opening * depth + "1" + closing * depth


MODEL, STATE, OPTIMIZER = "model.safetensors", "state.safetensors", "optimizer.safetensors"
CALL = "os.system"
PYTHON = "router: !!python/object/apply:os.system ['touch pwned']\n"
ALIASES = "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9 if i else ['x'] * 9)}]\n" for i in range(9))

CODE: dict[str, Attack] = {
    **{f"pickle, protocol {p}": in_checkpoints(MODEL, lambda p=p: pickled(p)) for p in range(6)},
    "pickle as optimiser": in_checkpoints(OPTIMIZER, lambda: pickled(2)),
    "pickle as state": in_checkpoints(STATE, lambda: pickled(4)),
    "pickle as state.json": in_checkpoints("state.json", lambda: pickled(0)),
    "pickle as manifest": in_run("checkpoints/*/manifest.json", lambda: pickled(0)),
    "pickle as config": in_run("config.yaml", lambda: pickled(0)),
    "pickle as status": in_run("status.json", lambda: pickled(0)),
    "pickle as metrics": in_run("metrics.jsonl", lambda: pickled(2) + b"\n"),
    "torch zip": in_checkpoints(MODEL, lambda: torch_file(True)),
    "torch of before 1.6": in_checkpoints(MODEL, lambda: torch_file(False)),
    "torch tar": in_checkpoints(MODEL, torch_tar),
    "zip in a zip": in_checkpoints(MODEL, lambda: zipped(("archive/data.pkl", zipped(("data.pkl", pickled(2)))))),
    "zip bomb": in_checkpoints(MODEL, lambda: zipped(("archive/data.pkl", b"\0" * (50 << 20)))),
    "npy of objects": in_checkpoints(STATE, lambda: numpy_file(False)),
    "npz of objects": in_checkpoints(STATE, lambda: numpy_file(True)),
    "yaml with a Python object": in_run("config.yaml", lambda: PYTHON.encode()),
    "yaml with a Python name": in_run("config.yaml", lambda: b"steps: !!python/name:os.system\n"),
    "config with a _target_": appended("config.yaml", "_target_: os.system\ncommand: touch pwned\n"),
    "json with a class": merged(
        "checkpoints/*/state.json", __class__="os.system", __reduce__=["os.system", "touch pwned"]
    ),
    "json of jsonpickle": merged(
        "status.json", **{"py/object": "os.system", "py/reduce": ["os.system", ["touch pwned"]]}
    ),
    "choices that name code": merged("env.json", choices={"router": CALL, "_target_": CALL}),
}

SHAPES: dict[str, Attack] = {
    "header of 2^63 bytes": in_checkpoints(MODEL, lambda: tensors({}, length=2**63)),
    "header of 99 MB": in_checkpoints(MODEL, lambda: tensors({}, length=99 << 20)),
    "header deep as a well": in_checkpoints(MODEL, lambda: tensors(deep(100_000))),
    "header is a list": in_checkpoints(MODEL, lambda: tensors("[1]")),
    "overlapping tensors": in_checkpoints(MODEL, lambda: tensors({"a": one(), "b": one()})),
    "offsets beyond the end": in_checkpoints(MODEL, lambda: tensors({"a": one(at=(0, 2**40))})),
    "offsets backwards": in_checkpoints(MODEL, lambda: tensors({"a": one(at=(64, 0))})),
    "negative offsets": in_checkpoints(MODEL, lambda: tensors({"a": one(at=(-16, 0))})),
    "a tensor named twice": in_checkpoints(MODEL, lambda: tensors('{"a":%s,"a":%s}' % ((json.dumps(one()),) * 2))),
    "shape of 2^60": in_checkpoints(MODEL, lambda: tensors({"a": one(shape=(2**60,))})),
    "shape that overflows": in_checkpoints(MODEL, lambda: tensors({"a": one(shape=(2**33, 2**33))})),
    "shape with 0 and 2^60": in_checkpoints(MODEL, lambda: tensors({"a": one(shape=(0, 2**60), at=(0, 0))}, b"")),
    "dtype of no machine": in_checkpoints(MODEL, lambda: tensors({"a": one("F31337")})),
    "20 MB of metadata": in_checkpoints(MODEL, lambda: tensors({"__metadata__": {"x": "y" * (20 << 20)}}, b"")),
    "another model": in_checkpoints(MODEL, lambda: tensors({"a": one()}, b"\0" * 16)),
    "optimiser with names of its own": in_checkpoints(OPTIMIZER, lambda: tensors({"../../x.y": one()}, b"\0" * 16)),
    "state with names of its own": in_checkpoints(STATE, lambda: tensors({"recorder.__class__": one()}, b"\0" * 16)),
    "values of wrong types": merged(
        "checkpoints/*/state.json", tokens="many", last_row=[], metrics_bytes="all", data=7
    ),
    "metrics_bytes below 0": merged("checkpoints/*/state.json", metrics_bytes=-1),
    "metrics_bytes of 2^62": merged("checkpoints/*/state.json", metrics_bytes=2**62),
    "state.json deep as a well": in_checkpoints("state.json", lambda: deep(1_000_000).encode()),
    "state.json of 200 MB": sparse("checkpoints/*/state.json", 200 << 20),
    "state.json with NaN": in_checkpoints("state.json", lambda: b'{"tokens": NaN}'),
    "a number of a million digits": in_checkpoints("state.json", lambda: b'{"tokens": 1' + b"0" * 10**6 + b"}"),
    "manifest with ../ in it": listed(a="../../../../../../etc/passwd"),
    "manifest with an absolute name": listed(a="/etc/passwd"),
    "manifest of wrong types": merged("checkpoints/*/manifest.json", files=[["model.safetensors"]], step="1"),
    "config full of aliases": in_run("config.yaml", ALIASES.encode),
    "config deep as a well": in_run("config.yaml", lambda: b"a: " + b"[" * 100_000),
    "config of 50 MB": sparse("config.yaml", 50 << 20),
    "config of one word": in_run("config.yaml", lambda: b"hello\n"),
    "config that is no UTF-8": in_run("config.yaml", lambda: b"seed: \xff\xfe\n"),
    "config of wrong types": in_run("config.yaml", lambda: b"checkpoint: 3\nsteps: [1]\n"),
    "env.json of wrong types": in_run("env.json", lambda: b'{"choices": 3, "dataset": [], "config_hash": {}}'),
    "status of wrong types": merged("status.json", attempt=[1], step={"a": 1}, status=["completed"]),
    "status with numbers beyond all": merged("status.json", attempt=10**30, step=-(10**30)),
    "a row deep as a well": in_run("metrics.jsonl", lambda: b'{"step": ' + b"[" * 1_000_000 + b"\n"),
    "a line of a gigabyte": sparse("metrics.jsonl", 1 << 30),
    "rows of wrong types": in_run(
        "metrics.jsonl", lambda: b'{"step": 1, "tokens": "x", "loss": {}, "moe/selected": 3}\n'
    ),
    "rows that are no UTF-8": in_run("metrics.jsonl", lambda: b'{"step": 1, "a": "\xff"}\n'),
    "clocks of wrong types": in_run("timing.jsonl", lambda: b'{"step": 1, "elapsed": "x", "tokens_per_s": {}}\n'),
    "summary deep as a well": in_run("summary.json", lambda: deep(100_000).encode()),
    "summary of wrong types": in_run("summary.json", lambda: b'{"verdicts": [3], "final": 7, "eval": "x", "cost": []}'),
    "overrides that are no UTF-8": in_run("overrides.txt", lambda: b"\xff\xfe\n"),
}

PLACES: dict[str, Attack] = {
    "a pipe as model": replaced(f"checkpoints/*/{MODEL}", os.mkfifo),
    "a pipe as manifest": replaced("checkpoints/*/manifest.json", os.mkfifo),
    "a pipe as config": replaced("config.yaml", os.mkfifo),
    "a pipe as metrics": replaced("metrics.jsonl", os.mkfifo),
    "a pipe as status": replaced("status.json", os.mkfifo),
    "a pipe as summary": replaced("summary.json", os.mkfifo),
    "a pipe as overrides": replaced("overrides.txt", os.mkfifo),
    "a pipe as log": replaced("train.log", os.mkfifo),
    "a folder as model": replaced(f"checkpoints/*/{MODEL}", Path.mkdir),
    "a folder as status": replaced("status.json", Path.mkdir),
    "/dev/zero as model": replaced(f"checkpoints/*/{MODEL}", lambda path: path.symlink_to("/dev/zero")),
    "/dev/zero as metrics": replaced("metrics.jsonl", lambda path: path.symlink_to("/dev/zero")),
    "/dev/zero as config": replaced("config.yaml", lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": replaced("metrics.jsonl", lambda path: path.symlink_to(path.name)),
    "metrics lead out": replaced("metrics.jsonl", lambda path: path.symlink_to(path.parent.parent / "victim")),
    "the lock leads out": replaced(".lock", lambda path: path.symlink_to(path.parent.parent / "victim")),
    "the log leads out": replaced("train.log", lambda path: path.symlink_to(path.parent.parent / "victim")),
    "checkpoints lead out": replaced("checkpoints", lambda path: path.symlink_to(path.parent.parent / "house")),
    "temporary files lead in": lambda run: (run / ".x.tmp.1").symlink_to(run / "checkpoints"),
}

# --- token caches


def in_cache(name: str, content: Callable[[], bytes]) -> Attack:
    """Put it in the place of a file of a cache entry, with checksums that fit."""

    def attack(entry: Path) -> None:
        (entry / name).write_bytes(content())
        describe(entry)

    return attack


def described(**changes: Any) -> Attack:
    return lambda entry: describe(entry, **changes)


def describe(entry: Path, **changes: Any) -> None:
    """A meta.json for what is there now, sealed as moe-lab seals it."""
    meta = json.loads((entry / "meta.json").read_text())["meta"]
    for name in meta["checks"]:
        content = (entry / name).read_bytes()
        meta["files"][name] = hashlib.sha256(content).hexdigest()
        meta["checks"][name]["bytes"] = len(content)
    meta |= changes
    sealed = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (entry / "meta.json").write_text(json.dumps({"sha256": sealed, "meta": meta}))


def elsewhere(name: str, make: Callable[[Path], object]) -> Attack:
    def attack(entry: Path) -> None:
        (entry / name).unlink(missing_ok=True)
        make(entry / name)

    return attack


def moved_out(entry: Path) -> None:
    house = entry.parent.parent / "house"
    entry.rename(house / entry.name)
    entry.symlink_to(house / entry.name)
    (house / entry.name / "train.bin").write_bytes(b"")


def locked_out(entry: Path) -> None:
    (entry / "meta.json").unlink()
    (entry.parent / f"{entry.name}.lock").symlink_to(entry.parent.parent / "victim")


CACHES: dict[str, Attack] = {
    "pickle as tokens": in_cache("train.bin", lambda: pickled(2)),
    "npz as tokens": in_cache("train.bin", lambda: numpy_file(True)),
    "npy as validation": in_cache("valid.bin", lambda: numpy_file(False)),
    "torch as domains": in_cache("train.domain", lambda: torch_file(True)),
    "tokens of no vocabulary": in_cache("train.bin", lambda: b"\xff" * 20_000),
    "pickle as meta.json": elsewhere("meta.json", lambda path: path.write_bytes(pickled(0))),
    "meta.json deep as a well": elsewhere("meta.json", lambda path: path.write_text(deep(100_000))),
    "pickle as tokenizer": in_cache("tokenizer.json", lambda: pickled(0)),
    "tokenizer deep as a well": in_cache("tokenizer.json", lambda: deep(100_000).encode()),
    "tokens of Python objects": described(dtype="O", domain_dtype="|O"),
    "more tokens than atoms": described(vocab_size=2**80),
    "fewer tokens than none": described(vocab_size=-1),
    "names of wrong types": described(domains={"a": 1}),
    "files outside": described(checks={"../../victim": {"bytes": 8}}, files={"../../victim": ""}),
    "files at the root": described(checks={"/etc/passwd": {"bytes": 1}}, files={"/etc/passwd": ""}),
    "a pipe as tokens": elsewhere("train.bin", os.mkfifo),
    "a pipe as meta.json": elsewhere("meta.json", os.mkfifo),
    "a pipe as bigrams": elsewhere("ngram.json", os.mkfifo),
    "/dev/zero as tokens": elsewhere("train.bin", lambda path: path.symlink_to("/dev/zero")),
    "/dev/zero as bigrams": elsewhere("ngram.json", lambda path: path.symlink_to("/dev/zero")),
    "bigrams deep as a well": elsewhere("ngram.json", lambda path: path.write_text(deep(100_000))),
    "bigrams of wrong types": elsewhere("ngram.json", lambda path: path.write_text('{"bigram": "x", "unigram": []}')),
    "bigrams lead out": elsewhere("ngram.json", lambda path: path.symlink_to(path.parent.parent.parent / "victim")),
    "the entry is elsewhere": moved_out,
    "the lock leads out of the cache": locked_out,
}
