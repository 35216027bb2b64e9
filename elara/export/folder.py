"""A checkpoint as others pass it on: model.safetensors, config.json, tokenizer/, meta.json and a model card."""

from __future__ import annotations

import shutil
from pathlib import Path

from elara import checkpoint
from elara.errors import ElaraError
from elara.export.source import Source

ABOUT_FILES = ("format_version", "tokenizer", "crc32")  # keys of meta.json that every folder has of its own
CARD = """---
{front}library_name: elara
pipeline_tag: text-generation
tags: [elara, mixture-of-experts, recursion, diffusion-drafting]
---

# {name}

An Elara language model: {parameters:,} parameters, of which {active:,} meet each token. {layers} blocks of width \
{width}, each applied {depth} time{plural} (order {order}); {experts}. Context {context} tokens, tokenizer \
{tokenizer}, {vocabulary} ids. {drafting}

Trained for {step:,} steps on {data}, with the code of commit {commit}. Weights are float32, in the layout of Elara's \
checkpoints.

## Use

In a checkout of Elara + HiveMind:

    pip install '.[export]'
    python -m elara.sample checkpoint=FOLDER prompt="..."
    python -m elara.export checkpoint=FOLDER quantize=Q8_0    # a file for llama.cpp

```python
from elara import checkpoint

loaded = checkpoint.load("FOLDER")  # .model, .tokenizer, .config, .meta
```

License: {license}.
"""


def write_folder(path: Path, source: Source) -> None:
    """Write the checkpoint folder; it loads back with equal weights and holds nothing of the trainer.

    Raises ElaraError when `path` exists already or cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ElaraError(f"{path} is there already: give another output=FOLDER, or move it away")
    about = source.about
    kept = {key: value for key, value in source.meta.items() if key not in ABOUT_FILES}
    described = {"name": about.name, "license": about.license, "commit": about.commit, "data": about.data}
    meta = {**kept, **described, "step": about.step, **({"chat": True} if source.chat else {})}
    checkpoint.save(path, source.weights.model(), source.tokenizer, meta=meta, advice="or give another output=FOLDER")
    try:
        (path / "README.md").write_text(model_card(source), "utf-8")
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        raise checkpoint.unwritable(path, error, "or give another output=FOLDER") from error


def model_card(source: Source) -> str:
    """README.md of the folder."""
    config, about = source.config, source.about
    moe, tidar, depth = config.moe, config.tidar, config.trm.depth
    experts = "no experts"
    if config.moe_layers:
        experts = f"{moe.num_experts} experts in {len(config.moe_layers)} of them, {moe.top_k} per token"
        experts += f" and {moe.num_shared} shared" if moe.num_shared else ""
    return CARD.format(
        name=about.name,
        front=f"license: {about.license}\n" if about.license else "",
        license=about.license or "none was given by those who trained it",
        parameters=about.parameters.total,
        active=about.parameters.active,
        layers=config.model.n_layer,
        width=config.model.n_embd,
        depth=depth,
        plural="" if depth == 1 else "s",
        order=config.trm.order,
        experts=experts,
        context=config.model.context_length,
        tokenizer=source.tokenizer.kind,
        vocabulary=source.tokenizer.vocab_size,
        drafting=f"It drafts {tidar.block_length} tokens at once (TiDAR)." if tidar.block_length else "",
        step=about.step,
        data=about.data or "data that is not recorded",
        commit=about.commit or "unknown",
    )
