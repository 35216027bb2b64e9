"""elara/elara.py against the model that was exported, and against other readers of the same bytes."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from elara import runs
from elara.decoding import SamplingConfig, generate
from elara.decoding.completion import writable
from elara.decoding.sampling import probabilities
from elara.decoding.tidar import mask_groups
from elara.elara import FEW, TYPES, UNPACK, Cache, Elara, GGUFError, Matrix, _verify
from elara.export.files import write_model
from elara.export.layout import COMPACT, UNROLLED
from elara.export.llama_cpp import Library
from elara.export.source import Source, open_source
from elara.tokenizer.byte import ByteTokenizer
from tests.conftest import ROOT
from tests.export.conftest import MAKE, TEXT, config

RUNTIME = ROOT / "elara" / "elara.py"
QUANTIZED = sorted(UNPACK)
IDS = torch.randint(256, (90,), generator=torch.Generator().manual_seed(1)).tolist()


def random_blocks(kind: int, rows: int, width: int, scale: float | None = None) -> np.ndarray[Any, Any]:
    """Bytes that may stand in a file, all of them but for scales that are not finite. scale: one for all blocks."""
    _, weights, size = TYPES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (rows, width // weights, size), np.uint8)
    for at in {2: (0,), 8: (0,), 12: (0, 2), 13: (0, 2), 14: (208,)}[kind]:
        blocks[..., at + 1] &= 0xBF  # the exponent stays below that of infinities
        if scale is not None:
            blocks[..., at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def runtime(source: Source, path: Path, architecture: str = COMPACT, kind: str = "F32", **options: Any) -> Elara:
    if not path.exists():
        write_model(path, source, architecture, kind, None)
    return Elara.load(path, **({"use_torch": False} | options))


def expected_logits(source: Source, ids: list[int]) -> np.ndarray[Any, Any]:
    model = source.weights.model()
    with torch.inference_mode():
        return model.ar_head(model(torch.tensor([ids]), depth=source.depth).hidden)[0].numpy()


def written(source: Source, prompt: list[int], count: int, mode: str = "ar") -> list[int]:
    """What the engine writes greedily, without the tokens that the runtime never writes."""
    model, tokenizer = source.weights.model(), source.tokenizer
    sampling = SamplingConfig(mode=mode, max_new_tokens=count, temperature=0.0, stop=[tokenizer.end_id])
    steps = generate(
        model, [prompt], sampling, allowed=writable(tokenizer, model.config.vocab_size), mask_id=tokenizer.mask_id
    )
    return [token for step in steps for token in step.tokens[0]]


def joined(steps: Any) -> list[int]:
    return list(itertools.chain.from_iterable(steps))


def test_it_is_one_short_file_that_needs_numpy_alone() -> None:
    text = RUNTIME.read_text("utf-8")
    assert len(text.splitlines()) < 500
    assert "elara." not in "".join(line for line in text.splitlines() if line.startswith(("import", "from")))


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: TYPES[kind][0])
def test_dequantized_values_are_bit_for_bit_those_of_the_gguf_package(kind: int) -> None:
    for rows, width in ((37, 512), (1, TYPES[kind][1])):  # a single block lies as its copy would
        raw = random_blocks(kind, rows, width)
        raw.flags.writeable = False  # as a mapped file is
        ours = Matrix(raw, kind, width).rows(slice(None))
        theirs = quants.dequantize(raw, GGMLQuantizationType(kind))
        assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: TYPES[kind][0])
def test_dequantized_values_are_bit_for_bit_those_of_llama_cpp(kind: int, llama_library: Library) -> None:
    raw = random_blocks(kind, 64, 1024)
    theirs = np.empty((64, 1024), np.float32)
    base = ctypes.CDLL(str(next(llama_library.path.parent.glob("libggml-base*"))))
    function = getattr(base, f"dequantize_row_{TYPES[kind][0].lower()}".replace("_k", "_K"))
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function(raw.ctypes.data, theirs.ctypes.data, theirs.size)
    assert np.array_equal(Matrix(raw, kind, 1024).rows(slice(None)).view(np.uint32), theirs.view(np.uint32))


def test_float16_and_bfloat16_are_read_exactly() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    half = bits.view(np.float16)
    finite = np.isfinite(half)
    ours = Matrix(bits.view(np.uint8)[None], 1, 1 << 16).rows(slice(None))[0]
    assert np.array_equal(ours[finite].view(np.uint32), half[finite].astype(np.float32).view(np.uint32))
    ours = Matrix(bits.view(np.uint8)[None], 30, 1 << 16).rows(slice(None))[0]
    assert np.array_equal(ours.view(np.uint32), bits.astype(np.uint32) << 16)


@pytest.mark.parametrize("tokens", [1, 2, FEW, FEW + 1])
@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: TYPES[kind][0])
def test_products_are_those_of_dequantized_weights(kind: int, tokens: int) -> None:
    matrix = Matrix(random_blocks(kind, 50, 768), kind, 768)
    x = np.random.default_rng(1).standard_normal((tokens, 768)).astype(np.float32)
    wide = quants.dequantize(matrix.raw, GGMLQuantizationType(kind)).astype(np.float64)
    out = np.full((tokens, 50), np.nan, np.float32)
    for part in (slice(0, 17), slice(17, 50)):
        matrix.product(x, out, part)
    expected = x @ wide.T
    assert np.abs(out - expected).max() < 2e-5 * (np.abs(x) @ np.abs(wide).T).max()


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: TYPES[kind][0])
def test_torch_kernels_stay_close(kind: int) -> None:
    whole = Matrix(random_blocks(kind, 64, 512, scale=0.01), kind, 512)
    parts = [Matrix(whole.raw[:48], kind, 512), Matrix(whole.raw[48:], kind, 512)]
    whole.pack(torch, parts)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)).bfloat16().float().numpy()
    for part in parts:
        expected = x @ part.rows(slice(None)).T
        assert np.abs(part.packed(x)[:, part.span] - expected).max() < 0.03 * expected.std()


@pytest.mark.thorough(3, "slow")
@pytest.mark.parametrize("architecture", [COMPACT, UNROLLED])
@pytest.mark.parametrize("order", ["block", "stack"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_logits_and_greedy_text_are_the_checkpoint_s(
    make: MAKE, tmp_path: Path, moe: bool, order: str, architecture: str
) -> None:
    source = make(config(n_embd=64, moe=moe, order=order), ByteTokenizer())
    model = runtime(source, tmp_path / "a.gguf", architecture)
    expected = expected_logits(source, IDS)
    assert expected.std() > 0.3, "logits that are all alike would agree by accident"
    assert np.abs(model.logits(IDS) - expected).max() < 1e-4
    greedy = written(source, IDS[:20], 50)
    assert joined(model.ids(IDS[:20], 50, temperature=0)) == greedy
    if architecture == COMPACT:
        assert joined(model.ids(IDS[:20], 50, temperature=0, tidar=True)) == greedy


@pytest.mark.parametrize("routing", ["token", "block", "anchor"])
@pytest.mark.parametrize("chain", [False, True], ids=["free", "chained"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_drafts_are_the_engine_s(make: MAKE, tmp_path: Path, routing: str, chain: bool, tied: bool) -> None:
    built = config(n_embd=64, tidar__draft_routing=routing, tidar__chain=chain, tidar__tie_head=tied)
    source = make(built, ByteTokenizer())
    model = runtime(source, tmp_path / "a.gguf")
    hidden = model.forward(IDS[:9], Cache(model, 64), [1, 5, 9])
    elara = source.weights.model()
    section = mask_groups([[1, 5, 9]], 4, source.tokenizer.mask_id, torch.device("cpu"))
    with torch.inference_mode():
        output = elara(torch.tensor([IDS[:9]]), section=section)
    assert np.abs(hidden[:9] - output.hidden[0].numpy()).max() < 1e-4
    assert np.abs(hidden[9:] - output.mask_hidden[0].numpy()).max() < 1e-4
    with torch.inference_mode():
        logits = elara.diffusion_head(output.mask_hidden[0, 1:2], torch.tensor([IDS[8]]))
    _, proposals = model._draft(
        hidden[10:11], IDS[8], lambda x, head: model.products((x, head))[0], np.random.default_rng(0)
    )
    assert np.abs(proposals - logits.numpy()).max() < 1e-4


def test_a_window_slides_as_the_engine_s_does(make: MAKE, tmp_path: Path) -> None:
    source = make(config(n_embd=64, model__context_length=32), ByteTokenizer())
    model = runtime(source, tmp_path / "a.gguf")
    greedy = written(source, IDS[:20], 100)
    assert joined(model.ids(IDS[:20], 100, temperature=0)) == greedy
    assert joined(model.ids(IDS[:20], 100, temperature=0, tidar=True)) == greedy


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantized_files_stay_near_with_and_without_torch(make: MAKE, tmp_path: Path, kind: str) -> None:
    source = make(config(n_embd=64, moe=False), ByteTokenizer())
    expected = expected_logits(source, IDS)
    for options in ({"use_torch": False}, {"use_torch": True}, {"use_torch": False, "threads": 1}):
        model = runtime(source, tmp_path / "a.gguf", kind=kind, **options)
        cache = Cache(model, len(IDS))
        found = np.concatenate([model.products((model.forward([i], cache), model.head))[0] for i in IDS])
        share = np.abs(found - expected).mean() / expected.std()
        assert share < (0.05 if kind == "Q8_0" else 0.5), options
        assert np.abs(model.logits(IDS) - found).max() < (1e-3 if not options["use_torch"] else 0.5)


def test_text_ends_behind_a_stop_token(make: MAKE, tmp_path: Path) -> None:
    source = make(config(n_embd=64), ByteTokenizer())
    model = runtime(source, tmp_path / "a.gguf")
    whole = joined(model.ids(IDS[:20], 40, temperature=0))
    for tidar in (False, True):
        found = joined(model.ids(IDS[:20], 40, temperature=0, tidar=tidar, stop=[whole[9]]))
        assert found == whole[: whole.index(whole[9]) + 1]


def test_verified_drafts_follow_the_distribution() -> None:
    """Speculative rejection sampling of two drafted tokens, against the probabilities themselves."""
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(5), 3)  # here the next token's distribution does not depend on the one before
    q = random.dirichlet(np.ones(5), 2)
    counts = np.zeros((2, 5))
    trials = 20000
    for _ in range(trials):
        draft = [int(random.choice(5, p=each)) for each in q]
        count, token = _verify(p, draft, q, random)
        text = [*draft[: count - 1], token]
        counts[0, text[0]] += 1
        if len(text) > 1:
            counts[1, text[1]] += 1
    for place, seen in enumerate(counts):
        expected = p[place] * seen.sum()
        assert ((seen - expected) ** 2 / expected).sum() < 25  # chi-square with 4 degrees: p = 5e-5
        assert ((seen - q[place] * seen.sum()) ** 2 / expected).sum() > 100  # what accepting all drafts would give


def test_distribution_is_the_engine_s(make: MAKE, tmp_path: Path) -> None:
    source = make(config(n_embd=64), ByteTokenizer())
    model = runtime(source, tmp_path / "a.gguf")
    hidden = model.forward(IDS[:4], Cache(model, 4))
    logits = torch.from_numpy(model.products((hidden, model.head))[0]).double()
    allowed = writable(source.tokenizer, logits.shape[1])
    choices = ((0.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 7, 1.0), (1.3, 0, 0.8), (0.9, 9, 0.7), (1e-40, 0, 1.0))
    for temperature, top_k, top_p in choices:
        sampling = SamplingConfig(temperature=temperature, top_k=top_k or None, top_p=top_p)
        expected = probabilities(logits, sampling, allowed).numpy()
        assert np.abs(model._distribution(hidden, model.head, temperature, top_k, top_p) - expected).max() < 1e-9


def test_requests_that_cannot_be_served_are_one_sentence(make: MAKE, tmp_path: Path) -> None:
    source = make(config(n_embd=64), ByteTokenizer())
    model = runtime(source, tmp_path / "a.gguf", UNROLLED)
    with pytest.raises(GGUFError, match="no diffusion head"):
        next(model.ids("a", tidar=True))
    with pytest.raises(GGUFError, match="context holds 128"):
        next(model.ids("a" * 200))


def command(python: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, *arguments], capture_output=True, text=True, check=False, timeout=120, **options)


def test_the_command_streams_text_and_tells_its_pace(make: MAKE, tmp_path: Path) -> None:
    source = make(config(n_embd=64), ByteTokenizer())
    runtime(source, tmp_path / "a.gguf")
    common = (str(RUNTIME), "a.gguf", "The bee", "--tokens", "20", "--numpy")
    plain = command(sys.executable, *common, "--temperature", "0", cwd=tmp_path)
    drafted = command(sys.executable, *common, "--temperature", "0", "--tidar", cwd=tmp_path)
    assert plain.returncode == drafted.returncode == 0, plain.stderr + drafted.stderr
    assert plain.stdout.startswith("The bee") and "[20 tokens, " in plain.stdout
    assert plain.stdout.split("\n\n[")[0] == drafted.stdout.split("\n\n[")[0]
    first, second = (command(sys.executable, *common, "--seed", "3", cwd=tmp_path).stdout for _ in range(2))
    assert first.split("\n\n[")[0] == second.split("\n\n[")[0]
    refused = command(sys.executable, str(RUNTIME), "none.gguf", cwd=tmp_path)
    assert refused.returncode == 1 and refused.stderr == "error: none.gguf: No such file or directory\n"


@pytest.mark.slow
def test_it_runs_where_numpy_is_all_there_is(make: MAKE, tmp_path: Path) -> None:
    source = make(config(n_embd=64), ByteTokenizer())
    runtime(source, tmp_path / "a.gguf")
    (tmp_path / "elara.py").write_bytes(RUNTIME.read_bytes())
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    made = command(python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", f"numpy=={np.__version__}")
    assert made.returncode == 0, made.stderr
    listed = command(python, "-m", "pip", "list", "--format=freeze").stdout
    assert {line.split("==")[0] for line in listed.split()} <= {"numpy", "pip", "setuptools"}
    arguments = ("elara.py", "a.gguf", "The bee", "--tokens", "20", "--temperature", "0")
    here, there = (command(each, *arguments, cwd=tmp_path) for each in (sys.executable, python))
    drafted = command(python, *arguments, "--tidar", cwd=tmp_path)
    assert there.returncode == drafted.returncode == 0, there.stderr + drafted.stderr
    texts = [done.stdout.split("\n\n[")[0] for done in (here, there, drafted)]
    assert texts[0].startswith("The bee") and len(set(texts)) == 1, texts
    times = []
    for _ in range(5):
        code = "import time; a = time.perf_counter(); import elara; print(time.perf_counter() - a)"
        times.append(float(command(python, "-c", code, cwd=tmp_path).stdout))
    assert sorted(times)[2] < 0.3, times


@pytest.mark.slow
def test_a_trained_model_in_four_bits(trained: Path, tmp_path: Path, llama_library: Library) -> None:
    source = open_source(runs.find_checkpoint(trained))
    write_model(tmp_path / "a.gguf", source, COMPACT, "Q4_K_M", llama_library)
    ids = source.tokenizer.encode("bakoli mune posu tiwa rane")[:100]
    plain = runtime(source, tmp_path / "f.gguf").logits(ids)
    for use_torch in (False, True):
        model = Elara.load(tmp_path / "a.gguf", use_torch=use_torch)
        ar = joined(model.ids(ids, 60, temperature=0))
        assert joined(model.ids(ids, 60, temperature=0, tidar=True)) == ar
        assert np.abs(model.logits(ids) - plain).mean() < 0.3
    assert source.tokenizer.encode("ba") == Elara.load(tmp_path / "a.gguf").tokenizer.encode("ba")


def test_a_conversation_goes_through_text(make: MAKE, tmp_path: Path) -> None:
    source = make(config(n_embd=64), ByteTokenizer())
    model = runtime(source, tmp_path / "a.gguf")
    assert "".join(model.generate(TEXT, 12, temperature=0)) == source.tokenizer.decode(
        written(source, source.tokenizer.encode(TEXT), 12)
    )


def test_torch_keeps_its_threads_unless_some_are_asked_for(make: MAKE, tmp_path: Path) -> None:
    source = make(config(n_embd=64), ByteTokenizer())
    before = torch.get_num_threads()
    try:
        runtime(source, tmp_path / "a.gguf", kind="Q8_0", use_torch=True)
        assert torch.get_num_threads() == before
        runtime(source, tmp_path / "a.gguf", kind="Q8_0", use_torch=True, threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
