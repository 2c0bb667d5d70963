"""The architecture matrix: random tiny models of every family, for a naive oracle."""

from __future__ import annotations

import copy

import torch
from random_weights import draw_weights
from transformers import AutoConfig, AutoModelForCausalLM

_COMMON = {"vocab_size": 61, "max_position_embeddings": 64, "attn_implementation": "eager"}
_LLAMA_LIKE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_MHA = _LLAMA_LIKE | {"num_key_value_heads": 4}
_GPT2_LIKE = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64}
_NEOX = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rotary_pct": 0.5,
}
_FALCON = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}

CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", _LLAMA_LIKE),
    "mistral": ("mistral", _LLAMA_LIKE | {"sliding_window": 5}),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "qwen3": ("qwen3", _LLAMA_LIKE | {"head_dim": 6}),
    "gemma": ("gemma", _LLAMA_LIKE | {"head_dim": 6}),
    "gemma2": (
        "gemma2",
        _LLAMA_LIKE | {"head_dim": 6, "sliding_window": 5, "query_pre_attn_scalar": 6},
    ),
    "gemma3": (
        "gemma3_text",
        _LLAMA_LIKE | {"head_dim": 6, "sliding_window": 5, "query_pre_attn_scalar": 6},
    ),
    "gpt2": ("gpt2", _GPT2_LIKE),
    "gpt-neo": (
        "gpt_neo",
        {
            "hidden_size": 24,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
        },
    ),
    "gpt-j": ("gptj", _GPT2_LIKE | {"rotary_dim": 4}),
    "gpt-neox": ("gpt_neox", _NEOX | {"use_parallel_residual": True}),
    "gpt-neox-sequential": ("gpt_neox", _NEOX | {"use_parallel_residual": False}),
    "phi": ("phi", _MHA | {"hidden_size": 32, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", _LLAMA_LIKE | {"pad_token_id": 0}),
    "falcon": (
        "falcon",
        _FALCON | {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False},
    ),
    "falcon-alibi": (
        "falcon",
        _FALCON | {"alibi": True, "multi_query": False, "new_decoder_architecture": False},
    ),
    "mpt": (
        "mpt",
        {"d_model": 24, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    ),
    "olmo": ("olmo", _MHA),
    "olmo2": ("olmo2", _LLAMA_LIKE),
    "opt": (
        "opt",
        {
            "hidden_size": 24,
            "ffn_dim": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 24,
        },
    ),
    "bloom": ("bloom", {"hidden_size": 24, "n_layer": 2, "n_head": 4}),
    "stablelm": ("stablelm", _LLAMA_LIKE | {"hidden_size": 32, "partial_rotary_factor": 0.5}),
    "mixtral": (
        "mixtral",
        _LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "granite": ("granite", _LLAMA_LIKE | {"residual_multiplier": 0.5}),
    "cohere": ("cohere", _LLAMA_LIKE),
    "starcoder2": ("starcoder2", _LLAMA_LIKE | {"sliding_window": 5}),
    "olmo3": ("olmo3", _LLAMA_LIKE | {"sliding_window": 5}),
    "qwen2-moe": (
        "qwen2_moe",
        _LLAMA_LIKE
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 20,
        },
    ),
    "qwen3-moe": (
        "qwen3_moe",
        _LLAMA_LIKE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
    ),
    "gpt-oss": (
        "gpt_oss",
        _LLAMA_LIKE
        | {"head_dim": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    ),
    "deepseek-v3": (
        "deepseek_v3",
        _MHA
        | {
            "q_lora_rank": 12,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 20,
            "first_k_dense_replace": 1,
        },
    ),
    "qwen3-next": (
        "qwen3_next",
        _LLAMA_LIKE
        | {
            "head_dim": 6,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 6,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 20,
            "mlp_only_layers": [],
        },
    ),
}

_FALCON_40B = {"new_decoder_architecture": True, "num_kv_heads": 2}
# Held to the same oracle in one test each; every_family.py makes them from the default configurati
MORE: dict[str, tuple[str, dict]] = {
    "falcon-one-norm": ("falcon", _FALCON_40B | {"num_ln_in_parallel_attn": 1}),
    "falcon-two-norms": ("falcon", _FALCON_40B | {"num_ln_in_parallel_attn": 2}),
    **{
        name: (name, {})
        for name in (
            *(
                "biogpt",
                "codegen",
                "cohere2",
                "ernie4_5",
                "exaone4",
                "falcon_h1",
                "gemma4_text",
                "glm4",
                "granitemoe",
                "jamba",
            ),
            *(
                "lfm2",
                "llama4_text",
                "mamba",
                "mamba2",
                "nemotron",
                "olmoe",
                "qwen3_5_text",
                "recurrent_gemma",
                "rwkv",
            ),
            *("smollm3", "xglm"),
        )
    },
}

_EXPERTS = {"mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss"}


def levels(case: str) -> list[str]:
    """The level that each of the two layers of a family is served by."""
    if case == "qwen3-next":
        return [
            "autodiff",
            "token-local",
        ]  # linear attention, then softmax attention; experts in both
    if case == "deepseek-v3":
        return ["closed", "token-local"]  # dense, then experts
    return ["token-local" if case in _EXPERTS else "closed"] * 2


def tiny_model(case: str, dtype: torch.dtype = torch.float64, **changes) -> torch.nn.Module:
    """Make a deterministic random model, with weights so large that attention is not uniform."""
    model_type, config = CASES[case]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **copy.deepcopy(_COMMON | config | changes))
    model = AutoModelForCausalLM.from_config(config)
    draw_weights(model)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    return model.to(dtype).eval()


def tiny_tokens(seq: int) -> torch.Tensor:
    """Token ids [1, seq], the same every time."""
    return torch.randint(1, 60, (1, seq), generator=torch.Generator().manual_seed(seq))
