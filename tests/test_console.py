"""The terminal: a live screen on a terminal, plain lines elsewhere, and no text from outside that steers either."""

import io
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import rich
from made_rows import made_facts, made_rows, made_summary
from rich.console import Console as RichConsole

from moe_lab.sinks import board, lines
from moe_lab.sinks import console as terminal
from moe_lab.sinks.board import State, bars, clock, count, dashboard, trend
from moe_lab.sinks.console import Console
from moe_lab.sinks.lines import ranges
from moe_lab.sinks.messages import TerminalHandler

BLOCKS = set("▁▂▃▄▅▆▇█")


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def fake(file: io.StringIO, term: str = "xterm-256color", width: int = 100, **env: str) -> RichConsole:
    return RichConsole(file=file, width=width, height=40, _environ={"TERM": term, **env})


def play(
    console: RichConsole, run_dir: Path = Path("outputs/run"), layers: int = 2, experts: int = 4, **facts: Any
) -> Console:
    sink = Console(console)
    sink.open(run_dir, {}, made_facts(layers, experts, **facts))
    for row, timing in made_rows(layers, experts):
        if layers and row["step"] == 2:
            sink.verdict(2, 0, None, "healthy", "", [])
            sink.verdict(2, 1, None, "undecided", "entropy 0.9", ["wait"])
        if layers and row["step"] == 3:
            sink.verdict(3, 1, "undecided", "collapsed", "load CV is 90% of its ceiling", ["more noise"])
        sink.row(row, timing)
    sink.close("completed", made_summary(layers))
    assert not sink.failed
    return sink


def screen(state: State, width: int = 100, height: int | None = None) -> list[str]:
    console = RichConsole(file=io.StringIO(), record=True, width=width, _environ={})
    console.print(dashboard(state, width, height))
    return console.export_text().splitlines()


def state_of(layers: int, experts: int) -> State:
    state = State("outputs/run", made_facts(layers, experts))
    for row, timing in made_rows(layers, experts):
        state.take(row, timing)
    return state


def test_a_pipe_gets_one_plain_line_per_row():
    file = io.StringIO()
    play(fake(file))
    text = file.getvalue()
    assert text.isascii() and "\x1b" not in text and "\r" not in text
    steps = [line for line in text.splitlines() if line.startswith("step ")]
    assert len(steps) == 6
    assert steps[2] == ("step 3/6  loss 4.1250  ppl 54.12  41.2k tok/s  eta 0:02  worst cv 0.08  entropy 0.05  dead 7")
    assert "layer 1: undecided -> collapsed at step 3 (load CV is 90% of its ceiling)" in text.splitlines()
    evaluations = [line for line in text.splitlines() if line.startswith("eval at ")]
    assert evaluations[0].startswith("eval at 3  loss 4.375  ppl 70.00  below the bigram line 4.500, unigram 4.750")
    assert evaluations[0].endswith("hard top-1 +0.125")
    assert len(evaluations) == 3  # two in the run, one in the last words


@pytest.mark.parametrize("case", ["dumb terminal", "file with FORCE_COLOR"])
def test_no_live_screen_where_it_cannot_be_drawn(case: str):
    file = Tty() if case == "dumb terminal" else io.StringIO()
    sink = play(fake(file, term="dumb") if case == "dumb terminal" else fake(file, FORCE_COLOR="1"))
    assert not sink.lively and "\x1b[1A" not in file.getvalue()
    assert sum(line.startswith("step ") for line in file.getvalue().splitlines()) == 6


