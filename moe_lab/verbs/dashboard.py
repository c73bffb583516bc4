"""`moe-lab dashboard ENTITY/PROJECT`: a saved W&B workspace for the runs of a project."""

import importlib.util
import os
import re

from moe_lab.cli import arguments, complain, quiet_pipe
from moe_lab.sinks.account import PATIENCE, WITHOUT_KEY, has_key
from moe_lab.sinks.base import one_line

ABOUT = """Save the workspace "Router collapse" in a W&B project: panels for collapse, confidence, specialisation and
the cost of balance, runs grouped by sweep and router. Each call saves a new one. To read it: docs/dashboards.md."""
PROJECT = re.compile(r"[\w.-]{1,128}/[\w.-]{1,128}")


def main(argv: list[str]) -> int:
    parser = arguments("dashboard", ABOUT)
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="where the runs are: user or team, and project")
    parser.add_argument("--dry-run", action="store_true", help="print it as JSON and save nothing; needs no key")
    asked = parser.parse_args(argv)
    if not PROJECT.fullmatch(asked.project):
        return complain([f"{asked.project}: write ENTITY/PROJECT, such as my-team/moe-lab"])
    if importlib.util.find_spec("wandb_workspaces") is None:
        return complain(["the dashboard needs wandb-workspaces: pip install 'wandb-workspaces>=0.4.8'"], 5)
    if not asked.dry_run and not has_key():
        return complain([WITHOUT_KEY], 5)
    os.environ.update({"WANDB_SILENT": "true"} | PATIENCE | os.environ)  # read when wandb is first imported
    from moe_lab.workspace import as_json, workspace

    made = workspace(*asked.project.split("/"))
    if asked.dry_run:
        quiet_pipe()
        print(as_json(made))
        return 0
    try:
        made.save()
        print(f"saved: {made.url}")
    except Exception as error:  # whatever the network, the key or the server object to
        return complain([f"W&B did not save it: {one_line(error)}"], 5)
    return 0
