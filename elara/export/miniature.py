"""llama.cpp's choice of a type for every tensor, learned from llama.cpp: it quantizes a miniature of the file.

The miniature has the keys, layers, names and row lengths of the real one, and two rows of zeros in every matrix: the
choice depends on nothing else. So the real weights are never written twice, and no rule is copied that may change.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from numpy.typing import NDArray

from elara.errors import ElaraError
from elara.export.gguf_file import write_gguf
from elara.export.layout import UNROLLED, Piece
from elara.export.llama_abi import QuantizeParams
from elara.export.llama_cpp import Library
from elara.export.quantize import F32, FILE_TYPES, quantizable

ROWS = 2  # a matrix of one row would count as a vector


def learned_types(
    library: Library,
    kind: str,
    pieces: Sequence[Piece],
    miniature: Sequence[Piece],
    describe: Callable[[GGUFWriter], None],
) -> dict[str, GGMLQuantizationType]:
    """The type of every tensor of `pieces`, by its name in the file.

    miniature: the tensors of an hy_v3 file, which llama.cpp knows: `pieces` themselves, or those of the physical blocks
    for a compact file. What only a compact file holds follows its nearest kin: the diffusion head the embedding, the
    chain a query projection. describe: adds that file's keys. Raises ElaraError when llama.cpp cannot quantize it.
    """
    with tempfile.TemporaryDirectory(prefix="elara-miniature-") as folder:
        source, target = Path(folder, "f32.gguf"), Path(folder, "quantized.gguf")
        small = [replace(piece, shape=_few_rows(piece.shape)) for piece in miniature]
        write_gguf(source, UNROLLED, small, dict.fromkeys(_names(small), F32), _zeros, describe)
        quantize_file(library, source, target, kind)
        types = {tensor.name: tensor.tensor_type for tensor in GGUFReader(target).tensors}
    types["diffusion.weight"] = types["token_embd.weight"]
    types |= {f"chain_{name}.weight": types["blk.0.attn_q.weight"] for name in ("gate", "up", "down")}
    return {name: types[name] if quantizable(name, piece.shape) else F32 for piece in pieces for name in piece.names}


def quantize_file(library: Library, source: Path, target: Path, kind: str, count: int = 1) -> None:
    """llama.cpp's quantizer for whole files, which it must know. count: threads. Raises ElaraError in its words."""
    params = library.defaults("model_quantize", QuantizeParams)
    params.ftype, params.nthread = FILE_TYPES[kind], count
    library.complaint()
    if library.functions["llama_model_quantize"](os.fsencode(source), os.fsencode(target), ctypes.byref(params)):
        raise ElaraError(f"llama.cpp cannot quantize this model to {kind}: {library.complaint()}; take quantize=F16")


def _few_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) < 2 else (*shape[:-2], min(shape[-2], ROWS), shape[-1])


def _names(pieces: Sequence[Piece]) -> list[str]:
    return [name for piece in pieces for name in piece.names]


def _zeros(piece: Piece, kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    return np.zeros(piece.shape, np.float32).view(np.uint8)
