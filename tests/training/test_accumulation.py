"""Micro-batches that count differently make the step of one large batch of all their windows."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.data.batches import PADDING, Batch, FirstBatch, Steps
from elara.data.opinions import StoredOpinion
from elara.model import ElaraLM, draw_section
from elara.runs import Run
from elara.tokenizer.byte import ByteTokenizer
from elara.training.callbacks import Metrics
from elara.training.config import DistillConfig
from elara.training.module import ElaraModule
from elara.training.teaching import Teacher, Teaching
from tests.conftest import Home, make_text
from tests.training.test_module import Rows

SEQ, STEPS = 24, 3
EVERY_PLACE = TiDARConfig(block_length=1, block_fraction=1.0)  # the same places in every batch, whatever is drawn
COUNTS = [40, 4, 0, 23, 1, 2]  # targets of each micro-batch


def window(index: int, kind: str) -> Batch:
    """Two rows. kind: `weights` marks the targets, `padding` follows them, with `even` every token is one."""
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(0, 50, (2, SEQ + 1), generator=generator)
    ids = torch.randint(0, 50, (2, SEQ, 3), generator=generator)
    ids[:, ::5] = -1  # where the teacher is silent
    logprobs = torch.randn(2, SEQ, 4, generator=generator).masked_fill(torch.nn.functional.pad(ids < 0, (0, 1)), -1e3)
    said = StoredOpinion(ids, logprobs.log_softmax(-1), torch.zeros(2, SEQ))
    if kind == "even":
        return Batch(tokens, None, (said,))
    last = torch.tensor([COUNTS[index] // 2, COUNTS[index] - COUNTS[index] // 2])[:, None]
    wanted = torch.arange(SEQ + 1) <= last
    if kind == "padding":
        return Batch(tokens.masked_fill(~wanted, PADDING), None, (said,))
    weights = torch.rand(tokens.shape, generator=generator) + 0.5
    return Batch(tokens, weights * wanted, (said,))


class Windows(Dataset[Batch]):
    """Batches of so many windows each, of two rows."""

    def __init__(self, kind: str, size: int) -> None:
        self.kind, self.size = kind, size

    def __getitem__(self, index: int) -> Batch:
        parts = [window(i % len(COUNTS), self.kind) for i in range(index * self.size, (index + 1) * self.size)]
        weights = None if parts[0].weights is None else torch.cat([b.weights for b in parts if b.weights is not None])
        said = StoredOpinion(*map(torch.cat, zip(*(batch.opinions[0] for batch in parts), strict=True)))
        return Batch(torch.cat([batch.tokens for batch in parts]), weights, (said,))


class Endless:
    def __iter__(self) -> Iterator[int]:
        return itertools.count()


def make_module(tidar: TiDARConfig, kind: str, *, taught: bool) -> ElaraModule:
    torch.manual_seed(3)
    model = ElaraLM(
        ElaraConfig(
            ModelConfig(n_layer=2, n_embd=32, n_head=2, hidden=48, vocab_size=320, context_length=SEQ, init_std=0.1),
            MoEConfig(num_experts=4, bias_update_rate=0.01, balance_loss=0.1, z_loss=0.1), TRMConfig(depth=2), tidar,
        )
    )
    tokenizer = ByteTokenizer()
    teacher: Any = None  # never asked: the batches bring along what it said
    teaching = Teaching([Teacher("t", 1.0, teacher, tokenizer)], DistillConfig(weight=0.4)) if taught else None
    return ElaraModule(
        model, tokenizer, seed=5, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        schedule=lambda step: 1.0, uneven=kind != "even", teaching=teaching,
    )  # fmt: skip


def fit(module: ElaraModule, kind: str, *, micro: int, size: int = 1) -> dict[int, dict[str, float]]:
    """Train through Lightning on steps of `micro` batches of `size` windows each; what was logged, by step."""
    rows, loader = Rows(), DataLoader(Windows(kind, size), batch_size=None, sampler=Endless())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=STEPS, accumulate_grad_batches=micro, gradient_clip_val=1.0, logger=rows,
            callbacks=[Metrics()], log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, Steps(loader, micro) if micro > 1 else loader)
    return rows.rows


@pytest.mark.parametrize("kind", ["weights", "padding", "even"])
@pytest.mark.parametrize("taught", [False, True], ids=["text", "teacher"])
@pytest.mark.parametrize("tidar", [TiDARConfig(), EVERY_PLACE], ids=["ar", "diffusion"])
def test_accumulation_makes_the_step_of_one_large_batch(tidar: TiDARConfig, taught: bool, kind: str) -> None:
    parts, whole = (make_module(tidar, kind, taught=taught) for _ in range(2))
    rows, expected = fit(parts, kind, micro=2), fit(whole, kind, micro=1, size=2)
    for (name, value), wanted in zip(parts.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6, msg=name)
    for step, row in expected.items():
        for name, logged in row.items():
            if "loss" in name or "penalty" in name or "grad" in name:
                assert rows[step][name] == pytest.approx(logged, rel=1e-5, abs=1e-6), name
            elif name.startswith("moe/"):
                assert rows[step][name] == pytest.approx(logged, abs=1e-6), name


@pytest.mark.parametrize("kind", ["weights", "padding", "even"])
def test_accumulated_drafts_are_a_mean_over_all_that_were_hidden(kind: str) -> None:
    """Blocks of other places and another number in every micro-batch; the step's loss by hand."""
    tidar = TiDARConfig(block_length=7, block_fraction=0.7)
    module = make_module(tidar, kind, taught=False)
    before = make_module(tidar, kind, taught=False).model
    row = fit(module, kind, micro=4)[1]
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    for index in range(4):
        batch = window(index, kind)
        inputs = batch.tokens.clamp(min=0)[:, :-1]
        section, _ = draw_section(inputs, tidar, module.tokenizer.mask_id, module._seeded("train", index))
        section.tokens = torch.full_like(section.tokens, module.tokenizer.mask_id)
        output = before(inputs, section=section)
        at = section.positions()[0]
        weights = (batch.tokens != PADDING).float() if batch.weights is None else batch.weights
        for head, (logits, places) in enumerate((
            (before.ar_head(output.hidden), torch.arange(1, SEQ + 1)), (before.diffusion_head(output.mask_hidden), at)
        )):  # fmt: skip
            targets, factors = batch.tokens[:, places], weights[:, places]
            surprise: Tensor = -logits.double().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            sums[head] += (surprise * factors).sum().detach()
            counts[head] += (factors > 0).sum()
    assert row["train/loss_ar"] == pytest.approx(float(sums[0] / counts[0]), rel=1e-5)
    assert row["train/loss_diffusion"] == pytest.approx(float(sums[1] / counts[1]), rel=1e-5)


