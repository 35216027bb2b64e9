"""Write text with a trained model: `python -m elara.sample prompt="ROMEO:"`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from elara.cli import hydra_main
from elara.config import PRECISIONS, SamplingConfig
from elara.errors import ElaraError, naming
from elara.runs import find_checkpoint, say_reading


@dataclass
class SampleConfig(SamplingConfig):
    """Schema of conf/sample.yaml."""

    checkpoint: str | None = None  # checkpoint folder, run folder or run name
    prompt: str = ""
    chat: bool | None = None
    system: str | None = None
    depth: int | None = None
    device: str = "auto"
    precision: str = "float32"


def sample(config: DictConfig) -> None:
    """Stream the text to stdout, then a line of figures."""
    wanted = cast(SampleConfig, OmegaConf.to_object(config))
    if wanted.precision not in PRECISIONS:
        raise ElaraError(f"precision={wanted.precision} must be one of: {', '.join(PRECISIONS)}")
    folder = find_checkpoint(wanted.checkpoint)
    # torch takes seconds to import: a typo should not wait for it
    from elara import checkpoint
    from elara.calibration import controller_for
    from elara.data.conversation import Conversation
    from elara.decoding import complete
    from elara.device import find_device

    device = find_device(wanted.device)
    loaded = checkpoint.load(folder, device=device, precision=wanted.precision)
    say_reading(folder)
    chat = bool(loaded.meta.get("chat")) if wanted.chat is None else wanted.chat
    prompt = iter([] if chat else [wanted.prompt])  # shown with the first text, so that a prompt that is refused is not

    def show(text: str) -> None:
        print(next(prompt, "") + text, end="", flush=True)

    controller = None
    with naming(folder):
        if wanted.mode in ("auto", "tidar") and wanted.draft_length is None and not wanted.exit_threshold:
            controller = controller_for(loaded, precision=wanted.precision, depth=wanted.depth)
        done = complete(
            loaded.model,
            Conversation(loaded.tokenizer, wanted.system) if chat else loaded.tokenizer,
            wanted.prompt,
            wanted,
            depth=wanted.depth,
            controller=controller,
            on_text=show,
        )
    lossy = ", not the text of ar: trust is above 0" if wanted.trust and wanted.mode in ("auto", "tidar") else ""
    print(
        f"{next(prompt, '')}\n\n[{done.tokens} tokens, {done.tokens_per_second:.1f} tokens/s, "
        f"{done.tokens_per_forward:.2f} tokens per forward, mode {wanted.mode}{lossy}]"
    )


def main() -> None:
    """Console script `elara-sample`."""
    ConfigStore.instance().store(name="sample_schema", node=SampleConfig)
    hydra_main("sample", sample, only_prints=True)


if __name__ == "__main__":
    main()
