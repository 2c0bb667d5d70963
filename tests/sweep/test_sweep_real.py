"""A sweep by lm-eval itself on this machine: killed, resumed, and read by `fit`."""

import os
import signal

import pandas as pd
import pytest
import real
from stand_in import wait_for

from lm_eval_coupling import load_records
from lm_eval_coupling.sweep import state
from lm_eval_coupling.sweep.command import survey

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="processes of POSIX systems"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    real.models_and_tasks(folder)
    return folder


def test_killed_while_it_measures_and_gone_on_with(home):
    """kill -9 of the sweep and of lm-eval: measurements are reused, the tables stay the same."""
    plan = real.write_plan(
        home, home / "killed", ["tiny-2", "tiny-long"], {"on": "local", "workers": 2}
    )
    head, long = real.start(plan), plan.units[1]
    wait_for(lambda: real.measured(plan, long) > 0, seconds=200)
    head.kill()
    os.killpg(state.read(plan.folder(long))["child"], signal.SIGKILL)
    assert real.finish(head) == -signal.SIGKILL
    wait_for(lambda: survey(plan)[0].state != "running", seconds=200)
    kept = real.measured(plan, long)

    assert real.finish(real.start(plan)) == 0
    assert (
        state.read_json(next(plan.folder(long).glob("*/results_*.json")))["config"]["coupling"][
            "reused"
        ]
        >= kept
        > 0
    )

    whole = real.write_plan(
        home, home / "whole", ["tiny-2", "tiny-long"], {"on": "local", "workers": 2}
    )
    assert real.finish(real.start(whole)) == 0
    found, expected = real.table(home / "killed"), real.table(home / "whole")
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4, atol=1e-6)
    assert set(found["released"]) == {2024.5} and set(found["family"]) == {"tiny"}
    assert len(load_records(home / "killed")) == len(load_records(home / "whole")) == 48
