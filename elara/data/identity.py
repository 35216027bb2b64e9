"""Which text a run reads, and in which order: its checkpoints keep it, so that no resumed run reads another unseen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elara.data.module import ElaraData
from elara.data.preparation import Prepared
from elara.errors import ElaraError

PARTS = {"train": "training", "val": "held-out"}  # splits, and what they are called


def identity(data: ElaraData) -> list[dict[str, Any]]:
    """Of each corpus its text, by hashes of the prepared tokens, and the settings that order the windows; plain values.

    Where the text lies is only for messages: a file may move.
    """
    return [
        {"place": _place(corpus), **{split: _part(corpus, split) for split in PARTS}, "order": _order(data, number)}
        for number, corpus in enumerate(data.corpora)
    ]


def check_identity(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> None:
    """Raise ElaraError, naming what changed, when a run that read `before` would read something else `now`."""
    if len(before) != len(now):
        raise _changed(f"this run reads {_corpora(len(before))}, not {_corpora(len(now))}")
    for old, new in zip(before, now, strict=True):
        for split, name in PARTS.items():
            if old[split]["sha256"] == new[split]["sha256"]:
                continue
            moved = "" if old["place"] == new["place"] else f", which was {old['place']} when it was saved"
            tokens = f"{old[split]['tokens']:,} tokens then, {new[split]['tokens']:,} now"
            raise _changed(f"the {name} text of this run has changed: {new['place']}{moved} ({tokens})")
        for key, value in old["order"].items():
            if value != new["order"].get(key, value):
                raise _changed(
                    f"{key} orders the text that this run reads, and was {value} instead of {new['order'][key]}"
                )


def _changed(what: str) -> ElaraError:
    return ElaraError(
        f"{what}: put it back as it was, begin a new run with init_from, or go on like this with data.changed=accept"
    )


def _corpora(count: int) -> str:
    return "one corpus" if count == 1 else "a corpus and data.replay"


def _place(corpus: Prepared) -> str:
    """Where a corpus comes from, in words of the configuration."""
    found = corpus.manifest.get("path") or corpus.manifest.get("dataset") or corpus.manifest.get("source")
    return str(found)


def _part(corpus: Prepared, split: str) -> dict[str, Any]:
    entry = corpus.manifest[split]
    return {"sha256": entry.get("content", entry["sha256"]), "tokens": entry["tokens"]}


def _order(data: ElaraData, number: int) -> dict[str, Any]:
    cut, prefix = (data.data, "data") if number == 0 else (data.data.replay, "data.replay")
    return {
        "seed": data.seed,
        "data.seq": data.seq,
        f"{prefix}.cross_documents": cut.cross_documents,
        f"{prefix}.pack": cut.pack,
    }
