"""`lm-eval-coupling measure`: the prompts of a file, without any task."""

import json
import subprocess
import sys

import numpy as np
import pytest
from evaluations import written
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_coupling import ResidualModel, load_records, load_runs, measure_coupling
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.fit.findings import fit_runs
from lm_eval_coupling.texts import further_fields, measure_texts, read_lines


def read_prompts(file):
    return [line.prompt for line in read_lines(file)]


TEXTS = ["The sky is blue. ", "Why?", "  The grass is green"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "The sky is blue. \n\nWhy?\r\n  The grass is green\n", TEXTS),
        ("p.txt", '{"prompt": 1}\nno JSON here', ['{"prompt": 1}', "no JSON here"]),
        ("p.txt", "\ufeffone line", ["one line"]),
        ("p.txt", "a\x0bb\u2028c", ["a\x0bb\u2028c"]),
        (
            "p.jsonl",
            '"two\\nlines"\n{"prompt": "a", "x": 1}\n{"text": "b"}\n[1, 2]\n{"tokens": [3]}',
            None,
        ),
    ],
)
def test_a_line_is_a_prompt(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(tmp_path / name) == (expected or ["two\nlines", "a", "b", [1, 2], [3]])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n  \n", "p.txt, which has no prompts; write one a line"),
        ("p.txt", b"\xff\xfe", "p.txt for the prompts, which cannot be read as UTF-8 text"),
        ("p.jsonl", b'"a"\n{oh}', "line 2 of .*p.jsonl, which is no JSON"),
        (
            "p.jsonl",
            b'{"question": "a"}',
            "line 1 of .*, expected a JSON string, token ids, or an object with prompt, text",
        ),
        ("p.jsonl", b"[1, true]", "line 1 of .*, expected a JSON string, token ids"),
        ("p.jsonl", b'""', "line 1 of .*, expected a JSON string"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CouplingError, match=message):
        read_prompts(tmp_path / name)
    with pytest.raises(CouplingError, match="which cannot be read"):
        read_prompts(tmp_path / "nowhere.txt")


def test_it_leaves_what_a_run_leaves(home, tmp_path):
    file, out = tmp_path / "sky.txt", tmp_path / "out"
    file.write_text("\n".join([*TEXTS, TEXTS[0]]))
    coupling = f"ranks=2+4,untrained_seed=1,store={tmp_path / 's'}"
    told, interrupted, _ = measure_texts(
        str(home / "float32"), file, out, coupling=coupling, device="cpu"
    )
    records = load_records(out)
    model = ResidualModel.wrap(AutoModelForCausalLM.from_pretrained(home / "float32"))
    lines = [*TEXTS, TEXTS[0]]
    encoded = [AutoTokenizer.from_pretrained(home / "float32").encode(text) for text in lines]
    expected = measure_coupling(model, encoded, ranks=(2, 4), progress=False)
    assert (
        list(records.text) == lines
        and list(records.doc_id) == [0, 1, 2, 3]
        and set(records.kind) == {"text"}
    )
    for found, right in zip(records.normalized_miscoupling, expected, strict=True):
        assert np.allclose(found, right.normalized_miscoupling, atol=1e-5)
    mean = np.mean([one.coupling(2) for one in expected])
    assert written(out)["results"]["sky"]["coupling,none"] == pytest.approx(mean, abs=1e-6)
    (run,) = load_runs([out]).to_dict("records")
    assert run["task"] == "sky" and run["coupling@2"] == pytest.approx(mean, abs=1e-6)
    assert (
        "Coupling at K = 2" in told
        and "4 of 4" in told
        and f"Next: lm-eval-coupling show {out}" in told
        and not interrupted
    )
    assert len(load_records(out, weights="untrained")) == 4


def test_further_fields_are_columns_and_the_score_is_fitted(home, tmp_path):
    """Within a model, `fit` asks whether coupling tells right from wrong."""
    file, out = tmp_path / "own.jsonl", tmp_path / "out"
    lines = [
        {"prompt": f"{'so ' * n}it is", "id": f"q{n}", "score": n % 2, "level": n, "tags": ["a"]}
        for n in range(8)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    measure_texts(
        str(home / "float32"), file, out, coupling=f"ranks=2,store={tmp_path / 's'}", device="cpu"
    )
    records = load_records(out)
    assert list(records["id"]) == [f"q{n}" for n in range(8)]
    assert list(records["level"]) == list(range(8)) and set(records["tags"]) == {'["a"]'}
    assert written(out)["results"]["own"]["score,none"] == 0.5
    (run,) = load_runs([out]).to_dict("records")
    assert run["score,none"] == 0.5
    findings = fit_runs([out])
    documents = findings.tables["documents"]
    assert sorted(documents["right"]) == [0.0] * 4 + [1.0] * 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "text": "b"}', "field 'text' in .*, which is a column of the tables"),
        ('{"prompt": "a", "coupling": 1}', "field 'coupling' in .*; rename it"),
        ('{"prompt": "a", "score": "good"}', "a score in .* that is no number"),
    ],
)
def test_fields_that_cannot_be_columns_are_refused(tmp_path, line, message):
    file = tmp_path / "own.jsonl"
    file.write_text(line)
    with pytest.raises(CouplingError, match=message):
        further_fields(read_lines(file), file)


