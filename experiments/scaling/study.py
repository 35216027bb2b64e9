"""Run the study: tune the learning rate of small models of several widths, depths, lengths of training and batches.

One `python -m elara.train` at a time under outputs/scaling; a finished run is never repeated, so the command can be
stopped and started again. Every run's figures go to runs.csv beside this file.
"""

import csv
import os
import subprocess
import sys
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path

from elara.cli import guard
from elara.errors import ElaraError
from elara.runs import Run, project_root

HERE = Path(__file__).parent
FOLDER = project_root() / "outputs" / "scaling"
SEQ = 128  # characters per window
VALIDATION = 512  # windows of held-out text, the same for every run
BASE, RATIO = 0.02, 0.2  # lr = BASE * 2^(notch / 2); adam_lr = RATIO * lr: both as in conf/optimizer/muon.yaml


@dataclass(frozen=True)
class Setting:
    """What a run trains: everything but the size is named in units of the model's user."""

    width: int = 64  # n_embd; heads of 32, hidden 2 x and experts 1 x this wide, as in elara_nano
    layers: int = 2  # physical blocks, each applied twice
    tokens: int = 384 * 1024  # of the whole run, in characters
    batch: int = 1024  # tokens per optimizer step
    notch: int = 0  # of the learning rate, in factors of sqrt(2) from BASE
    ratio: float = RATIO  # adam_lr / lr
    seed: int = 1

    @property
    def lr(self) -> float:
        return float(f"{BASE * 2 ** (self.notch / 2):.3g}")

    @property
    def steps(self) -> int:
        return self.tokens // self.batch

    @property
    def run(self) -> Run:
        return Run(FOLDER / "-".join(f"{f.name}{value}" for f, value in zip(fields(self), astuple(self), strict=True)))

    def overrides(self) -> list[str]:
        width, windows = self.width, self.batch // SEQ
        return [
            "name=scaling", f"seed={self.seed}", f"hydra.run.dir={self.run.path}",
            f"model.n_embd={width}", f"model.n_head={width // 32}", f"model.n_layer={self.layers}",
            f"model.hidden={2 * width}", f"model.expert_hidden={width}", f"model.context_length={SEQ}",
            f"data.batch_size={windows}", f"data.val_batches={VALIDATION // windows}",
            f"optimizer.lr={self.lr}", f"optimizer.adam_lr={self.ratio * self.lr:.4g}",
            f"schedule.warmup={max(1, round(0.08 * self.steps))}",
            f"trainer.max_steps={self.steps}", f"trainer.val_check_interval={self.steps}",
            "trainer.precision=bf16-mixed", "callbacks=minimal", "~callbacks.progress",
            "+callbacks.summary._target_=elara.training.callbacks.Summary",
            "+callbacks.summary.folder=${hydra:runtime.output_dir}",
        ]  # fmt: skip


def loss(setting: Setting) -> float:
    """Held-out AR loss in nats per character, from the run's folder or by training it now; inf when it diverged."""
    diverged = setting.run.path.with_suffix(".diverged")
    if diverged.exists():
        return float("inf")
    if not setting.run.finished:
        command = [sys.executable, "-m", "elara.train", *setting.overrides()]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode and "is nan at step" in done.stderr:
            diverged.write_text(done.stderr)
            return float("inf")
        if done.returncode:
            raise ElaraError(f"{setting.run.path.name} failed: {done.stderr.strip()}")
    found: float = setting.run.read_summary()["metrics"]["val/loss_ar"]
    print(f"{setting.run.path.name}  {found:.4f}", flush=True)
    return found


def tune(cell: Setting, start: int, rates: int = 3) -> int:
    """Walk downhill in factors of 2 until the best rate has a worse one on both sides; returns the notch of the best.

    rates: at least 3, or 4 with one more on the flatter side, or 6 with two at sqrt(2) around the best as well.
    """
    tried = {n: loss(replace(cell, notch=n)) for n in (start - 2, start, start + 2)}

    def best() -> int:
        return min(tried, key=lambda n: tried[n])

    while (edge := best()) in (min(tried), max(tried)):
        beyond = edge - 2 if edge == min(tried) else edge + 2
        tried[beyond] = loss(replace(cell, notch=beyond))
    if len(tried) < min(rates, 4):
        beyond = max(tried) + 2 if tried[max(tried)] < tried[min(tried)] else min(tried) - 2
        tried[beyond] = loss(replace(cell, notch=beyond))
    if rates > 4:
        for n in (best() - 1, best() + 1):
            tried[n] = loss(replace(cell, notch=n))
    return best()


def study() -> None:
    base = Setting()
    starts = {64: 2, 128: 0, 96: 0, 192: -2}
    best = {width: tune(replace(base, width=width), start, rates=6) for width, start in starts.items()}
    for width, steps in ((64, (0, -2, 2)), (128, (0, -2, 2)), (96, (0,))):  # noise
        for step in steps:
            loss(replace(base, width=width, notch=best[width] + step, seed=2))
    for batch in (2048, 4096, 512, 256):
        tune(replace(base, batch=batch), 1, rates=4)
    tune(replace(base, width=256), -1, rates=4)
    short, long = replace(base, tokens=96 * 1024), replace(base, tokens=1536 * 1024)
    for batch in (1024, 512, 256):
        tune(replace(short, batch=batch), 1)
    for batch in (1024, 4096, 2048):
        tune(replace(long, batch=batch), 1)
    tune(replace(base, layers=4), 0, rates=4)
    for batch in (512, 2048):
        tune(replace(base, width=128, batch=batch), -1)
    for width in (64, 192):  # adam_lr at the best lr
        for ratio in (0.05, 0.1, 0.4, 0.8):
            loss(replace(base, width=width, notch=best[width], ratio=ratio))
    for step, ratio in ((-2, 0.4), (2, 0.1)):  # lr at the same adam_lr
        loss(replace(base, notch=best[64] + step, ratio=ratio))
    narrow = replace(base, width=32)
    tune(narrow, 2, rates=6)
    tune(replace(narrow, layers=8), 1)


def collect() -> None:
    """Write runs.csv: a row for every run that ended, however it ended."""
    names = [f.name for f in fields(Setting)]
    with (HERE / "runs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*names, "lr", "parameters", "loss_ar", "loss_diffusion", "tokens_per_second"])
        for setting in sorted(map(parse, FOLDER.glob("width*")), key=astuple):
            summary = setting.run.read_summary()
            diverged = setting.run.path.with_suffix(".diverged").exists()
            if not (summary.get("finished") or diverged):
                continue
            metrics = {} if diverged else summary["metrics"]
            figures = [metrics.get(f"val/{name}", float("inf")) for name in ("loss_ar", "loss_diffusion")]
            speed = metrics.get("train/tokens_per_second", float("nan"))
            row = [*asdict(setting).values(), setting.lr, summary.get("parameters")]
            rows.writerow([*row, *(f"{value:.4f}" for value in figures), f"{speed:.0f}"])


def parse(path: Path) -> Setting:
    """The setting that a run folder's name spells."""
    parts = path.name.removesuffix(".diverged")
    values = {}
    for f in reversed(fields(Setting)):
        parts, _, text = parts.rpartition(f.name)
        values[f.name] = f.type(text.removesuffix("-")) if callable(f.type) else text
    return Setting(**values)  # type: ignore[arg-type]


def main() -> None:
    try:
        study()
    finally:
        collect()


if __name__ == "__main__":
    guard(main)
