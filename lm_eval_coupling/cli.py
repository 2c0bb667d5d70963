"""The `lm-eval-coupling` command; each subcommand imports what it needs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval_coupling.console import (
    INTERRUPTED,
    end_after,
    end_of_run,
    log_safely,
    prepare_surroundings,
    require_process_folders,
    say,
)
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.numerics.cores import limit_spinning
from lm_eval_coupling.safe_text import for_terminal
from lm_eval_coupling.saved.run_files import require_roots

_DEVICE = "such as cuda or cpu (default: the best available)"
_RESULTS = "folders that lm-eval wrote, searched recursively"
_OUT = "folder for results, samples and tables"
_FACTS = (
    "CSV file with a column `model` (a name as in the results, or its last part), optionally "
    "`revision`, and any of family, tuned (true/false), training_tokens, released (year or date), "
    "n_params, n_layers, d_model; further columns become predictors or groups"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `lm-eval-coupling`; by default those of the command line.

    Returns:
        The exit code: 0; 1 if a sweep or check misses something, or not all could be written; 2
        after a mistake, told in one sentence on stderr; 130 after Ctrl-C.
    """
    prepare_surroundings()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] != ["sweep"]:  # its runs are commands themselves, after the plan's own variables
        limit_spinning(os.environ)
    try:
        if words[:1] == ["run"]:  # argparse would take lm-eval's options, such as --help, for ours
            return _run(words[1:])
        options = command_parser().parse_args(words)
        if "folders" in options:
            require_roots(options.folders)  # before pandas is loaded
        else:
            require_process_folders()
        code = options.command(options) or 0
        sys.stdout.flush()  # here a full disk is an error of ours
        return code
    except CouplingError as error:
        return say(str(error), 2)
    except KeyboardInterrupt:
        return say("interrupted", INTERRUPTED)
    except OSError as error:
        return end_after(error)


class _Version(argparse.Action):
    """Option that prints the installed version, looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from lm_eval_coupling.versions import installed_version

        print(f"lm-eval-coupling {installed_version('lm-eval-coupling') or '(not installed)'}")
        parser.exit()


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands; the options of `run` are those of lm-eval."""
    parser = argparse.ArgumentParser(
        prog="lm-eval-coupling",
        description="Transformer block coupling beside the scores of lm-eval.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser(
        "run",
        help="run lm-eval's own command line, with the model class coupling-hf",
        add_help=False,
    )
    for add in (
        _add_demo,
        _add_show,
        _add_fit,
        _add_report,
        _add_sweep,
        _add_measure,
        _add_check,
        _add_vision,
    ):
        add(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo", help="evaluate a small model on bundled tasks; make a table and a picture"
    )
    demo.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for results, tables and pictures"
    )
    demo.set_defaults(command=_demo)


def _add_show(commands: Any) -> None:
    show = commands.add_parser(
        "show", help="show coupling of saved runs per task, or one document's layer-by-layer matrix"
    )
    show.add_argument("folders", type=Path, nargs="+", metavar="OUT", help=_RESULTS)
    show.add_argument("--task", metavar="T", help="show this task only, with its layer profile")
    show.add_argument(
        "--doc", type=int, metavar="N", help="show the matrix of this doc_id (needs --task)"
    )
    show.add_argument(
        "--compare", action="store_true", help="compare every run with the first, per document"
    )
    for form in ("csv", "json"):
        words = f"print the numbers as {form.upper()}"
        show.add_argument(f"--{form}", dest="form", action="store_const", const=form, help=words)
    show.add_argument(
        "--miscoupling", action="store_true", help="show layers by miscoupling, 1 − coupling"
    )
    show.set_defaults(command=_show, form="table")


def _add_fit(commands: Any) -> None:
    fit = commands.add_parser(
        "fit", help="test whether coupling predicts the score over the saved runs of many models"
    )
    fit.add_argument("folders", type=Path, nargs="+", metavar="OUT", help=_RESULTS)
    words = "metric such as acc_norm (default: the first that lm-eval lists)"
    fit.add_argument("--score", metavar="METRIC", help=words)
    words = "predictors, the one in question first (default: coupling@10, then all others)"
    fit.add_argument("--x", nargs="+", metavar="PREDICTOR", help=words)
    words = (
        "tasks or groups (default: groups with a score, and tasks in none of these); "
        "the mean over them is one more score"
    )
    fit.add_argument("--tasks", nargs="+", metavar="T", help=words)
    fit.add_argument("--facts", type=Path, metavar="CSV", help=_FACTS)
    words = "folder for tables, pictures and finding.txt (default: %(default)s)"
    fit.add_argument("--out", type=Path, default=Path("coupling_fit"), metavar="DIR", help=words)
    _add_mixed(fit)
    fit.set_defaults(command=_fit)


