"""Whatever a server does, an answer or one clear error comes in bounded time."""

from __future__ import annotations

import inspect
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from elara.backends import Answer, BackendError, Params
from elara.backends.ollama import Ollama
from elara.backends.openai_compatible import OpenAICompatible
from elara.backends.server import Server
from tests.backends.hostile import (
    Act,
    Handler,
    closing_backends,
    cut,
    drip,
    drop,
    endless,
    endless_line,
    free_port,
    hang_up,
    hostile,
    inside,
    models,
    not_text,
    page,
    raw,
    silent,
    silent_midway,
    speak,
    speak_tokens,
    split_characters,
    status,
)
from tests.conftest import ROOT

pytest.importorskip("openai")  # here, so that no test pays for the import
pytest.importorskip("ollama")

HELLO = [{"role": "user", "content": "hello"}]
GOOD = speak("Once ", "upon a time")
KEY = "sk-very-secret-key"
RETRIES, DEADLINE = 2, 5.0


@pytest.fixture(autouse=True)
def _closing() -> Iterator[None]:
    with closing_backends():
        yield


@pytest.fixture(params=["openai", "ollama"])
def api(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OLLAMA_API_KEY", KEY)
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    found: str = request.param
    return found


def backend(api: str, address: str, **more: Any) -> Server:
    given = {"retries": RETRIES, "retry_delay": 0.02, "timeout": 3.0, "deadline": DEADLINE, "concurrency": 2} | more
    if api == "ollama":
        return Ollama("bee", address, **given)
    return OpenAICompatible("bee", f"{address}/v1", **given)


def ask(made: Server, params: Params | None = None) -> Answer | BackendError:
    start = time.monotonic()
    ((index, result),) = made.answers([HELLO], params or Params())
    assert time.monotonic() - start < DEADLINE + 20  # a bound, not a speed: machines are busy
    assert index == 0
    return result


def failed(result: Answer | BackendError) -> BackendError:
    assert isinstance(result, BackendError), result
    message = str(result)
    assert "\n" not in message and "127.0.0.1" in message and "bee" in message
    assert KEY not in message and KEY not in repr(result)
    assert result.__cause__ is None, "a traceback must not show what a server said"
    return result


@pytest.mark.thorough(20, "slow")
@pytest.mark.parametrize(
    ("act", "kind", "requests", "said"),
    [
        (silent, "timeout", 3, "0.2 seconds"),
        (silent_midway, "timeout", 3, "0.2 seconds"),
        (status(429), "rate_limited", 3, "429"),
        (status(429, Retry_After="3600"), "rate_limited", 1, "429"),
        (status(429, "insufficient_quota"), "refused", 1, "insufficient_quota"),
        (status(500, "boom"), "failed", 3, "500 (boom)"),
        (status(503, "Loading model"), "unreachable", 3, "Loading model"),
        (status(529, "overloaded"), "rate_limited", 3, "overloaded"),
        (status(504, "gateway"), "timeout", 3, "504"),
        (status(404, "no such model"), "refused", 1, "no such model"),
        (status(401, f"bad key {KEY}!"), "refused", 1, "bad key ***!"),
        (status(400, "the request exceeds the context size"), "unfit", 1, "context"),
        (status(500, "CUDA error: out of memory"), "out_of_memory", 1, "out of memory"),
        (status(500, "model requires more system memory (9 GiB) than is available"), "out_of_memory", 1, "9 GiB"),
        (inside("cudaMalloc failed: out of memory"), "out_of_memory", 1, "cudaMalloc"),
        (inside("slot broke"), "failed", 3, "slot broke"),
        (hang_up, "failed", 3, "broke the connection off"),
        (drop, "failed", 3, "broke the connection off"),
        (cut, "failed", 3, "in the middle of an answer"),
        (speak(), "empty", 3, "empty answer"),
        (speak(" ", "\n \t"), "empty", 3, "empty answer"),
        (speak(finish="length", thought="hm"), "empty", 3, "max_new_tokens"),
        (speak("<think>hm, hm", finish="length"), "empty", 3, "max_new_tokens"),
        (endless, "endless", 1, "2000 characters"),
        (endless_line, "endless", 1, "MB"),
        (not_text, "not_text", 1, "UTF-8"),
        (raw("{not json"), "failed", 3, "not an answer"),
        (raw("[1, 2]", "5", "null"), "failed", 3, ""),
        (raw('{"choices": 7, "message": 7, "done": 3}'), "failed", 3, "not an answer"),
        (raw("[" * 100_000), "failed", 3, "not an answer"),
        (page, "failed", 3, ""),
    ],
)  # fmt: skip
def test_every_trouble_is_one_error_after_a_bounded_number_of_requests(
    api: str, act: Act, kind: str, requests: int, said: str
) -> None:
    with hostile(act) as server:
        timeout = 0.2 if act in (silent, silent_midway) else 3.0
        error = failed(ask(backend(api, server.address, max_characters=2000, timeout=timeout)))
        assert (error.kind, len(server.asked)) == (kind, requests)
        assert said in str(error)
        assert (f"tried {requests} times" in str(error)) == (requests > 1)


@pytest.mark.thorough(4, "slow")
@pytest.mark.parametrize(
    "trouble", [status(500), status(503), status(429, Retry_After="0"), hang_up, drop, cut, speak(), silent, page]
)
def test_what_passes_is_asked_again_until_it_works(api: str, trouble: Act) -> None:
    with hostile(trouble, trouble, GOOD) as server:
        timeout = 1.5 if trouble is silent else 3.0
        assert ask(backend(api, server.address, timeout=timeout)) == Answer("Once upon a time", "stop")
        assert len(server.asked) == 3


@pytest.mark.parametrize("header", [{"Retry_After": "0.3"}, {"Retry_After_ms": "300"}])
def test_a_server_is_left_alone_for_as_long_as_it_asks(api: str, header: dict[str, str]) -> None:
    with hostile(status(429, **header), GOOD) as server:
        assert isinstance(ask(backend(api, server.address)), Answer)
        assert 0.3 <= server.times[1] - server.times[0] < 20


def test_all_threads_leave_a_server_alone_that_asked_one_of_them(api: str) -> None:
    with hostile(status(429, Retry_After="0.4"), GOOD) as server:
        made = backend(api, server.address, concurrency=1)
        first = threading.Thread(target=lambda: ask(made))
        first.start()
        while not server.asked:
            time.sleep(0.005)
        time.sleep(0.1)
        assert isinstance(ask(made), Answer)
        first.join()
        assert server.times[1] - server.times[0] >= 0.4


def test_a_closed_port_is_one_line_that_says_what_to_do(api: str) -> None:
    error = failed(ask(backend(api, f"http://127.0.0.1:{free_port()}")))
    assert error.kind == "unreachable" and error.lasting
    assert "tried 3 times" in str(error)
    assert ("ollama serve" if api == "ollama" else "start the server") in str(error)


def test_the_deadline_holds_for_a_server_that_always_sends_something(api: str) -> None:
    with hostile(drip) as server:
        start = time.monotonic()
        error = failed(ask(backend(api, server.address, deadline=0.5)))
        assert error.kind == "timeout" and "deadline" in str(error)
        assert 0.4 < time.monotonic() - start < 20


def test_an_empty_answer_is_asked_for_with_another_seed(api: str) -> None:
    with hostile(speak(), speak(), GOOD) as server:
        assert isinstance(ask(backend(api, server.address), Params(seed=5)), Answer)
        seeds = [asked["seed"] if api == "openai" else asked["options"]["seed"] for asked in server.asked]
        assert seeds[0] == 5 and len(set(seeds)) == 3


def test_characters_come_out_whole_however_they_are_cut(api: str) -> None:
    with hostile(split_characters) as server:
        made = backend(api, server.address)
        assert ask(made) == Answer("naïve €🐝", "stop")
        pieces = list(made.generate(HELLO, Params()))
        assert "".join(pieces) == "naïve €🐝"
        assert all("\ufffd" not in piece for piece in pieces)


def test_half_a_character_is_not_text() -> None:
    def event(text: str, finish: str = "null") -> str:
        return f'{{"choices": [{{"delta": {{"content": "{text}"}}, "finish_reason": {finish}}}]}}'

    halves = [event("a\\ud83d"), event("\\udc1d b"), event("", '"stop"')]
    with hostile(raw(*halves), raw(halves[0], halves[2])) as server:
        made = backend("openai", server.address)
        assert ask(made) == Answer("a🐝 b", "stop")
        assert failed(ask(made)).kind == "not_text"


def test_a_stream_that_breaks_behind_its_first_piece_is_an_error_and_never_a_repetition(api: str) -> None:
    with hostile(status(500), drop) as server:
        pieces = backend(api, server.address).generate(HELLO, Params())
        assert next(pieces) == "Once upon"
        with pytest.raises(BackendError) as caught:
            next(pieces)
        assert failed(caught.value).kind == "failed"
        assert len(server.asked) == 2


@pytest.mark.thorough(2, "slow")
@pytest.mark.parametrize(("act", "kind"), [(speak(), "empty"), (status(401), "refused"), (silent, "timeout")])
def test_generate_meets_the_same_errors(api: str, act: Act, kind: str) -> None:
    with hostile(act) as server:
        with pytest.raises(BackendError) as caught:
            list(backend(api, server.address, timeout=0.2 if act is silent else 3.0).generate(HELLO, Params()))
        assert failed(caught.value).kind == kind


def test_a_closed_generator_hangs_up(api: str) -> None:
    gone = threading.Event()

    def act(handler: Handler) -> None:
        handler.begin()
        try:
            while not handler.hostile.closing.wait(0.01):
                handler.chunk(handler.piece("on and on "))
        except OSError:
            gone.set()

    with hostile(act) as server:
        pieces = backend(api, server.address).generate(HELLO, Params())
        assert next(pieces) == "on and on "
        pieces.close()  # type: ignore[attr-defined]
        assert gone.wait(2)


@pytest.mark.parametrize("act", [status(401), status(500, "out of memory")])
def test_an_error_that_lasts_is_met_once(api: str, act: Act) -> None:
    with hostile(act) as server:
        found = dict(backend(api, server.address).answers([HELLO] * 20, Params()))
        assert sorted(found) == list(range(20))
        assert all(isinstance(result, BackendError) and result.lasting for result in found.values())
        assert len(server.asked) <= 4
        assert len({str(result) for result in found.values()}) == 1


def test_an_error_of_one_conversation_ends_that_one_only(api: str) -> None:
    def act(handler: Handler) -> None:
        (status(400, "too long") if handler.body["messages"][0]["content"] == "2" else GOOD)(handler)

    with hostile(act) as server:
        conversations = [[{"role": "user", "content": str(i)}] for i in range(6)]
        found = dict(backend(api, server.address).answers(conversations, Params()))
        assert failed(found.pop(2)).kind == "unfit"
        assert found == dict.fromkeys((0, 1, 3, 4, 5), Answer("Once upon a time", "stop"))


def test_no_more_requests_at_once_than_concurrency_says(api: str) -> None:
    together = threading.Barrier(3)

    def act(handler: Handler) -> None:
        together.wait(30)
        GOOD(handler)

    with hostile(act) as server:
        made = backend(api, server.address, concurrency=3, timeout=30, deadline=60)
        assert all(isinstance(answer, Answer) for _, answer in made.answers([HELLO] * 9, Params()))
        assert server.most == 3


def test_whoever_stops_listening_waits_for_nothing(api: str) -> None:
    with hostile(GOOD, silent) as server:
        start = time.monotonic()
        answers = backend(api, server.address, timeout=60).answers([HELLO] * 50, Params())
        assert isinstance(next(answers)[1], Answer)
        answers.close()  # type: ignore[attr-defined]
        assert time.monotonic() - start < 30
        time.sleep(0.1)
        assert len(server.asked) <= 4


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_a_process_that_waits_for_a_silent_server(api: str) -> None:
    with hostile(silent) as server:
        made = {"ollama": f"ollama.Ollama('bee', '{server.address}')",
                "openai": f"openai_compatible.OpenAICompatible('bee', '{server.address}/v1')"}[api]  # fmt: skip
        start = "from elara.backends import ollama, openai_compatible, Params"
        script = f"{start}\nlist({made}.answers([{HELLO}] * 9, Params()))"
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background is told to ignore it
        with subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heard
        ) as process:
            end = time.monotonic() + 60
            while not server.asked and time.monotonic() < end:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=10)
        assert err.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.slow
