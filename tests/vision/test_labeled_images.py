"""Labelled images: what is taken, what is told in a sentence, and which label of the model one of
the data is.
"""

import datasets
import numpy as np
import pandas as pd
import pytest
from coloured_images import save_images

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.vision.images import load_images
from lm_eval_coupling.vision.labels import model_labels


def encoded(images):
    return [
        {"bytes": (images / name / "0.png").read_bytes(), "path": f"{name}.png"}
        for name in ("blue", "red")
    ]


def test_a_folder_by_label(images):
    found = load_images(str(images))
    assert (found.name, found.split, len(found)) == ("colours", "train", 12)
    assert found.classes == ["blue", "green", "red"] and found.count_labels() == 3
    assert [image.label for image in found.first(None)] == [0] * 4 + [1] * 4 + [2] * 4
    first = found[0]
    assert (
        first.name == "0 (blue/0.png)" and first.encoded == (images / "blue" / "0.png").read_bytes()
    )
    assert np.asarray(first.decoded()).shape == (16, 16, 3)
    assert [image.number for image in found.first(5)] == [0, 1, 2, 3, 4]


def test_parquet_with_plain_columns_and_its_default_split(images, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split in ("train", "test"):
        pd.DataFrame({"img": encoded(images), "label": [1, 0], "text": ["a", "b"]}).to_parquet(
            folder / f"{split}.parquet"
        )
    found = load_images(str(folder))
    assert (found.name, found.split, found.classes, found.count_labels()) == (
        "pairs",
        "test",
        None,
        2,
    )
    assert load_images(str(folder), "train").split == "train"
    assert load_images(str(folder / "test.parquet")).name == "pairs"


def test_labels_in_words(images, tmp_path):
    pd.DataFrame({"img": encoded(images), "label": ["blue", "red"]}).to_parquet(
        tmp_path / "words.parquet"
    )
    found = load_images(str(tmp_path / "words.parquet"))
    assert found.classes == ["blue", "red"] and [image.label for image in found.first(None)] == [
        0,
        1,
    ]


def test_rows_without_a_label_are_passed_over(images, tmp_path):
    pd.DataFrame({"img": encoded(images) * 2, "label": [-1, 0, 1, -1]}).to_parquet(
        tmp_path / "half.parquet"
    )
    assert [image.label for image in load_images(str(tmp_path / "half.parquet")).first(None)] == [
        0,
        1,
    ]
    pd.DataFrame({"img": encoded(images), "label": [-1, -1]}).to_parquet(
        tmp_path / "secret.parquet"
    )
    with pytest.raises(CouplingError, match="has no labelled image; choose another with --split"):
        load_images(str(tmp_path / "secret.parquet"))


def test_equal_images_with_equal_labels_are_one_document(images):
    one, other, again = (load_images(str(images))[number] for number in (0, 1, 0))
    assert one.digest() == again.digest() != other.digest()


def test_a_folder_without_labels(tmp_path):
    save_images(tmp_path / "plain", colours={"all": (1, 2, 3)})
    for file in (tmp_path / "plain" / "all").iterdir():
        file.rename(tmp_path / "plain" / file.name)
    (tmp_path / "plain" / "all").rmdir()
    with pytest.raises(
        CouplingError,
        match=r"columns image, expected one column of class labels \(of a folder: two",
    ):
        load_images(str(tmp_path / "plain"))


def test_what_is_no_data_set(images, tmp_path):
    with pytest.raises(CouplingError, match="got split 'best' of .*colours, expected one of train"):
        load_images(str(images), "best")
    (tmp_path / "notes.md").write_text("no images")
    with pytest.raises(
        CouplingError, match=r"got the file .*notes.md, expected a folder of images, .parquet"
    ):
        load_images(str(tmp_path / "notes.md"))
    with pytest.raises(CouplingError, match="which datasets cannot load"):
        load_images(str(tmp_path / "nowhere" / "at-all"))
    datasets.Dataset.from_dict({"x": [1]}).to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(CouplingError, match="with the columns x, expected one column of images"):
        load_images(str(tmp_path / "numbers.parquet"))


NAMED = {0: "Great White", 1: "tench, Tinca tinca", 2: "crane", 3: "crane"}


@pytest.mark.parametrize(
    "classes, count, names, expected",
    [
        (["red", "blue"], 2, {0: "blue", 1: "red"}, [1, 0]),
        (["Tinca tinca", "great_white"], 2, NAMED, [1, 0]),
        (
            ["great white", "tench", "crane", "crane"],
            4,
            NAMED,
            [0, 1, 2, 3],
        ),  # in the model's order: not by name
        (None, 3, {0: "a", 1: "b", 2: "c"}, [0, 1, 2]),
        (["red", "blue"], 2, {0: "LABEL_0", 1: "LABEL_1"}, [0, 1]),
        (["0", "1"], 2, {0: "no", 1: "yes"}, [0, 1]),
    ],
)
def test_labels_are_found_by_name_else_by_number(classes, count, names, expected):
    assert model_labels(classes, count, names) == expected


def test_labels_that_the_model_does_not_know():
    with pytest.raises(
        CouplingError, match=r"got 2 labels \('ship', 'frog'\) that the model does not know"
    ):
        model_labels(["red", "ship", "frog"], 3, {0: "red", 1: "blue"})
    with pytest.raises(
        CouplingError,
        match="got data with 12 labels and a model with 2, expected one that knows them all",
    ):
        model_labels(None, 12, {0: "red", 1: "blue"})
    with pytest.raises(
        CouplingError, match="got the label 'crane', by which the model knows 2, expected one"
    ):
        model_labels(["crane", "tench"], 2, NAMED)
