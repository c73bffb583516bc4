"""Balance losses that have nothing to do with a router are named at the start of a run, and do nothing."""

import pytest
from tiny import loop, tiny

from moe_lab.assemble import assemble
from moe_lab.settings import idle
from moe_lab.sinks.lines import start_lines


@pytest.mark.parametrize(
    "overrides, line",
    [
        (["router=hash"], "balance=[switch,z_loss] reaches no parameter: router=hash has none that is trained"),
        (["router=random"], "balance=[switch,z_loss] reaches no parameter: router=random has none that is trained"),
        (["router=hash", "balance=[orthogonal_experts]"], None),
        (["router=hash", "balance=[]"], None),
        (["router=base", "allow_leak=true"], "balance=[switch] has little to do: router=base loads all experts alike"),
        (["router=base", "balance=[z_loss]", "allow_leak=true"], None),
        (["router=topk"], None),
        (["router=kmeans"], None),
    ],
)
def test_what_has_nothing_to_do_is_said_in_one_line(overrides: list[str], line: str | None):
    found = idle(tiny(*overrides))
    assert len(found) == (line is not None) and all(told.startswith(line or "") for told in found)
    assert start_lines("run", {"idle": found})[1:] == found


def test_such_losses_change_no_gradient():
    norms = []
    for balance in ("[switch,z_loss]", "[]"):
        run = loop(assemble(tiny("router=hash", f"balance={balance}")))
        for step in range(3):
            run.step(step)
        norms.append(run.row(3, 3)["grad_norm"])
    assert norms[0] == norms[1]
