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
import functools
import math
import mmap
import os
import re
import struct
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
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
ALL = slice(None)
# Names and shapes of tensors: w width, q queries, k keys, d head, h hidden, e experts, i their hidden, s shared, c 2 w
ATTENTION = "attn_norm:w attn_q:qw attn_k:kw attn_v:kw attn_q_norm:d attn_k_norm:d attn_output:wq ffn_norm:w"
DENSE, CHAIN = "ffn_gate:hw ffn_up:hw ffn_down:wh", "chain_norm:w chain_gate:wc chain_up:wc chain_down:ww"
SPARSE = "ffn_gate_inp:ew ffn_gate_exps:eiw ffn_up_exps:eiw ffn_down_exps:ewi"
SHARED = "ffn_gate_shexp:sw ffn_up_shexp:sw ffn_down_shexp:ws"

class GGUFError(ValueError):
    """What is wrong with a file or a request, in one sentence."""

class Reader:
    """A mapped GGUF file; every count and offset in its header is held against its size before it is believed."""

    def __init__(self, path: str) -> None:
        self.path, self.at, self.data = path, 0, b""  # type: str, int, Any
        try:
            with open(path, "rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            self.fail(getattr(error, "strerror", None) or "the file is empty")
        if self.take(4) != b"GGUF" or self.read(U32) not in (2, 3):
            self.fail("this is no GGUF file of version 2 or 3")
        count, keys = self.read(U64), self.read(U64)
        self.keys = {self.read(STRING): self.read(self.read(U32)) for _ in range(keys)}
        self.tensors: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name, axes = self.read(STRING), self.read(U32)
            shape = [self.read(U64) for _ in range(axes if axes < 5 else self.fail(f"{name} has {axes} axes"))]
            self.tensors[name] = tuple(shape[::-1]), self.read(U32), self.read(U64)
        step = self.key("general.alignment", default=32)
        self.base = -(-self.at // max(1, step)) * step

    def fail(self, what: str) -> Any:
        raise GGUFError(f"{self.path}: {what}")

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            self.fail("the file is truncated or damaged: its header ends early")
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def read(self, kind: int) -> Any:
        if kind == STRING:
            return self.take(self.read(U64)).decode("utf-8", "replace")
        kind, count = (self.read(U32), self.read(U64)) if kind == LIST else (kind, None)
        if kind == STRING:
            return [self.read(STRING) for _ in range(count)]
        form = FORMS.get(kind) or self.fail("the file is damaged: a key has a value of unknown type")
        data = self.take(struct.calcsize(form) * (1 if count is None else count))
        return struct.unpack(form, data)[0] if count is None else np.frombuffer(data, form)

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
        if found != shape or kind not in TYPES:
            known = ", ".join(each for each, _, _ in TYPES.values())
            self.fail(f"tensor {name} is {found} of type {kind}, and {shape} of one of {known} is needed")
        _, weights, size = TYPES[kind]
        rows, row = math.prod(shape[:-1]), shape[-1] // weights * size
        if shape[-1] % weights or not rows * row or self.base + offset + rows * row > len(self.data):
            self.fail(f"the file is truncated or damaged: tensor {name} does not lie within it")
        raw = np.frombuffer(self.data, np.uint8, rows * row, self.base + offset)
        parts = [Matrix(part, kind, shape[-1]) for part in raw.reshape(math.prod(shape[:-2]), -1, row)]
        return parts if len(shape) == 3 else parts[0] if len(shape) == 2 else parts[0].rows(ALL)[0]

# Each type's function takes blocks, uint8 (rows, blocks, bytes), and gives weights = sum of levels * scales - minima:
# levels (*groups, blocks, rows, k), which are integers, scales (*groups or ones, blocks, rows), minima alike or None.
Unpacked = tuple[list[Array], Array, "Array | None"]

def _numbers(b: Array, kind: str, first: int, count: int) -> Array:
    """Numbers of one kind that each block holds, as float32 (count, blocks, rows)."""
    return b.view(kind)[..., first : first + count].transpose(2, 1, 0).astype(np.float32, order="C")

def _bits(b: Array, shifts: Sequence[int], mask: int, offset: int) -> Array:
    """Some bits of all bytes, minus an offset: float32 (shifts, rows, blocks, bytes), each moved to the left."""
    levels = np.empty((len(shifts), *b.shape), np.uint8)
    for shift, level in zip(shifts, levels, strict=True):
        (np.left_shift if shift > 0 else np.right_shift)(b, abs(shift), out=level)
    levels &= np.uint8(mask)
    levels -= np.uint8(offset)
    return levels.view(np.int8).astype(np.float32)

def _nibbles(b: Array, offset: int = 0) -> Array:
    return _bits(b, (0, -4), 15, offset)  # of all bytes: to pick those with levels costs more than it saves

def _k_scales(b: Array) -> Array:
    """Scales and minima, (2, 4, 2, blocks, rows): two float16 times sixteen numbers of 6 bits in 12 bytes."""
    first, second, rest = b.view("<u4")[..., 1:4].transpose(2, 1, 0)
    words = np.empty((4, *first.shape), np.uint32)
    np.bitwise_and(first, 0x3F3F3F3F, out=words[0])
    np.bitwise_or(rest & 0x0F0F0F0F, first >> 2 & 0x30303030, out=words[1])
    np.bitwise_and(second, 0x3F3F3F3F, out=words[2])
    np.bitwise_or(rest >> 4 & 0x0F0F0F0F, second >> 2 & 0x30303030, out=words[3])
    numbers = words.view(np.uint8).reshape(*words.shape, 4).transpose(0, 3, 1, 2).astype(np.float32, order="C")
    return numbers.reshape(2, 4, 2, *first.shape) * _numbers(b, "<f2", 0, 2)[:, None, None]

def _q4_0(b: Array) -> Unpacked:
    return [_nibbles(b, 8)[..., 2:].swapaxes(1, 2)], _numbers(b, "<f2", 0, 1), None

def _q8_0(b: Array) -> Unpacked:
    return [b.view(np.int8).astype(np.float32)[..., 2:].swapaxes(0, 1)], _numbers(b, "<f2", 0, 1)[0], None

def _q4_k(b: Array) -> Unpacked:
    return [_nibbles(b)[..., 16:].reshape(2, *b.shape[:2], 4, 32).transpose(3, 0, 2, 1, 4)], *_k_scales(b)

def _q5_k(b: Array) -> Unpacked:
    low = _nibbles(b)[..., 48:].reshape(2, *b.shape[:2], 4, 32).transpose(3, 0, 2, 1, 4)
    high = _bits(np.ascontiguousarray(b[..., 16:48]), range(4, -4, -1), 16, 0)
    return [low, high.reshape(4, 2, *high.shape[1:]).swapaxes(2, 3)], *_k_scales(b)

def _q6_k(b: Array) -> Unpacked:
    low = _nibbles(b)[..., :128].reshape(2, *b.shape[:2], 2, 2, 2, 16).transpose(3, 0, 4, 5, 2, 1, 6)
    high = _bits(np.ascontiguousarray(b[..., 128:192]), (4, 2, 0, -2), 0x30, 32)
    high = high.reshape(2, 2, *b.shape[:2], 2, 2, 16).transpose(4, 0, 1, 5, 3, 2, 6)
    scales = _numbers(b, "b", 192, 16) * _numbers(b, "<f2", 104, 1)
    return [low, high], scales.reshape(2, 2, 2, 2, *scales.shape[1:]), None

UNPACK = {2: _q4_0, 8: _q8_0, 12: _q4_k, 13: _q5_k, 14: _q6_k}

class Matrix:
    """Weights as they lie in the file, uint8 (rows, bytes of a row), of one of TYPES."""

    def __init__(self, raw: Array, kind: int, width: int) -> None:
        self.raw, self.kind, self.width = raw, kind, width
        self.torch: Any = None
        self.packed: Any = None  # torch's form of it: a function of bfloat16 (tokens, width)

    def unpack(self, part: Any) -> Unpacked:
        return UNPACK[self.kind](self.raw[part].reshape(-1, self.width // TYPES[self.kind][1], TYPES[self.kind][2]))

    def rows(self, part: Any) -> Array:
        """Some rows as float32, (rows, width)."""
        if self.kind == 0:
            return self.raw[part].view("<f4")
        if self.kind == 30:
            return (self.raw[part].view("<u2").astype(np.uint32) << 16).view(np.float32)
        if self.kind == 1:  # by moving bits, as numpy's own cast takes ten times as long; not for infinities
            bits: Array = (self.raw[part].view("<i2").astype(np.int32) << 13) & -0x70002000
            return bits.view(np.float32) * np.float32(2.0**112)
        levels, scales, minima = self.unpack(part)
        out: Array = sum(levels[1:], levels[0]) * scales[..., None] - (0 if minima is None else minima[..., None])
        order = (out.ndim - 2, out.ndim - 3, *range(out.ndim - 3), out.ndim - 1)  # (rows, blocks, *groups, k)
        return np.ascontiguousarray(out.transpose(order)).reshape(-1, self.width)

    def product(self, x: Array, out: Array, part: slice) -> None:
        """out[:, part] = x @ rows(part).T; x: (tokens, width)."""
        if self.kind not in UNPACK or len(x) > FEW:
            np.matmul(x, self.rows(part).T, out=out[:, part])
            return
        levels, scales, minima = self.unpack(part)
        *groups, blocks, rows, k = levels[0].shape
        last = len(groups) + 1
        x = np.ascontiguousarray(x.T.reshape(blocks, *groups, k, -1).transpose(*range(1, last), 0, last, last + 1))
        sums = np.matmul(levels[0], x)  # (*groups, blocks, rows, tokens)
        for more in levels[1:]:
            sums += np.matmul(more, x)
        sums = sums.reshape(-1, rows, len(out))
        scales = np.broadcast_to(scales, levels[0].shape[:-1]).reshape(sums.shape[:-1])
        out[:, part] = (sums[..., 0] * scales).sum(0) if len(out) == 1 else np.einsum("grt,gr->tr", sums, scales)
        if minima is not None:
            out[:, part] -= x.sum(-2).reshape(len(sums), -1).T @ minima.reshape(len(sums), -1)

    def pack(self, torch: Any) -> None:
        """Repack for torch's kernels: types of 4 bits with scales rounded to bfloat16, wider ones in 8 bits a row."""
        self.torch, forms, scales, four = torch, [], [], self.kind in (2, 12)
        for part in (slice(i, i + 1024) for i in range(0, len(self.raw), 1024)):
            if four:
                (levels,), scale, minima = self.unpack(part)
                zero = 0 * scale if minima is None else 8 * scale - minima
                form = np.moveaxis(levels, (-2, -3), (0, 1)).reshape(-1, self.width) + (8 if minima is None else 0)
                pair = np.moveaxis(np.array([scale, zero]), (-1, -2), (1, 2)).reshape(2, len(form), -1)
                forms.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(form.astype("i4")), 2))
                scales.append(torch.from_numpy(pair).permute(2, 1, 0).bfloat16())
            else:
                wide = self.rows(part)
                scale = np.abs(wide).max(1) / 127 + np.float32(1e-30)
                forms.append(torch.from_numpy(np.rint(wide / scale[:, None]).astype(np.int8)))
                scales.append(torch.from_numpy(scale).bfloat16())
        weights, factors = torch.cat(forms), torch.cat(scales, 1 if four else 0)
        eight, int4 = torch.ops.aten._weight_int8pack_mm, torch.ops.aten._weight_int4pack_mm_for_cpu
        self.packed = (lambda x: int4(x, weights, 32, factors)) if four else (lambda x: eight(x, weights, factors))

SPACES = "\t\n\v\f\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
# Letters and digits of Unicode 15 and 16, which older Pythons do not know
NEWER = {"Z": """1c89-1c8a a7cb-a7cd a7da-a7dc 105c0-105f3 10d4a-10d65 10d6f-10d85 10ec2-10ec4 1123f-11240 11380-11389
1138b-1138b 1138e-1138e 11390-113b5 113b7-113b7 113d1-113d1 113d3-113d3 11bc0-11be0 11f02-11f02 11f04-11f10 11f12-11f33
1342f-1342f 13441-13446 13460-143fa 16100-1611d 16d40-16d6c 18cff-18cff 1b132-1b132 1b155-1b155 1df25-1df2a 1e030-1e06d
1e4d0-1e4eb 1e5d0-1e5ed 1e5f0-1e5f0 2b739-2b739 2ebf0-2ee5d 31350-323af""", "0": """10d40-10d49 116d0-116e3 11bf0-11bf9
11f50-11f59 16130-16139 16d70-16d79 1ccf0-1ccf9 1d2c0-1d2d3 1e4f0-1e4f9 1e5f1-1e5fa"""}  # fmt: skip
# GPT-2's splitting into words, on text in which letters beyond ASCII are Z, digits 0, spaces newlines, all else !
WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s")
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {b: chr(b) for b in SHOWN} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in SHOWN)}
BYTES = {letter: byte for byte, letter in LETTERS.items()}  # GPT-2's letter for every byte, and back

