"""`moe_lab.load(run)`: a run's model, config and metrics in Python."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moe_lab import checkpoint, reading
from moe_lab.assemble import bare_model, prepare
from moe_lab.config import build
from moe_lab.datasets.base import Data
from moe_lab.drawing import contexts_of
from moe_lab.model.transformer import Output, Transformer
from moe_lab.run import read_rows, read_status


@dataclass(frozen=True)
class LoadedRun:
    """A run directory: `config`, `metrics` (one dict per row) and `env` at once, model and data when asked for.

    The model needs neither the data nor the device that trained it.
    """

    folder: Path
    config: dict[str, Any] = field(repr=False)
    metrics: list[dict[str, Any]] = field(repr=False)
    env: dict[str, Any] = field(repr=False)
    status: str

    @cached_property
    def model(self) -> Transformer:
        """The model with the weights of the newest checkpoint, a torch.nn.Module on the CPU."""
        with reading.of_a_run(self.folder):
            model = bare_model(self.config, self.env["vocab_size"], build("objective", self.config["objective"]))

        def take(found: checkpoint.Checkpoint) -> str | None:
            try:
                model.load_state_dict(found.model)
            except RuntimeError:
                return "model.safetensors is not of this model"
            return checkpoint.unsound(found)

        if checkpoint.newest(self.folder / "checkpoints", take) is None:
            raise ValueError(f"{self.folder}: no checkpoint to load a model from")
        return model

    @cached_property
    def data(self) -> Data:
        """The dataset that it trained on. ValueError where it has changed since."""
        data = prepare(self.config)
        if data.fingerprint != self.env["dataset"]["fingerprint"]:
            raise ValueError(f"{self.folder}: the data changed since this run (its fingerprint differs)")
        return data

    def predict(self, ids_BS: torch.Tensor) -> Output:
        """Logits [B, S, V] and each MoE layer's Routing for token ids [B, S] int64: no noise, the last temperature.

        On the device that `model` is on, in fp32.
        """
        steps = self.config["steps"]
        values = build("schedule", self.config["schedule"]).at(steps - 1, steps)
        balancers = {name: build("balance", node) for name, node in self.config["balance"].items()}
        with torch.no_grad():
            return self.model(ids_BS.to(self.model.embed.device), contexts_of(self.model, values, balancers, ids_BS))


def load(run: str | Path) -> LoadedRun:
    """Open a run directory. ValueError where there is none."""
    folder = Path(run)
    try:
        config = reading.yaml_file(folder / "config.yaml")
    except FileNotFoundError:
        raise ValueError(f"{folder}: no run directory (it has no config.yaml)") from None
    status = read_status(folder) or {"status": "created"}
    env = reading.json_file(folder / "env.json") if (folder / "env.json").exists() else {}
    return LoadedRun(folder, config, read_rows(folder / "metrics.jsonl"), env, status["status"])
