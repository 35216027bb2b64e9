"""Tokens per second through the Server with 1, 4 and 16 requests in flight, ragged prompts, interleaved.

python experiments/tidar-decoding/serving.py RUN [--precision float32] [--new 128] [--rounds 5]

Prints a markdown table and writes serving-<run>-<precision>.json beside this script. The servers of all modes stay up;
a round takes every number of requests through every mode, so that a busy machine disturbs all of them alike.
"""

import argparse
import json
import statistics
import threading
import time
from pathlib import Path

from elara import checkpoint
from elara.cli import guard
from elara.decoding import Controller, SamplingConfig, Server, calibrate, writable
from elara.evaluation.drafts import held_out_prompts
from elara.evaluation.models import data_of
from elara.evaluation.text import held_out_text
from elara.runs import find_checkpoint, project_root

HERE = Path(__file__).parent
BATCHES = (1, 4, 16)


def ragged(prompts):
    """Cut the prompts to lengths from a token to all of them."""
    return [prompt[: 1 + (len(prompt) - 1) * (7 * i % 16) // 15] for i, prompt in enumerate(prompts)]


def serve(server, mode, prompts, new):
    """Ask for all prompts at once, each from a thread of its own; returns the seconds and the texts."""
    texts = [[] for _ in prompts]
    sampling = SamplingConfig(mode=mode, temperature=0.0, max_new_tokens=new)

    def ask(i):
        texts[i] = list(server.submit(prompts[i], sampling))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started, texts


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folder = find_checkpoint(args.run)
    loaded = checkpoint.load(folder, precision=args.precision)
    model, tokenizer = loaded.model, loaded.tokenizer
    options = {"mask_id": tokenizer.mask_id, "allowed": writable(tokenizer, model.config.vocab_size)}
    text = held_out_text(data_of(folder), project_root() / "data", max_bytes=60_000)
    prompts = ragged(held_out_prompts(text, tokenizer, max(BATCHES), 96))
    costs = {batch: calibrate(model, batch=batch, **options) for batch in BATCHES}
    controllers = {batch: Controller(costs[batch]) for batch in BATCHES}
    servers = {
        "ar": Server(model, **options),
        "tidar, trained length": Server(model, **options),
        "tidar, controller": Server(model, **options, controller=controllers),
    }
    rates = {(name, batch): [] for name in servers for batch in BATCHES}
    differing = 0
    for number in range(args.rounds + 1):
        for batch in BATCHES:
            reference = None
            for name, server in servers.items():
                took, texts = serve(server, name.split(",")[0], prompts[:batch], args.new)
                reference = reference or texts
                differing += sum(text != wanted for text, wanted in zip(texts, reference, strict=True))
                if number:
                    rates[name, batch].append(batch * args.new / took)
    for server in servers.values():
        server.close()
    result = {
        "run": folder.parents[2].name,
        "precision": args.precision,
        "new_tokens": args.new,
        "rounds": args.rounds,
        "texts_that_differ_from_ar": differing,
        "tokens_per_second": {},
        "against_ar": {},
    }
    print("| in flight | " + " | ".join(servers) + " |\n|---" + "|---" * len(servers) + "|")
    for batch in BATCHES:
        cells = []
        for name in servers:
            rate = statistics.median(rates[name, batch])
            ratio = statistics.median(a / b for a, b in zip(rates[name, batch], rates["ar", batch], strict=True))
            result["tokens_per_second"][f"{name}, {batch}"] = rate
            result["against_ar"][f"{name}, {batch}"] = ratio
            cells.append(f"{rate:.0f} ({ratio:.2f}x)")
        print(f"| {batch} | " + " | ".join(cells) + " |")
    print(f"\ntokens/s of all requests together (against ar); {differing} texts differ from ar's")
    name = f"serving-{result['run']}-{args.precision}.json"
    (HERE / name).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    guard(main)
