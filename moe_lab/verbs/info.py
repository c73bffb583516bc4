"""`moe-lab info`: what a bug report needs to say about a machine. Holds no secrets."""

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from moe_lab import __version__, presets
from moe_lab.cli import arguments, printable, quiet_pipe
from moe_lab.secrecy import hide

PACKAGES = ("torch", "hydra-core", "omegaconf", "pydantic", "numpy", "safetensors", "rich", "wandb", "datasets")
EXTRAS = (
    "tokenizers",
    "transformers",
    "pyarrow",
    "hydra-joblib-launcher",
    "hydra-submitit-launcher",
    "hydra-ray-launcher",
)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def main(argv: list[str]) -> int:
    arguments("info", "Versions, devices and paths, for a bug report.").parse_args(argv)
    quiet_pipe()
    for name, value in facts().items():
        print(f"{name:<14} {printable(hide(str(value)))}")
    return 0


def facts() -> dict[str, Any]:
    """Name and value, both for people."""
    import torch

    from moe_lab.assemble import cache_folder
    from moe_lab.run import git_state
    from moe_lab.sinks.wandb import resolve_mode

    git = git_state(Path(__file__).parent)
    own = presets.own_dir()
    return {
        "moe-lab": __version__ + (f" at {git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else ""),
        "python": f"{platform.python_version()} ({_short(Path(sys.executable))})",
        "platform": platform.platform(),
        "packages": ", ".join(f"{name} {_version(name) or 'missing'}" for name in PACKAGES),
        "extras": ", ".join(f"{name} {v}" for name in EXTRAS if (v := _version(name))) or "none",
        "cpu": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": f"{torch.get_num_threads()}" + "".join(f", {k}={os.environ[k]}" for k in THREADS if k in os.environ),
        "cuda": _cuda(torch),
        "configs": _short(presets.conf_dir()) + (f", {_short(own)}" if own else ""),
        "plugins": os.environ.get("MOE_LAB_PLUGINS") or "none",
        "token cache": _short(cache_folder()),
        "outputs": _short(Path("outputs").absolute()),
        "W&B": f"{resolve_mode('auto')} (wandb.mode=auto)",
    }


def _cuda(torch: Any) -> str:
    if not torch.cuda.is_available():
        return f"none (torch is built for {torch.version.cuda or 'CPU only'})"
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: " + ", ".join(f"{p.name} {p.total_memory / 2**30:.0f} GiB" for p in found)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _short(path: Path) -> str:
    """A path with the home folder as ~."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
