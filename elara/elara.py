#!/usr/bin/env python3
"""Elara in one file: reads a GGUF file and writes text, with numpy alone. Copy it anywhere and run it:

    python elara.py model.gguf "Once upon" [--tidar] [--tokens 200] [--temperature 0.8] [--seed 1]

Architectures: `elara` (one copy of each block, recursion, diffusion head), `hy_v3` (unrolled, as in llama.cpp). Weights
stay quantized: a product unpacks tiles of rows that fit the processor's cache, or goes through torch where it is there.
"""

import argparse
import codecs
import functools
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import Any, Self

import numpy as np

Array = np.ndarray[Any, Any]
# Types of tensors: name, weights in a block, bytes of a block. Then the forms of numbers among the keys
TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 8: ("Q8_0", 32, 34),
         12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210)}  # fmt: skip
FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
U32, STRING, LIST, U64 = 4, 8, 9, 10
NOTES = (".commit", ".data", ".step", ".active", "elara.tokenizer", ".bos_token_id", ".padding_token_id")  # no matter
PREFILL, TILE = 256, 1 << 20  # tokens read at once; weights unpacked at once: fewer cost calls, more leave the cache
FEW, PACKED = 8, 24  # tokens up to which sums are scaled instead of weights; up to which torch's kernels are faster

class GGUFError(ValueError):
    """What is wrong with a file or a request, in one sentence."""

class Reader:
    """A mapped GGUF file; every count and offset in its header is held against its size before it is believed."""
    def __init__(self, path: str) -> None:
        self.path, self.at, self.data = path, 0, b""  # type: str, int, Any
        try:
            self.data = np.memmap(path, mode="r").data
        except (OSError, ValueError) as error:
            self.fail(getattr(error, "strerror", None) or "the file is empty")
        if self.take(4) != b"GGUF" or self.read(U32) not in (2, 3):
            self.fail("this is no GGUF file of version 2 or 3")
        count, keys = self.read(U64), self.read(U64)
        self.keys = {self.read(STRING): self.read(self.read(U32)) for _ in range(keys)}
        self.tensors, self.groups = dict[str, tuple[tuple[int, ...], int, int]](), dict[Any, list[Matrix]]()  # as read
        for _ in range(count):
            name, axes = self.read(STRING), self.read(U32)
            shape = [self.read(U64) for _ in range(axes if axes < 5 else self.fail(f"a tensor has {axes} axes"))]
            self.tensors[name] = tuple(shape[::-1]), self.read(U32), self.read(U64)
        if len(self.keys) < keys or len(self.tensors) < count:
            self.fail("the file is damaged: two keys or two tensors have the same name")
        self.base = self.at + -self.at % (self.key("general.alignment", 32) or 1)
    def fail(self, what: str) -> Any:
        raise GGUFError(f"{self.path}: {' '.join(what.split()):.250}")  # names in a damaged file can be anything
    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            self.fail("the file is truncated or damaged: its header ends early")
        self.at += size
        return bytes(self.data[self.at - size : self.at])
    def read(self, kind: int) -> Any:
        each, count = (self.read(U32), self.read(U64)) if kind == LIST else (kind, 1)
        if each == STRING:
            texts = [self.take(int.from_bytes(self.take(8), "little")).decode("utf-8", "replace") for _ in range(count)]
            return texts if kind == LIST else texts[0]
        form = np.dtype(FORMS.get(each) or self.fail("the file is damaged: a key has a value of unknown type"))
        values = np.frombuffer(self.take(form.itemsize * count), form)
        return values if kind == LIST else values.item()
    def key(self, name: str, default: Any = None, known: Any = None, kind: Any = int) -> Any:
        """Take a key's value out; numbers must not be negative, fractions not 0. known: what can be computed here."""
        value = self.keys.pop(name, default)
        value = float(value) if kind is float and type(value) is int else value
        odd = type(value) is not kind or (kind in (int, float) and not -(kind is int) < value < 1 << 40)
        if odd or (known is not None and value not in known):
            self.fail(f"the key {name} is {'missing' if value is None else f'unusable: {value!s:.40}'}")
        return value
    def tensor(self, name: str, *shape: int) -> Any:
        """Take out the tensor of a name and shape: float32 for one axis, a Matrix for two, a list of them for three."""
        found, kind, offset = self.tensors.pop(name, None) or self.fail(f"it lacks the tensor {name}")
        if found != shape or kind not in TYPES:
            of = "/".join(each for each, _, _ in TYPES.values())
            self.fail(f"tensor {name} is {found} of type {kind}, not {shape} of {of}")
        _, weights, size = TYPES[kind]
        rows, row = math.prod(shape[:-1]), shape[-1] // weights * size
        if shape[-1] % weights or not rows * row or self.base + offset + rows * row > len(self.data):
            self.fail(f"the file is truncated or damaged: tensor {name} does not lie within it")
        raw = np.frombuffer(self.data, np.uint8, rows * row, self.base + offset)
        parts = [Matrix(part, kind, shape[-1]) for part in raw.reshape(math.prod(shape[:-2]), -1, row)]
        for i, part in enumerate(parts):  # those that meet the same x side by side: q, k and v, or gate and up
            self.groups.setdefault((re.sub(r"attn_[qkv]\.|_(gate|up)(?=[._])", "", name), i, kind), []).append(part)
        return parts if len(shape) == 3 else parts[0] if len(shape) == 2 else parts[0].rows()[0]

