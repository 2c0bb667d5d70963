"""One run of a classifier: accuracy as transformers gives it, coupling as measured alone, files as
lm-eval leaves them.
"""

import io
import json
import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from coloured_images import COLOURS, save_classifier
from coupling_analysis import measures_page as reference
from oracles import oracle_by_input
from PIL import Image
from transformers import AutoModelForImageClassification
from vision_cases import tiny_classifier

from lm_eval_coupling import ResidualModel, cli, load_records, load_runs, measure_coupling
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.runs.session import Session
from lm_eval_coupling.vision.classifier import Classifier
from lm_eval_coupling.vision.evaluate import run_vision
from lm_eval_coupling.vision.images import load_images
from lm_eval_coupling.vision.pictures import SIDE, picture
from lm_eval_coupling.vision.summary_token import summary_token

RANKS = "ranks=4+8"


def scores(images, folder, coupling, out):
    file, words, *_ = run_vision(folder, str(images), out, device="cpu", coupling=coupling)
    return json.loads(file.read_text()), words


def test_accuracy_is_that_of_the_model(saved, images, classifier):
    model = AutoModelForImageClassification.from_pretrained(classifier).eval()
    loaded, right = Classifier.load(classifier, "cpu"), []
    for image in load_images(str(images)).first(None):
        right.append(
            model(loaded.pixels(image.decoded())[None]).logits.argmax().item() == image.label
        )
    (row,) = load_runs(saved.parent).to_dict("records")
    assert (
        row["task"] == "colours"
        and row["metric"] == "acc,none"
        and row["n_samples"] == row["n_total"] == 12
    )
    assert row["acc,none"] == pytest.approx(np.mean(right))
    assert row["acc_stderr,none"] == pytest.approx(np.std(right, ddof=1) / 12**0.5)
    assert row["model"] == classifier and row["d_model"] == 24 and row["n_layers"] == 2


def test_coupling_is_that_of_the_same_image_alone(saved, images, classifier):
    records, data = load_records(saved.parent), load_images(str(images))
    assert (
        len(records) == 5 and set(records["kind"]) == {"image"} and set(records["position"]) == {0}
    )
    loaded = Classifier.load(classifier, "cpu")
    wrapped = ResidualModel.wrap(loaded.model)
    for row in records.to_dict("records"):
        pixels = loaded.pixels(data[row["doc_id"]].decoded())
        (alone,) = measure_coupling(wrapped, [pixels], ranks=(4, 8), position=0, progress=False)
        assert abs(row["normalized_miscoupling"] - alone.normalized_miscoupling).max() < 1e-4
        assert row["n_tokens"] == 17 and row["reason"] is None
    assert len(load_records(saved.parent, weights="untrained")) == 5


def test_the_files_are_those_of_an_evaluation(saved):
    date = saved.stem.removeprefix("results_")
    samples_file = saved.with_name(f"samples_colours_{date}.jsonl")
    tables = {
        saved.with_name(f"{weights}coupling_colours_{date}.parquet")
        for weights in ("", "untrained_")
    }
    assert {*saved.parent.iterdir()} == {saved, samples_file, *tables}
    results = json.loads(saved.read_text())
    coupling = results["config"]["coupling"]
    assert coupling["measured_at"] == "the class token" and coupling["measured"] == 5
    mean = coupling["tasks"]["colours"]["measures"]["coupling"]["4"]["mean"]
    assert results["results"]["colours"]["coupling,none"] == pytest.approx(mean)
    samples = [json.loads(line) for line in samples_file.read_text().splitlines()]
    assert len(samples) == 12 and sum(sample["coupling"] is not None for sample in samples) == 5
    assert {sample["target"] for sample in samples} == set(COLOURS)
    for sample in samples:
        likely = [float(value) for value, _ in sample["filtered_resps"]]
        assert likely == sorted(likely, reverse=True) and np.exp(likely).sum() == pytest.approx(1)
        assert sample["acc"] == float(
            sample["arguments"]["gen_args_0"]["arg_1"] == sample["target"]
        )
    assert set(load_records(saved.parent)["doc_hash"]) < {sample["doc_hash"] for sample in samples}


