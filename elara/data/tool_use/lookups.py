"""Records by key in small tables that only the tool sees: the tool `look_up`."""

from __future__ import annotations

from typing import Any

from elara.data.tool_use.base import Question, Templates, Wanted, World, spoken
from elara.data.tool_use.draws import Draws
from elara.errors import ElaraError

# table -> (what it holds in words, whether its keys are people)
TABLES = {
    "phones": ("phone number", True),
    "rooms": ("room", True),
    "ages": ("age", True),
    "prices": ("price", False),
    "stock": ("stock", False),
    "weights": ("weight", False),
}
TEMPLATES = Templates(
    ["What is the {what} of {key}?", "Find the {what} of {key}.", "Look up the {what} of {key}.",
     "Tell me the {what} of {key}.", "I need the {what} of {key}.", "Give me the {what} of {key}.",
     "Can you look up the {what} of {key}?", "What's the {what} for {key}?", "{key}: what is the {what}?",
     "Please find the {what} for {key}.", "Which {what} does {key} have?", "Do you know the {what} of {key}?",
     "Show me the {what} for {key}.", "Check the {what} of {key}, please.", "{what} of {key}?",
     "What {what} is listed for {key}?", "Search for {key} and tell me the {what}.", "The {what} of {key}, please.",
     "I am looking for the {what} of {key}.", "What does the table say about the {what} of {key}?",
     "Get me the {what} for {key}.", "Hi, what is the {what} of {key}?", "Could you check the {what} of {key}?",
     "Is there a {what} for {key}?"],
    ["Please look up the {what} for {key}.", "Could you tell me the {what} of {key}?", "For {key}, what is the {what}?",
     "Can you find the {what} of {key}?", "I want to know the {what} of {key}."],
)  # fmt: skip
MISSING = 8  # one of so many keys is not in the table
CONSONANTS, VOWELS, ENDS = "bdfghjklmnprstvwz", "aeiou", ["", "", "n", "r", "s", "l", "k", "x"]


def look_up(arguments: dict[str, Any], world: World) -> Any:
    """The tool: the record of `key` in `table`."""
    table, key = arguments.get("table"), arguments.get("key")
    if not isinstance(table, str) or table not in world:
        raise ElaraError(f"there is no table {table}")
    if not isinstance(key, str) or key not in world[table]:
        raise ElaraError(f"{table} has no {key}")
    return world[table][key]


def _name(draws: Draws) -> str:
    syllables = [draws.choice(CONSONANTS) + draws.choice(VOWELS) for _ in range(draws.between(1, 2))]
    return ("".join(syllables) + draws.choice(CONSONANTS) + draws.choice(VOWELS) + draws.choice(ENDS)).capitalize()


def _key(draws: Draws, people: bool) -> str:
    if people:
        return f"{_name(draws)} {_name(draws)}"
    letters = "".join(draws.choice("ABCDEFGHKLMNPQRSTUVWXYZ") for _ in range(draws.between(1, 3)))
    return f"{letters}-{draws.between(10, 10 ** draws.between(2, 4) - 1)}"


def _record(draws: Draws, table: str) -> Any:
    if table == "phones":
        return f"{draws.between(200, 999)}-{draws.between(1000, 9999)}"
    if table == "prices":
        return round(draws.between(100, 99999) / 100, 2)
    return draws.between(*{"rooms": (1, 999), "ages": (18, 99), "stock": (0, 5000), "weights": (1, 2000)}[table])


def make(draws: Draws, wanted: Wanted) -> Question:
    """A question about one record; the table has a few more, and one time in eight it lacks this one."""
    table = draws.choice(list(TABLES))
    what, people = TABLES[table]
    key = _wanted_key(draws, wanted, people)
    others = [_key(draws, people) for _ in range(draws.between(2, 5))]
    world = {table: {name: _record(draws, table) for name in draws.shuffled([key, *others])}}
    if draws.chance(MISSING):
        del world[table][key]
    template = TEMPLATES.draw(draws, wanted.held_out_template)
    text = template.format(what=what, key=key)
    return Question(
        "lookups", template, wanted.held_out_template, spoken(draws, text, key),
        f"The {what} of {key} is {{}}.", "look_up", {"table": table, "key": key}, tuple(key.split()), world,
        f"I found no {what} of {key}.",
    )  # fmt: skip


def _wanted_key(draws: Draws, wanted: Wanted, people: bool) -> str:
    if people:
        return f"{wanted.value(lambda: _name(draws))} {wanted.value(lambda: _name(draws))}"
    return wanted.value(lambda: _key(draws, people))
