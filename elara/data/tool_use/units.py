"""Lengths, weights, volumes, times and temperatures in other units: the tool `convert`."""

from __future__ import annotations

import math
from typing import Any

from elara.data.tool_use.base import Question, Templates, Wanted, World, number, spoken
from elara.data.tool_use.draws import Draws
from elara.errors import ElaraError

# unit -> (short form, how many of the first unit of its kind it is)
KINDS: dict[str, dict[str, tuple[str, float]]] = {
    "length": {"meters": ("m", 1.0), "kilometers": ("km", 1000.0), "centimeters": ("cm", 0.01),
               "miles": ("mi", 1609.344), "feet": ("ft", 0.3048), "inches": ("in", 0.0254)},
    "weight": {"grams": ("g", 1.0), "kilograms": ("kg", 1000.0), "pounds": ("lb", 453.59237),
               "ounces": ("oz", 28.349523125)},
    "volume": {"liters": ("l", 1.0), "milliliters": ("ml", 0.001), "gallons": ("gal", 3.785411784)},
    "time": {"seconds": ("s", 1.0), "minutes": ("min", 60.0), "hours": ("h", 3600.0), "weeks": ("wk", 604800.0)},
    "temperature": {"celsius": ("C", 1.0), "fahrenheit": ("F", 1.0)},
}  # fmt: skip
TEMPLATES = Templates(
    ["Convert {v} {a} to {b}.", "How many {b} are {v} {a}?", "What is {v} {a} in {b}?", "{v} {a} in {b}?",
     "How much is {v} {a} in {b}?", "Change {v} {a} into {b}.", "Please convert {v} {a} into {b}.",
     "I have {v} {a}. What is that in {b}?", "Express {v} {a} in {b}.", "What are {v} {a} in {b}?",
     "Tell me how many {b} {v} {a} make.", "Turn {v} {a} into {b}.", "Can you convert {v} {a} to {b}?",
     "It says {v} {a} here. What is it in {b}?", "Give me {v} {a} in {b}.", "{v} {a} to {b}, please.",
     "I need {v} {a} in {b}.", "Write {v} {a} as {b}.", "What do {v} {a} make in {b}?",
     "How many {b} is {v} {a}?", "The sign reads {v} {a}. How many {b} is that?", "From {a} to {b}: {v}."],
    ["Please give me {v} {a} in {b}.", "How many {b} do {v} {a} make?", "Can you turn {v} {a} into {b}?",
     "It reads {v} {a}. What is that in {b}?", "I want {v} {a} in {b}."],
)  # fmt: skip


def convert(arguments: dict[str, Any], world: World) -> int | float:
    """The tool: `value` from one unit to another of its kind, by their long names."""
    value, source, target = arguments.get("value", ""), arguments.get("from"), arguments.get("to")
    if type(value) not in (int, float) or not abs(value) < math.inf:
        raise ElaraError("value must be a number")
    for units in KINDS.values():
        if isinstance(source, str) and isinstance(target, str) and source in units and target in units:
            try:
                if source == "celsius" and target == "fahrenheit":
                    return number(value * 9 / 5 + 32)
                if source == "fahrenheit" and target == "celsius":
                    return number((value - 32) * 5 / 9)
                return number(value * units[source][1] / units[target][1])
            except OverflowError as error:
                raise ElaraError("value is too large") from error
    raise ElaraError(f"cannot convert {source} to {target}")


def make(draws: Draws, wanted: Wanted) -> Question:
    """A question about one quantity."""
    units = KINDS[draws.choice(list(KINDS))]
    source, target = draws.shuffled(list(units))[:2]

    def quantity() -> str:
        whole = str(draws.between(1, 10 ** draws.between(1, 4) - 1))
        return f"{whole}.{draws.between(1, 9)}" if draws.chance(4) else whole

    v = wanted.value(quantity)
    short = draws.chance(4)
    names = {"a": units[source][0] if short else source, "b": units[target][0] if short else target}
    template = TEMPLATES.draw(draws, wanted.held_out_template)
    return Question(
        "units", template, wanted.held_out_template, spoken(draws, template.format(v=v, **names)),
        f"{v} {source} = {{}} {target}.", "convert",
        {"value": float(v) if "." in v else int(v), "from": source, "to": target}, (v,),
    )  # fmt: skip
