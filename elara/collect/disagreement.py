"""How far answers to one question lie apart: 1 - chrF of two of them (character n-gram F-score, Popovic 2015)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import combinations
from statistics import fmean
from typing import Any

from elara.collect.store import Store

ORDER = 6  # longest n-gram, as in the paper


def disagreement(one: str, other: str) -> float:
    """0 = the same but for spaces, 1 = no character in common.

    Precision and recall are means over n = 1 to 6 of the shared n-grams, without white space. With beta = 1, where the
    paper weighs recall by 3, neither answer is the reference: the measure is symmetric.
    """
    texts = "".join(one.split()), "".join(other.split())
    if texts[0] == texts[1]:
        return 0.0
    precision, recall = [], []
    for n in range(1, ORDER + 1):
        grams = [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in texts]
        if not grams[0] and not grams[1]:
            break
        shared = (grams[0] & grams[1]).total()
        precision.append(shared / max(1, grams[0].total()))
        recall.append(shared / max(1, grams[1].total()))
    p, r = fmean(precision), fmean(recall)
    return 1 - 2 * p * r / (p + r) if p + r else 1.0


def disagreements(store: Store) -> Iterator[dict[str, Any]]:
    """A row for each prompt that several teachers answered; answers are read again, only their places are remembered.

    A teacher with several answers (other sampling) counts by the mean over them.
    """
    places: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    names: dict[str, str] = {}
    for offset, sample in store.samples():
        own = sample.provenance["teacher_hash"]
        names[own] = sample.provenance["teacher"]
        places[sample.provenance["prompt"]][own].append(offset)
    same = Counter(names.values())
    names = {own: name if same[name] == 1 else f"{name} ({own[:6]})" for own, name in names.items()}
    for prompt, by_teacher in places.items():
        if len(by_teacher) < 2:
            continue
        texts = {own: [_answer(store, offset) for offset in offsets] for own, offsets in by_teacher.items()}
        pairs: list[dict[str, Any]] = []
        for a, b in combinations(sorted(texts, key=lambda own: names[own]), 2):
            mean = fmean(disagreement(x, y) for x in texts[a] for y in texts[b])
            pairs.append({"teachers": [names[a], names[b]], "disagreement": round(mean, 4)})
        yield {"prompt": prompt, "disagreement": round(fmean(p["disagreement"] for p in pairs), 4), "pairs": pairs}


def _answer(store: Store, offset: int) -> str:
    messages = store.at(offset).messages
    assert messages
    return messages[-1]["content"]
