"""Coupling where results are shared: W&B, trackio, and the Hub, against stand-ins of their APIs."""

import copy
import json
import math
import sys
import types

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
from evaluations import written
from huggingface_hub import DatasetCard
from huggingface_hub.errors import EntryNotFoundError
from lm_eval import loggers
from lm_eval.loggers import EvaluationTracker

from lm_eval_coupling.harness import sharing
from lm_eval_coupling.harness.command_line import Command


def require_curves(table, results):
    """One row per task, reading and depth: means over documents of the run's own records."""
    info = results["config"]["coupling"]
    assert set(table["task"]) == {"tiny_choice", "tiny_generate"}
    assert {"layer_coupling", "norms", "entropy"} <= set(table["measure"])
    of = table[(table["task"] == "tiny_choice") & (table["measure"] == "norms")]
    records = [row.measured for row in info.rows if row.document.task == "tiny_choice"]
    expected = np.mean([np.asarray(record.norms, dtype=float) for record in records], axis=0)
    assert of["depth"].tolist() == list(range(len(expected))) and set(of["n"]) == {2}
    np.testing.assert_allclose(of["mean"], expected, rtol=1e-12)
    own = table[(table["task"] == "tiny_choice") & (table["measure"] == "layer_coupling")]
    matrices = [1 - np.asarray(record.normalized_miscoupling[0], dtype=float) for record in records]
    for layer, mean in zip(own["depth"].astype(int) - 1, own["mean"], strict=True):
        others = [m[layer][np.arange(len(m)) != layer].mean() for m in matrices]
        assert mean == pytest.approx(np.mean(others), rel=1e-6)


def test_wandb_gets_a_column_of_the_samples_and_curves_over_layers(
    evaluate, wandb_logger, monkeypatch
):
    results = evaluate(kinds=("choice", "generate"))
    samples = results.pop("samples")
    before = copy.deepcopy(samples)
    run, logged = wandb_logger.run, {}
    log = run.log
    monkeypatch.setattr(
        type(run), "log", lambda self, data, **rest: (logged.update(data), log(data, **rest))
    )
    wandb_logger.post_init(results)
    wandb_logger.log_eval_result()
    wandb_logger.log_eval_samples(samples)
    assert samples == before
    for task, of_task in samples.items():
        column = logged[f"{task}_eval_results"]["coupling"].tolist()
        expected = [sample["coupling"] for sample in of_task]
        assert [None if math.isnan(v) else v for v in column] == expected
        assert sum(value is not None for value in expected) == 2
    table = logged["coupling/layers"]
    require_curves(pd.DataFrame(table.data, columns=table.columns), results)


@pytest.fixture
def trackio(monkeypatch):
    """Stand-in of trackio, with what lm-eval's logger calls."""
    if not hasattr(loggers, "TrackioLogger"):
        pytest.skip("this lm-eval has no logger for trackio")
    module = types.ModuleType("trackio")
    module.logged = []
    module.config = {}
    module.init = lambda **_: None
    module.log = lambda metrics, step=None: module.logged.append(metrics)
    module.finish = lambda: None
    module.Trace = lambda messages, metadata: metadata
    module.Table = lambda dataframe: dataframe
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def test_trackio_gets_coupling_in_every_trace_and_curves_over_layers(evaluate, trackio):
    results = evaluate(kinds=("choice", "generate"))
    samples = results.pop("samples")
    before = copy.deepcopy(samples)
    logger = loggers.TrackioLogger({"project": "tiny"})
    logger.post_init(results)
    logger.log_eval_result()
    logger.log_eval_samples(samples)
    assert samples == before
    traces = [
        entry["tiny_choice/sample"] for entry in trackio.logged if "tiny_choice/sample" in entry
    ]
    assert [t["coupling"] for t in traces] == [s["coupling"] for s in samples["tiny_choice"]]
    assert all("acc" in trace for trace in traces)
    (curves,) = [entry["coupling/layers"] for entry in trackio.logged if "coupling/layers" in entry]
    require_curves(curves, results)


def test_results_of_hf_are_shared_as_they_were(evaluate, trackio):
    results = evaluate("hf", kinds=("choice",))
    samples = results.pop("samples")
    logger = loggers.TrackioLogger({"project": "tiny"})
    logger.post_init(results)
    logger.log_eval_result()
    logger.log_eval_samples(samples)
    assert not any("coupling" in str(entry) for entry in trackio.logged)


