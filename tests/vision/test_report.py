"""A run of images in the report, in a real browser: the image is shown, and what data sets say
stays text.
"""

import io
import json

import browser
import numpy as np
import pandas as pd
import pytest
from coloured_images import save_classifier, save_images
from PIL import Image

from lm_eval_coupling.report.page import write_report
from lm_eval_coupling.report.task_table import _picture
from lm_eval_coupling.vision.evaluate import run_vision

EVIL = "<img src=x onerror=window.pwned=1>"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of a data set whose labels are markup."""
    if reason := browser.reason_to_skip():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("evil")
    save_images(folder / "images", each=3, colours={"a": (200, 0, 0), "b": (0, 0, 200)})
    rows = [
        {
            "img": {"bytes": file.read_bytes(), "path": f"{EVIL}.png"},
            "label": EVIL if file.parent.name == "a" else "blue",
        }
        for file in sorted((folder / "images").rglob("*.png"))
    ]
    pd.DataFrame(rows).to_parquet(folder / "evil.parquet")
    model = save_classifier(folder / "model", labels=(EVIL, "blue"))
    settings = f"ranks=4+8,limit=6,store={folder / 'store.sqlite'}"
    run_vision(model, str(folder / "evil.parquet"), folder / "out", device="cpu", coupling=settings)
    return write_report(folder / "out", folder / "report.html"), folder


def test_every_measured_image_is_shown_as_it_is(report):
    page, folder = report
    with browser.Browser() as window:
        window.open(page)
        window.click("#tab-documents")
        window.click("#document-list tbody tr:nth-child(1) button")
        window.until("document.querySelector('#document img.picture')?.complete")
        assert window.run("document.querySelector('#document img.picture').naturalWidth") == 16
        source = window.run("document.querySelector('#document img.picture').src")
        assert source.startswith("data:image/png;base64,")
        colour = window.run(
            "(() => { const c = document.createElement('canvas'); c.width = c.height = 16;"
            "const x = c.getContext('2d');"
            "x.drawImage(document.querySelector('#document img.picture'), 0, 0);"
            "return [...x.getImageData(0, 0, 1, 1).data] })()"
        )
        number = int(window.text("#document h2").rsplit(" ", 1)[1])
        encoded = pd.read_parquet(folder / "evil.parquet")["img"][number]["bytes"]
        assert colour[:3] == np.asarray(Image.open(io.BytesIO(encoded)))[0, 0].tolist()
        assert "acc" in window.text("#document") and "labelled" in window.text("#document")
        assert window.console == [] and window.requests in (
            [page.as_uri()],
            [page.as_uri(), source],
        )
        assert window.run("window.pwned === undefined") and window.count("img:not(.picture)") == 0


def test_markup_in_labels_and_names_stays_text(report):
    page, _ = report
    with browser.Browser() as window:
        window.open(page)
        window.click("#tab-documents")
        window.until("document.querySelectorAll('#document-list tbody tr').length === 6")
        assert EVIL in window.text("#document-list")
        assert window.run("window.pwned === undefined") and window.count("#document-list img") == 0


@pytest.mark.parametrize("encoded", [None, b"", b"<svg onload=alert(1)>", b"GIF89a"])
def test_only_pictures_are_pictures(encoded):
    assert _picture(encoded) is None


def test_runs_of_prompts_have_no_pictures(tmp_path):
    import saved_runs

    from lm_eval_coupling.report.data import gather

    folder = saved_runs.save(
        tmp_path, {"arc": saved_runs.task_summary()}, rows=[saved_runs.record()]
    )
    documents = gather(folder)["tables"][0]["documents"]
    assert json.dumps(documents[0]["picture"]) == "null"
