"""Every benchmark runs, on a tiny model; the baseline that speed is measured against finds the same
coupling as we do.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from lm_eval_coupling import ResidualModel, measure_coupling

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """A script, by name, as it is when run: with its own folder on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model"))


def results(script, out, *arguments):
    script.main([*map(str, arguments), "--threads", "1", "--quick", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["machine"]["threads"] == 1 and found["machine"]["processor"] is not None
    return found["results"]


@pytest.mark.slow
def test_two_checkouts_in_turn(benchmark, model, tmp_path):
    script = benchmark("in_turn")
    found = results(
        script,
        tmp_path / "i.json",
        script.HERE,
        "--model",
        model,
        "--tokens",
        5,
        "--prompts",
        2,
        "--ranks",
        4,
    )
    assert [row[""] for row in found["rows"]] == ["5 tokens, 1 together", "5 tokens, 2 together"]
    assert all(row["here / other"] == row["here, s"] / row["other, s"] > 0 for row in found["rows"])


@pytest.mark.slow
def test_a_busy_machine(benchmark, model, tmp_path):
    arguments = "--tokens 5 --prompts 2 --ranks 4 --busy 1".split()
    found = results(benchmark("busy"), tmp_path / "b.json", "--model", model, *arguments)
    (row,) = found["rows"]
    assert found["fair_share"] >= 1 and row["loaded / fair share"] > 0 and row["quiet, CPU s"] > 0


def test_what_is_no_checkout_is_refused(benchmark, model, tmp_path):
    with pytest.raises(SystemExit, match="expected the folder of another checkout"):
        benchmark("in_turn").main([str(tmp_path), "--model", str(model)])


class TestAgainstRelease:
    def test_both_find_the_same(self, benchmark, model, tmp_path):
        script = benchmark("against_release")
        arguments = (
            "--model",
            model,
            "--tokens",
            1,
            30,
            "--ranks",
            2,
            4,
            "--layers",
            4,
            "--prompts",
            3,
        )
        for found in results(script, tmp_path / "a.json", *arguments):
            assert not found["jacobians_extrapolated"] and found["methods"] == ["closed"]
            agreement = found["agreement"]
            assert agreement["jacobian_relative_error"] < 1e-5
            for rank in (2, 4):
                same = agreement[f"normalized_miscoupling_{rank}"]
                assert 0.1 < same["mean_release"] < 1
                # Singular vectors of near values turn by float32 rounding over their gap.
                assert same["largest_difference"] < 1e-3 and same["mean_difference"] < 1e-4
                assert agreement[f"absolute_ujv_{rank}"]["mean_difference"] < 1e-4
                assert agreement[f"absolute_vju_{rank}"]["mean_difference"] < 1e-4
            for ours, together in zip(found["ours"], (1, 3), strict=True):
                assert ours["together"] == together
                assert all(
                    ours["ratio"][stage] > 0
                    for stage in ("trace", "jacobians", "spectra", "pairs", "total")
                )

    def test_layers_left_out_are_extrapolated(self, benchmark, model, tmp_path):
        script = benchmark("against_release")
        arguments = ("--model", model, "--tokens", 5, "--ranks", 4, "--layers", 2)
        (found,) = results(script, tmp_path / "a.json", *arguments)
        assert found["jacobians_extrapolated"] and found["layers_differentiated_by_baseline"] == [
            0,
            3,
        ]
        assert found["agreement"]["jacobian_relative_error"] < 1e-5

    def test_a_wrong_jacobian_would_be_seen(self, benchmark, model):
        """The baseline differentiates the model itself: it cannot agree by construction."""
        script, release, models = (
            benchmark(name) for name in ("against_release", "release", "models")
        )
        loaded, tokenizer = models.load(model)
        tokens = models.prompt(7, 100, tokenizer)
        (record,) = measure_coupling(
            ResidualModel.wrap(loaded),
            [tokens],
            ranks=(4,),
            measures=("depth", "swapped"),
            progress=False,
        )
        wrong = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(0))
        their = release.run(loaded, tokens, [4], [0, 1, 2, 3], wrong)
        settings = SimpleNamespace(ranks=(4,))
        found = script.agreement(record, wrong, their, settings, [0, 1, 2, 3])
        assert found["jacobian_relative_error"] > 0.1
        assert found["normalized_miscoupling_4"]["largest_difference"] < 1e-3

    def test_bases_belong_to_the_second_layer(self, benchmark):
        """score[l][l'] by hand: two diagonal Jacobians of which the second orders its axes the
        other way.
        """
        release = benchmark("release")
        J = torch.stack(
            [torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.diag(torch.tensor([1.0, 2.0, 4.0]))]
        )
        parts = [torch.linalg.svd(matrix) for matrix in J]
        U, S, V = (torch.stack(p) for p in zip(*((u, s, vt.T) for u, s, vt in parts), strict=True))
        found = release.all_pairs(J, U, S, V, [2])["ujv"][2]
        expected = [
            [0, 2 / 13**0.5],
            [3 / 20**0.5, 0],
        ]  # |diag(1, 2) − diag(3, 2)|, |diag(1, 2) − diag(4, 2)|
        np.testing.assert_allclose(
            [[norm for norm, _ in row] for row in found], expected, atol=1e-6
        )


def test_floors(benchmark, model, tmp_path):
    arguments = ("--model", model, "--tokens", 6, "--ranks", 4, "--repeats", 1)
    found = results(benchmark("floors"), tmp_path / "f.json", *arguments)
    assert found["gflops_per_second"] > 0
    assert [row["stage"] for row in found["stages"]] == [
        "forward",
        "certificate",
        "jacobians",
        "spectra",
        "pairs",
    ]
    assert all(row["floor"] > 0 for row in found["stages"])


def test_products_are_those_of_a_real_forward_and_backward_pass(benchmark, model):
    """Counted by torch in one block, without the language-model head."""
    from torch.utils.flop_counter import FlopCounterMode

    products, models, release = (benchmark(name) for name in ("products", "models", "release"))
    loaded, _ = models.load(model)
    shape, tokens = products.Shape.of(loaded.config), 11
    function, x = release.block_calls(loaded, list(range(tokens)))[0]
    x = x.clone().requires_grad_(True)
    with FlopCounterMode(display=False) as forward:
        y = function(x)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y.sum(), x)
    assert forward.get_total_flops() == sum(p.flops for p in products.forward(shape, tokens))
    assert backward.get_total_flops() == sum(p.flops for p in products.certificate(shape, tokens))


