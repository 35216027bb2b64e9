"""The exported files in four engines: speed, memory, size, and what quantization costs in nats.

    python experiments/export/compare.py speed --library .counterparts     # random weights of elara_124m: minutes
    python experiments/export/compare.py memory --library .counterparts    # the 2.8 B compact file, 1024 tokens
    python experiments/export/compare.py drafts elara --library .counterparts    # TiDAR in elara.py
    python experiments/export/compare.py loss elara --library .counterparts    # a trained run
    python experiments/export/compare.py plot

Every engine lives in a process of its own and takes its turn when it is told to; ratios are of neighbours in time. The
engines: llama.cpp; elara.py with numpy alone; elara.py with torch; Elara's own engine in torch. All read the unrolled
file but the last, which reads the checkpoint in the precision that is nearest. Figures go to *.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
WORK = HERE.parents[1] / "outputs" / "export" / "study"
PROMPT, DECODE, THREADS = 128, 32, 2
KINDS = ("F32", "F16", "Q8_0", "Q4_K_M")
PRECISION = {"F32": "float32", "F16": "bfloat16", "Q8_0": "int8", "Q4_K_M": "int4"}
ENGINES = ("llama.cpp", "elara.py", "elara.py + torch", "Elara")
Turn = Callable[[], tuple[float, float]]  # seconds of reading PROMPT tokens, of writing DECODE more


def model_size(name: str) -> Any:
    """The architecture of a size with everything on, as `model=<name>` composes it."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from elara.cli import register_resolvers
    from elara.config import ElaraConfig
    from elara.training.config import register

    register_resolvers()
    register()
    with initialize_config_module("elara.conf", version_base="1.3"):
        wanted = compose("train", overrides=[f"model={name}", "tokenizer=gpt2"])
    composed: Any = {group: OmegaConf.to_container(wanted[group]) for group in ("model", "moe", "trm", "tidar")}
    composed["model"]["vocab_size"] = 50304
    return ElaraConfig.from_dict(composed)


def random_checkpoint(name: str) -> Path:
    """Random weights: what a token costs does not depend on their values."""
    import torch

    from elara import checkpoint
    from elara.model import ElaraLM
    from elara.runs import project_root
    from elara.tokenizer.gpt2 import GPT2Tokenizer

    folder = WORK / name
    if not folder.exists():
        torch.manual_seed(0)
        tokenizer = GPT2Tokenizer.fetch(project_root() / "data" / "archives")
        checkpoint.save(folder, ElaraLM(model_size(name)), tokenizer, meta={"step": 0})
    return folder


def export(model: str | Path, form: str, kind: str, library: str) -> Path:
    """The file of a checkpoint, or of a size with random weights; written once."""
    WORK.mkdir(parents=True, exist_ok=True)
    name = model if isinstance(model, str) else "trained"
    path = WORK / f"{name}-{form}-{kind}.gguf"
    if not path.exists():
        folder = random_checkpoint(model) if isinstance(model, str) else model
        wanted = [f"checkpoint={folder}", f"format={form}", f"quantize={kind}", f"quantize.library={library}"]
        command = [sys.executable, "-m", "elara.export", *wanted, f"output={path}", "verify=false"]
        subprocess.run(command, check=True)
    return path


# ---- engines, each in a process of its own ----


def llama(path: Path, library: str) -> Turn:
    from elara.export.llama_cpp import find_library
    from elara.export.llama_model import LlamaModel

    found = find_library(library)
    assert found is not None
    model = LlamaModel(found, path, PROMPT + DECODE)
    return alternating(model.logits, model.extend)


def alternating(begin: Callable[[Sequence[int]], Any], extend: Callable[[Sequence[int]], Any]) -> Turn:
    """Read the prompt, then token after token, whatever the model says: the work is the same."""
    ids = np.random.default_rng(0).integers(0, 50000, PROMPT + DECODE).tolist()

    def turn() -> tuple[float, float]:
        started = time.perf_counter()
        begin(ids[:PROMPT])
        read = time.perf_counter()
        for token in ids[PROMPT:]:
            extend([token])
        return read - started, time.perf_counter() - read

    return turn


