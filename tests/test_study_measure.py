"""One number of a run, worked out by hand, and the floors and names that come with it."""

import math
from pathlib import Path
from typing import Any

import pytest
from command import moe_lab
from judging import run

from moe_lab import recorded
from moe_lab.observe.metric import METRICS
from moe_lab.study import measure
from moe_lab.study.files import Reduce
from moe_lab.study.measure import floor, known, value

ROWS = [{"step": step, "loss": float(step)} for step in (1, 50, 100, 150, 400, 401, 500)]
EXPERTS = [[1.0, 3.0, None, 5.0], [2.0, 2.0, 2.0, 10.0]]  # two layers of four


@pytest.mark.parametrize(
    "steps, mean", [("last", 500), ("last_20_percent", 450.5), ("first_100", 151 / 3), ("all", 1602 / 7)]
)
def test_steps(steps: Any, mean: float) -> None:
    assert value(run(*ROWS), "loss", Reduce(steps=steps)) == pytest.approx(mean)


@pytest.mark.parametrize("layers, reduced", [("max", 5.0), ("mean", 4.0), ("min", 3.0)])
def test_layers(layers: Any, reduced: float) -> None:
    assert value(run({"x": [3.0, None, 5.0]}), "x", Reduce(layers=layers)) == reduced


@pytest.mark.parametrize(
    "experts, layers, reduced",
    [("max", "mean", 7.5), ("mean", "max", 4.0), ("min", "min", 1.0), ("std", "max", math.sqrt(12))],
)
def test_experts_before_layers(experts: Any, layers: Any, reduced: float) -> None:
    assert value(run({"x": EXPERTS}), "x", Reduce(experts=experts, layers=layers)) == pytest.approx(reduced)


def test_what_is_undefined_is_left_out_and_never_made_up() -> None:
    rows = [{"x": 1.0}, {"x": None}, {"y": 5.0}, {"x": [None, None]}, {"x": [[None], [None]]}]
    assert value(run(*rows), "x", Reduce(steps="all")) == 1.0
    assert value(run(*rows), "x", Reduce()) is None  # the last row that holds it does not define it
    assert value(run(*rows[:3]), "x", Reduce()) is None
    assert value(run({"step": 300, "x": 1.0}), "x", Reduce(steps="first_100")) is None
    assert value(run(), "x", Reduce(steps="last_20_percent")) is None


def test_the_last_fifth_is_that_of_the_run_and_not_of_the_metric() -> None:
    rows = [{"step": 100, "x": 1.0}, {"step": 200, "x": 2.0}, {"step": 1000, "y": 0.0}]
    assert value(run(*rows), "x", Reduce(steps="last_20_percent")) is None


COUNTS = {"eval/moe/selected": [[10, 20, 30, 40], [25, 25, 25, 25]], "eval/moe/experts_per_token": [1.0, 2.0]}


@pytest.mark.parametrize(
    "name, balanced, size",
    [
        ("load_cv", 0, math.sqrt(3 / 100)),  # k = 1 of E = 4 on 100 tokens; the second layer: k = 2 on 50
        ("load_cv/worst", 0, math.sqrt(3 / 100)),
        ("load_cv_of_ceiling", 0, 50**-0.5),
        ("load_entropy", 1, 3 / (200 * math.log(4))),
        ("effective_experts", 4, 4 - 4 * math.exp(-3 / 200)),
        ("dead_experts", 0, 0),
    ],
)
def test_floors_of_a_row(name: str, balanced: float, size: float) -> None:
    key = f"eval/moe/{name}"
    found = floor(run({key: 0.5, **COUNTS}), key, Reduce())
    assert found is not None
    assert (found.balanced, found.size) == (balanced, pytest.approx(size))


def test_floors_that_are_not_known() -> None:
    for key in ("eval/loss", "moe/token_entropy", "moe/selected", "moe/nonsense"):
        assert floor(run({key: 0.5, "moe/selected": [[5, 5]], "moe/experts_per_token": [1.0]}), key, Reduce()) is None
    assert floor(run({"moe/load_cv": [0.5]}), "moe/load_cv", Reduce()) is None  # rows without counts
    alone = {"moe/max_vio": [0.0], "moe/selected": [[9]], "moe/experts_per_token": [1.0]}
    assert floor(run(alone), "moe/max_vio", Reduce()) is None


def test_a_floor_that_the_rows_measured_is_taken() -> None:
    rows = [{"moe/nmi_domain": [0.2, 0.3], "moe/nmi_domain_floor": [x, 0.01]} for x in (0.02, 0.04)]
    found = floor(run(*rows), "moe/nmi_domain", Reduce(steps="all"))
    assert found is not None and (found.balanced, found.size) == (0.0, pytest.approx(0.03))


def test_every_floor_is_a_distance_that_vanishes_with_tokens() -> None:
    """Or is a constant of the metric: what the declarations say of balance is understood."""
    for name, metric in METRICS.items():
        if metric.floor_at is None:
            continue
        sizes = []
        for each in (10**3, 10**9):
            row = {"moe/selected": [[each] * 8], "moe/experts_per_token": [1.0], f"moe/{name}": [0.5]}
            found = floor(run(row), f"moe/{name}", Reduce())
            assert found is not None
            sizes.append(found.size)
        assert sizes[0] == sizes[1] <= 1e-5 or sizes[1] < 1e-2 * sizes[0] < 0.1, name


def test_every_number_of_a_run_has_a_known_name(tmp_path: Path) -> None:
    words = "train dataset=clusters logger=[] steps=4 log_every=2 eval_every=2 batch_size=2 seq_len=16 eval_tokens=64"
    size = "model.layers=1 model.dim=16 model.heads=2 experts.num=4 experts.width=16 router=topk explore=[gumbel]"
    assert moe_lab(*words.split(), *size.split(), f"hydra.run.dir={tmp_path}/run").code == 0
    done = recorded.read(tmp_path / "run")
    held = measure.holds(done)
    strangers = {key for key in held if not known(key)}
    assert strangers == set()
    assert (
        known("term/switch")
        and not known("moe/churn")
        and not known("eval/moe/load_shift")
        and not known("moe/verdict")
    )
    missing = measure.names() - held
    of_some_balancers = {"bias_range", "l1_lambda"}
    assert {name.split("moe/")[-1].split("/")[0] for name in missing} <= of_some_balancers, "names that no run holds"
    T = done.rows[-1]["eval/tokens"]
    found = floor(done, "eval/moe/load_cv", Reduce())
    assert found is not None and found.size == pytest.approx(math.sqrt((4 / 2 - 1) / T))


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    assert measure.unknown("eval/moe/max_voi").startswith(
        "eval/moe/max_voi: no such metric; did you mean eval/moe/max_vio"
    )
    assert "there are: loss" in measure.unknown("x", {"loss"})
