"""Which settings have an effect beside which: what a user gives and nothing reads is refused, not passed over.

A text that was named and never read looks like a text that was trained on. The rules are about keys given on a command
line; what the options of groups and experiments bring along may wait for its counterpart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elara.overrides import key_of

Settings = Mapping[str, Any]
CHOICES = "(choices)"  # no key of a configuration is called so


@dataclass(frozen=True)
class Rule:
    """keys: settings, or whole sections, that have an effect only where `works` says so. needs: what to tell a user.
    decided_by: the groups and keys that change this; where a sweep runs over one of them, some of its jobs may go
    without effect."""

    keys: Sequence[str]
    works: Callable[[Settings], bool]
    needs: str
    decided_by: Sequence[str]


@dataclass(frozen=True)
class Idle:
    """An override without effect, and what it needs to have one."""

    override: str
    rule: Rule

    def __str__(self) -> str:
        return f"{self.override} {self.rule.needs}; without that it has no effect"


def find_idle(settings: Settings, overrides: Iterable[str], command: str) -> list[Idle]:
    """The overrides that have no effect beside the settings that they led to.

    command: the name of its configuration. Of groups that may be left out, the settings hold the choices as CHOICES.
    """
    found = []
    for override in overrides:
        key = key_of(override)
        if override.startswith("~"):
            continue
        for rule in RULES.get(command, ()):
            if any(f"{key}.".startswith(f"{section}.") for section in rule.keys) and not rule.works(settings):
                found.append(Idle(override, rule))
                break
    return found


def value_at(settings: Settings, key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    value: Any = settings
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _corpus(section: str, decided_by: Sequence[str]) -> Iterator[Rule]:
    """Of a corpus: what each source reads."""
    tables, files = ("hub", "parquet", "jsonl"), ("text", "chat", "honeycomb", "parquet", "jsonl", "hub")
    readers = {
        ("path",): files,
        ("url",): ("shakespeare",),
        ("dataset", "subset", "revision", "split"): ("hub",),
        ("text_field", "max_documents", "processes"): tables,
        ("samples", "samples_seed", "families"): ("tool_use",),
        ("honeycomb",): ("honeycomb",),
        ("val_fraction",): (*files, "tool_use"),
    }

    def read_by(sources: Sequence[str]) -> Callable[[Settings], bool]:
        return lambda settings: value_at(settings, f"{section}.source") in sources

    for names, sources in readers.items():
        listed = " or ".join([", ".join(sources[:-1]), sources[-1]] if len(sources) > 1 else sources)
        needs = f"needs data that reads it: give data={sources[0]} as well, or other data of the source {listed}"
        if section != "data":
            needs = f"needs a corpus that reads it: give {section}.source={listed} as well"
        yield Rule([f"{section}.{name}" for name in names], read_by(sources), needs, decided_by)


def _on(key: str) -> Callable[[Settings], bool]:
    return lambda settings: bool(value_at(settings, key))


def _is(key: str, *values: Any) -> Callable[[Settings], bool]:
    return lambda settings: value_at(settings, key) in values


def _repeats(settings: Settings) -> bool:
    return value_at(settings, "trm.depth") != 1 or value_at(settings, "trm.sample_depth") is not None


def _has_data(settings: Settings) -> bool:
    return CHOICES not in settings or settings[CHOICES].get("data") is not None


DATA = [
    Rule(["data"], _has_data, "needs the data group it belongs to: give data=text or another one as well", ["data"]),
    *_corpus("data", ["data", "data.source", "experiment", "model"]),
    Rule(["data.replay"], _on("data.replay.share"),
         "needs a part of the batches: give data.replay.share=0.25 or another one as well", ["data.replay.share"]),
    *_corpus("data.replay", ["data.replay.source"]),
]  # fmt: skip
TOKENIZER = [
    Rule(["tokenizer.path"], _is("tokenizer.kind", "huggingface", "saved"),
         "needs a tokenizer that is read from there: give tokenizer=huggingface or tokenizer=saved as well",
         ["tokenizer", "tokenizer.kind", "data", "experiment", "model"]),
    Rule(["tokenizer.end_token"], _is("tokenizer.kind", "huggingface"),
         "needs tokenizer=huggingface: the others have an end token of their own",
         ["tokenizer", "tokenizer.kind", "data", "experiment", "model"]),
    Rule(["tokenizer.url"], _is("tokenizer.kind", "gpt2", "smollm2"),
         "needs a tokenizer that is fetched: give tokenizer=gpt2 or tokenizer=smollm2 as well",
         ["tokenizer", "tokenizer.kind", "data", "experiment", "model"]),
]  # fmt: skip
ARCHITECTURE = [
    Rule([f"moe.{name}" for name in ("top_k", "num_shared", "every", "gate_scale", "bias_update_rate", "balance_loss",
                                     "z_loss")], _on("moe.num_experts"),
         "needs experts: give moe=deepseek or moe.num_experts=8 as well", ["moe", "moe.num_experts", "experiment"]),
    Rule([f"tidar.{name}" for name in ("block_fraction", "schedule", "loss_weight", "tie_head", "chain",
                                       "draft_routing")], _on("tidar.block_length"),
         "needs a diffusion head: give tidar=full_mask or tidar.block_length=4 as well",
         ["tidar", "tidar.block_length", "experiment"]),
    Rule(["trm.order"], _repeats, "needs blocks that are applied more than once: give trm.depth=2 as well",
         ["trm", "trm.depth", "trm.sample_depth", "experiment"]),
]  # fmt: skip
RULES: dict[str, list[Rule]] = {
    "train": [
        *DATA, *TOKENIZER, *ARCHITECTURE,
        Rule(["distill"], _on("teachers"), "needs a teacher: give teacher=[smollm2] or others as well", ["teacher"]),
    ],
    "prepare": [*DATA, *TOKENIZER],
    "verify": ARCHITECTURE,
    "collect": DATA,
    "evaluate": [
        *DATA,
        Rule([f"eval.{name}" for name in ("task_folder", "task_limit", "fewshot", "chat")], _on("eval.tasks"),
             "needs tasks: give eval.tasks=[copying] or others as well", ["eval.tasks"]),
        Rule(["eval.speed_batch"], _on("eval.speed_rounds"), "needs eval.speed_rounds above 0", ["eval.speed_rounds"]),
    ],
    "sample": [
        Rule(["steps", "confidence", "order"], _is("mode", "diffusion"), "needs mode=diffusion", ["mode"]),
        Rule(["draft_length"], _is("mode", "tidar"), "needs mode=tidar: otherwise a controller chooses it", ["mode"]),
        Rule(["groups"], lambda settings: _is("mode", "tidar")(settings) and _on("draft_length")(settings),
             "needs mode=tidar and draft_length: otherwise a controller chooses it", ["mode", "draft_length"]),
        Rule(["trust"], _is("mode", "auto", "tidar"), "needs mode=tidar or auto", ["mode"]),
    ],
    "export": [
        Rule(["format.temperature", "format.num_ctx"], _is("format.kind", "ollama"), "needs format=ollama", ["format"]),
        Rule(["verify_tokens"], _on("verify"), "needs verify=true", ["verify"]),
    ],
}  # fmt: skip
