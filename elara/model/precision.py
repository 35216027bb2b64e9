"""Weights in fewer bits, for inference: bfloat16, int8 and int4, on a CPU in the order that its kernels want.

What a decoding step reads is its weights, so their bytes are its time. bfloat16: a cast, and on a CPU oneDNN's order of
the weights, into which every product would bring them anew (1.3-2.2 times as long with up to 20 rows). int4: a scale
and a zero point per group of 32 inputs, fitted by least squares, bf16 activations. int8: a scale per output,
activations rounded to 8 bits per token. Norms, the router (float32), biases and the embedding's lookup stay as they are
in bfloat16; so does a matrix whose sizes the kernels cannot take (int4: inputs not a multiple of 32, or outputs not of
16).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from elara.config import PRECISIONS
from elara.errors import ElaraError
from elara.model.linear import Linear
from elara.model.lm import ElaraLM
from elara.model.mlp import swiglu
from elara.model.moe import Choice, Experts, Router, Weights

GROUP = 32  # inputs that share a scale in int4: the smallest that the kernel takes, the closest fit
TILE = 16  # outputs must be a multiple of it in int4
CHUNK = 1024  # outputs packed at once: whole blocks of the kernel's order on every CPU (64 with AVX512, else less)
ROWS = 8  # that oneDNN chooses its order of bf16 weights for; the same for 1 to 64
FIT_ROUNDS = 2  # of least squares; each costs a pass over the weights, the third gains less than 1 % of the error


@torch.no_grad()
def convert(model: ElaraLM, precision: str, fill: Callable[[str, nn.Module], None] | None = None) -> ElaraLM:
    """Bring a float32 model to one of `PRECISIONS`, in place and for inference only; returns the same model.

    fill: called with each part (embedding, block, head, ...) and its name right before the part is converted, to give
    it its float32 weights; so no more than one part is in memory in float32. int8 and int4 need a CPU, int8 one with
    VNNI. A packed model has no weights to train, save or convert again. Raises ElaraError for another precision or
    device.
    """
    if precision not in PRECISIONS:
        raise ElaraError(f"precision={precision} must be one of: {', '.join(PRECISIONS)}")
    parts = [*model.named_children(), *((f"blocks.{i}", block) for i, block in enumerate(model.blocks))]
    for name, part in parts:
        if part is model.blocks:
            continue
        if fill is not None:
            fill(name, part)
        if part is model.embed and _is_packed(precision, model.embed.weight.device):
            model.packed_head = pack(model.embed.weight, None, precision)
        if precision != "float32":
            _convert_part(model, name, part, precision)
    return model.eval().requires_grad_(False)


def _convert_part(model: ElaraLM, name: str, part: nn.Module, precision: str) -> None:
    if model.packed_head is not None:
        if isinstance(part, nn.Linear):
            setattr(model, name, pack(part.weight, part.bias, precision))
        else:
            _pack_children(part, precision)
    for module in part.modules():
        if not isinstance(module, Router | PackedBFloat16 | PackedInt8 | PackedInt4):
            for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if value.dtype == torch.float32:
                    setattr(module, key, _cast(value))


def _is_packed(precision: str, device: torch.device) -> bool:
    """Whether weights are kept in a kernel's own order; raises ElaraError where the kernel is missing."""
    if precision == "float32":
        return False
    if precision == "bfloat16":
        return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if device.type != "cpu":
        raise ElaraError(f"precision={precision} needs the CPU so far, not {device.type}: use bfloat16 there")
    if precision == "int8" and not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
        raise ElaraError("precision=int8 needs a CPU with VNNI instructions, this one has none: use int4 or bfloat16")
    return True


def pack(weight: Tensor, bias: Tensor | None, precision: str) -> nn.Module:
    """A module that computes x @ weight.T + bias in int8 or int4, or else in bfloat16; weight: (outputs, inputs)."""
    outputs, inputs = weight.shape
    if precision == "int8":
        return PackedInt8(weight, bias)
    if precision == "int4" and inputs % GROUP == 0 and outputs % TILE == 0:
        return PackedInt4(weight, bias)
    if _is_packed("bfloat16", weight.device):
        return PackedBFloat16(weight, bias)
    linear = Linear(inputs, outputs, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(torch.bfloat16), requires_grad=False)
    return linear


