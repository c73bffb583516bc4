"""What a router promises about its behaviour. Declared per config, held against behaviour by tests/test_traits.py."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Traits:
    """live: the task loss (or the router's own objective) reaches its parameters; None where it has none.
    rows: which router rows a token sends a task gradient to: those of its experts, all, or none; shared: rows are not
    those of one expert.
    causal: changing later tokens changes no earlier output. batch_independent: other sequences change nothing.
    stochastic: two draws in training, two choices; every router is deterministic in evaluation.
    dropless: without a capacity every token gets the experts it chose. static_shapes: row counts do not depend on data.
    flops: expert FLOPs per token over those of the k chosen experts; None: by the data, or the sequences' length.
    """

    live: bool | None = True
    rows: Literal["selected", "all", "none", "shared"] = "all"
    causal: bool = True
    batch_independent: bool = True
    stochastic: bool = False
    dropless: bool = True
    static_shapes: bool = True
    flops: float | None = 1.0
