"""Names and overrides of any kind write nothing outside the folder that the user names, and break no terminal."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Said, moe_lab, tree

ROOT = Path(__file__).parents[1]
NAMES = {
    "up": "../x",
    "far up": "../../../../x",
    "two dots": "..",
    "empty": "",
    "300 characters": "n" * 300,
    "colour": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;pwned\x07",
    "return": "all is\rwell",
    "new line": "a\nmoe-lab: all is well",
    "8-bit escape": "\x9b31mred",
    "right to left": "abc\u202etxt.exe",
    "half a character": "a\udc80b",
    "markup": "[/red]x",
    "script": "<script>alert(1)</script>",
    "formula": "=cmd|' /C calc'!A0",
    "shell": "$(touch pwned);`touch pwned`",
    "emoji": "🦀",
    "device": "CON",
}
FEW = {kind: NAMES[kind] for kind in ("up", "empty", "300 characters", "title", "right to left", "markup", "script")}
CONTROL = {"colour", "title", "return", "new line", "8-bit escape", "right to left", "half a character"}
TINY = "dataset=clusters dataset.tokens=5000 logger=[] fast=true steps=1 model.dim=32 model.heads=2 experts.num=4"

# Every place where a name can be given; {} is the name, quoted where Hydra reads it.
PLACES = [
    *("sweep.name={}", "-m sweep.name={}", "-m sweep.name=a,{}", "hydra.job.name={}", "hydra.output_subdir={}"),
    *("-m hydra.sweep.subdir={}", "hydra.job_logging.handlers.file.filename={}", "hydra/job_logging={}"),
    *("router={}", "+{}=1", "resume={}", "--config-dir {}", "--config-name {}", "dataset=text dataset.paths=[{}]"),
]
FOLDERS = ["output_dir={}", "hydra.run.dir={}", "-m hydra.sweep.dir={}"]

written: list[str] = []  # what this process has opened for writing, made, moved or removed


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if event == "open":
        paths = args[:1] if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else ()
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"):
        paths = args[:1]
    else:
        paths = args[:2] if event in ("os.rename", "os.link", "os.symlink") else ()
    written.extend(os.fsdecode(path) for path in paths if isinstance(path, str | bytes))


sys.addaudithook(_watch)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to stand in, deep in a folder of its own."""
    folder = tmp_path / "a/b/c/d/here"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    yield folder


def quoted(name: str) -> str:
    """As Hydra reads it."""
    return "'" + name.replace("'", r"\'") + "'"


def names_for(place: str) -> Iterable[tuple[str, str]]:
    """All of them at the places that are used most; a check of all names everywhere takes a minute."""
    return (NAMES if place in ("sweep.name={}", "output_dir={}", "resume={}", "+{}=1") else FEW).items()


def asked(place: str, name: str) -> Said:
    plain = place.startswith(("--", "resume", "+"))
    words = [word.replace("{}", name if plain else quoted(name)) for word in place.split()]
    tiny = [word for word in TINY.split() if word.partition("=")[0] not in place]
    written.clear()
    return moe_lab("train", *words, *tiny)


def outside(folder: Path) -> list[str]:
    """What was written and lies neither in `folder` nor in the token cache."""
    allowed = (folder.resolve(), Path(os.environ["MOE_LAB_CACHE"]).resolve(), Path(os.devnull))
    paths = [Path(os.path.realpath(path)) for path in written if "/torchinductor_" not in path]  # torch's own
    return [str(path) for path in paths if not any(path.is_relative_to(a) or a.is_relative_to(path) for a in allowed)]


def breaks_terminal(text: str) -> str:
    return "".join(c for c in text if not c.isprintable() and c not in "\n\t")


@pytest.mark.parametrize("place", PLACES)
def test_a_name_leads_nowhere(place: str, here: Path, tmp_path: Path) -> None:
    for kind, name in names_for(place):
        before = tree(tmp_path)
        said = asked(place, name)
        assert said.code in (0, 2) and "Traceback" not in said.err, (kind, said)
        assert not breaks_terminal(said.out + said.err), (kind, said)
        if said.code:
            assert len(said.err.splitlines()) == 1, (kind, said)
            assert tree(tmp_path) == before and not outside(Path(os.devnull)), (kind, said, written)
        else:
            assert kind not in CONTROL or place.startswith(("--", "router", "resume")), (kind, said)
            assert not outside(here / "outputs"), (kind, outside(here / "outputs"))


@pytest.mark.parametrize("place", FOLDERS)
def test_a_run_writes_only_into_the_folder_that_was_named(place: str, here: Path, tmp_path: Path) -> None:
    for kind, name in names_for(place):
        before = tree(tmp_path)
        said = asked(place, name)
        assert "Traceback" not in said.err and not breaks_terminal(said.out + said.err), (kind, said)
        assert said.code == (2 if kind in CONTROL | {"empty", "300 characters", "two dots"} else 0) or (
            (place, kind, said.code) in (("output_dir={}", "two dots", 0), ("-m hydra.sweep.dir={}", "two dots", 0))
        ), (kind, said)
        if said.code:
            assert tree(tmp_path) == before and not outside(Path(os.devnull)), (kind, said)
        else:
            assert not outside(Path(name)), (kind, outside(Path(name)))
    assert not list(tmp_path.rglob("pwned"))


