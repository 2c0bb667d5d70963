"""One member from its first weights to its last: a plain loop on the CPU, one captured graph a step on a GPU."""

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

WARM_UP = 3  # steps made as they come before one is captured: the optimizer's state must be there


def fresh_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of the recipe's shape with the first weights of its seed, float32 on the CPU."""
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
        if isinstance(module, LlamaRMSNorm):  # one kernel of torch's own instead of six
            module.forward = partial(
                nn.functional.rms_norm,
                normalized_shape=module.weight.shape,
                weight=module.weight,
                eps=module.variance_epsilon,
            )
    return model


def loss_of(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Nats per token of Int[window token], as ``model(batch, labels=batch).loss``.

    The blocks are called one by one, as transformers builds masks with steps that no graph can capture.
    """
    stream = model.model.embed_tokens(batch)
    angles = model.model.rotary_emb(stream, torch.arange(batch.shape[1], device=batch.device)[None])
    for block in model.model.layers:
        stream = block(stream, attention_mask=None, position_embeddings=angles)
        stream = stream[0] if isinstance(stream, tuple) else stream
    logits = model.lm_head(model.model.norm(stream[:, :-1]))
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def rate_at(step: int, steps: int, highest: float) -> float:
    """A twentieth of the steps up, then down along a cosine."""
    return highest * min(1.0, 20 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2


def train(
    recipe: Recipe, data: Path, folder: Path, *, steps: int, windows: int, device: str
) -> Iterator[str | None]:
    """Train one member: yields after every step, and the name of each checkpoint as soon as its folder is complete.

    Args:
        recipe: the member.
        data: what ``text.prepare`` wrote.
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
    """Int[needed]: all windows once in random order, then again in another."""
    draws = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(windows, generator=draws) for _ in range(math.ceil(needed / windows))]
    return torch.cat(passes)[:needed]


def stepper(
    model: LlamaForCausalLM, batch: Callable[[], Tensor], rate: Tensor, decay: float
) -> Callable[[], Tensor]:
    """A function that makes one step on ``batch()`` at ``rate`` and returns the loss before it.

    On a GPU its kernels are captured once and replayed: small models wait for Python more than for the GPU.
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
            group["lr"].copy_(rate)  # read from memory, so that a graph sees the rate of its step
        optimizer.step()
        return loss.detach()

    return _captured(plain) if cuda else plain


def _captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same step from a graph after WARM_UP plain ones; where none can be captured, plain ones all along.

    It must be called on one stream, which is not the device's default one.
    """
    made, chosen = 0, step

    def run() -> Tensor:
        nonlocal made, chosen
        if made == WARM_UP:
            chosen = _graph_of(step) or step
        made += 1
        return chosen()

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
    """Under its name once it is complete: a stopped training leaves no half of a checkpoint."""
    if model.device.type == "cuda":
        torch.cuda.current_stream().synchronize()  # whatever stream the weights are copied on
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