def test_requests_are_spaced_as_the_limit_says(api: str) -> None:
    with hostile(GOOD) as server:
        made = backend(api, server.address, requests_per_minute=60, deadline=1.9, concurrency=4)
        answers = [result for _, result in made.answers([HELLO] * 3, Params())]
        assert all(isinstance(answer, Answer) for answer in answers), "waiting for a slot is not the answer's time"
        assert max(server.times) - min(server.times) > 1.9


def test_no_questions_no_requests(api: str) -> None:
    with hostile(GOOD) as server:
        made = backend(api, server.address, pull=False) if api == "ollama" else backend(api, server.address)
        assert list(made.answers([], Params())) == []
        assert made.embed([]).shape[0] == 0
        assert server.asked == []


@pytest.mark.parametrize(
    "act",
    [
        speak("Once ", "upon a time", thought="Let me think."),
        speak("<think>", "Let me </thi", "nk></think>\n\n", "Once ", "upon a time"),
        speak("\n<thi", "nk>hm</think>Once upon a time"),
    ],
)
def test_thoughts_are_no_part_of_an_answer(api: str, act: Act) -> None:
    with hostile(act) as server:
        made = backend(api, server.address)
        answer = ask(made)
        assert isinstance(answer, Answer)
        assert answer.text.removeprefix("</think>\n\n") == "Once upon a time"
        assert "".join(made.generate(HELLO, Params())) == answer.text


