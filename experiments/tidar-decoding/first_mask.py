"""Tokens per forward without the first mask of every group, which no draft reads: greedy, 24 prompts x 96 tokens, fp32.

python experiments/tidar-decoding/first_mask.py RUN
"""

import argparse

import torch
from measure import Writer

from elara.cli import guard
from elara.decoding import SamplingConfig, engine, measure_acceptance
from elara.model import MaskSection


class Behind(MaskSection):
    """Blocks that begin a position behind their starts; what they see still ends there."""

    def positions(self):
        return super().positions() + 1


def without_first(model, tokens, cache, groups, length, mask_id, exit_threshold=None):
    """`think_and_talk` with a mask less in every group; in its place stands a copy of the second, also not read."""
    if not groups:
        return model(tokens, cache=cache).hidden, None
    starts = torch.tensor([[have + j for j in groups] for have in cache.lengths])
    masks = torch.full((len(starts), len(groups) * (length - 1)), mask_id)
    output = model(tokens, section=Behind(starts, length - 1, masks), cache=cache)
    hidden = output.mask_hidden.unflatten(1, (len(groups), length - 1))
    return output.hidden, torch.cat([hidden[:, :, :1], hidden], 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    writer = Writer(parser.parse_args().run, "float32")
    prompts = writer.prompts(24)
    whole = engine.think_and_talk
    for length in (n for n in (2, 4, 8) if n <= writer.model.config.tidar.block_length):
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=96, draft_length=length)
        found = []
        for step in (whole, without_first):
            engine.think_and_talk = step
            counts = measure_acceptance(
                writer.model, prompts, sampling, writer.tokenizer.mask_id, allowed=writer.allowed
            )
            found.append(counts.tokens_per_forward)
        print(f"length {length}: {found[0]:.2f} tokens per forward, {found[1]:.2f} without the first mask", flush=True)


if __name__ == "__main__":
    guard(main)
