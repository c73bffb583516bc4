"""`moe-lab watch DIR`: a sweep's jobs, live; it reads and changes nothing."""

import time
from pathlib import Path

from moe_lab.cli import arguments, complain, printable, quiet_pipe
from moe_lab.reading import Damaged

EVERY = 1.0  # seconds between looks
PAUSE = 5  # looks in a row at which no job runs, before it is over: a driver starts the next one within them


def main(argv: list[str]) -> int:
    parser = arguments("watch", "A sweep's jobs, live, until none is running. It changes nothing.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a sweep's folder")
    asked = parser.parse_args(argv)
    quiet_pipe()
    try:
        from moe_lab.study.folder import read

        _watch(read(asked.folder))
    except ValueError as error:
        return complain([str(error)], 4 if isinstance(error, Damaged) else 2)
    except KeyboardInterrupt:
        pass
    return 0


def _watch(sweep) -> None:
    import rich
    from rich.live import Live

    from moe_lab.slurm import submitted
    from moe_lab.study.folder import read
    from moe_lab.study.show import Pace, View, counts, screen

    console, view = rich.get_console(), View(sweep)
    seen = view.look()
    pace, told, quiet = Pace(seen), "", 0
    with Live(console=console, auto_refresh=False) if console.is_interactive else Plain() as live:
        while True:
            todo = {one.job.dir for one in seen if one.state in ("running", "waiting", "preempted")}
            live.update(screen(view.sweep, seen, pace.left(seen, todo)), refresh=True)
            if not console.is_interactive and (now := counts(seen)) != told:
                told = now
                print(printable(f"{sweep.name}: {told}"), flush=True)
            busy = any(one.state == "running" for one in seen) or submitted(sweep.folder)
            quiet = 0 if busy else quiet + 1
            if quiet >= PAUSE or all(one.state == "completed" for one in seen):
                return
            time.sleep(EVERY)
            view.sweep = read(sweep.folder)  # it may have been asked for more
            seen = view.look()


class Plain:
    """No terminal: nothing is drawn over."""

    def __enter__(self) -> "Plain":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, renderable: object, refresh: bool) -> None:
        pass