def test_thoughts_whose_beginning_the_template_wrote_are_left_out(api: str) -> None:
    with hostile(speak("Let me think.\n</think>", "\n\nOnce upon", " a time")) as server:
        assert ask(backend(api, server.address)) == Answer("Once upon a time", "stop")


def test_endless_thoughts_end(api: str) -> None:
    def act(handler: Handler) -> None:
        handler.begin()
        while not handler.hostile.closing.is_set():
            handler.chunk(handler.piece(thought="hm " * 20))

    with hostile(act) as server:
        assert failed(ask(backend(api, server.address, max_characters=500))).kind == "endless"


def test_stop_texts_end_an_answer_where_the_server_lets_it_run_on(api: str) -> None:
    with hostile(speak("one, t", "wo, three", ", four")) as server:
        made = backend(api, server.address)
        params = Params(stop=("two", "x1", "x2", "x3", "x4"))
        assert ask(made, params) == Answer("one, ", "stop")
        assert "".join(made.generate(HELLO, params)) == "one, "
        sent = server.asked[0]
        assert (sent["stop"] if api == "openai" else sent["options"]["stop"])[0] == "two"


def test_finish_is_length_where_the_limit_ended_it(api: str) -> None:
    with hostile(speak("Once", finish="length")) as server:
        assert ask(backend(api, server.address)) == Answer("Once", "length")