# weights = levels (*groups, blocks, rows, k) * scales (*groups or ones, blocks, rows) - minima (alike or None)
Unpacked = tuple[Array, Array, Array | None]  # from b, blocks of bytes: uint8 (rows, blocks, bytes of one)
LOW, FIFTH, PAIR = (np.uint64(bits * 0x0101010101010101) for bits in (0x0F, 0x10, 0x30))  # of eight bytes at once

def _numbers(b: Array, kind: str, first: int, count: int) -> Array:  # of each block, float32 (count, blocks, rows)
    return b.view(kind)[..., first : first + count].transpose(2, 1, 0).astype(np.float32, order="C")
def _runs(b: Array, first: int, count: int, size: int = 32) -> Array:
    """Runs of bytes that each block holds, one behind the other: uint64 (count, blocks, rows, size / 8)."""
    runs = b[..., first : first + count * size].view(f"V{size}").transpose(2, 1, 0)
    return np.array(runs, order="C").view(np.uint64).reshape(*runs.shape, -1)  # a copy, which may be written to
def _halves(runs: Array) -> Array:  # the low and the high four bits of all bytes, (..., 2, blocks, rows, size / 8)
    levels = np.empty((*runs.shape[:-3], 2, *runs.shape[-3:]), np.uint64)
    np.bitwise_and(runs, LOW, out=levels[..., 0, :, :, :])
    np.bitwise_and(np.right_shift(runs, 4, out=runs), LOW, out=levels[..., 1, :, :, :])
    return levels
def _floats(levels: Array, offset: int = 0) -> Array:
    small = levels.view(np.int8)
    return (np.subtract(small, np.int8(offset), out=small) if offset else small).astype(np.float32)
def _k_scales(b: Array) -> Array:
    """Scales and minima, (2, 4, 2, blocks, rows): two float16 times sixteen numbers of 6 bits in 12 bytes."""
    packed, shifts = b.view("<u4").transpose(2, 1, 0), np.array([0, 4], np.uint32)[:, None, None]
    words = np.empty((4, *packed.shape[1:]), np.uint32)
    np.bitwise_and(packed[1:3], 0x3F3F3F3F, out=words[::2])
    np.bitwise_or(packed[3] >> shifts & 0x0F0F0F0F, packed[1:3] >> 2 & 0x30303030, out=words[1::2])
    numbers = words.view(np.uint8).reshape(*words.shape, 4).transpose(0, 3, 1, 2).astype(np.float32, order="C")
    return numbers.reshape(2, 4, 2, *words.shape[1:]) * _numbers(b, "<f2", 0, 2)[:, None, None]
def _q4_0(b: Array) -> Unpacked:
    return _floats(_halves(_runs(b, 2, 1, 16)[0]), 8), _numbers(b, "<f2", 0, 1), None
def _q8_0(b: Array) -> Unpacked:
    return b.view(np.int8).astype(np.float32)[..., 2:].swapaxes(0, 1), _numbers(b, "<f2", 0, 1)[0], None
def _q4_k(b: Array) -> Unpacked:
    return _floats(_halves(_runs(b, 16, 4))), *_k_scales(b)
