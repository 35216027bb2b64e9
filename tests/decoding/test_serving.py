"""Requests from many threads at once: each gets its own text, whatever the others do."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from elara.decoding import Controller, Costs, Prefixes, SamplingConfig, Server
from elara.decoding.controller import candidates
from elara.errors import ElaraError

MASK_ID = 10
COSTS = Costs({(p.length, len(p.groups), p.masks): 1.0 + 0.05 * p.length * (1 + len(p.groups)) for p in candidates(4)})
WAIT = 60  # seconds after which a test gives up on a thread


def requests(count, modes):
    """Prompts, lengths, seeds and ways of sampling, all different."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for i, (mode, temperature) in zip(range(count), itertools.cycle(itertools.product(modes, (0.0, 1.0, 0.7)))):
        length = int(torch.randint(1, 24, (), generator=generator))
        prompt = torch.randint(0, 10, (length,), generator=generator).tolist()
        sampling = SamplingConfig(
            mode=mode,
            temperature=temperature,
            top_k=3 if i % 4 == 3 else None,
            seed=100 * i,
            max_new_tokens=1 + 7 * i % 43,
            stop=[i % 10] if i % 5 == 4 else [],
        )
        found.append((prompt, sampling))
    return found


def in_threads(work, items):
    """work(item) in a thread of its own for every item, all begun together."""
    barrier = threading.Barrier(len(items))

    def begin(item):
        barrier.wait(WAIT)
        return work(item)

    with ThreadPoolExecutor(len(items)) as pool:
        return [future.result(WAIT) for future in [pool.submit(begin, item) for item in items]]


def alone(write, model, prompt, sampling, **options):
    return write(model, [prompt], sampling, mask_id=MASK_ID, **options)[0][0]


@pytest.mark.thorough(1, "slow")
@pytest.mark.parametrize("slots", [3, 16])
@pytest.mark.parametrize("options", [{"depth": 2, "chain": True}, {"num_experts": 0, "draft_routing": "anchor"}])
def test_twelve_threads_get_what_each_would_get_alone(make_model, write, slots, options):
    model = make_model(**options)
    wanted = requests(12, ("ar", "tidar"))
    with Server(model, slots=slots, mask_id=MASK_ID) as server:
        texts = in_threads(lambda request: list(server.submit(*request)), wanted)
    assert texts == [alone(write, model, *request) for request in wanted]
    assert len({len(text) for text in texts}) > 5


def test_requests_join_while_others_are_written(make_model, write):
    model = make_model(depth=2)
    wanted = requests(12, ("tidar", "ar"))
    with Server(model, slots=4, mask_id=MASK_ID) as server:
        first = server.submit([1, 2], SamplingConfig(mode="tidar", temperature=0, max_new_tokens=400))
        begun = [next(first) for _ in range(5)]
        texts = in_threads(lambda request: list(server.submit(*request)), wanted)
        assert first._request.row.left  # it was written all the while
        first.cancel()
    assert texts == [alone(write, model, *request) for request in wanted]
    assert begun == alone(write, model, [1, 2], SamplingConfig(mode="ar", temperature=0, max_new_tokens=5))


@pytest.mark.parametrize("many", [False, True])
def test_a_controller_sets_the_pace_of_all(make_model, write, many):
    """Greedy and `ar` requests repeat what they would get alone; a sampled draft is only as long as asked for."""
    model = make_model(depth=2, chain=True)
    controller = {1: Controller(COSTS), 4: Controller(COSTS)} if many else Controller(COSTS)
    wanted = requests(12, ("auto", "ar"))
    with Server(model, slots=6, mask_id=MASK_ID, controller=controller) as server:
        texts = in_threads(lambda request: list(server.submit(*request)), wanted)
    for text, (prompt, sampling) in zip(texts, wanted, strict=True):
        assert 1 <= len(text) <= sampling.max_new_tokens
        if sampling.temperature == 0 or sampling.mode == "ar":
            sampling.mode = "ar"
            assert text == alone(write, model, prompt, sampling)


def test_without_a_controller_or_a_diffusion_head_auto_is_ar(make_model, write):
    for model in (make_model(), make_model(block_length=0)):
        with Server(model) as server:
            text = list(server.submit([1, 2, 3], SamplingConfig(seed=4, max_new_tokens=30)))
        assert text == alone(write, model, [1, 2, 3], SamplingConfig(mode="ar", seed=4, max_new_tokens=30))


def test_tokens_come_as_they_are_written(make_model):
    """The first is there while the model has not begun the third step."""
    go = threading.Semaphore(2)
    model = make_model(1)
    hook = model.register_forward_pre_hook(lambda *_: go.acquire(timeout=WAIT) and None)
    with Server(model) as server:
        stream = server.submit([1], SamplingConfig(max_new_tokens=4))
        assert next(stream) is not None and next(stream) is not None
        go.release(2)
        assert len(list(stream)) == 2
    hook.remove()


