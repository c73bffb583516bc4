"""The process that speaks to W&B: every call into wandb is here. Started and told what to do by sinks/mirror.py."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from moe_lab.sinks.base import one_line
from moe_lab.sinks.mirror import serve

ROOM = 65536  # bytes; wandb writes its record in blocks of half as many, and says nothing where the disk has no more


class Upload:
    """One run on W&B. `tell(kind, text)` speaks to the training process, see Mirror.hear."""

    def __init__(self, tell: Callable[[str, str], None]):
        self.tell = tell
        self.run: Any = None

    def open(self, mode: Literal["online", "offline"], run: dict[str, Any], settings: dict[str, Any]) -> None:
        """Start a run (arguments of wandb.init), offline where the server does not answer as it should."""
        self.patience = settings["finish_timeout"]
        # wandb's own telemetry connects to the server even when offline; the service process reads this as it starts.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        if mode == "online":
            try:
                self.run = _init(mode, run, settings)
                self.tell("note", f"online at {self.run.url}")
            except Exception as error:
                self.tell("note", "offline, since going online failed")
                self.tell("warn", f"going online failed, so the run is recorded offline: {one_line(error)}")
                _end_service()  # wandb holds on to the id of a failed attempt as long as its service lives
        self.run = self.run or _init("offline", run, settings)

    def row(self, step: int, values: dict[str, Any], loads_LE: list[list[float]], summary: dict[str, Any]) -> None:
        """Curves, and at evaluations the loads `[L][E]` to draw and values for the run's summary."""
        self._check_room()
        if summary:
            self.run.summary.update(summary)
        self.run.log(values | pictures(loads_LE), step=step)

    def close(self, summary: dict[str, Any], tags: Sequence[str], exit_code: int) -> None:
        self.run.summary.update(summary)
        self.run.tags = (*(self.run.tags or ()), *tags)
        try:
            self.run.finish(exit_code=exit_code)
        except TimeoutError:
            self.tell("warn", f"it did not take the rest of the run within {self.patience:g} s")
        _end_service()  # its last records are in the file only now
        self._check_room()

    def let_go(self) -> None:
        """What can still be saved after an error."""
        if self.run is not None:
            self.run.finish(exit_code=1)
        _end_service()

    def _check_room(self) -> None:
        folder = Path(self.run.dir).parent
        if shutil.disk_usage(folder).free < ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _init(mode: Literal["online", "offline"], run: dict[str, Any], settings: dict[str, Any]) -> Any:
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    settings = settings | {"x_disable_stats": mode == "offline"}
    known = wandb.Settings.model_fields  # names with x_ come and go
    settings = {key: value for key, value in settings.items() if key in known}
    started = wandb.init(mode=mode, resume="allow", settings=wandb.Settings(**settings), **run)
    started.define_metric("tokens", hidden=True)
    started.define_metric("*", step_metric="tokens")
    started.define_metric("eval/loss", step_metric="tokens", summary="min,last")
    return started


def _end_service() -> None:
    """Wait for wandb-core to write what it has and to end; it may be dead already."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def pictures(loads_LE: list[list[float]]) -> dict[str, Any]:
    """A heatmap of the whole model and a histogram per layer of the experts' loads (1: balanced)."""
    if not loads_LE:
        return {}
    import numpy as np
    import wandb

    from moe_lab.sinks.heatmap import CAPTION, heatmap

    values: dict[str, Any] = {"moe/load_heatmap": wandb.Image(heatmap(loads_LE), caption=CAPTION)}
    for layer, loads_E in enumerate(np.asarray(loads_LE, dtype=np.float64)):
        relative_E = loads_E / max(loads_E.mean(), 1e-12)
        values[f"moe_layer/L{layer:02d}/load"] = wandb.Histogram(
            np_histogram=np.histogram(relative_E, bins=min(64, 2 * len(loads_E)), range=(0.0, len(loads_E)))
        )
    return values


if __name__ == "__main__":
    serve(Upload)
