"""Peak memory of loading a checkpoint and decoding with it, by precision: each in a process of its own."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from elara import checkpoint
from elara.bench.measure import Figure
from elara.config import ElaraConfig, TiDARConfig
from elara.decoding import SamplingConfig, generate
from elara.model import ElaraLM
from elara.size import kv_cache_bytes
from elara.tokenizer.byte import ByteTokenizer

STATUS = Path("/proc/self/status")


def memory(config: ElaraConfig, device: torch.device) -> Iterator[Figure]:
    """Each precision's peak against float32's, and what it holds while it decodes; the KV cache's bytes per token.

    Nothing on a CPU without Linux's account of a process's memory.
    """
    if device.type == "cpu" and not STATUS.is_file():
        return
    names = ["float32", "bfloat16"] + (["int8", "int4"] if device.type == "cpu" else [])
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        model = ElaraLM(replace(config, tidar=TiDARConfig()))
        parameters = sum(p.numel() for p in model.parameters())
        path = checkpoint.save(Path(folder) / "model", model, ByteTokenizer(), meta={})
        del model
        found: dict[str, tuple[int, int]] = {}
        for name in names:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                found[name] = pool.submit(measure, path, name, str(device), torch.get_num_threads()).result()
    reference = found["float32"][0]
    for name, (peak, held) in found.items():
        ratio, element = peak / reference, 4 if name == "float32" else 2
        note = (
            f"{parameters / 1e6:.0f} M parameters, {held / 1e6:.0f} MB while decoding, "
            f"KV cache {kv_cache_bytes(config, element) / 1e3:.1f} kB per token"
        )
        figure = Figure(f"{name}: peak memory / float32's", ratio, ratio, ratio, None, False, peak, reference, note)
        figure.unit = "bytes"
        yield figure


def measure(path: Path, precision: str, device: str, threads: int) -> tuple[int, int]:
    """Load, read a prompt that meets every expert, write 16 tokens: bytes at the peak and at the end, above the start.

    Float32 weights are a mapped file, whose pages count once they are read.
    """
    torch.set_num_threads(threads)
    on = torch.device(device)
    before = _now(on)
    model = checkpoint.load(path, device=on, precision=precision).model
    prompt = torch.randint(model.config.vocab_size, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    for _ in generate(model, [prompt], SamplingConfig(temperature=0.0, max_new_tokens=16), mode="ar"):
        pass
    return _peak(on) - before, _now(on) - before


def _now(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(key: str) -> int:
    """Bytes of this process in memory, from Linux's account of it."""
    for line in STATUS.read_text("utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {key}")
