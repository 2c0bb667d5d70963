"""`coupling-hf` through lm-eval: scores of `hf` bit for bit, values where they belong, failures that cost nothing."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import cases
import numpy as np
import pytest
import reference
import tiny
import torch

from lm_eval_coupling import load_records
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.harness.lm import CouplingLM
from lm_eval_coupling.jacobians import engine as jacobians
from lm_eval_coupling.jacobians.engine import block_jacobians
from lm_eval_coupling.measuring import prompt as measure
from lm_eval_coupling.measuring.prompt import PromptCoupling
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.residual.untrained import untrained_twin

lm_eval = pytest.importorskip("lm_eval")
HOOK = Path(__file__).parents[2] / "hook"
KINDS = ("choice", "generate", "winogrande", "blimp", "rolling")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for kind in KINDS:
        tiny.save_task(folder / "tasks", kind)
    tiny.save_model(folder / "float32")
    tiny.save_model(folder / "bfloat16", dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def manager(home):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(home / "tasks"), include_defaults=False)


@pytest.fixture
def evaluate(home, manager, tmp_path):
    """Run lm-eval in this process."""

    def run(model="coupling-hf", kinds=("choice", "generate"), pretrained=None, arguments=None, **options):
        from lm_eval_coupling.harness import plugin

        plugin.install()
        given = {"pretrained": str(pretrained or home / "float32"), "device": "cpu"} | (arguments or {})
        if model == "coupling-hf":
            defaults = {"coupling_ranks": "2+4", "coupling_limit": 2, "coupling_store": str(tmp_path / "store.sqlite")}
            given = defaults | given
        names = [f"tiny_{kind}" for kind in kinds]
        return lm_eval.simple_evaluate(
            model=model, model_args=given, tasks=names, task_manager=manager, bootstrap_iters=2, **options
        )

    return run


def scores(results):
    """Metrics and samples, as far as `hf` has them."""
    metrics = {
        task: {k: v for k, v in row.items() if not k.startswith("coupling")} for task, row in results["results"].items()
    }
    kept = ("doc_id", "arguments", "resps", "filtered_resps", "acc", "exact_match")
    samples = {t: [{k: str(s[k]) for k in kept if k in s} for s in rows] for t, rows in results["samples"].items()}
    return metrics, samples


def adapter(home, folder):
    """A LoRA adapter that changes the model's function."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(home / "float32")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("pretrained", "options"),
    [
        ("float32", {}),
        ("bfloat16", {}),
        ("float32", {"batch_size": 3}),
        ("bfloat16", {"batch_size": "auto", "max_batch_size": 4}),
        ("float32", {"limit": 3}),
        ("float32", {"samples": {"tiny_choice": [1, 5], "tiny_generate": [0, 2, 6]}}),
        ("float32", {"num_fewshot": 1, "kinds": ("choice",)}),
        ("float32", {"apply_chat_template": True}),
        ("float32", {"kinds": KINDS}),
    ],
    ids=lambda value: str(value),
)
def test_scores_are_those_of_hf(evaluate, home, pretrained, options):
    expected = evaluate("hf", pretrained=home / pretrained, **options)
    found = evaluate("coupling-hf", pretrained=home / pretrained, **options)
    assert scores(found) == scores(expected)
    assert found["config"]["coupling"]["failed"] == 0
    size = {name: found["config"]["coupling"][name] for name in ("n_layers", "d_model", "n_heads", "vocab_size")}
    assert size == {"n_layers": 4, "d_model": 32, "n_heads": 4, "vocab_size": 259}
    for row in found["results"].values():
        assert 0 < row["coupling,none"] < 1


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


def test_requests_answered_from_the_cache_are_measured_all_the_same(evaluate, tmp_path):
    first = evaluate(use_cache=str(tmp_path / "cache"))
    again = evaluate(use_cache=str(tmp_path / "cache"), arguments={"coupling_store": str(tmp_path / "other.sqlite")})
    assert scores(again) == scores(first)
    assert again["config"]["coupling"]["reused"] == first["config"]["coupling"]["reused"]
    for task, row in first["results"].items():
        assert again["results"][task]["coupling,none"] == pytest.approx(row["coupling,none"], rel=1e-6)


