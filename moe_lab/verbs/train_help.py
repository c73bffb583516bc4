"""`moe-lab train --help`, from what conf/ says about itself."""

import shutil
import sys

from moe_lab import presets

USAGE = """usage: moe-lab train [GROUP=OPTION ...] [KEY=VALUE ...]
       moe-lab train -m router=topk,switch seed=range(5)     a run for every combination
       moe-lab train resume=RUN                              go on from a run's checkpoint
"""
EXAMPLES = """
  moe-lab train router=gumbel_ste                            the default data, about a minute on a laptop
  moe-lab train router=noisy_topk balance=[importance,load] schedule=anneal
  moe-lab train router=switch explore=[gumbel,reroute] explore.reroute.strength=0.1
  moe-lab train dataset=text dataset.paths=[my.txt] model=small optim.lr=1e-3
  moe-lab train fast=true logger=[]                          a few steps through every path
"""
FLAGS = """
  -m, --multirun      several values per key: router=topk,switch  seed=range(5)  'experts.num=choice(8,16)'
  --cfg job           show the composed config instead of running; --resolve fills interpolations in
  --config-dir DIR    more presets, DIR/GROUP/NAME.yaml; also from MOE_LAB_CONFIG_DIR or ./moe_lab_conf
  --config-name NAME  another primary config than train
  --info [searchpath|defaults|...], --hydra-help             what Hydra knows
"""


def show() -> None:
    """Print the help."""
    own = presets.own_dir()
    print(f"Train a small Mixture-of-Experts language model and watch its routers.\n\n{USAGE}")
    print(_title("Groups:"), "one word each; * is the default; moe-lab list GROUP shows the keys of each\n")
    for group in presets.groups(own).values():
        _group(group)
    print(_title("Keys"), "that belong to no group\n")
    for key in presets.root_keys(presets.conf_dir()):
        _line(f"  {key.path}={key.value}", key.about)
    for title, text in (("Flags", FLAGS), ("Examples", EXAMPLES)):
        print(f"\n{_title(title)}\n{text}", end="")


def _group(group: presets.Group) -> None:
    takes = "=[a,b]" if group.many else "="
    print(f"  {_title(group.name)}{takes}")
    for preset in group.presets.values():
        mark = "*" if preset.name in group.chosen else " "
        _line(f"   {mark} {preset.name}", preset.about)
    print()


def _line(left: str, about: str) -> None:
    """Two columns; cut at the edge of a terminal, whole where the output is a file or a pipe."""
    line = f"{left:<26} {about}" if about else left
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        line = line if len(line) <= width else line[: width - 1] + "…"
    print(line)


def _title(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else text
