"""`moe_lab.load(run)`: a run's model, config and metrics in Python."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from moe_lab import checkpoint
from moe_lab.assemble import assemble
from moe_lab.loop import Parts
from moe_lab.run import read_rows, read_status


@dataclass(frozen=True)
class LoadedRun:
    """A run directory: `config` and `metrics` (one dict per row) at once, `parts` and `model` when asked for."""

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    status: str

    @cached_property
    def parts(self) -> Parts:
        """Dataset, model, objective, balancers and schedules as the run built them, with the newest weights."""
        parts = assemble(self.config)
        found = checkpoint.newest(self.folder / "checkpoints")
        if found is None:
            raise ValueError(f"{self.folder}: no checkpoint to load a model from")
        parts.model.load_state_dict(found.model)
        return parts

    @property
    def model(self):
        """The model with the weights of the newest checkpoint, in evaluation mode (a torch.nn.Module)."""
        return self.parts.model.eval()


def load(run: str | Path) -> LoadedRun:
    """Open a run directory. ValueError where there is none."""
    folder = Path(run)
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no run directory (it has no config.yaml)") from None
    status = read_status(folder) or {"status": "created"}
    return LoadedRun(folder, config, read_rows(folder / "metrics.jsonl"), status["status"])
