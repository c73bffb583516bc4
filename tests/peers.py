"""Independent implementations, imported when first asked for, and how two results are compared."""

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

BF16, FP32, FP64 = 2e-2, 1e-5, 1e-10  # largest error over largest value


def hf_config(name: str, **options: Any) -> Any:
    """A configuration class of transformers whose experts run in a plain loop."""
    config = getattr(importlib.import_module("transformers"), name)(**options)
    config._experts_implementation = "eager"
    return config


def hf(name: str) -> Any:
    """The model file of transformers by that name."""
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def st_moe() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that it imports
        return importlib.import_module("st_moe_pytorch.st_moe_pytorch")


def soft_moe_pytorch() -> Any:
    """The layer, which knows one form: slots from the whole sequence."""
    return importlib.import_module("soft_moe_pytorch").SoftMoE


def close(pairs: dict[str, tuple[Tensor, Tensor]], tolerance: float) -> None:
    for name, (got, expected) in pairs.items():
        assert got.shape == expected.shape, name
        assert expected.abs().max() > 0, f"{name}: nothing to compare"
        error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert error <= tolerance, f"{name} is off by {error:.1e} of its largest value"


def set_weights(pairs: dict[Tensor, Tensor]) -> None:
    with torch.no_grad():
        for to, source in pairs.items():
            to.copy_(source)


def gating(D: int, E: int, k: int, threshold: float = 0.0, factor: float | None = None) -> Any:
    """The gate of st-moe-pytorch with room for all, and a threshold that sends every token to all of its k experts."""
    options = {"threshold_train": threshold, "capacity_factor_train": factor or float(E)}
    return st_moe().TopNGating(D, E, top_n=k, **options).double()
