"""The part of llama.cpp's C interface that is used here: structs and signatures for ctypes.

A struct's `known` says which default values bear it out: where a build gives others, the fields are not where they are
thought to be.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any, ClassVar

OPAQUE = 1024  # bytes of room behind the fields that are known here; no build's struct is longer

LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class ModelParams(Structure):
    """The head of llama_model_params, all that is set here; newer fields follow in the room behind."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("rest", c_int8 * OPAQUE),
    )
    known: ClassVar[dict[str, tuple[Any, ...]]] = {
        "devices": (None,),
        "tensor_buft_overrides": (None,),
        "n_gpu_layers": (-1, 0, 99, 999),
        "split_mode": (0, 1),
    }


_HEAD: list[tuple[str, Any]] = [
    (name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max")
]
_TAIL: list[tuple[str, Any]] = [
    *((name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type", "pooling_type")),
    *((name, c_int32) for name in ("attention_type", "flash_attn_type")),
    *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
    *((name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
    ("yarn_orig_ctx", c_uint32),
    ("defrag_thold", c_float),
    ("cb_eval", c_void_p),
    ("cb_eval_user_data", c_void_p),
    ("type_k", c_int32),
    ("type_v", c_int32),
    ("abort_callback", c_void_p),
    ("abort_callback_data", c_void_p),
    *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
    ("rest", c_int8 * OPAQUE),
]
_CONTEXT: dict[str, tuple[Any, ...]] = {
    "n_ctx": (512,), "n_batch": (2048,), "n_ubatch": (512,), "n_seq_max": (1,), "n_rs_seq": (0,),
    "n_outputs_max": (0,), "n_outputs_max_per_seq": (1,), "n_threads": (4,), "n_threads_batch": (4,), "ctx_type": (0,),
    "rope_scaling_type": (-1,), "pooling_type": (-1,), "attention_type": (-1,), "flash_attn_type": (-1, 0),
    "rope_freq_base": (0.0,), "rope_freq_scale": (0.0,), "yarn_orig_ctx": (0,), "cb_eval": (None,),
    "cb_eval_user_data": (None,), "type_k": (1,), "type_v": (1,), "abort_callback": (None,),
    "abort_callback_data": (None,), "embeddings": (False,), "offload_kqv": (True,), "no_perf": (True,),
    "op_offload": (True,), "kv_unified": (False,),
}  # fmt: skip


class ContextParams(Structure):
    """llama_context_params since the autumn of 2026."""

    _fields_ = (*_HEAD, ("n_outputs_max_per_seq", c_uint32), *_TAIL)
    known = _CONTEXT


class EarlierContextParams(Structure):
    """The same before outputs were limited per sequence."""

    _fields_ = (*_HEAD, *_TAIL)
    known = _CONTEXT


class QuantizeParams(Structure):
    """The head of llama_model_quantize_params; everything behind it stays as the library set it."""

    _fields_ = (
        ("nthread", c_int32),
        ("ftype", c_int32),
        ("output_tensor_type", c_int32),
        ("token_embedding_type", c_int32),
        ("allow_requantize", c_bool),
        ("quantize_output_tensor", c_bool),
        ("only_copy", c_bool),
        ("pure", c_bool),
        ("rest", c_int8 * OPAQUE),
    )
    known: ClassVar[dict[str, tuple[Any, ...]]] = {
        "nthread": (0,),
        "ftype": tuple(range(1, 20)),
        "output_tensor_type": tuple(range(30, 100)),  # the number of types: none is forced
        "token_embedding_type": tuple(range(30, 100)),
        "allow_requantize": (False,),
        "quantize_output_tensor": (True,),
        "only_copy": (False,),
        "pure": (False,),
    }


class Batch(Structure):
    """llama_batch: tokens, their positions and sequences, and which of them give logits."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


SIGNATURES: dict[str, tuple[Any, Sequence[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_free": (None, [c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_token_to_piece": (c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool]),
    "llama_model_quantize": (c_uint32, [c_char_p, c_char_p, POINTER(QuantizeParams)]),
    "ggml_quantize_init": (None, [c_int32]),
    "ggml_quantize_chunk": (c_size_t, [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_row_size": (c_size_t, [c_int32, c_int64]),
    "ggml_backend_load_all_from_path": (None, [c_char_p]),
    "ggml_backend_dev_count": (c_size_t, []),
}
