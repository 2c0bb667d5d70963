"""The faster of two ways to many eigenproblems is chosen by timing both, once for each shape."""

import time

import cases
import pytest
import torch

from lm_eval_coupling.numerics import device_eigh as module
from lm_eval_coupling.numerics.device_eigh import choices, device_eigh
from lm_eval_coupling.runs.options import Options
from lm_eval_coupling.runs.run import Run, ScoredModel, describe, open_session, open_store


def symmetric(batch, n, seed=0):
    A = torch.randn(batch, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return A + A.mT


@pytest.fixture
def ways(monkeypatch):
    """Stand-ins for both ways that take as long as a test says, and count their calls."""
    seconds, calls = {"rotations": 0.0, "library": 0.0}, []

    def slow(name, way):
        def run(H, settled_at):
            calls.append(name)
            time.sleep(seconds[name])
            return way(H, settled_at)

        return run

    known = {name: slow(name, way) for name, way in module.SOLVERS.items()}
    monkeypatch.setattr(module, "SOLVERS", known)
    monkeypatch.setattr(module, "_CHOICES", {})
    return seconds, calls


@pytest.mark.parametrize(("slower", "faster"), [("rotations", "library"), ("library", "rotations")])
def test_the_faster_way_is_chosen_once_for_each_shape(ways, slower, faster):
    seconds, calls = ways
    seconds[slower] = 0.2
    H = symmetric(5, 6)
    values, vectors = device_eigh(H, 1e-13)
    assert torch.allclose(values, torch.linalg.eigvalsh(H).flip(-1), atol=1e-11)
    assert torch.allclose(H @ vectors, vectors * values[:, None], atol=1e-11)
    assert choices() == {"cpu, torch.float64, 6 columns, below 8 matrices": faster}
    calls.clear()
    device_eigh(symmetric(7, 6, seed=1), 1e-13)
    assert calls == [faster]
    device_eigh(symmetric(7, 4), 1e-13)
    assert calls.count(slower) == 2 and len(choices()) == 2


@pytest.mark.parametrize("slower", ["rotations", "library"])
def test_the_record_of_a_run_names_the_solver(ways, tmp_path, slower):
    options = Options.parse(ranks="2", store=str(tmp_path / "store.sqlite"))
    model = cases.tiny_model("llama", torch.float32)
    session = open_session(options, model, open_store(options))
    scored = ScoredModel("model", "main", model.config)
    assert "eigensolvers" not in describe(Run([], 0, False), session, options, scored, ["task"])
    ways[0][slower] = 0.2
    device_eigh(symmetric(5, 6), 1e-13)
    info = describe(Run([], 0, False), session, options, scored, ["task"])
    (faster,) = {"rotations", "library"} - {slower}
    assert info["eigensolvers"] == {"cpu, torch.float64, 6 columns, below 8 matrices": faster}


def test_a_library_that_fails_is_not_chosen(ways, monkeypatch):
    def fails(H, settled_at):
        raise torch.linalg.LinAlgError("no convergence")

    ways[0]["rotations"] = 0.05
    monkeypatch.setitem(module.SOLVERS, "library", fails)
    assert device_eigh(symmetric(3, 4), 1e-13)[0].isfinite().all()
    assert [*choices().values()] == ["rotations"]


@pytest.mark.parametrize("way", [*module.SOLVERS])
def test_a_matrix_that_is_not_finite_is_nan_and_spoils_no_other(way):
    H = symmetric(3, 4)
    H[1, 0, 0] = torch.nan
    values, vectors = module.SOLVERS[way](H, 1e-13)
    assert values[1].isnan().all() and vectors[1].isnan().all()
    assert values[[0, 2]].isfinite().all() and vectors[[0, 2]].isfinite().all()
