"""From made conversations to a model that calls tools, its figures, its replies and its export: all by the commands."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from safetensors.torch import load_file

from elara.data.tool_use import parse_call
from tests.conftest import TINY as SMALL

TINY = ["experiment=chat_quick", "model.n_layer=2", "model.n_embd=96", "model.n_head=2", "model.hidden=192",
        "moe=none", "trm=none", "model.context_length=256", "data.families=[arithmetic]", "data.samples=4000",
        "data.batch_size=4", "trainer.precision=32-true", "trainer.max_steps=300",
        "trainer.val_check_interval=300"]  # fmt: skip


@pytest.mark.slow
def test_a_tiny_model_learns_to_call_a_tool_and_is_exported_with_a_chat_template(home):
    done = home.run(*TINY)
    assert done.returncode == 0, done.stderr
    assert 'prompt="What is 37 times 48?"' in done.stdout
    run = home.only_run("chat_quick")
    assert json.loads((run / "checkpoints" / "best" / "meta.json").read_text())["chat"] is True
    assert "[What is 37 times 48?]<tool_call>" in (run / "samples.txt").read_text()

    done = home.run("checkpoint=chat_quick", "eval.tool_calls=100", "eval.prompts=0", "eval.max_bytes=2000",
                    "eval.precisions=[]", module="elara.evaluate")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "arithmetic, arguments, phrasings held out" in done.stdout
    (file,) = (home.path / "outputs" / "evaluate").glob("*/evaluation.json")
    rates = json.loads(file.read_text())["results"][0]["tool_calls"]["rates"]
    (arithmetic,) = (one for one in rates if (one["family"], one["phrasing"]) == ("arithmetic", "all"))
    assert arithmetic["format"]["of"] == 20
    assert arithmetic["format"]["share"] >= 0.8
    assert arithmetic["tool"]["share"] >= 0.8

    done = home.run("checkpoint=chat_quick", "prompt='What is 12 plus 30?'", "temperature=0", module="elara.sample")
    assert done.returncode == 0, done.stderr
    call = parse_call(done.stdout.rsplit("\n\n[", 1)[0])
    assert call is not None
    assert call.name == "calculate"

    done = home.run("checkpoint=chat_quick", f"output={home.path / 'chat.gguf'}", "verify=false", module="elara.export")
    assert done.returncode == 0, done.stderr
    field = gguf.GGUFReader(home.path / "chat.gguf").fields["tokenizer.chat_template"]
    assert "<|assistant|>" in bytes(field.parts[field.data[0]]).decode()


@pytest.mark.slow
def test_a_killed_run_with_a_replay_goes_on_bit_for_bit(home):
    options = [given for given in SMALL if given != "data=text"]
    options += ["data=tool_use", "data.samples=300", "data.val_fraction=0.1", "data.replay.share=0.5",
                "data.replay.source=text", f"data.replay.path={home.text}"]  # fmt: skip
    assert home.run("name=replayed", *options).returncode == 0
    killed = home.kill_at(13, "replay-killed", *options)
    done = home.run("resume=auto", "name=replay-killed")
    assert done.returncode == 0, done.stderr
    assert "going on at step 8 in" in done.stdout
    whole = home.only_run("replayed")
    assert home.rows(killed) == home.rows(whole)
    mine, theirs = (load_file(run / "checkpoints" / "step-24" / "model.safetensors") for run in (killed, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
