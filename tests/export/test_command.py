"""`python -m elara.export` from end to end, without llama.cpp."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from elara.data.tool_use import Call as ToolCall
from elara.export.__main__ import main
from elara.export.config import FORMATS, FormatConfig, QuantizeConfig
from elara.export.quantize import FILE_TYPES
from elara.export.verify import Agreement
from elara.tokenizer.byte import ByteTokenizer
from tests.conftest import PYTHON, ROOT
from tests.export.conftest import MAKE, config

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _no_library_nearby(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)


@pytest.fixture
def call(in_process: Any, make: MAKE, tmp_path: Path) -> Call:
    """Runs the command on a random model's checkpoint, without reading it back unless asked to."""
    make(config(), ByteTokenizer())
    where = [f"checkpoint={tmp_path / 'checkpoint'}", "verify=false"]
    return lambda *arguments: in_process(main, tmp_path, *where, *arguments)


def test_the_default_is_an_f16_file_for_llama_cpp(call: Call, tmp_path: Path) -> None:
    code, out, err = call()
    assert code == 0, err
    assert err.splitlines()[0].startswith("reading ")
    (file,) = (tmp_path / "outputs" / "export" / "checkpoint").glob("*/*.gguf")
    assert file.name == "checkpoint-F16.gguf"
    assert f"written: {file.relative_to(tmp_path)}" in out and "next:    llama-cli -m outputs/export" in out
    assert not list(tmp_path.glob("error.log"))


@pytest.mark.parametrize(("output", "file"), [("a/b.gguf", "a/b.gguf"), ("a", "a/Bee-compact-Q8_0.gguf")])
def test_output_names_the_file_or_its_folder(call: Call, tmp_path: Path, output: str, file: str) -> None:
    code, out, err = call("format=compact", "quantize=Q8_0", "name=Bee", f"output={output}")
    assert code == 0, err
    assert (tmp_path / file).is_file() and file in out and f"{PYTHON} -m elara.elara" in out


def test_ollama_gets_a_modelfile(call: Call, tmp_path: Path) -> None:
    code, out, err = call("format=ollama", "output=o", "chat=true", "license=cc0-1.0", "format.temperature=0.5")
    assert code == 0, err
    text = (tmp_path / "o" / "Modelfile").read_text("utf-8").splitlines()
    assert text == [
        "FROM ./checkpoint-F16.gguf",
        text[1],
        "PARAMETER temperature 0.5",
        "PARAMETER top_k 0",
        "PARAMETER top_p 1",
        "PARAMETER min_p 0",
        "PARAMETER repeat_penalty 1",
        "PARAMETER presence_penalty 0",
        "PARAMETER frequency_penalty 0",
        "PARAMETER num_ctx 128",
        'PARAMETER stop "<|end|>"',
        'LICENSE """cc0-1.0"""',
    ]
    assert text[1].startswith('TEMPLATE """{{- if .Tools }}<|system|>Tools: ') and text[1].endswith('<|assistant|>"""')
    assert "ollama create checkpoint -f o/Modelfile" in out and "ollama run checkpoint" in out


RENDER = """
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

func main() {
	var given struct {
		Template string
		Data     map[string]any
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		panic(err)
	}
	write := func(value any) string { text, _ := json.Marshal(value); return string(text) }
	made := template.Must(template.New("").Funcs(template.FuncMap{"json": write}).Parse(given.Template))
	if err := made.Execute(os.Stdout, given.Data); err != nil {
		panic(err)
	}
}
"""


@pytest.mark.slow
def test_go_renders_ollama_s_template_as_the_conversation_is_taught(call: Call, tmp_path: Path) -> None:
    """By Go's own package for templates, with the function `json` that Ollama adds, and arguments sorted by name."""
    if (go := shutil.which("go")) is None:
        pytest.skip("Go is not here")
    assert call("format=ollama", "output=o", "chat=true")[0] == 0
    (written,) = re.findall('TEMPLATE """(.*?)"""', (tmp_path / "o" / "Modelfile").read_text("utf-8"), re.DOTALL)
    (tmp_path / "render.go").write_text(RENDER)

    def rendered(**data: Any) -> str:
        given = json.dumps({"Template": written, "Data": data})
        done = subprocess.run([go, "run", "render.go"], cwd=tmp_path, input=given, capture_output=True, text=True,
                              timeout=300, check=True)  # fmt: skip
        return done.stdout

    arguments = {"from": 'naïve "km"', "to": [1, 2.5], "value": 3}
    calls = [{"Function": {"Name": "convert", "Arguments": arguments}}, {"Function": {"Name": "now", "Arguments": {}}}]
    messages = [{"Role": "system", "Content": "Be\nkind."}, {"Role": "user", "Content": " hi "},
                {"Role": "assistant", "Content": "", "ToolCalls": calls}, {"Role": "tool", "Content": "{}"},
                {"Role": "assistant", "Content": "Wait.", "ToolCalls": calls[1:]}]  # fmt: skip
    tools = [{"Function": {"Name": "convert"}}, {"Function": {"Name": "now"}}]
    one, other = ToolCall("convert", arguments).text(), ToolCall("now", {}).text()
    assert one.replace("[1, 2.5]", "[1,2.5]") in rendered(Messages=messages), "only nested values are not spaced"
    taught = "".join(f"<|{role}|>{text}<|end|>" for role, text in (
        ("system", "Tools: convert, now"), ("system", "Be\nkind."), ("user", " hi "),
        ("assistant", f"{one}\n{other}".replace("[1, 2.5]", "[1,2.5]")), ("tool", "{}"),
        ("assistant", f"Wait.\n{other}"),
    ))  # fmt: skip
    assert rendered(Messages=messages, Tools=tools) == taught + "<|assistant|>"


