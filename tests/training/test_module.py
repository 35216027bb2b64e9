"""Training through Lightning computes what a plain loop does."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.data.batches import Batch
from elara.model import CLEAN, ElaraLM, draw_section
from elara.training import optimizers, schedules
from elara.training.callbacks import Metrics, throughput
from elara.training.losses import elara_loss
from elara.training.module import ElaraModule

MASK = 60
MICRO = 2


class Tokens(Dataset[Batch]):
    def __getitem__(self, index: int) -> Batch:
        return Batch(torch.randint(0, 50, (4, 33), generator=torch.Generator().manual_seed(index)))


class Endless:
    def __iter__(self) -> Iterator[int]:
        return itertools.count()


class FakeTokenizer:
    mask_id = MASK


def make_model(**trm: Any) -> ElaraLM:
    torch.manual_seed(3)
    return ElaraLM(
        ElaraConfig(
            ModelConfig(n_layer=2, n_embd=32, n_head=2, hidden=48, vocab_size=64, context_length=32),
            MoEConfig(num_experts=4, bias_update_rate=0.01),
            TRMConfig(depth=2, **trm),
            TiDARConfig(block_length=4, block_fraction=0.5),
        )
    )


def make_module(model: ElaraLM) -> ElaraModule:
    adamw = partial(optimizers.adamw, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    schedule = schedules.cosine(6, warmup=2, final=0.1)
    return ElaraModule(model, FakeTokenizer(), seed=5, optimizer=adamw, schedule=schedule)  # type: ignore[arg-type]


class Rows(lightning.pytorch.loggers.Logger):
    """Keeps what is logged."""

    name, version = "rows", ""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.setdefault(step or 0, {}).update(metrics)


def fit(module: ElaraModule, *callbacks: lightning.Callback, **options: Any) -> dict[int, dict[str, float]]:
    rows = Rows()
    options = {"log_every_n_steps": 1, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=6, accumulate_grad_batches=MICRO, gradient_clip_val=0.5, logger=rows,
            callbacks=[Metrics(), *callbacks], enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, **options,
        )  # fmt: skip
        trainer.fit(module, DataLoader(Tokens(), batch_size=None, sampler=Endless()))
    return rows.rows


def plain_loop(model: ElaraLM, module: ElaraModule) -> list[dict[str, float]]:
    """The same six steps by hand, with the balance written out."""
    optimizer = module._optimizer(model)
    block: Any = model.blocks[1]
    router = block.mlp.router
    rows = []
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * module._schedule(step)
        optimizer.zero_grad()
        total, ar, load = 0.0, 0.0, torch.zeros(2, 4)  # (passes, experts)
        for micro in range(MICRO):
            index = step * MICRO + micro
            generator = module._seeded("train", index)
            losses = elara_loss(model, Tokens()[index].tokens, generator, MASK)
            (losses.total / MICRO).backward()
            total, ar = total + losses.total.item() / MICRO, ar + losses.ar.item() / MICRO
            load += losses.routing.load[0, :, CLEAN]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        router.selection_bias += 0.01 * torch.sign(load.mean(1, keepdim=True) - load)
        rows.append({"loss": total, "loss_ar": ar, "grad_norm": float(norm), "lr": 1e-2 * module._schedule(step)})
    return rows


def test_lightning_computes_what_a_plain_loop_does() -> None:
    by_hand = make_model()
    expected = plain_loop(by_hand, make_module(by_hand))
    trained = make_model()
    rows = fit(make_module(trained))
    assert list(rows) == [1, 2, 3, 4, 5, 6]
    for row, want in zip(rows.values(), expected, strict=True):
        for name, value in want.items():
            assert row[f"train/{name}"] == pytest.approx(value, rel=1e-6)
    for (name, a), b in zip(by_hand.state_dict().items(), trained.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_router_penalties_are_logged_and_part_of_the_loss() -> None:
    model = make_model()
    model.config.moe.balance_loss = 0.1
    row = fit(make_module(model))[1]
    parts = row["train/loss_ar"] + 0.5 * row["train/loss_diffusion"] + row["train/moe_penalty"]
    assert row["train/moe_penalty"] > 0
    assert row["train/loss"] == pytest.approx(parts, rel=1e-6)


def test_bf16_autocast_follows_float32_closely() -> None:
    full = fit(make_module(make_model()))
    mixed = fit(make_module(make_model()), precision="bf16-mixed")
    for step in full:
        assert mixed[step]["train/loss"] == pytest.approx(full[step]["train/loss"], rel=5e-3)


def test_a_step_is_a_pure_function_of_seed_and_place() -> None:
    module = make_module(make_model())
    places = [("train", 7), ("train", 8), ("val", 7), ("train", 7)]
    draws = [torch.rand(3, generator=module._seeded(*place)).tolist() for place in places]
    assert draws[0] == draws[3]
    assert draws[0] != draws[1] and draws[0] != draws[2]


def test_sampled_depths_cover_the_range_and_every_layer_is_logged_by_pass() -> None:
    rows = fit(make_module(make_model(sample_depth=[1, 3])))
    passes = [{int(n.split("/")[2].removeprefix("pass")) for n in row if n.startswith("moe/")} for row in rows.values()]
    assert {max(found) + 1 for found in passes} == {1, 2, 3}
    assert rows == fit(make_module(make_model(sample_depth=[1, 3])))


def test_every_validation_loss_is_a_mean_over_its_own_targets() -> None:
    """Batches whose targets lie differently for the two heads; rows, and a batch, of nothing but padding."""
    tokens = [Tokens()[index].tokens for index in range(4)]
    tokens[0][:, 20:], tokens[1][1:, 5:], tokens[2][2:], tokens[3][:] = -1, -1, -1, -1
    model = make_model()
    model.config.moe.balance_loss, model.config.moe.z_loss, rows = 0.1, 0.1, Rows()
    module = make_module(model)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=rows, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.validate(module, DataLoader([Batch(each) for each in tokens], batch_size=None), verbose=False)  # type: ignore[arg-type]

    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    for index, each in enumerate(tokens):
        inputs = each.clamp(min=0)[:, :-1]
        section, _ = draw_section(inputs, model.config.tidar, MASK, module._seeded("val", index))
        output = model(inputs, section=section)
        assert output.mask_hidden is not None
        heads = (model.ar_head(output.hidden), each[:, 1:]), (
            model.diffusion_head(output.mask_hidden), each[:, section.positions()[0]]
        )  # fmt: skip
        for head, (logits, targets) in enumerate(heads):
            surprise = -logits.double().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            sums[head] += surprise[targets >= 0].sum().detach()
            counts[head] += (targets >= 0).sum()
    (row,) = rows.rows.values()
    ar, diffusion = (sums / counts).tolist()
    assert row["val/loss_ar"] == pytest.approx(ar, rel=1e-6)
    assert row["val/loss_diffusion"] == pytest.approx(diffusion, rel=1e-6)
    assert row["val/moe_penalty"] > 0
    assert row["val/loss"] == pytest.approx(ar + 0.5 * diffusion + row["val/moe_penalty"], rel=1e-6)


class Depths(lightning.Callback):
    """Keeps the recursion depth that every micro-batch was computed at."""

    def __init__(self) -> None:
        self.values: list[int] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        self.handle = module.model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model: ElaraLM, args: Any, kwargs: Any) -> None:
        self.values.append(kwargs["depth"])

    def on_train_batch_end(self, *args: Any) -> None:
        self.handle.remove()


def test_utilisation_counts_the_depths_that_were_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "peak_flops", lambda device: 1e12)
    model, depths = make_model(sample_depth=[1, 3]), Depths()
    rows = fit(make_module(model), depths, throughput.Throughput(), log_every_n_steps=3)
    assert list(rows) == [3, 6] and len(set(depths.values)) > 1
    for row, drawn in zip(rows.values(), (depths.values[:6], depths.values[6:]), strict=True):
        wanted = sum(throughput.flops_per_token(model, 32, depth) for depth in drawn) / len(drawn)
        assert row["train/mfu"] * 1e12 / row["train/tokens_per_second"] == pytest.approx(wanted)
