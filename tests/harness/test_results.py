"""Values are where lm-eval and its users look for them: results, samples, trackers, tables."""

import json
import re

import numpy as np
import pytest
import reference
import tiny
import torch
from evaluations import command, run, written

from lm_eval_coupling import load_records
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.harness.lm import CouplingLM
from lm_eval_coupling.saved.tables import read_header


def test_coupling_is_among_what_wandb_logs(evaluate, wandb_logger):
    results = evaluate()
    wandb_logger.post_init(results)
    wandb_logger.log_eval_result()
    wandb_logger.log_eval_samples(results["samples"])
    logged = dict(wandb_logger.run.summary)
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


def test_a_document_has_the_value_of_the_naive_oracle(evaluate, tmp_path):
    """From the document's text to its number: tokenised, differentiated row by row, decomposed and
    averaged in float64.
    """
    from oracles import oracle
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny.save_model(tmp_path / "model", num_hidden_layers=4)
    arguments = {"coupling_dtype": "float64"}
    found = evaluate(kinds=("choice",), pretrained=folder, limit=1, arguments=arguments)
    (sample,) = found["samples"]["tiny_choice"]
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    ids = AutoTokenizer.from_pretrained(folder).encode(sample["arguments"][0][0])
    tokens = torch.tensor([ids])
    J = [oracle(model, tokens, layer, len(ids) - 1, len(ids) - 1) for layer in range(4)]
    U, _, V = zip(*(reference.top_singular(j, 2) for j in J), strict=True)
    m = [
        [reference.miscoupling(reference.coupling_matrix(J[a], U[b], V[b]), True) for b in range(4)]
        for a in range(4)
    ]
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
    """lm-eval itself saves nothing where it has no EvaluationTracker; we do where a folder is asked
    for.
    """
    found = evaluate(kinds=("choice",), arguments={"coupling_out": str(tmp_path / "tables")})
    frame = load_records(tmp_path / "tables")
    assert sorted(frame.doc_hash) == sorted(
        s["doc_hash"] for s in found["samples"]["tiny_choice"] if s["coupling"]
    )


@pytest.mark.slow
def test_the_command_leaves_table_results_samples_and_records(home, tmp_path):
    printed = run(command(home, tmp_path / "out", tmp_path / "s", "--device", "cpu"))
    assert "Coupling at K = 2" in printed and "8 of 8" in printed
    assert "|coupling" in printed.replace(" ", "")
    assert "coupling: on this process 8 prompts, 8 of them distinct, 0 measured before" in printed
    assert re.search(
        r"a first prompt of \d+ tokens took \S+ s \(depth \S+ s, .*\); the other 7 take up to ",
        printed,
    )
    assert re.search(
        r"coupling: measuring takes \d+ MB of Jacobians on the host, "
        ".* of singular vectors, .* at work",
        printed,
    )
    value = written(tmp_path / "out")["results"]["tiny_choice"]["coupling,none"]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    by_hash = {
        s["doc_hash"]: s["coupling"] for s in map(json.loads, samples.read_text().splitlines())
    }
    assert np.mean(list(by_hash.values())) == pytest.approx(value)
    assert set(load_records(tmp_path / "out").doc_hash) == set(by_hash)


