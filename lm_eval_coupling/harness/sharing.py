"""Coupling where lm-eval shares its results: in W&B, in trackio, and on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import glob
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import message_of
from lm_eval_coupling.harness.command_line import current_command

logger = logging.getLogger("lm_eval.coupling")

_METRIC = "coupling"
_CURVES = "coupling/layers"  # name of the table of means per layer
_NO_CURVES = "the tracker has no table of means per layer"
_TABLE = re.compile(r"(?:untrained_)?coupling_.+_(\d{4}-\d\d-\d\dT[\d.-]+)\.parquet")
_HEADING = "## Coupling"


def carried(results: Mapping[str, Any] | None) -> Any:
    """Return the `CouplingInfo` that results of ours carry; None for results of others.

    Its class is not imported: that would load pandas in every evaluation.
    """
    info = ((results or {}).get("config") or {}).get("coupling")
    return info if hasattr(info, "write_tables") else None


@contextlib.contextmanager
def _warning(consequence: str) -> Iterator[None]:
    """Turn an error into a warning: what is shared further must not cost the results."""
    try:
        yield
    except Exception as error:
        logger.warning("coupling: %s (%s)", consequence, message_of(error))


def log_result_to_wandb(log: Callable, tracker: Any) -> None:
    """Log results to W&B, with a table of means per layer."""
    log(tracker)
    with _warning(_NO_CURVES):
        if curves := _layer_curves(tracker):
            import wandb

            rows = [list(row.values()) for row in curves]
            table = wandb.Table(columns=[*curves[0]], data=rows)
            tracker.run.log({_CURVES: table}, step=tracker.step)


def log_result_to_trackio(log: Callable, tracker: Any) -> None:
    """Log results to trackio, with a table of means per layer."""
    log(tracker)
    with _warning(_NO_CURVES):
        if curves := _layer_curves(tracker):
            import pandas as pd
            import trackio

            table = trackio.Table(dataframe=pd.DataFrame(curves))
            trackio.log({_CURVES: table}, step=tracker.step)


def _layer_curves(tracker: Any) -> list[dict[str, Any]]:
    """Return the means per layer of results of ours, none for results of others."""
    if (info := carried(tracker.results)) is None:
        return []
    from lm_eval_coupling.runs.layer_curves import layer_curves

    return layer_curves(info.rows, info["headline_rank"])


def log_samples_to_wandb(log: Callable, tracker: Any, samples: Any) -> None:
    """Log samples to W&B, with a column of coupling."""
    if carried(tracker.results) is not None:
        tracker.task_configs = _with_metric_in_configs(tracker.task_configs, samples)
    log(tracker, samples)


def log_samples_to_trackio(log: Callable, tracker: Any, samples: Any) -> None:
    """Log samples to trackio, with coupling in the trace of each."""
    if carried(tracker.results) is not None:
        samples = {task: list(map(_with_metric, of_task)) for task, of_task in samples.items()}
    log(tracker, samples)


def _with_metric_in_configs(configs: Mapping[str, Any], samples: Mapping[str, Any]) -> Any:
    """List our metric for every task whose samples have it: W&B's table has a column for each."""
    metric = {"metric": _METRIC}
    return {
        task: config | {"metric_list": [*(config.get("metric_list") or ()), metric]}
        if (of_task := samples.get(task)) and all(_METRIC in sample for sample in of_task)
        else config
        for task, config in configs.items()
    }