def test_a_cancelled_request_stops_and_frees_its_slot(make_model, write):
    model = make_model()
    endless = SamplingConfig(temperature=0, max_new_tokens=10**6)
    with Server(model, slots=1) as server:
        one = server.submit([1], endless)
        waiting = server.submit([2], endless)
        last = server.submit([3], SamplingConfig(temperature=0, max_new_tokens=6))
        text = [next(one) for _ in range(4)]
        waiting.cancel()
        assert list(waiting) == []  # it never had a slot
        one.cancel()
        text += list(one)
        assert list(last) == alone(write, model, [3], SamplingConfig(temperature=0, max_new_tokens=6))
        assert text == alone(write, model, [1], SamplingConfig(temperature=0, max_new_tokens=len(text)))


def test_a_stream_that_is_dropped_is_cancelled(make_model):
    with Server(make_model(), slots=1) as server:
        for _ in server.submit([1], SamplingConfig(max_new_tokens=10**6)):
            break
        assert len(list(server.submit([1], SamplingConfig(max_new_tokens=3)))) == 3


def test_a_crash_reaches_everyone_who_waits(make_model):
    go = threading.Event()

    def fail(*_):
        if go.wait(WAIT):
            raise MemoryError("no room")

    model = make_model()
    model.register_forward_hook(fail)
    server = Server(model, slots=2)
    streams = [server.submit([i], SamplingConfig(max_new_tokens=50)) for i in range(5)]  # two in flight, three waiting
    go.set()

    def ending(stream):
        with pytest.raises(RuntimeError) as error:
            list(stream)
        return error.value

    caught = in_threads(ending, streams)
    assert len({id(error) for error in caught}) == 5
    assert {str(error) for error in caught} == {"the server stopped: MemoryError: no room"}
    assert all(isinstance(error.__cause__, MemoryError) for error in caught)
    with pytest.raises(RuntimeError, match="no room"):
        server.submit([1], SamplingConfig())
    server.close()


def test_closing_ends_what_is_in_flight(make_model):
    model = make_model(dropout=0.5)
    model.train()
    with Server(model, slots=1) as server:
        streams = [server.submit([i], SamplingConfig(max_new_tokens=10**6)) for i in range(2)]
        assert next(streams[0]) is not None
        assert not model.training
    assert model.training
    for stream in streams:
        with pytest.raises(ElaraError, match="the server was closed"):
            list(stream)
        assert list(stream) == []
    with pytest.raises(ElaraError, match="the server was closed"):
        server.submit([1], SamplingConfig())
    server.close()


def test_an_idle_server_waits_without_work(make_model):
    with Server(make_model()) as server:
        assert len(list(server.submit([1], SamplingConfig(max_new_tokens=2)))) == 2
        before = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before < 0.1
        assert len(list(server.submit([1], SamplingConfig(max_new_tokens=2)))) == 2


def test_prefixes_are_remembered_while_serving(make_model, write):
    model = make_model(depth=2)
    prefixes = Prefixes(model, limit=3)
    head = [1, 2, 3, 4, 5, 6]
    wanted = [([*head, i], SamplingConfig(mode="ar", seed=i, max_new_tokens=20)) for i in range(6)]
    with Server(model, slots=4, prefixes=prefixes) as server:

        def ask(request):
            prefixes.remember([*head, len(threading.enumerate()) % 10])
            return list(server.submit(*request))

        texts = in_threads(ask, wanted)
    assert texts == [alone(write, model, *request) for request in wanted]


def test_autocast_of_the_thread_that_made_it_holds(make_model, write):
    model = make_model(dtype=torch.float32)
    sampling = SamplingConfig(mode="ar", temperature=0, max_new_tokens=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = alone(write, model, [1, 2], sampling)
        server = Server(model)
    with server:
        assert list(server.submit([1, 2], sampling)) == wanted


@pytest.mark.parametrize(
    ("message", "prompt", "options", "mode"),
    [
        ("prompt 0 is empty", [], {}, None),
        ("prompt 0 has 25 tokens", [1] * 25, {}, None),
        ("prompt 0 has token id 11", [11], {}, None),
        ("mode=guess", [1], {}, "guess"),
        ("mode=diffusion is not served", [1], {}, "diffusion"),
        ("draft_length and groups are the server's", [1], {"draft_length": 3}, "tidar"),
        ("exit_threshold", [1], {"exit_threshold": 0.1}, "ar"),
        ("overflow=slide", [1], {"overflow": "error"}, None),
    ],
)
def test_what_cannot_be_served_is_refused_in_the_callers_thread(make_model, message, prompt, options, mode):
    with Server(make_model(), mask_id=MASK_ID) as server:
        with pytest.raises(ElaraError, match=message) as error:
            server.submit(prompt, SamplingConfig(**options), mode)
        assert "\n" not in str(error.value)
        assert len(list(server.submit([1], SamplingConfig(max_new_tokens=3)))) == 3  # and the server goes on


def test_a_server_needs_a_slot_and_its_own_prefixes(make_model):
    with pytest.raises(ElaraError, match="slots=0 must be at least 1"):
        Server(make_model(), slots=0)
    with pytest.raises(ElaraError, match="another model"):
        Server(make_model(), prefixes=Prefixes(make_model()))