def test_results_are_strict_json(evaluate, tmp_path):
    """With one document there is no standard error; NaN in the file was refused by every strict
    parser.
    """
    from lm_eval.loggers import EvaluationTracker

    results = evaluate(kinds=("choice",), limit=1)
    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.save_results_aggregated(results, results.pop("samples"))
    (file,) = tmp_path.rglob("results_*.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(file.read_text(), parse_constant=refuse)
    measures = found["config"]["coupling"]["tasks"]["tiny_choice"]["measures"]
    assert measures["coupling"]["2"]["stderr"] is None and measures["coupling"]["2"]["mean"] > 0


def test_evaluate_itself_leaves_tables(home, manager, tmp_path):
    """Without simple_evaluate: coupling_out stayed empty, and a tracker made later found nothing to
    write.
    """
    from lm_eval import evaluator
    from lm_eval.loggers import EvaluationTracker

    arguments = {
        "coupling_ranks": "2",
        "coupling_limit": 2,
        "coupling_store": str(tmp_path / "s.sqlite"),
    }
    lm = CouplingLM(
        str(home / "float32"), device="cpu", coupling_out=str(tmp_path / "out"), **arguments
    )
    results = evaluator.evaluate(lm, manager.load(["tiny_choice"]), bootstrap_iters=0)
    (early,) = (tmp_path / "out").glob("coupling_tiny_choice_*.parquet")
    assert len(load_records(tmp_path / "out")) == 2
    tracker = EvaluationTracker(output_path=str(tmp_path / "results"))
    tracker.general_config_tracker.model_name_sanitized = "tiny"
    tracker.save_results_aggregated(results, results["samples"])
    (file,) = (tmp_path / "results").rglob("results_*.json")
    (table,) = (tmp_path / "out").glob("coupling_tiny_choice_*.parquet")
    assert table != early and table.stem.endswith(file.stem.removeprefix("results_"))


@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize("chosen", [[5, 7], [7, 1, 5]])
def test_documents_have_the_numbers_that_lm_eval_logs(evaluate, tmp_path, logged, chosen):
    """--samples numbers requests anew: `show --doc 5` said that there is no such document, `--doc
    0` showed it.
    """
    arguments = {"coupling_out": str(tmp_path / "out"), "coupling_limit": "all"}
    samples = {"tiny_choice": chosen}
    found = evaluate(kinds=("choice",), samples=samples, log_samples=logged, arguments=arguments)
    records = load_records(tmp_path / "out")
    assert set(records.doc_id) == set(chosen)
    if logged:
        ids = {sample["doc_hash"]: sample["doc_id"] for sample in found["samples"]["tiny_choice"]}
    else:
        everything = evaluate(kinds=("choice",), arguments={"coupling_limit": 0})["samples"][
            "tiny_choice"
        ]
        ids = {sample["doc_hash"]: sample["doc_id"] for sample in everything}
    assert dict(zip(records.doc_hash, records.doc_id, strict=True)) == {
        hash: ids[hash] for hash in records.doc_hash
    }


PROMPTS = {
    "more shots": {"num_fewshot": 2},
    "chat template": {"apply_chat_template": True},
    "one turn": {"apply_chat_template": True, "num_fewshot": 2, "fewshot_as_multiturn": False},
    "several turns": {"apply_chat_template": True, "num_fewshot": 2, "fewshot_as_multiturn": True},
    "system instruction": {"apply_chat_template": True, "system_instruction": "Be brief."},
    "other documents": {"samples": {"tiny_choice": [3, 4]}},
}
ENCODING = {"one more token": {"add_bos_token": True}, "fewer tokens": {"max_length": 20}}


def test_what_makes_the_prompts_is_recorded(evaluate, tmp_path):
    """Runs of other prompts went under one name; each way to make them is told apart, in results
    and in tables.
    """
    digests = {}
    for name, options in {
        "plain": {},
        **PROMPTS,
        **{name: {"arguments": given} for name, given in ENCODING.items()},
    }.items():
        out = tmp_path / name
        arguments = {"coupling_out": str(out)} | options.get("arguments", {})
        found = evaluate(kinds=("choice",), **options | {"arguments": arguments})["config"][
            "coupling"
        ]
        (table,) = out.glob("*.parquet")
        assert read_header(table)[0]["prompts"] == found["prompts"]["tiny_choice"]
        digests[name] = found["prompts"]["tiny_choice"]["digest"]
    assert len(set(digests.values())) == len(digests)
    assert load_records(tmp_path)["prompting"].nunique() == len(digests)
    fewer = evaluate(
        kinds=("choice",), limit=3, arguments={"coupling_limit": 1, "coupling_seed": 5}
    )["config"]["coupling"]
    assert fewer["prompts"]["tiny_choice"]["digest"] == digests["plain"]


def test_what_was_measured_stands_under_the_table(evaluate, tmp_path):
    """Twins took half of the time and appeared nowhere; the table said "coupling 0.0613" and
    nothing else.
    """
    from lm_eval import utils

    out = tmp_path / "tables"
    arguments = {"coupling_out": str(out), "coupling_limit": 3, "coupling_untrained_seed": 1}
    found = evaluate(kinds=("choice", "winogrande"), limit=5, arguments=arguments)
    lines = utils.make_table(found).splitlines()
    start = next(
        i for i, line in enumerate(lines) if line.startswith("Coupling at K = 2, where chance is ")
    )
    heads, choice, winogrande = (
        re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 : start + 4]
    )
    assert heads == ["task", "coupling", "untrained", "documents", "prompts", "worst certificate"]
    values = found["results"]["tiny_choice"]
    assert choice[1] == f"{values['coupling,none']:.4f} ± {values['coupling_stderr,none']:.4f}"
    untrained = found["config"]["coupling"]["untrained"]["tasks"]["tiny_choice"]["measures"][
        "coupling"
    ][2]
    assert choice[2] == f"{untrained['mean']:.4f} ± {untrained['stderr']:.4f}"
    assert (choice[3:5], winogrande[3:5]) == (["3 of 5", "3"], ["3 of 5", "6"])
    assert float(choice[5]) < 1e-3 and max(map(len, lines[start:-2])) <= 100
    assert lines[-2] == f"Tables: 4 files *coupling_*.parquet in {out}"  # of the twins apart
    assert lines[-1] == f"Next: lm-eval-coupling show {out}"
    plain = utils.make_table(evaluate("hf", kinds=("choice",), limit=5))
    assert "Coupling" not in plain
    again = utils.make_table(
        evaluate(kinds=("choice",), limit=5, arguments=arguments | {"coupling_out": ""})
    )
    assert "Prompts measured before and found in the store: 3." in again
    assert "No tables were written: give --output_path" in again


def test_the_end_of_a_run_says_why_there_are_no_tables(evaluate, tmp_path, monkeypatch):
    """With a full disk one was told to give --output_path, which one had."""

    from lm_eval import utils

    def full(*_):
        raise CouplingError("got a folder without room")

    monkeypatch.setattr("lm_eval_coupling.runs.results.write_tables", full)
    found = evaluate(kinds=("choice",), limit=3, arguments={"coupling_out": str(tmp_path / "out")})
    assert (
        "No tables were written: got a folder without room. The same command"
        in utils.make_table(found)
    )


def test_the_reading_of_the_last_token_is_recorded(evaluate):
    chat = {"kinds": ("choice",), "apply_chat_template": True}
    one, other = (
        evaluate(arguments={"coupling_prompt": reading}, **chat)
        for reading in ("scored", "rendered")
    )
    assert [found["config"]["coupling"]["settings"]["prompt"] for found in (one, other)] == [
        "scored",
        "rendered",
    ]
