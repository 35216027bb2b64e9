"""The LightningModule: what one step computes. What happens around it lies in `callbacks`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from elara.data.batches import Batch
from elara.errors import ElaraError
from elara.model import ElaraLM
from elara.tokenizer import Tokenizer
from elara.training.balance import LoadBalancer, add_loads
from elara.training.losses import Lesson, Losses, elara_loss
from elara.training.metrics import Means, loss_figures
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
    uneven: not every token of a training window is a target, so that ranks have different numbers of them.
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
        self.val_means = Means(losses)
        self.load: Tensor | None = None  # (layers, passes, sections, experts) since the last log
        self.lr = 0.0  # rate of the last step, first parameter group
        self.latest: dict[str, float] = {}  # newest value of every figure recorded
        self.resumed_step = 0  # where training goes on, before the trainer has read its own state
        self.saved_weights: dict[str, Tensor] = {}  # passes from the trainer's checkpoint to ours
        self._generator = torch.Generator()

    @property
    def step(self) -> int:
        """Optimizer steps done, those before a resume included."""
        return max(self.trainer.global_step, self.resumed_step)

    def step_ends(self, batch_idx: int) -> bool:
        """Whether this micro-batch is the last one of its optimizer step."""
        return (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0

    @property
    def logs(self) -> bool:
        """Whether the figures of the step just done are to be logged."""
        return self.trainer.global_step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined,no-any-return]

    def validates(self, batch_idx: int) -> bool:
        """Whether a validation follows this micro-batch."""
        every = self.trainer.val_check_batch
        due = self.trainer.should_stop or (isinstance(every, int) and (batch_idx + 1) % every == 0)
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
        """Let dropout differ between ranks; `ExactResume` brings back what it was."""
        if self.global_rank:
            torch.manual_seed(_mix(self.seed, "rank", self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss of this micro-batch."""
        torch.set_autocast_cache_enabled(True)  # Lightning has it off; recursion would cast each weight once per pass
        generator, place = self._seeded("train", batch_idx), (self.global_rank, self.trainer.world_size)
        batch, lesson, written = self._taught(batch, batch_idx)
        uneven = self.uneven or written
        losses = elara_loss(
            self.model, batch.tokens, generator, self.tokenizer.mask_id, depth=self.depth(), place=place,
            weights=batch.weights, lesson=lesson, over_ranks=self._mean_over_ranks if uneven and place[1] > 1 else None,
        )  # fmt: skip
        self.balancer.add(losses.routing)
        means = self.written_means if written else self.train_means
        means.update(self._parts(losses, means))
        return losses.total

    def _taught(self, batch: Batch, batch_idx: int) -> tuple[Batch, Lesson | None, bool]:
        """A batch, what teachers say of it, and whether the student wrote it itself, as it does in some steps."""
        if self.teaching is None:
            return batch, None, False
        drawn = _mix(self.seed, "on_policy", self.trainer.global_step) / (1 << 63)
        if drawn >= self.teaching.settings.on_policy:
            return batch, self.teaching.lesson(batch), False
        seed = (_mix(self.seed, "written", batch_idx) >> 1) + self.global_rank * len(batch.tokens)
        return *self.teaching.on_policy(self.model, self.tokenizer, batch, seed), True

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
        targets = tokens[:, 1:] >= 0 if weights is None else weights[:, 1:] > 0
        self.val_means.update(self._parts(losses, self.val_means), targets.sum())

    def on_validation_epoch_end(self) -> None:
        """Record the figures of the whole validation under val/."""
        figures = {f"val/{name}": value for name, value in self.val_means.read().items()}
        figures |= loss_figures("val", figures["val/loss_ar"], self.chars_per_token)
        self.record(figures)
        self.log_dict(figures, logger=False)  # for callbacks that monitor, e.g. EarlyStopping; the same on every rank

    def record(self, figures: Mapping[str, float]) -> None:
        """Send plain numbers to every logger under the current step."""
        self.latest.update(figures)
        for logger in self.loggers:
            logger.log_metrics(dict(figures), step=self.step)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self._optimizer(self.model)
        schedule = LambdaLR(optimizer, self._schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

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

    def _mean_over_ranks(self, count: Tensor) -> Tensor:
        torch.distributed.all_reduce(count)
        return count / self.trainer.world_size

    def _seeded(self, purpose: str, batch_idx: int) -> torch.Generator:
        # the last 0 was the rank, when ranks drew sections of their own: runs from then go on as they began
        return self._generator.manual_seed(_mix(self.seed if purpose == "train" else 0, purpose, batch_idx, 0))


def _mix(*parts: int | str) -> int:
    """A 63-bit number that depends on all parts and on nothing else."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_finite(figures: Mapping[str, float], step: int) -> None:
    """Raise ElaraError when a loss is not a number: what follows would train on nonsense."""
    for name, value in figures.items():
        if "loss" in name and value != value:
            raise ElaraError(f"{name} is nan at step {step}: lower optimizer.lr or set trainer.gradient_clip_val")
