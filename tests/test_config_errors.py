"""Every kind of config mistake: a clear line each, exit code 2, nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lab import config
from tests.command import moe_lab, tree

OWN = {
    "router/broken.yaml": "name: topk\nk: [1\n",
    "router/twice.yaml": "name: topk\nk: 1\nk: 2\n",
    "router/code.yaml": 'name: !!python/object/apply:os.system ["touch pwned"]\n',
    "router/lost.yaml": "name: topk\nk: ${nope.there}\nrenormalise: true\n",
    "router/circle.yaml": "name: topk\nk: ${router.k}\nrenormalise: true\n",
    "router/unset.yaml": "name: topk\nk: ???\nrenormalise: true\n",
    "router/resolver.yaml": "name: topk\nk: ${surprise:1}\nrenormalise: true\n",
    "router/list.yaml": "- topk\n",
    "router/stranger.yaml": "name: my_router\n",
    "router/extra.yaml": "name: topk\nk: 1\nrenormalise: true\nheat: 3\n",
    "hydra/job_logging/factory.yaml": "version: 1\nroot: {}\nhandlers:\n  x:\n    (): os.system\n",
    "router/target.yaml": "_target_: os.system\nname: topk\nk: 1\nrenormalise: true\n",
}

# The words after `moe-lab train`, and what must stand in one line of the answer.
MISTAKES = {
    # names
    "routr=topk": ["routr: no such key or group; did you mean router?"],
    "router=gumble": ["router=gumble: no such option; did you mean gumbel_ste?"],
    "router.kk=2": ["router.kk: no such key or group; did you mean router.k?"],
    "modle.dim=64": ["did you mean model.dim?"],
    "dim=64": ["dim: no such key or group; did you mean model.dim?"],
    "experts.k=2": ["experts.k: no such key or group; did you mean router.k?"],
    "logger=none": ["logger=none: no such option; write logger=[] for none"],
    "device=gpu": ["device=gpu: must be auto | cpu | cuda; did you mean cuda?"],
    "+foo=1": ["foo: no such key"],
    "+stepz=1": ["stepz: no such key; did you mean steps?"],
    "+routr=topk": ["routr: no such key; did you mean router?"],
    "+router.kk=2": ["router.kk: no such key; did you mean router.k?"],
    "++router.kk=2": ["router.kk: no such key; did you mean router.k?"],
    "router.name=topkk": ["router.name=topkk: no such router; did you mean topk?"],
    "explore=[gumbel] explore.gumbel.strength.kind=x": ["explore.gumbel.strength"],
    "router=gumbel_ste router.renormalise=true": ["it belongs to", "router=sigmoid_topk |", "| router=topk"],
    "dataset.paths=[x]": ["dataset.paths: not a key of what is chosen here; it belongs to dataset=text"],
    "balance=[swich]": ["balance=swich: no such option; did you mean switch?"],
    "balance=nope": ["there are: entropy, erc, gshard"],
    "~routr": ["did you mean router?"],
    "~router": ["router: nothing chosen; try router="],
    "hydra.swep.dir=x": ["did you mean hydra.sweep.dir?"],
    "hydra/launcher=nope": ["hydra/launcher=nope: not installed"],
    # types and ranges
    "steps=abc": ["steps=abc: must be a whole number"],
    "steps=1.5": ["steps=1.5: must be a whole number"],
    "steps=null": ["steps=null: must be a whole number"],
    "steps=0": ["steps=0: must be at least 1"],
    "steps=true": ["steps=true: must be a whole number, this is true or false"],
    "steps='5'": ["steps", "whole number", "text"],
    "steps=1000000000000000000000000000000": ["steps=", "must be below 9223372036854775808"],
    "model.dim=9223372036854775808": ["model.dim=", "must be below"],
    "experts.capacity_factor=0": ["experts.capacity_factor=0", "above 0"],
    "schedule.temperature=-1": ["schedule.temperature=-1: must be at least 0"],
    "router.name=3": ["router.name=3: no such router"],
    "dataset=clusters dataset.tokens=64": ["dataset.tokens=64: fewer than one block of seq_len+1 = 129"],
    "seed=-1": ["seed=-1: must be at least 0"],
    "seed=18446744073709551616": ["must be below 9223372036854775808"],
    "optim.lr=nan": ["optim.lr=nan: must be a finite number"],
    "optim.lr=inf": ["optim.lr=inf: must be a finite number"],
    "optim.lr=fast": ["optim.lr=fast: must be a number"],
    "router.k=[1,2]": ["router.k=[1,2]: must be a whole number"],
    "router.k={a:1}": ["router.k={a: 1}: must be a whole number"],
    "experts.num=0": ["experts.num=0: must be at least 1"],
    "experts.width=wide": ["experts.width=wide: must be a whole number"],
    "compile=maybe": ["compile=maybe: must be true or false"],
    "device=tpu": ["device=tpu: must be auto | cpu | cuda"],
    "dtype=bfloat": ["must be auto | float32 | bfloat16; did you mean bfloat16?"],
    "sweep.name=../../x": ["sweep.name=../../x: must match"],
    "checkpoint.every=0": ["checkpoint.every=0: must be at least 1"],
    "checkpoint.kep=1": ["checkpoint.kep: no such key or group; did you mean checkpoint.keep?"],
    "schedule.temperature=0": ["schedule.temperature=0: must stay above 0"],
    "schedule.noise.curve=spline": ["must be constant | linear | cosine | exponential | step"],
    "dataset=text dataset.paths=my.txt": ["dataset.paths=my.txt: must be a list"],
    "wandb.tags=one": ["wandb.tags=one: must be a list, e.g. [a,b]"],
    "balance={switch:1}": ["balance.switch=1: must be a mapping of keys"],
    # combinations
    "router.k=99": ["router.k=99", "experts.num"],
    "balance=[load]": ["balance.load", "noise"],
    "explore=[gumbel]": ["explore.gumbel: router=gumbel_ste has gumbel noise of its own"],
    "router=topk explore=[gaussian,gumbel]": ["explore.gumbel: explore.gaussian puts noise on the logits already"],
    "router=topk explore=[expert_dropout,router_dropout]": ["explore.router_dropout: explore.expert_dropout leaves"],
    "explore=[second_expert]": ["explore.second_expert: needs a choice of two (router.k=2), this is one of 1"],
    "router=softmax_ste router.backward=dense router.k=2 explore=[second_expert]": ["router=softmax_ste runs every"],
    "router=reinforce explore=[reroute]": ["explore.reroute: router=reinforce learns from the probability"],
    "router=top_p explore=[reroute]": ["explore.reroute: router=top_p chooses as many experts as it takes"],
    "router=top_p explore=[second_expert]": ["explore.second_expert: router=top_p chooses as many"],
    "router=hash explore=[jitter]": ["explore.jitter: router=hash reads the token's id alone"],
    "router=dense explore=[reroute]": ["explore.reroute: router=dense gives every token to every expert"],
    "router=noisy_topk balance=[load] explore=[reroute]": ["explore.reroute: balance.load knows nothing"],
    "explore=[dropout] explore.dropout.strength=1.5": ["explore.dropout.strength=1.5: a probability must be at most 1"],
    "experts.drop=probability experts.capacity_factor=1": ["experts.drop=probability: looks at later tokens"],
    "experts.drop=random": ["experts.drop=random: must be position | probability"],
    "experts.capacity_factor={curve:linear,start:1,end:0}": ["experts.capacity_factor=", "must stay above 0"],
    "router=noisy_topk balance=[load,loss_free]": ["balance.load", "balance.loss_free"],
    "objective=mlm router=soft_moe experts.capacity_factor=1": ["capacity_factor=1: router=soft_moe gives every"],
    "router=dense experts.capacity_factor=1": ["experts.capacity_factor=1: router=dense runs every expert on every"],
    "router=soft_moe router.causal=blocks router.block=128": ["router.block=128: must be below seq_len=128"],
    "objective=mlm router=expert_choice experts.capacity_factor=1": ["experts.capacity_factor=1", "router.capacity"],
    "objective=mlm router=expert_choice router.capacity=5": ["router.capacity=5", "at most 4"],
    "objective=mlm router=expert_choice router.group=mixed batch_size=2 optim.accumulate=2": [
        *("router.group=mixed", "batch_size=2", "optim.accumulate=2", "at least two"),
    ],
    "objective=mlm router=base router.k=2": ["router.k=2: must be at most 1"],
    "router=noisy_topk balance=[load,quantile]": ["balance.load", "balance.quantile"],
    "balance=[quantile,loss_free]": ["balance=[loss_free,quantile]: both move the same selection bias; take one"],
    "balance=[quantile] router=dense": ["balance.quantile: router=dense makes no choice by scores"],
    "balance=[quantile] router.k=8": ["balance.quantile: nothing to choose with router.k=8 of experts.num=8"],
    "balance=[quantile] router=kmeans": ["balance.quantile: router=kmeans ranks by other values than gates of [0, 1]"],
    "balance=[erc] router=cosine": ["balance.erc: router=cosine has no learned row per expert"],
    "balance=[simbal] router.scoring=mlp": ["balance.simbal: router.scoring=mlp puts a layer between"],

    "balance=[simbal] experts.num=500": ["balance.simbal.orthogonal: 500 rows of model.dim=128"],
    "experts.backend=grouped experts.width=30": ["experts.width=30", "multiples of 8"],
    "experts.backend=grouped experts.width=24 experts.granularity=2": ["experts.width=24 over experts.granularity=2"],
    "experts.granularity=3 experts.width=32": ["experts.granularity=3: must divide experts.width=32"],
    "experts.granularity=16 experts.widths=[16,24]": ["experts.granularity=16: must divide experts.widths=[16,24]"],
    "experts.granularity=2 objective=mlm router=base": ["experts.granularity=2: router=base takes no k=2"],
    "experts.granularity=2 router=sparsemixer router.version=v1": ["experts.granularity=2: router.k=2: router.version"],
    "experts.granularity=2 router=topk explore=[second_expert]": ["needs a choice of two (router.k=2), this is one of"],
    "experts.zero_experts=130 balance=[simbal]": ["balance.simbal.orthogonal: 138 rows of model.dim=128"],
    "experts.widths=[16,24,32]": ["experts.widths=[16,24,32]: experts.num=8 must hold this pattern a whole number"],
    "experts.widths=[]": ["experts.widths=[]"],
    "experts.widths=[16,32] experts.init=upcycled": ["experts.init=upcycled", "experts.widths=[16,32]", "equally wide"],
    "experts.init_noise=0.1": ["experts.init_noise=0.1", "experts.init=upcycled"],
    "experts.zero_experts=-1": ["experts.zero_experts=-1: must be at least 0"],
    "router.k=11 experts.copy_experts=2": ["router.k=11: at most experts.num=8 and 2 without a network can be chosen"],
    "batch_size=3 optim.accumulate=2": ["optim.accumulate=2", "batch_size=3"],
    "dataset=text": ["dataset.paths"],
    # the language
    "router": ["router: not understood; write key=value"],
    "=3": ["=3: not understood; write key=value"],
    "router=[topk": ["router=[topk: cannot be read"],
    "steps==3": ["steps==3: cannot be read"],
    "output_dir=~/runs": ["output_dir=~/runs: ~ is not expanded here; write $HOME"],
    "router=topk,switch": ["router=topk,switch: several values; add -m"],
    "seed=range(3)": ["seed=range(3): several values; add -m"],
    "steps=${nope}": ["steps: Interpolation key 'nope' not found"],
    "sweep.name=${oc.env:NOT_SET_HERE}": ["the environment variable NOT_SET_HERE is not set"],
    "sweep.name=${oc.env:WANDB_API_KEY}": ["would write a secret"],
    "--frobnicate": ["unrecognized arguments: --frobnicate"],
    "--steps=100": ["unrecognized arguments: --steps=100; options have no dashes: steps=100"],
    "--config-dir nowhere": ["nowhere: no such config directory"],
    "--config-name nope": ["--config-name nope: no such file"],
    "-m --cfg job router=switch,topk": ["router=switch,topk: several values", "one job: give a single value"],
    "--cfg job seed=range(3)": ["seed=range(3): several values, but what is shown is one job"],
    "--cfg job seed==3": ["seed==3: cannot be read"],
    "--cfg job routr=1": ["did you mean router?"],
    # files
    "--config-dir own router=broken": ["broken.yaml:", "not valid yaml"],
    "--config-dir own router=twice": ["twice.yaml:3: not valid yaml: found duplicate key k"],
    "--config-dir own router=code": ["code.yaml:1: not valid yaml"],
    "--config-dir own router=lost": ["router.k: Interpolation key 'nope.there' not found"],
    "--config-dir own router=circle": ["router.k: Recursive interpolation"],
    "--config-dir own router=unset": ["router.k: missing (???); give it a value"],
    "--config-dir own router=resolver": ["router.k: Unsupported interpolation type surprise"],
    "--config-dir own router=list": ["router=[topk]: must be a mapping of keys"],
    "--config-dir own router=stranger": ["router.name=my_router: no such router"],
    "--config-dir own router=extra": ["router.heat: no such key"],
    "--config-dir clash": ["clash/router/topk.yaml: moe-lab has a router/topk.yaml of its own"],
    # code
    "--config-dir own router=target": ["router._target_: configs are data here"],
    "+router._target_=os.system": ["router._target_: configs are data here"],
    "router._target_=os.system": ["router._target_: configs are data here"],
    "+a.b.c._target_=os.system": ["a.b.c._target_: configs are data here"],
    "+hydra.callbacks.x._target_=os.system": ["hydra.callbacks.x._target_=os.system: not allowed"],
    "hydra.launcher._target_=os.system": ["hydra.launcher._target_=os.system: not allowed"],
    "-m hydra.sweeper._target_=os.system": ["hydra.sweeper._target_=os.system: not allowed"],
    "hydra.job_logging.handlers.file.class=os.system": ["handlers.file.class=os.system: not allowed"],
    "--config-dir own hydra/job_logging=factory": ["hydra.job_logging.handlers.x.()=os.system: not allowed"],
    "+hydra.job.env_set.LD_PRELOAD=x": ["hydra.job.env_set: not allowed"],
    "--experimental-rerun x.pickle": ["--experimental-rerun"],
    "hydra.run.dir=/etc": ["hydra.run.dir=/etc: is not empty and holds no run"],
    # sweeps, before the first job
    "-m router=topk,gumble": ["router=gumble: no such option; did you mean gumbel_ste?  (job router=gumble)"],
    "-m seed=1,2 steps=5,0": ["steps=0: must be at least 1  (job seed=1 steps=0 and 1 more of 4 jobs)"],
    "-m rooter.k=1,2": ["rooter.k: no such key or group; did you mean router.k?"],
    "-m router=topk,dense router.renormalise=true": ["it belongs to", "router=sigmoid_topk", "router=dense"],
    "-m seed=range(0,3000000) steps=range(1,1000)": ["this sweep has 2,997,000,000 jobs; the limit is 2,000"],
    "-m hydra.run.dir=a,b": ["hydra.run.dir=a,b"],
    "hydra.mode=MULTIRUN seed=1,b": ["seed=b: must be a whole number  (job seed=b)"],
    "resume=": ["resume=: is empty; name a run directory"],
    "resume=nowhere": ["resume=nowhere: no run directory"],
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in OWN.items():
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "clash/router").mkdir(parents=True)
    (tmp_path / "clash/router/topk.yaml").write_text("name: topk\nk: 1\nrenormalise: true\n")
    return tmp_path


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_told_in_a_line_and_nothing_is_written(words: str, here: Path) -> None:
    before = tree(here)
    said = moe_lab("train", *words.split())
    lines = said.err.splitlines()
    assert said.code == 2, said
    assert said.out == ""
    assert len(lines) == 1 and lines[0].startswith("moe-lab: "), said.err
    assert all(part in lines[0] for part in MISTAKES[words]), said.err
    assert tree(here) == before


def test_all_mistakes_are_told_together(here: Path) -> None:
    said = moe_lab("train", "rooter.k=2", "step=3", "router=gumble")
    assert said.code == 2
    assert [line.split(":")[1].strip() for line in said.err.splitlines()] == ["router=gumble", "rooter.k", "step"]
    said = moe_lab("train", "steps=0", "optim.lr=nan", "+model.x=1", "+balance.switch.y=1")
    assert said.code == 2
    assert len(said.err.splitlines()) == 4
    assert not (here / "outputs").exists()


def test_what_only_shows_is_not_held_against_the_schema_but_must_compose(here: Path) -> None:
    assert moe_lab("train", "--cfg", "job", "steps=0").code == 0
    assert moe_lab("train", "--cfg", "job", "router=gumble").code == 2


def test_missing_data_is_found_late_and_leaves_no_folder(here: Path) -> None:
    before = tree(here)
    said = moe_lab("train", "dataset=text", "dataset.paths=[nowhere.txt]", "logger=[]")
    assert (said.code, said.out) == (2, "")
    assert "nowhere.txt" in said.err and len(said.err.splitlines()) == 1
    assert tree(here) == before


@pytest.mark.parametrize("words", ["routr=topk", "steps=0 router.k=99", "-m seed=1,a"])
def test_the_same_from_a_shell(words: str, here: Path) -> None:
    before = tree(here)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "moe_lab", "train", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=env)
    assert done.returncode == 2
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert all(line.startswith("moe-lab: ") for line in done.stderr.splitlines())
    assert tree(here) == before


def test_a_plugin_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config.discover.cache_clear()
    monkeypatch.setenv("MOE_LAB_PLUGINS", "not_a_module")
    assert config.check({}) == ["MOE_LAB_PLUGINS=not_a_module: no such module; is its folder in PYTHONPATH?"]
    config.discover.cache_clear()
