"""Samples that a server scored are measured with the weights that it served."""

import pytest
import tiny
from completions_server import Completions, serving
from evaluations import evaluate_and_log, written
from test_measure_samples import coupling_arguments, equal_records, evaluate, measure
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_coupling import load_records
from lm_eval_coupling.errors import CouplingError

pytest.importorskip("tenacity", reason="lm-eval's local-completions needs it")
TASKS = ["tiny_choice", "tiny_generate", "tiny_blimp"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.save_model(folder / "model")
    for kind in ("choice", "generate", "blimp"):
        tiny.save_task(folder / "tasks", kind)
    return folder


@pytest.fixture(scope="module")
def served(home, tmp_path_factory):
    """An evaluation by `local-completions`, whose server knows nothing of lm-eval."""
    out = tmp_path_factory.mktemp("served")
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    with serving(Completions(model, tokenizer)) as address:
        evaluate_and_log(
            home,
            out,
            model="local-completions",
            model_args={
                "model": str(home / "model"),
                "base_url": address,
                "tokenizer_backend": "huggingface",
                "max_length": 513,  # of which lm-eval keeps one for itself
            },
            tasks=TASKS,
        )
    return out


def test_values_and_scores_are_those_of_the_run_on_the_same_weights(home, served, tmp_path):
    evaluate(home, tmp_path / "run", "coupling-hf", TASKS, coupling_arguments(tmp_path))
    measure(home, served, tmp_path / "out")
    equal_records(load_records(tmp_path / "run"), load_records(tmp_path / "out"))
    own, measured = written(tmp_path / "run"), written(tmp_path / "out")
    for task in ("tiny_choice", "tiny_blimp"):
        assert measured["results"][task]["acc,none"] == own["results"][task]["acc,none"]
        assert measured["results"][task]["coupling,none"] == own["results"][task]["coupling,none"]


def test_what_the_server_wrote_is_measured(home, served, tmp_path):
    out = tmp_path / "out"
    measure(home, served, out, coupling="ranks=2+4,limit=3,position=generated-last")
    records = load_records(out)
    records = records[records.task == "tiny_generate"]
    assert len(records) == 3 and set(records.kind) == {"generated"}
    assert records.reason.isna().all()


def test_a_token_at_the_beginning_that_the_server_did_not_get_is_refused(home, served, tmp_path):
    with pytest.raises(CouplingError, match=r"add_bos_token \(evaluated False, loaded True\)"):
        measure(home, served, tmp_path / "out", model_args="add_bos_token=True")
