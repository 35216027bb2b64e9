"""From an open checkpoint to a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from elara.export.gguf_file import write_gguf
from elara.export.layout import UNROLLED, Piece, pieces
from elara.export.llama_cpp import Library
from elara.export.metadata import write_metadata
from elara.export.miniature import learned_types
from elara.export.quantize import CASTS, FILE_TYPES, Encoder, plain_types
from elara.export.source import Source, check_llama_limits
from elara.export.vocabulary import CONTROL, NO_MERGE, NORMAL, Vocabulary, chat_template, vocabulary

TINY = Vocabulary("byte", ["a", "<|end|>"], [NORMAL, CONTROL], [NO_MERGE], end=1, mask=1)  # of a miniature


def write_model(path: Path, source: Source, architecture: str, kind: str, library: Library | None) -> None:
    """Write the GGUF file of a checkpoint.

    architecture: UNROLLED or COMPACT. kind: one of FILE_TYPES that `check_type` lets pass. Raises ElaraError for what
    llama.cpp or the format cannot take, and when the file cannot be written.
    """
    if architecture == UNROLLED:
        check_llama_limits(source)
    tables = vocabulary(source.tokenizer, source.config.vocab_size)
    wanted = list(pieces(source.config, architecture, source.depth))
    if kind in CASTS or library is None:
        types = plain_types(wanted, kind)
    else:
        # a compact file's types are those of the physical blocks, each applied once
        depth = source.depth if architecture == UNROLLED else 1
        describe = _describe(source, TINY, UNROLLED, depth, kind="F32")
        types = learned_types(library, kind, wanted, list(pieces(source.config, UNROLLED, depth)), describe)
    encoder = Encoder(library)
    template = chat_template(tables) if source.chat else None
    try:
        write_gguf(
            path,
            architecture,
            wanted,
            types,
            partial(_read, source, encoder),
            _describe(source, tables, architecture, source.depth, kind, template),
        )
    finally:
        encoder.close()


def _describe(
    source: Source, tables: Vocabulary, architecture: str, depth: int, kind: str, template: str | None = None
) -> Callable[[GGUFWriter], None]:
    return lambda writer: write_metadata(
        writer,
        source.config,
        source.about,
        tables,
        architecture=architecture,
        depth=depth,
        file_type=FILE_TYPES[kind],
        template=template,
    )


def _read(source: Source, encoder: Encoder, piece: Piece, kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    if piece.weight is None:
        values = torch.zeros(piece.shape)
    else:
        values = source.weights.read(piece.weight)[piece.index].float()
    return encoder.encode(piece.names[0], values, kind)
