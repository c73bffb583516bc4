"""`moe-lab status DIR`: the jobs of a sweep, of a folder of runs, or of one run, and what became of each."""

from pathlib import Path

from moe_lab.cli import arguments, complain, printable, quiet_pipe
from moe_lab.reading import FOREIGN, Damaged


def main(argv: list[str]) -> int:
    parser = arguments("status", "The jobs of a sweep, and what became of each.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a sweep's folder, a folder of runs, or a run")
    parser.add_argument("--all", action="store_true", help="every job, however many there are")
    asked = parser.parse_args(argv)
    quiet_pipe()
    try:
        from moe_lab.study.results import load

        results = load(asked.folder)
        for note in results.notes:
            print(printable(note))
        _print(results.sweep, asked.all)
    except ValueError as error:
        return complain([str(error)], 4 if isinstance(error, Damaged) else 2)
    except FOREIGN as error:
        return complain([f"{asked.folder}: is not what a sweep writes ({type(error).__name__})"], 4)
    return 0


def _print(sweep, every: bool) -> None:
    import rich

    from moe_lab.study.show import View, screen

    rich.print(screen(sweep, View(sweep).look(), every=every))
