"""Real runs made to show each verdict: two alphabets as domains, one MoE layer of four experts, 200 updates."""

import json
import random
from pathlib import Path

import pytest
from tiny import tiny

from moe_lab import load
from moe_lab.train import train

MADE = ["steps=200", "log_every=20", "eval_every=50", "batch_size=8", "seq_len=64", "model.layers=1", "optim.lr=0.01"]
SIGMOID = ["router=sigmoid_topk", "router.k=1", "router.renormalise=false"]
STATES = {
    "healthy": ["router=gumbel_ste", "balance=[switch]", "schedule=anneal"],
    "collapsed": ["router=softmax_ste", "balance=[]"],
    # Renormalised, the weight of a single expert is always 1 and carries no gradient.
    "frozen": ["router=topk", "router.k=1"],
    # A bias whose step is as large as the scores: every update empties the fullest expert.
    "oscillating": [*SIGMOID, "balance=[loss_free]", "balance.loss_free.rate=0.3"],
    # Noise a hundred times the logits: the choice is a die, though the clean gate ...
    "undecided": ["router=switch", "explore=[gumbel]", "explore.gumbel.strength=20"],
    # ... may be made sure of itself by a low temperature.
    "balanced but unspecialised": [
        "router=switch",
        "explore=[gumbel]",
        "explore.gumbel.strength=20",
        "schedule.temperature=0.1",
    ],
}


@pytest.fixture(scope="module")
def alphabets(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two files whose words share no letter; as dataset.paths."""
    folder = tmp_path_factory.mktemp("alphabets")
    for name, letters in (("letters", "abcdefgh"), ("digits", "01234567")):
        r = random.Random(letters)
        words = ["".join(r.choice(letters) for _ in range(r.randint(2, 5))) for _ in range(30)]
        lines = (" ".join(r.choice(words) for _ in range(12)) for _ in range(600))
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return f"[{folder}/letters.txt,{folder}/digits.txt]"


@pytest.mark.parametrize("state", STATES)
def test_a_run_made_to_show_it(state: str, alphabets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = tiny("dataset=text", f"dataset.paths={alphabets}", *MADE, *STATES[state])
    summary = train(cfg, tmp_path, [], {})
    (layer,) = summary["verdicts"]
    assert layer["verdict"] == state, layer
    assert load(tmp_path).metrics[-1]["moe/verdict"] == [state]
    assert json.loads((tmp_path / "summary.json").read_text())["verdicts"] == [layer]
    assert (layer["remedies"] == []) == (state == "healthy")
    assert layer["since"] >= 1 and layer["why"]
    said = capsys.readouterr().out
    assert f"{state} at step" in said  # when it changed
    assert said.count(f"layer 0: {state}") >= 1  # in the last lines


def test_the_remedy_of_a_collapse_works(alphabets: str, tmp_path: Path) -> None:
    """What the verdict suggests first turns the collapsed run into one that is not."""
    base = ["dataset=text", f"dataset.paths={alphabets}", *MADE, *STATES["collapsed"]]
    (layer,) = train(tiny(*base), tmp_path / "before", [], {})["verdicts"]
    remedy = layer["remedies"][0].split(" ")[0]
    (layer,) = train(tiny(*base, remedy), tmp_path / "after", [], {})["verdicts"]
    assert layer["verdict"] != "collapsed"
