"""moe-lab: an instrument for routing in Mixture-of-Experts models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_lab.loading import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`moe_lab.load` without importing torch before it is needed."""
    if name == "load":
        from moe_lab.loading import load

        return load
    raise AttributeError(f"module 'moe_lab' has no attribute {name!r}")