def test_a_tracker_that_takes_no_tables_costs_nothing(evaluate, trackio, caplog):
    del trackio.Table
    logger = loggers.TrackioLogger({"project": "tiny"})
    logger.post_init(evaluate(kinds=("choice",)))
    logger.log_eval_result()
    assert "the tracker has no table of means per layer" in caplog.text


class Hub:
    """Stand-in of `HfApi`: repositories are dictionaries of file names and contents."""

    token = "hf_" + "x" * 20

    def __init__(self):
        self.repos, self.cards = {}, {}

    def whoami(self):
        return {"name": "org"}

    def create_repo(self, repo_id, **_):
        self.repos.setdefault(repo_id, {})

    def upload_file(self, repo_id, path_or_fileobj, path_in_repo, **_):
        self.repos[repo_id][path_in_repo.lstrip("/")] = open(path_or_fileobj, "rb").read()

    def upload_folder(self, repo_id, folder_path, path_in_repo, allow_patterns=None, **_):
        from fnmatch import fnmatch
        from pathlib import Path

        for file in Path(folder_path).iterdir():
            if allow_patterns is None or any(fnmatch(file.name, p) for p in allow_patterns):
                name = f"{path_in_repo.lstrip('/')}/{file.name}"
                self.repos[repo_id][name] = file.read_bytes()

    def list_repo_files(self, repo_id, **_):
        return sorted(self.repos[repo_id])


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()

    def load(repo_id, repo_type=None, token=None):
        assert repo_type == "dataset" and token == hub.token
        if repo_id not in hub.cards:
            raise EntryNotFoundError("README.md")
        return DatasetCard(hub.cards[repo_id])

    def push_to_hub(self, repo_id, repo_type=None, token=None, **_):
        assert repo_type == "dataset"
        hub.cards[repo_id] = self.content

    monkeypatch.setattr(EvaluationTracker, "_api", staticmethod(lambda token=None: hub))
    monkeypatch.setattr(DatasetCard, "load", staticmethod(load))
    monkeypatch.setattr(DatasetCard, "push_to_hub", push_to_hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda repo_id, filename, **_: filename)
    monkeypatch.setattr(
        "lm_eval.loggers.evaluation_tracker.load_dataset",
        lambda *_, **__: {"results": [{"tiny_choice": {"acc,none": 0.5}}]},
    )
    hub.command = Command()
    monkeypatch.setattr(sharing, "current_command", lambda: hub.command)
    return hub


def track(evaluate, out, *, log_samples=True, model="coupling-hf", arguments=None, **pushed):
    tracker = EvaluationTracker(output_path=str(out), token=Hub.token, **pushed)
    results = evaluate(model, kinds=("choice",), arguments=arguments, evaluation_tracker=tracker)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results, samples if log_samples else None)
    if log_samples:
        tracker.save_results_samples("tiny_choice", samples["tiny_choice"])
    tracker.recreate_metadata_card()
    return tracker


def tables_in(hub, repo):
    return [name for name in hub.repos[repo] if name.endswith(".parquet")]


def test_tables_are_pushed_with_the_results_and_named_on_the_card(evaluate, hub, tmp_path, caplog):
    """lm-eval pushed its results alone, and ended in an IndexError on the card."""
    track(evaluate, tmp_path, push_results_to_hub=True)
    repo = "org/lm-eval-results-private"
    (table,) = tables_in(hub, repo)
    (local,) = tmp_path.rglob("coupling_*.parquet")
    assert hub.repos[repo][table] == local.read_bytes()
    (results,) = [name for name in hub.repos[repo] if name.endswith(".json")]
    assert results.rpartition("/")[0] == table.rpartition("/")[0]
    assert "lm-eval made no dataset card (list index out of range" in caplog.text
    card = DatasetCard(hub.cards[repo])
    (config,) = card.data["configs"]
    assert config["config_name"].endswith("__coupling_tiny_choice")
    first, latest = config["data_files"]
    assert latest == {"split": "latest", "path": [table]} and first["path"] == [table]
    assert all(c.isalnum() or c in "._" for c in first["split"])
    assert f'pd.read_parquet("hf://datasets/{repo}/{table}"' in card.text
    assert not hub.command.problems


