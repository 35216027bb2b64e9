"""What a training step costs on one GPU: tokens/s, MFU, memory and loss of elara_124m and elara_2p8b, and their parts.

NOT YET RUN on a GPU: none was at hand. `--dry` runs every line of it with tiny sizes on a CPU.

    python experiments/training-speed/gpu.py --out outputs/gpu            # about 20 minutes; gpu.json, gpu.md, profiles
    python experiments/training-speed/gpu.py --out outputs/gpu --compile  # blocks through torch.compile
    python experiments/training-speed/gpu.py --out /tmp/dry --dry

MFU = tokens/s * FLOPs per token / the GPU's dense bf16 peak. FLOPs per token (elara/training/callbacks/throughput.py):
6 * active weights * depth * (1 + section / seq) for the blocks, 12 * n_embd * seq / 2 for the attention of every
effective layer, clean tokens and masks alike, 6 per weight of both heads; recomputed activations do not count.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sysconfig
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flex import Heads, block_mask, flex, some_blocks, split
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from elara.bench.limits import matmul_rate
from elara.bench.measure import Figure, compare
from elara.bench.training import moe_layer
from elara.cli import register_resolvers
from elara.config import ElaraConfig, TiDARConfig
from elara.device import device_name
from elara.model import ElaraLM
from elara.training import optimizers, profiling
from elara.training.balance import LoadBalancer
from elara.training.callbacks.throughput import flops_per_token, peak_flops
from elara.training.config import register
from elara.training.losses import elara_loss

CONF = Path(__file__).parents[2] / "conf"
TINY = ["n_layer=2", "n_embd=64", "n_head=2", "hidden=64", "expert_hidden=64", "vocab_size=512", "context_length=64"]
SHAPES = [(32, False), (16, False), (8, False), (4, False), (16, True), (8, True), (4, True), (2, True), (1, True)]
UNCOUNTED = 10  # steps before the clock starts


@dataclass
class Trained:
    """One model, `steps` steps. checkpoint: block insides were recomputed. syncs: where the host waited in one step."""

    size: str
    section: float
    batch: int
    checkpoint: bool
    steps: int
    tokens_per_second: float
    mfu: float | None
    peak_gib: float
    parameters: int
    flops_per_token: float
    first_loss: float
    last_loss: float
    syncs: list[str]
    losses: list[float]


def architecture(size: str, dry: bool) -> ElaraConfig:
    """A size with experts, recursion and a section at a quarter of the blocks."""
    sizes = [f"model.{change}" for change in TINY] if dry else ["model.vocab_size=50304"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", overrides=[f"model={size}", "tidar=full_mask", *sizes])
    groups = {group: OmegaConf.to_container(composed[group]) for group in ("model", "moe", "trm", "tidar")}
    config = ElaraConfig.from_dict(groups)
    return replace(config, tidar=replace(config.tidar, block_fraction=0.25))


def text() -> Tensor:
    """Real text that every Python has: the sources of its library, a token per byte."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.tensor(list(b"\n".join(file.read_bytes() for file in files)), dtype=torch.int64)


