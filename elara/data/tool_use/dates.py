"""Days between dates, weekdays, dates some days later: the tools `days_between`, `weekday` and `add_days`."""

from __future__ import annotations

import re
from datetime import date, timedelta
from typing import Any

from elara.data.tool_use.base import Question, Templates, Wanted, World, spoken
from elara.data.tool_use.draws import Draws
from elara.errors import ElaraError

MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December")  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FIRST, LAST = date(1900, 1, 1), date(2099, 12, 31)

BETWEEN = Templates(
    ["How many days are there between {a} and {b}?", "How many days lie between {a} and {b}?",
     "How many days from {a} to {b}?", "Count the days from {a} to {b}.", "What is the number of days from {a} to {b}?",
     "How long is it from {a} to {b}, in days?", "Days between {a} and {b}?", "Tell me the days from {a} until {b}.",
     "I start on {a} and stop on {b}. How many days is that?", "How many days pass between {a} and {b}?",
     "Please count the days between {a} and {b}.", "From {a} to {b}, how many days are there?",
     "My trip runs from {a} to {b}. How many days is it?", "How many days does it take from {a} until {b}?"],
    ["How many days are there from {a} until {b}?", "Please tell me how many days lie between {a} and {b}.",
     "Count the days between {a} and {b}."],
)  # fmt: skip
WEEKDAY = Templates(
    ["What day of the week is {a}?", "Which weekday is {a}?", "What weekday was {a}?",
     "On which weekday does {a} fall?",
     "What day is {a}?", "Is {a} a weekday, and which one?", "Tell me the weekday of {a}.",
     "Which day of the week was {a}?",
     "Find the weekday for {a}.", "I was born on {a}. Which weekday was that?", "{a} is what day of the week?",
     "Our party is on {a}. What weekday is that?", "Name the day of the week of {a}.",
     "Please give me the weekday of {a}."],
    ["On what day of the week does {a} fall?", "Tell me which weekday {a} is.", "Which weekday does {a} fall on?"],
)  # fmt: skip
LATER = Templates(
    ["What date is {n} days after {a}?", "Which date is {n} days after {a}?", "Add {n} days to {a}.",
     "What is the date {n} days from {a}?", "I leave on {a} and return {n} days later. What date is that?",
     "Which date comes {n} days after {a}?", "{n} days after {a}, what is the date?",
     "Tell me the date {n} days after {a}.",
     "If today is {a}, what is the date in {n} days?", "What will be the date {n} days after {a}?",
     "Starting on {a}, add {n} days.", "The bill of {a} is due in {n} days. On which date?",
     "Please add {n} days to {a}.", "Give me the date {n} days later than {a}."],
    ["What is the date {n} days after {a}?", "If I add {n} days to {a}, which date is it?",
     "Tell me which date comes {n} days after {a}."],
)  # fmt: skip


def _date(arguments: dict[str, Any], key: str) -> date:
    text = arguments.get(key)
    if not isinstance(text, str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", text):
        raise ElaraError(f"{key} must be a date such as 2024-03-15")
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise ElaraError(f"{text} is no date") from error


def days_between(arguments: dict[str, Any], world: World) -> int:
    """The tool: days from `start` to `end`, both YYYY-MM-DD."""
    return (_date(arguments, "end") - _date(arguments, "start")).days


def weekday(arguments: dict[str, Any], world: World) -> str:
    """The tool: the English weekday of `date`."""
    return WEEKDAYS[_date(arguments, "date").weekday()]


def add_days(arguments: dict[str, Any], world: World) -> str:
    """The tool: the date `days` after `date`."""
    days = arguments.get("days")
    if type(days) is not int:
        raise ElaraError("days must be a whole number")
    try:
        return (_date(arguments, "date") + timedelta(days=days)).isoformat()
    except OverflowError as error:
        raise ElaraError(f"{days} days are too many") from error


def written(draws: Draws, day: date) -> str:
    """A date as people write it."""
    month = MONTHS[day.month - 1]
    return draws.choice([day.isoformat(), f"{month} {day.day}, {day.year}", f"{day.day} {month} {day.year}"])


def make(draws: Draws, wanted: Wanted) -> Question:
    """A question about one or two dates."""

    def day() -> str:
        return (FIRST + timedelta(days=draws.below((LAST - FIRST).days + 1))).isoformat()

    first = wanted.value(day)
    a = written(draws, date.fromisoformat(first))
    which = draws.below(3)
    if which == 0:
        start, end = sorted([first, wanted.value(day)])
        template = BETWEEN.draw(draws, wanted.held_out_template)
        text = template.format(a=written(draws, date.fromisoformat(start)), b=written(draws, date.fromisoformat(end)))
        tool, arguments = "days_between", dict[str, Any](start=start, end=end)
        values: tuple[str, ...] = (start, end)
        answer = f"From {start} to {end} there are {{}} days."
    elif which == 1:
        template = WEEKDAY.draw(draws, wanted.held_out_template)
        text = template.format(a=a)
        tool, arguments, values = "weekday", {"date": first}, (first,)
        answer = f"{first} is a {{}}."
    else:
        n = wanted.value(lambda: str(draws.between(1, 10 ** draws.between(1, 3) - 1)))
        template = LATER.draw(draws, wanted.held_out_template)
        text = template.format(a=a, n=n)
        tool, arguments, values = "add_days", {"date": first, "days": int(n)}, (first, n)
        answer = f"{n} days after {first} is {{}}."
    return Question(
        "dates", template, wanted.held_out_template, spoken(draws, text), answer, tool, arguments, values
    )
