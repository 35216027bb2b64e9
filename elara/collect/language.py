"""Which language a text seems to be in: its script, and for Latin letters the commonest words. No model.

Short texts, texts of names and numbers, and languages that are not listed are beyond it; then it says nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from elara.errors import ElaraError

# Script by the first word of a letter's name in Unicode; Japanese is told from Chinese by its kana.
SCRIPTS = {
    "LATIN": "latin", "CYRILLIC": "cyrillic", "GREEK": "greek", "ARABIC": "arabic", "HEBREW": "hebrew",
    "DEVANAGARI": "devanagari", "THAI": "thai", "HANGUL": "hangul", "CJK": "han", "HIRAGANA": "kana",
    "KATAKANA": "kana",
}  # fmt: skip
STOP_WORDS = {
    "en": "the and of to is that it with as for was this are be not have you which from by they but what his",
    "de": "der die und das ist nicht ein eine zu den mit sich auf für dem von im auch wie wird sind oder er sie",
    "fr": "le les et des est une du que qui dans pas pour sur avec ce il elle au plus sont par nous vous ne",
    "es": "el los y del las es una que por con para se su como más pero lo fue son este ha al sus muy",
    "it": "il di che è e la una per con non sono del della gli le si dei nel anche come questo più ma lo",
    "pt": "o os e do da em uma que não com para por se como mais são ao dos das foi ele ela na no",
    "nl": "de het een en van is dat niet te zijn op voor met die aan er maar om ook als bij wordt naar hij",
}  # fmt: skip
WORDS = {language: frozenset(words.split()) for language, words in STOP_WORDS.items()}
LETTERS = 4000  # that are looked at
HITS, SHARE = 3, 0.08  # stop words below which a language is not named; its own texts have three times this share


def check_language(wanted: str | None) -> None:
    """Raise ElaraError for a language or script that is not known here."""
    known = [*WORDS, *dict.fromkeys(SCRIPTS.values())]
    if wanted is not None and wanted not in known:
        raise ElaraError(f"filters.language={wanted} is not known here: use one of {', '.join(known)}")


def script_of(text: str) -> str | None:
    """The script of most letters; None when there are no letters of a known one."""
    names = (unicodedata.name(c, "").partition(" ")[0] for c in text[:LETTERS] if c.isalpha())
    found = Counter(SCRIPTS[name] for name in names if name in SCRIPTS)
    if found["kana"] and found["kana"] * 10 > found["han"]:
        return "kana"
    return found.most_common(1)[0][0] if found else None


def language_of(text: str) -> str | None:
    """The language of a text in Latin letters; None when too few common words tell, or two languages as many."""
    words = Counter(re.findall(r"[^\W\d_]+", text[:LETTERS].lower()))
    hits = sorted(((sum(words[w] for w in own), language) for language, own in WORDS.items()), reverse=True)
    (most, language), (second, _) = hits[:2]
    return language if most >= max(HITS, SHARE * words.total()) and most > second else None


def is_other(text: str, wanted: str) -> bool:
    """Whether a text is seen to be in another language or script than the wanted one; False when it cannot be told."""
    script = script_of(text)
    if wanted not in WORDS:
        return script is not None and script != wanted
    language = language_of(text) if script == "latin" else None
    return (script is not None and script != "latin") or (language is not None and language != wanted)
