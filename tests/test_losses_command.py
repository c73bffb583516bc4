"""`moe-lab losses`: its table, its JSON, the files it reads and what it refuses.

Shapes: L MoE layers, T tokens, E experts.
"""

import io
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Said, moe_lab
from layers import randn
from tiny import CONF

from moe_lab.conventions import CONVENTIONS, Convention

SMALL = ("losses", "--tokens", "96")


def told(*words: str) -> dict[str, Any]:
    said = moe_lab(*words, "--json")
    assert said.code == 0, said.err
    return json.loads(said.out)


def rows(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found["losses"]}


def test_the_table_fits_and_has_every_loss():
    said = moe_lab(*SMALL)
    assert said.code == 0 and said.err == ""
    table = said.out.splitlines()
    assert max(map(len, table)) <= 100
    names = {line.split("  ")[0] for line in table} | {line[2:].split("  ")[0] for line in table if line[:2] == "  "}
    assert {file.stem for file in Path(CONF, "balance").glob("*.yaml")} <= names
    assert {convention.name for convention in CONVENTIONS} <= names
    assert "needs" not in said.out and "moves a bias, no loss" in said.out


def test_values_by_hand():
    """E sum f P at balance is 1, at collapse onto 2 of 8 experts 4; with different halves dead it is 2 in each layer,
    and Hugging Face's, which pools them, is at its value at balance. Megatron adds two layers up."""
    found = told(*SMALL)
    assert (found["experts"], found["k"], found["layers"], found["tokens"]) == (8, 2, 2, 96)
    by_name = rows(found)
    expected = {
        "switch": (1, 4, 2),
        "Hugging Face Mixtral": (2, 8, 2),
        "OLMo-core": (1, 4, 2),
        "Megatron-Core aux_loss": (2, 8, 4),
    }
    for name, values in expected.items():
        got = [by_name[name][s]["value"] for s in ("balanced", "collapse", "halves")]
        assert got == pytest.approx(values, rel=0.02), name
    assert by_name["switch"]["balanced"]["dead"] is None
    assert 0 < by_name["switch"]["collapse"]["dead"] < 1e-6 < by_name["switch"]["skewed"]["gradient"]
    assert by_name["Hugging Face Mixtral"]["factor"] == 2 and by_name["nanoMoE"]["factor"] is None


DOCS = (Path(__file__).parents[1] / "docs/losses.md").read_text()


def test_the_json_says_what_each_loss_is_measured_on_and_holds_every_number():
    found = {name: row for name, row in rows(told(*SMALL)).items() if row["where"] == "here" and "not" not in row}
    assert {name: row["on"] for name, row in found.items() if row["on"] != "topk"} == {
        "erc": "weights",
        "l1_adaptive": "relu",
        "load": "noisy_topk",
        "orthogonal_experts": "weights",
        "simbal": "weights",
    }
    for row in found.values():
        for situation in ("balanced", "skewed", "collapse", "halves"):
            assert set(row[situation]) == {"value", "gradient", "dead"}
    assert found["simbal"]["collapse"]["value"] == pytest.approx(6400)  # (8 * 10)^2


def test_what_logits_do_not_tell_is_said(files: Path):
    found = rows(told("losses", "--logits", "layers.npy"))
    for name in ("erc", "orthogonal_experts", "simbal"):
        assert "weights" in found[name]["not"]
    seeds = [told("losses", "--logits", "layers.npy", "--seed", seed) for seed in ("0", "1")]
    differ = {name for name, row in rows(seeds[0]).items() if row != rows(seeds[1])[name]}
    assert differ == {"load", "Shazeer load", "its port's load"}
    alone = moe_lab("losses", "--logits", "layers.npy", "--k", "4").out
    assert "load  " in alone and "all experts are chosen" in alone and "Shazeer load" not in alone


def numbers(table: str) -> dict[str, list[float]]:
    """Each row's numbers by its name."""
    rows = re.findall(r"^(?:  )?(\S.*?)  +(-?\d[-+.\de ]*)(?:  .*)?$", table, re.MULTILINE)
    return {name: [float(word) for word in words.split()] for name, words in rows}


def test_the_page_shows_what_the_command_prints():
    (block,) = re.findall(r"^```\n\$ moe-lab losses\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
    shown, printed = numbers(block), numbers(moe_lab("losses").out)
    assert len(shown) > 20 and {c.name for c in CONVENTIONS} <= set(shown)
    for name, row in shown.items():
        assert printed[name][:5] == pytest.approx(row[:5], rel=2e-3), name


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda c: c.value.__name__)
def test_the_page_has_every_formula(convention: Convention):
    (row,) = re.findall(rf"^\| {re.escape(convention.name)}[ (].*\|$", DOCS, re.MULTILINE)
    assert row.endswith(f"| {convention.checked} |")


