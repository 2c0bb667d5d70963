"""A wrong argument of any public function is one sentence that names it, or what was meant."""

import os
import subprocess
from pathlib import Path

from forked import forked_python

import lm_eval_coupling


def test_a_wrong_argument_is_named_in_one_sentence():
    """A layer as a number was a raw TypeError, a flag of "no" true, a column's name its letters."""
    tests = Path(__file__).parent / "support"
    paths = os.pathsep.join([str(tests.parents[1]), str(tests)])
    environment = os.environ | {
        "PYTHONPATH": paths,
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }
    words = [forked_python(), str(tests / "wrong_arguments.py")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-3000:]


def test_no_public_function_is_left_out():
    """Exports are in the table above, except for classes that functions only return."""
    tried = {
        "block_jacobians",
        "top_singular",
        "chance_level",
        "coupling_matrix",
        "miscoupling",
        "miscoupling_to",
    }
    tried |= {
        "measure_coupling",
        "run_coupling_hf",
        "load_records",
        "load_runs",
        "ResidualModel",
        "PromptCoupling",
    }
    assert set(lm_eval_coupling.__all__) == tried | {
        "BlockJacobians",
        "SingularTriplets",
        "CouplingError",
    }
