"""Against real llama.cpp: what it loads, computes, tokenizes, quantizes and serves."""

from __future__ import annotations

import itertools
import json
import re
import socket
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from elara.data.tool_use import Call
from elara.decoding import SamplingConfig, generate
from elara.errors import ElaraError
from elara.export.__main__ import main
from elara.export.files import write_model
from elara.export.layout import COMPACT, UNROLLED
from elara.export.llama_abi import QuantizeParams
from elara.export.llama_cpp import Library, find_library
from elara.export.llama_model import LlamaModel
from elara.export.miniature import quantize_file
from elara.export.quantize import FILE_TYPES
from elara.export.reference import make_reference
from elara.export.source import Source, open_source
from elara.export.verify import compare, verify
from elara.tokenizer import Tokenizer
from elara.tokenizer.byte import ByteTokenizer
from tests.conftest import Home
from tests.export.conftest import MAKE, TEXT, config

pytestmark = pytest.mark.slow
CONTEXT, TOKENS, WRITTEN = 128, 96, 50
HARD = (  # where byte-pair encoders go wrong: digits, contractions, scripts, marks, joiners, spaces of all kinds
    "I'll can't WE'RE they'Ve 1234567 3.14 a1b2", "  two  spaces\n\n\tand\r\ntabs   ", "naïve café Straße Ǆ ﬁ",
    "日本語のテキスト 中文 한국어", "עברית العربية हिन्दी ไทย", "👩\u200d👩\u200d👧 🏳️\u200d🌈 🇩🇪 👍🏽", "²³¹ Ⅷ ½ ٣ ௩",
    "e\u0301 a\u030a n\u0303", "x\u00a0y\u2003z\u3000w", "<|endoftext|> <|user|> </s> [INST]", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀",
    "\u200b\u200d\ufeff zero", "end of line \u2028 next\u2029",
)  # fmt: skip


def torch_logits(source: Source, ids: list[int]) -> np.ndarray:
    model = source.weights.model()
    with torch.inference_mode():
        return model.ar_head(model(torch.tensor([ids]), depth=source.depth).hidden)[0].numpy()


def torch_greedy(source: Source, prompt: list[int], count: int) -> list[int]:
    sampling = SamplingConfig(mode="ar", max_new_tokens=count, temperature=0.0)
    return [step.tokens[0][0] for step in generate(source.weights.model(), [prompt], sampling, depth=source.depth)]


