"""`profiler=torch`: what it writes of a real run, and whether it puts every operation where it belongs."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.model import ElaraLM, draw_section
from elara.training import profiling
from elara.training.profiling import ATTENTION, BACKWARD, DATA, EXPERTS, FORWARD, LOSS, MLP_, OPTIMIZER, ROUTER

SIZES = ModelConfig(n_layer=2, n_embd=32, n_head=2, hidden=64, expert_hidden=32, vocab_size=64, context_length=32)


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "table.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_run_leaves_trace_table_and_picture(home, capfd) -> None:
    window = ["profiler=torch", "profiler.wait=3", "profiler.steps=4"]
    done = home.call(*home.tiny("name=profiled", *window, "trainer.max_steps=12", "trainer.val_check_interval=12"))
    assert (done.returncode, done.stderr, capfd.readouterr().err) == (0, "", "")
    folder = home.only_run("profiled") / "profile"
    assert f"profile of the step: {folder}/table.txt" in done.stdout
    with gzip.open(folder / "trace.json.gz") as file:
        names = Counter(event.get("name") for event in json.load(file)["traceEvents"])
    assert names["attention | blocks.1.attention"] == 4 * 2  # steps times passes
    assert names["MoE router | blocks.1.mlp.router"] == 4 * 2
    assert names["Lightning, callbacks | [Callback]Metrics.on_train_batch_end"] == 4
    shares: dict[str, float] = defaultdict(float)
    for row in rows(folder):
        shares[row["part"]] += float(row["share"])
    assert sum(shares.values()) == pytest.approx(1, abs=1e-2)  # rounded to five digits each
    assert set(shares) == set(profiling.PARTS) and min(shares.values()) > 0
    text = (folder / "table.txt").read_text("utf-8")
    assert text.startswith("Steps 4-7 on ") and "attention" in text and "aten::" in text
    assert (folder / "parts.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_validation_ends_the_window_and_a_short_run_has_none(home) -> None:
    options = ["profiler=torch", "profiler.wait=2", "trainer.max_steps=6", "trainer.val_check_interval=5"]
    assert home.call(*home.tiny("name=cut", *options)).returncode == 0
    text = (home.only_run("cut") / "profile" / "table.txt").read_text("utf-8")
    assert text.startswith("Steps 3-5 on ")
    done = home.call(*home.tiny("name=short", "profiler=torch", "trainer.max_steps=4"))
    assert "no profile: the run ended within profiler.wait=20 steps" in done.stdout
    assert not (home.only_run("short") / "profile").exists()


def test_an_impossible_window_is_refused_in_one_line(home) -> None:
    done = home.call(*home.tiny("name=refused", "profiler=torch", "profiler.wait=1"))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "profiler.wait=1 and profiler.steps=10 must be at least 2 and 1" in done.stderr


def profiled(config: ElaraConfig, steps: int = 2) -> list[profiling.Row]:
    """Rows of forward and backward passes of a model, with a loss of one product."""
    model = ElaraLM(config)
    tokens = torch.randint(64, (2, 24))
    section = None
    if config.tidar.block_length:
        section, _ = draw_section(tokens, config.tidar, 63, torch.Generator().manual_seed(0))
    with profiling.attach(model), profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            with record_function(LOSS + profiling.SIGN + "step"):
                hidden = model(tokens, section=section).hidden
                loss = hidden.flatten(0, 1).mm(torch.ones(32, 3)).square().sum()
            with record_function(profiling.AUTOGRAD + profiling.SIGN + "backward"):
                loss.backward()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all("weights" not in vars(module) for module in model.modules())
    return profiling.rows_of(found.events(), steps, 1.0)


def products(found: list[profiling.Row]) -> dict[tuple[str, str], float]:
    """Matrix products per step of every part, forward and backward."""
    counts: dict[tuple[str, str], float] = defaultdict(float)
    for row in found:
        if row.operator in ("aten::mm", "aten::addmm"):
            counts[row.part, row.phase] += row.calls
    return counts


@pytest.mark.slow
def test_backward_operations_belong_where_their_forward_operation_does() -> None:
    config = ElaraConfig(SIZES, MoEConfig(num_experts=4), TRMConfig(depth=3), TiDARConfig(block_length=4))
    counts = products(profiled(config))
    assert counts[MLP_, FORWARD] == 3 * 2 and counts[MLP_, BACKWARD] == 3 * 4  # gate_up, down; of input and weight
    assert counts[ATTENTION, FORWARD] == 2 * 3 * 2 and counts[ATTENTION, BACKWARD] == 2 * 3 * 4  # qkv, out
    assert counts[EXPERTS, FORWARD] == 3 * 2 * (4 + 1)  # four experts and the shared one
    assert counts[EXPERTS, BACKWARD] == 3 * 4 * (4 + 1)
    assert counts[ROUTER, FORWARD] == 3 and counts[ROUTER, BACKWARD] == 3 * 2
    assert counts[LOSS, FORWARD] == 1 and counts[LOSS, BACKWARD] == 1  # ones have no gradient


def test_recomputed_blocks_count_as_forward_once_more() -> None:
    dense = products(profiled(ElaraConfig(SIZES)))
    recomputed = products(profiled(ElaraConfig(SIZES, trm=TRMConfig(checkpoint=True))))
    for part in (ATTENTION, MLP_):
        assert recomputed[part, FORWARD] > dense[part, FORWARD]
        assert recomputed[part, BACKWARD] == dense[part, BACKWARD]


def test_time_between_events_and_lightnings_actions_have_their_parts() -> None:
    actions = profiling.Actions()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for name in (
            "[_TrainingEpochLoop].train_dataloader_next", "[LightningModule]ElaraModule.optimizer_step",
            "[Strategy]SingleDeviceStrategy.training_step", "[Callback]Progress.on_train_batch_end",
        ):  # fmt: skip
            with actions.profile(name):
                torch.ones(8).sum()
        actions.stop("begun before the window")
    by_part: dict[str, float] = defaultdict(float)
    for row in profiling.rows_of(found.events(), 1, 1.0):
        by_part[row.part] += row.calls if row.operator == "aten::sum" else 0
    assert by_part[DATA] == by_part[OPTIMIZER] == by_part[LOSS] == by_part[profiling.AROUND] == 1
    assert not by_part[profiling.REST]
    total = sum(row.seconds for row in profiling.rows_of(found.events(), 1, 1.0))
    assert total == pytest.approx(1.0)  # of the clock: what no event saw is there as well
