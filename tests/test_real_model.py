"""The main job as a user runs it: a real model on real benchmarks, beside `--model hf`.

And numbers of the same model that another implementation found.

Needs benchmark data and a script that fetches SmolLM2-135M in a folder next to the repository, or
wherever LM_EVAL_COUPLING_REAL points: ``hf/`` is lm-eval's working directory, ``models/get_model.py
NAME DIR`` writes the model.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import forked_python
from lean_lm_eval import lean_lm_eval
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_coupling import ResidualModel, measure_coupling
from lm_eval_coupling.measures.formulas.headline import chance_level
from lm_eval_coupling.measures.registry import readings

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("LM_EVAL_COUPLING_REAL", ROOT.parent / "shared"))
TASKS = ["arc_easy", "gsm8k", "hellaswag", "winogrande"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (REAL / "hf").is_dir(), reason=f"no benchmark data in {REAL}: set LM_EVAL_COUPLING_REAL"
    ),
]

PROMPTS = [
    "What is the capital of France? The capital is",
    "Question: Which of these is a renewable resource?\nAnswer:",
    "The man put the ladder against the wall and started to",
    "Sarah was a much better surgeon than Maria so",
    "Question: Janet's ducks lay 16 eggs per day. She eats three for breakfast. "
    "How much does she make?\nAnswer:",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "Once upon a time there was a little girl who lived in a",
    "The chemical symbol for gold is",
]
CONTROLS = ("depth", "controls", "without_identity")

EVALUATE = """
import json, sys
from lm_eval_coupling.harness import plugin
plugin.install()
import lm_eval
model, store, *tasks = sys.argv[1:]
found = {}
coupling = {"coupling_limit": 2, "coupling_store": store}
for name, arguments in {"hf": {}, "coupling-hf": coupling}.items():
    results = lm_eval.simple_evaluate(
        name, model_args={"pretrained": model, "device": "cpu"} | arguments, tasks=tasks, limit=2,
        num_fewshot=0, bootstrap_iters=2, gen_kwargs="max_gen_toks=8",
    )
    kept = ("doc_id", "arguments", "resps", "filtered_resps")
    samples = {
        task: [{k: str(s[k]) for k in kept} for s in rows]
        for task, rows in results["samples"].items()
    }
    found[name] = {"results": results["results"], "samples": samples}
    found[name]["coupling"] = results["config"].get("coupling")
print("FOUND" + json.dumps(found, default=str))
"""


# Reads the file of the model as an array: a memory map takes a third longer, a word at a time.
FETCH = """
import runpy, sys
import numpy
numpy.memmap = lambda file, mode, dtype=numpy.uint8: numpy.fromfile(file, dtype)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    script = str(REAL / "models" / "get_model.py")
    fetch = [forked_python(), "-c", FETCH, script, "smollm2-135m", str(folder)]
    done = subprocess.run(fetch, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the model cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    return folder


def test_a_real_model_on_real_benchmarks(smollm2, tmp_path):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([lean_lm_eval(), str(ROOT)]),
    }
    done = subprocess.run(
        [forked_python(), "-c", EVALUATE, str(smollm2), str(tmp_path / "store.sqlite"), *TASKS],
        cwd=REAL / "hf",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("FOUND")[1])
    hf, ours = found["hf"], found["coupling-hf"]
    assert ours["samples"] == hf["samples"]
    info = ours["coupling"]
    assert (info["measured"], info["failed"], info["headline_rank"]) == (8, 0, 10)
    assert info["worst_certificate"] < 1e-4
    chance = 1 - chance_level(10)
    for task, row in ours["results"].items():
        value = row.pop("coupling,none")
        assert row.pop("coupling_stderr,none") is not None
        assert row == hf["results"][task]
        assert chance + 0.03 < value < 0.4, task  # far from chance, as a trained model is


def test_numbers_of_an_independent_audit_of_smollm2(smollm2):
    """Found by another implementation: autograd Jacobians and full SVDs in float64."""
    hf_model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model = ResidualModel.wrap(hf_model, AutoTokenizer.from_pretrained(smollm2))
    records = measure_coupling(model, PROMPTS, ranks=[10], measures=CONTROLS, progress=False)
    found = {
        name: np.mean([readings()[name].read(record, 10) for record in records])
        for name in ("coupling", "deflated", "rotated", "without_identity", "erasing")
    }
    expected = {
        "coupling": 0.165,
        "deflated": 0.181,
        "rotated": 0.138,
        "without_identity": 0.112,
        "erasing": -0.24,
    }
    assert found == pytest.approx(expected, abs=0.01)
