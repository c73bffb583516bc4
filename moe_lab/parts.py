"""What a run is made of, and a batch as its model takes it.

Shapes: B sequences per update, S sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lab.balance.base import Balancer
from moe_lab.datasets.base import Data
from moe_lab.explore.base import Explorer
from moe_lab.model.transformer import Transformer
from moe_lab.objectives import CLM, MLM
from moe_lab.optim import AdamW
from moe_lab.schedules import Schedules
from moe_lab.settings import Settings


@dataclass
class Parts:
    """What a run is made of, built from its config."""

    settings: Settings
    data: Data
    model: Transformer
    objective: CLM | MLM
    balancers: Mapping[str, Balancer]
    explorers: Mapping[str, Explorer]
    schedules: Schedules
    optim: AdamW
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Examples:
    """A batch as the model takes it: inputs, targets and what counts, each [B, S], and the inputs' domains."""

    inputs: Tensor
    targets: Tensor
    counted: Tensor
    domain: Tensor

    def split(self, parts: int) -> list["Examples"]:
        chunks = [t.chunk(parts) for t in (self.inputs, self.targets, self.counted, self.domain)]
        return [Examples(*fields) for fields in zip(*chunks, strict=True)]


def examples(parts: Parts, ids: Tensor, domain: Tensor, g: torch.Generator) -> Examples:
    """Inputs and targets of token ids [B, S+1], on the run's device."""
    fields = (*parts.objective.targets(ids, parts.data.vocab_size, g), domain)
    return Examples(*(send(t, parts.device) for t in fields))


def send(t: Tensor, device: torch.device) -> Tensor:
    """To the device, and no wait for it: CUDA copies beside its work from whole, page-locked memory alone."""
    ready = t.contiguous().pin_memory() if device.type == "cuda" else t
    return ready.to(device, non_blocking=True)
