"""A whole update as one CUDA graph against the same update launched call by call: forward, losses, backward, AdamW.

Observers are left out on both sides (which part of a batch they look at changes from update to update), and so is the
next batch, which would be copied into the graph's inputs. Needs a GPU.
"""

import os
import tempfile
from collections.abc import Callable

import torch

from benchmarks.harness import device, interleave, table
from benchmarks.step import MODEL, loop
from moe_lab import seeding
from moe_lab.drawing import contexts, draw
from moe_lab.loop import forward
from moe_lab.parts import examples

WARM_UP = 5


def update_of(overrides: list[str]) -> Callable[[], torch.Tensor]:
    """An update on the first batch that gives its loss; all its tensors stay where they are."""
    trained = loop(*overrides)
    parts, s = trained.parts, trained.parts.settings
    raw = parts.data.train_batch(s.seed, 0, s.batch_size, s.seq_len)
    batch = examples(parts, raw.ids, raw.domain, seeding.generator(s.seed, "mask", 0))
    drawn, values = draw(parts, batch.inputs.numel(), s.seed, "noise", 0, training=True), parts.schedules.at(0, s.steps)
    layers = contexts(parts, values, batch, drawn, training=True)
    parameters = list(parts.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=torch.tensor(1e-3, device=device()), fused=True, capturable=True)

    def update() -> torch.Tensor:
        out, loss_T = forward(parts, batch, layers)
        counted = batch.counted.sum()
        total = loss_T.sum() / counted + sum(trained._terms(out, batch, loss_T.detach(), values, drawn, counted))
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.detach()

    return update


def captured(update: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The same as a graph, after updates on a side stream that settle what is allocated."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            update()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = update()

    def replay() -> torch.Tensor:
        graph.replay()
        return loss

    return replay


def main() -> None:
    if device().type != "cuda":
        print("  needs a CUDA device: nothing to measure here")
        return
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("MOE_LAB_CACHE", cache)
        for title, overrides in {"4 layers, d=256": [*MODEL, "batch_size=32"], "nano": []}.items():
            eager, graph = update_of(overrides), captured(update_of(overrides))
            for _ in range(WARM_UP):
                eager()
            mine, theirs = float(graph()), float(eager())
            if abs(mine - theirs) > 1e-2 * theirs:
                raise SystemExit(f"not the same update: loss {mine} as a graph, {theirs} without")
            table(f"{title}, bfloat16", interleave({"eager": eager, "graph": graph}, "eager", repeats=10))


if __name__ == "__main__":
    main()