FINISHED = {
    "stop": ["stop", "STOP", "eos", "end_turn"],
    "length": ["length", "max_tokens", "MAX_TOKENS", "model_length"],
}


@pytest.mark.parametrize(("meant", "said"), [(meant, said) for meant, known in FINISHED.items() for said in known])
def test_finish_reasons_are_known_by_every_name(api: str, meant: str, said: str) -> None:
    with hostile(speak("Once", finish=said)) as server:
        assert ask(backend(api, server.address)) == Answer("Once", meant)


@pytest.mark.thorough(4, "slow")
@pytest.mark.parametrize("said", ["abort", "error", "content_filter", "load", "whatever\nelse " * 20])
def test_an_answer_that_ended_otherwise_is_asked_for_again(api: str, said: str) -> None:
    with hostile(speak("Once", finish=said), GOOD) as server:
        assert ask(backend(api, server.address)) == Answer("Once upon a time", "stop")
        assert len(server.asked) == 2
    with hostile(speak("Once", finish=said)) as server:
        error = failed(ask(backend(api, server.address)))
        assert error.kind == "failed" and said[:8] in str(error) and len(str(error)) < 200
        assert len(server.asked) == 3


@pytest.mark.parametrize("said", ["tool_calls", "function_call"])
def test_a_tool_call_is_no_answer_in_words(api: str, said: str) -> None:
    with hostile(speak("Let me look.", finish=said)) as server:
        error = failed(ask(backend(api, server.address)))
        assert (error.kind, len(server.asked)) == ("unfit", 1) and "called a tool" in str(error)


def test_a_tool_call_that_ends_with_stop_is_none_either(api: str) -> None:
    def act(handler: Handler) -> None:
        function = {"name": "look", "arguments": "{}" if api == "openai" else {}}
        calls = [{"index": 0, "id": "x", "type": "function", "function": function}]
        handler.begin()
        handler.chunk(
            handler.piece("@").replace(b'"content": "@"', b'"content": "", "tool_calls": ' + json.dumps(calls).encode())
        )
        handler.chunk(handler.piece(finish="stop"))
        handler.chunk(b"")

    with hostile(act) as server:
        assert "called a tool" in str(failed(ask(backend(api, server.address))))


