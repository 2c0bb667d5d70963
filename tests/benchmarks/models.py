"""Models to measure: folders of real ones, and Llamas of any shape with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
_TEXT = (
    "The river rises in the hills behind the town and is at first no wider than a road. Further "
    "down it is joined by "
    "three streams, and where the last of them comes in there stands a mill that has not turned "
    "for sixty years. The "
    "miller's grandson keeps bees there now. He sells the honey on Saturdays, in jars of two "
    "sizes, and if he is asked "
    "which is the better he says that it depends on how many people come to breakfast. "
)


def load(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """A transformers model in evaluation mode and its tokenizer, or None: ``name`` is a folder or
    ``llama-3-8b``.
    """
    if name == "llama-3-8b":
        return random_llama(dtype=dtype, device=device, **LLAMA_3_8B), None
    if not (Path(name) / "config.json").is_file():
        raise SystemExit(
            f"got model {name!r}, expected a transformers folder (with config.json) or llama-3-8b"
        )
    # Eager: other attention kernels have no batched derivative, and make the whole-sequence
    # procedure slower.
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="eager").to(
        device
    )
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(name)


def random_llama(
    *, dtype: torch.dtype = torch.float32, device: str = "cpu", **config
) -> LlamaForCausalLM:
    """A Llama of the given `LlamaConfig`, the same every time, made on ``device``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **config, attn_implementation="eager", max_position_embeddings=8192, dtype=dtype
    )
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def llama(d_model: int, layers: int, device: str = "cpu") -> LlamaForCausalLM:
    """A random Llama in the usual proportions: heads of 64, three or four queries a key, an MLP 8/3
    as wide.
    """
    heads = d_model // 64
    return random_llama(
        device=device,
        hidden_size=d_model,
        intermediate_size=round(d_model * 8 / 3 / 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else max(1, heads // 4),
        vocab_size=1024,
    )


def prompt(tokens: int, vocabulary: int, tokenizer=None, number: int = 0) -> list[int]:
    """Token ids of a prompt of exactly this length: English text, or random ids where there is no
    tokenizer.
    """
    if tokenizer is None:
        generator = torch.Generator().manual_seed(number)
        return torch.randint(vocabulary, (tokens,), generator=generator).tolist()
    words = tokenizer.encode(_TEXT, add_special_tokens=False)
    start = 7 * number % len(words)
    return (words * (2 + tokens // len(words)))[start : start + tokens]
