"""A tokenizer as the tables of a GGUF file: byte-pair encoding in GPT-2's byte alphabet, which llama.cpp runs.

Characters and bytes are byte-pair vocabularies as well: a byte is its letter, a character of several bytes is what its
bytes merge to, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from elara.data.tool_use import NAMED, Call
from elara.errors import ElaraError
from elara.tokenizer import ROLES, Tokenizer
from elara.tokenizer.base import ByteDecoding
from elara.tokenizer.gpt2 import MERGES_FILE

NORMAL, CONTROL, UNUSED = 1, 3, 5  # llama.cpp's token types
# Jinja reads no JSON: the text goes out sign by sign, with blanks between its strings as `json.dumps` writes them.
SPACED = (
    "{%- macro spaced(text) -%}"
    "{%- set at = namespace(quoted=false, escaped=false) -%}"
    "{%- for sign in (text.strip() or '{}') | list -%}"
    "{%- if at.quoted or sign not in ' \\n\\r\\t' -%}{{- sign -}}{%- endif -%}"
    "{%- if at.escaped -%}{%- set at.escaped = false -%}"
    "{%- elif at.quoted and sign == '\\\\' -%}{%- set at.escaped = true -%}"
    "{%- elif sign == '\"' -%}{%- set at.quoted = not at.quoted -%}"
    "{%- elif not at.quoted and sign in ',:' -%}{{- ' ' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endmacro -%}"
)
NO_MERGE = "ÿ ÿ"  # byte 0xff occurs in no UTF-8; llama.cpp wants a list that is not empty


@dataclass(frozen=True)
class Vocabulary:
    """tokens, types: one per row of the embedding. merges: "left right", the likeliest first. end, mask: their ids."""

    kind: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    end: int
    mask: int


def byte_letters() -> list[str]:
    """The letter of each byte in GPT-2's alphabet: printable ones stand for themselves, others follow from U+0100."""
    letters, extra = [], 0
    for byte in range(256):
        if chr(byte).isprintable() and byte != 0x20:
            letters.append(chr(byte))
        else:
            letters.append(chr(256 + extra))
            extra += 1
    return letters


def vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The tables of a tokenizer, padded to `size` tokens.

    Raises ElaraError for a Hugging Face tokenizer, whose rules have no place in them, and when the model has fewer
    rows than the tokenizer has ids.
    """
    if not isinstance(tokenizer, ByteDecoding):
        raise ElaraError(
            f"a {tokenizer.kind} tokenizer cannot be written into a GGUF file: use format=safetensors, or train with "
            "tokenizer=char, byte or gpt2"
        )
    if tokenizer.vocab_size > size:
        raise ElaraError(f"the model has {size} tokens and its tokenizer {tokenizer.vocab_size}: they do not fit")
    letters = byte_letters()
    tokens = ["".join(letters[byte] for byte in tokenizer.token_bytes(i)) for i in range(tokenizer.plain_size)]
    types = [NORMAL] * len(tokens)
    for i in range(tokenizer.plain_size, size):
        reserved = tokenizer.special_ids.get(i)
        tokens.append(f"<|unused_{i}|>" if reserved is None else f"<|{reserved}|>")
        types.append(UNUSED if reserved is None else CONTROL)
    if tokenizer.end_id < tokenizer.plain_size:
        tokens[tokenizer.end_id], types[tokenizer.end_id] = "<|endoftext|>", CONTROL
    return Vocabulary(
        kind=tokenizer.kind,
        tokens=tokens,
        types=types,
        merges=_merges(tokenizer, tokens[: tokenizer.plain_size]) or [NO_MERGE],
        end=tokenizer.end_id,
        mask=tokenizer.mask_id,
    )


def _merges(tokenizer: Tokenizer, plain: list[str]) -> list[str]:
    if tokenizer.kind == "gpt2":
        lines = tokenizer._files()[MERGES_FILE].decode("utf-8").split("\n")[1:]
        return [line for line in lines if line]
    chains = (f"{token[:end]} {token[end]}" for token in plain for end in range(1, len(token)))
    return list(dict.fromkeys(chains))


def chat_template(vocabulary: Vocabulary) -> str:
    """Jinja for `Tokenizer.apply_chat`: role, text, end, and so on; calls, results and names of tools as it is taught.

    Calls are OpenAI's `tool_calls`, a line each after the message's words; their arguments are an object or JSON text,
    whose escapes stay as they are. `tools` become a system message before all others.
    """
    end = vocabulary.tokens[vocabulary.end]
    roles = "[" + ", ".join(f"'{role}'" for role in ROLES) + "]"
    opening, named = Call("NAME", {}).text().split('"NAME"')
    between, closing = named.split("{}")
    return (
        f"{SPACED}"
        "{%- if tools -%}"
        f"{{{{- '<|system|>{NAMED}' -}}}}"
        "{%- for tool in tools -%}"
        "{{- '' if loop.first else ', ' -}}{{- tool.function.name if tool.function else tool.name -}}"
        "{%- endfor -%}"
        f"{{{{- '{end}' -}}}}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        f"{{%- if message['role'] not in {roles} -%}}"
        "{{- raise_exception('unknown role ' + message['role']) -}}"
        "{%- endif -%}"
        "{{- '<|' + message['role'] + '|>' -}}"
        "{%- if message['content'] -%}{{- message['content'] -}}{%- endif -%}"
        "{%- if message['tool_calls'] -%}"
        "{%- for tool_call in message['tool_calls'] -%}"
        "{%- set call = tool_call.function if tool_call.function else tool_call -%}"
        "{{- '\\n' if message['content'] or not loop.first else '' -}}"
        f"{{{{- '{opening}' -}}}}{{{{- call.name | tojson -}}}}{{{{- '{between}' -}}}}"
        "{%- if call.arguments is string -%}{{- spaced(call.arguments) -}}"
        "{%- elif call.arguments -%}{{- call.arguments | tojson -}}"
        "{%- else -%}{{- '{}' -}}{%- endif -%}"
        f"{{{{- '{closing}' -}}}}"
        "{%- endfor -%}"
        "{%- endif -%}"
        f"{{{{- '{end}' -}}}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
    )
