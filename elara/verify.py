"""Count a model from its configuration: parameters, bytes, memory. Then, where it fits, check that it can be trained.

    python -m elara.verify model=elara_2p8b [moe=none] [trm.depth=4] [json=true]
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from elara.cli import hydra_main
from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.errors import ElaraError
from elara.tokenizer import ROLES, padded_vocab

RESERVED = 1 + len(ROLES)  # mask and roles
VOCABULARY = {  # ids of each tokenizer, as far as they are known before it is built
    "gpt2": 50257 + RESERVED,
    "byte": 256 + RESERVED + 1,
    "char": 128,  # a guess: its corpus decides
}


@dataclass
class VerifyConfig:
    """The schema of `conf/verify.yaml`."""

    smoke: bool | None = None  # forward/backward check; null = when it fits
    json: bool = False  # print JSON instead of tables
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    trm: TRMConfig = field(default_factory=TRMConfig)
    tidar: TiDARConfig = field(default_factory=TiDARConfig)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def verify(config: DictConfig) -> None:
    """Print the report; raises ElaraError when the smoke check finds that the model cannot be trained."""
    plain: Any = OmegaConf.to_container(config)
    kind, guessed = plain["tokenizer"].get("kind", "char"), plain["model"]["vocab_size"] is None
    if guessed:
        if kind not in VOCABULARY:
            raise ElaraError(f"the size of tokenizer.kind={kind} is not known beforehand: give model.vocab_size=N")
        plain["model"]["vocab_size"] = padded_vocab(VOCABULARY[kind])
    elara = ElaraConfig.from_dict(plain)

    # torch takes a second to import: a typo should not wait for it
    from elara.size import size_report
    from elara.size.tables import show
    from elara.training.smoke import fits, smoke_check

    report = size_report(elara)
    choices = HydraConfig.get().runtime.choices
    if not config.json:
        title = " ".join(f"{group}={choices[group]}" for group in ("model", "moe", "trm", "tidar"))
        origin = f" (assumed for tokenizer={kind}; its corpus decides)" if guessed and kind == "char" else ""
        show(report, elara, f"{title}  vocabulary {elara.vocab_size}{origin}", Console())
    run_smoke = fits(report["total"]) if config.smoke is None else config.smoke
    smoke = smoke_check(elara) if run_smoke else None
    if config.json:
        print(json.dumps({**report, "smoke": smoke and asdict(smoke)}, indent=2))
    elif smoke is None:
        reason = "switched off" if config.smoke is not None else "too large for this machine; smoke=true insists"
        print(f"smoke check: not run ({reason})")
    else:
        diffusion = "" if smoke.diffusion is None else f", diffusion loss {smoke.diffusion:.3f}"
        verdict = "failed" if smoke.problems else "passed, every parameter gets a gradient"
        print(f"smoke check: {verdict}; AR loss {smoke.ar:.3f}{diffusion}, ln(vocabulary) {smoke.expected:.3f}")
    if smoke is not None and smoke.problems:
        raise ElaraError("; ".join(smoke.problems))


def main() -> None:
    """Console script `elara-verify`."""
    ConfigStore.instance().store(name="verify_schema", node=VerifyConfig)
    hydra_main("verify", verify)


if __name__ == "__main__":
    main()
