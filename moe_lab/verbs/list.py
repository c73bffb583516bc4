"""`moe-lab list [GROUP]`: what there is, from conf/ and the user's own config directory."""

from collections.abc import Iterable
from typing import Any

from moe_lab import presets
from moe_lab.cli import arguments, complain, quiet_pipe


def main(argv: list[str]) -> int:
    parser = arguments("list", "The groups, or the options of one with their keys.")
    parser.add_argument(
        "group", nargs="?", help="router, experts, balance, explore, ..., or sweeps; all groups when left out"
    )
    parser.add_argument("--traits", action="store_true", help="what each router promises: list router --traits")
    told = parser.parse_args(argv)
    asked = told.group
    if told.traits and asked != "router":
        return complain(["--traits: routers have traits; moe-lab list router --traits"])
    quiet_pipe()
    if told.traits:
        _print(_traits())
        return 0
    if asked == "sweeps":
        _print(_studies())
        return 0
    groups = presets.groups(presets.own_dir())
    if asked is not None and asked not in groups:
        from moe_lab.config import nearest

        return complain([f"no such group: {asked}{nearest(asked, [*groups, 'sweeps'])}"])
    _print(_options(groups[asked]) if asked else _groups(groups.values()))
    return 0


def _groups(groups: Iterable[presets.Group]) -> Any:
    from rich.text import Text

    table = _table("group", "options (the default is marked *)")
    for group in groups:
        names = Text("  ").join(_name(preset.name, preset.name in group.chosen) for preset in group.presets.values())
        table.add_row(Text(f"{group.name}=[...]" if group.many else f"{group.name}=", "bold"), names)
    table.caption = "moe-lab list GROUP tells what each is, with its keys; moe-lab list sweeps the studies"
    return table


def _options(group: presets.Group) -> Any:
    from rich.text import Text

    table = _table("option, its keys", "default", "what it is")
    for preset in group.presets.values():
        chosen = preset.name in group.chosen
        choice = f"{group.name}=[{preset.name}]" if group.many else f"{group.name}={preset.name}"
        table.add_row(_name(choice, chosen), "", Text(preset.about))
        keys = [key for key in preset.keys if not key.path.endswith(".name")]
        for key in keys:
            table.add_row(Text(f"  {key.path}"), Text(key.value, "cyan"), Text(key.about, "dim"))
        table.add_section()
    return table


def _studies() -> Any:
    """Each study with the comment that its file begins with."""
    from rich.text import Text

    from moe_lab.study.files import studies

    table = _table("study", "what it asks")
    for name, path in studies().items():
        if name.isprintable():
            table.add_row(Text(name, "bold"), Text(presets.read(path).about))
    return table


def _traits() -> Any:
    from moe_lab import methods

    table = _table(*methods.COLUMNS)
    for name in methods.names("router"):
        table.add_row(*methods.row(name))
    legend = [f"{name}: {about}" for name, about in methods.COLUMNS.items() if about]
    table.caption = "; ".join([*legend, "all are deterministic in evaluation"])
    return table


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, header_style="dim", caption_justify="left", show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column in ("group", "default"), overflow="fold")
    return table


def _name(name: str, chosen: bool) -> Any:
    from rich.text import Text

    return Text(f"*{name}" if chosen else name, "bold green" if chosen else "bold")


def _print(table: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 140  # a pipe has no width of its own
    console.print(table)