def test_an_empty_finish_reason_ends_nothing(api: str) -> None:
    def act(handler: Handler) -> None:
        handler.begin()
        for text in ("The", " cat", " sat."):
            name = "done_reason" if api == "ollama" else "finish_reason"
            event = json.loads(handler.piece(text).removeprefix(b"data: "))
            (event if api == "ollama" else event["choices"][0])[name] = ""
            data = json.dumps(event).encode()
            handler.chunk(data + b"\n" if api == "ollama" else b"data: " + data + b"\n\n")
        if len(handler.hostile.asked) == 1:
            handler.chunk(handler.piece(finish="stop"))
        handler.chunk(b"")

    with hostile(act) as server:
        made = backend(api, server.address)
        assert ask(made) == Answer("The cat sat.", "stop")
        error = failed(ask(made))
        assert error.kind == "failed" and "in the middle of an answer" in str(error)


def test_ollama_says_no_reason_where_its_runner_broke_off() -> None:
    """Its DoneReasonConnectionClosed is written as an empty text, which JSON leaves out."""
    last = '{"model": "bee", "message": {"role": "assistant", "content": "Once"}, "done": true}'
    with hostile(raw(last), GOOD) as server:
        assert ask(backend("ollama", server.address)) == Answer("Once upon a time", "stop")


def test_parameters_reach_the_server(api: str) -> None:
    params = Params(max_new_tokens=7, temperature=0.5, top_k=3, top_p=0.9, seed=11, stop=("x", "y"))
    with hostile(GOOD) as server:
        ask(backend(api, server.address), params)
        sent = server.asked[0]
    assert sent["messages"] == HELLO and sent["stream"] is True and sent["model"] == "bee"
    if api == "openai":
        assert {key: sent[key] for key in ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop")} == {
            "max_tokens": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 11, "stop": ["x", "y"]
        }  # fmt: skip
        assert "logprobs" not in sent
    else:
        assert sent["options"].items() >= {
            "num_predict": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 11, "stop": ["x", "y"]
        }.items()  # fmt: skip


def test_tokens_come_with_their_probabilities_and_without_those_of_thoughts(api: str) -> None:
    with hostile(speak_tokens("<think>", "hm", "</think>", "Once", " upon")) as server:
        made = backend(api, server.address)
        assert made.capabilities.token_logprobs == 20
        answer = ask(made, Params(logprobs=2))
        assert isinstance(answer, Answer)
        assert answer.text == "Once upon"
        assert [token.text for token in answer.tokens] == ["Once", " upon"]
        assert answer.tokens[0].logprob == -0.5 and answer.tokens[0].top == (("Once", -0.5), ("t1", -1.5))
        assert made.capabilities.token_logprobs == 20
        assert len(server.asked) == 2, "found out once"


@pytest.mark.parametrize("code", [400, 422, 501])
def test_a_server_that_refuses_log_probabilities_is_asked_without(api: str, code: int) -> None:
    def act(handler: Handler) -> None:
        (status(code, "what is that?") if "logprobs" in handler.body else GOOD)(handler)

    with hostile(act) as server:
        made = backend(api, server.address)
        assert ask(made, Params(logprobs=5)) == Answer("Once upon a time", "stop")
        assert made.capabilities.token_logprobs == 0


@pytest.mark.parametrize(("act", "known"), [(GOOD, 0), (speak_tokens("a", alternatives=5), 5)])
def test_what_a_server_does_not_give_is_not_promised(api: str, act: Act, known: int) -> None:
    with hostile(act) as server:
        made = backend(api, server.address)
        assert made.capabilities.token_logprobs == known
        assert isinstance(ask(made, Params(logprobs=20)), Answer)


def test_capabilities_of_a_server_that_is_down_promise_nothing_and_are_asked_again(api: str) -> None:
    made = backend(api, f"http://127.0.0.1:{free_port()}", retries=0)
    assert made.capabilities.token_logprobs == 0
    with hostile(status(500), speak_tokens("a")) as server:
        made = backend(api, server.address, retries=0)
        assert made.capabilities.token_logprobs >= 0


def embedding(vectors: list[list[float]]) -> Act:
    def act(handler: Handler) -> None:
        if handler.api == "ollama":
            handler.whole({"model": "bee", "embeddings": vectors})
        else:
            entries = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
            handler.whole({"object": "list", "data": entries[::-1], "model": "bee"})

    return act


