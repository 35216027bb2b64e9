"""Two processes compute what one does, die together, save together and go on bit for bit."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from elara import checkpoint, launch
from elara.errors import EXIT_SAVED, ElaraError
from elara.runs import Run
from tests.conftest import PYTHON, alive, descendants, make_text
from tests.forks import Done

pytestmark = pytest.mark.slow

# At first AdamW takes little more than the sign of a gradient: a large eps keeps float noise from growing
ADAMW = ["optimizer=adamw", "optimizer.lr=3e-3", "optimizer.eps=1e-4"]
QUIET = ["~callbacks.samples", "~callbacks.acceptance"]
DDP = ["trainer=ddp_cpu", "data.batch_size=2"]
FSDP = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=2"]
SHAPES = {
    "default": ADAMW,
    "random masks and accumulation": [*ADAMW, "tidar=block_diffusion", "trainer.accumulate_grad_batches=2"],
    "whole stack twice, recomputed": [*ADAMW, "trm=depth2_stack", "trm.checkpoint=true"],
    "padded windows": [*ADAMW, "data.cross_documents=false", "data.path=documents"],
    "padded windows and accumulation": [
        *ADAMW, "data.cross_documents=false", "data.path=documents", "trainer.accumulate_grad_batches=2",
        "moe.balance_loss=0.01", "moe.z_loss=0.01",
    ],
    "muon": ["optimizer=muon", "optimizer.eps=1e-4", "optimizer.dtype=float32"],
}


def together(home, *overrides: str) -> Done:
    """Two ranks as the tasks of a SLURM step, which are forked both; what the first one said."""
    port = str(launch.free_port())
    slurm = {
        "SLURM_JOB_ID": port, "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "elara", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    tasks = [home.start(*overrides, **slurm, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(2)]
    try:
        said = [task.communicate(timeout=200) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], said
    return Done(0, *said[0])


def losses(home, name: str, *overrides: str, ranks: int = 1) -> list[list[float]]:
    """Every loss and gradient norm of a finished run, by step."""
    options = home.tiny(f"name={name}", "model.dropout=0", *QUIET, *overrides)
    done = home.call(*options) if ranks == 1 else together(home, *options)
    assert done.returncode == 0, done.stderr
    rows = home.rows(home.only_run(name))
    columns = [c for c in rows[0] if "loss" in c or c == "train/grad_norm" or c.endswith("/max_vio")]
    return [[float(row[column] or "nan") for column in columns] for row in rows]


def agree(one: list[list[float]], other: list[list[float]]) -> bool:
    return torch.allclose(torch.tensor(one), torch.tensor(other), rtol=2e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_compute_what_one_process_does(home, shape: str) -> None:
    names = [f"{kind}-{list(SHAPES).index(shape)}" for kind in ("one", "ddp", "fsdp")]
    (home.path / "documents").mkdir(exist_ok=True)
    for i in range(60):  # of lengths that leave some windows nearly empty
        (home.path / "documents" / f"{i}.txt").write_text(make_text(20 + 37 * i % 190, i), "utf-8")
    steps = "trainer.max_steps=30"
    one = losses(home, names[0], "data.batch_size=4", steps, *SHAPES[shape])
    assert len(one) == 30
    assert agree(one, losses(home, names[1], *DDP, steps, *SHAPES[shape], ranks=2))
    assert agree(one, losses(home, names[2], *FSDP, steps, *SHAPES[shape], ranks=2))
    loaded = [checkpoint.load(Run(home.only_run(name)).last) for name in names]
    for other in loaded[1:]:  # the shards are read back whole
        for name, value in loaded[0].model.state_dict().items():
            assert torch.allclose(value, other.model.state_dict()[name], rtol=1e-3, atol=1e-5), name


def test_shards_sample_quantize_and_begin_new_runs(home) -> None:
    greedy = ["callbacks.samples.temperature=0", "model.dropout=0", "trainer.max_steps=16", "optimizer.lr=3e-3"]
    together(home, *home.tiny("name=sharded", *FSDP, "optimizer=adamw", *greedy))
    done = home.call(*home.tiny("name=unsharded", "data.batch_size=4", "optimizer=adamw", *greedy))
    assert done.returncode == 0, done.stderr
    run, one = Run(home.only_run("sharded")), Run(home.only_run("unsharded"))
    assert run.samples.read_text("utf-8") == one.samples.read_text("utf-8")
    drafts = [row["val/tokens_per_forward"] for row in home.rows(run.path)]
    assert drafts == [row["val/tokens_per_forward"] for row in home.rows(one.path)] and drafts[-1]
    assert (run.last / "shards").is_dir() and not (run.last / "model.safetensors").exists()
    whole = checkpoint.load(run.last).model.state_dict()
    narrow = checkpoint.load(run.last, precision="bfloat16").model.state_dict()
    assert torch.equal(narrow["norm.weight"], whole["norm.weight"].bfloat16())
    sampled = home.run("checkpoint=sharded", "prompt=the", "max_new_tokens=4", module="elara.sample")
    assert sampled.returncode == 0 and sampled.stdout.startswith("the")
    still = ["trainer.max_steps=1", "optimizer.lr=0", "optimizer.adam_lr=0"]
    done = home.call(*home.tiny("name=from-shards", f"init_from={run.path}", *still))
    assert done.returncode == 0, done.stderr
    child = checkpoint.load(Run(home.only_run("from-shards")).last).model.state_dict()
    assert all(torch.equal(child[name], whole[name]) for name in whole if "selection_bias" not in name)
    shard = next((run.last / "shards").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(ElaraError, match="is damaged: its checksum differs"):
        checkpoint.load(run.last)


@pytest.fixture(scope="session")
def sharded_run(session_home) -> Path:
    """An uninterrupted sharded run of 24 steps, saved at 8, 16 and 24."""
    together(session_home, "name=sharded-whole", *session_home.tiny(*FSDP, *QUIET))
    return session_home.only_run("sharded-whole")


def unfinished_copy(of: Path, name: str) -> Run:
    """The run again under another name, as if it had been ended just before its last words."""
    run = Run(of.parent.parent / name / of.name)
    shutil.copytree(of, run.path, symlinks=True)
    run.summary.write_text(json.dumps({**run.read_summary(), "finished": False}), "utf-8")
    return run


@pytest.mark.thorough(1, "long")
@pytest.mark.parametrize("part", ["shards", "optimizer"])
def test_damaged_shards_give_way_on_every_rank_to_the_checkpoint_before(home, sharded_run: Path, part: str) -> None:
    run = unfinished_copy(sharded_run, f"damaged-{part}")
    file = next((run.last / part).glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, which no reader of the format would notice
    file.write_bytes(content)
    done = home.run("resume=auto", f"name=damaged-{part}")
    assert done.returncode == 0, done.stderr
    assert "is damaged: its checksum differs" in done.stdout and "going back to step-16" in done.stdout
    assert home.rows(run.path) == home.rows(sharded_run)


def test_a_sharded_run_goes_on_with_a_sharded_trainer_only(home, sharded_run: Path) -> None:
    run = unfinished_copy(sharded_run, "sharded-alone")
    refused = home.run(f"resume={run.path}", "trainer=cpu", "trainer.devices=1", "data.batch_size=4")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "resume with that, or start anew with init_from" in refused.stderr


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_killed_rank_ends_the_run_with_one_line_and_resume_is_exact(home, kind: str) -> None:
    optimizer = "optimizer=adamw" if kind == "fsdp" else "optimizer=muon"
    options = home.tiny(*(DDP if kind == "ddp" else FSDP), optimizer, "model.dropout=0.1")
    together(home, f"name=whole-{kind}", *options)
    process = home.start(f"name=killed-{kind}", *options)
    run = home.wait_for(process, 13, f"killed-{kind}")
    ranks = descendants(process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert process.returncode == 1 and not any(alive(rank) for rank in ranks)
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"error: rank 1 (process {ranks[1]}) was killed by SIGKILL")
    assert last.endswith(f"{PYTHON} -m elara.train resume={run}") and errors.count("error: ") == 1
    done = home.run("resume=auto", f"name=killed-{kind}")
    assert done.returncode == 0 and "going on at step 8 in" in done.stdout
    whole = home.only_run(f"whole-{kind}")
    assert home.rows(run) == home.rows(whole)
    a, b = (checkpoint.load(Run(path).last).model.state_dict() for path in (run, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.thorough(1, "long")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_lets_all_ranks_save_and_exit_so_that_a_scheduler_can_requeue(home, number: signal.Signals) -> None:
    name = f"asked-{number.name}"
    process = home.start(f"name={name}", *home.tiny(*DDP, "trainer.max_steps=100000", *QUIET))
    run = Run(home.wait_for(process, 3, name))
    ranks = descendants(process.pid)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_SAVED and not any(alive(rank) for rank in ranks)
    step = checkpoint.read_meta(run.last)["step"]
    assert errors.strip().splitlines()[-1].startswith(f"interrupted at step {step}, saved; go on with:")
    if number == signal.SIGTERM:
        done = home.run("resume=auto", f"name={name}", f"trainer.max_steps={step + 1}")
        assert done.returncode == 0 and f"going on at step {step} in" in done.stdout


def test_ranks_save_and_end_when_the_process_that_started_them_is_killed(home) -> None:
    process = home.start("name=orphans", *home.tiny(*DDP, "trainer.max_steps=100000", *QUIET))
    run = Run(home.wait_for(process, 3, "orphans"))
    ranks = descendants(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(alive(rank) for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(rank) for rank in ranks)
    assert checkpoint.read_meta(run.last)["step"] > 3


def test_ranks_save_together_by_the_first_ones_clock_and_end_together_when_the_time_is_up(home) -> None:
    often = ["callbacks.checkpoint.every_minutes=1e-4", "callbacks.checkpoint.keep=1000"]
    endless = home.tiny("name=ddp-clock", *DDP, *QUIET, "trainer.max_steps=100000", "trainer.val_check_interval=100000")
    done = home.run(*endless, *often, "trainer.max_time={seconds: 3}", "trainer.accumulate_grad_batches=2")
    assert done.returncode == 0, done.stderr
    run = Run(home.only_run("ddp-clock"))
    last, *saved = (checkpoint.read_meta(path)["step"] for path in run.checkpoints())
    assert saved and not run.finished and f"stopped at step {last} of 100000" in done.stdout
    done = home.run(f"resume={run.path}", "trainer.max_time=null", f"trainer.max_steps={last + 2}")
    assert done.returncode == 0 and f"going on at step {last} in" in done.stdout, done.stderr


def test_gradients_are_reduced_once_per_optimizer_step(home) -> None:
    profiled = ["profiler=torch", "profiler.wait=3", "profiler.steps=4", "trainer.accumulate_grad_batches=4"]
    together(home, "name=reduced", *home.tiny(*DDP, *QUIET, *profiled, "trainer.max_steps=8"))
    with open(home.only_run("reduced") / "profile" / "table.csv", encoding="utf-8", newline="") as file:
        calls = [float(row["calls_per_step"]) for row in csv.DictReader(file) if row["operator"] == "c10d::allreduce_"]
    assert 2 <= sum(calls) < 4  # one bucket of gradients, the loads, and what is logged


def test_an_error_of_all_ranks_is_said_once(home) -> None:
    done = home.run("name=broken", *home.tiny(*DDP, "optimizer.momentum=many"))
    assert done.returncode == 1
    assert done.stderr == "error: optimizer.momentum=many must be a number\n"


def test_torchruns_ranks_share_one_folder_and_decide_how_many_there_are(home) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "elara.train"]
    same = ["data.batch_size=2", "model.dropout=0", *ADAMW, *QUIET]
    options = home.tiny("name=torchrun", "trainer=ddp_cpu", "trainer.devices=1", *same)
    done = subprocess.run(
        [*launcher, *options], cwd=home.path, env=home.env(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    run = Run(home.only_run("torchrun"))
    assert run.read_summary()["world_size"] == 2
    assert losses(home, "torchrun-one", "data.batch_size=4", *ADAMW)[-1][0] == pytest.approx(
        float(home.rows(run.path)[-1]["train/loss"]), rel=1e-4
    )


def test_slurms_tasks_share_one_folder(home) -> None:
    together(home, *home.tiny("name=slurm", "trainer=ddp_cpu", "data.batch_size=2", "trainer.max_steps=4", *QUIET))
    run = home.only_run("slurm")
    assert re.fullmatch(r"slurm-\d+\.0", run.name) and Run(run).read_summary()["world_size"] == 2


def test_a_run_goes_on_in_the_text_on_another_number_of_processes(home) -> None:
    """One, two, one again: the windows that were read add up, at whatever batches they came in."""
    name = "one-two-one"
    steps = [*home.tiny(f"name={name}", *QUIET), "trainer.max_steps=4", "data.batch_size=3"]
    assert home.run(*steps).returncode == 0
    run = Run(home.only_run(name))
    read = [checkpoint.read_meta(run.last)["read"][0]["windows"]]
    two = ["trainer=ddp_cpu", "trainer.precision=32-true", "data.batch_size=2", "trainer.max_steps=7"]
    for changes in (two, ["trainer.devices=1", "data.batch_size=5", "trainer.max_steps=9"]):
        done = home.run(f"resume={run.path}", *changes)
        assert done.returncode == 0, done.stderr
        read.append(checkpoint.read_meta(run.last)["read"][0]["windows"])
    assert read == [4 * 3, 12 + 3 * 2 * 2, 24 + 2 * 5]
