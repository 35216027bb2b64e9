"""Generation on a KV cache: autoregressive, TiDAR, block diffusion. Pure torch: no files, no Hydra, no Lightning."""

from elara.config import SamplingConfig
from elara.decoding.acceptance import Acceptance, measure_acceptance
from elara.decoding.completion import Completion, complete, encode_prompt, writable
from elara.decoding.controller import Controller, Costs, calibrate
from elara.decoding.generation import Step, generate
from elara.decoding.prefix import Prefixes
from elara.decoding.serving import Server, Stream

__all__ = [
    "Acceptance",
    "Completion",
    "Controller",
    "Costs",
    "Prefixes",
    "SamplingConfig",
    "Server",
    "Step",
    "Stream",
    "calibrate",
    "complete",
    "encode_prompt",
    "generate",
    "measure_acceptance",
    "writable",
]
