"""What the updates to come depend on, beside config and data: gathered for a checkpoint, and put back from one.

Batches and noise are functions of the step, so there is no generator and no position in the data among it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_lab.checkpoint import TENSORS, Checkpoint, unsound
from moe_lab.evaluate import Evaluator
from moe_lab.loop import Loop
from moe_lab.reading import FOREIGN


class State:
    """The state of a run, held by its loop and its evaluator, and the step of its last row."""

    def __init__(self, loop: Loop, evaluator: Evaluator):
        self.loop, self.evaluator = loop, evaluator
        self.last_row = 0

    def gather(self, step: int) -> Checkpoint:
        """The state after `step` updates."""
        loop, parts = self.loop, self.loop.parts
        state = {f"recorder.{name}": t for name, t in loop.recorder.state().items()}
        state |= {f"evaluator.{name}": t for name, t in self.evaluator.state().items()} | {"sums": loop.sums}
        state |= {f"balance.{name}": t for name, t in loop.upkeep.state().items()}
        values = {"tokens": loop.tokens, "last_row": self.last_row, "data": parts.data.fingerprint}
        model, optimizer = parts.model.state_dict(), loop.optimizer.state()
        return Checkpoint(step, _copies(model), _copies(optimizer), _copies(state), values)

    def put(self, found: Checkpoint) -> str | None:
        """Put a checkpoint's state in the place of this one; says why where it is not one of this run.

        What was put must come back as it was: so nothing is forgotten, converted or stretched to fit.
        """
        try:
            self._put(found)
        except (ValueError, RuntimeError, *FOREIGN) as error:
            return f"does not fit this run: {str(error).strip().splitlines()[-1].strip() or type(error).__name__}"
        return unsound(found) or difference(found, self.gather(found.step))

    def _put(self, found: Checkpoint) -> None:
        loop = self.loop
        loop.parts.model.load_state_dict(found.model)
        loop.optimizer.load_state(found.optimizer)
        loop.recorder.load_state(_under("recorder.", found.state))
        self.evaluator.load_state(_under("evaluator.", found.state))
        loop.upkeep.load_state(_under("balance.", found.state))
        loop.sums.copy_(found.state["sums"])
        loop.tokens, self.last_row = int(found.values["tokens"]), int(found.values["last_row"])


def difference(one: Checkpoint, other: Checkpoint) -> str | None:
    """Where two states differ, or None."""
    for kind in TENSORS:
        a, b = getattr(one, kind), getattr(other, kind)
        for name in sorted(a.keys() | b.keys()):
            same = name in a and name in b and a[name].dtype == b[name].dtype and torch.equal(a[name], b[name])
            if not same:
                return f"{kind}.safetensors: {name} does not fit this run"
    return None if one.values == other.values else "state.json does not fit this run"


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and contiguous, as safetensors wants them."""
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