@functools.cache
def _shape(c: str) -> str:
    """The character of WORDS that stands for one which is not printable ASCII."""
    for newer, ranges in NEWER.items():
        if any(int(low, 16) <= ord(c) <= int(high, 16) for low, high in (r.split("-") for r in ranges.split())):
            return newer
    return "\n" if c in SPACES else {"L": "Z", "N": "0"}.get(unicodedata.category(c)[0], "!")

class Tokenizer:
    """Byte-level BPE from a file's keys; vocabularies of characters and bytes are written as such too."""

    def __init__(self, reader: Reader) -> None:
        tokens, merges = reader.key("tokenizer.ggml.tokens", list), reader.key("tokenizer.ggml.merges", list)
        kinds = np.asarray(reader.keys.get("tokenizer.ggml.token_type", ()))
        self.end, self.mask = (reader.key(f"tokenizer.ggml.{n}_token_id", default=d) for n, d in (("eos", None), ("mask", 0)))
        if reader.key("tokenizer.ggml.model", str) != "gpt2" or kinds.shape != (len(tokens),) or not tokens:
            reader.fail("its tokenizer is not of the kind gpt2, or does not tell the type of each token")
        if max(self.end, self.mask) >= len(tokens):
            reader.fail("its end or mask is no token")
        self.writable = kinds == 1
        self.ids = {token: i for i, token in enumerate(tokens) if kinds[i] == 1}
        self.bytes = [bytes(BYTES.get(c, 63) for c in t) if kinds[i] == 1 else b"" for i, t in enumerate(tokens)]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.writable[self.end] = True
        self.words: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; raises GGUFError for a character that the vocabulary lacks."""
        ids: list[int] = []
        for match in WORDS.finditer(re.sub(r"[^ -~]", lambda c: _shape(c[0]), text)):
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
    """Keys and values of every effective layer for so many tokens and masks; `length` tokens are valid."""

    def __init__(self, model: Elara, capacity: int) -> None:
        shape = (len(model.layers), 2, model.kv_heads, capacity, model.size)
        self.kv, self.length = np.empty(shape, np.float32), 0  # takes memory where it is written

class Elara:
    """A model from a GGUF file: `generate` streams text, `logits` scores it."""

    def __init__(self, path: str, threads: int | None = None, use_torch: bool | None = None) -> None:
        reader = Reader(path)
        if (arch := reader.key("general.architecture", str)) not in ("elara", "hy_v3"):
            reader.fail(f"it is a model of the architecture {arch}, only elara and hy_v3 can be read")

        def key(name: str, default: Any = None, kind: type = int) -> Any:
            return reader.key(f"{arch}.{name}", kind, default)

        def tensors(names: str, prefix: str = "") -> dict[str, Any]:
            pairs = (name.split(":") for name in names.split())
            return {name: reader.tensor(f"{prefix}{name}.weight", *map(sizes.get, axes)) for name, axes in pairs}

        self.tokenizer, w, d = Tokenizer(reader), key("embedding_length"), key("attention.key_length")
        self.size, self.heads = d, key("attention.head_count")
        self.kv_heads, self.context = key("attention.head_count_kv", self.heads), key("context_length")
        self.eps, base = key("attention.layer_norm_rms_epsilon", None, float), key("rope.freq_base", 10000.0, float)
        count, depth, order = key("block_count"), key("recursion.depth", 1), key("recursion.order", "block", str)
        self.length, self.routing = key("tidar.block_length", 0), key("tidar.draft_routing", "token", str)
        self.top, self.gate_scale = key("expert_used_count", 0), key("expert_weights_scale", 1.0, float)
        sizes = {"w": w, "c": 2 * w, "d": d, "q": self.heads * d, "k": self.kv_heads * d, "h": key("feed_forward_length")}
        sizes |= {"e": key("expert_count", 0), "i": key("expert_feed_forward_length", 0), "v": len(self.tokenizer.bytes)}
        sizes["s"] = key("expert_shared_feed_forward_length", 0)
        heads = min(d, self.kv_heads) > 0 and self.heads % self.kv_heads == d % 2 == 0
        depths = 0 < depth <= 256 and 0 < count <= len(reader.tensors) and order in ("block", "stack")
        drafts = self.length <= 256 and self.routing in ("token", "block", "anchor") and self.top <= sizes["e"]
        if not (heads and depths and drafts and self.context > 1 and base > 0):
            reader.fail("its keys make no model: heads, context, recursion, drafts or experts do not fit together")
        self.blocks = []
        for prefix in (f"blk.{i}." for i in range(count)):
            sparse = f"{prefix}ffn_gate_inp.weight" in reader.tensors
            block = tensors(ATTENTION, prefix) | tensors(SPARSE if sparse else DENSE, prefix)
            for name, axis in (("attn_q.bias", "q"), ("attn_k.bias", "k"), ("attn_v.bias", "k")):
                block[name] = reader.tensor(prefix + name, sizes[axis]) if prefix + name in reader.tensors else 0
            if sparse:  # the selection bias: of every pass, or of this one
                passes = reader.tensors.get(f"{prefix}exp_probs_b", ((),))[0][:-1][:1]
                bias = reader.tensor(f"{prefix}exp_probs_b", *passes, sizes["e"])
                block |= {"bias": bias.rows(ALL) if passes else bias[None]} | tensors(SHARED if sizes["s"] else "", prefix)
            self.blocks.append(block)
        steps = range(count * depth)
        self.layers = [(i // depth, i % depth) if order == "block" else (i % count, i // count) for i in steps]
        self.norm, self.embed = reader.tensor("output_norm.weight", w), reader.tensor("token_embd.weight", sizes["v"], w)
        heads_of = (n if n in reader.tensors else "token_embd.weight" for n in ("output.weight", "diffusion.weight"))
        self.head, self.diffusion = (reader.tensor(n, sizes["v"], w) for n in heads_of)
        self.chain = tensors(CHAIN if "chain_norm.weight" in reader.tensors else "")
        self.frequency = base ** (np.arange(0, self.size, 2, dtype=np.float32) / -self.size)
        self.threads = threads or os.cpu_count() or 1
        self.pool = ThreadPoolExecutor(self.threads)
        if use_torch or (use_torch is None and find_spec("torch")):
            import torch

            torch.set_num_threads(self.threads)
            known = [self.head, self.diffusion, *self.chain.values(), *(w for b in self.blocks for w in b.values())]
            for matrix in (each for w in known for each in (w if isinstance(w, list) else [w])):
                if isinstance(matrix, Matrix) and matrix.kind in UNPACK and len(matrix.raw) % 16 == 0:
                    matrix.pack(torch)

    @classmethod
    def load(cls, path: str | os.PathLike[str], threads: int | None = None, use_torch: bool | None = None) -> Elara:
        """Open a GGUF file. threads: default all. use_torch: its kernels; None = where it is installed."""
        return cls(os.fspath(path), threads, use_torch)

    def products(self, *pairs: tuple[Array, Matrix]) -> list[Array]:
        """x @ weights.T of every pair, float32 (tokens, rows), the tiles of all shared among threads."""
        outs, jobs, narrow = [], [], dict[int, Any]()
        for x, matrix in pairs:
            if matrix.packed and len(x) <= PACKED:
                narrow[id(x)] = given = narrow[id(x)] if id(x) in narrow else matrix.torch.from_numpy(x).bfloat16()
                outs.append(matrix.packed(given).float().numpy())
                continue
            outs.append(out := np.empty((len(x), len(matrix.raw)), np.float32))
            if matrix.kind == 0:
                np.matmul(x, matrix.rows(ALL).T, out=out)  # BLAS has threads of its own
                continue
            step = -(-len(matrix.raw) // -(-len(matrix.raw) * matrix.width // TILE))
            jobs += [(matrix, x, out, slice(i, i + step)) for i in range(0, len(matrix.raw), step)]
        list((self.pool.map if len(jobs) > 1 and self.threads > 1 else map)(lambda job: job[0].product(*job[1:]), jobs))
        return outs

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
            x = x + (self._experts(h, block, recursion, tokens, source) if "bias" in block else self._mlp(h, block, "ffn"))
        cache.length += tokens
        return _norm(x, self.norm, self.eps)

    def _mlp(self, x: Array, parts: dict[str, Any], name: str) -> Array:
        return self._swiglus((x, [parts[f"{name}_{n}"] for n in ("gate", "up", "down")]))[0]

    def _swiglus(self, *parts: tuple[Array, list[Matrix]]) -> list[Array]:
        """SwiGLU MLPs of (x, [gate, up, down]), all at once."""
        halves = self.products(*((x, w) for x, ws in parts for w in ws[:2]))
        inner = [gate / (1 + np.exp(-gate)) * up for gate, up in zip(halves[::2], halves[1::2], strict=True)]
        return self.products(*((x, ws[2]) for x, (_, ws) in zip(inner, parts, strict=True)))

    def _attention(self, h: Array, block: dict[str, Any], cache: Cache, layer: int, turn: Any, visible: Any) -> Array:
        names = ("attn_q", "attn_k", "attn_v")
        heads = zip(self.products(*((h, block[n]) for n in names)), names, strict=True)
        q, k, v = ((y + block[f"{n}.bias"]).reshape(len(h), -1, self.size) for y, n in heads)
        q, k = (_turned(_norm(y, block[f"{n}_norm"], self.eps), *turn) for y, n in ((q, "attn_q"), (k, "attn_k")))
        cache.kv[layer, :, :, (past := cache.length) : past + len(h)] = k.swapaxes(0, 1), v.swapaxes(0, 1)
        keys, values = cache.kv[layer, :, :, : past + len(h)]
        q = q.swapaxes(0, 1).reshape(self.kv_heads, -1, self.size)  # (kv heads, group * tokens, size)
        scores = np.matmul(q, keys.swapaxes(1, 2)) * np.float32(self.size**-0.5)
        if visible is not None:
            scores.reshape(self.heads, len(h), -1)[:, ~visible] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = (np.matmul(scores, values) / scores.sum(-1, keepdims=True)).reshape(self.heads, len(h), self.size)
        return self.products((y.swapaxes(0, 1).reshape(len(h), -1), block["attn_output"]))[0]

    def _experts(self, h: Array, block: dict[str, Any], recursion: int, tokens: int, source: Array | None) -> Array:
        """The chosen experts, each with all of its tokens at once, and the shared one."""
        routed = h[:tokens] if source is not None and self.routing == "anchor" else h
        scores = 1 / (1 + np.exp(-(routed @ block["ffn_gate_inp"].rows(ALL).T)))
        if source is not None and self.routing == "block":
            scores = np.append(scores[:tokens], scores[tokens:].reshape(-1, self.length, scores.shape[1]).mean(1), 0)
        bias = block["bias"][min(recursion, len(block["bias"]) - 1)]
        chosen = np.argsort(-(scores + bias), -1, kind="stable")[:, : self.top]
        gates = np.take_along_axis(scores, chosen, -1)
        gates *= np.float32(self.gate_scale) / gates.sum(-1, keepdims=True)
        if source is not None:
            chosen, gates = chosen[source], gates[source]
        used = [(e, *np.nonzero(chosen == e)) for e in sorted(set(chosen.flat))]
        parts = [(h[rows], [block[f"ffn_{n}_exps"][e] for n in ("gate", "up", "down")]) for e, rows, _ in used]
        if shared := [block[f"ffn_{n}_shexp"] for n in ("gate", "up", "down") if f"ffn_{n}_shexp" in block]:
            parts.append((h, shared))
        outs = self._swiglus(*parts)
        y = outs[-1] if shared else np.zeros_like(h)
        for (_, rows, column), out in zip(used, outs, strict=False):
            y[rows] += out * gates[rows, column][:, None]
        return y

    def read(self, ids: Sequence[int], cache: Cache) -> Array:
        """Append a long text; final hidden states (tokens, width)."""
        return np.concatenate([self.forward(ids[i : i + PREFILL], cache) for i in range(0, len(ids) or 1, PREFILL)])

    def logits(self, ids: Sequence[int]) -> Array:
        """Logits behind every token of a text, float32 (tokens, vocabulary)."""
        return self.products((self.read(ids, Cache(self, len(ids))), self.head))[0]

    def ids(self, prompt: str | Sequence[int], tokens: int = 200, temperature: float = 0.8, top_k: int = 0,
            top_p: float = 1.0, seed: int | None = None, tidar: bool = False) -> Iterator[list[int]]:  # fmt: skip
        """The new tokens of each forward, up to `tokens` or the end token, which is given too; temperature 0 is greedy.

        tidar: draft with the diffusion head, verify in the same forward: the same text at temperature 0, else text of
        the same distribution.
        """
        text = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        text, end = text or [self.tokenizer.end], self.tokenizer.end
        if len(text) > self.context:
            raise GGUFError(f"the prompt has {len(text)} tokens, the model's context holds {self.context}")
        if tidar and not self.length:
            raise GGUFError("this file has no diffusion head to draft with: leave tidar out or export format=compact")

        def draws(x: Array, head: Matrix) -> Array:
            logits = np.where(self.tokenizer.writable, self.products((x, head))[0], -np.inf)
            return _distribution(logits, temperature, top_k, top_p)

        room = min(self.context, len(text) + tokens) + (self.length + 1) ** 2
        random, cache, draft, proposals, unread = np.random.default_rng(seed), Cache(self, room), [], np.empty(0), text[:-1]
        while tokens > 0:
            if cache.length >= self.context:  # the window slides: the last half of it is read anew
                cache.length, unread = 0, text[-(self.context // 2) - 1 : -1]
            _, past, unread = unread and self.read(unread, cache), cache.length, []
            given = [text[-1], *draft][: min(self.context - past, tokens)]
            hidden = self.forward(given, cache, range(1, len(given) + 1) if tidar else ())
            count, token = _verify(draws(hidden[: len(given)], self.head), given[1:], proposals, random)
            cache.length = past + count
            new = [*draft[: count - 1], token]
            new = new[: new.index(end) + 1] if end in new else new
            text, tokens = text + new, 0 if end in new else tokens - len(new)
            yield new
            first = len(given) + (count - 1) * self.length
            draft, masks = [], hidden[first + 1 : first + self.length]  # the group's first stands for the last token
            if tidar and tokens > 1 and len(masks):
                draft, proposals = self._draft(masks, text[-1], draws, random)

    def _draft(self, masks: Array, last: int, draws: Any, random: Any) -> tuple[list[int], Array]:
        """Proposals for what follows the last token, and what drew them, from hidden states (masks, width)."""
        if not self.chain:
            proposals = draws(masks, self.diffusion)
            return [_draw(p, random) for p in proposals], proposals
        draft, drawn = [], []
        for mask in masks:  # with a chain, each also depends on the one before it
            x = np.append(mask, _norm(self.embed.rows([last]), self.chain["chain_norm"], self.eps))[None]
            drawn.append(draws(mask + self._mlp(x, self.chain, "chain"), self.diffusion)[0])
            draft.append(last := _draw(drawn[-1], random))
        return draft, np.array(drawn)

    def generate(self, prompt: str, tokens: int = 200, **options: Any) -> Iterator[str]:
        """Text behind a prompt in pieces, as it is written; options as in `ids`."""
        decoder, self.paces = codecs.getincrementaldecoder("utf-8")("replace"), list[int]()  # tokens of each forward
        for new in self.ids(prompt, tokens, **options):
            self.paces.append(len(new))
            yield decoder.decode(b"".join(self.tokenizer.bytes[i] for i in new))
        yield decoder.decode(b"", True)

def _norm(x: Array, weight: Array, eps: float) -> Array:
    y: Array = x / np.sqrt(np.einsum("...i,...i->...", x, x) / x.shape[-1] + eps)[..., None] * weight
    return y

def _turned(x: Array, cos: Array, sin: Array) -> Array:
    a, b = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1, dtype=np.float32)

def _distribution(logits: Array, temperature: float, top_k: int, top_p: float) -> Array:
    """What to draw from, float64 (rows, vocabulary)."""
    if not np.isfinite(best := logits.max(-1, keepdims=True)).all():
        raise GGUFError("the weights give logits that are no numbers: the file is damaged")
    if temperature < 1e-30:
        return np.eye(logits.shape[-1])[logits.argmax(-1)]
    probs: Array = np.exp((logits - best) / temperature)
    if 0 < top_k < probs.shape[-1] or top_p < 1:
        order = np.argsort(-probs, -1, kind="stable")
        ranked = np.take_along_axis(probs, order, -1)
        ranked[:, top_k or len(order[0]) :] = 0
        ranked /= ranked.sum(-1, keepdims=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        np.put_along_axis(probs, order, ranked, -1)
    return probs / probs.sum(-1, keepdims=True)

def _draw(probs: Array, random: Any) -> int:
    total = probs.cumsum()
    return int(np.searchsorted(total, min(random.random() * total[-1], np.nextafter(total[-1], 0)), "right"))

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
    for name, kind, default, text in (
        ("--tokens", int, 200, "tokens to write at most"), ("--temperature", float, 0.8, "0 takes the likeliest token"),
        ("--top-k", int, 0, "draw from the k likeliest tokens; 0 = all"), ("--seed", int, None, "of what is drawn"),
        ("--top-p", float, 1.0, "draw from the likeliest tokens of this probability"),
        ("--threads", int, None, "for unpacking and torch, None = all; BLAS reads OPENBLAS_NUM_THREADS"),
    ):  # fmt: skip
        parser.add_argument(name, type=kind, default=default, help=f"{text} (%(default)s)")
    parser.add_argument("--tidar", action="store_true", help="draft several tokens, verify them in one forward")
    parser.add_argument("--numpy", action="store_true", help="numpy alone, even where torch is installed")
    given = vars(parser.parse_args())
    try:
        model = Elara(given.pop("model"), given.pop("threads"), False if given.pop("numpy") else None)
        begun, show = time.perf_counter(), functools.partial(print, end="", flush=True)
        for i, text in enumerate(model.generate(**given)):
            show(given["prompt"] + text if i == 0 else text)
        count, took = sum(model.paces), time.perf_counter() - begun
        show(f"\n\n[{count} tokens, {count / took:.1f} tokens/s, {count / max(1, len(model.paces)):.2f} per forward]\n")
    except (GGUFError, KeyboardInterrupt) as error:
        sys.exit(f"error: {error}" if isinstance(error, GGUFError) else 130)

if __name__ == "__main__":
    main()
