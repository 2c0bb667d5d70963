"""The script that trains vision transformers side by side: each equals one trained alone."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import vision_training as script
import vit_members as vit
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from lm_eval_coupling.errors import CouplingError

TINY = "--width 16 --depth 2 --heads 2 --patch 4 --epochs 6 --batch 8 --rate 0.05".split()
TINY += "--cutmix 0.2 --device cpu".split()
TINY += ["--weight-decay", "0.1"]
CLASSES = ["dark", "bright"]


def encoded(shade, noise, side=8):
    pixels = np.clip(shade + noise.integers(-40, 40, (side, side, 3)), 0, 255).astype("uint8")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_split(folder, split, count, side=8):
    noise = np.random.default_rng(len(split))
    images = [encoded(60 + 140 * (i % 2), noise, side) for i in range(count)]
    rows = pd.DataFrame({"img": images, "label": np.arange(count) % 2})
    folder.mkdir(exist_ok=True)
    rows.to_parquet(folder / f"{split}.parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_split(folder, "train", 48)
    write_split(folder, "test", 16)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "family"
    script.main(
        [str(data), "--out", str(out), *TINY, "--stochastic-depth", "0", "0.4", "--together", "2"]
    )
    return out


def a_family(rates=(0.0, 0.5), decays=(0.1, 0.3)):
    model, draws = (
        vit.fresh_model(16, 3, 2, 4, 8, CLASSES, seed=1),
        torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=draws))
    members = [vit.Member(rate, decay) for rate, decay in zip(rates, decays, strict=True)]
    return model.eval(), vit.Members(model, members, torch.device("cpu"))


def test_a_member_says_what_its_transformers_model_says():
    model, family = a_family()
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = model(images).logits
    actual = family.logits(images, torch.float32)
    assert actual.shape == (2, 5, 2)
    for index in (0, 1):
        torch.testing.assert_close(actual[index], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            family.model_of(index)(images).logits, expected, rtol=1e-5, atol=1e-6
        )


def test_stochastic_depth_drops_branches_of_a_share_of_the_images_and_keeps_their_mean():
    _, family = a_family()
    kept = family._branch_factors(4000, torch.float32, torch.Generator().manual_seed(0))[..., 0, 0]
    assert (kept[:, :, 0] == 1).all() and (
        kept[0] == 1
    ).all()  # no rate; and the first block is always kept
    last = kept[2, :, 1]
    assert set(last.unique().tolist()) == {0.0, 2.0}
    assert last.mean(1).sub(1).abs().max() < 0.06
    assert kept[1, :, 1].unique().tolist() == [0.0, pytest.approx(1 / 0.75)]


def test_a_step_is_that_of_adamw_with_the_members_own_decay():
    """One optimizer for all must not mix the members' gradients, clippings or decays."""
    model, family = a_family(rates=(0.0, 0.0))
    optimizer = vit.Optimizer(family, clip=0.5)
    images = torch.randn(2, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1] * 3)
    for step in range(3):
        logits = family.logits(images[step % 2], torch.float32)
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.repeat(2), reduction="sum"
        ).div(6).backward()
        optimizer.step(0.01)
    for index, decay in enumerate((0.1, 0.3)):
        alone = type(model)(model.config)
        alone.load_state_dict(model.state_dict())
        plain = [
            p
            for n, p in alone.named_parameters()
            if p.dim() < 2 or "cls_token" in n or "position" in n
        ]
        others = [p for p in alone.parameters() if not any(p is item for item in plain)]
        adam = torch.optim.AdamW(
            [{"params": plain, "weight_decay": 0.0}, {"params": others, "weight_decay": decay}],
            lr=0.01,
        )
        for step in range(3):
            torch.nn.functional.cross_entropy(alone(images[step % 2]).logits, targets).backward()
            torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
            adam.step()
            adam.zero_grad()
        for (name, actual), expected in zip(
            family.model_of(index).named_parameters(), alone.parameters(), strict=True
        ):
            if (
                "k_proj.bias" not in name
            ):  # softmax does not see it: a gradient of rounding, which Adam makes large
                torch.testing.assert_close(
                    actual, expected, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
                )


def test_a_moved_image_is_a_cut_of_the_padded_one():
    images = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)
    padded = torch.nn.functional.pad(vit.normalize(images), [2] * 4)
    for image, moved in enumerate(vit.augment(images, 2, torch.Generator().manual_seed(0))):
        cuts = [
            padded[image, :, top : top + 8, left : left + 8]
            for top in range(5)
            for left in range(5)
        ]
        assert any(torch.equal(moved, item) or torch.equal(moved, item.flip(-1)) for item in cuts)


def test_cutmix_weighs_targets_by_area():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    targets = script.smoothed(torch.tensor([0, 1, 0, 1]), 2, 0.0)
    mixed, weighed = vit.cut_mix(images, targets, script.random.Random(0))
    for i in range(4):
        share = (mixed[i] == (i - 1) % 4).double().mean().item()
        assert 0 < share < 1
        assert weighed[i, i % 2] == pytest.approx(1 - share) and weighed[i].sum() == 1