def test_the_table_has_a_picture_of_every_measured_image(saved, images):
    data = load_images(str(images))
    for row in pd.read_parquet(next(saved.parent.glob("*.parquet"))).to_dict("records"):
        shown = np.asarray(Image.open(io.BytesIO(row["picture"])))
        assert np.array_equal(shown, np.asarray(data[row["doc_id"]].decoded()))


def test_every_column_of_the_table_is_described(saved):
    """The picture was told nowhere: neither in the table nor on the page of columns."""
    for file in saved.parent.glob("*.parquet"):
        assert all(field.metadata[b"description"] for field in pq.read_schema(file))
    assert "| `picture` | bytes |" in reference.build_page()


def test_large_pictures_are_reduced():
    made = Image.open(io.BytesIO(picture(Image.new("RGBA", (600, 300), (9, 8, 7, 6)))))
    assert made.size == (SIDE, SIDE // 2) and made.format == "JPEG"


def test_a_second_run_measures_nothing_again(saved, images, classifier, settings, tmp_path):
    file, words, *_ = run_vision(classifier, str(images), tmp_path, device="cpu", coupling=settings)
    assert json.loads(file.read_text())["config"]["coupling"]["reused"] == 5
    one, other = (load_records(f.parent).sort_values("doc_hash") for f in (saved, file))
    for a, b in zip(one["normalized_miscoupling"], other["normalized_miscoupling"], strict=True):
        assert np.array_equal(a, b)
    assert "accuracy" in words and "Measured at the class token" in words


def test_show_takes_it(saved, capsys):
    assert cli.main(["show", str(saved.parent)]) == 0
    assert "colours" in capsys.readouterr().out
    assert cli.main(["show", str(saved.parent), "--task", "colours"]) == 0


def test_a_network_without_a_stream_can_be_scored(images, tmp_path):
    folder = save_classifier(tmp_path / "net", "resnet")
    with pytest.raises(
        CouplingError,
        match="got a ResNetForImageClassification.*; to only score it, give --coupling limit=0",
    ):
        run_vision(folder, str(images), tmp_path / "out", device="cpu", coupling=RANKS)
    results, _ = scores(images, folder, "limit=0", tmp_path / "out")
    assert "acc,none" in results["results"]["colours"] and "coupling" not in results["config"]


def test_an_image_that_cannot_be_decoded_is_left_out_counted_and_named(
    images, classifier, tmp_path, caplog
):
    folder = shutil.copytree(images, tmp_path / "colours")
    (folder / "green" / "broken.png").write_bytes(b"\x89PNG and nothing else")
    results, words = scores(folder, classifier, f"{RANKS},limit=2", tmp_path / "out")
    assert (
        "1 of 13 images could not be decoded and are left out: 8 (green/broken.png)" in caplog.text
    )
    assert [one["name"] for one in results["config"]["undecodable"]] == ["8 (green/broken.png)"]
    assert results["n-samples"]["colours"] == {"original": 13, "effective": 12}
    assert "1 undecodable ones left out" in words and results["config"]["coupling"]["measured"] == 2


def test_no_image_can_be_decoded(classifier, tmp_path):
    for name in COLOURS:
        (tmp_path / "bad" / name).mkdir(parents=True)
        (tmp_path / "bad" / name / "0.png").write_bytes(b"nothing")
    with pytest.raises(CouplingError, match="got bad, of which no image can be decoded: 0 "):
        run_vision(
            classifier, str(tmp_path / "bad"), tmp_path / "out", device="cpu", coupling=RANKS
        )


def test_scores_are_kept_where_measuring_fails(images, classifier, tmp_path, monkeypatch, caplog):
    def broken(self, prompts):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Session, "measure", broken)
    run = run_vision(classifier, str(images), tmp_path, device="cpu", coupling=RANKS)
    results = json.loads(run.file.read_text())
    assert run.problem == "coupling was not recorded (the device is gone)"
    assert "acc,none" in results["results"]["colours"] and "coupling" not in results["config"]
    assert "coupling was not recorded; the scores are complete" in caplog.text