def test_fields_of_mixed_kinds_become_texts(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "a", "x": 1, "y": true}\n{"prompt": "b", "x": "2"}\n"c"')
    assert further_fields(read_lines(file), file) == {
        "x": ["1", "2", None],
        "y": [True, None, None],
    }


def test_nothing_follows_the_prompts_of_a_file(home, tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    with pytest.raises(CouplingError, match="generated-last for the prompts of a file, which noth"):
        measure_texts(
            str(home / "float32"),
            tmp_path / "p.txt",
            tmp_path / "out",
            coupling="ranks=2,position=generated-last",
            device="cpu",
        )


def test_token_ids_of_another_model_are_refused(home, tmp_path):
    file = tmp_path / "ids.jsonl"
    file.write_text("[1, 2, 3]\n[1, 5000]\n")
    with pytest.raises(
        CouplingError,
        match="got token id 5000 in a prompt, expected 0 to 258 for this model",
    ):
        measure_texts(
            str(home / "float32"),
            file,
            tmp_path / "out",
            coupling=f"ranks=2,store={tmp_path / 's'}",
            device="cpu",
        )


LATE = ("torch", "transformers", "lm_eval.models.huggingface", "pandas")


def test_a_wrong_argument_is_refused_before_anything_heavy_is_loaded(home, tmp_path):
    """It took half a minute to be told of a misspelt word."""
    (tmp_path / "p.txt").write_text("a\n")
    code = f"""if True:
        import sys
        from lm_eval_coupling.cli import main
        code = main(sys.argv[1:])
        print(*[name for name in {LATE!r} if name in sys.modules])
        sys.exit(code)
    """
    model = str(home / "float32")
    asked = [
        (model, wrong)
        for wrong in ("rank=3", "ranks", "measures=deepth", "ranks=10+9999", f"store={tmp_path}")
    ]
    asked += [(str(tmp_path / "nowhere"), "ranks=2"), (str(tmp_path), "ranks=2")]
    for pretrained, wrong in asked:
        words = [
            "measure",
            pretrained,
            str(tmp_path / "p.txt"),
            "--out",
            str(tmp_path / "out"),
            "--coupling",
            wrong,
        ]
        found = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
        )
        assert found.returncode == 2 and found.stdout.strip() == ""
        assert found.stderr.count("\n") == 1 and "lm-eval-coupling: got " in found.stderr


def test_what_is_cut_is_told(home, tmp_path, caplog):
    file = tmp_path / "long.txt"
    file.write_text("short\n" + "a long line " * 20)
    arguments = {
        "model_args": "max_length=32",
        "coupling": f"ranks=2,store={tmp_path / 's'}",
        "device": "cpu",
    }
    measure_texts(str(home / "float32"), file, tmp_path / "out", **arguments)
    told = "coupling: 1 of 2 prompts are longer than the model's 32 tokens; "
    told += "the last of these are measured"
    assert told in caplog.messages
    assert sorted(load_records(tmp_path / "out").n_tokens) == [5, 32]
