"""The `lm-eval-coupling` command. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `lm-eval-coupling`; by default those it was called with.

    Returns:
        The exit code: 0; 1 if a sweep is not complete; 2 after a mistake of the user, told in one sentence on stderr;
        130 after Ctrl-C.
    """
    _print_anywhere()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == [
            "run"
        ]:  # argparse would take lm-eval's own options, such as --help, for ours
            return _run(words[1:])
        options = _parser().parse_args(words)
        return options.command(options) or 0
    except CouplingError as error:
        print(f"lm-eval-coupling: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lm-eval-coupling: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _print_anywhere() -> None:
    """A character that the output has no code for, such as × on an old Windows console, must not end the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lm-eval-coupling",
        description="Transformer block coupling beside the scores of lm-eval.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser(
        "run", help="lm-eval's own command line, with the model class coupling-hf", add_help=False
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
        "demo", help="from nothing to a table and a picture: a small model on bundled tasks"
    )
    demo.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for results, tables and pictures"
    )
    demo.set_defaults(command=_demo)


def _add_show(commands: Any) -> None:
    show = commands.add_parser(
        "show", help="coupling of a saved run, per task; one document's layer-by-layer matrix"
    )
    show.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="OUT",
        help="folders that lm-eval wrote, searched recursively",
    )
    show.add_argument("--task", metavar="T", help="this task only, with its profile over layers")
    show.add_argument(
        "--doc",
        type=int,
        metavar="N",
        help="the matrix of the document with this doc_id (needs --task)",
    )
    show.add_argument(
        "--compare", action="store_true", help="every run against the first, document by document"
    )
    show.add_argument(
        "--csv", dest="form", action="store_const", const="csv", help="the numbers as CSV"
    )
    show.add_argument(
        "--json", dest="form", action="store_const", const="json", help="the numbers as JSON"
    )
    show.set_defaults(command=_show, form="table")


def _add_fit(commands: Any) -> None:
    fit = commands.add_parser(
        "fit",
        help="does coupling predict the score? Regressions over the saved runs of many models",
    )
    fit.add_argument(
        "folders", type=Path, nargs="+", metavar="OUT", help="folders that lm-eval wrote"
    )
    fit.add_argument(
        "--score", metavar="METRIC", help="such as acc_norm; default: the first that lm-eval lists"
    )
    fit.add_argument(
        "--x",
        nargs="+",
        metavar="PREDICTOR",
        help="the one in question first; default: coupling@10, then all",
    )
    fit.add_argument(
        "--tasks", nargs="+", metavar="T", help="these tasks or groups and their mean; default: all"
    )
    fit.add_argument(
        "--facts",
        type=Path,
        metavar="CSV",
        help="what is known of models: family, tuned, training_tokens, …",
    )
    fit.add_argument(
        "--out", type=Path, default=Path("coupling_fit"), metavar="DIR", help="default: %(default)s"
    )
    fit.add_argument(
        "--mixed", choices=("refuse", "keep"), default="refuse", help="runs of different settings"
    )
    fit.set_defaults(command=_fit)


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report", help="saved runs as one self-contained page: tables, plots, every document"
    )
    report.add_argument(
        "folders", type=Path, nargs="+", metavar="OUT", help="folders that lm-eval wrote"
    )
    report.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="default: %(default)s",
    )
    report.add_argument(
        "--documents",
        type=int,
        metavar="N",
        help="prompts to include per model and task (default: 200)",
    )
    report.add_argument(
        "--mixed",
        choices=("refuse", "keep"),
        default="refuse",
        help="runs of different coupling settings",
    )
    report.add_argument(
        "--words",
        type=Path,
        metavar="FILE",
        help="words.csv of analysis/words.py: what directions say",
    )
    report.set_defaults(command=_report)


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="models × revisions × tasks from a plan, on this machine or on a SLURM cluster",
    )
    sweep.add_argument(
        "plan", type=Path, metavar="PLAN.yaml", help="the same command again goes on where it was"
    )
    looks = sweep.add_mutually_exclusive_group()
    looks.add_argument(
        "--dry-run",
        action="store_true",
        help="check the plan; show what is there and what is to be done",
    )
    looks.add_argument(
        "--download",
        action="store_true",
        help="check the plan; fetch models and data for nodes without network",
    )
    looks.add_argument(
        "--check", action="store_true", help="what is missing or failed, why, and where its log is"
    )
    sweep.set_defaults(command=_sweep)


def _add_measure(commands: Any) -> None:
    measure = commands.add_parser(
        "measure", help="coupling of the prompts in a file, without any task"
    )
    measure.add_argument(
        "model", metavar="MODEL", help="a transformers folder or a name on the hub"
    )
    measure.add_argument(
        "prompts",
        type=Path,
        metavar="PROMPTS",
        help="a prompt a line; of a .jsonl file a JSON line each",
    )
    measure.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="OUT",
        help="folder of results, samples and tables",
    )
    measure.add_argument(
        "--model_args",
        default="",
        metavar="ARGS",
        help="further ones of lm-eval's hf, such as dtype=float32",
    )
    measure.add_argument(
        "--coupling",
        default="",
        metavar="SETTINGS",
        help="such as ranks=10+30,untrained=0; limit: all",
    )
    measure.add_argument(
        "--device", metavar="D", help="such as cuda or cpu (default: the best there is)"
    )
    measure.set_defaults(command=_measure)


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check", help="is this model measured exactly on this machine, and what does it cost here?"
    )
    check.add_argument("model", metavar="MODEL", help="a transformers folder or a name on the hub")
    check.add_argument(
        "--device", metavar="D", help="such as cuda or cpu (default: the best there is)"
    )
    check.add_argument(
        "--dtype",
        nargs="+",
        default=["auto"],
        metavar="T",
        help="of the weights, such as float32 bfloat16",
    )
    check.add_argument("--out", type=Path, metavar="FILE", help="all that was found, as JSON")
    check.set_defaults(command=_check)


def _add_vision(commands: Any) -> None:
    vision = commands.add_parser(
        "vision", help="accuracy and coupling of an image classifier, left as an evaluation's"
    )
    vision.add_argument(
        "--model", required=True, metavar="M", help="what transformers loads as an image classifier"
    )
    vision.add_argument(
        "--data",
        required=True,
        metavar="D",
        help="a folder of images by label, Parquet, or a data set's name",
    )
    vision.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="OUT",
        help="folder of results, samples and tables",
    )
    vision.add_argument("--split", metavar="S", help="of the data (default: test, or the only one)")
    vision.add_argument("--limit", type=int, metavar="N", help="images scored (default: all)")
    vision.add_argument(
        "--batch_size",
        type=int,
        default=32,
        metavar="B",
        help="images in one pass (default: %(default)s)",
    )
    vision.add_argument(
        "--device", metavar="D", help="such as cuda or cpu (default: the best there is)"
    )
    vision.add_argument(
        "--coupling", default="", metavar="SETTINGS", help="such as ranks=10+30,limit=50"
    )
    vision.set_defaults(command=_vision)


def _run(rest: list[str]) -> int:
    from lm_eval_coupling.harness import plugin

    plugin.install()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *rest]
    cli_evaluate()
    return 0


def _measure(options: argparse.Namespace) -> int:
    from lm_eval_coupling.texts import measure_texts

    logging.basicConfig(format="%(message)s")
    logging.getLogger("lm_eval.coupling").setLevel(logging.INFO)
    chosen = {name: getattr(options, name) for name in ("out", "model_args", "coupling", "device")}
    print(measure_texts(options.model, options.prompts, **chosen))
    return _code_of_measuring()


def _demo(options: argparse.Namespace) -> int:
    from lm_eval_coupling import demo

    demo.main(out=options.out)
    return _code_of_measuring()


def _code_of_measuring() -> int:
    """130 where Ctrl-C cut it short, though what was measured is there."""
    from lm_eval_coupling.harness import plugin

    return 130 if plugin.interrupted.is_set() else 0


def _show(options: argparse.Namespace) -> None:
    from lm_eval_coupling.report.terminal import show

    show(options.folders, options.task, options.doc, compare=options.compare, form=options.form)


def _fit(options: argparse.Namespace) -> None:
    from lm_eval_coupling.fit import output
    from lm_eval_coupling.fit.findings import fit_runs

    chosen = {name: getattr(options, name) for name in ("score", "x", "tasks", "facts", "mixed")}
    found = fit_runs(options.folders, **chosen)
    files = output.save(found, options.out)
    output.show(found)
    print(
        f"{len(files)} files in {options.out}: tables (CSV, fit.json), pictures (PNG, SVG), finding.txt"
    )


def _report(options: argparse.Namespace) -> None:
    from lm_eval_coupling.report.page import DOCUMENTS, write_report

    documents = DOCUMENTS if options.documents is None else options.documents
    page = write_report(
        options.folders, options.out, documents=documents, mixed=options.mixed, words=options.words
    )
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB): open it in a browser, it needs no network")


def _check(options: argparse.Namespace) -> int:
    from lm_eval_coupling.check.command import check

    return (
        0
        if check(options.model, device=options.device, dtypes=options.dtype, out=options.out)
        else 1
    )


def _sweep(options: argparse.Namespace) -> int:
    from lm_eval_coupling.sweep.command import sweep

    return sweep(
        options.plan, dry_run=options.dry_run, download=options.download, check=options.check
    )


def _vision(options: argparse.Namespace) -> int:
    from lm_eval_coupling.vision.evaluate import run_vision

    logging.basicConfig(format="%(message)s")
    chosen = {
        name: getattr(options, name)
        for name in ("split", "limit", "batch_size", "device", "coupling")
    }
    file, words = run_vision(options.model, options.data, options.out, **chosen)
    print(words, file, sep="\n")
    return _code_of_measuring()


if __name__ == "__main__":
    sys.exit(main())