def test_sizes_and_seed():
    one = rows(told(*SMALL, "--layers", "1", "--experts", "4", "--k", "1"))
    assert "halves" not in one["switch"] and one["switch"]["collapse"]["value"] == pytest.approx(4, rel=1e-3)
    alone = rows(told(*SMALL, "--experts", "1", "--k", "1"))
    assert alone["switch"]["skewed"]["value"] == pytest.approx(1)
    first, same, other = (told(*SMALL, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == same != other


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same logits of two layers in every form."""
    monkeypatch.chdir(tmp_path)
    logits_LTE = randn(2, 12, 4).numpy()
    flat = logits_LTE.reshape(24, 4)
    np.save("layers.npy", logits_LTE)
    np.save("rows.npy", flat)
    np.save("float32.npy", logits_LTE.astype(np.float32))
    Path("rows.csv").write_text("\n".join(",".join(map(repr, row)) for row in flat.tolist()))
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in flat.tolist()) + "\n\n")
    return tmp_path


def test_every_form_of_a_file_reads_alike(files: Path):
    whole = told("losses", "--logits", "layers.npy")
    assert (whole["layers"], whole["tokens"], whole["experts"]) == (2, 12, 4)
    assert set(rows(whole)["switch"]) - {"where", "name", "on"} == {"given"}
    for name in ("rows.npy", "rows.csv", "rows.jsonl"):
        assert told("losses", "--logits", name, "--layers", "2") == whole
        assert told("losses", "--logits", name)["tokens"] == 24
    rounded = told("losses", "--logits", "float32.npy")
    assert rows(rounded)["switch"]["given"]["value"] == pytest.approx(rows(whole)["switch"]["given"]["value"])
    table = moe_lab("losses", "--logits", "layers.npy").out
    assert "given" in table and "skewed" not in table and max(map(len, table.splitlines())) <= 100


def refused(*words: str) -> Said:
    said = moe_lab("losses", *words)
    assert said.code == 2 and said.out == "" and len(said.err.splitlines()) == 1, said
    return said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--k", "9"], "1 to 8"),
        (["--k", "0"], "at least 1"),
        (["--experts", "0"], "--experts 0: at least 1"),
        (["--layers", "-1"], "at least 1"),
        (["--tokens", "many"], "invalid int"),
        (["--seed", "-1"], "--seed -1"),
        (["--tokens", "100000000"], "at most"),
        (["--tokens", "1", "--experts", "5000"], "at most"),
        (["--logits", "gone.npy"], "gone.npy: No such file"),
        (["--logits", "."], "no regular file"),
        (["--logits", "layers.npy", "--experts", "4"], "leave it out"),
        (["--logits", "layers.npy", "--layers", "3"], "holds 2"),
        (["--logits", "rows.csv", "--layers", "5"], "must divide the 24 rows"),
        (["--logits", "rows.csv", "--layers", "0"], "must divide"),
        (["--logits", "layers.npy", "--k", "5"], "1 to 4"),
    ],
)
def test_mistakes_are_one_line(words: list[str], told: str, files: Path):
    assert told in refused(*words).err


def npy(shape: tuple[int, ...], dtype: str, rest: bytes) -> bytes:
    """A file whose header says this, whatever follows."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue() + rest


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


BAD = {
    "pickled.npy": npy((1, 1), "|O", pickle.dumps(Harm())),
    "pickle.npy": pickle.dumps(Harm()),
    "huge.npy": npy((1 << 40, 8), "<f8", b"x" * 64),
    "negative.npy": npy((-1, 8), "<f8", b"x" * 64),
    "text.npy": npy((2, 2), "<U2", b"x" * 32),
    "complex.npy": npy((2, 2), "<c16", b"\0" * 64),
    "vector.npy": npy((4,), "<f8", b"\0" * 32),
    "none.npy": npy((0, 4), "<f8", b""),
    "nan.npy": npy((1, 2), "<f8", np.array([1.0, np.nan]).tobytes()),
    "empty.npy": b"",
    "empty.csv": b"",
    "words.csv": b"1,2\nexpert,3\n",
    "ragged.csv": b"1,2\n1,2,3\n",
    "infinite.csv": b"1,inf\n",
    "nested.jsonl": b"[" * 100_000,
    "binary.csv": bytes(range(256)),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_table_of_logits_is_refused(name: str, files: Path):
    (files / name).write_bytes(BAD[name])
    assert name in refused("--logits", name).err
    assert not (files / "harm").exists()


def test_a_pipe_is_not_waited_for(files: Path):
    os.mkfifo("pipe.csv")
    refused("--logits", "pipe.csv")


def test_a_file_with_too_many_numbers_is_left_unread(files: Path):
    with open("sparse.npy", "wb") as file:  # a gigabyte that takes no disk
        file.write(npy((1 << 27, 1), "<f8", b""))
        file.truncate(file.tell() + (1 << 30))
    assert "at most" in refused("--logits", "sparse.npy", "--k", "1").err