@pytest.mark.parametrize(
    "case, expected", [("vit", 0), ("dinov2-registers", 0), ("beit", 10), ("siglip", 10)]
)
def test_the_token_that_the_classifier_reads(case, expected):
    position, words = summary_token(ResidualModel.wrap(tiny_classifier(case, torch.float32)))
    assert position == expected
    assert (
        words == "the class token" if expected == 0 else words.startswith(f"token {expected} of 1")
    )


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--coupling", "rank=4"],
            "got unknown argument coupling_rank, did you mean coupling_ranks",
        ),
        (["--coupling", "ranks"], "got --coupling with 'ranks', expected name=value,name=value"),
        (["--coupling", "ranks=99"], "99"),
        (["--coupling", RANKS, "--batch_size", "0"], "got a batch size of 0"),
        (
            ["--coupling", RANKS, "--device", "cuda:77"],
            "got device='cuda:77', which this machine does not have",
        ),
        (["--coupling", RANKS, "--split", "validation"], "got split 'validation' of"),
        (
            ["--model", "/no/such/folder"],
            "/no/such/folder, which is no folder here and no name on the hub",
        ),
    ],
)
def test_mistakes_are_told_in_a_sentence(images, classifier, tmp_path, capsys, words, said):
    given = [
        "--model",
        classifier,
        "--data",
        str(images),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert cli.main(["vision", *given, *words]) == 2
    assert said in capsys.readouterr().err


def test_the_command_says_what_it_found(images, classifier, tmp_path, capsys):
    given = [
        "--model",
        classifier,
        "--data",
        str(images),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert cli.main(["vision", *given, "--limit", "6", "--coupling", f"{RANKS},limit=2"]) == 0
    out = capsys.readouterr().out
    assert "colours: accuracy" in out and "over 6 images" in out and "results_" in out


def test_every_patch_moves_the_class_token(images, classifier, tmp_path):
    """Measures over tokens took those after the measured one for unable to move it: of the class
    token all.
    """
    settings = "ranks=4,limit=1,measures=depth+spectra+self+context,tokens=last3,"
    settings += f"store={tmp_path / 'store.sqlite'}"
    file, *_ = run_vision(
        classifier, str(images), tmp_path / "out", device="cpu", coupling=settings
    )
    (row,) = load_records(file.parent).to_dict("records")
    assert (
        row["reason"] is None
        and row["frobenius_norms"].shape == (2, 17)
        and row["frobenius_norms"].min() > 1e-4
    )
    assert tuple(row["self_tokens"]) == tuple(row["context_tokens"]) == (14, 15, 16)
    loaded = Classifier.load(classifier, "cpu")
    pixels = loaded.pixels(load_images(str(images))[row["doc_id"]].decoded())
    expected = oracle_by_input(
        loaded.model.double(), pixels[None].double(), 1, 0
    )  # [d_out, t_in, d_in]
    np.testing.assert_allclose(row["frobenius_norms"][1], expected.norm(dim=(0, 2)), rtol=1e-4)
    spectrum = torch.linalg.svdvals(expected[:, 0])
    assert row["participation_ratio"][1] == pytest.approx(
        (spectrum.square().sum() ** 2 / spectrum.pow(4).sum()).item(), 1e-3
    )


def test_several_tokens_of_an_image(images, classifier, tmp_path):
    settings = f"ranks=4,limit=2,position=0+5,store={tmp_path / 'store.sqlite'}"
    file, words, *_ = run_vision(
        classifier, str(images), tmp_path / "out", device="cpu", coupling=settings
    )
    rows = pd.read_parquet(next(file.parent.glob("coupling_colours_*.parquet")))
    assert sorted(rows["position"]) == [0, 0, 5, 5] and len(load_records(file.parent)) == 2
    assert "as asked for" in words


def test_the_same_images_are_chosen_for_every_model(saved, images, tmp_path):
    other = save_classifier(tmp_path / "other", "dinov2")
    file, *_ = run_vision(
        other, str(images), tmp_path / "out", device="cpu", coupling=f"{RANKS},limit=5"
    )
    assert set(load_records(file.parent)["doc_hash"]) == set(load_records(saved.parent)["doc_hash"])