def _add_mixed(parser: argparse.ArgumentParser) -> None:
    words = "refuse runs of different settings, or keep them side by side (default: %(default)s)"
    parser.add_argument("--mixed", choices=("refuse", "keep"), default="refuse", help=words)


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report", help="write saved runs as one self-contained page: tables, plots, every document"
    )
    report.add_argument("folders", type=Path, nargs="+", metavar="OUT", help=_RESULTS)
    words, page = "page to write (default: %(default)s)", Path("report.html")
    report.add_argument("-o", "--out", type=Path, default=page, metavar="FILE", help=words)
    words = "prompts per model and task (default: 200)"
    report.add_argument("--documents", type=int, metavar="N", help=words)
    _add_mixed(report)
    report.add_argument(
        "--words", type=Path, metavar="FILE", help="words.csv of analysis/words.py, to show as well"
    )
    report.set_defaults(command=_report)


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep", help="run models × revisions × tasks of a plan, here or on a SLURM cluster"
    )
    sweep.add_argument(
        "plan",
        type=Path,
        metavar="PLAN.yaml",
        help="the plan; the same command again resumes the sweep",
    )
    modes = sweep.add_mutually_exclusive_group()
    modes.add_argument(
        "--dry-run", action="store_true", help="check the plan; show what exists and what remains"
    )
    modes.add_argument(
        "--download",
        action="store_true",
        help="check the plan; fetch models and data for nodes without network",
    )
    modes.add_argument(
        "--check", action="store_true", help="show what is missing or failed, why, and the log"
    )
    sweep.set_defaults(command=_sweep)


def _add_measure(commands: Any) -> None:
    measure = commands.add_parser(
        "measure",
        help="measure coupling of prompts in a file, or of an evaluation that is already there",
    )
    add = measure.add_argument
    add("model", nargs="?", metavar="MODEL", help="transformers folder or name on the hub")
    words = "text file of one prompt a line, or .jsonl file of one JSON value a line"
    add("prompts", nargs="?", type=Path, metavar="PROMPTS", help=words)
    words = "instead of PROMPTS: results of lm_eval --log_samples, of any backend"
    add("--samples", type=Path, metavar="RESULTS", help=words)
    words = "with --samples: measure even if the results name another model"
    add("--same-model", action="store_true", help=words)
    add("--out", type=Path, metavar="OUT", help=_OUT)
    words = "further arguments of lm-eval's hf, such as dtype=float32"
    add("--model_args", default="", metavar="ARGS", help=words)
    add("--coupling", default="", metavar="SETTINGS", help="such as ranks=10+30,limit=all")
    add("--device", metavar="D", help=_DEVICE)
    words = "the measure.yaml of a sweep of samples, instead of all other arguments"
    add("--config", type=Path, metavar="FILE", help=words)
    measure.set_defaults(command=_measure)


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check", help="check that a model is measured exactly on this machine, and what it costs"
    )
    check.add_argument("model", metavar="MODEL", help="transformers folder or name on the hub")
    check.add_argument("--device", metavar="D", help=_DEVICE)
    check.add_argument(
        "--dtype",
        nargs="+",
        default=["auto"],
        metavar="T",
        help="dtypes of the weights, such as float32 bfloat16",
    )
    check.add_argument("--out", type=Path, metavar="FILE", help="file for all results, as JSON")
    check.set_defaults(command=_check)


def _add_vision(commands: Any) -> None:
    vision = commands.add_parser(
        "vision", help="evaluate an image classifier and measure its coupling"
    )
    vision.add_argument(
        "--model", required=True, metavar="M", help="image classifier that transformers loads"
    )
    vision.add_argument(
        "--data",
        required=True,
        metavar="D",
        help="folder with one folder of images per label, Parquet files, or name of a data set",
    )
    vision.add_argument("--out", type=Path, required=True, metavar="OUT", help=_OUT)
    vision.add_argument(
        "--split", metavar="S", help="split of the data (default: test, or the only one)"
    )
    vision.add_argument("--limit", type=int, metavar="N", help="images scored (default: all)")
    vision.add_argument(
        "--batch_size",
        type=int,
        default=32,
        metavar="B",
        help="images in one pass (default: %(default)s)",
    )
    vision.add_argument("--device", metavar="D", help=_DEVICE)
    vision.add_argument(
        "--coupling", default="", metavar="SETTINGS", help="such as ranks=10+30,limit=50"
    )
    vision.set_defaults(command=_vision)