def test_members_are_ordinary_models(trained, data):
    facts = pd.read_csv(trained / "facts.csv")
    assert facts["model"].tolist() == ["depth-0-decay-0.1", "depth-0.4-decay-0.1"]
    assert facts["stochastic_depth"].tolist() == [0, 0.4] and facts["accuracy"].min() > 0.9
    for name, accuracy in zip(facts["model"], facts["accuracy"], strict=True):
        model = AutoModelForImageClassification.from_pretrained(trained / name).eval()
        processor = AutoImageProcessor.from_pretrained(trained / name, backend="pil")
        test = pd.read_parquet(data / "test.parquet")
        images = [Image.open(io.BytesIO(cell["bytes"])) for cell in test["img"]]
        actual = (
            model(**processor(images, return_tensors="pt")).logits.argmax(-1).numpy()
            == test["label"]
        )
        assert actual.mean() == pytest.approx(accuracy)
        assert model.config.id2label == {0: "0", 1: "1"}


def test_a_member_is_what_it_would_be_alone(trained, data, tmp_path):
    script.main([str(data), "--out", str(tmp_path), *TINY, "--stochastic-depth", "0.4"])
    item, other = (
        dict(
            AutoModelForImageClassification.from_pretrained(
                folder / "depth-0.4-decay-0.1"
            ).named_parameters()
        )
        for folder in (trained, tmp_path)
    )
    for name in item:
        if "k_proj.bias" not in name:
            torch.testing.assert_close(item[name], other[name], rtol=1e-2, atol=1e-3)
    first = dict(
        AutoModelForImageClassification.from_pretrained(
            trained / "depth-0-decay-0.1"
        ).named_parameters()
    )
    assert not torch.allclose(item["classifier.weight"], first["classifier.weight"], atol=1e-2)


def test_what_is_there_is_not_trained_again(trained, data, capsys):
    def written():
        return {file: file.stat().st_mtime_ns for file in trained.glob("*/model.safetensors")}

    before = written()
    script.main([str(data), "--out", str(trained), *TINY, "--stochastic-depth", "0", "0.4", "0.2"])
    assert {file: written()[file] for file in before} == before
    assert len(pd.read_csv(trained / "facts.csv")) == len(written()) == 3
    assert "depth-0.2-decay-0.1" in capsys.readouterr().out


def test_every_member_is_measured_once(trained, data, tmp_path, monkeypatch):
    commands = []

    def ran(words, **kwargs):
        commands.append(words)
        out = Path(words[words.index("--out") + 1])
        (out / "results_x.json").write_text("{}")
        return script.subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(script.subprocess, "run", ran)
    words = [
        str(data),
        "--out",
        str(trained),
        *TINY,
        "--stochastic-depth",
        "0",
        "0.4",
        "--output-path",
        str(tmp_path),
    ]
    script.main(words)
    script.main(words)
    assert [Path(c[c.index("--model") + 1]).name for c in commands] == [
        "depth-0-decay-0.1",
        "depth-0.4-decay-0.1",
    ]


def test_a_time_that_is_given_chooses_the_number_of_steps(data, tmp_path, capsys):
    words = [
        str(data),
        "--out",
        str(tmp_path),
        *TINY,
        "--stochastic-depth",
        "0",
        "--seconds",
        "4",
        "--epochs",
        "1000",
    ]
    script.main(words)
    about = json.loads((tmp_path / "depth-0-decay-0.1" / "facts.json").read_text())
    assert 10 < about["epochs"] < 1000 and about["seconds"] < 20
    assert "s a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda folder: (folder / "train.parquet").unlink(),
            r"expected a folder with train\*.parquet",
        ),
        (
            lambda folder: pd.DataFrame({"a": [1]}).to_parquet(folder / "train.parquet"),
            "with a, expected a column of images",
        ),
        (lambda folder: write_split(folder, "train_more", 4, side=12), "images of 2 sizes"),
    ],
)
def test_other_data_is_told(tmp_path, change, message):
    for split in ("train", "test"):
        write_split(tmp_path, split, 8)
    change(tmp_path)
    with pytest.raises(CouplingError, match=message):
        script.main([str(tmp_path), "--out", str(tmp_path / "out"), *TINY])
    assert not (tmp_path / "out").exists()


def test_another_family_is_not_added_to(trained, data):
    with pytest.raises(
        CouplingError, match="a family of other data or settings .*; choose another --out"
    ):
        script.main([str(data), "--out", str(trained), *TINY, "--rate", "0.01"])


@pytest.mark.parametrize(
    "words", ["--epochs 0", "--rate 0", "--images 0", "--images -1", "--limit 0", "--seconds 0"]
)
def test_a_number_that_makes_nothing_is_refused(data, tmp_path, capsys, words):
    """A rate of 0 was that of --size, and --images -1 left out the last image."""
    with pytest.raises(SystemExit):
        script.main([str(data), "--out", str(tmp_path / "out"), *TINY, *words.split()])
    assert "expected a number above 0" in capsys.readouterr().err


def test_classes_are_those_of_all_images(tmp_path):
    for split, labels in (("train", [0, 1, 0, 2]), ("test", [0, 3])):
        write_split(tmp_path, split, len(labels))
        file = tmp_path / f"{split}.parquet"
        pd.read_parquet(file).assign(label=labels).to_parquet(file)
    few = script.read_images(tmp_path, "train", torch.device("cpu"), 2)
    assert few.classes == ["0", "1", "2"] and len(few.labels) == 2
    with pytest.raises(CouplingError, match="a test image of label 3, expected 0 to 2"):
        script.main([str(tmp_path), "--out", str(tmp_path / "out"), *TINY])