class PackedBFloat16(nn.Module):
    """A linear layer of bf16 weights in oneDNN's order."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        cast = weight.to(torch.bfloat16).contiguous()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(cast, ROWS))
        self.register_buffer("bias", None if bias is None else bias.to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs) -> (..., outputs), bf16."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


class PackedInt4(nn.Module):
    """A linear layer of 4-bit weights, unpacked in registers: the fastest for one row, not for many."""

    weight: Tensor  # uint8, two weights a byte, in the kernel's order
    scales: Tensor  # (inputs / GROUP, outputs, 2), bf16: scale and zero point
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        packed, scales = [], []
        for part in weight.split(CHUNK):  # all at once would take ten times the float's memory
            levels, scale = quantize_int4(part.float())
            packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 2))
            scales.append(scale)
        self.register_buffer("weight", torch.cat(packed))
        self.register_buffer("scales", torch.cat(scales, 1))
        self.register_buffer("bias", None if bias is None else bias.to(torch.bfloat16))
        self.outputs = len(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs) -> (..., outputs), bf16."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, GROUP, self.scales)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.outputs)


class PackedInt8(nn.Module):
    """A linear layer of 8-bit weights and activations, the latter scaled per token: for many rows of large matrices."""

    weight: Tensor  # int8 in oneDNN's order
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight.float()
        scales = (weight.abs().amax(1) / 127).clamp(min=1e-12)
        levels = (weight / scales[:, None]).round_().to(torch.int8)
        self.outputs = len(levels)
        self.register_buffer("weight", torch.ops.onednn.qlinear_prepack(levels, None))
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", torch.zeros(self.outputs, dtype=torch.long))
        self.register_buffer("bias", None if bias is None else bias.to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs) -> (..., outputs), bf16."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        unit = rows.abs().amax(1, keepdim=True).to(torch.bfloat16).mul_(1 / 126).clamp_(min=1e-12)  # rounded: <= 127
        levels = (rows / unit.float()).add_(128.5).to(torch.uint8)  # unsigned: with signed ones oneDNN is slow
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, 128, self.weight, self.scales, self.zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )
        y = y.mul_(unit)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.outputs)


class PackedExperts(Experts):
    """Routed experts, each with two packed matrices."""

    def __init__(self, experts: Experts, precision: str) -> None:
        nn.Module.__init__(self)
        self.gate_ups = nn.ModuleList(pack(weight, None, precision) for weight in experts.gate_up.unbind(0))
        self.downs = nn.ModuleList(pack(weight, None, precision) for weight in experts.down.unbind(0))
        empty = torch.empty(len(self.downs), 0, dtype=torch.bfloat16)
        self.stand_in: Weights = (empty, empty)

    def weights(self, device_type: str) -> Weights:
        """Two empty stacks, as long as there are experts."""
        return self.stand_in

    def forward(self, x: Tensor, choice: Choice, weights: Weights) -> Tensor:
        """x: (tokens, n_embd) -> (tokens, n_embd): the gate-weighted sum over each token's experts."""
        return self._decode(x, choice, weights)

    def expert(self, index: int, x: Tensor, weights: Weights) -> Tensor:
        gate_up, down = self.gate_ups[index], self.downs[index]
        y: Tensor = down(swiglu(gate_up(x)))
        return y


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit levels and scales with weight = (level - 8) * scale + zero, a scale and a zero per group of inputs.

    weight: float32 (outputs, inputs). Begins with each group's range and refits scale and zero by least squares.
    Returns int32 levels 0..15 (outputs, inputs) and bf16 (inputs / GROUP, outputs, 2), scale first.
    """
    outputs, inputs = weight.shape
    w = weight.view(outputs, -1, GROUP)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale = _bf16((high - low) / 15)
    zero = _bf16(low + 8 * scale)
    for _ in range(FIT_ROUNDS):
        levels = _levels(w, scale, zero)
        mean, centre = levels.mean(-1, keepdim=True), w.mean(-1, keepdim=True)
        spread = levels - mean
        slope = (spread * (w - centre)).sum(-1, keepdim=True) / spread.square().sum(-1, keepdim=True).clamp(min=1e-6)
        scale = _bf16(slope)
        zero = _bf16(centre - scale * mean)
    packed = torch.cat([scale, zero], -1).transpose(0, 1).to(torch.bfloat16).contiguous()
    return (_levels(w, scale, zero) + 8).view(outputs, inputs).to(torch.int32), packed


def _levels(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((w - zero) / scale.clamp(min=1e-12)).round_().clamp_(-8, 7)


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _cast(value: Tensor) -> Tensor:
    cast = value.to(torch.bfloat16)
    return nn.Parameter(cast, requires_grad=False) if isinstance(value, nn.Parameter) else cast


def _pack_children(module: nn.Module, precision: str) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, pack(child.weight, child.bias, precision))
        elif isinstance(child, Experts):
            setattr(module, name, PackedExperts(child, precision))
        else:
            _pack_children(child, precision)
