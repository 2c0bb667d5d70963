"""Secrets of a plan reach the runs and no file; what else would write one is refused."""

import dataclasses
import pickle

import pytest
from stand_in import STAND_IN

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.sweep import plan as plans
from lm_eval_coupling.sweep.job import UnitJob
from lm_eval_coupling.sweep.plan_secrets import HIDDEN, hide, secret_in, secrets_in
from lm_eval_coupling.sweep.work import Worker

TOKEN, KEY = "hf_" + "aB3" * 8, "0123456789abcdef-key"


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("token", "anything", "anything"),
        ("use_auth_token", TOKEN, TOKEN),
        ("HF_TOKEN", TOKEN, TOKEN),
        ("OPENAI_API_KEY", "x1", "x1"),
        ("AWS_SECRET_ACCESS_KEY", "x1", "x1"),
        ("db_password", "x1", "x1"),
        ("HTTPS_PROXY", "http://me:pass@proxy:8080", "pass"),
        ("anything", f"see {TOKEN}", TOKEN),
        ("note", "ghp_" + "a" * 36, "ghp_" + "a" * 36),
        ("token", True, None),
        ("use_auth_token", "True", None),
        ("pad_token", "<|pad|>", None),
        ("coupling_tokens", "last8", None),
        ("add_bos_token", "true", None),
        ("training_tokens", "300e9", None),
        ("tokenizer", "org/name", None),
        ("max_tokens", "512", None),
        ("author", "somebody", None),
    ],
)
def test_what_is_a_secret(name, value, secret):
    assert secret_in(name, value) == secret


def test_secrets_are_seen_inside_lists_and_texts_of_arguments():
    content = {"a": [{"api_key": "k1"}], "hf_hub_log_args": f"org=x,token={TOKEN}"}
    assert set(secrets_in(content)) == {"k1", TOKEN}
    assert hide(f"x{TOKEN}{TOKEN[:-1]}", [TOKEN[:-1], TOKEN]) == f"x{HIDDEN}{HIDDEN}"


@pytest.fixture
def plan(folder_of, make_plan):
    names = ["HF_TOKEN", "WANDB_API_KEY"]
    model = {"model": folder_of("a", say=names), "args": f"dtype=float32,token={TOKEN}"}
    run = {"keep_scores": True, "environment": {"WANDB_API_KEY": KEY, "PLAIN": "seen"}}
    return make_plan([model], run=run)


def texts(folder):
    return [file.read_bytes() for file in folder.rglob("*") if file.is_file()]


def test_runs_see_secrets_and_no_file_holds_one(plan, monkeypatch):
    """They stood in lm_eval.yaml, in the log, in the results' note and in the pickles of jobs."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert plan.secrets == {"HF_TOKEN": TOKEN, "WANDB_API_KEY": KEY}
    assert plan.run.environment == {"PLAIN": "seen"}
    assert TOKEN not in repr(plan) and KEY not in repr(plan)
    worker = Worker(plan, command=STAND_IN)
    assert worker.environment["HF_TOKEN"] == TOKEN
    assert worker.run(plan.units[0]).state == "done"
    log = (plan.folder(plan.units[0]) / "log.txt").read_text()
    assert f"HF_TOKEN is {HIDDEN}" in log and f"WANDB_API_KEY is {HIDDEN}" in log
    assert not any(TOKEN.encode() in text or KEY.encode() in text for text in texts(plan.output))


def test_a_failure_that_prints_a_secret_is_told_without_it(plan, folder_of):
    folder_of("a", fail=f"ValueError: no access with {TOKEN}")
    outcome = Worker(plan, command=STAND_IN).run(plan.units[0])
    assert outcome.reason == f"ValueError: no access with {HIDDEN}"
    assert not any(TOKEN.encode() in text for text in texts(plan.output))


def test_the_pickle_of_a_job_holds_none_and_the_job_finds_them(plan, monkeypatch):
    pytest.importorskip("submitit", reason="jobs go through submitit, of the extra `slurm`")
    text = pickle.dumps(UnitJob(plan, plan.units[0], command=STAND_IN))
    assert TOKEN.encode() not in text and KEY.encode() not in text
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    job = pickle.loads(text)
    assert job()["state"] == "done" and job.plan.secrets == plan.secrets
    assert TOKEN.encode() not in pickle.dumps(job)


def test_a_changed_token_is_no_other_unit(folder_of, make_plan):
    model = folder_of("a")
    first, second = (
        make_plan([{"model": model, "args": {"token": token}}]) for token in (TOKEN, TOKEN + "x")
    )
    assert first.units == second.units
    assert dataclasses.replace(first, secrets={}) == dataclasses.replace(second, secrets={})


@pytest.mark.parametrize(
    "parts",
    [
        {"models": [{"model": "a", "args": {"api_key": KEY}}]},
        {"lm_eval": {"hf_hub_log_args": f"hub_results_org=x,token={KEY}"}},
        {"lm_eval": {"wandb_args": {"api_key": KEY}}},
        {"coupling": {"password": KEY}},
        {"models": [{"model": m, "args": f"token={t}"} for m, t in (("a", TOKEN), ("b", KEY))]},
        {"models": [{"model": "a", "args": f"token {TOKEN}"}]},
        {"run": {"environment": {"bad name": TOKEN}, "workers": TOKEN}},
    ],
)  # fmt: skip
def test_what_would_write_a_secret_is_refused_without_repeating_it(make_plan, parts):
    with pytest.raises(CouplingError) as error:
        make_plan(**{"models": ["a"]} | parts)
    assert KEY not in str(error.value) and TOKEN not in str(error.value)
    assert isinstance(error.value, plans.PlanError)