def runtime(path: Path, use_torch: bool) -> Turn:
    from elara.elara import Cache, Elara

    model = Elara.load(path, THREADS, use_torch)
    cache: list[Any] = [None]

    def begin(ids: Sequence[int]) -> None:
        cache[0] = Cache(model, PROMPT + DECODE)
        model.products((model.read(ids, cache[0])[-1:], model.head))

    return alternating(begin, lambda ids: model.products((model.forward(ids, cache[0]), model.head)))


def engine(folder: Path, precision: str) -> Turn:
    import torch

    from elara import checkpoint
    from elara.decoding.inference import cache_dtype, inference
    from elara.model import KVCache

    torch.set_num_threads(THREADS)
    model = checkpoint.load(folder, precision=precision).model
    cache: list[Any] = [None]

    def extend(ids: Sequence[int]) -> None:
        with inference(model):
            hidden = model(torch.tensor([ids]), cache=cache[0]).hidden
            model.ar_head(hidden[:, -1:])

    def begin(ids: Sequence[int]) -> None:
        cache[0] = KVCache(model.config, 1, PROMPT + DECODE, dtype=cache_dtype(model.embed.weight))
        extend(ids)

    return alternating(begin, extend)


def work(name: str, path: str, kind: str, folder: str, library: str) -> None:
    """Load, then answer every line on stdin with a turn; the last line tells the peak memory."""
    makers: dict[str, Callable[[], Turn]] = {
        "llama.cpp": lambda: llama(Path(path), library),
        "elara.py": lambda: runtime(Path(path), False),
        "elara.py + torch": lambda: runtime(Path(path), True),
        "Elara": lambda: engine(Path(folder), PRECISION[kind]),
    }
    turn = makers[name]()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps([*turn(), peak()]), flush=True)


def peak() -> int:
    """The most memory that this process has held, mapped files included."""
    return int(Path("/proc/self/status").read_text("utf-8").split("VmHWM:")[1].split()[0]) * 1024


def bandwidth() -> float:
    """Bytes a second that THREADS threads read from memory, summing in numpy: the limit of one token at a time."""
    from concurrent.futures import ThreadPoolExecutor

    parts = [np.ones(1 << 26, np.float32) for _ in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        times = []
        for _ in range(7):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            times.append(time.perf_counter() - started)
    return sum(part.nbytes for part in parts) / min(times)


def weights_read(path: Path) -> int:
    """Bytes of weights that a token meets: of the experts, those that are chosen."""
    from elara.elara import Elara

    model = Elara.load(path, 1, False)
    total = model.head.raw.nbytes
    for i, _ in model.layers:
        for name, value in model.blocks[i].items():
            parts = value[: model.top] if isinstance(value, list) else [value]
            total += sum(part.raw.nbytes for part in parts if hasattr(part, "raw") and name != "bias")
    return total


def speed(library: str, rounds: int, kinds: Sequence[str]) -> None:
    """Tokens per second of reading and writing, all engines in turn, one file type after the other."""
    folder = random_checkpoint("elara_124m")
    before = json.loads((HERE / "speed.json").read_text("utf-8")) if (HERE / "speed.json").exists() else []
    rows: list[dict[str, Any]] = [row for row in before if row["kind"] not in kinds]
    for kind in kinds:
        path = export("elara_124m", "gguf", kind, library)
        names = [name for name in ENGINES if not (name == "elara.py + torch" and kind in ("F32", "F16"))]
        limit = bandwidth() / weights_read(path)
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "OPENBLAS_NUM_THREADS": str(THREADS)}
        workers = {
            name: subprocess.Popen(
                [sys.executable, __file__, "work", name, str(path), kind, str(folder), library], env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )
            for name in names
        }  # fmt: skip
        for worker in workers.values():
            assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
        taken: dict[str, list[list[float]]] = {name: [] for name in names}
        for turn in range(rounds + 1):
            for name, worker in workers.items():
                assert worker.stdin is not None and worker.stdout is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
                figures = json.loads(worker.stdout.readline())
                if turn:
                    taken[name].append(figures)
        for worker in workers.values():
            worker.communicate()
        for name in names:
            ratios = [b[1] / a[1] for a, b in zip(taken[name], taken["llama.cpp"], strict=True)]
            reading = [b[0] / a[0] for a, b in zip(taken[name], taken["llama.cpp"], strict=True)]
            decode = DECODE / statistics.median(each[1] for each in taken[name])
            rows.append({
                "kind": kind, "engine": name, "decode": decode,
                "prompt": PROMPT / statistics.median(each[0] for each in taken[name]),
                "of llama.cpp": statistics.median(ratios), "quartiles": statistics.quantiles(ratios)[::2],
                "prompt of llama.cpp": statistics.median(reading), "peak": max(each[2] for each in taken[name]),
                "of bandwidth": decode / limit, "file": path.stat().st_size,
            })  # fmt: skip
            print({key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()})
    write("speed", sorted(rows, key=lambda row: KINDS.index(row["kind"])))