def test_vectors_have_unit_length_and_the_order_of_the_texts(api: str) -> None:
    with hostile(embedding([[3.0, 4.0], [0.0, 2.0]])) as server:
        found = backend(api, server.address).embed(["a", "b"])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0.6, 0.8], [0.0, 1.0]], rtol=1e-6)


def test_many_texts_are_embedded_in_groups(api: str) -> None:
    def act(handler: Handler) -> None:
        embedding([[float(len(text)), 1.0] for text in handler.body["input"]])(handler)

    with hostile(act) as server:
        found = backend(api, server.address).embed(["x" * i for i in range(150)])
        assert found.shape == (150, 2) and len(server.asked) == 3
    np.testing.assert_allclose(found[:, 0] / found[:, 1], range(150), rtol=1e-5)


@pytest.mark.parametrize("vectors", [[[1.0]], [[1.0], [1.0, 2.0]], [[], []], [[1.0], [float("nan")]], [["a"], ["b"]]])
def test_vectors_that_are_none_are_an_error(api: str, vectors: Any) -> None:
    with hostile(embedding(vectors)) as server, pytest.raises(BackendError) as caught:
        backend(api, server.address).embed(["a", "b"])
    assert failed(caught.value).kind == "failed"


def test_no_key_is_ever_shown(api: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with hostile(status(400, f"you sent {KEY} and hunter2")) as server:
        address = server.address.replace("http://", "http://me:hunter2@")
        made = backend(api, address)
        error = failed(ask(made))
        shown = [str(error), str(made.identity()), repr(made), caplog.text]
    assert all(KEY not in text and "hunter2" not in text for text in shown)
    assert "127.0.0.1" in shown[0]


def test_identity_names_what_answers(api: str) -> None:
    with hostile(GOOD) as server:
        found = backend(api, server.address).identity()
    assert found["model"] == "bee"
    if api == "ollama":
        assert (found["kind"], found["revision"]) == ("ollama", "abc123")
        assert found["details"] == {"family": "bees", "parameter_size": "1B"}
    else:
        assert (found["kind"], found["base_url"]) == ("openai_compatible", f"{server.address}/v1")
        assert found["server"] == {"owned_by": "bees", "meta": {"n": 1}}, "nothing that changes from call to call"


def test_a_backend_goes_on_after_close(api: str) -> None:
    with hostile(GOOD) as server:
        made = backend(api, server.address)
        made.close()
        assert isinstance(ask(made), Answer)
        made.close()
        made.close()
        assert isinstance(ask(made), Answer)


def test_building_one_asks_nobody(api: str) -> None:
    made = backend(api, "http://127.0.0.1:1")
    assert made.fingerprint is None
    with pytest.raises(BackendError, match="another teacher") as caught:
        made.top_logprobs(None, 3)  # type: ignore[arg-type]
    assert caught.value.kind == "refused"


@pytest.mark.parametrize("address", ["ftp://x", "http://", "http://[::1", "http://a:b", "nonsense://"])
def test_an_address_that_is_none_is_named_by_its_key(api: str, address: str) -> None:
    with pytest.raises(BackendError, match=r"backend\.(base_url|host) is no http") as caught:
        ask(backend(api, address))
    assert caught.value.kind == "refused"


@pytest.mark.parametrize(
    "wrong", [{"timeout": 0}, {"retries": -1}, {"concurrency": 0}, {"max_characters": 0}, {"requests_per_minute": 0}]
)
def test_limits_that_are_none_are_named(api: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match=next(iter(wrong))):
        backend(api, "http://127.0.0.1:1", **wrong)


@pytest.mark.parametrize("option", ["ollama", "openai_compatible"])
def test_the_configuration_names_every_argument_and_builds_the_backend(option: str) -> None:
    given = yaml.safe_load((ROOT / "conf" / "teacher" / f"{option}.yaml").read_text("utf-8"))["backend"]
    made = instantiate(OmegaConf.create(given))
    assert isinstance(made, Server)
    taken = inspect.signature(type(made)).parameters
    assert set(given) - {"_target_", "_convert_"} == set(taken)
    assert {name: given[name] for name, parameter in taken.items() if parameter.default is not parameter.empty} == {
        name: parameter.default if parameter.default is not None or name != "extra" else {}
        for name, parameter in taken.items() if parameter.default is not parameter.empty
    }, "defaults are the same in both places"  # fmt: skip


# What only OpenAI's API has


def test_fields_that_a_server_does_not_know_are_left_out_where_that_changes_nothing() -> None:
    def act(handler: Handler) -> None:
        for name in ("min_p", "top_k"):
            if name in handler.body:
                return status(400, f"Unrecognized request argument supplied: {name}")(handler)
        if "max_tokens" in handler.body:
            return status(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")(handler)
        return GOOD(handler)

    with hostile(act) as server:
        made = backend("openai", server.address)
        assert isinstance(ask(made), Answer)
        assert server.asked[-1]["max_completion_tokens"] == 256
        before = len(server.asked)
        assert isinstance(ask(made), Answer)
        assert len(server.asked) == before + 1, "found out once"
        assert "top_k" in str(failed(ask(made, Params(top_k=5)))), "what was asked for is not dropped in silence"


def test_a_refusal_that_was_about_something_else_changes_nothing() -> None:
    with hostile(*[status(422, "I got min_p, top_k, seed and max_tokens")] * 4, GOOD) as server:
        made = backend("openai", server.address)
        assert failed(ask(made)).kind == "unfit"
        assert len(server.asked) == 4, "without min_p, top_k, seed"
        assert isinstance(ask(made), Answer)
        assert {"min_p", "top_k", "seed", "max_tokens"} < set(server.asked[-1])


def test_fields_of_one_s_own_are_never_left_out() -> None:
    with hostile(status(400, "what is min_p?")) as server:
        made = OpenAICompatible("bee", f"{server.address}/v1", extra={"min_p": 0.2})
        assert "min_p" in str(failed(ask(made)))
        assert len(server.asked) == 1


@pytest.mark.parametrize(("names", "kind"), [((), "refused"), (("a", "b"), "refused")])
def test_without_a_name_the_server_must_have_one_model(names: tuple[str, ...], kind: str) -> None:
    with hostile(GOOD, listing=models(*names)) as server:
        made = OpenAICompatible(None, f"{server.address}/v1", retries=0)
        ((_, error),) = made.answers([HELLO], Params())
        assert isinstance(error, BackendError) and error.kind == kind
        assert all(name in str(error) for name in names) and server.asked == []


def test_the_only_model_of_a_server_needs_no_name() -> None:
    with hostile(GOOD, listing=models("drone")) as server:
        made = OpenAICompatible(
            None, f"{server.address}/v1", extra={"chat_template_kwargs": {"enable_thinking": False}}
        )
        assert isinstance(ask(made), Answer)
        assert server.asked[0]["model"] == made.identity()["model"] == "drone"
        assert server.asked[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_without_a_key_local_servers_get_a_word_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    heard = []

    def act(handler: Handler) -> None:
        heard.append(handler.headers["Authorization"])
        GOOD(handler)

    with hostile(act) as server:
        assert isinstance(ask(backend("openai", server.address)), Answer)
    assert heard == ["Bearer EMPTY"]


def test_a_key_that_cannot_be_sent_is_not_shown_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a\nb")
    ((_, error),) = backend("openai", "http://127.0.0.1:1").answers([HELLO], Params())
    assert isinstance(error, BackendError) and "OPENAI_API_KEY" in str(error) and "sk-a" not in str(error)


def test_messages_in_other_forms_are_read() -> None:
    def event(delta: Any, finish: str | None = None) -> str:
        return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    parts = [event({"content": [thought, {"type": "text", "text": word}]}) for word in ("The", " cat")]
    with hostile(raw(*parts, event(None, "stop"), "[DONE]"), raw(event({"content": [{"type": "image"}]}))) as server:
        made = backend("openai", server.address)
        assert ask(made) == Answer("The cat", "stop")
        assert "not an answer of OpenAI's API" in str(failed(ask(made)))


def test_an_answer_that_does_not_stream_is_read_as_a_whole() -> None:
    def whole(content: str, finish: str | None) -> Act:
        message = {"role": "assistant", "content": content}
        return lambda handler: handler.whole({"choices": [{"index": 0, "message": message, "finish_reason": finish}]})

    script = [whole("Once", "stop"), whole("Once", "max_tokens"), whole("On", None), whole("On", "abort"), GOOD]
    with hostile(*script) as server:
        made = backend("openai", server.address)
        assert ask(made) == Answer("Once", "stop")
        assert ask(made) == Answer("Once", "length")
        assert ask(made) == Answer("Once upon a time", "stop")
        assert len(server.asked) == 5


def test_a_stream_under_the_name_of_json_is_still_one() -> None:
    def act(handler: Handler) -> None:
        data = handler.piece("Once") + handler.piece(" upon", finish="stop")
        handler.whole(data)

    with hostile(act) as server:
        assert ask(backend("openai", server.address)) == Answer("Once upon", "stop")


def test_an_address_without_v1_is_one_clear_line() -> None:
    """LM Studio says 200 there, and the error in JSON."""

    def act(handler: Handler) -> None:
        handler.whole({"error": f"Unexpected endpoint or method. ({handler.command} {handler.path})"})

    with hostile(act, listing=act) as server:
        for error in (failed(ask(OpenAICompatible("bee", server.address))),
                      failed(_caught(OpenAICompatible("bee", server.address).embed, ["a"])),
                      _caught(OpenAICompatible(None, server.address).identity)):  # fmt: skip
            assert error.kind == "refused" and "Unexpected endpoint" in str(error) and "mostly in /v1" in str(error)
        assert len(server.asked) == 2, "asking again would not help"


def _caught(call: Callable[..., Any], *given: Any) -> BackendError:
    with pytest.raises(BackendError) as caught:
        call(*given)
    return caught.value


# What only Ollama has


def pulling(*events: dict[str, Any]) -> Act:
    def act(handler: Handler) -> None:
        raw(*map(json.dumps, events))(handler)
        if events[-1].get("status") == "success":
            handler.hostile.listing = models("bee:latest")

    return act


LAYER = {"status": "pulling abc", "digest": "abc", "total": 1000}
PULLED = pulling({"status": "pulling manifest"}, LAYER, LAYER | {"completed": 1000}, {"status": "success"})


def test_a_missing_model_is_pulled_with_progress_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with hostile(GOOD, listing=models("wasp"), pulling=PULLED) as server:
        made = backend("ollama", server.address)
        assert isinstance(ask(made), Answer)
        assert isinstance(ask(made), Answer)
        assert made.identity()["revision"] == "abc123"
        assert [pull["model"] for pull in server.pulls] == ["bee"]
    out, err = capfd.readouterr()
    assert out == "" and "fetching bee" in err and "1.0/1.0 kB" in err


def test_a_missing_model_is_named_where_it_may_not_be_pulled() -> None:
    with hostile(GOOD, listing=models("wasp"), pulling=PULLED) as server:
        error = failed(ask(backend("ollama", server.address, pull=False)))
        assert error.kind == "refused" and "ollama pull bee" in str(error)
        assert server.pulls == [] and server.asked == []


def test_a_model_that_nobody_has_is_refused() -> None:
    gone = pulling({"status": "pulling manifest"}, {"error": "pull model manifest: file does not exist"})
    with hostile(GOOD, listing=models(), pulling=gone) as server:
        error = failed(ask(backend("ollama", server.address)))
        assert "file does not exist" in str(error)
        assert error.kind == "refused" and len(server.pulls) == 1


def test_a_download_that_breaks_is_taken_up_again() -> None:
    def act(handler: Handler) -> None:
        (pulling(LAYER | {"completed": 10}) if len(handler.hostile.pulls) == 1 else PULLED)(handler)

    with hostile(GOOD, listing=models(), pulling=act) as server:
        assert isinstance(ask(backend("ollama", server.address)), Answer)
        assert len(server.pulls) == 2


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("example.com", "http://example.com:11434"), (":56789", "http://127.0.0.1:56789"),
        ("1.2.3.4:56789/path/", "http://1.2.3.4:56789/path"), ("https://me:secret@example.com", "https://example.com"),
        ("", "http://127.0.0.1:11434"),
    ],
)  # fmt: skip
def test_addresses_are_read_as_ollama_reads_them(host: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ollama._client import _parse_host

    monkeypatch.setenv("OLLAMA_HOST", host)
    made = Ollama("bee")
    assert f"Ollama at {shown} (bee)" == made._whom()
    assert _parse_host(shown) == _parse_host(host)


def test_ollama_host_is_where_it_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    with hostile(GOOD) as server:
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.port}")
        assert isinstance(ask(Ollama("bee", think=False, num_ctx=64, keep_alive="5m")), Answer)
        sent = server.asked[0]
        assert (sent["think"], sent["options"]["num_ctx"], sent["keep_alive"]) == (False, 64, "5m")
