#!/usr/bin/env python3
"""Elara in one file: reads a GGUF file and writes text, with numpy alone. Copy it anywhere and run it:

    python elara.py model.gguf "Once upon" [--tidar] [--tokens 200] [--temperature 0.8] [--seed 1]

It reads the architectures `elara` (one copy of each block, recursion, diffusion head) and `hy_v3` (unrolled, as for
llama.cpp). Weights stay quantized where they are mapped: a product unpacks a tile of rows at a time, small enough for
the processor's cache. Where torch is installed, its int4 and int8 kernels take the products of a few tokens.
"""

from __future__ import annotations

import argparse
import codecs
import importlib
import math
import mmap
import os
import re
import struct
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# Types of tensors: name, weights in a block, bytes of a block. Then the forms of numbers among the keys
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
}  # fmt: skip
FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
U32, STRING, LIST, U64 = 4, 8, 9, 10
PREFILL = 256  # tokens of a prompt that are read at once
TILE = 1 << 19  # weights that a thread unpacks at once: fewer waste time on calls, more fall out of the cache
FEW, PACKED = 8, 24  # tokens up to which sums are scaled instead of weights; up to which torch's kernels are faster


class GGUFError(ValueError):
    """What is wrong with a file or a request, in one sentence."""


class Reader:
    """A mapped GGUF file; every count and offset in its header is held against its size before it is believed."""

    def __init__(self, path: str) -> None:
        self.path, self.at, self.data = path, 0, b""
        try:
            with open(path, "rb") as file:
                self.data: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            self.fail(getattr(error, "strerror", None) or "the file is empty")
        if self.take(4) != b"GGUF" or (version := self.number(U32)) not in (2, 3):
            self.fail("this is no GGUF file of version 2 or 3")
        tensors, keys = self.number(U64), self.number(U64)
        self.need(tensors * 24 + keys * 13)
        self.keys = dict((self.text(), self.value(self.number(U32))) for _ in range(keys))
        self.tensors = dict((self.text(), self.place()) for _ in range(tensors))
        step = self.keys.get("general.alignment", 32)
        if not isinstance(step, int) or step < 1 or step & (step - 1):
            self.fail(f"the alignment {step!s:.20} is no power of two")
        self.base = -(-self.at // step) * step

    def fail(self, what: str) -> Any:
        raise GGUFError(f"{self.path}: {what}")

    def need(self, size: int) -> None:
        if size > len(self.data) - self.at:
            self.fail("the file is truncated or damaged: it ends within its header")

    def take(self, size: int) -> bytes:
        self.need(size)
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def number(self, kind: int) -> Any:
        return struct.unpack(FORMS[kind], self.take(struct.calcsize(FORMS[kind])))[0]

    def text(self) -> str:
        return self.take(self.number(U64)).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind in FORMS:
            return self.number(kind)
        kind, count = (self.number(U32), self.number(U64)) if kind == LIST else (-1, 0)
        if kind == STRING:
            self.need(count * 8)
            return [self.text() for _ in range(count)]
        if kind not in FORMS:
            self.fail("a key has a value of unknown type")
        return np.frombuffer(self.take(count * struct.calcsize(FORMS[kind])), FORMS[kind])

    def place(self) -> tuple[tuple[int, ...], int, int]:
        if not 1 <= (axes := self.number(U32)) <= 4:
            self.fail(f"a tensor has {axes} axes")
        return tuple(self.number(U64) for _ in range(axes))[::-1], self.number(U32), self.number(U64)

    def key(self, name: str, kind: type = int, default: Any = None) -> Any:
        """A key's value; numbers must not be negative."""
        value = self.keys.get(name, default)
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind or (kind in (int, float) and not 0 <= value < 1 << 40):
            self.fail(f"the key {name} is {'missing' if value is None else f'unusable: {value!s:.40}'}")
        return value

    def tensor(self, name: str, *shape: int) -> Any:
        """The tensor of that name and shape: float32 for one axis, a Matrix for two, a list of them for three."""
        if name not in self.tensors:
            self.fail(f"it lacks the tensor {name}")
        found, kind, offset = self.tensors[name]
        if found != shape:
            self.fail(f"tensor {name} has the shape {found}, not {shape}")
        if kind not in TYPES:
            self.fail(f"{name} is quantized as type {kind}; known are {', '.join(each[0] for each in TYPES.values())}")
        _, weights, size = TYPES[kind]
        rows, row = math.prod(shape[:-1]), shape[-1] // weights * size
        if shape[-1] % weights or not rows * row or self.base + offset + rows * row > len(self.data):
            self.fail(f"the file is truncated or damaged: tensor {name} does not lie within it")
        raw = np.frombuffer(self.data, np.uint8, rows * row, self.base + offset)
        found = [Matrix(part, kind, shape[-1]) for part in raw.reshape(math.prod(shape[:-2]), -1, row)]
        return found if len(shape) == 3 else found[0] if len(shape) == 2 else found[0].rows(slice(None))[0]


# Each type's function takes blocks, uint8 (rows, blocks, bytes), and gives weights = levels * scales - minima as
# levels (*groups, rows, blocks, k), scales and minima (*groups or ones, rows, blocks); minima may be None.
buffers = threading.local()  # that a thread uses again: fresh memory would cost page faults


def _buffer(name: str, shape: tuple[int, ...], kind: Any) -> Array:
    found: Array | None = getattr(buffers, name, None)
    if found is None or found.size < math.prod(shape):
        setattr(buffers, name, found := np.empty(math.prod(shape), kind))
    return found[: math.prod(shape)].reshape(shape)


def _half(b: Array) -> Array:
    """The float16 numbers in some bytes of each block, (numbers, rows, blocks)."""
    return np.moveaxis(np.ascontiguousarray(b).view("<f2"), -1, 0).astype(np.float32, order="C")


def _nibbles(b: Array, offset: int) -> Array:
    """All bytes' low halves, then the high ones, (2, rows, blocks, bytes): to pick some would cost more than it saves."""
    levels, wide = _buffer("levels", (2, *b.shape), np.uint8), _buffer("wide", (2, *b.shape), np.float32)
    np.bitwise_and(b, 15, out=levels[0])
    np.right_shift(b, 4, out=levels[1])
    if offset:
        levels -= np.uint8(offset)
    np.copyto(wide, levels.view(np.int8))
    return wide


def _q4_0(b: Array) -> tuple[Array, Array, Array | None]:
    return _nibbles(b, 8)[..., 2:], _half(b[..., :2]), None


def _q8_0(b: Array) -> tuple[Array, Array, Array | None]:
    np.copyto(wide := _buffer("wide", b.shape, np.float32), b.view(np.int8))
    return wide[..., 2:], _half(b[..., :2])[0], None


def _k_scales(b: Array) -> Array:
    """Scales and minima, (2, 8, rows, blocks): two float16 times sixteen numbers of 6 bits in 12 bytes."""
    first, second, rest = np.moveaxis(np.ascontiguousarray(b[..., 4:16]).view("<u4"), -1, 0)
    words = np.stack([
        first & 0x3F3F3F3F, (rest & 0x0F0F0F0F) | (first >> 2 & 0x30303030),
        second & 0x3F3F3F3F, (rest >> 4 & 0x0F0F0F0F) | (second >> 2 & 0x30303030),
    ])  # fmt: skip
    numbers = np.moveaxis(words.view(np.uint8).reshape(*words.shape, 4), -1, 1).astype(np.float32, order="C")
    return numbers.reshape(2, 8, *words.shape[1:]) * _half(b[..., :4])[:, None]


def _q4_k(b: Array) -> tuple[Array, Array, Array | None]:
    levels = _nibbles(b, 0)[..., 16:].reshape(2, *b.shape[:2], 4, 32).transpose(3, 0, 1, 2, 4)
    scales, minima = _k_scales(b).reshape(2, 4, 2, *b.shape[:2])
    return levels, scales, minima


def _q5_k(b: Array) -> tuple[Array, Array, Array | None]:
    levels, wide = (_buffer(n, (4, 2, *b.shape[:2], 32), t) for n, t in (("levels", np.uint8), ("wide", np.float32)))
    low, high = b[..., 48:].reshape(*b.shape[:2], 4, 32).transpose(2, 0, 1, 3), np.ascontiguousarray(b[..., 16:48])
    np.bitwise_and(low, 15, out=levels[:, 0])
    np.right_shift(low, 4, out=levels[:, 1])
    for bit in range(8):
        levels[bit // 2, bit % 2] |= (high >> bit & 1) << 4
    np.copyto(wide, levels)
    scales, minima = _k_scales(b).reshape(2, 4, 2, *b.shape[:2])
    return wide, scales, minima


def _q6_k(b: Array) -> tuple[Array, Array, Array | None]:
    shape = (2, 2, 2, *b.shape[:2], 32)  # half, nibble, quarter: the order of the weights
    levels, wide = _buffer("levels", shape, np.uint8), _buffer("wide", shape, np.float32)
    low = b[..., :128].reshape(*b.shape[:2], 2, 2, 32).transpose(2, 3, 0, 1, 4)
    high = np.ascontiguousarray(b[..., 128:192].reshape(*b.shape[:2], 2, 32).transpose(2, 0, 1, 3))
    np.bitwise_and(low, 15, out=levels[:, 0])
    np.right_shift(low, 4, out=levels[:, 1])
    for i, bits in enumerate((high << 4, high << 2, high, high >> 2)):
        levels[:, i // 2, i % 2] |= bits & 0x30
    levels -= np.uint8(32)
    np.copyto(wide, levels.view(np.int8))
    scales = np.moveaxis(b[..., 192:208].view(np.int8), -1, 0).astype(np.float32, order="C") * _half(b[..., 208:])
    return wide.reshape(*shape[:-1], 2, 16).transpose(0, 1, 2, 5, 3, 4, 6), scales.reshape(2, 2, 2, 2, *b.shape[:2]), None


UNPACK = {2: _q4_0, 8: _q8_0, 12: _q4_k, 13: _q5_k, 14: _q6_k}


class Matrix:
    """Weights as they lie in the file, uint8 (rows, bytes of a row), of one of TYPES."""

    def __init__(self, raw: Array, kind: int, width: int) -> None:
        self.raw, self.kind, self.width = raw, kind, width
        self.packed: Any = None  # torch's form of it: a function of bfloat16 (tokens, width)

    def unpack(self, part: Any) -> tuple[Array, Array, Array | None]:
        return UNPACK[self.kind](self.raw[part].reshape(len(self.raw[part]), -1, TYPES[self.kind][2]))

    def rows(self, part: Any) -> Array:
        """Some rows as float32, (rows, width)."""
        if self.kind == 0:
            return self.raw[part].view("<f4")
        if self.kind == 30:
            return (self.raw[part].view("<u2").astype(np.uint32) << 16).view(np.float32)
        if self.kind == 1:  # by moving bits, as numpy's own cast takes ten times as long; not for infinities
            wide: Array = ((self.raw[part].view("<i2").astype(np.int32) << 13) & -0x70002000).view(np.float32)
            return wide * np.float32(2.0**112)
        levels, scales, minima = self.unpack(part)
        out: Array = np.moveaxis(levels, (-3, -2), (0, 1)) * np.moveaxis(scales, (-2, -1), (0, 1))[..., None]
        if minima is not None:
            out -= np.moveaxis(minima, (-2, -1), (0, 1))[..., None]
        return out.reshape(-1, self.width)

    def product(self, x: Array, out: Array, part: slice) -> None:
        """out[:, part] = x @ rows(part).T"""
        if self.kind not in UNPACK or len(x) > FEW:
            np.matmul(x, self.rows(part).T, out=out[:, part])
            return
        levels, scales, minima = self.unpack(part)
        *groups, rows, blocks, k = levels.shape
        x = np.ascontiguousarray(np.moveaxis(x.T.reshape(blocks, *groups, k, -1), 0, -3))  # (*groups, blocks, k, tokens)
        sums = np.matmul(levels.swapaxes(-3, -2), x).reshape(-1, blocks, rows, x.shape[-1])
        scales = np.broadcast_to(scales, levels.shape[:-1]).reshape(-1, rows, blocks)
        out[:, part] = np.einsum("gbrt,grb->tr", sums, scales)
        if minima is not None:
            minima, x = minima.reshape(-1, rows, blocks), x.sum(-2).reshape(-1, blocks, x.shape[-1])
            out[:, part] -= np.einsum("grb,gbt->tr", minima, x)

    def pack(self, torch: Any) -> None:
        """Repack for torch's kernels: types of 4 bits with scales rounded to bfloat16, wider ones in 8 bits a row."""
        aten, forms, scales = torch.ops.aten, [], []
        if self.kind not in UNPACK or len(self.raw) % 16:
            return
        for part in (slice(i, i + 1024) for i in range(0, len(self.raw), 1024)):
            if self.kind in (2, 12):
                levels, scale, minima = self.unpack(part)
                levels = np.moveaxis(levels, (-3, -2), (0, 1)).reshape(-1, self.width) + (8 if minima is None else 0)
                zero = 0 * scale if minima is None else 8 * scale - minima
                pair = (np.moveaxis(each, (-2, -1), (0, 1)).reshape(len(levels), -1) for each in (scale, zero))
                scales.append(torch.from_numpy(np.stack([*pair], -1)).transpose(0, 1).bfloat16())
                forms.append(aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(levels.astype(np.int32)), 2))
            else:
                wide = self.rows(part)
                scales.append(torch.from_numpy(np.abs(wide).max(1) / 127 + np.float32(1e-30)))
                forms.append(torch.from_numpy(np.rint(wide / scales[-1].numpy()[:, None]).astype(np.int8)))
        form, scale = torch.cat(forms), torch.cat(scales, len(scales[0].shape) // 3).bfloat16()
        if self.kind in (2, 12):
            self.packed = lambda x: aten._weight_int4pack_mm_for_cpu(x, form, 32, scale)
        else:
            self.packed = lambda x: aten._weight_int8pack_mm(x, form, scale)


SPACES = "\t\n\v\f\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
# Letters and digits of Unicode 15 and 16, which older Pythons do not know
NEWER = {"Z": """1c89-1c8a a7cb-a7cd a7da-a7dc 105c0-105f3 10d4a-10d65 10d6f-10d85 10ec2-10ec4 1123f-11240 11380-11389
    1138b-1138b 1138e-1138e 11390-113b5 113b7-113b7 113d1-113d1 113d3-113d3 11bc0-11be0 11f02-11f02 11f04-11f10
    11f12-11f33 1342f-1342f 13441-13446 13460-143fa 16100-1611d 16d40-16d6c 18cff-18cff 1b132-1b132 1b155-1b155
    1df25-1df2a 1e030-1e06d 1e4d0-1e4eb 1e5d0-1e5ed 1e5f0-1e5f0 2b739-2b739 2ebf0-2ee5d 31350-323af""",
    "0": """10d40-10d49 116d0-116e3 11bf0-11bf9 11f50-11f59 16130-16139 16d70-16d79 1ccf0-1ccf9 1d2c0-1d2d3
    1e4f0-1e4f9 1e5f1-1e5fa"""}  # fmt: skip
# GPT-2's splitting into words, on text in which letters beyond ASCII are Z, digits 0, spaces newlines, all else !
WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s")
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {b: chr(b) for b in SHOWN} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in SHOWN)}
BYTES = {letter: byte for byte, letter in LETTERS.items()}  # GPT-2's letter for every byte, and back


class Shapes(dict[int, str]):
    """For str.translate: what WORDS needs to know of a character."""

    def __missing__(self, code: int) -> str:
        shape = {"L": "Z", "N": "0"}.get(unicodedata.category(chr(code))[0], "!")
        for newer, ranges in NEWER.items():
            if any(int(low, 16) <= code <= int(high, 16) for low, high in (r.split("-") for r in ranges.split())):
                shape = newer
        shape = "\n" if chr(code) in SPACES else chr(code) if 32 <= code < 127 else shape
        self[code] = shape
        return shape


class Tokenizer:
    """Byte-level BPE from a file's keys; vocabularies of characters and bytes are written as such too."""

    def __init__(self, reader: Reader) -> None:
        tokens, merges = reader.key("tokenizer.ggml.tokens", list), reader.key("tokenizer.ggml.merges", list)
        kinds = np.asarray(reader.keys.get("tokenizer.ggml.token_type", ()))
        if reader.key("tokenizer.ggml.model", str) != "gpt2" or len(kinds) != len(tokens) or not tokens:
            reader.fail("its tokenizer is not of the kind gpt2, or does not tell the type of each token")
        self.end = reader.key("tokenizer.ggml.eos_token_id")
        self.mask = reader.key("tokenizer.ggml.mask_token_id", default=0)
        if max(self.end, self.mask) >= len(tokens):
            reader.fail("its end or mask is no token")
        self.writable = kinds == 1
        self.ids = {token: i for i, token in enumerate(tokens) if kinds[i] == 1}
        self.bytes = [bytes(BYTES.get(c, 63) for c in t) if kinds[i] == 1 else b"" for i, t in enumerate(tokens)]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.writable[self.end] = True
        self.shapes, self.words = Shapes(), dict[str, list[int]]()

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; raises GGUFError for a character that the vocabulary lacks."""
        ids: list[int] = []
        for match in WORDS.finditer(text.translate(self.shapes)):
            word = text[match.start() : match.end()]
            if word not in self.words:
                self.words[word] = self._word(word)
            ids += self.words[word]
        return ids

    def _word(self, word: str) -> list[int]:
        parts = [LETTERS[byte] for byte in word.encode("utf-8", "surrogatepass")]
        while len(parts) > 1:
            pairs = [f"{a} {b}" for a, b in zip(parts, parts[1:], strict=False)]
            if (best := min(pairs, key=lambda pair: self.ranks.get(pair, math.inf))) not in self.ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                joined = i < len(pairs) and pairs[i] == best
                merged.append(parts[i] + parts[i + 1] if joined else parts[i])
                i += 1 + joined
            parts = merged
        if any(part not in self.ids for part in parts):
            raise GGUFError(f"{word!r} holds a character that the model's vocabulary lacks")
        return [self.ids[part] for part in parts]


class Cache:
    """Keys and values of every effective layer, (kv heads, capacity, head size); `length` tokens are valid."""

    def __init__(self, layers: int, heads: int, size: int) -> None:
        self.length = 0
        self.kept = [[np.empty((heads, 0, size), np.float32) for _ in "kv"] for _ in range(layers)]

    def append(self, layer: int, *new: Array) -> list[Array]:
        """Put keys and values, (tokens, kv heads, size), behind the valid ones; all of a layer, (kv heads, keys, size)."""
        kept, end = self.kept[layer], self.length + len(new[0])
        for i, each in enumerate(new):
            if kept[i].shape[1] < end:
                grown = np.empty((len(kept[i]), end + -end % 256, each.shape[2]), np.float32)
                grown[:, : self.length] = kept[i][:, : self.length]
                kept[i] = grown
            kept[i][:, self.length : end] = each.swapaxes(0, 1)
        return [each[:, :end] for each in kept]


def _norm(x: Array, weight: Array, eps: float) -> Array:
    y: Array = x / np.sqrt(np.einsum("...i,...i->...", x, x) / x.shape[-1] + eps)[..., None] * weight
    return y


def _swiglu(gate: Array, up: Array) -> Array:
    gate = gate / (1 + np.exp(-gate)) * up
    return gate


def _draw(probs: Array, random: np.random.Generator) -> int:
    total = probs.cumsum()
    return int(np.searchsorted(total, min(random.random() * total[-1], np.nextafter(total[-1], 0)), "right"))


class Elara:
    """A model from a GGUF file: `generate` streams text, `logits` scores it."""

    def __init__(self, path: str, threads: int | None, use_torch: bool | None) -> None:
        reader = Reader(path)
        if (arch := reader.key("general.architecture", str)) not in ("elara", "hy_v3"):
            reader.fail(f"it is a model of the architecture {arch}, only elara and hy_v3 can be read")

        def key(name: str, default: Any = None, kind: type = int) -> Any:
            return reader.key(f"{arch}.{name}", kind, default)

        self.tokenizer = Tokenizer(reader)
        vocab, width, self.heads = len(self.tokenizer.bytes), key("embedding_length"), key("attention.head_count")
        self.kv_heads, self.size = key("attention.head_count_kv", self.heads), key("attention.key_length")
        self.eps, self.context = key("attention.layer_norm_rms_epsilon", None, float), key("context_length")
        count, depth, order = key("block_count"), key("recursion.depth", 1), key("recursion.order", "block", str)
        experts, self.top = key("expert_count", 0), key("expert_used_count", 0)
        self.gate_scale, base = key("expert_weights_scale", 1.0, float), key("rope.freq_base", 10000.0, float)
        self.length, self.routing = key("tidar.block_length", 0), key("tidar.draft_routing", "token", str)
        inner, wide = key("feed_forward_length"), key("expert_feed_forward_length", 0)
        shared = key("expert_shared_feed_forward_length", 0)
        q, kv = self.heads * self.size, self.kv_heads * self.size
        if not (q and kv and self.heads % self.kv_heads == self.size % 2 == 0 and self.context > 1 and base > 0):
            reader.fail("its heads, context or rotary base make no model")
        if not (0 < depth <= 256 and order in ("block", "stack") and 0 < count <= len(reader.tensors)):
            reader.fail(f"its {count} blocks applied {depth} times in the order {order} make no model")
        if self.length > 256 or self.routing not in ("token", "block", "anchor") or self.top > experts:
            reader.fail(f"its drafts of {self.length} routed by {self.routing} or its experts make no model")
        attention = {
            "attn_norm": (width,), "attn_q": (q, width), "attn_k": (kv, width), "attn_v": (kv, width),
            "attn_q_norm": (self.size,), "attn_k_norm": (self.size,), "attn_output": (width, q), "ffn_norm": (width,),
        }  # fmt: skip
        dense = {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
        sparse = {
            "ffn_gate_inp": (experts, width), "ffn_gate_exps": (experts, wide, width),
            "ffn_up_exps": (experts, wide, width), "ffn_down_exps": (experts, width, wide),
        }  # fmt: skip
        if shared:
            sparse |= {"ffn_gate_shexp": (shared, width), "ffn_up_shexp": (shared, width), "ffn_down_shexp": (width, shared)}
        self.blocks: list[dict[str, Any]] = []
        for i in range(count):
            shapes = attention | (sparse if f"blk.{i}.ffn_gate_inp.weight" in reader.tensors else dense)
            block = {name: reader.tensor(f"blk.{i}.{name}.weight", *shape) for name, shape in shapes.items()}
            for name, outputs in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
                if f"blk.{i}.{name}.bias" in reader.tensors:
                    block[f"{name}.bias"] = reader.tensor(f"blk.{i}.{name}.bias", outputs)
            if "ffn_gate_inp" in block:
                shape = reader.tensors.get(f"blk.{i}.exp_probs_b", ((1, experts),))[0]
                found = reader.tensor(f"blk.{i}.exp_probs_b", *shape[-2:-1], experts)
                block["exp_probs_b"] = found.rows(slice(None)) if len(shape) == 2 else found[None]
            self.blocks.append(block)
        steps = range(count * depth)
        self.layers = [(i // depth, i % depth) if order == "block" else (i % count, i // count) for i in steps]
        self.embed, self.norm = reader.tensor("token_embd.weight", vocab, width), reader.tensor("output_norm.weight", width)
        heads = [n if n in reader.tensors else "token_embd.weight" for n in ("output.weight", "diffusion.weight")]
        self.head, self.diffusion = (self.embed if n == "token_embd.weight" else reader.tensor(n, vocab, width) for n in heads)
        chain = {"norm": (width,), "gate": (width, 2 * width), "up": (width, 2 * width), "down": (width, width)}
        chained = "chain_norm.weight" in reader.tensors
        self.chain = {n: reader.tensor(f"chain_{n}.weight", *s) for n, s in chain.items()} if chained else {}
        self.frequency = base ** (np.arange(0, self.size, 2, dtype=np.float32) / -self.size)
        self.threads = threads or os.cpu_count() or 1
        self.pool = ThreadPoolExecutor(self.threads)
        self.torch: Any = None
        if use_torch is not False:
            self._pack(use_torch)

    @classmethod
    def load(cls, path: str | os.PathLike[str], threads: int | None = None, use_torch: bool | None = None) -> Elara:
        """Open a GGUF file. threads: default all. use_torch: its kernels; None = where it can be imported.

        Raises GGUFError for a file that is damaged, incomplete or of another kind.
        """
        return cls(os.fspath(path), threads, use_torch)

    def _pack(self, needed: bool | None) -> None:
        try:
            self.torch = importlib.import_module("torch")
        except ImportError as error:
            if needed:
                raise GGUFError("torch is not installed: leave use_torch out, or install it") from error
            return
        self.torch.set_num_threads(self.threads)
        known = [self.head, self.diffusion, *self.chain.values(), *(w for b in self.blocks for w in b.values())]
        for matrix in (each for w in known for each in (w if isinstance(w, list) else [w])):
            if isinstance(matrix, Matrix) and not matrix.packed:
                matrix.pack(self.torch)

    def products(self, *pairs: tuple[Array, Matrix]) -> list[Array]:
        """x @ weights.T of every pair, float32 (tokens, rows), the tiles of all shared among threads."""
        outs, jobs, narrow = [], [], dict[int, Any]()
        for x, matrix in pairs:
            if matrix.packed and len(x) <= PACKED:
                if id(x) not in narrow:
                    narrow[id(x)] = self.torch.from_numpy(x).bfloat16()
                outs.append(matrix.packed(narrow[id(x)]).float().numpy())
                continue
            outs.append(out := np.empty((len(x), len(matrix.raw)), np.float32))
            if matrix.kind == 0:
                np.matmul(x, matrix.rows(slice(None)).T, out=out)  # BLAS has threads of its own
                continue
            step = max(16, TILE // matrix.width)
            jobs += [(matrix, x, out, slice(i, i + step)) for i in range(0, len(matrix.raw), step)]
        run = map if len(jobs) < 2 or self.threads == 1 else self.pool.map
        list(run(lambda job: job[0].product(*job[1:]), jobs))
        return outs

    def cache(self) -> Cache:
        """An empty cache."""
        return Cache(len(self.layers), self.kv_heads, self.size)

    def forward(self, ids: Sequence[int], cache: Cache, groups: Sequence[int] = ()) -> Array:
        """Append tokens to the cache; final hidden states (tokens + masks, width).

        groups: for each j, a group of `length` masks behind the first j tokens, which see the cache, these tokens and
        each other (TiDAR, arXiv 2511.08923, section 3.2). The cache keeps none of the masks.
        """
        past, tokens = cache.length, len(ids)
        group = np.repeat(np.arange(len(groups)), self.length)  # of each mask
        behind = np.repeat(np.array(groups, int), self.length)  # tokens that each mask sees
        place = past + np.append(np.arange(tokens), behind + np.tile(np.arange(self.length), len(groups)))
        total, visible, source = len(place), None, None
        if total > 1:
            key = np.arange(past + total)
            visible = key <= key[past:, None]
            visible[tokens:] = key < past + behind[:, None]
            visible[tokens:, past + tokens :] = group[:, None] == group
        if groups and self.routing != "token":  # which routed token each takes its experts from
            source = np.append(np.arange(tokens), behind - 1 if self.routing == "anchor" else tokens + group)
        angle = place[:, None, None] * self.frequency  # (total, 1, size / 2)
        turn = np.cos(angle), np.sin(angle)
        x = self.embed.rows(np.append(ids, [self.tokenizer.mask] * (total - tokens)).astype(int))
        for layer, (i, recursion) in enumerate(self.layers):
            block = self.blocks[i]
            x = x + self._attention(_norm(x, block["attn_norm"], self.eps), block, cache, layer, turn, visible)
            h = _norm(x, block["ffn_norm"], self.eps)
            x = x + (self._experts(h, block, recursion, tokens, source) if "exp_probs_b" in block else self._mlp(h, block))
        cache.length += tokens
        return _norm(x, self.norm, self.eps)

    def _attention(self, h: Array, block: dict[str, Any], cache: Cache, layer: int, turn: Any, visible: Any) -> Array:
        names = ("attn_q", "attn_k", "attn_v")
        heads = self.products(*((h, block[name]) for name in names))
        q, k, v = ((y + block.get(f"{n}.bias", 0)).reshape(len(h), -1, self.size) for y, n in zip(heads, names, strict=True))
        q, k = (_turned(_norm(y, block[f"{n}_norm"], self.eps), *turn) for y, n in ((q, "attn_q"), (k, "attn_k")))
        keys, values = cache.append(layer, k, v)
        q = q.swapaxes(0, 1).reshape(self.kv_heads, -1, self.size)  # (kv heads, group * tokens, size)
        scores = np.matmul(q, keys.swapaxes(1, 2)) * np.float32(self.size**-0.5)
        if visible is not None:
            scores.reshape(self.heads, len(h), -1)[:, ~visible] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = np.matmul(scores, values) / scores.sum(-1, keepdims=True)
        y = y.reshape(self.heads, len(h), self.size).swapaxes(0, 1).reshape(len(h), -1)
        return self.products((y, block["attn_output"]))[0]

    def _mlp(self, h: Array, block: dict[str, Any]) -> Array:
        gate, up = self.products((h, block["ffn_gate"]), (h, block["ffn_up"]))
        return self.products((_swiglu(gate, up), block["ffn_down"]))[0]

    def _experts(self, h: Array, block: dict[str, Any], recursion: int, tokens: int, source: Array | None) -> Array:
        """The chosen experts, each with all of its tokens at once, and the shared one."""
        routed = h[:tokens] if source is not None and self.routing == "anchor" else h
        scores = 1 / (1 + np.exp(-(routed @ block["ffn_gate_inp"].rows(slice(None)).T)))
        if source is not None and self.routing == "block":
            scores = np.append(scores[:tokens], scores[tokens:].reshape(-1, self.length, scores.shape[1]).mean(1), 0)
        bias = block["exp_probs_b"][min(recursion, len(block["exp_probs_b"]) - 1)]
        chosen = np.argsort(-(scores + bias), -1, kind="stable")[:, : self.top]
        gates = np.take_along_axis(scores, chosen, -1)
        gates *= np.float32(self.gate_scale) / gates.sum(-1, keepdims=True)
        if source is not None:
            chosen, gates = chosen[source], gates[source]
        used = [(e, *np.nonzero(chosen == e)) for e in sorted(set(chosen.flat))]
        names = ("ffn_gate", "ffn_up", "ffn_down")
        parts = [(h[rows], [block[f"{name}_exps"][e] for name in names]) for e, rows, _ in used]
        if "ffn_gate_shexp" in block:
            parts.append((h, [block[f"{name}_shexp"] for name in names]))
        halves = self.products(*((x, w) for x, ws in parts for w in ws[:2]))
        inner = map(_swiglu, halves[::2], halves[1::2])
        outs = self.products(*((x, ws[2]) for x, (_, ws) in zip(inner, parts, strict=True)))
        y = outs[-1] if "ffn_gate_shexp" in block else np.zeros_like(h)
        for (_, rows, column), out in zip(used, outs, strict=False):
            y[rows] += out * gates[rows, column][:, None]
        return y

    def logits(self, ids: Sequence[int]) -> Array:
        """Logits behind every token of a text, float32 (tokens, vocabulary)."""
        cache, parts = self.cache(), []
        for i in range(0, len(ids), PREFILL):
            parts += self.products((self.forward(ids[i : i + PREFILL], cache), self.head))
        return np.concatenate(parts)

    def ids(
        self, prompt: str | Sequence[int], tokens: int = 200, temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0,
        seed: int | None = None, tidar: bool = False,
    ) -> Iterator[list[int]]:  # fmt: skip
        """The new tokens of each forward, up to `tokens` or the end token, which is given too; temperature 0 is greedy.

        tidar: draft with the diffusion head, verify in the same forward: the same text at temperature 0, else text of
        the same distribution.
        """
        text = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        text = text or [self.tokenizer.end]
        if len(text) > self.context:
            raise GGUFError(f"the prompt has {len(text)} tokens, the model's context holds {self.context}")
        if tidar and not self.length:
            raise GGUFError("this file has no diffusion head to draft with: leave tidar out or export format=compact")

        def distribution(logits: Array) -> Array:
            return _distribution(np.where(self.tokenizer.writable, logits, -np.inf), temperature, top_k, top_p)

        random, cache, unread, draft, proposals = np.random.default_rng(seed), self.cache(), text[:-1], [], np.empty((0, 0))
        while tokens > 0:
            if cache.length >= self.context:  # the window slides: the last half of it is read anew
                cache.length, unread = 0, text[-(self.context // 2) - 1 : -1]
            for i in range(0, len(unread), PREFILL):
                self.forward(unread[i : i + PREFILL], cache)
            past, unread = cache.length, []
            given = [text[-1], *draft][: min(self.context - past, tokens)]
            hidden = self.forward(given, cache, range(1, len(given) + 1) if tidar else ())
            probs = distribution(self.products((hidden[: len(given)], self.head))[0])
            count, token = _verify(probs, given[1:], proposals, random)
            cache.length = past + count
            new = [*draft[: count - 1], token]
            new = new[: new.index(self.tokenizer.end) + 1] if self.tokenizer.end in new else new
            text += new
            tokens = 0 if new[-1] == self.tokenizer.end else tokens - len(new)
            yield new
            first = len(given) + (count - 1) * self.length
            draft, masks = [], hidden[first + 1 : first + self.length]  # the group's first stands for the last token
            if tidar and tokens > 1 and len(masks):
                draft, proposals = self._draft(masks, text[-1], distribution, random)

    def _draft(self, masks: Array, last: int, distribution: Any, random: Any) -> tuple[list[int], Array]:
        """Proposals for what follows the last token, and what drew them, from hidden states (masks, width)."""
        if not self.chain:
            proposals = distribution(self.products((masks, self.diffusion))[0])
            return [_draw(p, random) for p in proposals], proposals
        draft, drawn = [], []
        for mask in masks:  # with a chain, each also depends on the one before it
            before = _norm(self.embed.rows([last]), self.chain["norm"], self.eps)
            x = np.append(mask, before)[None]
            gate, up = self.products((x, self.chain["gate"]), (x, self.chain["up"]))
            x = mask + self.products((_swiglu(gate, up), self.chain["down"]))[0]
            drawn.append(distribution(self.products((x, self.diffusion))[0])[0])
            draft.append(last := _draw(drawn[-1], random))
        return draft, np.array(drawn)

    def generate(self, prompt: str, tokens: int = 200, **options: Any) -> Iterator[str]:
        """Text behind a prompt in pieces, as it is written; options as in `ids`."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for new in self.ids(prompt, tokens, **options):
            yield decoder.decode(b"".join(self.tokenizer.bytes[i] for i in new))
        yield decoder.decode(b"", True)


def _turned(x: Array, cos: Array, sin: Array) -> Array:
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1, dtype=np.float32)