def test_growth(benchmark, tmp_path):
    sizes = ("--tokens", 4, 16, "--widths", 64, 128, "--layers", 1, 2, "--prompts", 1, 2)
    base = ("--length", 4, "--width", 64, "--depth", 2, "--ranks", 4, "--repeats", 1)
    found = results(benchmark("growth"), tmp_path / "growth.json", *sizes, *base)
    assert {
        axis: [row["size"] for row in found[axis]["rows"]]
        for axis in ("tokens", "d_model", "layers", "prompts")
    } == {
        "tokens": [4, 16],
        "d_model": [64, 128],
        "layers": [1, 2],
        "prompts": [1, 2],
    }
    assert found["measuring_ratio"]["tokens"] == [4, 16] and found["measuring_ratio"]["ratio"] > 0


def test_exponent_of_known_growth(benchmark):
    growth = benchmark("growth")
    names = (*growth.STAGES, "measuring", "total")
    rows = [{"size": n} | dict.fromkeys(names, 0.1 * n**1.5) for n in (2, 4, 8)]
    assert growth.exponents(rows) == pytest.approx(dict.fromkeys(names, 1.5))


@pytest.mark.slow
def test_memory_of_a_process_of_its_own(benchmark, model):
    options = SimpleNamespace(model=model, threads=1, device="cpu", dtype="float32", ranks=[4])
    found = benchmark("memory").in_a_process(options, "ours", 6)
    assert found["tokens"] == "6" and 50 < found["peak"] < 4000
    assert -50 < found["added"] < 500


@pytest.mark.parametrize("procedure", ["forward", "ours", "release"])
def test_memory_of_each_procedure(benchmark, model, procedure, capsys):
    arguments = [
        "--model",
        model,
        "--tokens",
        "6",
        "--ranks",
        "4",
        "--threads",
        "1",
        "--procedure",
        procedure,
    ]
    benchmark("memory").main(arguments)
    assert json.loads(capsys.readouterr().out)["procedure"] == procedure


class TestOverhead:
    @pytest.mark.slow
    def test_a_measured_run(self, benchmark, model, tmp_path):
        options = SimpleNamespace(
            model=model,
            data=tmp_path,
            task=tiny.save_task(tmp_path, "choice"),
            include_path=tmp_path,
            ranks="4+8",
        )
        options.threads, options.device = 1, "cpu"
        taken, found = benchmark("overhead").run(options, "coupling-hf", 2)
        assert taken > 0 and found["config"]["coupling"]["measured"] == 2

    def test_ratio(self, benchmark, model, monkeypatch, tmp_path):
        """Ten seconds to start; one second a document, three with coupling."""
        overhead = benchmark("overhead")

        def run(options, kind, limit):
            return 10 + limit * (1 if kind == "hf" else 3), {
                "config": {"coupling": {"measured": limit, "failed": 0}}
            }

        monkeypatch.setattr(overhead, "run", run)
        found = results(overhead, tmp_path / "o.json", "--model", model, "--limit", 20)
        assert found["ratio_per_further_document"] == pytest.approx(3)
        assert found["ratio_whole_process"] == pytest.approx(70 / 30)