def _with_metric(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a sample and list our metric in it if it has a value: trackio shows what is listed."""
    listed = [*sample.get("metrics", ()), *([_METRIC] if _METRIC in sample else [])]
    return dict(sample) | {"metrics": list(dict.fromkeys(listed))}


def push_tables(tracker: Any, info: Any, folder: Path, *, samples_follow: bool) -> None:
    """Push the tables of a run beside the results that lm-eval has pushed to the Hub.

    A failure is a problem of the command, which then ends with exit code 1.

    Args:
        tracker: lm-eval's `EvaluationTracker`.
        info: `CouplingInfo` of the run, whose tables are written.
        folder: of the results.
        samples_follow: whether lm-eval saves samples; to push them it pushes the whole folder.
    """
    if not (tracker.api and tracker.push_results_to_hub and info.tables):
        return
    where = info.tables[0].parent
    is_pushed_later = samples_follow and tracker.push_samples_to_hub
    if is_pushed_later and tracker.details_repo == tracker.results_repo and where == folder:
        return
    name = str(tracker.general_config_tracker.model_name)
    try:
        tracker.api.upload_folder(
            repo_id=tracker.results_repo if tracker.public_repo else tracker.results_repo_private,
            repo_type="dataset",
            folder_path=str(where),
            path_in_repo=name,
            allow_patterns=[glob.escape(table.name) for table in info.tables],
            commit_message=f"Adding coupling of {name}",
        )
    except Exception as error:
        problem = f"coupling tables were not pushed to the hub ({message_of(error)})"
        logger.error("%s; they lie in %s", problem, where)
        current_command().problems.append(problem)


def make_card_with_tables(make_card: Callable, tracker: Any) -> None:
    """Name the tables in the dataset card that lm-eval makes of what it has pushed."""
    if getattr(tracker, "coupling_info", None) is None:
        make_card(tracker)
        return
    # lm-eval 0.4.13 ends in an IndexError here where it has pushed results alone.
    with _warning("lm-eval made no dataset card"):
        make_card(tracker)
    with _warning("the dataset card does not name the coupling tables"):
        _add_tables_to_cards(tracker)


def _add_tables_to_cards(tracker: Any) -> None:
    private = "" if tracker.public_repo else "-private"
    repos = [tracker.results_repo] if tracker.push_results_to_hub else []
    repos += [tracker.details_repo] if tracker.push_samples_to_hub else []
    for repo in dict.fromkeys(f"{name}{private}" for name in repos):
        files = tracker.api.list_repo_files(repo_id=repo, repo_type="dataset")
        tables = sorted(file for file in files if _TABLE.fullmatch(Path(file).name))
        if tables:
            _add_to_card(repo, tables, tracker.api.token)


def _add_to_card(repo: str, tables: Sequence[str], token: str | None) -> None:
    from huggingface_hub import DatasetCard
    from huggingface_hub.errors import EntryNotFoundError

    try:
        card = DatasetCard.load(repo, repo_type="dataset", token=token)
    except EntryNotFoundError:
        card = DatasetCard(f"---\n{{}}\n---\n# Evaluations in {repo}\n")
    configs = _configs(tables)
    others = [c for c in card.data.get("configs") or [] if c.get("config_name") not in configs]
    card.data["configs"] = [*others, *configs.values()]
    before = card.text.split(_HEADING)[0].rstrip()
    card.text = f"{before}\n\n{_section(repo, tables[-1])}"
    card.push_to_hub(repo, repo_type="dataset", token=token)


def _configs(tables: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return a configuration of the data set for each task's tables, by its name."""
    by_name: dict[str, list[tuple[str, str]]] = {}
    for file in tables:
        name, _, date = file.removesuffix(".parquet").rpartition("_")
        by_name.setdefault(re.sub(r"[^\w.-]+", "__", name), []).append((date, file))
    configs = {}
    for name, dated in by_name.items():
        dated.sort()
        # Dashes are not allowed in the names of splits.
        files = [{"split": re.sub(r"\W", "_", date), "path": [file]} for date, file in dated]
        files.append({"split": "latest", "path": [dated[-1][1]]})
        configs[name] = {"config_name": name, "data_files": files}
    return configs


def _section(repo: str, example: str) -> str:
    return f"""{_HEADING}

Each `coupling_TASK_DATE.parquet` holds the transformer block coupling of one task's prompts, as
measured by lm-eval-coupling: a row per measured prompt, to be joined with the samples on
`doc_hash`. The metadata of a file's fields say what each column means. `coupling` has one number
for each of `ranks`.

```python
import pandas as pd

columns = ["doc_hash", "ranks", "coupling"]
table = pd.read_parquet("hf://datasets/{repo}/{example}", columns=columns)
```
"""
