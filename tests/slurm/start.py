"""`python tests/slurm/start.py COMMAND...`: runs a command beside a Slurm of one node, which ends with it.

The real munged, slurmctld and slurmd (Debian: `apt-get install slurm-wlm munge`), started as root. Keys, configs, logs,
sockets and state stand in one temporary folder, which goes at the end; nothing below /etc is read or written. Slurm's
programs find it by SLURM_CONF. Each daemon listens where its host's name leads, which would be anywhere: they run in a
UTS namespace whose name is `localhost`. A job sees that name too, so that its host is another one than the command's,
as on a cluster. Slurm's accounting needs a database; `sacct`, which submitit asks what became of a job, is a script
here that asks squeue.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
CPUS = 2  # jobs at a time, if each takes one
CONF = """
ClusterName=moe-lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=5
NodeName=localhost CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
SACCT = """#!/bin/sh
echo 'JobID|State|NodeList'
exec squeue --states=all --array --noheader --format='%i|%T|%N'
"""


def lacks() -> str | None:
    """Why there can be no Slurm here."""
    if missing := [name for name in NEEDED if not shutil.which(name, path=_path())]:
        return f"{missing[0]} is not installed (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "Slurm's daemons need root"


@contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """The environment for commands that are to find it, as long as it runs."""
    with tempfile.TemporaryDirectory(prefix="moe-lab-slurm-") as name, ExitStack() as running:
        folder = Path(name)
        folder.chmod(0o755)  # munged wants its socket where everybody may come
        env = os.environ | _write(folder)
        for daemon in _daemons(folder):
            running.enter_context(_running(daemon, folder))
        _wait(lambda: "idle" in _says(["sinfo", "--noheader", "--format=%T"], env), folder)
        try:
            yield env
        finally:  # the daemons would leave the jobs behind
            subprocess.run(["scancel", "--user=root"], env=env, check=False)
            _wait(lambda: not _says(["squeue", "--noheader"], env), folder)


def _write(folder: Path) -> dict[str, str]:
    """Everything that the daemons read; what an environment needs to find them."""
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    controller, node = _free_ports(2)
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, controller=controller, node=node, cpus=CPUS))
    (folder / "bin/sacct").write_text(SACCT)
    (folder / "bin/sacct").chmod(0o755)
    return {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{folder}/bin:{_path()}"}


def _daemons(folder: Path) -> list[list[str]]:
    """The three command lines, each of which stays in the foreground."""
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
    munge = [f"--{option}={folder}/munge.{name}" for option, name in files.items()]
    here = ["unshare", "--uts", "sh", "-c", 'hostname localhost; exec "$@"', "sh"]
    conf = ["-D", "-f", f"{folder}/slurm.conf"]
    return [
        ["munged", "--foreground", *munge, f"--log-file={folder}/munged.log"],
        [*here, "slurmctld", *conf],
        [*here, "slurmd", *conf, "-N", "localhost"],
    ]


@contextmanager
def _running(words: list[str], folder: Path) -> Iterator[None]:
    with (folder / "daemons.log").open("a") as log:
        daemon = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | {"PATH": _path()}, cwd=folder)
        try:
            yield
        finally:
            daemon.terminate()
            daemon.wait(30)


def _wait(what: Callable[[], object], folder: Path) -> None:
    until = time.monotonic() + 30
    while not what():
        if time.monotonic() > until:
            raise TimeoutError((folder / "daemons.log").read_text()[-3000:])
        time.sleep(0.1)


def _says(words: list[str], env: Mapping[str, str]) -> str:
    return subprocess.run(words, env=env, capture_output=True, text=True, check=False).stdout


def _free_ports(many: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(many)]
        return [one.getsockname()[1] for one in sockets]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin"


if __name__ == "__main__":
    if why := lacks():
        sys.exit(f"start.py: {why}")
    with slurm() as found:
        sys.exit(subprocess.run(sys.argv[1:], env=found, check=False).returncode)
