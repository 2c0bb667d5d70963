"""Values are where lm-eval and its users look for them: results, samples, trackers, tables."""

import json
import re
import sys

import numpy as np
import pytest
import reference
import torch
from evaluations import HOOK, run, written

from lm_eval_coupling import load_records


def test_coupling_is_among_what_wandb_logs(evaluate, tmp_path):
    """Offline, as with `--wandb_args mode=offline`."""
    pytest.importorskip("wandb")
    from lm_eval.loggers import WandbLogger

    results = evaluate()
    logger = WandbLogger({"mode": "offline", "dir": str(tmp_path), "project": "tiny"})
    try:
        logger.post_init(results)
        logger.log_eval_result()
        logger.log_eval_samples(results["samples"])
        logged = dict(logger.run.summary)
    finally:
        logger.run.finish()
    for task, row in results["results"].items():
        assert logged[f"{task}/coupling"] == pytest.approx(row["coupling,none"])
        assert logged[f"{task}/coupling_stderr"] == pytest.approx(row["coupling_stderr,none"])


def test_coupling_is_among_what_trackio_logs(evaluate, tmp_path, monkeypatch):
    """Which keeps everything on this machine unless told otherwise."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    from lm_eval.loggers import TrackioLogger

    logged = {}
    monkeypatch.setattr(trackio, "log", lambda metrics, *_, **__: logged.update(metrics))
    results = evaluate()
    logger = TrackioLogger({"project": "tiny"})
    try:
        logger.post_init(results)
        logger.log_eval_result()
        logger.log_eval_samples(results["samples"])
    finally:
        logger.finish()
    for task, row in results["results"].items():
        assert logged[f"{task}/coupling"] == pytest.approx(row["coupling,none"])


def test_a_document_has_the_value_of_the_naive_oracle(evaluate, home):
    """From the document's text to its number: tokenised, differentiated row by row, decomposed and averaged in float64."""
    from oracles import oracle
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = evaluate(kinds=("choice",), limit=1, arguments={"coupling_dtype": "float64"})
    (sample,) = found["samples"]["tiny_choice"]
    model = AutoModelForCausalLM.from_pretrained(home / "float32", dtype=torch.float64, attn_implementation="eager").eval()
    ids = AutoTokenizer.from_pretrained(home / "float32").encode(sample["arguments"][0][0])
    tokens = torch.tensor([ids])
    J = [oracle(model, tokens, layer, len(ids) - 1, len(ids) - 1) for layer in range(4)]
    U, _, V = zip(*(reference.top_singular(j, 2) for j in J), strict=True)
    m = [[reference.miscoupling(reference.coupling_matrix(J[a], U[b], V[b]), True) for b in range(4)] for a in range(4)]
    assert sample["coupling"] == pytest.approx(1 - reference.mean_over_pairs(np.array(m)), abs=1e-5)
    assert found["results"]["tiny_choice"]["coupling,none"] == pytest.approx(sample["coupling"])


def test_unmeasured_documents_have_no_value(evaluate):
    found = evaluate(kinds=("choice",), arguments={"coupling_limit": 3})
    values = [s["coupling"] for s in found["samples"]["tiny_choice"]]
    known = [v for v in values if v is not None]
    assert len(values) == 8 and len(known) == 3
    row = found["results"]["tiny_choice"]
    assert row["coupling,none"] == pytest.approx(np.mean(known))
    assert row["coupling_stderr,none"] == pytest.approx(np.std(known, ddof=1) / np.sqrt(3))


def test_tables_are_written_for_an_evaluation_from_python(evaluate, tmp_path):
    """lm-eval itself saves nothing where it has no EvaluationTracker; we do where a folder is asked for."""
    found = evaluate(kinds=("choice",), arguments={"coupling_out": str(tmp_path / "tables")})
    frame = load_records(tmp_path / "tables")
    assert sorted(frame.doc_hash) == sorted(s["doc_hash"] for s in found["samples"]["tiny_choice"] if s["coupling"])


@pytest.mark.slow
def test_the_command_leaves_table_results_samples_and_records(home, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        f"import site\nsite.addsitedir({str(HOOK)!r})\nfrom lm_eval.__main__ import cli_evaluate\ncli_evaluate()\n"
    )
    arguments = f"pretrained={home / 'float32'},coupling_ranks=2+4,coupling_store={tmp_path / 's.sqlite'}"
    words = ["--tasks", "tiny_choice", "--include_path", home / "tasks", "--output_path", tmp_path / "out", "--log_samples"]
    printed = run([sys.executable, script, "--model", "coupling-hf", "--model_args", arguments, *words, "--device", "cpu"])
    assert "|coupling" in printed.replace(" ", "")
    assert "8 prompts on this process, 8 distinct ones not measured before" in printed
    assert re.search(
        r"coupling: measuring takes \d+ MB of Jacobians on the host, .* of singular vectors, .* at work", printed
    )
    value = written(tmp_path / "out")["results"]["tiny_choice"]["coupling,none"]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    by_hash = {s["doc_hash"]: s["coupling"] for s in map(json.loads, samples.read_text().splitlines())}
    assert np.mean(list(by_hash.values())) == pytest.approx(value)
    assert set(load_records(tmp_path / "out").doc_hash) == set(by_hash)
