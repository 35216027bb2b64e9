"""The tokenizer's tables, run by a plain byte-pair encoder: they must give the tokenizer's own ids."""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elara.data import tool_use
from elara.data.tool_use import Call
from elara.errors import ElaraError
from elara.export.vocabulary import CONTROL, NO_MERGE, UNUSED, Vocabulary, byte_letters, chat_template, vocabulary
from elara.tokenizer import Tokenizer, padded_vocab
from elara.tokenizer.base import ByteDecoding
from elara.tokenizer.byte import ByteTokenizer
from elara.tokenizer.char import CharTokenizer
from tests.export.conftest import TEXT

KINDS = ["char", "byte", "gpt2"]
LETTERS = byte_letters()


def byte_pairs(tables: Vocabulary, text: str) -> list[int]:
    """The lowest-ranked pair is merged until none is left (Sennrich et al., arXiv 1508.07909), on the whole text."""
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(tables.merges)}
    symbols = [LETTERS[byte] for byte in text.encode("utf-8")]
    while True:
        found = [(ranks.get((a, b)), i) for i, (a, b) in enumerate(pairwise(symbols))]
        ranked = [(rank, i) for rank, i in found if rank is not None]
        if not ranked:
            return [tables.tokens.index(symbol) for symbol in symbols]
        _, i = min(ranked)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


@given(st.text(alphabet=sorted(set(TEXT)), max_size=30))
def test_characters_merge_to_themselves(text: str) -> None:
    tokenizer = CharTokenizer(TEXT)
    assert byte_pairs(vocabulary(tokenizer, 128), text) == tokenizer.encode(text)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_bytes_stay_bytes(text: str) -> None:
    tokenizer = ByteTokenizer()
    tables = vocabulary(tokenizer, 320)
    assert byte_pairs(tables, text) == tokenizer.encode(text) and tables.merges == [NO_MERGE]


def test_gpt2_s_words_merge_as_tiktoken_merges_them(tokenizers: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizers("gpt2")
    tables = vocabulary(tokenizer, padded_vocab(tokenizer.vocab_size))
    for word in ["hello", " honeycomb", " naïve", "蜂", " 🐝", "12345"]:
        assert byte_pairs(tables, word) == tokenizer.encode(word)
    assert len(tables.merges) == 50000 and tables.tokens[50256] == "<|endoftext|>" and tables.types[50256] == CONTROL


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_the_embedding_has_a_token_of_its_own(tokenizers: Callable[[str], Tokenizer], kind: str) -> None:
    tokenizer = tokenizers(kind)
    assert isinstance(tokenizer, ByteDecoding)
    size = padded_vocab(tokenizer.vocab_size)
    tables = vocabulary(tokenizer, size)
    assert len(tables.tokens) == len(tables.types) == len(set(tables.tokens)) == size
    for token in range(tokenizer.plain_size):
        if token != tokenizer.end_id:
            assert bytes(LETTERS.index(letter) for letter in tables.tokens[token]) == tokenizer.token_bytes(token)
    control = {i: token for i, token in enumerate(tables.tokens) if tables.types[i] == CONTROL}
    end = "<|endoftext|>" if kind == "gpt2" else "<|end|>"
    roles = {i: f"<|{role}|>" for role, i in tokenizer.role_ids.items()}
    assert control == {tokenizer.mask_id: "<|mask|>", tokenizer.end_id: end, **roles}
    unused = [i for i, kind in enumerate(tables.types) if kind == UNUSED]
    assert unused == list(range(tokenizer.vocab_size, size))
    assert all(tables.tokens[i] == f"<|unused_{i}|>" for i in unused)
    assert (tables.end, tables.mask) == (tokenizer.end_id, tokenizer.mask_id)


def test_ascii_characters_need_no_merges() -> None:
    assert vocabulary(CharTokenizer("abc\n "), 64).merges == [NO_MERGE]


def test_a_vocabulary_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ElaraError, match="64 tokens and its tokenizer 262"):
        vocabulary(ByteTokenizer(), 64)


