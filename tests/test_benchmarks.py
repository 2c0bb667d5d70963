"""Every benchmark runs, on a tiny model; the baseline that speed is measured against finds the same
coupling as we do.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from evaluations import COMMAND
from forked import forked_python
from lean_lm_eval import lean_lm_eval

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


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model with layers that can be left out."""
    return tiny.save_model(tmp_path_factory.mktemp("deep"), num_hidden_layers=4)


def results(script, out, *arguments):
    script.main([*map(str, arguments), "--threads", "1", "--quick", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["machine"]["threads"] == 1 and found["machine"]["processor"] is not None
    return found["results"]


@pytest.fixture
def forked(monkeypatch):
    """Let benchmarks start processes by an interpreter that is ready at once."""
    monkeypatch.setattr(sys, "executable", forked_python())


@pytest.fixture
def one_process(benchmark, forked, monkeypatch):
    """Start a process for the first measurement alone; the others repeat what it found."""
    machine, found = benchmark("machine"), []
    measure = machine.found_by

    def first(command, what, **how):
        if not found:
            found.append(measure(command, what, **how))
        return found[0]

    monkeypatch.setattr(machine, "found_by", first)


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
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
@pytest.mark.usefixtures("one_process")
def test_a_busy_machine(benchmark, model, tmp_path):
    arguments = "--tokens 5 --prompts 2 --ranks 4 --busy 1 --policies default 10000".split()
    found = results(benchmark("busy"), tmp_path / "b.json", "--model", model, *arguments)
    assert [row[""] for row in found["rows"]] == ["here", "here, 10000"]
    for row in found["rows"]:
        assert row["loaded / fair share"] > 0 and row["quiet, CPU s"] > 0
        assert row["scoring quiet, s"] > 0
    assert found["fair_share"] >= 1


def test_what_is_no_checkout_is_refused(benchmark, model, tmp_path):
    with pytest.raises(SystemExit, match="expected the folder of another checkout"):
        benchmark("in_turn").main([str(tmp_path), "--model", str(model)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of the JSON files that are drawn."""
    return tmp_path_factory.mktemp("saved")


class TestAgainstRelease:
    def test_both_find_the_same(self, benchmark, deep, saved):
        script = benchmark("against_release")
        arguments = "--tokens 1 30 --ranks 2 4 --layers 4 --prompts 3".split()
        for found in results(script, saved / "a.json", "--model", deep, *arguments):
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

    def test_layers_left_out_are_extrapolated(self, benchmark, deep, tmp_path):
        script = benchmark("against_release")
        arguments = ("--model", deep, "--tokens", 5, "--ranks", 4, "--layers", 2)
        (found,) = results(script, tmp_path / "a.json", *arguments)
        assert found["jacobians_extrapolated"] and found["layers_differentiated_by_baseline"] == [
            0,
            3,
        ]
        assert found["agreement"]["jacobian_relative_error"] < 1e-5

    def test_a_wrong_jacobian_would_be_seen(self, benchmark, deep):
        """The baseline differentiates the model itself: it cannot agree by construction."""
        script, release, models = (
            benchmark(name) for name in ("against_release", "release", "models")
        )
        loaded, tokenizer = models.load(deep)
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


def test_floors(benchmark, model, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark("floors"), "SQUARE", 64)
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


def test_growth(benchmark, saved):
    sizes = ("--tokens", 4, 16, "--widths", 64, 128, "--layers", 1, 2, "--prompts", 1, 2)
    base = ("--length", 4, "--width", 64, "--depth", 2, "--ranks", 4, "--repeats", 1)
    found = results(benchmark("growth"), saved / "g.json", *sizes, *base)
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
@pytest.mark.usefixtures("forked")
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
    def test_a_measured_run(self, benchmark, model, tmp_path, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", lean_lm_eval(), prepend=os.pathsep)
        python, script = tmp_path / "python", tmp_path / "command.py"
        python.write_text(f'#!/bin/sh\nshift 2  # -m lm_eval\n{forked_python()} {script} "$@"\n')
        python.chmod(0o755)
        script.write_text(COMMAND)
        monkeypatch.setattr(sys, "executable", str(python))
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


# In place of Python: the second process fails, the first runs one of its parts.
STAND_IN = """#!/usr/bin/env bash
echo "$@" >> {told}
case "$*" in
    *large*) exit 3 ;;
    *tf32*) exec {python} "${{@:1:9}}" --parts tf32 --quick ;;
esac
"""


class TestDevice:
    """The script for whoever has a GPU, on a CPU: every part runs, and what fails loses itself
    only.
    """

    def run(self, benchmark, out, *parts):
        # Its time counts from the start of this process, which runs other tests as well.
        options = ["--device", "cpu", "--quick", "--seconds", "1e6", "--out", str(out)]
        code = benchmark("device").main([*options, "--parts", *parts])
        return code, {part: json.loads((out / f"{part}.json").read_text()) for part in parts}

    def test_numerics(self, benchmark, tmp_path):
        code, found = self.run(benchmark, tmp_path, "spectra", "tf32")
        assert code == 0 and all(part["machine"]["device"] == "cpu" for part in found.values())
        rows = found["spectra"]["rows"]
        small = [row for row in rows if row["kind"] == "small problems"]
        assert len(small) == 2 and len(rows) > 2
        for row in rows:
            errors = ("residual", "orthogonality")
            if row in small:  # both solvers of small problems, in float64 and in float32
                errors = ("library, error", "rotations, error")
            assert all(row[error] < 1e-5 for error in errors), row
        assert all(
            row["certificate"] < 1e-4 and row["coupling_matrices"] < 1e-5
            for row in found["tf32"]["rows"]
        )

    def test_models(self, benchmark, tmp_path):
        parts = "small memory profile release large exactness overhead".split()
        code, found = self.run(benchmark, tmp_path, *parts)
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
        exact = found["exactness"]
        assert not exact["failed_families"] and exact["worst"]["float32"] < 2e-5
        assert found["overhead"]["rows"][0]["measured"] == 4 and found["large"]["rows"]

    @pytest.mark.slow
    def test_the_script(self, benchmark, tmp_path):
        """Its processes cover every part and end as the worst of them does; one is a real one."""
        python = tmp_path / "python"
        python.write_text(STAND_IN.format(python=forked_python(), told=tmp_path / "told"))
        python.chmod(0o755)
        out = tmp_path / "out"
        environment = os.environ | {"OUT": str(out), "DEVICE": "cpu", "PYTHON": str(python)}
        command = ["bash", str(BENCHMARKS / "device.sh"), "--quick"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 3, done.stdout[-3000:] + done.stderr[-3000:]
        calls = [line.split() for line in (tmp_path / "told").read_text().splitlines()]
        parts = [part for call in calls for part in call[call.index("--parts") + 1 :]]
        assert sorted(parts) == sorted([*benchmark("device").PARTS, *["--quick"] * len(calls)])
        assert all(call[1:5] == ["--device", "cpu", "--out", str(out)] for call in calls)
        assert json.loads((out / "tf32.json").read_text())["rows"]

    def test_a_part_that_fails_or_takes_too_long_loses_itself_only(
        self, benchmark, tmp_path, monkeypatch
    ):
        device = benchmark("device")

        def fails(report, options):
            report.add(first=1.0)
            raise RuntimeError("out of luck")

        def lasts(report, options):
            report.add(first=1.0)
            signal.raise_signal(signal.SIGALRM)  # as the clock does after the part's time

        monkeypatch.setitem(device.PARTS, "spectra", (fails, 0.5))
        monkeypatch.setitem(device.PARTS, "memory", (lasts, 0.5))
        code, found = self.run(benchmark, tmp_path, "spectra", "memory", "tf32")
        assert (
            code == 1
            and "out of luck" in found["spectra"]["failed"]
            and "took more than" in found["memory"]["failed"]
        )
        assert all(part["rows"] for part in found.values()) and "failed" not in found["tf32"]

    def test_a_time_limit(self, benchmark):
        device = benchmark("device")
        with pytest.raises(device._TooLong, match="took more than"), device.at_most(0.01):
            time.sleep(600)
        with device.at_most(600):
            pass
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)

    def test_no_device(self, benchmark, tmp_path, capsys):
        if torch.cuda.is_available():
            pytest.skip("there is one")
        assert benchmark("device").main(["--out", str(tmp_path)]) == 2
        assert "torch sees no GPU" in capsys.readouterr().out


def test_pictures(benchmark, model, saved):
    """Of what the tests above have saved."""
    if not (saved / "a.json").exists():
        TestAgainstRelease().test_both_find_the_same(benchmark, model, saved)
    if not (saved / "g.json").exists():
        test_growth(benchmark, saved)
    benchmark("plot").main([str(saved / "a.json"), str(saved / "g.json")])
    assert all((saved / name).stat().st_size > 5000 for name in ("a.png", "g.png"))


def test_a_sweep_takes_little_beside_its_units(benchmark):
    """Under 5 % of a unit of a minute."""
    assert 0 < benchmark("sweep_overhead").seconds_of_units(2, 0.5, {"workers": 1}, 1) < 3


@pytest.mark.slow
def test_the_callbacks_overhead(benchmark, tmp_path):
    """Losses with and without it are compared by the script itself."""
    small = ("--layers", 2, "--width", 32, "--batch", 2, "--prompts", 1)
    found = results(benchmark("callback_overhead"), tmp_path / "c.json", *small)
    assert found["same_losses"] and found["measurement, s"] > 0 and found["step, s"] > 0
