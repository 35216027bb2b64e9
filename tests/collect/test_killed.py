"""kill -9 at any time: the store holds every answer once, and only what was in flight is asked again."""

import random
import time

import pytest


@pytest.mark.slow
def test_ten_kills_in_a_run_of_200_prompts_lose_and_repeat_nothing(collector, oracle):
    server = oracle(lambda q: f"It is {q} " * 20, delay=0.05)
    concurrency, draws = 3, random.Random(1)
    prompts = [f"question {i}?" for i in range(200)]
    arguments = [collector.ask(prompts), collector.teachers(oracle=server, settings={"concurrency": concurrency})]
    file = collector.home / "data" / "collected" / "teachers" / "answers.jsonl"
    given = 0  # whole answers on the disk when the last process was killed
    for _ in range(10):
        process = collector.start(*arguments)
        wanted = server.asked.total() + draws.randint(8, 20)
        while server.asked.total() < wanted and process.poll() is None:
            time.sleep(0.003)
        assert process.poll() is None, process.communicate()
        time.sleep(draws.uniform(0, 0.05))
        process.kill()
        process.communicate()
        lines = file.read_bytes().count(b"\n")
        assert lines > given
        given = lines
    assert given < 200
    with file.open("ab") as store:  # as if the last kill had come in the middle of a line
        store.write(b'{"id": "torn", "messages": [{"role": "us')
    code, out, err = collector(*arguments)
    assert (code, err) == (0, "")
    assert "was cut short" in out
    rows = collector.rows()
    assert sorted(row["messages"][0]["content"] for row in rows) == sorted(prompts)
    assert len({row["id"] for row in rows}) == 200
    assert [row["id"] for row in collector.rows("kept.jsonl")] == [row["id"] for row in rows]
    repeated = server.asked.total() - 200
    assert repeated <= 10 * 2 * concurrency, "what was in flight at a kill or had just come, and nothing else"
    assert max(server.asked.values()) <= 3