def tensors(path: Path) -> dict[str, tuple[GGMLQuantizationType, bytes]]:
    return {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", ["char", "byte", "gpt2"])
@pytest.mark.parametrize("order", ["block", "stack"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_logits_and_text_are_the_checkpoint_s(
    make: MAKE, tmp_path: Path, llama_library: Library, tokenizers: Callable[[str], Tokenizer], moe: bool, order: str,
    kind: str,
) -> None:  # fmt: skip
    tokenizer = tokenizers(kind)
    source = make(config(n_embd=256, moe=moe, order=order), tokenizer)
    write_model(tmp_path / "a.gguf", source, UNROLLED, "F32", llama_library)
    ids = torch.randint(tokenizer.plain_size, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = torch_logits(source, ids)
    assert expected.std() > 0.3, "logits that are all alike would agree by accident"
    with LlamaModel(llama_library, tmp_path / "a.gguf", CONTEXT) as model:
        found = model.logits(ids)
        assert np.abs(found - expected).max() < 1e-4
        assert (found.argmax(1) == expected.argmax(1)).all()
        assert model.greedy(ids[:32], WRITTEN) == torch_greedy(source, ids[:32], WRITTEN)


@pytest.mark.parametrize(
    "options",
    [
        {"moe__num_shared": 0}, {"moe__num_shared": 2}, {"moe__gate_scale": 2.5}, {"model__bias": False},
        {"model__n_kv_head": None}, {"trm__sample_depth": [1, 3]}, {"moe__every": 1, "moe__num_experts": 8},
        {"moe__every": 5}, {"model__hidden": 384}, {"model__norm_eps": 1e-3, "model__rope_base": 500.0},
    ],
    ids=lambda options: "-".join(options),
)  # fmt: skip
@pytest.mark.parametrize("depth", [1, 3])
def test_every_variant_of_the_architecture_fits(
    make: MAKE, tmp_path: Path, llama_library: Library, options: dict[str, Any], depth: int
) -> None:
    source = make(config(**options), ByteTokenizer(), depth=depth)
    write_model(tmp_path / "a.gguf", source, UNROLLED, "F32", llama_library)
    ids = torch.randint(256, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    with LlamaModel(llama_library, tmp_path / "a.gguf", CONTEXT) as model:
        assert np.abs(model.logits(ids) - torch_logits(source, ids)).max() < 1e-4


@pytest.mark.parametrize("kind", ["char", "byte", "gpt2"])
def test_text_becomes_the_same_tokens_and_back(
    make: MAKE, tmp_path: Path, llama_library: Library, tokenizers: Callable[[str], Tokenizer], kind: str
) -> None:
    tokenizer = tokenizers(kind)
    write_model(tmp_path / "a.gguf", make(config(), tokenizer), UNROLLED, "F16", llama_library)
    texts = [TEXT, TEXT[::-1], TEXT * 5, " ".join(TEXT), *([] if kind == "char" else HARD)]
    with LlamaModel(llama_library, tmp_path / "a.gguf", CONTEXT) as model:
        for text in texts:
            assert model.tokenize(text) == tokenizer.encode(text), text
            assert b"".join(map(model.piece, tokenizer.encode(text))).decode() == text
        chat = [{"role": "system", "content": "bee"}, {"role": "user", "content": " a"}]
        end = "<|endoftext|>" if kind == "gpt2" else "<|end|>"
        written = f"<|system|>bee{end}<|user|> a{end}<|assistant|>"
        assert model.tokenize(written, special=True) == tokenizer.apply_chat(chat, generate=True)[0]
        assert [i for i in range(model.vocab_size) if model.ends(i)] == [tokenizer.end_id]


@pytest.mark.parametrize("experts", [0, 4, 8])
@pytest.mark.parametrize("kind", [kind for kind in FILE_TYPES if kind != "F32"])
def test_every_tensor_is_what_llama_cpp_s_quantizer_makes_of_the_f32_file(
    make: MAKE, tmp_path: Path, llama_library: Library, kind: str, experts: int
) -> None:
    built = config(n_embd=256, moe=experts > 0, depth=3, order="stack", moe__num_experts=experts, model__n_layer=4)
    source = make(built, ByteTokenizer())
    write_model(tmp_path / "f32.gguf", source, UNROLLED, "F32", llama_library)
    quantize_file(llama_library, tmp_path / "f32.gguf", tmp_path / "theirs.gguf", kind, 2)
    write_model(tmp_path / "ours.gguf", source, UNROLLED, kind, llama_library)
    ours, theirs = tensors(tmp_path / "ours.gguf"), tensors(tmp_path / "theirs.gguf")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    keys = [{name: field.contents() for name, field in GGUFReader(tmp_path / file).fields.items()
             if not name.startswith("GGUF.")} for file in ("ours.gguf", "theirs.gguf")]  # fmt: skip
    assert keys[0] == keys[1]


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q5_K_M", "Q6_K"])
def test_sizes_that_a_type_cannot_take_fall_back_as_llama_cpp_s_do(
    make: MAKE, tmp_path: Path, llama_library: Library, kind: str
) -> None:
    source = make(config(n_embd=96, model__hidden=144), ByteTokenizer())
    write_model(tmp_path / "f32.gguf", source, UNROLLED, "F32", llama_library)
    quantize_file(llama_library, tmp_path / "f32.gguf", tmp_path / "theirs.gguf", kind)
    write_model(tmp_path / "ours.gguf", source, UNROLLED, kind, llama_library)
    assert tensors(tmp_path / "ours.gguf") == tensors(tmp_path / "theirs.gguf")
    kinds = {found.name for found, _ in tensors(tmp_path / "ours.gguf").values()}
    assert kinds <= {"F32", "F16", "Q8_0", "Q5_0", "Q5_1"} and "F16" in kinds


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_a_compact_file_holds_the_types_of_its_physical_blocks(
    make: MAKE, tmp_path: Path, llama_library: Library, kind: str
) -> None:
    built = config(n_embd=256, depth=3, model__n_layer=4)
    source = make(built, ByteTokenizer())
    write_model(tmp_path / "compact.gguf", source, COMPACT, kind, llama_library)
    write_model(tmp_path / "once.gguf", open_source(source.folder, depth=1), UNROLLED, kind, llama_library)
    compact, once = tensors(tmp_path / "compact.gguf"), tensors(tmp_path / "once.gguf")
    blocks = {name: found for name, found in compact.items() if name in once and "exp_probs_b" not in name}
    assert len(blocks) == len(once) - 2 and all(once[name] == found for name, found in blocks.items())
    assert compact["diffusion.weight"][0] == compact["token_embd.weight"][0]
    assert {compact[f"chain_{part}.weight"][0] for part in ("gate", "up", "down")} == {
        compact["blk.0.attn_q.weight"][0]
    }
    assert compact["chain_norm.weight"][0].name == "F32"


@pytest.mark.parametrize("n_embd", [256, 48])
def test_q8_0_without_the_library_is_the_same_file(
    make: MAKE, tmp_path: Path, llama_library: Library, n_embd: int
) -> None:
    source = make(config(n_embd=n_embd), ByteTokenizer())
    for file, library in (("a", llama_library), ("b", None)):
        write_model(tmp_path / file, source, UNROLLED, "Q8_0", library)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_q4_0_without_the_library_has_the_same_bytes_where_it_has_the_same_type(
    make: MAKE, tmp_path: Path, llama_library: Library
) -> None:
    source = make(config(n_embd=256), ByteTokenizer())
    for file, library in (("a", llama_library), ("b", None)):
        write_model(tmp_path / file, source, UNROLLED, "Q4_0", library)
    ours, theirs = tensors(tmp_path / "b"), tensors(tmp_path / "a")
    assert {name for name in ours if ours[name] != theirs[name]} == {"token_embd.weight"}


def test_what_llama_cpp_says_reaches_the_user(
    make: MAKE, tmp_path: Path, llama_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(config(), ByteTokenizer())
    monkeypatch.setitem(FILE_TYPES, "Q6_K", 999)
    with pytest.raises(ElaraError, match=r"cannot quantize this model to Q6_K: .*invalid output file type 999"):
        write_model(tmp_path / "a.gguf", source, UNROLLED, "Q6_K", llama_library)
    write_model(tmp_path / "b.gguf", source, COMPACT, "F16", llama_library)
    with pytest.raises(ElaraError, match=r"llama\.cpp does not load .*: .*unknown model architecture: 'elara'"):
        LlamaModel(llama_library, tmp_path / "b.gguf", CONTEXT)


def test_a_build_with_other_structs_is_refused(llama_library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QuantizeParams.known, "pure", (True,))
    with pytest.raises(ElaraError, match=r"a build of llama\.cpp that this program does not know .*quantize\.pure is"):
        Library(llama_library.path)


def test_the_library_is_found_in_node_modules(
    llama_library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = llama_library.path.parent
    folder = tmp_path / "node_modules" / "@node-llama-cpp" / "x" / "bins"
    folder.mkdir(parents=True)
    (folder / platform.name).symlink_to(platform)
    monkeypatch.chdir(tmp_path)
    assert find_library() is llama_library


@pytest.fixture(scope="session")
def trained_source(trained: Path) -> Source:
    from elara import runs

    return open_source(runs.find_checkpoint(trained))


@pytest.mark.thorough(3, "long")
@pytest.mark.parametrize("kind", FILE_TYPES)
def test_a_trained_model_keeps_its_loss(
    trained_source: Source, session_home: Home, tmp_path: Path, llama_library: Library, kind: str
) -> None:
    reference = make_reference(trained_source, session_home.path / "data", 2048)
    assert reference.text == "held-out part of text"
    write_model(tmp_path / "a.gguf", trained_source, UNROLLED, kind, llama_library)
    with LlamaModel(llama_library, tmp_path / "a.gguf", CONTEXT + 64) as model:
        found = compare("llama.cpp", reference, model.logits, model.greedy(reference.prompt, 32))
    print(kind, found)
    assert found.problem(kind) is None
    assert abs(found.loss_difference) < 0.02
    assert found.loss < 2.6, "the model has learned something, so that there is something to lose"


@pytest.mark.parametrize("architecture", [UNROLLED, COMPACT])
@pytest.mark.parametrize("kind", ["F32", "Q4_K_M"])
def test_a_file_is_read_back_by_every_reader_that_knows_it(
    trained_source: Source, session_home: Home, tmp_path: Path, llama_library: Library, kind: str, architecture: str
) -> None:
    reference = make_reference(trained_source, session_home.path / "data", 256)
    write_model(tmp_path / "a.gguf", trained_source, architecture, kind, llama_library)
    found, unread = verify(tmp_path / "a.gguf", architecture, reference, llama_library)
    assert not unread
    assert [one.reader for one in found] == (["llama.cpp"] if architecture == UNROLLED else []) + ["elara.py"]
    assert [one.problem(kind) for one in found] == [None] * len(found)
    if kind == "F32":
        assert all(one.argmax == 1 and one.greedy == one.of == 32 for one in found)


def test_a_wrong_file_is_noticed(
    trained_source: Source, session_home: Home, tmp_path: Path, llama_library: Library, in_process: Any
) -> None:
    """What one layer's attention says is left out."""
    reference = make_reference(trained_source, session_home.path / "data", 256)
    write_model(tmp_path / "a.gguf", trained_source, UNROLLED, "F16", llama_library)
    reader = GGUFReader(tmp_path / "a.gguf", "r+")
    (tensor,) = [tensor for tensor in reader.tensors if tensor.name == "blk.1.attn_output.weight"]
    tensor.data[:] = 0
    reader.data.flush()
    found, _ = verify(tmp_path / "a.gguf", UNROLLED, reference, llama_library)
    assert len(found) == 2 and all(one.problem("F16") is not None for one in found), found


def test_the_command_exports_and_verifies(
    trained: Path, session_home: Home, llama_library: Library, in_process: Any, tmp_path: Path
) -> None:
    code, out, err = in_process(
        main, session_home.path, f"checkpoint={trained}", "quantize=Q4_K_M", f"quantize.library={llama_library.path}",
        f"output={tmp_path}/a.gguf", "verify_tokens=256",
    )  # fmt: skip
    assert code == 0, err
    assert "Q4_K_M against the checkpoint in float32, on 256 tokens of held-out part of text" in out
    assert "llama.cpp" in out and "elara.py" in out and out.count("ok") >= 2


def test_types_that_elara_py_does_not_read_are_said(
    make: MAKE, tmp_path: Path, llama_library: Library, in_process: Any
) -> None:
    source = make(config(n_embd=96, model__hidden=160), ByteTokenizer())
    arguments = [f"checkpoint={source.folder}", "quantize=Q4_K_S", f"quantize.library={llama_library.path}",
                 "verify_tokens=64"]  # fmt: skip
    code, out, err = in_process(main, tmp_path, *arguments, "output=a.gguf")
    assert "note: elara.py does not read it" in out and "llama.cpp" in out and code == 0, err
    code, out, err = in_process(main, tmp_path, *arguments, "output=b.gguf", "format=compact")
    assert code == 1 and "b.gguf was kept, but nothing here reads it back: elara.py does not read it" in err


Ask = Callable[..., dict[str, Any]]


def served(path: Path, *, exact: bool = False) -> Ask:
    """llama.cpp's own server with this file, for as long as the function lives. exact: a cache in float32."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="`make counterparts` installs it")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.port = 512, 1, False, _free_port()
    params.cpuparams.n_threads = 1
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def ask(path: str, **asked: Any) -> dict[str, Any]:
        data, kind = json.dumps(asked).encode() if asked else None, {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/{path}", data, kind)
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    return ask


def test_the_openai_server_of_xllamacpp_answers_from_our_file(
    trained_source: Source, tmp_path: Path, llama_library: Library
) -> None:
    source = replace(trained_source, chat=True)
    write_model(tmp_path / "bee.gguf", source, UNROLLED, "Q8_0", llama_library)
    ask = served(tmp_path / "bee.gguf")
    choice = ask("v1/completions", model="bee", prompt="ba ko", max_tokens=16, temperature=0.0)["choices"][0]
    with LlamaModel(llama_library, tmp_path / "bee.gguf", CONTEXT) as model:
        written = model.greedy(source.tokenizer.encode("ba ko"), 16)
    assert len(choice["text"]) == 16 and choice["finish_reason"] == "length"
    assert choice["text"][:6] == source.tokenizer.decode(written)[:6]
    chat = [{"role": "system", "content": "ba"}, {"role": "user", "content": "ko li"}]
    prompt = ask("apply-template", messages=chat)["prompt"]
    tokens = ask("tokenize", content=prompt, parse_special=True, add_special=True)["tokens"]
    assert tokens == source.tokenizer.apply_chat(chat, generate=True)[0]
    answered = ask("v1/chat/completions", model="bee", messages=chat, max_tokens=8, temperature=0.0)
    assert answered["usage"]["prompt_tokens"] == len(tokens)


def test_llama_cpp_s_server_writes_calls_tools_and_results_as_they_are_taught(make: MAKE, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    write_model(tmp_path / "bee.gguf", make(config(), tokenizer, chat=True), UNROLLED, "F16", None)
    ask = served(tmp_path / "bee.gguf")
    function = {"description": "d", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": {"name": name} | function} for name in ("convert", "now")]
    arguments = {"value": 2.5, "from": 'naïve "km"\n<b>', "to": [1, {"x": None}], "é": {}}
    calls = [Call("convert", arguments), Call("now", {})]
    spelled: list[Callable[[Any], Any]] = [
        dict,
        json.dumps,
        lambda a: json.dumps(a, ensure_ascii=False, separators=(",", ":")),
    ]
    for spell, content, offered in itertools.product(spelled, (None, "", "Wait."), (False, True)):
        functions = [{"name": call.name, "arguments": spell(call.arguments)} for call in calls]
        made = [{"id": each["name"], "type": "function", "function": each} for each in functions]
        asked: list[dict[str, Any]] = [
            {"role": "user", "content": "how far?"},
            {"role": "assistant", "content": content, "tool_calls": made},
            {"role": "tool", "content": '{"result": 1.6}', "tool_call_id": "convert"},
        ]
        prompt = ask("apply-template", messages=asked, **({"tools": tools} if offered else {}))["prompt"]
        tokens = ask("tokenize", content=prompt, parse_special=True, add_special=True)["tokens"]
        words = "\n".join([*([content] if content else []), *(call.text() for call in calls)])
        taught = [{"role": "system", "content": "Tools: convert, now"}] * offered
        taught += [asked[0], {"role": "assistant", "content": words}, {"role": "tool", "content": asked[2]["content"]}]
        assert tokens == tokenizer.apply_chat(taught, generate=True)[0], prompt


OLLAMA_S = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.0, "repeat_penalty": 1.1, "repeat_last_n": 64}


def test_ollama_s_parameters_write_what_the_checkpoint_writes(
    make: MAKE, in_process: Any, tmp_path: Path, llama_library: Library
) -> None:
    """What the Modelfile says over what Ollama would take, told to llama.cpp, which is what Ollama runs."""
    source = make(config(), ByteTokenizer())
    code, _, err = in_process(
        main, tmp_path, f"checkpoint={source.folder}", "format=ollama", "quantize=F32", "output=o", "verify=false"
    )
    assert code == 0, err
    text = (tmp_path / "o" / "Modelfile").read_text("utf-8")
    said = {name: json.loads(value) for name, value in re.findall(r"^PARAMETER (\w+) (.*)$", text, re.MULTILINE)}
    assert said["num_ctx"] == source.config.model.context_length and said["stop"] == "<|end|>"
    ask, sampling = served(tmp_path / "o" / "checkpoint-F32.gguf", exact=True), OLLAMA_S | said
    ids = torch.randint(256, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    greedy = ask("completion", prompt=ids, return_tokens=True, n_predict=WRITTEN, **sampling | {"temperature": 0})
    assert greedy["tokens"] == torch_greedy(source, ids, WRITTEN)
    shown = sampling | {"n_predict": 1, "n_probs": 400, "post_sampling_probs": True}
    drawn = (ask("completion", prompt=ids, seed=seed, **shown) for seed in range(50))
    rows = (
        one["completion_probabilities"] for one in drawn if "completion_probabilities" in one
    )  # of whole characters
    found = {entry["id"]: entry["prob"] for entry in next(rows)[0]["top_probs"]}
    logits = torch.from_numpy(torch_logits(source, ids)[-1]).double()
    expected = (logits / said["temperature"]).softmax(-1)
    assert len(found) == source.config.vocab_size, "no token is cut off"
    assert max(abs(expected[i].item() - probability) for i, probability in found.items()) < 1e-4


def test_llama_cpp_draws_as_the_checkpoint_does_unless_it_is_told_otherwise(make: MAKE, tmp_path: Path) -> None:
    write_model(tmp_path / "bee.gguf", make(config(), ByteTokenizer()), UNROLLED, "F16", None)
    found = served(tmp_path / "bee.gguf")("props")["default_generation_settings"]["params"]
    assert {name: found[name] for name in ("top_k", "top_p", "min_p", "repeat_penalty")} == {
        "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0
    }  # fmt: skip
    assert found["temperature"] == pytest.approx(SamplingConfig().temperature)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