def test_a_hugging_face_tokenizer_is_refused_with_what_does_work() -> None:
    backends = pytest.importorskip("tokenizers")
    from elara.tokenizer.huggingface import HuggingFaceTokenizer

    data = backends.Tokenizer(backends.models.BPE({"a": 0}, [])).to_str().encode()
    with pytest.raises(ElaraError, match=r"huggingface tokenizer cannot .* use format=safetensors"):
        vocabulary(HuggingFaceTokenizer(data), 64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("generate", [True, False])
def test_the_template_writes_what_apply_chat_encodes(
    tokenizers: Callable[[str], Tokenizer], kind: str, generate: bool
) -> None:
    tokenizer = tokenizers(kind)
    tables = vocabulary(tokenizer, padded_vocab(tokenizer.vocab_size))
    chat = [{"role": role, "content": f"  {text}\n"} for role, text in
            (("system", "The bee"), ("user", "naïve?"), ("assistant", ""), ("tool", "3"))]  # fmt: skip
    written = jinja2.Environment().from_string(chat_template(tables)).render(
        messages=chat, add_generation_prompt=generate
    )  # fmt: skip
    assert ids_of(written, tables, tokenizer) == tokenizer.apply_chat(chat, generate=generate)[0]


def ids_of(written: str, tables: Vocabulary, tokenizer: Tokenizer) -> list[int]:
    """Control tokens by their names, all between them as plain text."""
    ids: list[int] = []
    while written:
        control = next(
            (i for i, t in enumerate(tables.tokens) if tables.types[i] == CONTROL and written.startswith(t)), None
        )
        if control is not None:
            ids.append(control)
            written = written[len(tables.tokens[control]) :]
        else:
            plain, bar, rest = written.partition("<|")
            ids += tokenizer.encode(plain)
            written = bar + rest
    return ids


@pytest.fixture(scope="module")
def by_transformers() -> Callable[..., str]:
    """The template of a byte vocabulary, rendered by transformers."""
    transformers = pytest.importorskip("transformers")
    backends = pytest.importorskip("tokenizers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backends.Tokenizer(backends.models.BPE()))
    template = chat_template(vocabulary(ByteTokenizer(), 320))

    def render(messages: Any, **more: Any) -> str:
        found: str = fast.apply_chat_template(messages, chat_template=template, tokenize=False, **more)
        return found

    return render


def asked(*calls: tuple[str, Any], content: str | None = None) -> dict[str, Any]:
    """An assistant's message as OpenAI's API has it."""
    listed = [{"id": "x", "type": "function", "function": {"name": name, "arguments": given}} for name, given in calls]
    return {"role": "assistant", "content": content, "tool_calls": listed}


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6,
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(words, st.dictionaries(words, values, max_size=3))
def test_calls_are_written_as_they_are_taught(
    by_transformers: Callable[..., str], name: str, arguments: dict[str, Any]
) -> None:
    taught = f"<|assistant|>{Call(name, arguments).text()}<|end|>"
    plain = json.dumps(arguments, ensure_ascii=False)
    tight = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
    wide = f"\n{json.dumps(arguments, ensure_ascii=False, indent=2)} "
    for form in (arguments, plain, tight, wide):
        assert by_transformers([asked((name, form))]) == taught


def test_a_talk_with_tools_is_written_as_it_is_taught(by_transformers: Callable[..., str]) -> None:
    tokenizer = ByteTokenizer()
    question = tool_use.questions(1, 0, ["units"])[0]
    assert question.tool is not None
    taught = tool_use.conversation(question)
    names = taught[0]["content"].removeprefix("Tools: ").split(", ")
    assert names == list(tool_use.TOOLS)
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in names]
    chat = [taught[1], asked((question.tool, question.arguments)), {**taught[3], "tool_call_id": "x"}, *taught[4:]]
    written = by_transformers(chat, tools=tools, add_generation_prompt=True)
    assert ids_of(written, vocabulary(tokenizer, 320), tokenizer) == tokenizer.apply_chat(taught, generate=True)[0]


def test_several_calls_and_words_have_a_line_each(by_transformers: Callable[..., str]) -> None:
    one, other = Call("a", {}).text(), Call("b", {"x": 1}).text()
    bare = {"role": "assistant", "tool_calls": [{"name": "a", "arguments": {}}]}
    assert by_transformers([bare]) == f"<|assistant|>{one}<|end|>"
    nothing: list[Any] = ["", None, {}, "{}", " "]
    for empty in nothing:
        given = asked(("a", empty), ("b", '{"x":1}'), content="Wait.")
        assert by_transformers([given]) == f"<|assistant|>Wait.\n{one}\n{other}<|end|>"
