"""A tiny random model of every class in transformers' causal-LM mapping, by one recipe from its
default configuration.

Not as tests/support/cases.py has them, one by one and with what is special about them switched on:
here the question is only whether a class that the recipe can shrink is measured, or refused in a
sentence.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

LAYERS = 2
# Every name under which configurations keep a size, and the size that is set where a configuration
# has it.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"], 32
    ),
    **dict.fromkeys(
        [
            "attention_hidden_size",
            "lru_width",
            "conv_dim",
            "cross_attention_hidden_size",
            "dim_model",
        ],
        32,
    ),
    **dict.fromkeys(
        [
            "intermediate_size",
            "ffn_dim",
            "n_inner",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "d_inner",
        ],
        48,
    ),
    **dict.fromkeys(
        [
            "dim_ff",
            "dff",
            "ffn_hidden_size",
            "block_ff_dim",
            "feed_forward_size",
            "mlp_hidden_size",
        ],
        48,
    ),
    **dict.fromkeys(
        ["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 16
    ),
    **dict.fromkeys(
        ["shared_intermediate_size", "moe_shared_expert_intermediate_size", "expert_dim"], 16
    ),
    **dict.fromkeys(
        [
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "encoder_layers",
        ],
        LAYERS,
    ),
    **dict.fromkeys(["num_decoder_layers", "num_encoder_layers", "num_blocks"], LAYERS),
    **dict.fromkeys(
        ["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], 4
    ),
    **dict.fromkeys(
        [
            "encoder_attention_heads",
            "num_query_heads",
            "num_encoder_attention_heads",
            "num_decoder_attention_heads",
        ],
        4,
    ),
    **dict.fromkeys(
        ["num_key_value_heads", "swa_num_key_value_heads", "num_global_key_value_heads"], 2
    ),
    **dict.fromkeys(
        ["head_dim", "v_head_dim", "qk_nope_head_dim", "attention_head_dim", "kv_channels", "d_kv"],
        8,
    ),
    **dict.fromkeys(["swa_head_dim", "swa_v_head_dim", "global_head_dim", "index_head_dim"], 8),
    "qk_head_dim": 12,
    **dict.fromkeys(["qk_rope_head_dim", "rotary_dim"], 4),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank"], 8),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input", "padded_vocab_size"], 97),
    **dict.fromkeys(
        ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"], 64
    ),
    **dict.fromkeys(
        [
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "ffn_num_experts",
        ],
        4,
    ),
    **dict.fromkeys(
        ["num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts"], 2
    ),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group", "first_k_dense_replace"], 1),
    **dict.fromkeys(["state_size", "mamba_d_state", "ssm_state_size", "mamba_state_size"], 8),
    **dict.fromkeys(
        ["linear_num_key_heads", "linear_num_value_heads", "num_ln_in_parallel_attn"], 2
    ),
    **dict.fromkeys(
        ["linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"], 8
    ),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 8),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size"], 8),
    **dict.fromkeys(["sliding_window", "attention_window_size", "local_attention"], 5),
    **dict.fromkeys(["pad_token_id"], 0),
    **dict.fromkeys(["bos_token_id", "decoder_start_token_id"], 1),
    **dict.fromkeys(["eos_token_id"], 2),
}
_FOUR = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_SPECIAL: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(
            ["full_attention", "sliding_attention"], {"rope_type": "default", "rope_theta": 10000.0}
        )
    },
    "cpmant": {"dim_head": 8, "prompt_length": 4},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"],
        **{"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": _FOUR
    | {"intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 8},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gemma4_text": _FOUR | {"per_layer_config": {}},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "num_buckets": 4,
    },
    "xlnet": {"d_head": 8},
    "xlstm": {"embedding_dim": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        **{
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "num_key_value_heads": 4,
            "mamba_dt_rank": 2,
        },
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        **{
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
        },
        **{"num_key_value_heads": 4, "kv_channels": 8, "num_query_groups": 4},
    },
    "zaya": {"num_experts_per_tok": 1},
}
_NO_CACHE = {"xlm", "xlnet", "openai-gpt"}  # take no such argument


def tiny(model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> torch.nn.Module:
    """A random model of the class that AutoModelForCausalLM has for ``model_type``; whatever it
    raises if there is none.
    """
    config = shrunk(AutoConfig.for_model(model_type), _SPECIAL.get(model_type, {}) | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.normal_(0, 0.15)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    model.to(dtype).eval()
    with torch.no_grad():
        model(
            torch.tensor([[3, 4, 5, 6]]),
            **({} if model_type in _NO_CACHE else {"use_cache": False}),
        )  # what the recipe has not shrunk rightly does not run
    return model


def shrunk(config: Any, special: dict[str, Any]) -> Any:
    """The same configuration with every size that it has made small."""
    plain = config.to_dict()
    own = {
        n: size
        for n, size in _SIZES.items()
        if isinstance(plain.get(n), int) and not isinstance(plain[n], bool)
    }
    own |= {
        name: size
        for name, size in {"head_dim": 8, "num_key_value_heads": 4}.items()
        if name in plain and plain[name] is None
    }
    if "kv_lora_rank" in own and "num_key_value_heads" in own:
        own["num_key_value_heads"] = 4  # latent attention has as many keys as queries
        own |= {"head_dim": 4} if "head_dim" in plain else {}
    if plain.get("is_decoder") is False and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        own["is_decoder"] = True
    depth = next(
        (
            name
            for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
            if name in own
        ),
        None,
    )
    for name, value in plain.items():  # one entry for each layer
        if (
            isinstance(value, list)
            and len(value) > LAYERS
            and depth is not None
            and len(value) == plain[depth]
        ):
            own[name] = _two_kinds(value)
    own |= {"per_layer_config": {}} if "per_layer_config" in plain else {}
    parts = {
        name: part for name, part in vars(config).items() if type(part).__name__.endswith("Config")
    }
    changed = {k: v for k, v in plain.items() if k not in parts} | own | special
    for name in ("transformers_version", "model_type", "architectures"):
        changed.pop(name, None)
    try:
        smaller = {name: shrunk(part, {}) for name, part in parts.items()}
        return type(config)(**copy.deepcopy(changed), **smaller, attn_implementation="eager")
    except AttributeError:  # what a part has, its constructor may not take
        config = copy.deepcopy(config)
        vars(config).update(own | special)
        for name, part in parts.items():
            sizes = {
                n: size for n, size in _SIZES.items() if isinstance(getattr(part, n, None), int)
            }
            vars(getattr(config, name)).update(sizes)
        return config


def _two_kinds(value: list[Any]) -> list[Any]:
    """Two entries of a list of one for each layer, different ones if there are."""
    other = next((item for item in value if item != value[0]), value[-1])
    return [value[0], other]