class Training:
    """Steps of one model with full AdamW in bf16-mixed, as the LightningModule makes them."""

    def __init__(self, config: ElaraConfig, batch: int, device: torch.device, compiled: bool) -> None:
        torch.manual_seed(0)
        with device:
            self.model = ElaraLM(config)
        if compiled:
            for block in self.model.blocks:
                block.compile()
        self.optimizer = optimizers.adamw(self.model, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        self.balancer = LoadBalancer(self.model, config.moe.bias_update_rate)
        self.batch, self.device, self.tokens = batch, device, text()
        self.generator = torch.Generator().manual_seed(1)
        self.done = 0

    def step(self) -> Tensor:
        """One optimizer step; the loss stays on the device."""
        seq = self.model.config.model.context_length
        starts = torch.randint(len(self.tokens) - seq - 1, (self.batch, 1), generator=self.generator)
        windows = self.tokens[starts + torch.arange(seq + 1)]
        if self.device.type == "cuda":
            windows = windows.pin_memory()
        windows = windows.to(self.device, non_blocking=True)
        self.done += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 3e-4 * min(1.0, self.done / 20)
        with part(profiling.LOSS), torch.autocast(self.device.type, torch.bfloat16):
            losses = elara_loss(self.model, windows, self.generator, mask_id=257)
        self.optimizer.zero_grad()
        with part(profiling.AUTOGRAD):
            losses.total.backward()
        with part(profiling.OPTIMIZER):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.balancer.add(losses.routing)
            self.balancer.step()
        return losses.ar.detach()


def part(name: str) -> Any:
    """A range for the profile; the model's own parts lie inside."""
    return record_function(f"{name}{profiling.SIGN}step")


def largest(config: ElaraConfig, device: torch.device, compiled: bool, dry: bool) -> tuple[Training, bool]:
    """The largest batch that fits, without recomputation where any such fits; two steps are done."""
    for batch, checkpoint in [(2, False), (2, True)] if dry else SHAPES:
        try:
            recomputing = replace(config, trm=replace(config.trm, checkpoint=checkpoint))
            training = Training(recomputing, batch, device, compiled)
            for _ in range(2):
                training.step()
            _synchronize(device)
            return training, checkpoint
        except torch.OutOfMemoryError:
            training = None  # type: ignore[assignment]
        _free(device)  # not above, where the error's frames still hold what filled the memory
    raise SystemExit("error: not even one window fits into this GPU's memory")


def train(
    size: str, config: ElaraConfig, steps: int, device: torch.device, out: Path, args: argparse.Namespace
) -> Trained:
    """At least `steps` steps, then what they cost, where their time went and what made the host wait."""
    training, checkpoint = largest(config, device, args.compile, args.dry)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    uncounted = min(UNCOUNTED, steps // 2)
    losses = [training.step() for _ in range(uncounted)]
    _synchronize(device)
    begin = time.perf_counter()
    losses += [training.step() for _ in range(steps - uncounted)]
    _synchronize(device)
    seconds = (time.perf_counter() - begin) / (steps - uncounted)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    values = [float(loss) for loss in losses]
    seq, model = config.model.context_length, training.model
    rate, flops = training.batch * seq / seconds, flops_per_token(model, seq)
    limit = peak_flops(device)
    section = config.tidar.block_fraction if config.tidar.block_length else 0.0
    name = f"{size}-{'tidar' if section else 'ar'}"
    _profiled(training, out / name, seconds, device)
    tenth = max(1, steps // 10)
    return Trained(
        size, section, training.batch, checkpoint, steps, rate, limit and rate * flops / limit, peak,
        sum(p.numel() for p in model.parameters()), flops,
        sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth, _syncs(training, device), values,
    )  # fmt: skip


def _profiled(training: Training, folder: Path, plain: float, device: torch.device, steps: int = 3) -> None:
    """profile/ of a few steps: what part of the step the device spends where."""
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profiling.attach(training.model), profile(activities=activities) as found:
        begin = time.perf_counter()
        for _ in range(steps):
            training.step()
        _synchronize(device)
        seconds = time.perf_counter() - begin
    on = f"{device_name(device)}, bf16-mixed, {training.batch} windows"
    profiling.write(profiling.measured(found.events(), steps, training.done, seconds, plain, on), folder)
    found.export_chrome_trace(str(folder / "trace.json.gz"))


def _syncs(training: Training, device: torch.device) -> list[str]:
    """Where the host waited for the device in one step, as torch.cuda.set_sync_debug_mode tells it."""
    if device.type != "cuda":
        return []
    _synchronize(device)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            training.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in heard if "synchroniz" in str(w.message)]


def attention(size: str, config: ElaraConfig, device: torch.device, dry: bool) -> Iterator[Figure]:
    """The section's attention, forward + backward: one FlexAttention call over the split form."""
    seq, heads, batch = config.model.context_length, config.model.n_head, 2 if dry else 8
    section = some_blocks(seq, config.tidar.block_length, 0.25)
    dtype = torch.float32 if dry else torch.bfloat16
    shape = (batch, heads, seq + section.length, config.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=not dry) for _ in range(3))
    grad = torch.randn(shape, device=device, dtype=dtype)
    forms: dict[str, Heads] = {
        "split": split(section, seq, device), "flex": flex(section, seq, device, compiled=device.type == "cuda")
    }  # fmt: skip

    def step(name: str) -> None:
        y = forms[name](q, k, v)
        if not dry:  # eager FlexAttention has no backward on a CPU
            y.backward(grad)
            q.grad = k.grad = v.grad = None

    difference = float((forms["split"](q, k, v) - forms["flex"](q, k, v)).float().abs().max().detach())
    note = f"{batch} x {seq} + {section.length}, {heads} heads of {config.head_dim}; differ by {difference:.1e}"
    yield compare(
        f"{size}: FlexAttention / split form", lambda: step("flex"), lambda: step("split"), rounds=20, note=note
    )
    make = torch.compile(block_mask) if device.type == "cuda" else block_mask
    yield compare(
        f"{size}: block mask of a step / one layer's split attention", lambda: make(section, seq, device),
        lambda: step("split"), rounds=20, note="made once per step, for all layers",
    )  # fmt: skip


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def table(runs: list[Trained], figures: list[Figure], on: str, rate: float) -> str:
    """Both tables in markdown."""
    lines = [
        f"{on}, torch {torch.__version__}; one large bf16 product: {rate / 1e12:.1f} TFLOP/s", "",
        "| model | section | batch | recomputed | tokens/s | MFU | memory | AR loss, first, last tenth | waits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in runs:
        mfu, recomputed = "" if r.mfu is None else f"{r.mfu:.1%}", "yes" if r.checkpoint else "no"
        cells = [r.size, f"{r.section:g}", r.batch, recomputed, f"{r.tokens_per_second:,.0f}", mfu]
        cells += [f"{r.peak_gib:.1f} GiB", f"{r.first_loss:.3f}, {r.last_loss:.3f}", len(r.syncs)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| | ratio | ms | against ms | of matmul rate | |", "|---|---|---|---|---|---|"]
    for f in figures:
        cells = [f.name, f"{f.ratio:.2f}", f"{1e3 * f.subject:.2f}", f"{1e3 * f.reference:.2f}"]
        cells += ["" if f.share is None else f"{f.share:.0%}", f.note]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, gpu.md and the profiles")
    parser.add_argument("--sizes", nargs="+", default=["elara_124m", "elara_2p8b"])
    parser.add_argument("--steps", type=int, default=60, help="per model; the first 10 are not timed")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU: does every line run?")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        raise SystemExit("error: torch finds no GPU here; --dry runs tiny sizes on a CPU")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    torch.set_float32_matmul_precision("high")
    register_resolvers()
    register()
    device = torch.device("cpu" if args.dry else "cuda")
    steps, rounds = (6, 2) if args.dry else (args.steps, 20)
    args.out.mkdir(parents=True, exist_ok=True)
    rate = matmul_rate(device, torch.bfloat16)
    runs, figures = [], []
    for size in args.sizes:
        config = architecture(size, args.dry)
        figures += [replace(found, name=f"{size}: {found.name}") for found in moe_layer(config, device, rounds)]
        try:
            figures += attention(size, config, device, args.dry)
        except Exception as error:  # of the compiler: the runs below say more than this comparison
            print(f"{size}: no figure of FlexAttention: {str(error).splitlines()[0]}", flush=True)
        for tidar in (TiDARConfig(), config.tidar):
            runs.append(train(size, replace(config, tidar=tidar), steps, device, args.out, args))
            _free(device)
            print(json.dumps({k: v for k, v in asdict(runs[-1]).items() if k != "losses"}), flush=True)
            result: dict[str, Any] = {
                "hardware": device_name(device), "torch": torch.__version__, "compiled": args.compile, "matmul": rate,
                "runs": [asdict(run) for run in runs], "figures": [asdict(f) for f in figures],
            }  # fmt: skip
            (args.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
            (args.out / "gpu.md").write_text(table(runs, figures, device_name(device), rate), "utf-8")
    print(table(runs, figures, device_name(device), rate))


if __name__ == "__main__":
    main()