def test_an_adapter_is_scored_and_measured(evaluate, home, tmp_path):
    arguments = {"peft": adapter(home, tmp_path / "adapter")}
    expected, found = (evaluate(model, arguments=arguments, kinds=("choice",)) for model in ("hf", "coupling-hf"))
    plain = evaluate(kinds=("choice",))
    assert scores(found) == scores(expected)
    assert scores(found) != scores(plain)
    value, without = (r["results"]["tiny_choice"]["coupling,none"] for r in (found, plain))
    assert value != pytest.approx(without, rel=1e-3)


def test_an_adapters_jacobians_are_those_of_the_merged_weights(home, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(home / "float32").eval()
    model = peft.PeftModel.from_pretrained(base, adapter(home, tmp_path / "adapter")).eval()
    tokens = cases.tiny_tokens(7)
    found = block_jacobians(ResidualModel.wrap(model), tokens).jacobians
    merged = ResidualModel.wrap(model.merge_and_unload())
    assert torch.allclose(found, block_jacobians(merged, tokens).jacobians, atol=1e-5)


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


def test_a_model_split_over_devices_is_scored_and_measured(evaluate, home, tmp_path):
    """Without a GPU, accelerate splits over the host and the disk."""
    arguments = {"parallelize": True, "offload_folder": str(tmp_path / "offload")}
    expected, found = (evaluate(model, kinds=("choice",), arguments=dict(arguments)) for model in ("hf", "coupling-hf"))
    assert scores(found) == scores(expected)
    plain = evaluate(kinds=("choice",))
    assert plain["config"]["coupling"]["fingerprint"] == found["config"]["coupling"]["fingerprint"]
    assert plain["config"]["coupling"]["reused"] == found["config"]["coupling"]["measured"] == 2
    elsewhere = arguments | {"coupling_store": str(tmp_path / "other.sqlite")}
    if not torch.cuda.is_available():
        lm = CouplingLM(str(home / "float32"), device="cpu", coupling_ranks="2", **elsewhere)
        assert all(p.device.type == "meta" for p in lm.model.parameters())
    again = evaluate(kinds=("choice",), arguments=elsewhere)["results"]["tiny_choice"]["coupling,none"]
    assert again == pytest.approx(plain["results"]["tiny_choice"]["coupling,none"], abs=1e-5)


def test_a_packed_checkpoint_is_scored_and_measured(evaluate, home, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install '.[quantised]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    wide = tiny.save_model(tmp_path / "wide", hidden_size=64, intermediate_size=128)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = AutoModelForCausalLM.from_pretrained(wide, quantization_config=config, device_map={"": "cpu"})
    packed.save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(wide).save_pretrained(tmp_path / "packed")
    expected, found, dense = (
        evaluate(model, kinds=("choice",), pretrained=pretrained)
        for model, pretrained in (("hf", tmp_path / "packed"), ("coupling-hf", tmp_path / "packed"), ("coupling-hf", wide))
    )
    assert scores(found) == scores(expected)
    info = found["config"]["coupling"]
    assert (info["measured"], info["failed"]) == (2, 0) and info["worst_certificate"] < 1e-5
    assert info["fingerprint"] != dense["config"]["coupling"]["fingerprint"]
    assert info["n_params"] == dense["config"]["coupling"]["n_params"]


def test_unmeasured_documents_have_no_value(evaluate):
    found = evaluate(kinds=("choice",), arguments={"coupling_limit": 3})
    values = [s["coupling"] for s in found["samples"]["tiny_choice"]]
    known = [v for v in values if v is not None]
    assert len(values) == 8 and len(known) == 3
    row = found["results"]["tiny_choice"]
    assert row["coupling,none"] == pytest.approx(np.mean(known))
    assert row["coupling_stderr,none"] == pytest.approx(np.std(known, ddof=1) / np.sqrt(3))


def test_limit_zero_only_scores(evaluate):
    found = evaluate(arguments={"coupling_limit": 0})
    assert scores(found) == scores(evaluate("hf"))
    assert "coupling" not in json.dumps(found["results"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coupling_rank": "4"}, "unknown argument coupling_rank, did you mean coupling_ranks"),
        ({"coupling_ranks": "4+64"}, "rank 64 for a model with d_model = 32"),
        ({"coupling_ranks": "some"}, "coupling_ranks='some', expected a whole number"),
        ({"coupling_measures": "depht"}, "unknown measure 'depht', expected any of depth"),
        ({"coupling_dtype": "float16"}, "expected one of float32, float64"),
        ({"coupling_limit": -1}, "coupling_limit=-1"),
        ({"coupling_method": "guess"}, "expected one of auto, closed"),
        ({"tp_plan": "auto"}, "got tp_plan, which splits every weight over processes"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_sentence(home, tmp_path, arguments, message):
    with pytest.raises(CouplingError, match=message):
        given = {"coupling_ranks": "2+4", "coupling_store": str(tmp_path / "s.sqlite")} | arguments
        CouplingLM(str(home / "float32"), device="cpu", **given)


@pytest.fixture
def hub(home, tmp_path, monkeypatch):
    """A cache with one model of the hub, and no network."""
    from huggingface_hub import constants

    folder = tmp_path / "hub" / "models--someone--tiny"
    (folder / "snapshots").mkdir(parents=True)
    (folder / "snapshots" / SHA).symlink_to(home / "float32")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(SHA)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


SHA = "0123456789" * 4


def test_a_revision_is_recorded(evaluate, hub):
    found = evaluate(kinds=("choice",), pretrained="someone/tiny", arguments={"revision": SHA})
    assert found["config"]["coupling"]["revision"] == SHA
    assert found["config"]["coupling"]["measured"] == 2


@pytest.mark.parametrize(
    ("pretrained", "arguments", "message"),
    [
        ("someone/tiny", {"revision": "v2"}, "got model 'someone/tiny', revision 'v2', which transformers cannot load"),
        ("someone/else", {}, "got model 'someone/else', revision 'main', which transformers cannot load"),
    ],
    ids=["revision", "model"],
)
def test_what_is_not_there_is_said_in_one_sentence(evaluate, hub, pretrained, arguments, message):
    with pytest.raises(CouplingError, match=message) as caught:
        evaluate(pretrained=pretrained, arguments=arguments)
    assert "\n" not in str(caught.value)


def test_tables_are_written_for_an_evaluation_from_python(evaluate, tmp_path):
    """lm-eval itself saves nothing where it has no EvaluationTracker; we do where a folder is asked for."""
    found = evaluate(kinds=("choice",), arguments={"coupling_out": str(tmp_path / "tables")})
    frame = load_records(tmp_path / "tables")
    assert sorted(frame.doc_hash) == sorted(s["doc_hash"] for s in found["samples"]["tiny_choice"] if s["coupling"])


def test_an_encoder_is_refused(home, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, pad_token_id=0
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tiny._tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(CouplingError, match="got a Bert.*, an encoder, expected a decoder-only language model"):
        CouplingLM(
            str(tmp_path / "bert"), device="cpu", backend="causal", coupling_ranks="2", coupling_store=str(tmp_path / "s")
        )


def test_text_needs_a_tokenizer(home):
    from transformers import AutoModelForCausalLM

    model = ResidualModel.wrap(AutoModelForCausalLM.from_pretrained(home / "float32"))
    with pytest.raises(CouplingError, match="without a tokenizer"):
        measure.measure_coupling(model, ["some text"], ranks=(2,))


def test_out_of_memory_costs_the_document_not_the_run(evaluate, monkeypatch):
    right = jacobians.certified_jacobians
    longest = len("Question: What colour is the grass?\nAnswer:")  # in bytes, which are tokens

    def scarce(calls, *args):
        if any(call.seq == longest for call in calls):
            raise torch.OutOfMemoryError("no memory")
        return right(calls, *args)

    monkeypatch.setattr(jacobians, "certified_jacobians", scarce)
    found = evaluate(kinds=("choice",), arguments={"coupling_limit": "all"})
    monkeypatch.undo()
    info = found["config"]["coupling"]
    too_long = sum(len(s["arguments"][0][0]) == longest for s in found["samples"]["tiny_choice"])
    assert (info["measured"], info["failed"]) == (8 - too_long, too_long) and 0 < too_long < 8
    assert scores(found) == scores(evaluate("hf", kinds=("choice",)))
    assert sum(s["coupling"] is None for s in found["samples"]["tiny_choice"]) == too_long


def test_weights_that_are_not_finite_keep_their_scores(evaluate, home, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(home / "float32")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(home / "float32").save_pretrained(tmp_path / "broken")
    found = evaluate(kinds=("choice",), pretrained=tmp_path / "broken")
    expected = evaluate("hf", kinds=("choice",), pretrained=tmp_path / "broken")
    assert scores(found)[1] == scores(expected)[1]
    info = found["config"]["coupling"]
    assert info["measured"] == 0 and info["failed"] == 2
    assert "block 2 is not finite" in json.dumps(info["tasks"])


def test_a_store_that_cannot_be_written_costs_nothing(evaluate, monkeypatch):
    from lm_eval_coupling.measuring.store import MeasurementStore

    def full(self, key, columns):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(MeasurementStore, "put", full)
    assert evaluate(kinds=("choice",))["config"]["coupling"]["measured"] == 2


def test_interrupting_the_measurement_keeps_the_scores(evaluate, monkeypatch):
    right, calls = measure.measure_prompts, []
    monkeypatch.setattr(measure, "PROMPTS", 2)

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr("lm_eval_coupling.measuring.session.measure_prompts", interrupted)
    found = evaluate(kinds=("choice",), arguments={"coupling_limit": "all"})
    monkeypatch.undo()
    assert scores(found) == scores(evaluate("hf", kinds=("choice",)))
    info = found["config"]["coupling"]
    assert info["interrupted"] and 0 < info["measured"] < 8


def test_a_prompt_too_long_for_the_model_is_cut_as_for_scoring(evaluate):
    found = evaluate(kinds=("rolling", "choice"), arguments={"max_length": 24})
    assert scores(found) == scores(evaluate("hf", kinds=("rolling", "choice"), arguments={"max_length": 24}))
    assert found["config"]["coupling"]["failed"] == 0


def environment():
    kept = {k: v for k, v in os.environ.items() if k != "LM_EVAL_COUPLING_NO_HOOK"}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOOK.parent)}


def run(words):
    done = subprocess.run(list(map(str, words)), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def written(out):
    (results,) = Path(out).rglob("results_*.json")
    return json.loads(results.read_text())


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


# Without upstream's tasks, whose index takes ten seconds to build.
EVALUATE = """
import sys
from lm_eval_coupling.harness import plugin
plugin.install(); import lm_eval; from lm_eval.loggers import EvaluationTracker; from lm_eval.tasks import TaskManager
folder, kind, dtype, out, store = sys.argv[1:]
arguments = dict(pretrained=folder + "/float32", device="cpu", coupling_ranks="2+4", coupling_limit="all")
arguments |= dict(coupling_dtype=dtype, coupling_store=store)
tracker = EvaluationTracker(output_path=out)
found = lm_eval.simple_evaluate(
    model="coupling-hf", model_args=arguments, tasks=["tiny_" + kind], bootstrap_iters=2, evaluation_tracker=tracker,
    task_manager=TaskManager(include_path=folder + "/tasks", include_defaults=False),
)
if found:
    tracker.save_results_aggregated(results=found, samples=found.pop("samples"))
"""


def evaluation(home, kind, out, store, dtype="float32", launcher=()):
    """A fresh process, or several."""
    script = home / "evaluate.py"
    script.write_text(EVALUATE)
    return [str(word) for word in (sys.executable, *launcher, script, home, kind, dtype, out, store)]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(home, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29591")
    run(evaluation(home, "choice", tmp_path / "one", tmp_path / "one.sqlite"))
    run(evaluation(home, "choice", tmp_path / "two", tmp_path / "two.sqlite", launcher=launcher))
    one, two = (load_records(tmp_path / name).set_index("doc_hash").sort_index() for name in ("one", "two"))
    assert list(one.index) == list(two.index) and len(two) == 8
    assert len(stored(tmp_path / "two.sqlite")) == 8
    for name in ("normalized_miscoupling", "singular_values"):
        for a, b in zip(one[name], two[name], strict=True):
            assert np.allclose(numbers(a), numbers(b), rtol=1e-4, atol=1e-5)
    first, second = written(tmp_path / "one")["results"], written(tmp_path / "two")["results"]
    assert first["tiny_choice"]["acc,none"] == second["tiny_choice"]["acc,none"]
    assert first["tiny_choice"]["coupling,none"] == pytest.approx(second["tiny_choice"]["coupling,none"], abs=1e-5)


def numbers(nested):
    """Nested arrays as Parquet hands them back, as one."""
    return np.concatenate([numbers(x) for x in nested]) if np.ndim(nested[0]) else np.asarray(nested, dtype=float)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(home, tmp_path):
    store = tmp_path / "s.sqlite"
    words = evaluation(home, "winogrande", tmp_path / "out", store, dtype="float64")
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(stored(store)) < 2 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = stored(store)
    assert 2 <= len(before) < 16
    run(words)
    after = stored(store)
    assert len(after) == 16  # eight documents, two contexts each
    assert all(after[key] == when for key, when in before.items())
    assert written(tmp_path / "out")["config"]["coupling"]["reused"] >= len(before)


def stored(store):
    """Key and time of writing of every measurement."""
    if not store.exists():
        return {}
    with sqlite3.connect(store) as db:
        try:
            return dict(db.execute("SELECT key, created FROM measurements"))
        except sqlite3.OperationalError:
            return {}


def test_the_untrained_twin_is_measured_on_the_same_prompts(evaluate, tmp_path):
    """Beside the trained weights, never among them; the same for the same seed and found again in the store."""
    arguments = {"coupling_limit": "all", "coupling_untrained": 3, "coupling_out": str(tmp_path / "tables")}
    found = evaluate(kinds=("choice",), arguments=arguments)
    plain = evaluate(kinds=("choice",), arguments={"coupling_limit": "all"})
    info = found["config"]["coupling"]
    assert info["untrained"]["seed"] == 3 and info["reused"] == 0
    assert info["tasks"] == plain["config"]["coupling"]["tasks"]
    assert found["results"]["tiny_choice"]["coupling,none"] == plain["results"]["tiny_choice"]["coupling,none"]
    both = load_records(tmp_path / "tables", weights="all").set_index(["weights", "doc_hash"])
    trained, untrained = both.loc["trained"], both.loc["untrained"]
    assert set(trained.index) == set(untrained.index) and len(trained) == len(untrained) == 8
    mean = info["untrained"]["tasks"]["tiny_choice"]["measures"]["coupling"][2]["mean"]
    values = [PromptCoupling.from_columns(row).coupling(2) for row in untrained.to_dict("records")]
    assert mean == pytest.approx(np.mean(values), rel=1e-6)
    assert not np.allclose(trained.singular_values.iloc[0], untrained.singular_values.loc[trained.index[0]], rtol=0.1)
    again = evaluate(kinds=("choice",), arguments=arguments)["config"]["coupling"]
    assert again["reused"] == 8 and again["untrained"]["tasks"] == info["untrained"]["tasks"]


def test_untrained_weights_are_those_of_the_seed_alone(home):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / "float32")
    torch.manual_seed(1)
    one = untrained_twin(model, 3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two, three = untrained_twin(model, 3), untrained_twin(model, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), three.parameters(), strict=True))
    assert [p.shape for p in one.parameters()] == [p.shape for p in model.parameters()]
