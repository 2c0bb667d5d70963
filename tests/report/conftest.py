"""The report of a few saved runs, as data, as HTML and in a real browser."""

import browser
import pytest
from report_pages import BAD_MODEL, NASTY, RECORDS, nasty_arguments
from saved_runs import record, sample, save, task_summary, write_samples

from lm_eval_coupling.report.page import build_page, gather, write_report


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a model with a group, a failure and samples, a larger one, and one without coupling."""
    out = tmp_path_factory.mktemp("out")
    nasty = record("arc", 5) | {"text": NASTY}
    failed = record("arc", 6, reason="out of <b>memory</b>")
    summaries = {"arc": task_summary(0.3), "gsm": task_summary(0.2)}
    rows = [*RECORDS["arc"], nasty, failed, *RECORDS["gsm"]]
    tiny = save(out, summaries, rows=rows, groups={"both": ["arc", "gsm"]}, run_id="tiny")
    lines = [
        sample("d0"),
        sample("d1", acc=1.0, target="blue"),
        sample("d5", arguments=nasty_arguments()),
    ]
    write_samples(tiny, "arc", lines)
    save(
        out,
        {"arc": task_summary(0.1)},
        model=BAD_MODEL,
        rows=[record("arc", 0, layers=6)],
        run_id="bad",
    )
    save(out, {"arc": task_summary()}, model="org/plain", coupling=False)
    return out


@pytest.fixture(scope="module")
def html(gathered):
    return build_page(gathered)


@pytest.fixture(scope="module")
def gathered(saved):
    return gather(saved)


@pytest.fixture(scope="module")
def report(saved, tmp_path_factory):
    if reason := browser.reason_to_skip():
        pytest.skip(reason)
    return write_report(saved, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def opened(report):
    """Open the page in a browser; a test must cause no log, no fetch and no foreign script."""
    with browser.Browser() as window:
        window.open(report)
        yield window
        assert window.console == []
        assert window.requests == [report.as_uri()]
        assert window.run("window.pwned === undefined")