def _q5_k(b: Array) -> Unpacked:
    levels, (high,) = _halves(_runs(b, 48, 4)), _runs(b, 16, 1)
    for bit in range(8):
        levels[bit // 2, bit % 2] |= (high << 4 - bit if bit < 4 else high >> bit - 4) & FIFTH
    return _floats(levels), *_k_scales(b)
def _q6_k(b: Array) -> Unpacked:
    low, high = _runs(b, 0, 4), _runs(b, 128, 2)
    levels = _halves(low.reshape(2, 2, *low.shape[1:]))  # (half, quarter, low or high four bits, ...)
    for i, bits in enumerate((high << 4, high << 2, high, high >> 2)):
        levels[:, i % 2, i // 2] |= bits & PAIR
    wide = _floats(levels, 32).swapaxes(1, 2).reshape(2, 2, 2, *low.shape[1:3], 2, 16).transpose(0, 1, 2, 5, 3, 4, 6)
    return wide, (_numbers(b, "b", 192, 16) * _numbers(b, "<f2", 104, 1)).reshape(wide.shape[:-1]), None
UNPACK = {2: _q4_0, 8: _q8_0, 12: _q4_k, 13: _q5_k, 14: _q6_k}

class Matrix:
    """Weights as they lie in the file, uint8 (rows, bytes of a row), of one of TYPES."""
    def __init__(self, raw: Array, kind: int, width: int) -> None:
        self.raw, self.kind, self.width = raw, kind, width
        self.packed, self.span = None, ...  # type: Any, Any  # torch's product of x (tokens, width), own columns of it
    def unpack(self, part: Any) -> Unpacked:
        return UNPACK[self.kind](self.raw[part].reshape(-1, self.width // TYPES[self.kind][1], TYPES[self.kind][2]))
    def rows(self, part: Any = ...) -> Array:
        """Some rows as float32, (rows, width)."""
        raw: Array = self.raw[part]
        if self.kind == 0:
            return raw.view("<f4")
        if self.kind == 30:
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        if self.kind == 1:  # by moving bits, as numpy's own cast takes ten times as long; not for infinities
            return ((raw.view("<i2").astype(np.int32) << 13) & -0x70002000).view(np.float32) * np.float32(2.0**112)
        levels, scales, minima = self.unpack(part)
        out: Array = levels * scales[..., None] - (0 if minima is None else minima[..., None])
        return out.transpose(-2, -3, *range(out.ndim - 3), -1).reshape(-1, self.width)  # (*groups, blocks, rows, k)
    def product(self, x: Array, out: Array, part: slice) -> None:
        """out[:, part] = x @ rows(part).T; x: (tokens, width)."""
        if self.kind not in UNPACK or len(x) > FEW:
            np.matmul(x, self.rows(part).T, out=out[:, part])
            return
        levels, scales, minima = self.unpack(part)
        *groups, blocks, rows, k = levels.shape
        x = np.ascontiguousarray(x.T.reshape(blocks, *groups, k, -1).transpose(*range(1, len(groups) + 1), 0, -2, -1))
        parts = -(-rows // 256) if rows % -(-rows // 256) == 0 else 1  # so small that BLAS starts no threads for them
        sums = np.matmul(levels.reshape(*groups, blocks, parts, -1, k), x[..., None, :, :]).reshape(-1, rows, len(out))
        scales = np.broadcast_to(scales, levels.shape[:-1]).reshape(sums.shape[:-1])
        out[:, part] = (sums[..., 0] * scales).sum(0) if len(out) == 1 else np.einsum("grt,gr->tr", sums, scales)
        if minima is not None:
            out[:, part] -= x.sum(-2).reshape(len(sums), -1).T @ minima.reshape(len(sums), -1)
    def pack(self, torch: Any, group: "list[Matrix]") -> None:
        """Repack a group's rows, all held here, for torch: types of 4 bits with bfloat16 scales, else 8 bits a row."""
        forms, scales, four = list[Any](), list[Any](), self.kind in (2, 12)
        for part in (slice(i, i + 1024) for i in range(0, len(self.raw), 1024)):
            if four:
                levels, scale, minima = self.unpack(part)
                zero = 0 * scale if minima is None else 8 * scale - minima
                form = np.moveaxis(levels, (-2, -3), (0, 1)).reshape(-1, self.width) + (8 if minima is None else 0)
                forms.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(form.astype("i4")), 2))
                scale = np.moveaxis(np.array([scale, zero]), (-1, -2), (1, 2)).reshape(2, len(form), -1).T
            else:
                form = self.rows(part)
                scale = np.abs(form).max(1) / 127 + np.float32(1e-30)
                forms.append(torch.from_numpy(np.rint(form / scale[:, None]).astype(np.int8)))
            scales.append(torch.from_numpy(scale).bfloat16())
        product = torch.ops.aten._weight_int4pack_mm_for_cpu if four else torch.ops.aten._weight_int8pack_mm
        weights = torch.cat(forms), *([32] if four else []), torch.cat(scales, 1 if four else 0)
        packed = lambda x: product(torch.from_numpy(x).bfloat16(), *weights).float().numpy()  # noqa: E731
        for each, end in zip(group, accumulate(len(each.raw) for each in group), strict=True):
            each.packed, each.span = packed, slice(end - len(each.raw), end)
# Letters and digits of Unicode 15 and 16, which older Pythons do not know: first+count
NEWER = {"Z": """1c89+2 a7cb+3 a7da+3 105c0+34 10d4a+1c 10d6f+17 10ec2+3 1123f+2 11380+a 1138b+1 1138e+1 11390+26
113b7+1 113d1+1 113d3+1 11bc0+21 11f02+1 11f04+d 11f12+22 1342f+1 13441+6 13460+f9b 16100+1e 16d40+2d 18cff+1 1b132+1
1b155+1 1df25+6 1e030+3e 1e4d0+1c 1e5d0+1e 1e5f0+1 2b739+1 2ebf0+26e 31350+1060""", "0": """10d40+a 116d0+14 11bf0+a
11f50+a 16130+a 16d70+a 1ccf0+a 1d2c0+14 1e4f0+a 1e5f1+a"""}  # fmt: skip
# GPT-2's splitting into words, on text in which letters beyond ASCII are Z, digits 0, spaces newlines, all else !
WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s")
LETTERS = {b: chr(b) for b in range(256)} | {b: chr(256 + i) for i, b in enumerate([*range(33), *range(127, 161), 173])}
BYTES = {letter: byte for byte, letter in LETTERS.items()}  # GPT-2's letter for every byte, and back
@functools.cache
def _shape(c: str) -> str:
    """The character of WORDS that stands for one which is not printable ASCII."""
    for newer, ranges in NEWER.items():
        if any(0 <= ord(c) - int(first, 16) < int(size, 16) for first, size in (r.split("+") for r in ranges.split())):
            return newer
    return "\n" if c.isspace() and not "\x1c" <= c <= "\x1f" else "Z" if c.isalpha() else "0" if c.isnumeric() else "!"

class Tokenizer:
    """Byte-level BPE from a file's keys; vocabularies of characters and bytes are written as such too."""
    def __init__(self, reader: Reader) -> None:
        tokens, merges = (reader.key(f"tokenizer.ggml.{n}", kind=list) for n in ("tokens", "merges"))
        kinds = np.asarray(reader.keys.pop("tokenizer.ggml.token_type", ()))
        self.end = reader.key("tokenizer.ggml.eos_token_id")
        self.mask = reader.key("tokenizer.ggml.mask_token_id", 0)
        for name, only in (("model", "gpt2"), ("pre", "gpt-2"), ("add_bos_token", False)):
            reader.key(f"tokenizer.ggml.{name}", None if only else only, (only,), type(only))
        if kinds.shape != (len(tokens),) or not set(kinds) <= {1, 3, 5} or max(self.end, self.mask) >= len(tokens):
            reader.fail("its tokenizer lacks its end or mask, or the types of its tokens, or has some of other types")
        self.writable = (kinds == 1) | (np.arange(len(kinds)) == self.end)
        self.ids = {token: i for i, token in enumerate(tokens) if kinds[i] == 1}
        self.bytes = [bytes(BYTES.get(c, 63) for c in t) if kinds[i] == 1 else b"" for i, t in enumerate(tokens)]
        self.ranks = {tuple(pair.split(" ")): rank for rank, pair in enumerate(merges)}
        self.word = functools.cache(self._word)
    def encode(self, text: str) -> list[int]:
        """Ids of plain text; raises GGUFError for a character that the vocabulary lacks."""
        words = WORDS.finditer(re.sub(r"[^ -~]", lambda c: _shape(c[0]), text))
        return [i for word in words for i in self.word(text[slice(*word.span())])]
    def _word(self, word: str) -> list[int]:
        parts = [LETTERS[byte] for byte in word.encode("utf-8", "surrogatepass")]
        while best := min(filter(self.ranks.__contains__, pairwise(parts)), key=self.ranks.__getitem__, default=()):
            parts = f" {'  '.join(parts)} ".replace(" {}  {} ".format(*best), " {}{} ".format(*best)).split()
        if any(part not in self.ids for part in parts):
            raise GGUFError(f"{word!r} holds a character that the model's vocabulary lacks")
        return [self.ids[part] for part in parts]

class Cache:
    """Keys and values of every layer for so many tokens and masks, `length` of them valid; takes memory as it fills."""
    def __init__(self, model: "Elara", capacity: int) -> None:
        self.kv, self.length = np.empty((len(model.layers), 2, model.kv_heads, capacity, model.size), np.float32), 0

class Elara:
    """A model from a GGUF file: `generate` streams text, `logits` scores it."""
    def __init__(self, path: str, threads: int | None = None, use_torch: bool | None = None) -> None:
        reader = Reader(path)
        if (arch := reader.key("general.architecture", kind=str)) not in ("elara", "hy_v3"):
            reader.fail(f"it is a model of the architecture {arch}, only elara and hy_v3 can be read")
        key: Any = lambda name, *given, **more: reader.key(f"{arch}.{name}", *given, **more)  # noqa: E731
        def mlp(name: str, hidden: int, *experts: int, given: int | None = None) -> list[Any]:
            shapes = {"gate": (hidden, given or w), "up": (hidden, given or w), "down": (w, hidden)}
            return [reader.tensor(name.format(part), *experts, *shape) for part, shape in shapes.items()]
        self.tokenizer, self.context = Tokenizer(reader), key("context_length", known=range(2, 1 << 40))
        w, h, experts = key("embedding_length"), key("feed_forward_length"), key("expert_count", 0)
        self.heads, d = key("attention.head_count"), key("attention.key_length", known=range(2, 1 << 16, 2))
        self.kv_heads = key("attention.head_count_kv", self.heads, [n for n in range(1, 4096) if self.heads % n == 0])
        self.eps, base = key("attention.layer_norm_rms_epsilon", kind=float), key("rope.freq_base", 10000.0, kind=float)
        count, depth = key("block_count", known=range(1, len(reader.tensors))), key("recursion.depth", 1, range(1, 257))
        order = key("recursion.order", "block", ("block", "stack"), str)
        self.length, num_shared = key("tidar.block_length", 0, range(257)), key("expert_shared_count", 0)
        self.routing = key("tidar.draft_routing", "token", ("token", "block", "anchor"), str)
        self.top = key("expert_used_count", 0, range(min(experts, 1), experts + 1))
        self.gate_scale, inner = key("expert_weights_scale", 1.0, kind=float), key("expert_feed_forward_length", 0)
        shared = key("expert_shared_feed_forward_length", 0, (inner * num_shared,) if num_shared else None)  # of all
        self.size, q, k, vocabulary = d, self.heads * d, self.kv_heads * d, len(self.tokenizer.bytes)
        for n, only in (("attention.value_length", d), ("rope.dimension_count", d), ("vocab_size", vocabulary),
                        ("expert_gating_func", 2), ("expert_weights_norm", True)):  # 2: sigmoid
            key(n, None if only is True and experts else only, (only,), type(only))
        shapes = {"attn_norm": (w,), "attn_q": (q, w), "attn_k": (k, w), "attn_v": (k, w), "attn_q_norm": (d,)}
        shapes |= {"attn_k_norm": (d,), "attn_output": (w, q), "ffn_norm": (w,)}
        self.blocks = list[dict[str, Any]]()
        for prefix in (f"blk.{i}." for i in range(count)):
            block = {name: reader.tensor(f"{prefix}{name}.weight", *shape) for name, shape in shapes.items()}
            given = [(f"{prefix}attn_{n}.bias", size) for n, size in (("q", q), ("k", k), ("v", k))]
            bias = [reader.tensor(*each) if each[0] in reader.tensors else np.zeros(each[1], "f4") for each in given]
            block["qkv_bias"], both = np.concatenate(bias), [block["attn_q_norm"], block["attn_k_norm"]]
            block["qk_norm"] = np.repeat(both, (self.heads, self.kv_heads), 0)[:, None]
            if f"{prefix}ffn_gate_inp.weight" in reader.tensors:
                block["router"] = reader.tensor(f"{prefix}ffn_gate_inp.weight", experts, w)
                block["experts"] = mlp(prefix + "ffn_{}_exps.weight", inner, experts)
                passes = reader.tensors.get(f"{prefix}exp_probs_b", ((),))[0][:-1][:1]  # of every pass, or of this one
                bias = reader.tensor(f"{prefix}exp_probs_b", *passes, experts)
                block["bias"] = bias.rows() if passes else bias[None]  # that of selection
                block["shared"] = [mlp(prefix + "ffn_{}_shexp.weight", shared)] if shared else []
                if shared and not num_shared and block["shared"][0][2].rows().any():
                    reader.fail(f"its keys know no shared expert, and block {prefix[4:-1]} has one")
            else:
                block["mlp"] = mlp(prefix + "ffn_{}.weight", h)
            self.blocks.append(block)
        self.layers = [divmod(i, depth) if order == "block" else divmod(i, count)[::-1] for i in range(count * depth)]
        name = "output.weight" if "output.weight" in reader.tensors else "token_embd.weight"
        self.norm, self.head = reader.tensor("output_norm.weight", w), reader.tensor(name, vocabulary, w)
        own = "diffusion.weight" in reader.tensors  # else it is the other head's
        self.diffusion = reader.tensor("diffusion.weight", vocabulary, w) if own else self.head
        self.chain = mlp("chain_{}.weight", w, given=2 * w) if "chain_norm.weight" in reader.tensors else []
        self.chain_norm: Any = reader.tensor("chain_norm.weight", w) if self.chain else None
        self.frequency = base ** (np.arange(0, d, 2, dtype=np.float32) / -d)
        self.threads = threads or os.cpu_count() or 1
        self.pool = ThreadPoolExecutor(self.threads)
        if use_torch or (use_torch is None and find_spec("torch")):
            import torch
            torch.set_num_threads(threads or torch.get_num_threads())
            for group in (each for each in reader.groups.values() if each[0].kind in UNPACK):
                if sum(len(m.raw) for m in group) % 16 == 0:
                    Matrix(np.concatenate([m.raw for m in group]), group[0].kind, group[0].width).pack(torch, group)
        self.embed = reader.tensor("token_embd.weight", vocabulary, w) if name == "output.weight" else self.head
        left = [n for n in reader.keys if n.startswith((f"{arch}.", "tokenizer.ggml.")) and not n.endswith(NOTES)]
        if left := [*reader.tensors, *left]:
            reader.fail(f"it holds {left[0]}, which this program does not know and would leave out")
    @classmethod
    def load(cls, path: str | os.PathLike[str], threads: int | None = None, use_torch: bool | None = None) -> Self:
        """Open a GGUF file. threads: default all (of torch: as it is). use_torch: None = where it is installed."""
        return cls(os.fspath(path), threads, use_torch)
    def products(self, *pairs: tuple[Array, Matrix]) -> list[Array]:
        """x @ weights.T of every pair, float32 (tokens, rows), the tiles of all shared among threads."""
        outs, jobs, made = [], list[Any](), dict[Any, Any]()
        for x, matrix in pairs:
            if matrix.packed and len(x) <= PACKED:
                if (key := (id(x), matrix.packed)) not in made:
                    made[key] = matrix.packed(x)
                outs.append(made[key][:, matrix.span])
                continue
            outs.append(out := np.empty((len(x), len(matrix.raw)), np.float32))
            tiles = -(-len(matrix.raw) * matrix.width // TILE // self.threads) * self.threads
            step = -(-len(matrix.raw) // tiles // 64) * 64 if matrix.kind else len(matrix.raw)  # F32: by BLAS's threads
            jobs += [(matrix, x, out, slice(i, i + step)) for i in range(0, len(matrix.raw), step)]
        run = lambda part: [matrix.product(*job) for matrix, *job in part]  # noqa: E731
        waits = [self.pool.submit(run, jobs[i :: self.threads]) for i in range(1, min(self.threads, len(jobs)))]
        run(jobs[:: self.threads])
        _ = [wait.result() for wait in waits]
        return outs
    def forward(self, ids: Sequence[int], cache: Cache, groups: Sequence[int] = ()) -> Any:
        """Append tokens to the cache; final hidden states (tokens + masks, width). For each j in groups, `length` masks
        see the cache, the first j tokens and each other (TiDAR, arXiv 2511.08923, section 3.2), and are not kept."""
        past, tokens = cache.length, len(ids)
        group = np.repeat(np.arange(len(groups)), self.length)  # of each mask
        behind = np.repeat(np.array(groups, int), self.length)  # tokens that each mask sees
        place = past + np.append(np.arange(tokens), behind + np.tile(np.arange(self.length), len(groups)))
        key = np.arange(past + len(place))
        visible = key <= key[past:, None]
        visible[tokens:] = key < past + behind[:, None]
        visible[tokens:, past + tokens :] = group[:, None] == group
        turn = [f(place[:, None] * self.frequency).astype("f4") for f in (np.cos, np.sin)]  # (all, size / 2)
        x = self.embed.rows(np.append(ids, [self.tokenizer.mask] * len(group)).astype(int))
        for layer, (i, recursion) in enumerate(self.layers):
            block = self.blocks[i]
            x = x + self._attention(_norm(x, block["attn_norm"], self.eps), block, cache, layer, turn, visible)
            x = x + self._mlp(_norm(x, block["ffn_norm"], self.eps), block, recursion, tokens, behind)
        cache.length += tokens
        return _norm(x, self.norm, self.eps)
    def _swiglus(self, *parts: tuple[Array, list[Matrix]]) -> list[Array]:  # MLPs of (x, [gate, up, down])
        halves = self.products(*((x, w) for x, ws in parts for w in ws[:2]))
        inner = [gate / (1 + np.exp(-gate)) * up for gate, up in zip(halves[::2], halves[1::2], strict=True)]
        return self.products(*((x, ws[2]) for x, (_, ws) in zip(inner, parts, strict=True)))
    def _attention(self, h: Array, block: dict[str, Any], cache: Cache, layer: int, turn: Any, visible: Array) -> Array:
        y = np.concatenate(self.products(*((h, block[f"attn_{n}"]) for n in "qkv")), 1) + block["qkv_bias"]
        y = y.reshape(len(h), -1, self.size).swapaxes(0, 1)  # queries, keys and values: (heads, tokens, size)
        qk = _turned(_norm(y[: -self.kv_heads], block["qk_norm"], self.eps), *turn)
        new = slice(past := cache.length, past + len(h))
        cache.kv[layer, 0, :, new], cache.kv[layer, 1, :, new] = qk[self.heads :], y[-self.kv_heads :]
        keys, values = cache.kv[layer, :, :, : past + len(h)]
        q = (qk[: self.heads] * np.float32(self.size**-0.5)).reshape(self.kv_heads, -1, self.size)
        scores = np.matmul(q, keys.swapaxes(1, 2))  # (kv heads, group * tokens, keys)
        if len(h) > 1:
            scores.reshape(self.heads, len(h), -1)[:, ~visible] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = (np.matmul(scores, values) / scores.sum(-1, keepdims=True)).reshape(self.heads, len(h), self.size)
        return self.products((y.swapaxes(0, 1).reshape(len(h), -1), block["attn_output"]))[0]
    def _mlp(self, h: Array, block: dict[str, Any], recursion: int, tokens: int, behind: Array) -> Array:
        if "mlp" in block:
            return self._swiglus((h, block["mlp"]))[0]  # dense; else the chosen experts and the shared one
        scores = 1 / (1 + np.exp(-(h @ block["router"].rows().T)))
        if self.routing == "anchor":  # a mask takes the experts of the token before its group
            scores[tokens:] = scores[behind - 1]
        if self.routing == "block" and len(behind):
            scores[tokens:] = scores[tokens:].reshape(-1, self.length, len(scores.T)).mean(1).repeat(self.length, 0)
        chosen = np.argsort(-(scores + block["bias"][: recursion + 1][-1]), -1, kind="stable")[:, : self.top]
        gates = scores[np.arange(len(h))[:, None], chosen]
        gates *= np.float32(self.gate_scale) / gates.sum(-1, keepdims=True)
        used = {e: np.nonzero(chosen == e) for e in sorted(set(chosen.flat))}
        parts = [(h[rows], [part[e] for part in block["experts"]]) for e, (rows, _) in used.items()]
        outs = self._swiglus(*parts, *((h, shared) for shared in block["shared"]))
        y = outs.pop() if block["shared"] else np.zeros_like(h)
        for (rows, column), out in zip(used.values(), outs, strict=True):
            y[rows] += out * gates[rows, column][:, None]
        return y
    def read(self, ids: Sequence[int], cache: Cache) -> Array:
        """Append a long text; final hidden states (tokens, width)."""
        return np.concatenate([self.forward(ids[i : i + PREFILL], cache) for i in range(0, len(ids) or 1, PREFILL)])
    def logits(self, ids: Sequence[int]) -> Array:
        """Logits behind every token of a text, float32 (tokens, vocabulary)."""
        return self.products((self.read(ids, Cache(self, len(ids))), self.head))[0]
    def ids(self, prompt: str | Sequence[int], tokens: int = 200, temperature: float = 0.8, top_k: int = 0,
            top_p: float = 1.0, seed: int | None = None, tidar: bool = False, stop: Any = ()) -> Iterator[list[int]]:
        """The new tokens of each forward, up to `tokens`, the end or a stop token (given too); temperature 0 is greedy.
        tidar: draft with the diffusion head, verify in the same forward: the same text if greedy, else distribution."""
        text = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        text, ends = text or [self.tokenizer.end], {self.tokenizer.end, *stop}
        if len(text) > self.context:
            raise GGUFError(f"the prompt has {len(text)} tokens, the model's context holds {self.context}")
        if tidar and not self.length:
            raise GGUFError("this file has no diffusion head to draft with: leave tidar out or export format=compact")
        draws = functools.partial(self._distribution, temperature=temperature, top_k=top_k, top_p=top_p)
        random, draft, proposals = np.random.default_rng(seed), list[int](), np.empty(0)
        cache = Cache(self, min(self.context, len(text) + tokens) + (self.length + 1) ** 2)
        while tokens > 0:
            if cache.length >= self.context:  # the window slides: the last half of it is read anew
                cache.length, text = 0, text[-(self.context // 2) - 1 :]
            if unread := text[cache.length : -1]:
                self.read(unread, cache)
            given = [text[-1], *draft][: min(self.context - cache.length, tokens)]
            hidden = self.forward(given, cache, range(1, len(given) + 1) if tidar else ())
            count, token = _verify(draws(hidden[: len(given)], self.head), given[1:], proposals, random)
            cache.length += count - len(given)
            new = [*draft[: count - 1], token]
            new = new[: next((i + 1 for i, token in enumerate(new) if token in ends), None)]
            text, tokens = text + new, 0 if new[-1] in ends else tokens - len(new)
            yield new
            draft, masks = [], hidden[len(given) + (count - 1) * self.length :][1 : self.length]
            if tidar and tokens > 1 and len(masks):
                draft, proposals = self._draft(masks, text[-1], draws, random)
    def _draft(self, masks: Array, last: int, draws: Any, random: Any) -> tuple[list[int], Array]:
        """Proposals for what follows the last token, and what drew them, from hidden states (masks, width)."""
        proposals = np.empty((len(masks), len(self.head.raw))) if self.chain else draws(masks, self.diffusion)
        draft = [last]
        for i, mask in enumerate(masks):
            if self.chain:  # each also depends on the one before it
                x = np.append(mask, _norm(self.embed.rows(draft[-1:]), self.chain_norm, self.eps))[None]
                proposals[i] = draws(mask + self._swiglus((x, self.chain))[0], self.diffusion)[0]
            draft.append(_draw(proposals[i], random))
        return draft[1:], proposals
    def _distribution(self, x: Array, head: Matrix, temperature: float, top_k: int, top_p: float) -> Any:
        """What to draw from behind hidden states, float64 (rows, vocabulary)."""
        logits = np.where(self.tokenizer.writable, self.products((x, head))[0].astype(np.float64), -np.inf)
        if not np.isfinite(best := logits.max(-1, keepdims=True)).all():
            raise GGUFError("the weights give logits that are no numbers: the file is damaged")
        if temperature < 1e-30:
            return (np.arange(logits.shape[-1]) == logits.argmax(-1)[:, None]).astype(np.float64)
        probs = np.exp((logits - best) / temperature)
        if 0 < top_k < probs.shape[-1] or top_p < 1:
            order = np.argsort(-probs, -1, kind="stable")
            ranked = np.take_along_axis(probs, order, -1)
            ranked[:, top_k or len(order[0]) :] = 0
            ranked /= ranked.sum(-1, keepdims=True)
            ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
            np.put_along_axis(probs, order, ranked, -1)
        return probs / probs.sum(-1, keepdims=True)
    def generate(self, prompt: str, tokens: int = 200, **options: Any) -> Iterator[str]:
        """Text behind a prompt in pieces, as it is written; options as in `ids`."""
        decoder, self.paces = codecs.getincrementaldecoder("utf-8")("replace"), list[int]()  # tokens of each forward
        for new in self.ids(prompt, tokens, **options):
            self.paces.append(len(new))
            yield decoder.decode(b"".join(self.tokenizer.bytes[i] for i in new))
        yield decoder.decode(b"", True)

def _norm(x: Array, weight: Array, eps: float) -> Any:
    return x / np.sqrt(np.einsum("...i,...i->...", x, x) / x.shape[-1] + eps)[..., None] * weight
def _turned(x: Array, cos: Array, sin: Array) -> Array:
    a, b = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
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
    parser = argparse.ArgumentParser(description="Write text with an Elara model in a GGUF file.")
    parser.add_argument("model", help="a .gguf file, exported with format=compact or format=gguf")
    parser.add_argument("prompt", nargs="?", default="", help="text to go on from; none begins a new document")
    for name, kind, default, text in (
        ("--tokens", int, 200, "tokens to write at most"), ("--temperature", float, 0.8, "0 takes the likeliest token"),
        ("--top-k", int, 0, "draw from the k likeliest tokens; 0 = all"), ("--seed", int, None, "of what is drawn"),
        ("--top-p", float, 1.0, "draw from the likeliest tokens of this probability"),
        ("--threads", int, None, "for unpacking and torch, None = all; BLAS reads OPENBLAS_NUM_THREADS")):  # fmt: skip
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
        raise SystemExit(f"error: {error}" if isinstance(error, GGUFError) else 130) from None

if __name__ == "__main__":
    main()
