"""`moe_lab.load(run)`: a run's model, config and metrics in Python."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from moe_lab import checkpoint
from moe_lab.assemble import assemble
from moe_lab.loop import Parts, contexts
from moe_lab.model.transformer import Output, Transformer
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
    def model(self) -> Transformer:
        """The model with the weights of the newest checkpoint, a torch.nn.Module."""
        return self.parts.model

    def predict(self, ids_BS: torch.Tensor) -> Output:
        """Logits [B, S, V] and each MoE layer's Routing for token ids [B, S] int64: no noise, the last temperature."""
        parts, steps = self.parts, self.parts.settings.steps
        with torch.no_grad():
            return parts.model(
                ids_BS.to(parts.device), contexts(parts, parts.schedules.at(steps - 1, steps)), parts.dtype
            )


def load(run: str | Path) -> LoadedRun:
    """Open a run directory. ValueError where there is none."""
    folder = Path(run)
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no run directory (it has no config.yaml)") from None
    status = read_status(folder) or {"status": "created"}
    return LoadedRun(folder, config, read_rows(folder / "metrics.jsonl"), status["status"])
