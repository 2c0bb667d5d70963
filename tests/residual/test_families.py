"""The table of model families is right for a share of them, made anew by make_families.py."""

from importlib.metadata import version

import cases
import make_families
import pytest

SHARE = sorted(
    {
        "llama",
        "falcon",
        "gemma4_text",
        "biogpt",
        "bert",
        "qwen3_next",
        *sorted(make_families.CLASSES)[::16],
    }
)


@pytest.fixture(scope="module")
def written():
    return make_families.written()


def test_every_class_of_transformers_mapping_is_in_it(written):
    if f"transformers {version('transformers')} " not in make_families.PAGE.read_text():
        pytest.skip("made with another version of transformers")
    assert written.keys() == make_families.CLASSES.keys()
    assert make_families.PAGE.read_text() == make_families.page(
        [written[name] for name in sorted(written)], make_families.written_images()
    )


@pytest.mark.parametrize("model_type", SHARE)
def test_a_class_is_measured_or_refused_in_a_sentence(written, model_type):
    """No other exception, whatever the class; and as the page says."""
    found = make_families.row(model_type)
    if f"transformers {version('transformers')} " in make_families.PAGE.read_text():
        assert found == written[model_type], "run python tests/support/make_families.py"
    assert found.count(" | ") == 3


@pytest.mark.parametrize("case", ["vit", "beit", "resnet"])
def test_an_image_classifier_is_measured_or_refused_in_a_sentence(case):
    assert make_families.image_row(case) in make_families.written_images(), (
        "run python tests/support/make_families.py llama"
    )


def test_what_is_held_to_the_oracle_is_named(written):
    exact = {kind for kind, _ in (cases.CASES | cases.MORE).values()}
    assert {name for name, row in written.items() if "**" in row} == exact & written.keys()