def test_the_first_batch_of_a_step_brings_the_others_along() -> None:
    loader = [window(i % len(COUNTS), "weights") for i in range(7)]
    given = list(Steps(loader, 3))
    ahead = [len(batch.ahead) if isinstance(batch, FirstBatch) else None for batch in given]
    assert ahead == [2, None, None, 2, None, None, 0]
    assert all(one.tokens is other.tokens for one, other in zip(given, loader, strict=True))
    assert isinstance(given[3], FirstBatch)
    assert all(one.tokens is other.tokens for one, other in zip(given[3].ahead, loader[4:6], strict=True))


@pytest.mark.slow
def test_a_run_of_documents_accumulates_to_its_large_batch_and_resumes_exactly(home: Home) -> None:
    """Of lengths that leave some windows nearly empty; gone on with from step 8, then with longer steps."""
    documents = home.path / "uneven"
    documents.mkdir(exist_ok=True)
    for i in range(60):
        (documents / f"{i}.txt").write_text(make_text(20 + 37 * i % 190, i), "utf-8")
    shape = ["data.cross_documents=false", f"data.path={documents}", "tidar=none", "model.dropout=0"]
    shape += ["optimizer=adamw", "optimizer.lr=3e-3", "optimizer.eps=1e-4", "callbacks.progress.every=0"]

    def run(name: str, *overrides: str) -> Path:
        done = home.call(*home.tiny(f"name={name}", *shape, *overrides))
        assert done.returncode == 0, done.stderr
        return home.only_run(name)

    parts = run("parts", "data.batch_size=2", "trainer.accumulate_grad_batches=3", "data.val_batches=6")
    whole = run("large-batch", "data.batch_size=6", "data.val_batches=2")
    for row, wanted in zip(home.rows(parts), home.rows(whole), strict=True):
        for name in ("train/loss", "train/loss_ar", "train/grad_norm", "val/loss_ar"):
            assert float(row[name] or 0) == pytest.approx(float(wanted[name] or 0), rel=2e-5), (row["step"], name)

    expected = home.rows(parts)
    go_back(Run(parts), 8)
    again = home.call(f"resume={parts}")
    assert again.returncode == 0, again.stderr
    assert home.rows(parts) == expected

    go_back(Run(parts), 8)
    longer = home.call(f"resume={parts}", "trainer.accumulate_grad_batches=5", "trainer.max_steps=12")
    assert longer.returncode == 0, longer.stderr
    assert len(home.rows(parts)) == 12


def go_back(run: Run, step: int) -> None:
    """Make a run one that was killed after `step`."""
    run.summary.write_text(json.dumps({**run.read_summary(), "finished": False}), "utf-8")
    for path in run.checkpoints():
        if path.name != f"step-{step}":
            shutil.rmtree(path)
    for link in (run.last, run.best):
        link.unlink(missing_ok=True)
