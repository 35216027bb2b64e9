"""The arithmetic of figures and limits, and a run of the bench from its command to its picture."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from elara.bench import decoding, lightning, limits, loading
from elara.bench.graph import DecodeGraph
from elara.bench.measure import WARM_UP, Figure, compare, figure, race
from elara.bench.report import table, write
from elara.cli import register_resolvers
from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.decoding import SamplingConfig, generate
from elara.errors import ElaraError
from elara.model import ElaraLM, convert
from elara.model.moe import MoE
from elara.training.config import register
from tests import forks

CPU = torch.device("cpu")
SIZES = ModelConfig(n_layer=2, n_embd=64, n_head=2, hidden=128, expert_hidden=64, vocab_size=64, context_length=128)


def config(depth: int = 2, experts: int = 4, block_length: int = 0, order: str = "block") -> ElaraConfig:
    moe = MoEConfig(num_experts=experts, top_k=2)
    return ElaraConfig(SIZES, moe, TRMConfig(depth=depth, order=order), TiDARConfig(block_length=block_length))


def test_the_ratio_is_the_median_of_neighbours():
    cost = figure("cost", [2.0, 6.0, 8.0], [1.0, 2.0, 4.0])
    assert (cost.ratio, cost.low, cost.high, cost.subject, cost.reference) == (2.0, 2.0, 2.5, 6.0, 2.0)
    speed = figure("speed", [1.0, 2.0, 4.0], [2.0, 6.0, 8.0], faster=True)
    assert speed.ratio == 2.0


@pytest.mark.parametrize(
    ("ratio", "target", "faster", "share", "share_target", "met"),
    [
        (1.2, 1.3, False, None, None, True),
        (1.4, 1.3, False, None, None, False),
        (1.2, 1.3, True, None, None, False),
        (9.0, None, False, None, None, True),
        (1.0, None, False, 0.4, 0.5, False),
        (1.0, None, False, 0.6, 0.5, True),
    ],
)
def test_targets(ratio, target, faster, share, share_target, met):
    one = Figure("", ratio, ratio, ratio, target, faster, 1.0, 1.0, share=share, share_target=share_target)
    assert one.met is met


def test_a_round_takes_every_run_in_turn():
    calls: list[str] = []
    seconds = race({name: lambda name=name: calls.append(name) for name in "abc"}, 3)  # type: ignore[misc]
    assert calls == list("abc") * (3 + WARM_UP)
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert compare("", lambda: None, lambda: None, rounds=1).target is None


@pytest.mark.parametrize(("precision", "bits"), [("float32", 32), ("bfloat16", 16), ("int4", 5)])
def test_a_token_reads_every_block_once_per_pass_and_two_of_four_experts(precision, bits):
    model = convert(ElaraLM(config(depth=3, block_length=4)), precision)
    n, hidden, expert, vocab = 64, 128, 64, 64
    attention, dense = 4 * n * n, 3 * n * hidden
    block = 2 * attention + dense + (2 + 1) * 3 * n * expert  # two routed experts and the shared one
    wide = 4 if precision == "float32" else 2
    norms = 2 * 2 * n * wide + 2 * 2 * 32 * wide
    router = (4 * n + 3 * 4) * 4  # float32 in every precision; a selection bias per pass
    small = 3 * (norms + router) + n * wide
    assert limits.decode_bytes(model) == (3 * block + vocab * n) * bits // 8 + small
    dense_model = ElaraLM(config(depth=1, experts=0))
    assert limits.decode_bytes(dense_model) == sum(p.nbytes for p in dense_model.parameters())


def test_flops_of_the_experts():
    layer = ElaraLM(config()).blocks[1].mlp
    assert isinstance(layer, MoE)
    assert limits.moe_flops(layer, 10) == 6 * 10 * 2 * 3 * 64 * 64


def test_shares_are_the_least_time_over_the_measured_one():
    model = ElaraLM(config())
    one = limits.against_bandwidth(figure("", [0.5], [1.0]), model, 10, target=0.5, limit=1e9)
    assert one.share == pytest.approx(10 * limits.decode_bytes(model) / 1e9 / 0.5)
    assert (one.tokens_per_second, one.share_target) == (20, 0.5)
    other = limits.against_matmul(figure("", [0.5], [1.0]), 2e11, 100, CPU, torch.float32, limit=1e12)
    assert other.share == pytest.approx(0.4)
    assert other.tokens_per_second == 200 and other.mfu is None


def test_limits_are_plausible():
    """Between what a microcontroller and what the fastest server does."""
    assert 1e8 < limits.bandwidth(CPU) < 1e13
    assert 1e8 < limits.matmul_rate(CPU, torch.float32) < 1e15


@pytest.mark.parametrize("order", ["block", "stack"])
def test_the_step_of_fixed_shape_writes_what_generate_writes(order):
    torch.manual_seed(0)
    model = ElaraLM(config(order=order)).double()
    for weight in model.blocks.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)  # else the tied head repeats the last token for ever
    prompt = [3, 1, 4, 1, 5]
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=30)
    expected = [token for step in generate(model, [prompt], greedy, mode="ar") for token in step.tokens[0]]
    fixed = DecodeGraph(model, prompt, 30, capture=False)
    assert fixed.write() == fixed.write() == expected
    assert len(set(expected)) > 3


@pytest.mark.slow
def test_every_decoding_case_gives_its_figures():
    modes = list(decoding.modes(config(block_length=4), CPU, 1, new_tokens=4))
    assert len(modes) == 12 and {f.at for f in modes if f.series} == {2, 4, 8}
    costs = list(decoding.forward_cost("tiny", config(block_length=4), CPU, 1))
    assert [f.at for f in costs] == [6, 20, 72] * 4
    kinds = [f.name.split()[0] for f in decoding.precision(config(), CPU, 1, new_tokens=2)]
    assert kinds == ["bfloat16", "int8", "int4", "int4"]


def test_report(tmp_path):
    figures = [
        Figure("met", 1.2, 1.1, 1.3, 1.3, False, 0.1, 0.2, limit="matmul", share=0.4, tokens_per_second=1e4),
        Figure("missed", 1.2, 1.1, 1.3, 1.3, True, 0.1, 0.2, mfu=0.3, share=0.4, limit="matmul", share_target=0.5),
        Figure("free", 2.0, 2.0, 2.0, None, False, 2e6, 1e6, unit="bytes"),
        *(Figure("point", 1.5 * at, 1, 2, None, False, 1, 1, series="curve", at=at) for at in (2.0, 4.0)),
    ]
    write(figures, {"bandwidth": 1e9}, CPU, tmp_path)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [f["met"] for f in found["figures"]] == [True, False, True, True, True]
    assert found["limits"] == {"bandwidth": 1e9}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert table(figures, CPU).row_count == 5


def bench(*overrides: str, folder: Path) -> forks.Done:
    return forks.run("elara.bench", f"hydra.run.dir={folder}", "device=cpu", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cases=[speed]"], r"cases=\['speed'\]: choose among moe_layer"),
        (["cases=[]"], "choose among"),
        (["rounds=0"], "rounds=0 and threads=None must be at least 1"),
        (["cases=[decode_modes]", "checkpoint=nowhere"], "nowhere"),
    ],
)
@pytest.mark.slow
def test_refusals(tmp_path, overrides, message):
    done = bench(*overrides, folder=tmp_path)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ")
    assert re.search(message, error[0])


@pytest.mark.slow
def test_a_run_writes_table_json_and_picture(tmp_path):
    done = bench("cases=[memory]", "rounds=1", "threads=1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "memory bandwidth" in done.stdout and "peak memory" in done.stdout
    found = json.loads((tmp_path / "bench.json").read_text())
    assert len(found["figures"]) == 4
    peaks = {f["name"].split(":")[0]: f["subject"] for f in found["figures"] if f["unit"] == "bytes"}
    assert peaks["int4"] < peaks["bfloat16"] < peaks["float32"]
    assert (tmp_path / "bench.png").exists()


def tiny_run(*overrides: str) -> list[str]:
    sizes = {"n_embd": 32, "n_head": 2, "hidden": 32, "expert_hidden": 32, "context_length": 16}
    model = [f"model.{name}={size}" for name, size in sizes.items()]
    return [*model, "data.batch_size=2", "callbacks.samples.max_new_tokens=2", "trainer.precision=32-true", *overrides]


@pytest.fixture
def _composing() -> Iterator[None]:
    register_resolvers()
    register()
    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


@pytest.mark.slow
@pytest.mark.usefixtures("_composing")
def test_lightning_and_the_bare_loop_do_the_same_work():
    """`overhead` compares their weights itself; here also that it would notice a difference."""
    wall, cpu = lightning.overhead(1, CPU, *tiny_run())
    assert wall.target == cpu.target == 1.05 and 0 < cpu.reference <= 1.1 * wall.reference
    with pytest.raises(ElaraError, match="did not do the same work"):
        list(lightning.overhead(1, CPU, *tiny_run("trainer.accumulate_grad_batches=2")))


@pytest.mark.slow
def test_the_loader_is_read_with_and_without_workers():
    figures = list(loading.loading("nothing", lambda: None, 10**9, CPU, 1))
    assert [f.name.split(": ")[1] for f in figures] == [f"{s}, {w} workers" for s in loading.SHAPES for w in (0, 2)]
    assert all(f.tokens_per_second is not None and f.tokens_per_second > 1e4 for f in figures)
