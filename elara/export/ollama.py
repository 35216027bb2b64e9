"""A GGUF file's Modelfile for Ollama, and the commands that go with it."""

from __future__ import annotations

import json
from pathlib import Path

from elara.data.tool_use import NAMED, Call
from elara.errors import ElaraError
from elara.export.source import Source
from elara.export.vocabulary import Vocabulary
from elara.runs import write_whole

PLAIN = "{{ .Prompt }}"
# The distribution as it is, which no default of any version of Ollama cuts or bends (top_k 40, top_p 0.9, ...).
SAMPLING = {"top_k": 0, "top_p": 1, "min_p": 0, "repeat_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}


def write_modelfile(path: Path, source: Source, tables: Vocabulary, *, temperature: float, num_ctx: int | None) -> None:
    """Write the Modelfile beside the GGUF file `path`. num_ctx: tokens; None = the trained context.

    Raises ElaraError for values that Ollama would not take.
    """
    context = source.config.model.context_length if num_ctx is None else num_ctx
    if temperature < 0 or context < 1:
        raise ElaraError(f"format.temperature={temperature} and format.num_ctx={context} must not be negative")
    end = tables.tokens[tables.end]
    lines = [
        f"FROM ./{path.name}",
        f'TEMPLATE """{_chat(end) if source.chat else PLAIN}"""',
        f"PARAMETER temperature {temperature:g}",
        *(f"PARAMETER {name} {value}" for name, value in SAMPLING.items()),
        f"PARAMETER num_ctx {context}",
        f"PARAMETER stop {json.dumps(end)}",
    ]
    if source.about.license:
        lines.append(f'LICENSE """{source.about.license}"""')
    write_whole(path.with_name("Modelfile"), "\n".join(lines) + "\n")


def _chat(end: str) -> str:
    """Go's template for `Tokenizer.apply_chat` and `vocabulary.chat_template`.

    Ollama itself sorts a call's arguments by their names and escapes < > & in them; it looks for `.Tools`, `.ToolCalls`
    and the words that begin a call in here, to know what the model can do and to read its calls.
    """
    opening, named = Call("NAME", {}).text().split('"NAME"')
    between, closing = named.split("{}")
    return (
        f"{{{{- if .Tools }}}}<|system|>{NAMED}"
        "{{ range $i, $tool := .Tools }}{{ if $i }}, {{ end }}{{ $tool.Function.Name }}{{ end }}"
        f"{end}{{{{ end }}}}"
        "{{- range $message := .Messages }}<|{{ .Role }}|>{{ .Content }}"
        '{{- range $i, $call := .ToolCalls }}{{ if or $i $message.Content }}{{ "\\n" }}{{ end }}'
        f'{opening}{{{{ json $call.Function.Name }}}}{between}{{{{ "{{" }}}}'
        '{{- $comma := "" }}{{ range $name, $value := $call.Function.Arguments }}'
        '{{ $comma }}{{ json $name }}: {{ json $value }}{{ $comma = ", " }}{{ end }}'
        f'{{{{ "}}" }}}}{closing}{{{{ end }}}}{end}{{{{ end }}}}<|assistant|>'
    )


def commands(path: Path, name: str) -> list[str]:
    """What the user runs next. path: the GGUF file, as it is to be shown."""
    return [f"ollama create {name} -f {path.with_name('Modelfile')}", f"ollama run {name}"]
