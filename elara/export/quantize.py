"""From a checkpoint's float32 weights to the types of a GGUF file: which tensor gets which type, and its bytes.

Vectors (norms, biases), the router and its selection bias stay F32 in every file. F32, F16 and BF16 are a cast of all
other tensors. Quantized types are llama.cpp's own: its choice for each tensor, its routine for the bytes. Without its
library the `gguf` package writes Q8_0, where llama.cpp's choice is the same type everywhere, and Q4_0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from numpy.typing import NDArray
from torch import Tensor

from elara.errors import ElaraError
from elara.export.gguf_file import row_bytes
from elara.export.layout import Piece
from elara.export.llama_cpp import HOW_TO_GET, Library, threads

FILE_TYPES = {  # llama.cpp's numbers (llama_ftype)
    "F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q5_K_S": 16, "Q4_K_M": 15, "Q4_K_S": 14,
    "Q4_0": 2,
}  # fmt: skip
CASTS = ("F32", "F16", "BF16")
PACKAGE = ("Q8_0", "Q4_0")  # what the gguf package can quantize to as well
CHUNK = 1 << 20  # values that a thread quantizes at a time

F32, F16, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16


def check_type(kind: str, library: Library | None) -> str | None:
    """What the user should know about writing this type here, or None.

    Raises ElaraError for a type that does not exist, or that needs llama.cpp's library when there is none.
    """
    if kind not in FILE_TYPES:
        raise ElaraError(f"quantize.type={kind} must be one of: {', '.join(FILE_TYPES)}")
    if library is not None or kind in CASTS or kind == "Q8_0":
        return None
    without = ", ".join((*CASTS, *PACKAGE))
    if kind not in PACKAGE:
        raise ElaraError(f"quantize={kind} needs llama.cpp's own quantizer: {HOW_TO_GET}; {without} work without it")
    return f"without llama.cpp's library no matrix but the embedding is better than {kind}; {HOW_TO_GET}"


def quantizable(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor takes the file's type at all; the others stay F32 (llama.cpp: tensor_allows_quantization)."""
    return (
        len(shape) > 1 and shape[-2] > 1 and name.endswith("weight") and "norm" not in name and "gate_inp" not in name
    )


def plain_types(pieces: Sequence[Piece], kind: str) -> dict[str, GGMLQuantizationType]:
    """Types without the library, by name in the file; rows that the type cannot take become F16, as with it."""
    wanted = GGMLQuantizationType[kind]
    types = {}
    for piece in pieces:
        for name in piece.names:
            types[name] = wanted if quantizable(name, piece.shape) else F32
            if kind == "Q4_0" and name in ("token_embd.weight", "diffusion.weight"):
                types[name] = GGMLQuantizationType.Q8_0
            if piece.shape[-1] % GGML_QUANT_SIZES[types[name]][0]:
                types[name] = F16
    return types


class Encoder:
    """Makes the bytes of tensors; uses every core, and llama.cpp's routine where there is its library."""

    def __init__(self, library: Library | None) -> None:
        self._library = library
        self._pool = ThreadPoolExecutor(threads())

    def encode(self, name: str, values: Tensor, kind: GGMLQuantizationType) -> NDArray[np.uint8]:
        """(..., width) float32 -> (..., row bytes); a stack of experts one at a time.

        Raises ElaraError when a value is not finite, or does not fit into float16.
        """
        if values.dim() < 3:
            return self._encode(name, values, kind)
        out = np.empty((*values.shape[:-1], row_bytes(kind, values.shape[-1])), np.uint8)
        for i, matrix in enumerate(values):
            out[i] = self._encode(name, matrix, kind)
        return out

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _encode(self, name: str, values: Tensor, kind: GGMLQuantizationType) -> NDArray[np.uint8]:
        values = values.contiguous()
        if not torch.isfinite(values).all():
            raise ElaraError(
                f"{name} holds values that are not finite: this training diverged, take another checkpoint"
            )
        if kind == F32:
            return values.numpy().view(np.uint8)
        if kind == F16 and values.abs().max() > torch.finfo(torch.float16).max:
            raise ElaraError(f"{name} holds values beyond float16's range: take quantize=BF16")
        if kind in (F16, BF16):
            return values.to(torch.float16 if kind == F16 else torch.bfloat16).view(torch.int16).numpy().view(np.uint8)
        if self._library is None:
            quantized: NDArray[np.uint8] = quants.quantize(values.numpy(), kind)
            return quantized
        return self._quantize(values, kind, self._library.functions)

    def _quantize(self, values: Tensor, kind: GGMLQuantizationType, call: Mapping[str, Any]) -> NDArray[np.uint8]:
        rows, width = values.shape
        out = np.empty((rows, row_bytes(kind, width)), np.uint8)
        if out.shape[1] != call["ggml_row_size"](kind, width):
            raise ElaraError(f"this build of llama.cpp stores {kind.name} in another way than the gguf package knows")
        call["ggml_quantize_init"](kind)
        step = max(1, CHUNK // width)

        def quantize(first: int) -> None:
            count = min(step, rows - first)
            call["ggml_quantize_chunk"](kind, values.data_ptr(), out.ctypes.data, first * width, count, width, None)

        list(self._pool.map(quantize, range(0, rows, step)))
        return out
