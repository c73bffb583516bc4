"""The whole story of a run: `train(cfg, ...)` from an empty directory, `resume(run_dir, cfg)` from its checkpoint."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_lab import checkpoint, reading
from moe_lab.allocator import keep_freed_memory
from moe_lab.assemble import assemble, prepare
from moe_lab.config import build, registered
from moe_lab.cost import cost, measured
from moe_lab.evaluate import Evaluator
from moe_lab.loop import Loop
from moe_lab.observe.recorder import Recorder
from moe_lab.observe.verdict import Judge
from moe_lab.parts import Parts
from moe_lab.run import Run, Stop, outcome, read_status, same_run
from moe_lab.secrecy import redacted
from moe_lab.settings import idle, leaks, quick
from moe_lab.sinks.base import Sink
from moe_lab.sinks.console import Console
from moe_lab.state import State

log = logging.getLogger(__name__)


def train(cfg: dict[str, Any], run_dir: Path, overrides: list[str], choices: Mapping[str, str]) -> dict[str, Any]:
    """Train as `cfg` says (plain, checked) in `run_dir` and return the summary.

    A directory that holds the same run finished gives its summary back; one that holds it half done goes on, so
    that running a sweep again finishes it. Raises Stop (see run.Stop), ValueError for data that cannot serve.
    """
    if cfg["fast"]:
        cfg = quick(cfg)
    status = read_status(run_dir)
    if status and status["status"] == "completed" and same_run(run_dir, cfg):
        return _finished(run_dir, cfg)
    keep_freed_memory()
    with Run(run_dir, cfg, overrides, choices) as run:
        return Training(run, assemble(cfg)).go()


def _finished(run_dir: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """The summary of a finished run, if its data is still the same."""
    data = prepare(cfg)
    with reading.of_a_run(run_dir):
        fingerprint = reading.json_file(run_dir / "env.json")["dataset"]["fingerprint"]
        summary = reading.json_file(run_dir / "summary.json")
    if fingerprint != data.fingerprint:
        raise Stop(4, f"{run_dir}: holds this run on other data (its fingerprint differs); choose another directory")
    return summary


def resume(run_dir: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """Go on from the newest checkpoint of `run_dir`; `cfg` is its config, but for keys that change no number."""
    with reading.of_a_run(run_dir):
        choices = reading.json_file(run_dir / "env.json")["choices"]
        overrides = reading.content(run_dir / "overrides.txt", reading.LARGEST_YAML).decode().splitlines()
    return train(cfg | {"fast": False}, run_dir, overrides, choices)


class Training:
    """A run's moving parts between its opening and its end."""

    def __init__(self, run: Run, parts: Parts):
        self.run, self.parts = run, parts
        vocabulary = parts.data.vocab_size + parts.objective.extra_tokens
        moes, domains = parts.model.moes, len(parts.data.domains)
        recorder = Recorder(moes, vocabulary, domains, parts.settings.seq_len, parts.device)
        self.loop, self.evaluator = Loop(parts, recorder), Evaluator(parts)
        self.state = State(self.loop, self.evaluator)
        E = moes[0].experts.num if moes else 1
        self.judge = Judge(E, moes[0].router.active if moes else 1, domains, run.cfg)
        self.earlier = 0.0  # seconds that earlier attempts took
        self.last_eval: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.alive: dict[str, Any] = {}
        self.sinks: list[Sink] = []
        self.destinations: list[str] = []  # shared with the console, which ends with it

    def go(self) -> dict[str, Any]:
        """Train to the end, or raise Stop; the sinks are closed either way."""
        with reading.of_a_run(self.run.folder):
            self.run.goes_on_with(**self._arithmetic())
            self.began_at = self._restore()
        env = self.run.start(self._facts(), self.began_at)
        error: BaseException | None = None
        try:
            self._open_sinks(env)
            self._steps()
        except BaseException as reason:
            error = reason
            raise
        finally:
            summary = self._end(error)
        return summary

    def _end(self, error: BaseException | None) -> dict[str, Any]:
        """Summary and closed sinks, whatever happened; nothing here may hide the error."""
        status, why = outcome(error)
        log.info("%s after step %s", status, self.run.step)
        summary = self._summary(status) | {"error": None if status == "preempted" else why}
        try:
            self.run.summarise(summary)
        except OSError:
            if error is None:
                raise
            log.warning("summary.json could not be written")
        finally:
            self._close_sinks(status, summary, hurry=isinstance(error, KeyboardInterrupt))
        return summary

    def _close_sinks(self, status: str, summary: dict[str, Any], hurry: bool) -> None:
        """The mirrors first: the last words, those of the console, tell what became of them."""
        try:
            for sink in self.sinks[:-1]:
                sink.close(status, summary)
            for sink in self.sinks[:-1] if not hurry else []:
                sink.wait()
        finally:
            self.destinations[:] = self._described()
            for sink in self.sinks[-1:]:
                sink.close(status, summary)

    def _steps(self) -> None:
        s, start = self.parts.settings, self.began_at
        log.info("attempt %d starts after step %d of %d", self.run.attempt, start, s.steps)
        self.began = self.clock = time.monotonic()
        self.clocked = start
        if start == 0:
            self.loop.start_from_data()
            self.alive = self.evaluator.alive(self.parts.schedules.at(0, s.steps))
        self._heed_signal()
        for done in range(start + 1, s.steps + 1):
            self.loop.step(done - 1)
            if self.parts.device.type == "cpu":
                self._stop_if_diverged()
            self.run.step = done
            if s.logs_at(done):
                self._row(done)
            if done % s.checkpoint.every == 0 or done == s.steps or self.run.stop_signal:
                self._checkpoint(done)
            if done < s.steps:
                self._heed_signal()

    def _heed_signal(self) -> None:
        if self.run.stop_signal:
            again = f"moe-lab train resume={self.run.folder}"
            raise Stop(75, f"stopped by {self.run.stop_signal} after step {self.run.step}; go on with: {again}")

    def _row(self, done: int) -> None:
        """Everything that is said about the updates since the last row."""
        s = self.parts.settings
        self._stop_if_diverged()
        row = self.loop.row(done, done - self.state.last_row) | self.alive
        self.alive = {}
        training_time = time.monotonic() - self.clock
        if s.evaluates_at(done):
            row |= self.evaluator(self.parts.schedules.at(done - 1, s.steps))
            if not math.isfinite(row.get("eval/loss", 0.0)):
                raise diverged(f"after update {done}, the loss of the evaluation is not finite")
            self.last_eval = {key: value for key, value in row.items() if key.startswith("eval/")}
        verdicts = self.judge.see(row)
        row["moe/verdict"] = verdicts
        timing = self._timing(done, training_time)
        self.run.row(row, timing)
        for sink in self.sinks:
            sink.row(row, timing)
        for change in self.judge.changes:
            log.info("layer %d: %s -> %s at step %d: %s", change.layer, change.old, change.new, done, change.why)
            for sink in self.sinks:
                sink.verdict(done, change.layer, change.old, change.new, change.why, change.remedies)
        self.last, self.state.last_row, self.clocked, self.clock = row, done, done, time.monotonic()

    def _stop_if_diverged(self) -> None:
        at = self.loop.diverged_at()
        if at is not None:
            raise diverged(f"the loss or the gradient of update {at} is not finite; that update was not applied")

    def _timing(self, done: int, seconds: float) -> dict[str, Any]:
        """Clocks of a row: throughput of training alone, and the time that the rest will take at the pace so far."""
        s = self.parts.settings
        elapsed = time.monotonic() - self.began
        tokens = (done - self.clocked) * s.batch_size * s.seq_len
        eta = elapsed / (done - self.began_at) * (s.steps - done)
        clocks = {"tokens_per_s": tokens / seconds, "eta": eta}
        return {"step": done, "time": time.time(), "elapsed": self.earlier + elapsed} | clocks

    def _summary(self, status: str) -> dict[str, Any]:
        row = self.last
        scalars = {key: v for key, v in row.items() if isinstance(v, int | float) and not key.startswith("eval/")}
        return {
            "status": status,
            "steps": self.run.step,
            "tokens": self.loop.tokens,
            "valid_tokens": self.parts.data.num_valid,  # 0: validation is off
            "loss": row.get("loss"),
            "ppl": row.get("ppl"),
            "eval": {key.removeprefix("eval/"): v for key, v in self.last_eval.items() if isinstance(v, int | float)},
            "verdicts": self.judge.report(),
            "final": scalars,
            "cost": cost(self.parts) | measured(self.parts.model.moes, row),
            "leaks": leaks(self.run.cfg),
            "wall_s": self.earlier + time.monotonic() - self.run.started,
        }

    def _facts(self) -> dict[str, Any]:
        parts, moes = self.parts, self.parts.model.moes
        return {
            "dataset": {"fingerprint": parts.data.fingerprint, "domains": parts.data.domains, **parts.data.about},
            "cost": cost(parts),
            "vocab_size": parts.data.vocab_size,
            "layers": len(moes),
            "experts": moes[0].experts.num if moes else 0,
            "k": moes[0].router.k if moes else 0,
            "k_at_most": moes[0].router.most_per_token() if moes else 0,
            "steps": parts.settings.steps,
            **self._arithmetic(),
            "resumed_from": self.began_at or None,
            "leaks": leaks(self.run.cfg),
            "idle": idle(self.run.cfg),
            "tags": ["leaks the future"] * leaks(self.run.cfg),
        }

    def _arithmetic(self) -> dict[str, str]:
        return {"device": str(self.parts.device), "dtype": str(self.parts.dtype).removeprefix("torch.")}

    def _open_sinks(self, facts: dict[str, Any]) -> None:
        cfg = redacted(self.run.cfg)
        told = facts | {"params": facts["cost"], "router": cfg["router"]["name"], "dataset": self.parts.data.name}
        mirrors = [build("logger", cfg[name]) for name in registered("logger") if name in cfg]
        for sink in mirrors:
            sink.open(self.run.folder, cfg, told)
            self.sinks.append(sink)
        self.destinations[:] = self._described()
        console = Console()
        console.open(self.run.folder, cfg, told | {"destinations": self.destinations})
        self.sinks.append(console)

    def _described(self) -> list[str]:
        return [line for sink in self.sinks if (line := sink.describe())]

    def _checkpoint(self, done: int) -> None:
        """Everything that the updates after `done` depend on, and how much of metrics.jsonl belongs to it."""
        self._stop_if_diverged()
        saved = self.state.gather(done)
        if problem := checkpoint.unsound(saved):
            raise diverged(f"after update {done}, {problem}")
        size, digest = self.run.sync()
        rows = {"metrics_bytes": size, "metrics_sha256": digest}
        saved = replace(saved, values=saved.values | rows)
        path = checkpoint.save_checkpoint(self.run.checkpoints, saved, self.parts.settings.checkpoint.keep)
        log.info("checkpoint %s", path.name)

    def _restore(self) -> int:
        """Load the newest checkpoint that fits, of the run's directory, and return its step; 0 where there is none."""
        try:
            found = checkpoint.newest(self.run.checkpoints, self._take)
        except ValueError as error:
            raise Stop(4, str(error)) from None
        if found is None:
            self.run.rewind(0)
            return 0
        self.earlier = self.run.elapsed()
        for row in self.run.rows():
            self.judge.see(row)
            self.last = row
            self.last_eval = {k: v for k, v in row.items() if k.startswith("eval/")} or self.last_eval
        checkpoint.prune(self.run.checkpoints, found.step, self.parts.settings.checkpoint.keep)
        return found.step

    def _take(self, found: checkpoint.Checkpoint) -> str | None:
        """Go on from a checkpoint; says why where that cannot be."""
        values = dict(found.values)
        if values.get("data") != self.parts.data.fingerprint:
            raise Stop(
                4, "the data changed since this run began (fingerprint differs); a run cannot go on with other data"
            )
        size, digest = values.pop("metrics_bytes", None), values.pop("metrics_sha256", None)
        if type(size) is not int or type(digest) is not str:
            return "state.json is not one of this run"
        problem = self.run.lacks(size, digest) or self.state.put(replace(found, values=values))
        if problem is None:
            self.run.rewind(size)
        return problem


def diverged(why: str) -> Stop:
    return Stop(3, f"diverged: {why}. Try a smaller optim.lr")
