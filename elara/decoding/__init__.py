"""Generation on a KV cache, autoregressive and TiDAR. Pure torch: no files, no Hydra, no Lightning."""

from elara.decoding.acceptance import Acceptance, measure_acceptance
from elara.decoding.completion import Completion, complete, encode_prompt, writable
from elara.decoding.config import SamplingConfig
from elara.decoding.generation import Step, generate

__all__ = [
    "Acceptance",
    "Completion",
    "SamplingConfig",
    "Step",
    "complete",
    "encode_prompt",
    "generate",
    "measure_acceptance",
    "writable",
]
