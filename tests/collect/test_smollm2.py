"""The teacher that needs neither hub nor server, at work."""

import os
import signal
import time
from pathlib import Path

import pytest

from elara import archives
from elara.errors import ElaraError

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture
def smollm2(collector):
    """The archive and its converted weights are the checkout's."""
    pytest.importorskip("transformers")
    try:
        archives.fetch(archives.SMOLLM2, ROOT / "data" / "archives")
    except ElaraError as error:
        pytest.skip(str(error))
    (collector.home / "data").mkdir()
    for name in ("archives", "teachers"):
        (ROOT / "data" / name).mkdir(exist_ok=True)
        (collector.home / "data" / name).symlink_to(ROOT / "data" / name)
    return ["teacher=[smollm2]", "sampling.temperature=0", "sampling.max_new_tokens=24", "sampling.logprobs=3"]


def test_smollm2_answers_and_is_not_asked_twice(collector, smollm2):
    prompts = collector.ask(["What is the capital of France?", "Name the colour of the sky."])
    code, out, err = collector(prompts, *smollm2)
    assert code == 0, err
    rows = collector.rows()
    assert any("Paris" in row["messages"][-1]["content"] for row in rows)
    for row in rows:
        about = row["provenance"]
        assert about["identity"]["model"] == "SmolLM2-135M-Instruct"
        assert len(about["logprobs"][0][2]) == 3
        assert about["logprobs"][0][1] == about["logprobs"][0][2][0][1], "greedy: the chosen one is the likeliest"
        assert "".join(text for text, _, _ in about["logprobs"]) == row["messages"][-1]["content"]
    assert "tokens/s" in out
    code, out, _ = collector(prompts, *smollm2)
    assert code == 0
    assert "0 answered, 2 were there" in out


def test_ctrl_c_while_smollm2_writes(collector, smollm2):
    prompts = collector.ask([f"Tell me the story of bee number {i}." for i in range(200)])
    process = collector.start(prompts, *smollm2, "teachers.smollm2.backend.batch_size=2")
    file = collector.home / "data" / "collected" / "teachers" / "answers.jsonl"
    deadline = time.monotonic() + 200
    while not (file.is_file() and file.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert time.monotonic() - began < 50
    assert f"interrupted; {len(collector.rows())} new answers are in" in err
    assert "Traceback" not in err
