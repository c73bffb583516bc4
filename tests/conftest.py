"""Every test runs on one thread, with a cache of its own, and sends nothing anywhere."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
os.environ["WANDB_MODE"] = "offline"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["MOE_LAB_CACHE"] = str(tmp_path_factory.mktemp("cache"))
