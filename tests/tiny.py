"""A run small enough for a test: composed by Hydra from conf/ as a user's would be."""

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from moe_lab.config import check
from moe_lab.loop import Loop
from moe_lab.observe.recorder import Recorder
from moe_lab.parts import Parts

CONF = str(Path(__file__).parents[1] / "conf")
TINY = [
    "dataset=clusters",
    "logger=[]",
    "model.dim=32",
    "model.heads=2",
    "model.layers=2",
    "experts.num=4",
    "experts.width=32",
    "batch_size=4",
    "seq_len=32",
    "steps=40",
    "log_every=10",
    "eval_every=20",
    "eval_tokens=512",
    "checkpoint.every=1000",
]


def tiny(*overrides: str) -> dict[str, Any]:
    """A checked, plain config."""
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = OmegaConf.to_container(compose("train", overrides=[*TINY, *overrides]), resolve=True)
    assert isinstance(cfg, dict)
    plain = {str(key): value for key, value in cfg.items()}
    assert check(plain) == []
    return plain


def loop(parts: Parts) -> Loop:
    """The training loop of a run's parts."""
    vocabulary = parts.data.vocab_size + parts.objective.extra_tokens
    moes, domains = parts.model.moes, len(parts.data.domains)
    return Loop(parts, Recorder(moes, vocabulary, domains, parts.settings.seq_len, parts.device))