def test_the_watch_sees_a_write_outside(here: Path) -> None:
    written.clear()
    (here / "elsewhere").write_text("x")
    (here / "elsewhere").rename(here / "moved")
    assert outside(here / "outputs") == [str(here / "elsewhere"), str(here / "elsewhere"), str(here / "moved")]
    assert breaks_terminal("a\x1bb\rc\n") == "\x1b\r"


@pytest.fixture
def presets(here: Path) -> Path:
    """A config folder of somebody else, with such names in all that is shown of it."""
    folder = here / "moe_lab_conf"
    for group in ("router", "evil\x1b[31m", "../sweeps"):
        (folder / group).mkdir(parents=True)
        for kind, name in NAMES.items():
            if name and "/" not in name and len(name) < 200:
                about = name.replace("\n", " ")
                text = f"# {about}\nname: topk\nk: 1 # {about} | [bold]\nrenormalise: false\n"
                (folder / group / f"{name}.yaml").write_text(text, errors="surrogateescape")
                (folder / group / f"{kind.replace(' ', '_')}.yaml").write_text(text, errors="surrogateescape")
    return folder


@pytest.mark.parametrize(
    "words", ["list", "list router", "list sweeps", "train --help", "-sc query=bash", "train routr=x", "info"]
)
def test_what_is_shown_of_the_presets_of_others(words: str, presets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "moe-lab train router=")
    monkeypatch.setenv("MOE_LAB_PLUGINS", "\x1b[31m" if words == "info" else "")
    said = moe_lab(*words.split())
    assert (said.out or said.err) and not breaks_terminal(said.out + said.err), said
    assert "Traceback" not in said.err


@pytest.mark.parametrize("flag", ["--info searchpath", "--cfg job", "--cfg all", "--info defaults-tree"])
def test_what_hydra_shows(flag: str, here: Path) -> None:
    folder = here / "evil\x1b[31m"
    folder.mkdir()
    for words in (
        ["--config-dir", str(folder)],
        ["sweep.name='a\x1b[31m'"],
        ["sweep.name='a\u202eb'"],
        ["hydra.job.name='\x9b'"],
    ):
        said = moe_lab("train", *flag.split(), *words)
        assert said.code == 2 and not breaks_terminal(said.out + said.err), said


def test_a_file_with_a_name_that_steers_a_terminal(here: Path) -> None:
    """Its name is not in the config: it comes from a link, and from a folder."""
    evil = here / "texts/\x1b[31mred[bold].txt"
    evil.parent.mkdir()
    evil.write_text("one two three four five six seven\n" * 400)
    (here / "link.txt").symlink_to(evil)
    text = [word for word in TINY.split() if not word.startswith("dataset")]
    said = moe_lab("train", "dataset=text", "dataset.paths=[link.txt]", *text)
    assert said.code == 0 and not breaks_terminal(said.out + said.err), said
    (run,) = here.glob("outputs/*/*")
    for words in (("diff", "--all", str(run), str(run)), ("export", str(run), "--out", "-"), ("verify", str(run))):
        said = moe_lab(*words)
        assert said.code == 0 and not breaks_terminal(said.out + said.err), said
    evil.write_bytes(b"\xff")
    said = moe_lab("train", "dataset=text", "dataset.paths=[texts]", "dataset.extensions=[.txt]", *text)
    assert said.code == 2 and len(said.err.splitlines()) == 1 and not breaks_terminal(said.err), said


def test_a_run_directory_whose_records_steer_a_terminal(here: Path) -> None:
    """Every text in it: keys and values."""
    assert moe_lab("train", *TINY.split(), "hydra.run.dir=run").code == 0
    evil = "\x1b]0;pwned\x07\x9b[bold]\u202e\r"
    for path in (*Path("run").glob("*.json"), *Path("run").glob("*.jsonl")):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        values = [json.loads(line) for line in lines]
        for value in values:
            value |= {key: evil for key, old in value.items() if isinstance(old, str)} | {evil: evil}
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
    Path("run/overrides.txt").write_text(f"sweep.name={evil}\n")
    renamed = Path("run").rename(f"run{evil}")
    for words in (["verify"], ["diff", "--all", str(renamed)], ["export", "--out", "-"], ["export"]):
        said = moe_lab(*words[:1], str(renamed), *words[1:])
        assert not breaks_terminal(said.out + said.err) and "Traceback" not in said.err, said
    said = moe_lab("train", f"resume={renamed}")
    assert not breaks_terminal(said.out + said.err) and "Traceback" not in said.err, said


def test_a_real_terminal_shows_such_names_as_text(here: Path) -> None:
    """The live screen, in a terminal: what is drawn holds the names, and none of them is obeyed."""
    names = "wandb.run_name='[/red]x' wandb.tags=['[bold]','<script>'] wandb.project='a/../b' output_dir='[red]o[/x]'"
    words = [sys.executable, "-m", "moe_lab", "train", *TINY.replace("[]", "[wandb]").split(), *names.split()]
    ours, theirs = pty.openpty()
    env = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "200", "WANDB_MODE": "offline"}
    running = subprocess.Popen(words, stdout=theirs, stderr=theirs, stdin=theirs, env=env, cwd=here)
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 65536):
            seen += part
    except OSError:  # the terminal is closed when the process ends
        pass
    assert running.wait(timeout=120) == 0, seen.decode()
    text = seen.decode()
    assert "\x1b[?25l" in text, "no live screen"
    assert "[red]o[/x]" in text and "Traceback" not in text and "MarkupError" not in text
