"""The W&B workspace "Router collapse": which keys of a run stand in which panel. Built by wandb-workspaces.

What each panel shows in a run that collapses, cannot decide, is balanced but wrong, or oscillates: docs/dashboards.md.
"""

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NAME = "Router collapse"
# Section -> [(title, key)]. A key of one layer, moe_layer/L00/x, is written as {layer}/x: one line for each layer.
LINES: dict[str, list[tuple[str, str]]] = {
    "Collapse": [
        ("load CV per layer: 0 is balance, sqrt(E/k - 1) its ceiling", "{layer}/load_cv"),
        ("experts without tokens per layer", "{layer}/dead_experts"),
        ("MaxVio per layer: the fullest expert, in mean loads above the mean", "{layer}/max_vio"),
        ("load CV of the worst layer", "moe/load_cv/worst"),
        ("experts without tokens, all layers", "moe/dead_experts/total"),
        ("share of the load that changes hands per update: near 1 it oscillates", "{layer}/load_flutter"),
    ],
    "Confidence": [
        ("entropy of a token's gate per layer: 1 is undecided, 0 is sure", "{layer}/token_entropy"),
        ("entropy of a token's gate, mean of the layers", "moe/token_entropy/mean"),
        ("router gradient over expert gradient: below 1e-4 it is frozen", "{layer}/router_grad_ratio"),
        ("loss that hard top-1 inference adds", "eval/gap_top1"),
    ],
    "Specialisation": [
        ("what the choice tells of the text's domain: NMI", "{layer}/nmi_domain"),
        ("what the gate knows of the token: mutual information", "{layer}/mutual_information"),
        ("router row along its own expert, beyond the others", "{layer}/coupling_gap"),
    ],
    "Cost of balance": [
        ("validation loss", "eval/loss"),
        ("training loss", "loss"),
        ("validation perplexity", "eval/ppl"),
        ("learning rate", "lr"),
    ],
}
LOG_SCALE = {"{layer}/router_grad_ratio"}
HEATMAP, LEAKS, BALANCE = "moe/load_heatmap", "leaks", "moe/load_cv/worst"
ABOUT = """**Router collapse.** Read from left to right, then down.

- *Collapse*: load CV high and experts without tokens. Balanced curves are no proof: read on.
- *Confidence*: gate entropy near 1, and the router has not decided, whatever the load looks like.
- *Specialisation*: near 0 under a balanced load, and the choice means nothing.
- *Cost of balance*: what the validation loss pays for it.

The tags hold each run's verdicts. How to read a panel: docs/dashboards.md of moe-lab."""
LEAK_NOTE = """**Runs tagged `leaks the future`** let later tokens have a say in routing (a bar at 1 beside this text).
Their losses compare with no causal model's: hide them before comparing."""


def metric_regex(key: str) -> str:
    """The pattern that finds a key in every layer, as W&B takes it."""
    return key.replace("{layer}", r"^moe_layer/L\d+") + "$"


def workspace(entity: str, project: str) -> "Workspace":
    """The workspace, not saved yet."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    extra: dict[str, list[Any]] = {
        "Collapse": [
            wr.MediaBrowser(title="load of each expert (column) in each layer (row)", media_keys=[HEATMAP]),
            wr.MarkdownPanel(markdown=ABOUT),
        ],
        "Cost of balance": [
            wr.ScatterPlot(title="validation perplexity against imbalance, a point a run", x=BALANCE, y="eval/ppl"),
            wr.BarPlot(title="1: later tokens had a say in routing", metrics=[LEAKS], orientation="h"),
            wr.MarkdownPanel(markdown=LEAK_NOTE),
        ],
    }
    sections = [
        ws.Section(name=name, panels=_numbered(name, [*map(_line, lines), *extra.get(name, [])]), is_open=True)
        for name, lines in LINES.items()
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=30),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Metric("Group"), ws.Config("router.name")],
            pinned_columns=["run:displayName", "run:tags", "summary:status", f"summary:{LEAKS}"],
        ),
    )


def as_json(made: "Workspace") -> str:
    """What W&B is sent of it, the same at every call."""
    view = made._to_model()
    spec = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    told = {"entity": view.entity, "project": view.project, "name": view.display_name, "spec": spec}
    return json.dumps(told, indent=2)


def _line(named: tuple[str, str]) -> Any:
    import wandb_workspaces.reports.v2 as wr

    title, key = named
    what: dict[str, Any] = {"metric_regex": metric_regex(key)} if "{layer}" in key else {"y": [key]}
    return wr.LinePlot(title=title, x="tokens", log_y=True if key in LOG_SCALE else None, **what)


def _numbered(section: str, panels: list[Any]) -> list[Any]:
    """Panels with ids that are the same each time, where wandb-workspaces draws them at random, in rows of three."""
    from wandb_workspaces.reports.v2.interface import Layout

    for i, panel in enumerate(panels):
        panel._id = f"{section}-{i}".lower().replace(" ", "-")
        panel.layout = Layout(x=8 * (i % 3), y=6 * (i // 3), w=8, h=6)
    return panels