def _run(arguments: list[str]) -> int:
    from lm_eval_coupling.harness import plugin

    plugin.install()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
    return 0


def _select(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}


def _measure(options: argparse.Namespace) -> int:
    if options.config is None and (options.model is None or options.out is None):
        raise CouplingError("got no MODEL or no --out, expected both; see measure --help")
    if options.config is not None and (options.model is not None or options.samples is not None):
        raise CouplingError("got --config beside MODEL or --samples, expected it alone")
    if options.config is None and (options.prompts is None) == (options.samples is None):
        raise CouplingError("expected either PROMPTS or --samples RESULTS, got both or neither")
    if options.same_model and options.prompts is not None:
        raise CouplingError("got --same-model with PROMPTS, expected it with --samples alone")
    log_safely(logging.INFO)
    arguments = _select(options, "out", "model_args", "coupling", "device")
    if options.prompts is not None:
        from lm_eval_coupling.texts import measure_texts

        measured = measure_texts(options.model, options.prompts, **arguments)
    else:
        from lm_eval_coupling.samples.measure import measure_configured, measure_samples

        if options.config is not None:
            measured = measure_configured(options.config)
        else:
            measured = measure_samples(
                options.model, options.samples, same_model=options.same_model, **arguments
            )
    print(for_terminal(measured.table))
    return end_of_run(measured.interrupted, measured.problem)


def _demo(options: argparse.Namespace) -> int:
    from lm_eval_coupling import demo

    return INTERRUPTED if demo.main(out=options.out) else 0


def _show(options: argparse.Namespace) -> None:
    from lm_eval_coupling.report.terminal import show

    show(
        options.folders,
        options.task,
        options.doc,
        compare=options.compare,
        form=options.form,
        miscoupling=options.miscoupling,
    )


def _fit(options: argparse.Namespace) -> None:
    from lm_eval_coupling.fit import output
    from lm_eval_coupling.fit.findings import fit_runs

    arguments = _select(options, "score", "x", "tasks", "facts", "mixed")
    findings = fit_runs(options.folders, **arguments)
    files = output.save(findings, options.out)
    output.show(findings)
    out = for_terminal(options.out)
    print(f"{len(files)} files in {out}: tables, fit.json, pictures, finding.txt")


def _report(options: argparse.Namespace) -> None:
    from lm_eval_coupling.report.page import DOCUMENTS, write_report

    documents = DOCUMENTS if options.documents is None else options.documents
    page = write_report(
        options.folders, options.out, documents=documents, mixed=options.mixed, words=options.words
    )
    size = f"{page.stat().st_size / 1e6:.1f} MB"
    print(f"{for_terminal(page)} ({size}): open it in a browser, it needs no network")


def _check(options: argparse.Namespace) -> int:
    from lm_eval_coupling.runs.model_arguments import require_loadable

    for dtype in options.dtype:  # before the next import, which loads torch
        require_loadable({"pretrained": options.model, "dtype": dtype})
    from lm_eval_coupling.check.command import check

    is_exact = check(options.model, device=options.device, dtypes=options.dtype, out=options.out)
    return 0 if is_exact else 1


def _sweep(options: argparse.Namespace) -> int:
    from lm_eval_coupling.sweep.command import sweep

    return sweep(options.plan, **_select(options, "dry_run", "download", "check"))


def _vision(options: argparse.Namespace) -> int:
    from lm_eval_coupling.vision.arguments import check_arguments

    # Before the next import, which loads torch.
    check_arguments(options.model, **_select(options, "out", "limit", "batch_size", "coupling"))
    from lm_eval_coupling.vision.evaluate import run_vision

    log_safely(logging.INFO)
    arguments = _select(options, "split", "limit", "batch_size", "device", "coupling")
    run = run_vision(options.model, options.data, options.out, **arguments)
    print(*(for_terminal(line) for line in (run.summary, run.file) if line), sep="\n")
    return end_of_run(run.interrupted, run.problem)


if __name__ == "__main__":
    sys.exit(main())