class TestDevice:
    """The script for whoever has a GPU, on a CPU: every part runs, and what fails loses itself
    only.
    """

    def run(self, benchmark, out, *parts):
        code = benchmark("device").main(
            ["--device", "cpu", "--quick", "--out", str(out), "--parts", *parts]
        )
        return code, {part: json.loads((out / f"{part}.json").read_text()) for part in parts}

    def test_numerics(self, benchmark, tmp_path):
        code, found = self.run(benchmark, tmp_path, "spectra", "tf32")
        assert code == 0 and all(part["machine"]["device"] == "cpu" for part in found.values())
        assert all(
            row["residual"] < 1e-5 and row["orthogonality"] < 1e-5
            for row in found["spectra"]["rows"]
        )
        assert all(
            row["certificate"] < 1e-4 and row["coupling_matrices"] < 1e-5
            for row in found["tf32"]["rows"]
        )

    def test_models(self, benchmark, tmp_path):
        code, found = self.run(benchmark, tmp_path, "small", "memory", "profile", "release")
        assert code == 0
        assert [row["together"] for row in found["small"]["rows"]] == [1, 1, 8, 8, 32, 32, 8, 8]
        assert all(
            row["spectra"] > 0 and row["certificate"] < 1e-4 for row in found["small"]["rows"]
        )
        assert all(row["announced_mb"] > 0 for row in found["memory"]["rows"])
        assert (
            found["profile"]["rows"][0]["longest_on_host"]
            and found["release"]["rows"][0]["release"]["total"] > 0
        )

    @pytest.mark.slow
    def test_the_script(self, tmp_path):
        environment = os.environ | {"OUT": str(tmp_path), "DEVICE": "cpu", "PYTHON": sys.executable}
        command = ["bash", str(BENCHMARKS / "device.sh"), "--quick"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        exact = json.loads((tmp_path / "exactness.json").read_text())
        assert not exact["failed_families"] and exact["worst"]["float32"] < 2e-5
        assert json.loads((tmp_path / "overhead.json").read_text())["rows"][0]["measured"] == 4
        assert json.loads((tmp_path / "large.json").read_text())["rows"]

    def test_a_part_that_fails_or_takes_too_long_loses_itself_only(
        self, benchmark, tmp_path, monkeypatch
    ):
        device = benchmark("device")

        def fails(report, options):
            report.add(first=1.0)
            raise RuntimeError("out of luck")

        def lasts(report, options):
            report.add(first=1.0)
            time.sleep(60)

        monkeypatch.setitem(device.PARTS, "spectra", (fails, 0.5))
        monkeypatch.setitem(device.PARTS, "memory", (lasts, 0.0))
        code, found = self.run(benchmark, tmp_path, "spectra", "memory", "tf32")
        assert (
            code == 1
            and "out of luck" in found["spectra"]["failed"]
            and "took more than" in found["memory"]["failed"]
        )
        assert all(part["rows"] for part in found.values()) and "failed" not in found["tf32"]

    def test_no_device(self, benchmark, tmp_path, capsys):
        if torch.cuda.is_available():
            pytest.skip("there is one")
        assert benchmark("device").main(["--out", str(tmp_path)]) == 2
        assert "torch sees no GPU" in capsys.readouterr().out


def test_pictures(benchmark, model, tmp_path):
    results(
        benchmark("against_release"),
        tmp_path / "a.json",
        "--model",
        model,
        "--tokens",
        2,
        8,
        "--ranks",
        4,
    )
    base = ("--length", 4, "--width", 64, "--depth", 2, "--ranks", 4, "--repeats", 1)
    sizes = ("--tokens", 4, 16, "--widths", 64, 128, "--layers", 1, 2, "--prompts", 1, 2)
    results(benchmark("growth"), tmp_path / "g.json", *sizes, *base)
    benchmark("plot").main([str(tmp_path / "a.json"), str(tmp_path / "g.json")])
    assert (tmp_path / "a.png").stat().st_size > 5000 and (tmp_path / "g.png").stat().st_size > 5000


def test_a_sweep_takes_little_beside_its_units(benchmark):
    """Under 5 % of a unit of a minute."""
    assert 0 < benchmark("sweep_overhead").seconds_of_units(2, 0.5, {"workers": 1}, 1) < 3
