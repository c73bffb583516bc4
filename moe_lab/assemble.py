"""From a config to the objects of a run."""

import os
from pathlib import Path
from typing import Any

import torch

from moe_lab.config import build
from moe_lab.datasets.base import Data
from moe_lab.model.transformer import Transformer
from moe_lab.objectives import CLM, MLM
from moe_lab.parts import Parts
from moe_lab.seeding import initialise
from moe_lab.settings import Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cache_folder() -> Path:
    """Where token caches live: MOE_LAB_CACHE, or moe-lab in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("MOE_LAB_CACHE") or f"{home}/moe-lab").expanduser()


def assemble(cfg: dict[str, Any]) -> Parts:
    """Build everything that a run is made of. ValueError where data or device cannot serve the config."""
    settings: Settings = build("root", {"name": "train"} | {key: cfg[key] for key in ROOT})
    device, dtype = place(settings)
    objective = build("objective", cfg["objective"])
    data = prepare(cfg)
    model = bare_model(cfg, data.vocab_size, objective)
    initialise(model, settings.seed)
    model.to(device)
    if settings.compile:
        model.compile()
    return Parts(
        settings=settings,
        data=data,
        model=model,
        objective=objective,
        balancers={name: build("balance", node) for name, node in cfg["balance"].items()},
        explorers={name: build("explore", node) for name, node in cfg["explore"].items()},
        schedules=build("schedule", cfg["schedule"]),
        optim=build("optim", cfg["optim"]),
        device=device,
        dtype=dtype,
    )


def bare_model(cfg: dict[str, Any], vocab_size: int, objective: CLM | MLM) -> Transformer:
    """The model of a config, its weights undefined."""
    vocabulary = vocab_size + objective.extra_tokens
    return build("model", cfg["model"], vocabulary, objective.causal, cfg["router"], cfg["experts"])


def prepare(cfg: dict[str, Any]) -> Data:
    """The dataset of a config, from its cache or built into it."""
    return build("dataset", cfg["dataset"]).prepare(cache_folder(), cfg["seq_len"])


ROOT = tuple(Settings.__dataclass_fields__)


def place(settings: Settings) -> tuple[torch.device, torch.dtype]:
    """The device and the compute dtype; ValueError where they cannot be had."""
    cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise ValueError("device=cuda: PyTorch sees no CUDA device here; device=auto takes what there is")
    device = torch.device("cuda" if cuda and settings.device != "cpu" else "cpu")
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = DTYPES.get(settings.dtype, auto)
    if settings.compile and dtype == torch.float32:
        raise ValueError("compile=true: torch compiles grouped expert products in bf16 only; add dtype=bfloat16")
    return device, dtype
