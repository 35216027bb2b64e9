"""The LightningModule: what one step computes. What happens around it lies in `callbacks`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from elara.checkpoint import is_finite
from elara.data.batches import Batch, FirstBatch
from elara.device import to_device
from elara.errors import NotFinite
from elara.model import ElaraLM, block_positions, draw_starts
from elara.tokenizer import Tokenizer
from elara.training.balance import LoadBalancer, add_loads
from elara.training.losses import Counts, Lesson, Losses, count_targets, elara_loss
from elara.training.metrics import Means, loss_figures
from elara.training.optimizers import configure, hyperparameters
from elara.training.schedules import Factor
from elara.training.sharding import FSDP
from elara.training.teaching import Teaching

WRITTEN = "_on_policy"  # ends the names of teachers' losses on what the student wrote itself


class ElaraModule(lightning.LightningModule):
    """Losses, optimizer step and balance of one model.

    Every random choice of a step, but dropout's, is a pure function of (seed, step, micro-batch) and the row of the
    global batch: two ranks compute what one with twice the batch would. Figures stay on the device as tensors; the
    callbacks read them every `log_every_n_steps`.

    optimizer: builds the optimizer from the model. schedule: gives the factor on its rate as a function of the step.
    teaching: what teachers say of a batch; None without any.
    uneven: not every token of a training window is a target, so that batches have different numbers of them. With
    accumulation the loader must then be an `elara.data.batches.Steps`.
    """

    def __init__(
        self,
        model: ElaraLM,
        tokenizer: Tokenizer,
        *,
        seed: int,
        optimizer: Callable[[ElaraLM], torch.optim.Optimizer],
        schedule: Factor,
        chars_per_token: float | None = None,
        uneven: bool = False,
        teaching: Teaching | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.seed = seed
        self.chars_per_token = chars_per_token
        self.uneven, self.teaching = uneven, teaching
        self.strict_loading = False  # the trainer's state holds no weights: they come from model.safetensors
        self._optimizer, self._schedule = optimizer, schedule
        self.balancer = LoadBalancer(model, model.config.moe.bias_update_rate)
        losses = ["loss", "loss_ar"]
        losses += ["loss_diffusion"] if model.config.tidar.block_length else []
        losses += ["moe_penalty"] if model.config.moe.balance_loss or model.config.moe.z_loss else []
        heard = [] if teaching is None else teaching.figures(model.config.tidar.block_length > 0)
        self.train_means = Means([*losses, *(f"loss_{name}" for name in heard)])
        self.written_means = Means([f"loss_{name}{WRITTEN}" for name in heard])  # of what the student wrote itself
        self.grad_means = Means(("grad_norm",))
        self.val_means = Means(losses[1:])  # each by its own counts; the loss is made of them
        self.load: Tensor | None = None  # (layers, passes, sections, experts) since the last log
        self.lr = 0.0  # rate of the last step, first parameter group
        self.latest: dict[str, float] = {}  # newest value of every figure recorded
        self.resumed_step = 0  # where training goes on, before the trainer has read its own state
        self.saved_weights: dict[str, Tensor] = {}  # passes from the trainer's checkpoint to ours
        self._generator = torch.Generator()
        self._begun = -1  # optimizer step whose counts these are
        self._counts: Counts | None = None  # what its means divide by; None = every micro-batch counts alike
        self._written: list[tuple[Batch, Lesson]] = []  # by the student, for the micro-batches to come

    @property
    def step(self) -> int:
        """Optimizer steps done, those before a resume included."""
        return max(self.trainer.global_step, self.resumed_step)

    @property
    def batches_since_start(self) -> int:
        """Batches that this rank has read since this process began to train."""
        micro_batches: int = self.trainer.fit_loop.total_batch_idx + 1
        return micro_batches - self.resumed_step * self.trainer.accumulate_grad_batches

    def step_ends(self, batch_idx: int) -> bool:
        """Whether this micro-batch is the last one of its optimizer step."""
        return (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0

    @property
    def logs(self) -> bool:
        """Whether the figures of the step just done are to be logged."""
        return self.trainer.global_step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined,no-any-return]

    @property
    def stops(self) -> bool:
        """Whether training ends now, because a callback asked for it and trainer.min_steps is reached."""
        return self.trainer.should_stop and self.trainer.fit_loop._can_stop_early

    def validates(self, batch_idx: int) -> bool:
        """Whether a validation follows this micro-batch."""
        every = self.trainer.val_check_batch
        due = self.stops or (isinstance(every, int) and (batch_idx + 1) % every == 0)
        return self.trainer.enable_validation and due

    def depth(self) -> int | None:
        """Recursion depth of this step, the same for all its micro-batches and ranks; None = the model's own."""
        bounds = self.model.config.trm.sample_depth
        if bounds is None:
            return None
        low, high = bounds
        return low + _mix(self.seed, "depth", self.trainer.global_step) % (high - low + 1)

    def configure_model(self) -> None:
        """Shard the model where the strategy does so (`elara.training.sharding`)."""
        if isinstance(self.trainer.strategy, FSDP):
            self.trainer.strategy.shard(self.model)

    def on_train_start(self) -> None:
        """Rates and decays are the configuration's, also where the trainer restored an optimizer that had others.

        Dropout differs between ranks; `ExactResume` brings back what it was.
        """
        self._begun = -1
        configure(self.trainer.optimizers[0], self._rates, self._hyperparameters)
        if self.global_rank:
            torch.manual_seed(_mix(self.seed, "rank", self.global_rank))

    def training_step(self, batch: Batch | FirstBatch, batch_idx: int) -> Tensor:
        """Returns the part of this micro-batch in the loss of its step, times their number: Lightning divides by it.

        The loss of a step is the mean over all targets of all its micro-batches and ranks.
        """
        torch.set_autocast_cache_enabled(True)  # Lightning has it off; recursion would cast each weight once per pass
        batch, ahead = (Batch(*batch[:3]), batch.ahead) if isinstance(batch, FirstBatch) else (batch, ())
        if self._begun != self.trainer.global_step:
            self._begin_step([batch, *ahead], batch_idx)
        written = bool(self._written)
        batch, lesson = self._written.pop(0) if written else (batch, self._lesson(batch))

        generator, place = self._seeded("train", batch_idx), (self.global_rank, self.trainer.world_size)
        losses = elara_loss(
            self.model, batch.tokens, generator, self.tokenizer.mask_id, depth=self.depth(), place=place,
            weights=batch.weights, lesson=lesson, counts=self._counts,
        )  # fmt: skip
        self.balancer.add(losses.routing)
        means = self.written_means if written else self.train_means
        means.update(self._parts(losses, means))
        return losses.total

    def _begin_step(self, batches: list[Batch], batch_idx: int) -> None:
        """Let the student write this step's micro-batches, if it does, and count all that the step learns from."""
        self._begun = self.trainer.global_step
        self._written = self._write(batches, batch_idx)
        if self._written:
            batches = [written for written, _ in self._written]
        self._counts = self._count(batches, batch_idx, uneven=self.uneven or bool(self._written))

    def _count(self, batches: list[Batch], batch_idx: int, *, uneven: bool) -> Counts | None:
        """What this step's means divide by, per micro-batch and rank; None where all of these count alike.

        Blocks of other places may be one more or fewer, where the windows are no multiple of their length.
        """
        config, seq = self.model.config.tidar, batches[0].tokens.shape[1] - 1
        size = self.trainer.accumulate_grad_batches
        uneven = uneven or batches[0].weights is not None
        blocks_differ = size > 1 and config.block_length > 0 and seq % config.block_length > 0
        ranks = self.trainer.world_size if uneven else 1
        if not blocks_differ and (not uneven or size * ranks == 1):
            return None
        if len(batches) < size:
            assert not uneven, "the batches of a step count differently: give the loader to elara.data.batches.Steps"
            batches = batches[:1] * size

        device = batches[0].tokens.device
        total = torch.zeros(3, device=device)
        for index, batch in enumerate(batches, batch_idx):
            places = None
            if config.block_length:
                starts = draw_starts(seq, config, self._seeded("train", index))
                places = to_device(block_positions(starts, config.block_length), device)
            total += count_targets(batch.tokens, batch.weights, places, config)
        if ranks > 1:
            torch.distributed.all_reduce(total)
        return Counts(*(total / (size * ranks)).unbind())

    def _lesson(self, batch: Batch) -> Lesson | None:
        """What teachers say of a batch."""
        return None if self.teaching is None else self.teaching.lesson(batch)

    def _write(self, batches: Sequence[Batch], batch_idx: int) -> list[tuple[Batch, Lesson]]:
        """What the student itself writes in place of a step's batches, and what teachers say of it; in some steps."""
        if self.teaching is None:
            return []
        drawn = _mix(self.seed, "on_policy", self.trainer.global_step) / (1 << 63)
        if drawn >= self.teaching.settings.on_policy:
            return []
        written = []
        for index, batch in enumerate(batches, batch_idx):
            seed = (_mix(self.seed, "written", index) >> 1) + self.global_rank * len(batch.tokens)
            written.append(self.teaching.on_policy(self.model, self.tokenizer, batch, seed))
        return written

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Ask for a validation behind the last step, so that a run never ends without one."""
        if self.trainer.max_steps == self.trainer.global_step + 1 and self.step_ends(batch_idx):
            self.trainer.should_stop = True

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm and keep the norm, which Lightning would throw away; other algorithms are Lightning's."""
        if gradient_clip_algorithm not in (None, "norm"):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        limit = float(gradient_clip_val) if gradient_clip_val else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.grad_means.update([norm.full_tensor() if isinstance(norm, DTensor) else norm])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer's step, then the move of the selection biases."""
        self.lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        super().optimizer_step(*args, **kwargs)
        load = self.balancer.step()
        if load is not None:
            self.load = add_loads(self.load, load)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses with the same mask sections at every validation."""
        generator, place = self._seeded("val", batch_idx), (self.global_rank, self.trainer.world_size)
        tokens, weights = batch.tokens, None if batch.weights is None else (batch.weights > 0).float()
        losses = elara_loss(self.model, tokens, generator, self.tokenizer.mask_id, place=place, weights=weights)
        counts = {"loss_ar": losses.counts.ar, "loss_diffusion": losses.counts.diffusion}
        counts["moe_penalty"] = losses.counts.text
        self.val_means.update(self._parts(losses, self.val_means), [counts[name] for name in self.val_means.names])

    def on_validation_epoch_end(self) -> None:
        """Record the figures of the whole validation under val/."""
        means = self.val_means.read()
        diffusion = self.model.config.tidar.loss_weight * means.get("loss_diffusion", 0.0)
        means = {"loss": means["loss_ar"] + diffusion + means.get("moe_penalty", 0.0), **means}
        figures = {f"val/{name}": value for name, value in means.items()}
        figures |= loss_figures("val", figures["val/loss_ar"], self.chars_per_token)
        self.record(figures)
        self.check_finite(figures)
        self.log_dict(figures, logger=False)  # for callbacks that monitor, e.g. EarlyStopping; the same on every rank

    def on_train_end(self) -> None:
        """Let no run end well whose last losses were never read."""
        self.check_state()

    def check_finite(self, figures: Mapping[str, float | None]) -> None:
        """Raise NotFinite when a loss or the gradient's norm is nan or infinite: what follows would be nonsense."""
        try:
            check_finite(figures, self.step, scaled=self._scaled)
        except NotFinite as error:
            if self.teaching is not None:
                self.teaching.check()  # it may be a teacher's fault
            if not self.resumed_step:
                raise
            way_back = f"delete checkpoints/step-{self.resumed_step}, from which it went on, to go back further"
            raise NotFinite(f"{error}; if that does not help, {way_back}") from error

    def check_state(self) -> None:
        """The same for the weights and for figures that no log has read yet; every rank calls this at the same step."""
        state = self.model.state_dict().values()
        weights = torch.stack([is_finite(v.to_local() if isinstance(v, DTensor) else v) for v in state]).all()
        figures = {"a weight": weights}
        for means in (self.train_means, self.written_means, self.grad_means):
            named = zip(means.names, means.total[0].isfinite(), strict=True)
            figures |= {f"train/{name}": fine for name, fine in named}
        fine = torch.stack(list(figures.values())).to(self.device, torch.float32)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(fine, torch.distributed.ReduceOp.MIN)
        wrong = [name for name, whole in zip(figures, fine.tolist(), strict=True) if not whole]
        self.check_finite(dict.fromkeys(sorted(wrong, reverse=True)))  # a loss says more than a weight

    @property
    def _scaled(self) -> bool:
        """Whether steps of infinite gradients are passed over, as float16 needs it."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def record(self, figures: Mapping[str, float]) -> None:
        """Send plain numbers to every logger under the current step."""
        self.latest.update(figures)
        for logger in self.loggers:
            logger.log_metrics(dict(figures), step=self.step)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self._optimizer(self.model)
        self._rates = LambdaLR(optimizer, self._schedule)
        self._hyperparameters = hyperparameters(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._rates, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let Lightning count micro-batches as the configuration has them, also where it had others before."""
        done = self.resumed_step * self.trainer.accumulate_grad_batches
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (batches["total"], batches["current"]):
            counts.update(ready=done, started=done, processed=done, completed=done - 1)  # it was saved in its last hook

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Hand the weights over to `elara.checkpoint`, which stores them once, apart from the trainer's state."""
        self.saved_weights = {
            name.removeprefix("model."): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith("model.")
        }
        checkpoint["state_dict"] = {}

    def _parts(self, losses: Losses, means: Means) -> list[Tensor]:
        """The scalars that `means` names."""
        parts: dict[str, Tensor | None] = {
            "loss": losses.total, "loss_ar": losses.ar, "loss_diffusion": losses.diffusion
        }  # fmt: skip
        parts["moe_penalty"] = losses.penalty
        for name, value in losses.teachers.items():
            parts |= {f"loss_{name}": value, f"loss_{name}{WRITTEN}": value}
        return [part for name in means.names if (part := parts[name]) is not None]

    def _seeded(self, purpose: str, batch_idx: int) -> torch.Generator:
        # the last 0 was the rank, when ranks drew sections of their own: runs from then go on as they began
        return self._generator.manual_seed(_mix(self.seed if purpose == "train" else 0, purpose, batch_idx, 0))


def _mix(*parts: int | str) -> int:
    """A 63-bit number that depends on all parts and on nothing else."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_finite(figures: Mapping[str, float | None], step: int, *, scaled: bool = False) -> None:
    """Raise NotFinite when a loss, a penalty, the gradient's norm or a weight is nan or infinite; None = one of both.

    scaled: the gradient may be, as such steps are passed over.
    """
    for name, value in figures.items():
        gradient = name.endswith("grad_norm")
        told = "loss" in name or name.endswith(("penalty", "weight")) or (gradient and not scaled)
        if told and (value is None or not math.isfinite(value)):
            what = "nan or infinite" if value is None else value
            raise NotFinite(f"{name} is {what} at step {step}: lower optimizer.lr or set trainer.gradient_clip_val")
