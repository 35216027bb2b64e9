"""Sums, differences, products and quotients: the tool `calculate`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from elara.data.tool_use.base import Question, Templates, Wanted, World, number, spoken
from elara.data.tool_use.draws import Draws
from elara.errors import ElaraError

_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
LONGEST = 100  # characters of an expression

PHRASES = {
    "+": ["{a} plus {b}", "{a} + {b}", "{a} and {b} together", "the sum of {a} and {b}", "{a} added to {b}"],
    "-": ["{a} minus {b}", "{a} - {b}", "{a} less {b}", "the difference of {a} and {b}", "{a} take away {b}"],
    "*": ["{a} times {b}", "{a} * {b}", "{a} multiplied by {b}", "the product of {a} and {b}", "{a} x {b}"],
    "/": ["{a} divided by {b}", "{a} / {b}", "{a} over {b}", "the quotient of {a} and {b}", "{a} shared by {b}"],
}
FRAMES = Templates(
    ["What is {}?", "What's {}?", "How much is {}?", "Calculate {}.", "Compute {}.", "Please work out {}.",
     "Can you calculate {}?", "Tell me {}.", "I need {}.", "What do I get for {}?", "Find {}.", "{}?", "{} =",
     "Give me the result of {}.", "Could you compute {} for me?", "What does {} make?", "Evaluate {}.",
     "What is the value of {}?", "Help me with {}.", "Quick question: what is {}?", "Hello, how much is {}?",
     "My homework asks for {}.", "Do you know what {} is?", "I would like to know {}.", "Solve {}."],
    ["What would {} be?", "Please tell me how much {} is.", "Can you find {} for me?", "I want to know {}.",
     "Work out {}, please.", "Hello, can you compute {}?", "What is the result of {}?"],
)  # fmt: skip
STORIES = {
    "+": Templates(
        ["I have {a} {things} and get {b} more. How many {things} do I have?",
         "There are {a} {things} here and {b} {things} there. How many are there in all?",
         "We sold {a} {things} in May and {b} in June. How many in all?"],
        ["I have {a} {things} here and get {b} more. How many do I have in all?"]),
    "-": Templates(
        ["I had {a} {things} and lost {b}. How many are left?",
         "Of {a} {things} we sold {b}. How many {things} are left?",
         "There were {a} {things}, and {b} are gone. How many remain?"],
        ["There were {a} {things} and we lost {b}. How many {things} are left?"]),
    "*": Templates(
        ["There are {a} boxes with {b} {things} each. How many {things} is that?",
         "I bought {a} {things} at {b} dollars each. What did I pay?",
         "Each of {a} rooms has {b} {things}. How many {things} are there?"],
        ["There are {a} rooms with {b} {things} each. How many {things} are there?"]),
    "/": Templates(
        ["Share {a} {things} equally among {b} people. How many does each get?",
         "We pack {a} {things} into {b} boxes. How many go into each?",
         "There are {a} {things} for {b} rooms. How many per room?"],
        ["Share {a} {things} equally among {b} rooms. How many go into each?"]),
}  # fmt: skip
THINGS = ("apples", "books", "chairs", "coins", "cups", "lamps", "pens", "stamps", "tickets", "tiles")
ANSWERS = {"+": "{a} plus {b} is {}.", "-": "{a} minus {b} is {}.", "*": "{a} times {b} is {}.",
           "/": "{a} divided by {b} is {}."}  # fmt: skip


def calculate(arguments: dict[str, Any], world: World) -> int | float:
    """The tool: `expression` of numbers, + - * / and brackets; anything else raises ElaraError."""
    expression = arguments.get("expression")
    if set(arguments) != {"expression"} or not isinstance(expression, str) or len(expression) > LONGEST:
        raise ElaraError(f"calculate needs an expression of at most {LONGEST} characters")
    try:
        return number(_value(ast.parse(expression.strip(), mode="eval").body))
    except ZeroDivisionError as error:
        raise ElaraError("division by zero") from error
    except (SyntaxError, ValueError, OverflowError, RecursionError) as error:
        raise ElaraError(f"{expression} is not an expression of numbers and + - * /") from error


def _value(node: ast.AST) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    raise ValueError(ast.dump(node))


def make(draws: Draws, wanted: Wanted) -> Question:
    """A question whose call is `a op b`."""
    sign = draws.choice("+-*/")
    digits = 6 if sign in "+-" else 4

    def operand() -> str:
        length = draws.between(1, digits)
        return str(draws.between(10 ** (length - 1), 10**length - 1))

    a, b = wanted.value(operand), wanted.value(operand)
    if sign == "-" and int(a) < int(b):
        a, b = b, a
    values = {"a": a, "b": b}
    if draws.chance(4):
        template = STORIES[sign].draw(draws, wanted.held_out_template)
        text = template.format(**values, things=draws.choice(THINGS))
    else:
        template = FRAMES.draw(draws, wanted.held_out_template)
        text = template.format(draws.choice(PHRASES[sign]).format(**values))
    return Question(
        "arithmetic", f"{sign} {template}", wanted.held_out_template, spoken(draws, text),
        ANSWERS[sign].format("{}", **values), "calculate", {"expression": f"{a} {sign} {b}"}, (a, b),
    )  # fmt: skip
