"""What a GGUF file says beside its tensors: sizes, recursion, tokenizer, and where the weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from elara.config import ElaraConfig
from elara.decoding import SamplingConfig
from elara.export.layout import COMPACT, NO_SHARED, UNROLLED
from elara.export.vocabulary import Vocabulary
from elara.size.parameters import Part

if TYPE_CHECKING:
    from gguf import GGUFWriter

SIGMOID = 2  # llama.cpp's number of the gating function
QUANTIZATION_VERSION = 2  # of ggml's block formats


@dataclass(frozen=True)
class About:
    """Where the weights come from.

    license: as whoever trained them gave it, None until then. commit: of the code that trained them; data: in words;
    step: optimizer steps.
    """

    name: str
    license: str | None
    commit: str | None
    data: str | None
    step: int
    parameters: Part


def write_metadata(
    writer: GGUFWriter,
    config: ElaraConfig,
    about: About,
    vocabulary: Vocabulary,
    *,
    architecture: str,
    depth: int,
    file_type: int,
    template: str | None = None,
) -> None:
    """Add every key to a writer of this architecture. file_type: llama.cpp's number. template: of chats, Jinja."""
    writer.add_type("model")
    writer.add_name(about.name)
    if about.license:
        writer.add_license(about.license)
    writer.add_uint64("general.parameter_count", about.parameters.total)
    writer.add_file_type(file_type)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    _sizes(writer, config, architecture, depth)
    writer.add_uint32("elara.recursion.depth", depth)
    writer.add_string("elara.recursion.order", config.trm.order)
    if architecture == COMPACT:
        writer.add_uint32("elara.tidar.block_length", config.tidar.block_length)
        writer.add_string("elara.tidar.draft_routing", config.tidar.draft_routing)
    writer.add_uint64("elara.parameters.active", about.parameters.active)
    writer.add_string("elara.commit", about.commit or "unknown")
    writer.add_string("elara.data", about.data or "unknown")
    writer.add_uint32("elara.step", about.step)
    _tokenizer(writer, vocabulary)
    _sampling(writer)
    if template is not None:
        writer.add_chat_template(template)


def _sizes(writer: GGUFWriter, config: ElaraConfig, architecture: str, depth: int) -> None:
    m, moe = config.model, config.moe
    writer.add_block_count(m.n_layer * (depth if architecture == UNROLLED else 1))
    writer.add_context_length(m.context_length)
    writer.add_embedding_length(m.n_embd)
    writer.add_feed_forward_length(m.hidden)
    writer.add_head_count(m.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(m.norm_eps)
    writer.add_rope_freq_base(m.rope_base)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_expert_feed_forward_length(config.expert_hidden)  # hy_v3 asks for it in dense models, too
    if config.moe_layers:
        shared = config.expert_hidden * moe.num_shared
        writer.add_expert_count(moe.num_experts)
        writer.add_expert_used_count(moe.top_k)
        writer.add_expert_shared_count(moe.num_shared)
        writer.add_expert_shared_feed_forward_length(shared or (NO_SHARED if architecture == UNROLLED else 0))
        writer.add_uint32(f"{architecture}.expert_gating_func", SIGMOID)
        writer.add_expert_weights_norm(True)
        writer.add_expert_weights_scale(moe.gate_scale)


def _sampling(writer: GGUFWriter) -> None:
    """What llama.cpp draws with unless it is told otherwise: as `elara.sample` does, where llama.cpp would cut."""
    writer.add_float32("general.sampling.temp", SamplingConfig().temperature)
    writer.add_int32("general.sampling.top_k", 0)
    writer.add_float32("general.sampling.top_p", 1.0)
    writer.add_float32("general.sampling.min_p", 0.0)
    writer.add_float32("general.sampling.penalty_repeat", 1.0)


def _tokenizer(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.end)
    writer.add_eos_token_id(vocabulary.end)
    writer.add_mask_token_id(vocabulary.mask)
    writer.add_add_bos_token(False)
    writer.add_string("elara.tokenizer", vocabulary.kind)