def test_lines_are_out_at_once():
    class Seen(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    file = Seen()
    sink = Console(fake(file))
    sink.open(Path("run"), {}, made_facts())
    sink.row(*made_rows()[0])
    assert file.flushed == file.getvalue() and "step 1/6" in file.flushed


def test_a_terminal_gets_a_screen_that_is_redrawn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(terminal, "REFRESH", 0.0)
    file = Tty()
    sink = play(fake(file))
    text = file.getvalue()
    assert sink.lively and text.count("\x1b[1A") > 6  # cursor up: redrawn in place
    assert "load of each expert" in text and "step 6/6" in text
    assert text.endswith("\n") and text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back
    last = text[text.rindex("\x1b[?25h") :]
    assert "completed" in last and "collapsed" in last and "try" in last and "more noise" in last


def test_redraws_are_rationed():
    file = Tty()
    sink = Console(fake(file))
    sink.open(Path("run"), {}, made_facts(steps=300))
    for row, timing in made_rows(steps=300):
        sink.row(row, timing)
    sink.close("completed", {})
    assert file.getvalue().count("load of each expert") < 100 and "step 300/300" in file.getvalue()


def test_messages_appear_above_the_screen_and_do_not_tear_it(monkeypatch: pytest.MonkeyPatch):
    file = Tty()
    console = fake(file)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    log = logging.getLogger("test_messages")
    log.addHandler(handler := TerminalHandler())
    try:
        sink = Console()
        sink.open(Path("run"), {}, made_facts())
        sink.row(*made_rows()[0])
        before = len(file.getvalue())
        log.warning("watch [bold]out\x1b]0;title\x07")
        drawn = file.getvalue()[before:]
        assert "watch [bold]out?]0;title?" in drawn and "load of each expert" in drawn
        assert drawn.index("watch") < drawn.index("load of each expert")
        sink.close("completed", {})
    finally:
        log.removeHandler(handler)


def test_job_logging_tells_warnings_and_files_everything(tmp_path: Path):
    program = """
        import logging, logging.config, sys
        from omegaconf import OmegaConf
        cfg = OmegaConf.load(sys.argv[1])
        cfg.handlers.file.filename = "train.log"
        logging.config.dictConfig(OmegaConf.to_container(cfg))
        logging.getLogger("moe_lab.x").info("quiet")
        logging.getLogger("moe_lab.x").warning("loud")
        logging.getLogger("wandb").error("wandb's own")
    """
    path = Path(__file__).parents[1] / "conf/hydra/job_logging/moe_lab.yaml"
    command = [sys.executable, "-c", textwrap.dedent(program), str(path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "WARNING: loud\n")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO moe_lab.x: quiet", "WARNING moe_lab.x: loud"]


def test_without_a_terminal_messages_go_to_stderr(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rich, "get_console", lambda: fake(io.StringIO()))
    TerminalHandler().handle(logging.makeLogRecord({"msg": "careful", "levelno": logging.WARNING}))
    assert capsys.readouterr() == ("", "careful\n")


@pytest.mark.parametrize("file", [Tty(), io.StringIO()])
def test_names_from_outside_stay_text(file: io.StringIO, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(terminal, "REFRESH", 0.0)
    evil = "[red]x[/] :boom: \x1b]0;title\x07\x1b[2J"
    shown = "[red]x[/] :boom: ?]0;title??[2J"
    sink = Console(fake(file, width=200))
    sink.open(Path("outputs/[/bold]\x1b[31m\nrun"), {}, made_facts(router=evil, dataset=evil, destinations=[evil]))
    sink.row(*made_rows()[1])
    sink.verdict(2, 1, None, evil, evil, [evil])
    found = [{"layer": 0, "verdict": evil, "since": 1, "why": evil, "remedies": [evil]}]
    sink.close("failed", {"error": evil, "verdicts": found})
    text = file.getvalue()
    assert not sink.failed and "\x1b]0" not in text and "\x1b[2J" not in text and "\x1b[31m\n" not in text
    assert "outputs/[/bold]?[31m?run" in text and text.count(shown) >= 6


@pytest.mark.parametrize(
    ("loads", "drawn"),
    [
        ([5, 5, 5, 5], "▄▄▄▄"),
        ([0, 0, 0, 20], "···█"),
        ([10, 5, 2.5, 2.5], "█▄▂▂"),
        ([1, 999, 1, 999], "▁█▁█"),
        ([7], "▄"),
        ([0, 0], "··"),
    ],
)
def test_bars(loads: list[float], drawn: str):
    assert bars(loads, 64).plain == drawn


def test_bars_share_a_character_where_there_is_no_room():
    assert bars([2, 0, 1, 1, 0, 2, 0, 0], 4).plain == "▅▅▅·"
    assert len(bars([1.0] * 256, 64)) == 64 and len(bars([1.0] * 100, 64)) == 50


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (2, 4), (12, 64), (3, 256)])
@pytest.mark.parametrize("width", [60, 80, 140])
def test_every_layer_has_its_row_at_every_width(layers: int, experts: int, width: int):
    lines = screen(state_of(layers, experts), width)
    assert max(len(line) for line in lines) <= width
    table = lines[next(i for i, line in enumerate(lines) if "verdict" in line) + 2 :][:layers]
    assert [int(line.split()[0]) for line in table] == list(range(layers))
    for layer, line in enumerate(table):
        drawn = [c for c in line if c in BLOCKS]
        assert len(drawn) == experts if experts <= 4 else 8 <= len(drawn) <= 64
        assert f"{(7 + layer) / 64:.2f}" in line and f" {layer + 6} " in line  # load CV, dead experts
    assert "healthy" in table[0]


def test_a_dense_baseline_has_no_table():
    lines = screen(state_of(0, 0))
    assert "no MoE layers" in lines[0] and "loss 4.016" in lines[1] and not any("verdict" in line for line in lines)
    assert "too early" not in str(play(fake(io.StringIO()), layers=0).state)


def test_a_low_terminal_keeps_the_layers_in_trouble():
    lines = screen(state_of(12, 4), height=16)
    shown = [line for line in lines if BLOCKS & set(line[6:20])]
    assert [int(line.split()[0]) for line in shown] == [5, 7, 8, 9, 10, 11]  # 0 and 6 are healthy
    assert any("6 layers in better shape are not shown" in line for line in lines)


def test_last_words_say_where_things_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    file = io.StringIO()
    sink = Console(fake(file))
    sink.open(run, {}, made_facts(destinations=["W&B: offline; to upload later: wandb sync x", ""], resumed_from=4))
    sink.close("preempted", {"steps": 4, "tokens": 4096, "wall_s": 3.0})
    text = file.getvalue()
    assert "resumed from step 4" in text and "preempted after 4 steps, 4.1k tokens, 0:03" in text
    assert "metrics: outputs/run/metrics.jsonl" in text and "checkpoints: outputs/run/checkpoints" in text
    assert "summary.json" not in text  # it is not there
    assert text.count("wandb sync x") == 2 and "continue: moe-lab train resume=outputs/run" in text


def test_healthy_layers_share_a_line_and_remedies_are_said_once():
    file = io.StringIO()
    sink = Console(fake(file))
    found: list[dict[str, Any]] = [{"layer": i, "verdict": "healthy", "why": "fine"} for i in (0, 1, 2, 5)]
    found += [
        {"layer": i, "verdict": "collapsed", "since": 9, "why": f"w{i}", "remedies": ["noise", "weight"]}
        for i in (3, 4)
    ]
    sink.close("completed", {"verdicts": found})
    lines = file.getvalue().splitlines()
    at = lines.index("layers 0-2, 5: healthy")
    assert lines[at + 1 : at + 5] == [
        "layer 3: collapsed since step 9: w3",
        "layer 4: collapsed since step 9: w4",
        "   try noise",
        "   try weight",
    ]


def test_a_broken_console_does_not_stop_the_run(caplog: pytest.LogCaptureFixture):
    sink = Console(fake(io.StringIO()))
    sink.open(Path("run"), {}, made_facts())
    sink.row({"loss": "not a number"}, {})
    sink.row(*made_rows()[0])
    sink.close("completed", {})
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["Console is switched off, the run goes on"]


def test_small_formats():
    assert [count(x) for x in (None, 12.0, 41234.0, 2.5e6, 3e9)] == ["-", "12", "41.2k", "2.5M", "3G"]
    assert [clock(x) for x in (None, 0.4, 75.2, 3661)] == ["-", "0:00", "1:15", "1:01:01"]
    assert trend([1.0, 2.5, float("nan"), 3.0]) == "▁▆█"
    assert trend([]) == "" and trend([2.0, 2.0]) == "▁▁"
    assert ranges([0, 1, 2, 5]) == "0-2, 5" and ranges([]) == ""


def test_how_many_experts_a_token_gets_is_no_number_where_the_data_decides():
    assert board.headline(made_facts(k_at_most=1)) == "topk on clusters, 2 MoE layers of 4 experts, 1 per token"
    assert "of 4 experts, up to 4 per token" in board.headline(made_facts(k_at_most=4))


def test_where_all_experts_shape_every_token_their_weights_are_shown_and_none_is_called_dead():
    row, timing = made_rows()[-1]
    soft = row | {"moe/dead_experts": [None, None], "moe/gate_mass": [[1.0] * 4] * 2}
    soft |= {"moe/gate_mass_cv": [0.25, 0.5], "moe/gate_mass_cv/worst": 0.5}
    line = lines.step_line(soft, timing, 6)
    assert "worst weight cv 0.50" in line and "dead" not in line
    assert "dead" in lines.step_line(row, timing, 6) and "weight" not in lines.step_line(row, timing, 6)
