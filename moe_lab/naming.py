"""Names of run directories: pure, short and safe, whatever stands in the overrides."""

import os
import re
import secrets
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from moe_lab.run import NOT_NUMBERS, config_hash
from moe_lab.secrecy import secret_name
from moe_lab.settings import quick


def slug(router: str, overrides: Iterable[str]) -> str:
    """`[a-z0-9._-]{1,40}`: the router, then what was overridden. For people: not all may fit."""
    found = _clean(router)[:40]
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key == "router" or "/" in value or (key.split(".")[0] in NOT_NUMBERS and key != "fast"):
            continue
        name = key.split("@")[0].rsplit(".", 1)[-1]
        plain_value = re.fullmatch(r"[\d.e+-]+|true|false|null", value, re.IGNORECASE)  # sweeps write True
        word = _clean(f"{name}_{value}" if "." in key or plain_value else value)
        if word and len(found) + 1 + len(word) <= 40:
            found = f"{found}-{word}"
    return found


def _clean(word: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "_", word.lower()).strip("_.-")


def run_name(router: str, overrides: Iterable[str]) -> str:
    """`<date>/<time>-<slug>-<id>`; the id is random, so that runs started in the same second differ."""
    return f"{datetime.now():%Y-%m-%d/%H-%M-%S}-{slug(router, overrides)}-{secrets.token_hex(3)}"


def job_name(cfg: Mapping[str, Any], overrides: Iterable[str], there: Mapping[str, str]) -> str:
    """`<config hash>-<slug>`; a job that was spelled differently the first time keeps its first name."""
    key = config_hash(quick(dict(cfg)) if cfg["fast"] else cfg)
    return there.get(key) or f"{key}-{slug(str(cfg['router']['name']), overrides)}"


def job_names(sweep_dir: Path) -> dict[str, str]:
    """The jobs that a sweep's folder has, by config hash."""
    names = sorted(os.listdir(sweep_dir), reverse=True) if sweep_dir.is_dir() else []
    return {name.partition("-")[0]: name for name in names}


def register_resolvers() -> None:
    """The resolvers that conf/train.yaml names run directories with."""
    import omegaconf
    from omegaconf import DictConfig, OmegaConf

    def run_name_of(router: str, overrides: Iterable[str]) -> str:
        return run_name(str(router), [str(override) for override in overrides])

    def job_name_of(overrides: Iterable[str], _root_: DictConfig) -> str:
        there = job_names(Path(str(_root_.hydra.sweep.dir)))
        return job_name(plain(_root_), [str(override) for override in overrides], there)

    new_name = not omegaconf.__version__.startswith("2.3.")  # 2.3 has another function under the name of 2.4
    register: Any = OmegaConf.register_resolver if new_name else OmegaConf.register_new_resolver
    register("oc.env", _environment, replace=True)
    # Cached: a random id must be drawn once per config. The other is a function of the config and cannot be.
    register("moe_lab.run_name", run_name_of, use_cache=True, replace=True)
    register("moe_lab.job_name", job_name_of, replace=True)


def _environment(name: str, *default: Any) -> Any:
    """oc.env, but for secrets: configs are written down with every run."""
    if secret_name(name):
        raise ValueError(f"${{oc.env:{name}}} would write a secret into the run's config")
    if name not in os.environ and not default:
        raise ValueError(f"the environment variable {name} is not set")
    return os.environ.get(name, *default)


def plain(cfg: Any) -> dict[str, Any]:
    """A composed config as resolved dicts and lists, without its `hydra` part. Errors are OmegaConf's."""
    from omegaconf import OmegaConf

    job = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    resolved = OmegaConf.to_container(job, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}
