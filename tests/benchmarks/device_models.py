"""Parts of device.py on models of real size: stages, memory, launches, the release's procedure, a
run of lm-eval.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import against_release as release
import models
import stages
import tiny
import torch
from timing import synchronize

from lm_eval_coupling.measures.registry import default_measures
from lm_eval_coupling.measuring.prompt import groups, measure_prompts
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.numerics.memory import memory_of
from lm_eval_coupling.residual import ResidualModel

SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
}
MANY = 128  # prompts that are offered where as many as fit are measured together


def small(report: Any, options: SimpleNamespace) -> None:
    """SmolLM2's shape: one prompt, eight, 32, and as many as fit."""
    model = ResidualModel.wrap(_small(options)[0])
    for prompts, runs in ((1, 3), (8, 3), (32, 2), (0, 2)):
        for tokens in (10, 128):
            _stages(report, model, tokens, prompts, runs, options)


def large(report: Any, options: SimpleNamespace) -> None:
    """Llama-3-8B's shape in bf16: one prompt, a long one, and eight together; how many would fit; a
    profile.
    """
    sizes = TINY if options.quick else models.LLAMA_3_8B
    model = ResidualModel.wrap(
        models.random_llama(dtype=torch.bfloat16, device=options.device, **sizes)
    )
    for tokens, prompts, runs in ((128, 1, 3), (1024, 1, 2), (128, 8, 2)):
        _stages(report, model, tokens, prompts, runs, options)
    report.save(
        would_fit={tokens: len(_prompts(model, tokens, 0, options)) for tokens in (128, 1024)}
    )
    _profile(report, model, 128, 1, options)


def memory(report: Any, options: SimpleNamespace) -> None:
    """Peak memory of longer prompts against what is announced; that of the others stands beside
    their seconds.
    """
    model = ResidualModel.wrap(_small(options)[0])
    for tokens, prompts in ((512, 1), (512, 8), (1024, 4), (40, 32)):
        _stages(report, model, tokens, prompts, 1, options)


def profile(report: Any, options: SimpleNamespace) -> None:
    """Launches and what they spend their time in."""
    model = ResidualModel.wrap(_small(options)[0])
    for tokens, prompts in ((10, 1), (128, 8)):
        _profile(report, model, tokens, prompts, options)


def against_release(report: Any, options: SimpleNamespace) -> None:
    """The release's procedure on the same model in the same process; a few of its layers, the rest
    by proportion.
    """
    baseline, tokenizer = _small(options)
    model = ResidualModel.wrap(baseline)
    settings = Settings(
        _settings(options).ranks, (*default_measures(), "swapped")
    )  # the release's order is one of the two
    for tokens in (_length(10, options), _length(128, options)):
        prompts = [
            models.prompt(tokens, _vocabulary(model), tokenizer, number=i)
            for i in range(2 if options.quick else 64)
        ]
        found = release.compare(
            model, baseline, prompts, settings, release.spread(model.n_layers, 3), 1
        )
        report.add(**{name: value for name, value in found.items() if name != "agreement"})
        report.add(tokens=tokens, agreement=found["agreement"])


