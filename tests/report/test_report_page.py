"""The page: texts of others stay text, nothing is loaded from elsewhere, errors are one line."""

import base64
import errno
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from report_pages import NASTY, Tags, row_of
from saved_runs import save, task_summary

from lm_eval_coupling import cli
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.report.page import embeddable_json, gather, write_report


class TestPage:
    def test_nothing_is_loaded_from_elsewhere(self, html):
        tags = Tags(html).tags
        loads = [
            attributes[name]
            for _, attributes in tags
            for name in ("src", "href", "srcset", "data", "action")
            if name in attributes
        ]
        assert loads == ["data:,"]
        style = next(text for text in Tags(html).content.values() if "--paper" in text)
        assert "url(" not in style and "@import" not in style

    def test_the_policy_forbids_loads_and_foreign_scripts(self, html):
        actual = Tags(html)
        (policy,) = [
            a["content"]
            for tag, a in actual.tags
            if a.get("http-equiv") == "Content-Security-Policy"
        ]
        assert (
            policy.startswith("default-src 'none'; ")
            and "unsafe-eval" not in policy
            and "http" not in policy
        )
        scripts = [
            actual.content[i + 1]
            for i, (tag, a) in enumerate(actual.tags)
            if tag == "script" and "type" not in a
        ]
        hashes = [
            "'sha256-" + base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() + "'"
            for s in scripts
        ]
        assert len(hashes) == 2 and f"script-src {' '.join(hashes)};" in policy

    def test_texts_are_data_and_nothing_else(self, html, gathered):
        actual = Tags(html)
        (number,) = [i + 1 for i, (tag, a) in enumerate(actual.tags) if a.get("id") == "data"]
        assert json.loads(actual.content[number]) == json.loads(json.dumps(gathered))
        assert [tag for tag, _ in actual.tags].count("script") == 3 and "img" not in [
            tag for tag, _ in actual.tags
        ]
        texts = [item["text"] for table in gathered["tables"] for item in table["documents"]]
        assert NASTY in texts
        assert NASTY not in html and "</script><script>window" not in html

    @pytest.mark.parametrize(
        "text", ["</script>", "<!--<script>", "]]>", "&lt;", "\u2028\u2029", "\ud800"]
    )
    def test_json_cannot_end_its_element(self, text):
        made = embeddable_json({"text": text})
        assert (
            json.loads(made) == {"text": text}
            and not set(made) & set("<>&\u2028\u2029\ud800")
            and made.isascii()
        )

    def test_numbers_without_a_value_are_null(self, gathered):
        assert row_of(gathered, "org/plain", "arc")["coupling_rank"] is None
        json.dumps(gathered, allow_nan=False)

    def test_labels(self, tmp_path):
        models = ["/home/someone/models/small", "org/name", r"C:\models\other"]
        for model in models:
            folder = tmp_path / str(models.index(model))
            save(folder, {"arc": task_summary()}, model="any", coupling=False)
            file = next(folder.rglob("results_*.json"))
            run = json.loads(file.read_text())
            file.write_text(json.dumps(run | {"model_name": model}))
        assert {row["model"]: row["label"] for row in gather(tmp_path)["rows"]} == dict(
            zip(models, ["small", "org/name", "other"], strict=True)
        )

    def test_folders_of_one_last_name_keep_the_rest_of_their_paths_to_themselves(self, tmp_path):
        """Regression: their labels were the whole paths."""
        for model in ("/home/someone/a/base", "/home/someone/b/base"):
            save(tmp_path, {"arc": task_summary()}, model=model, coupling=False)
        assert [row["label"] for row in gather(tmp_path)["rows"]] == ["a/base", "b/base"]


class TestErrors:
    def test_no_runs(self, tmp_path):
        with pytest.raises(CouplingError, match="no results_"):
            write_report(tmp_path, tmp_path / "r.html")
        with pytest.raises(CouplingError, match="does not exist"):
            write_report([tmp_path / "nowhere"], tmp_path / "r.html")
        assert not (tmp_path / "r.html").exists()

    def test_results_without_tasks(self, tmp_path):
        (tmp_path / "results_x.json").write_text('{"results": {}}')
        with pytest.raises(CouplingError, match="no task"):
            gather(tmp_path)

    def test_unwritable(self, saved, tmp_path):
        with pytest.raises(CouplingError, match="cannot be written"):
            write_report(saved, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_full_disk_leaves_the_earlier_page(self, saved, tmp_path, monkeypatch):
        """Regression: the page was emptied before the new one was written."""

        def write_half(file, text, **_):
            file.write_bytes(text[:1000].encode())
            raise OSError(errno.ENOSPC, "No space left on device")

        out = tmp_path / "r.html"
        out.write_text("earlier")
        monkeypatch.setattr(Path, "write_text", write_half)
        with pytest.raises(CouplingError, match="cannot be written"):
            write_report(saved, out)
        assert out.read_text() == "earlier" and list(tmp_path.iterdir()) == [out]

    def test_negative_documents(self, saved):
        with pytest.raises(CouplingError, match="documents=-1"):
            gather(saved, documents=-1)

    def test_different_settings(self, saved, tmp_path):
        other = save(tmp_path, {"arc": task_summary()}, model="org/other", settings={"ranks": [20]})
        with pytest.raises(CouplingError, match="different coupling settings"):
            gather([saved, other])
        assert len(gather([saved, other], mixed="keep")["rows"]) == 6

    def test_without_plotly(self, saved, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "plotly.offline", None)
        with pytest.raises(CouplingError, match=r"pip install 'lm-eval-coupling\[analysis\]'"):
            write_report(saved, tmp_path / "r.html")

    def test_command(self, saved, tmp_path, capsys):
        out = tmp_path / "deep" / "r.html"
        assert (
            cli.main(
                ["report", str(saved / "org__tiny"), str(saved / "org__plain"), "-o", str(out)]
            )
            == 0
        )
        assert "r.html" in capsys.readouterr().out and out.stat().st_size > 10_000
        assert cli.main(["report", str(tmp_path / "none"), "-o", str(out)]) == 2
        assert capsys.readouterr().err.startswith("lm-eval-coupling: got ")

    def test_no_torch_is_loaded(self):
        code = "import sys, lm_eval_coupling.report.page; "
        code += "sys.exit(bool({'torch', 'lm_eval'} & {*sys.modules}))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
