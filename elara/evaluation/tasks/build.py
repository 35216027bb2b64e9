"""Make the items of the local tasks anew: `python -m elara.evaluation.tasks.build`. The same every time.

Their text is from the four held-out plays only, which no training on Shakespeare here ever sees.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from elara import runs
from elara.data.sources.shakespeare import Shakespeare

CLOZES, PASSAGES, COPIES = 400, 40, 200
CONTEXT, PASSAGE = 240, 2000  # characters
CHOICES = 4


def build(plays: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Items by task, from the texts of the held-out plays."""
    draw = random.Random(0)
    return {"shakespeare_cloze": clozes(plays, draw), "shakespeare_rolling": passages(plays), "copying": copies(draw)}


def clozes(plays: list[str], draw: random.Random) -> list[dict[str, Any]]:
    """Which line comes next? The wrong ones are lines of about the same length from the other plays."""
    line = re.compile(r"(?<=[a-z,;]\n)[^\n:]{30,50}$", re.MULTILINE)  # the sentence before it is not over
    places = [(play, match) for play, text in enumerate(plays) for match in line.finditer(text, CONTEXT)]
    items = []
    for play, match in sorted(draw.sample(places, CLOZES), key=lambda place: (place[0], place[1].start())):
        others = [m[0] for other, m in places if other != play and abs(len(m[0]) - len(match[0])) <= 2]
        choices = [match[0], *draw.sample(others, CHOICES - 1)]
        draw.shuffle(choices)
        context = plays[play][match.start() - CONTEXT : match.start()].partition("\n")[2]  # from a whole line on
        items.append({"context": context, "choices": choices, "answer": choices.index(match[0])})
    return items


def passages(plays: list[str]) -> list[dict[str, Any]]:
    """Stretches of whole lines, spread evenly."""
    items = list[dict[str, Any]]()
    for text in plays:
        for i in range(PASSAGES // len(plays)):
            start = text.index("\n\n", i * (len(text) - 2 * PASSAGE) * len(plays) // PASSAGES) + 2
            stop = text.index("\n", start + PASSAGE)
            items.append({"text": text[start:stop]})
    return items


def copies(draw: random.Random) -> list[dict[str, Any]]:
    """Say a line of three words once more."""
    words = "crown rose night sword heart ship king storm gold wine moon child grave song bell fire horse tower sea dog"
    seen: dict[str, None] = {}
    while len(seen) < COPIES:
        seen.setdefault(" ".join(draw.sample(words.split(), 3)))
    return [{"prompt": f"{line}\n" * 3, "answer": line} for line in seen]


def write(items: Mapping[str, Iterable[object]], folder: Path) -> None:
    """One `<task>.jsonl` per task."""
    for task, lines in items.items():
        text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in lines)
        (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")


def held_out_plays() -> list[str]:
    """The texts of the held-out plays."""
    return ["".join(play) for play in Shakespeare(runs.project_root() / "data" / "archives").documents("val")]


if __name__ == "__main__":
    write(build(held_out_plays()), Path(__file__).parent)