def test_a_second_run_is_added_to_the_same_card(evaluate, hub, tmp_path):
    for name in ("one", "two"):
        track(evaluate, tmp_path / name, push_results_to_hub=True, public_repo=True)
    card = DatasetCard(hub.cards["org/lm-eval-results"])
    (config,) = card.data["configs"]
    tables = tables_in(hub, "org/lm-eval-results")
    assert [file["path"] for file in config["data_files"]] == [[t] for t in [*tables, tables[-1]]]
    assert card.text.count("## Coupling") == 1


def test_with_samples_tables_are_pushed_once(evaluate, hub, tmp_path):
    track(evaluate, tmp_path, push_results_to_hub=True, push_samples_to_hub=True)
    repo = "org/lm-eval-results-private"
    (table,) = tables_in(hub, repo)
    names = [config["config_name"] for config in DatasetCard(hub.cards[repo]).data["configs"]]
    assert len(names) > 1 and sum("__coupling_tiny_choice" in name for name in names) == 1
    assert "Latest results" in hub.cards[repo] and table in hub.cards[repo]


def test_results_and_samples_in_two_repositories_have_tables_each(evaluate, hub, tmp_path):
    track(
        evaluate,
        tmp_path,
        push_results_to_hub=True,
        push_samples_to_hub=True,
        results_repo_name="results",
        details_repo_name="details",
    )
    for repo in ("org/results-private", "org/details-private"):
        assert len(tables_in(hub, repo)) == 1 and "## Coupling" in hub.cards[repo]


def test_tables_in_a_folder_of_their_own_are_pushed_too(evaluate, hub, tmp_path):
    arguments = {"coupling_out": str(tmp_path / "tables")}
    pushed = {"push_results_to_hub": True, "push_samples_to_hub": True}
    track(evaluate, tmp_path / "out", arguments=arguments, **pushed)
    assert len(tables_in(hub, "org/lm-eval-results-private")) == 1


def test_a_push_that_fails_is_a_problem_of_the_command(
    evaluate, hub, tmp_path, monkeypatch, caplog
):
    def refused(self, **_):
        raise OSError("403 Forbidden")

    monkeypatch.setattr(Hub, "upload_folder", refused)
    track(evaluate, tmp_path, push_results_to_hub=True)
    (problem,) = hub.command.problems
    assert "coupling tables were not pushed to the hub" in problem and "403" in problem
    assert "they lie in" in caplog.text and list(tmp_path.rglob("coupling_*.parquet"))


def test_nothing_is_pushed_unless_asked_for_and_results_of_hf_stay_lm_evals_own(
    evaluate, hub, tmp_path
):
    track(evaluate, tmp_path / "quiet")
    assert not hub.repos and not hub.cards
    with pytest.raises(IndexError):
        track(evaluate, tmp_path / "hf", model="hf", push_results_to_hub=True)
    assert not tables_in(hub, "org/lm-eval-results-private") and not hub.cards


def test_a_colleague_reads_the_table_without_us(evaluate, tmp_path):
    """As docs/sharing.md shows it."""
    import pyarrow.parquet

    tracker = EvaluationTracker(output_path=str(tmp_path))
    results = evaluate(kinds=("choice",), evaluation_tracker=tracker)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results, samples)
    (file,) = tmp_path.rglob("coupling_*.parquet")
    table = pd.read_parquet(file)
    rank = list(table["ranks"][0]).index(2)
    for couplings, matrices in zip(table["coupling"], table["normalized_miscoupling"], strict=True):
        matrix = np.stack(matrices[rank]).astype(float)
        others = ~np.eye(len(matrix), dtype=bool)
        assert couplings[rank] == pytest.approx(1 - matrix[others].mean(), abs=1e-12)
    schema = pyarrow.parquet.read_schema(file)
    meaning = schema.field("normalized_miscoupling").metadata
    assert meaning[b"shape"] == b"[rank, layer, layer]" and meaning[b"description"]
    about = json.loads(schema.metadata[b"lm_eval_coupling"])
    assert about["fingerprint"] == written(tmp_path)["config"]["coupling"]["fingerprint"]
    joined = pd.DataFrame(samples["tiny_choice"]).merge(table, on="doc_hash")
    assert len(joined) == 2