def test_a_model_that_does_not_chat_gets_the_plain_prompt(call: Call, tmp_path: Path) -> None:
    assert call("format=ollama", "output=o")[0] == 0
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "o" / "Modelfile").read_text("utf-8")


def test_safetensors_is_a_folder(call: Call, tmp_path: Path) -> None:
    code, out, err = call("format=safetensors", "output=s")
    assert code == 0, err
    assert (tmp_path / "s" / "model.safetensors").is_file() and "checkpoint=s" in out
    assert json.loads((tmp_path / "s" / "meta.json").read_text("utf-8"))["license"] is None
    assert "\nlicense:" not in (tmp_path / "s" / "README.md").read_text("utf-8").lower().partition("# ")[0]


@pytest.mark.parametrize("group", ["format", "quantize"])
def test_every_option_is_one_that_the_program_knows(group: str) -> None:
    options = {file.stem: yaml.safe_load(file.read_text("utf-8")) for file in (ROOT / "conf" / group).glob("*.yaml")}
    assert set(options) == set(FORMATS if group == "format" else FILE_TYPES)
    schema, key = (FormatConfig, "kind") if group == "format" else (QuantizeConfig, "type")
    for name, values in options.items():
        assert values[key] == name and asdict(schema(**values)) | values == asdict(schema(**values))


@pytest.mark.thorough(4, "slow")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["quantize=Q4_K_M"],
            "quantize=Q4_K_M needs llama.cpp's own quantizer: get llama.cpp's library with `npm inst",
        ),
        (["quantize=Q4_K"], "there is no quantize=Q4_K"),
        (["quantize=Q8_0", "quantize.library=nowhere"], "quantize.library=nowhere does not exist"),
        (["quantize=Q8_0", "quantize.library=checkpoint"], "quantize.library=checkpoint holds no libllama"),
        (["quantize=Q8_0", "quantize.library=checkpoint/config.json"], "config.json cannot be loaded"),
        (["format=safetensors", "quantize=Q8_0"], "format=safetensors holds float32: leave quantize=Q8_0 out"),
        (["format=safetensors", "depth=3"], "format=safetensors keeps the trained recursion depth"),
        (["format=safetensors", "output=a.gguf"], "names a file, and format=safetensors is a folder"),
        (["format.kind=gguff"], "format.kind=gguff must be one of"),
        (["checkpont=x"], "unknown key 'checkpont' (did you mean 'checkpoint'?)"),
        (["checkpoint=nobody"], "there is no checkpoint at 'nobody'"),
        (["format=ollama", "format.num_ctx=0"], "must not be negative"),
    ],
)
def test_mistakes_are_one_line(call: Call, arguments: list[str], message: str) -> None:
    code, out, err = call(*arguments)
    err = re.sub(r"^reading .*\n", "", err)
    assert code == 1 and message in err and err.count("\n") == 1 and err.startswith("error: "), err


def test_a_file_that_does_not_agree_is_kept_and_the_command_fails(in_process: Any, make: MAKE, tmp_path: Path) -> None:
    make(config(model__init_std=0.3), ByteTokenizer())  # so wild that four bits change what it says
    code, out, err = in_process(
        main, tmp_path, f"checkpoint={tmp_path / 'checkpoint'}", "output=a.gguf", "quantize=Q4_0", "verify_tokens=256"
    )
    assert code == 1 and (tmp_path / "a.gguf").is_file()
    assert "a.gguf does not agree with the checkpoint, and was kept: elara.py: the " in err and "Q4_0 may" in err, err
    assert err.count("\n") == 2 and "differs" in out


@pytest.mark.parametrize(
    ("difference", "loss_difference", "divergence", "kind", "fine"),
    [
        (1e-5, 0.0, 0.0, "F32", True),
        (2e-3, 0.0, 0.0, "F32", False),
        (2e-3, 0.0, 0.0, "F16", True),
        (0.0, 0.01, 0.0, "F16", False),
        (0.0, 0.0, 0.01, "F16", False),
        (0.0, -0.3, 0.0, "Q4_0", False),
        (9.0, 0.01, 0.01, "Q4_K_M", True),
        (float("nan"), float("nan"), float("nan"), "Q4_0", False),
        (0.0, 0.0, float("nan"), "Q4_0", False),
        (float("nan"), 0.0, 0.0, "F32", False),
    ],
)
def test_what_counts_as_agreement(
    difference: float, loss_difference: float, divergence: float, kind: str, fine: bool
) -> None:
    found = Agreement("x", difference, 1.0, 1.0, loss_difference, divergence, 32, 32)
    assert (found.problem(kind) is None) == fine