def loss(name: str, library: str) -> None:
    """Nats per token of held-out text, by llama.cpp and by elara.py, of one run in every type."""
    from elara import runs
    from elara.elara import Elara
    from elara.export.llama_cpp import find_library
    from elara.export.llama_model import LlamaModel
    from elara.export.reference import loss as nats
    from elara.export.reference import make_reference
    from elara.export.source import open_source

    folder = runs.find_checkpoint(name)
    reference = make_reference(open_source(folder), runs.project_root() / "data", 8192)
    own = nats(reference.logits, reference.windows)
    rows = [{"kind": "checkpoint", "engine": "Elara", "loss": own}]
    found = find_library(library)
    assert found is not None
    for kind in (*KINDS, "Q6_K", "Q5_K_M", "Q4_0"):
        path, compact = export(folder, "gguf", kind, library), export(folder, "compact", kind, library)
        sizes = {"file": path.stat().st_size, "compact": compact.stat().st_size}
        with LlamaModel(found, path, 256) as model:
            theirs = [model.logits(ids) for ids in reference.windows]
        rows.append({"kind": kind, "engine": "llama.cpp", "loss": nats(theirs, reference.windows), **sizes})
        for use_torch in (False, True) if kind not in ("F32", "F16") else (False,):
            ours = Elara.load(compact, THREADS, use_torch)
            logits = [one_by_one(ours, ids) if use_torch else ours.logits(ids) for ids in reference.windows]
            engine_name = "elara.py + torch" if use_torch else "elara.py"
            rows.append({"kind": kind, "engine": engine_name, "loss": nats(logits, reference.windows), **sizes})
        for row in rows[-3:]:
            print(row["kind"], row["engine"], f"{row['loss']:.4f} ({row['loss'] - own:+.4f})", row.get("file"))
    write("loss", rows)


def one_by_one(model: Any, ids: Sequence[int]) -> Any:
    """Logits in steps of few tokens, as decoding makes them: torch's kernels take no more."""
    from elara.elara import Cache

    cache, parts = Cache(model, len(ids)), []
    for i in range(0, len(ids), 16):
        parts += model.products((model.forward(ids[i : i + 16], cache), model.head))
    return np.concatenate(parts)


