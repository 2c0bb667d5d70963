"""Training of one zoo member: a plain loop on the CPU, one captured graph per step on a GPU."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from zoo_parts.recipes import HEAD, Recipe
from zoo_parts.text import CONTEXT, windows_of

WARM_UP = 3  # plain steps before a graph is captured, which needs the optimizer's state


def fresh_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama of the recipe's shape, initialized with its seed, float32 on the CPU."""
    special = {f"{name}_token_id": tokenizer.eos_token_id for name in ("bos", "eos", "pad")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=3 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.width // HEAD,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(config)
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):  # one kernel of torch instead of six
            module.forward = partial(
                nn.functional.rms_norm,
                normalized_shape=module.weight.shape,
                weight=module.weight,
                eps=module.variance_epsilon,
            )
    return model


def loss_of(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Return nats per token of Int[window token], equal to ``model(batch, labels=batch).loss``.

    Blocks are called one by one: transformers builds masks in ways that no graph can capture.
    """
    stream = model.model.embed_tokens(batch)
    angles = model.model.rotary_emb(stream, torch.arange(batch.shape[1], device=batch.device)[None])
    for block in model.model.layers:
        stream = block(stream, attention_mask=None, position_embeddings=angles)
        stream = stream[0] if isinstance(stream, tuple) else stream
    logits = model.lm_head(model.model.norm(stream[:, :-1]))
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def rate_at(step: int, steps: int, highest: float) -> float:
    """Return the learning rate: up over a twentieth of the steps, then down along a cosine."""
    return highest * min(1.0, 20 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2


def train(
    recipe: Recipe, data: Path, folder: Path, *, steps: int, windows: int, device: str
) -> Iterator[str | None]:
    """Train one member; yield each checkpoint's name once it is complete, and None after a step.

    Args:
        recipe: the member.
        data: folder that ``text.prepare`` wrote.
        folder: gets checkpoint-STEP, ordinary transformers folders, and training.csv.
        steps: of the standard recipe.
        windows: of a batch.
        device: ``cpu`` or ``cuda``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last, saved = recipe.steps(steps), set(recipe.saved(steps))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data / "tokenizer")
    model = fresh_model(recipe, tokenizer).to(device).train()
    text = windows_of(recipe, data, last * windows).to(device)
    order = reading_order(len(text), last * windows, recipe.seed).view(last, windows).to(device)
    chosen, rate = order[0].clone(), torch.tensor(0.0, device=device)
    step_of = stepper(model, lambda: text[chosen], rate, recipe.decay)
    rows, loss = [], None
    for step in range(last + 1):
        if step in saved:
            tokens = step * windows * CONTEXT
            rows.append(
                {"step": step, "tokens": tokens, "loss": math.nan if loss is None else loss.item()}
            )
            pd.DataFrame(rows).to_csv(folder / "training.csv", index=False, float_format="%.5g")
            save(model, tokenizer, folder / f"checkpoint-{step}")
            yield f"checkpoint-{step}"
        if step < last:
            chosen.copy_(order[step])
            rate.fill_(rate_at(step, last, recipe.rate))
            loss = step_of()
            yield None


def reading_order(windows: int, needed: int, seed: int) -> Tensor:
    """Return indices of windows, Int[needed]: each once in random order, then again in another."""
    draws = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(windows, generator=draws) for _ in range(math.ceil(needed / windows))]
    return torch.cat(passes)[:needed]


def stepper(
    model: LlamaForCausalLM, batch: Callable[[], Tensor], rate: Tensor, decay: float
) -> Callable[[], Tensor]:
    """Return a function that makes one step on ``batch()`` at ``rate`` and returns its loss.

    On a GPU the step is captured once and replayed: small models wait for Python, not for the GPU.
    """
    cuda = rate.is_cuda
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=rate.clone(), betas=(0.9, 0.95), capturable=cuda, fused=True
    )

    def plain() -> Tensor:
        half = (
            torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if cuda else nullcontext()
        )
        optimizer.zero_grad(set_to_none=True)
        with half:
            loss = loss_of(model, batch())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"].copy_(
                rate
            )  # a tensor: a captured graph reads the rate of its step from memory
        optimizer.step()
        return loss.detach()

    return _captured(plain) if cuda else plain


def _captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return the step as a graph after WARM_UP plain ones, or plain ones if capturing fails.

    It must be called on one stream other than the device's default.
    """
    made, current = 0, step

    def run() -> Tensor:
        nonlocal made, current
        if made == WARM_UP:
            current = _graph_of(step) or step
        made += 1
        return current()

    return run


def _graph_of(step: Callable[[], Tensor]) -> Callable[[], Tensor] | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            loss = step()
    except RuntimeError as error:
        warnings.warn(
            f"no graph of a step could be captured ({error}); every step waits for Python",
            stacklevel=2,
        )
        torch.cuda.synchronize()
        return None

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a checkpoint aside and rename it, so that a stopped training leaves no half of one."""
    if model.device.type == "cuda":
        torch.cuda.current_stream().synchronize()  # the weights may be copied on another stream
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