def _distribution(logits: Array, temperature: float, top_k: int, top_p: float) -> Array:
    """What to draw from, float64 (rows, vocabulary)."""
    if not np.isfinite(best := logits.max(-1, keepdims=True)).all():
        raise GGUFError("the weights give logits that are no numbers: the file is damaged")
    if temperature < 1e-30:
        return np.eye(logits.shape[-1])[logits.argmax(-1)]
    logits = (logits - best) / temperature
    if 0 < top_k < logits.shape[-1]:
        logits[logits < np.partition(logits, -top_k)[:, -top_k, None]] = -np.inf
    probs: Array = np.exp(logits)
    probs /= probs.sum(-1, keepdims=True)
    if top_p < 1:
        order = np.argsort(-probs, -1, kind="stable")
        ranked = np.take_along_axis(probs, order, -1)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        np.put_along_axis(probs, order, ranked / ranked.sum(-1, keepdims=True), -1)
    return probs


def _verify(probs: Array, draft: list[int], proposals: Array, random: Any) -> tuple[int, int]:
    """How many of 1 + draft tokens stand, and the token behind them (arXiv 2211.17192, algorithm 1)."""
    for i, token in enumerate(draft):
        if random.random() * proposals[i, token] >= probs[i, token]:
            residual = np.maximum(probs[i] - proposals[i], 0)
            return i + 1, _draw(residual if residual.any() else probs[i], random)
    return len(draft) + 1, _draw(probs[-1], random)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write text with an Elara model in a GGUF file.")
    parser.add_argument("model", help="a .gguf file, exported with format=compact or format=gguf")
    parser.add_argument("prompt", nargs="?", default="", help="text to go on from; none begins a new document")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write at most (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens only; 0 = all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest of this probability only")
    parser.add_argument("--seed", type=int, help="the same number writes the same text")
    parser.add_argument("--tidar", action="store_true", help="draft several tokens, verify them in one forward")
    parser.add_argument("--threads", type=int, help="for unpacking and torch (all); BLAS reads OPENBLAS_NUM_THREADS")
    parser.add_argument("--numpy", action="store_true", help="numpy alone, even where torch is installed")
    given = vars(parser.parse_args())
    try:
        model = Elara.load(given.pop("model"), given.pop("threads"), False if given.pop("numpy") else None)
        prompt, begun, count, forwards = given.pop("prompt"), time.perf_counter(), 0, 0
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for new in model.ids(prompt, **given):
            print(prompt * (not forwards) + decoder.decode(b"".join(map(model.tokenizer.bytes.__getitem__, new))), end="", flush=True)
            count, forwards = count + len(new), forwards + 1
        took = time.perf_counter() - begun
        print(f"\n\n[{count} tokens, {count / took:.1f} tokens/s, {count / max(forwards, 1):.2f} tokens per forward]")
    except (GGUFError, KeyboardInterrupt) as error:
        sys.exit(f"error: {error}" if isinstance(error, GGUFError) else 130)


if __name__ == "__main__":
    main()