def memory(library: str) -> None:
    """Peak memory of the 2.8 B compact file in four bits, random weights, behind 1000 tokens and 24 more."""
    path = export("elara_2p8b", "compact", "Q4_K_M", library)
    code = (
        "import sys, time; import numpy as np; from elara import Elara\n"
        "model = Elara.load(sys.argv[1], use_torch=False)\n"
        "ids = np.random.default_rng(0).integers(0, 50000, 1000).tolist()\n"
        "steps = []\n"
        "for new in model.ids(ids, 24, temperature=0): steps.append(time.perf_counter())\n"
        "print((steps[-1] - steps[0]) / (len(steps) - 1))\n"
        "print(*[line for line in open('/proc/self/status') if line.startswith(('VmHWM', 'RssAnon', 'RssFile'))])"
    )
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1] / "elara")}  # elara.py alone, as if it were copied
    command = [sys.executable, "-P", "-c", code, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, *kilobytes = done.stdout.replace("kB", "").split("\n", 1)
    peaks = dict(pair.split(":") for pair in "".join(kilobytes).replace("\t", "").split("\n") if ":" in pair)
    figures = {name.strip(): int(size) * 1024 for name, size in peaks.items()}
    write("memory", [{"file": path.stat().st_size, "seconds per token": float(seconds), **figures}])
    print(figures)


def drafts(name: str, library: str, rounds: int) -> None:
    """Tokens per second of elara.py in numpy, drafting and not, on a trained run; greedy, 200 tokens in turns."""
    from elara import runs
    from elara.elara import Elara

    rows: list[dict[str, Any]] = []
    for kind in ("F32", "Q4_K_M"):
        model = Elara.load(export(runs.find_checkpoint(name), "compact", kind, library), THREADS, False)
        taken: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for tidar, times in taken.items():
                started = time.perf_counter()
                forwards = len(list(model.ids("ROMEO:", 200, temperature=0, tidar=tidar)))
                times.append(time.perf_counter() - started)
        ratios = [plain / drafted for plain, drafted in zip(*taken.values(), strict=True)]
        rows.append({"kind": kind, "tokens per forward": 200 / forwards, "speed-up": statistics.median(ratios)})
        print(rows[-1])
    write("drafts", rows)


def write(name: str, rows: list[dict[str, Any]]) -> None:
    (HERE / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


def plot() -> None:
    """Decoding speed against the file's size, and the loss against bits."""
    from elara.report.style import PALETTE, STYLE

    import matplotlib.pyplot as plt  # isort: skip - behind the choice of its backend

    rows = json.loads((HERE / "speed.json").read_text("utf-8"))
    losses = json.loads((HERE / "loss.json").read_text("utf-8"))
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        width = 0.8 / len(ENGINES)
        for i, name in enumerate(ENGINES):
            mine = {row["kind"]: row for row in rows if row["engine"] == name}
            places = [KINDS.index(kind) + (i - 1.5) * width for kind in mine]
            bars = left.bar(places, [row["decode"] for row in mine.values()], width, color=PALETTE[i], label=name)
            left.bar_label(bars, [f"{row['of llama.cpp']:.2f}" if i else "" for row in mine.values()], fontsize=8)
        left.set_xticks(range(len(KINDS)), KINDS)
        left.set_title("Decoding, tokens/s (numbers: of llama.cpp)")
        left.legend()
        own = next(row["loss"] for row in losses if row["kind"] == "checkpoint")
        for i, name in enumerate(ENGINES[:3]):
            rows_of = [row for row in losses if row["engine"] == name]
            mine = sorted((row["file"] / 1e6, row["loss"] - own, row["kind"]) for row in rows_of)
            right.plot([x for x, _, _ in mine], [y for _, y, _ in mine], "o-", color=PALETTE[i], label=name, alpha=0.8)
            for place, (x, y, kind) in enumerate(mine if not i else []):
                above = 8 + 12 * (place % 2)  # neighbours' names would overlap
                right.annotate(kind, (x, y), xytext=(0, above), textcoords="offset points", fontsize=8, ha="center")
        right.set_xscale("log")
        right.set_xticks([4, 6, 10, 20], ["4", "6", "10", "20"])
        right.minorticks_off()
        right.margins(0.06, 0.12)
        right.set_title("Held-out loss above the checkpoint's, nats")
        right.set_xlabel("unrolled file, MB")
        right.legend()
        figure.savefig(HERE / "export.png")


def main() -> None:
    if sys.argv[1:2] == ["work"]:
        return work(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory", "loss", "drafts", "plot"])
    parser.add_argument("name", nargs="?", default="elara", help="of loss, drafts: a trained run")
    parser.add_argument("--library", default=".counterparts", help="where llama.cpp's library is (make counterparts)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS, help="of speed: types to measure anew")
    given = parser.parse_args()
    if given.what == "speed":
        return speed(given.library, given.rounds, given.kinds)
    if given.what == "drafts":
        return drafts(given.name, given.library, given.rounds)
    if given.what == "loss":
        return loss(given.name, given.library)
    return memory(given.library) if given.what == "memory" else plot()


if __name__ == "__main__":
    main()
