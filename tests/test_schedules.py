"""Curves at their beginning, middle and end, worked by hand, and what a schedule refuses."""

from typing import Any

import pytest
from layers import preset

from moe_lab.config import build, check
from moe_lab.schedules import Curve

ALL = ("temperature", "noise", "balance", "bias_rate")

# From 2 to 0.5 between 20 % and 60 % of the run; 30 % is a quarter of the way, 40 % half.
HAND = {
    # 2 - 1.5 x
    "linear": {0.0: 2.0, 0.2: 2.0, 0.3: 1.625, 0.4: 1.25, 0.6: 0.5, 1.0: 0.5},
    # 2 - 1.5 (1 - cos(pi x)) / 2; at a quarter (1 - 0.70711) / 2 = 0.146447
    "cosine": {0.0: 2.0, 0.2: 2.0, 0.3: 1.7803301, 0.4: 1.25, 0.6: 0.5, 1.0: 0.5},
    # 2 * 4^-x: 2 / sqrt(2) at a quarter, 1 at half
    "exponential": {0.0: 2.0, 0.2: 2.0, 0.3: 1.4142136, 0.4: 1.0, 0.6: 0.5, 1.0: 0.5},
    # jumps at 60 %
    "step": {0.0: 2.0, 0.2: 2.0, 0.4: 2.0, 0.599: 2.0, 0.6: 0.5, 1.0: 0.5},
    "constant": {0.0: 2.0, 0.4: 2.0, 1.0: 2.0},
}


@pytest.mark.parametrize("curve", HAND)
def test_curves_by_hand(curve: Any):
    c = Curve(curve=curve, start=2.0, end=0.5, begin=0.2, until=0.6)
    for progress, value in HAND[curve].items():
        assert c.at(progress) == pytest.approx(value, abs=1e-7), progress


@pytest.mark.parametrize("curve", ["linear", "cosine", "exponential"])
def test_curves_rise_too(curve: Any):
    values = [Curve(curve=curve, start=0.1, end=3.0).at(i / 20) for i in range(21)]
    assert values == sorted(values) and values[0] == pytest.approx(0.1) and values[-1] == pytest.approx(3)


def test_first_and_last_update_sit_at_the_ends():
    """11 updates: number 0 at the start, 5 in the middle, 10 at the end. One update alone is the start."""
    line = {"curve": "linear", "start": 1.0, "end": 0.0}
    schedules = build("schedule", {"name": "curves"} | dict.fromkeys(ALL, 1) | {"noise": line})
    assert [schedules.at(step, 11).noise for step in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    assert schedules.at(0, 1).noise == 1.0


def test_a_bare_number_is_a_constant():
    schedules = build("schedule", {"name": "curves", "temperature": 0.7, "noise": 0, "balance": 2, "bias_rate": 1.5})
    for step in (0, 50, 99):
        numbers = {"temperature": 0.7, "noise": 0, "balance": 2, "bias_rate": 1.5}
        assert vars(schedules.at(step, 100)) == numbers | {"progress": step / 99}


def test_presets():
    constant, anneal = (build("schedule", preset("schedule", name)) for name in ("constant", "anneal"))
    for step in (0, 500, 1000):
        assert vars(constant.at(step, 1001)) == dict.fromkeys(ALL, 1.0) | {"progress": step / 1000}
    # Until 80 %: temperature 2 * 4^-x and noise 1 - x. At 40 % of the run x is a half.
    for step, temperature, noise in ((0, 2.0, 1.0), (400, 1.0, 0.5), (800, 0.5, 0.0), (1000, 0.5, 0.0)):
        values = anneal.at(step, 1001)
        assert (values.temperature, values.noise) == (pytest.approx(temperature), pytest.approx(noise, abs=1e-12))
        assert (values.balance, values.bias_rate) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("noise", {"curve": "linear", "start": 1.0}, "needs an end"),
        ("noise", {"curve": "exponential", "start": 1.0, "end": 0.0}, "above 0"),
        ("noise", {"curve": "linear", "start": 1.0, "end": 0.0, "begin": 0.8, "until": 0.2}, "before until"),
        ("noise", {"curve": "spline", "start": 1.0}, "spline"),
        ("noise", {"curve": "constant", "start": 1.0, "slope": 2}, "slope"),
        ("noise", {"curve": "linear", "start": 1.0, "end": 0.0, "until": 1.5}, "1.5"),
        ("noise", -0.1, "-0.1"),
        ("noise", "loud", "loud"),
        ("noise", True, "noise"),
        ("temperature", 0, "above 0"),
        ("temperature", {"curve": "linear", "start": 1.0, "end": 0.0}, "above 0"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(name: str, value: Any, words: str):
    node = {"name": "curves"} | dict.fromkeys(ALL, 1) | {name: value}
    lines = [line for line in check({"schedule": node}) if line.startswith("schedule.")]
    assert len(lines) == 1 and "\n" not in lines[0]
    assert lines[0].startswith(f"schedule.{name}") and words in lines[0]