def overhead(report: Any, options: SimpleNamespace) -> None:
    """lm-eval with every document measured over lm-eval alone, on multiple-choice documents as long
    as HellaSwag's.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    from lm_eval_coupling.harness import lm as ours  # noqa: F401 registers the class

    shape = TINY if options.quick else SMOLLM2_135M
    documents = 4 if options.quick else 100
    with tempfile.TemporaryDirectory() as folder:
        path = tiny.save_model(f"{folder}/model", **shape)
        _save_task(Path(folder) / "tasks", documents)
        ranks = "+".join(map(str, _settings(options).ranks))
        tasks = TaskManager(include_path=f"{folder}/tasks", include_defaults=False)
        taken = {}
        for kind, more in (
            ("hf", ""),
            ("hf", ""),
            ("coupling-hf", f",coupling_limit=all,coupling_ranks={ranks}"),
        ):
            store = f",coupling_store={folder}/store.sqlite" if more else ""
            start = time.perf_counter()
            found = lm_eval.simple_evaluate(
                model=kind,
                model_args=f"pretrained={path}{more}{store}",
                tasks=["long_choice"],
                task_manager=tasks,
                device=options.device,
                batch_size=16,
                bootstrap_iters=0,
            )
            synchronize()
            taken[kind] = time.perf_counter() - start
        info = found["config"]["coupling"]
    if info["measured"] < documents:
        raise SystemExit(
            f"got {info['measured']} measured prompts, expected those of {documents} documents"
        )
    report.add(
        documents=documents,
        measured=info["measured"],
        hf=taken["hf"],
        coupling=taken["coupling-hf"],
        ratio=taken["coupling-hf"] / taken["hf"],
        measuring_per_document=(taken["coupling-hf"] - taken["hf"]) / documents,
    )


def _save_task(folder: Path, documents: int) -> None:
    """Contexts of about 90 tokens and four choices of about 30; one byte is one token here."""
    folder.mkdir(parents=True)
    words = models._TEXT.split()
    rows = []
    for i in range(documents):
        text = f"{i} " + " ".join(
            (words * 3)[5 * i % 60 :]
        )  # no two alike: a prompt is measured once
        choices = [text[j : j + 28] for j in (100, 140, 180, 220)]
        rows.append({"question": text[: 75 + i % 30], "choices": choices, "gold": i % 4})
    data = folder / "long.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    (folder / "long_choice.yaml").write_text(
        f"task: long_choice\ndataset_path: json\ndataset_kwargs: {json.dumps(source)}\ntest_split: "
        "test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: '
        '"{{choices}}"\ndoc_to_target: gold\n'
        "metric_list:\n  - metric: acc\n"
    )


def _small(options: SimpleNamespace):
    if options.model and not options.quick:
        return models.load(options.model, torch.float32, options.device)
    return models.random_llama(
        device=options.device, **(TINY if options.quick else SMOLLM2_135M)
    ), None


def _settings(options: SimpleNamespace) -> Settings:
    return Settings((2, 4) if options.quick else (10, 30, 50))


def _vocabulary(model: ResidualModel) -> int:
    return model.model.config.get_text_config().vocab_size


def _prompts(
    model: ResidualModel, tokens: int, prompts: int, options: SimpleNamespace
) -> list[list[int]]:
    """So many, or as many as are measured together."""
    count = prompts or (10 if options.quick else MANY)
    found = [models.prompt(tokens, _vocabulary(model), number=i) for i in range(count)]
    return found if prompts else [found[i] for i in groups(model, found, _settings(options))[0]]


def _length(tokens: int, options: SimpleNamespace) -> int:
    return tokens // 8 + 2 if options.quick else tokens


def _stages(
    report: Any,
    model: ResidualModel,
    tokens: int,
    prompts: int,
    runs: int,
    options: SimpleNamespace,
) -> None:
    """Seconds of a prompt by stage, the smaller of the runs after the first, and the peak memory of
    the last.
    """
    tokens = _length(tokens, options)
    settings, offered = _settings(options), _prompts(model, tokens, prompts, options)
    announced = memory_of(model, rank=settings.ranks[-1], seq=tokens, prompts=len(offered))
    spent = []
    records: Sequence[Any] = ()
    for _ in range(min(runs, 2) if options.quick else runs):
        _forget_peak(model)
        records, seconds = stages.measured(model, offered, settings)
        spent.append(seconds)
    best = {stage: min(run[stage] for run in spent[1:] or spent) for stage in spent[0]}
    report.add(
        tokens=tokens,
        together=len(offered),
        **best,
        first_run=spent[0]["total"],
        certificate=max(float(record.certificate.max()) for record in records),
        svd_residual=max(float(record.svd_residual.max()) for record in records),
        methods=sorted({method for record in records for method in record.method}),
        where=announced.where,
        announced_mb=announced.total / 1e6,
        **_peak(model, announced.total),
    )


def _forget_peak(model: ResidualModel) -> None:
    gc.collect()  # what the run before has left is no part of what this one is measured against
    if model.device.type == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats()


def _peak(model: ResidualModel, announced: int) -> dict[str, float]:
    """The most that torch had allocated on the device beside what it still holds: the model."""
    if model.device.type != "cuda":
        return {}
    measured = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    return {"measured_mb": measured / 1e6, "announced_over_measured": announced / measured}


def _profile(
    report: Any, model: ResidualModel, tokens: int, prompts: int, options: SimpleNamespace
) -> None:
    """Kernels and seconds of one batch, and the operations that take longest on the device and on
    the host.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    tokens = _length(tokens, options)
    settings, offered = (
        _settings(options),
        _prompts(model, tokens, min(prompts, 2) if options.quick else prompts, options),
    )
    measure_prompts(model, offered, -1, settings)
    on_device = model.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    start = time.perf_counter()
    with profiler(activities=kinds, acc_events=True) as taken:
        measure_prompts(model, offered, -1, settings)
        synchronize()
    wall = time.perf_counter() - start
    events = taken.key_averages()
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    report.add(
        tokens=tokens,
        together=len(offered),
        wall_with_profiler=wall,
        launches=sum(event.count for event in events if event.key.startswith("cudaLaunchKernel")),
        waits=sum(
            event.count
            for event in events
            if event.key.startswith(("cudaStreamSynchronize", "cudaMemcpy"))
        ),
        device_seconds=sum(event.self_device_time_total for event in kernels) / 1e6,
        longest_kernels=_longest(kernels, "self_device_time_total"),
        longest_on_host=_longest(events, "self_cpu_time_total"),
    )


def _longest(events: Sequence[Any], by: str) -> list[dict[str, Any]]:
    chosen = sorted(events, key=lambda event: -getattr(event, by))[:15]
    return [
        {"name": event.key[:80], "count": event.count, "ms": getattr(event, by) / 1e3}
        for event in chosen
    ]
