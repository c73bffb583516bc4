"""compile=true: the model is one graph, which no schedule recompiles, and trains to the same numbers.

Whole models are traced and differentiated as torch.compile does it, but not translated to machine code, which would
take minutes on a CPU; tests/test_gpu.py does that. One small graph goes all the way.
"""

import shutil
from pathlib import Path

import pytest
import torch
from tiny import CONF, loop, tiny
from torch._dynamo import config, reset
from torch._dynamo.utils import counters

from moe_lab.assemble import assemble
from moe_lab.drawing import contexts_of
from moe_lab.evaluate import Evaluator
from moe_lab.loop import forward
from moe_lab.model.products import grouped
from moe_lab.parts import Parts, examples

ROUTERS = sorted(path.stem for path in Path(CONF, "router").glob("*.yaml"))
CASES = [(f"router={router}", "allow_leak=true") for router in ROUTERS] + [
    ("router=soft_moe", "router.causal=blocks", "router.block=8", "router.slots=2"),
    ("router=soft_moe", "router.causal=prefix"),
    ("router=topk", "router.k=3", "explore=[gaussian]", "experts.capacity_factor=1.25", "balance=[importance]"),
    (
        *("router=topk", "explore=[jitter,dropout,reroute,expert_dropout,second_expert]", "experts.drop=probability"),
        *("experts.capacity_factor={curve: linear, start: 0.5, end: 2}", "explore.second_expert.of=gate"),
        "objective=mlm",
    ),
    ("router=softmax_ste", "router.backward=dense", "experts=mlp", "experts.shared_experts=1"),
    ("router=sigmoid_topk", "balance=[loss_free]", "objective=mlm"),
    ("router=topk", "experts.widths=[16,32]", "experts.granularity=2"),
    ("router=topk", "experts.zero_experts=1", "experts.copy_experts=1", "experts.constant_experts=2"),
]


def parts(*overrides: str) -> Parts:
    return assemble(tiny("device=cpu", "dtype=bfloat16", "schedule=anneal", "model.layers=1", *overrides))


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_one_graph_with_the_same_numbers(overrides: tuple[str, ...]) -> None:
    eager, compiled = loop(parts(*overrides)), loop(parts(*overrides))
    reset()
    counters.clear()
    compiled.parts.model.compile(backend="aot_eager", fullgraph=True)
    with config.patch(error_on_recompile=True):  # the temperature falls, the noise fades: numbers, not graphs
        for step in range(3):
            eager.step(step)
            compiled.step(step)
    assert counters["stats"]["unique_graphs"] == 1
    mine, theirs = (each.row(3, 3) for each in (compiled, eager))
    assert mine["moe/selected"] == theirs["moe/selected"]
    for key in ("loss", "loss_total", "grad_norm"):
        assert mine[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_an_evaluation_compiles_once() -> None:
    """Its modes and its shorter last batch are graphs of their own, fewer than dynamo keeps."""
    trained = loop(parts("router=dense", "router.k=2"))
    reset()
    trained.parts.model.compile(backend="aot_eager", fullgraph=True)
    evaluator, schedules = Evaluator(trained.parts), trained.parts.schedules
    trained.step(0)
    evaluator(schedules.at(0, 40))
    with config.patch(error_on_recompile=True):
        trained.step(1)
        evaluator(schedules.at(20, 40))


def test_a_plan_keeps_what_the_graph_computed() -> None:
    """Observers find the order of the rows there, rather than sort once more."""
    p = parts("router=topk")
    reset()
    p.model.compile(backend="aot_eager", fullgraph=True)
    raw = p.data.train_batch(0, 0, 4, 32)
    batch = examples(p, raw.ids, raw.domain, torch.Generator())
    out, _ = forward(p, batch, contexts_of(p.model, p.schedules.at(0, 10), p.balancers, batch.inputs))
    assert "_order" in vars(out.routings[0].plan)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_counts_that_are_constant_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every expert runs on all tokens, torch 2.13 works out where they end itself, and in int64."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    reset()
    rows_NX, w_EXY = torch.randn(32, 16).bfloat16(), torch.randn(4, 16, 16).bfloat16().requires_grad_()

    def product(w_EXY: torch.Tensor) -> torch.Tensor:
        return grouped(rows_NX, w_EXY, torch.full((4,), 8))

    assert torch.equal(torch.compile(product, fullgraph=True)(w_EXY), product(w_EXY))


def test_fp32_is_refused_in_a_line() -> None:
    with pytest.raises(ValueError, match=r"compile=true: .* add dtype=bfloat16"):
        assemble(tiny("device=cpu", "dtype=float32", "compile=true"))
