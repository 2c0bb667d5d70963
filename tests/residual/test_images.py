"""Image classifiers as residual streams: each family, every pair of tokens, against autodiff."""

import copy
import pickle

import pytest
import torch
import vision_cases
from oracles import oracle, oracle_by_input, worst
from wrapping import wrapped_on

from lm_eval_coupling import block_jacobians, measure_coupling
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.jacobians.token_pairs import jacobians_of_pairs
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.residual.image_inputs import ImageTokens

PAIRS = [(0, 0), (5, 5), (5, 2), (2, 5), (0, 7)]  # output, input; patches see the ones after them


@pytest.mark.parametrize("case", vision_cases.CASES)
def test_jacobians_are_those_of_plain_autodiff(case, float64_device):
    model, image = vision_cases.tiny_classifier(case), vision_cases.tiny_images()
    wrapped = wrapped_on(float64_device, model)
    by_input = {
        (layer, t_out): oracle_by_input(model, image, layer, t_out)
        for layer in range(2)
        for t_out in {t_out for t_out, _ in PAIRS}
    }
    for t_out, t_in in PAIRS:
        options = {"output_token": t_out, "input_token": t_in}
        double = block_jacobians(wrapped, image, dtype=torch.float64, **options)
        single = block_jacobians(wrapped, image, dtype=torch.float32, **options)
        assert double.method == [vision_cases.level(case)] * 2
        assert double.certificate.max() < 1e-10 and single.certificate.max() < 1e-4
        for layer in range(2):
            expected = by_input[layer, t_out][:, t_in]
            assert expected.norm() > 1e-4
            assert worst(double.jacobians[layer].cpu(), expected) < 1e-12
            assert worst(single.jacobians[layer].cpu().double(), expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["vit", "dinov2"])
def test_half_precision_weights(case, dtype, float64_device):
    model, image = vision_cases.tiny_classifier(case, dtype), vision_cases.tiny_images(dtype=dtype)
    found = block_jacobians(
        wrapped_on(float64_device, model), image, output_token=0, dtype=torch.float64
    )
    for layer, jacobian in enumerate(found.jacobians.cpu()):
        assert (
            worst(jacobian, oracle(copy.deepcopy(model).double(), image.double(), layer, 0, 0))
            < 1e-9
        )


def test_all_pairs_at_once_with_later_tokens_as_inputs(float64_device):
    model, image = vision_cases.tiny_classifier("dinov2"), vision_cases.tiny_images()
    wrapped = wrapped_on(float64_device, model)
    (trace,) = wrapped.traces([wrapped.encode(image)], torch.float64)
    pairs = [(3, t) for t in range(17)]
    found, errors = jacobians_of_pairs(trace.calls[1], pairs)
    expected = oracle_by_input(model, image, 1, 3)
    assert errors.max() < 1e-10
    for i, (_, t) in enumerate(pairs):
        assert worst(found[i].cpu(), expected[:, t]) < 1e-12


def test_the_model_stays_untouched():
    model, image = (
        vision_cases.tiny_classifier("vit", torch.float32),
        vision_cases.tiny_images(dtype=torch.float32),
    )
    before, kept = model(image).logits, {name: p.clone() for name, p in model.named_parameters()}
    block_jacobians(ResidualModel.wrap(model), image, output_token=0)
    assert torch.equal(model(image).logits, before) and model.config._attn_implementation == "sdpa"
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())


def test_images_measured_together_are_those_measured_alone():
    wrapped = ResidualModel.wrap(vision_cases.tiny_classifier("vit", torch.float32))
    images = list(vision_cases.tiny_images(5, dtype=torch.float32))
    options = {"ranks": (4, 8), "position": 0, "progress": False}
    together = measure_coupling(wrapped, images, **options)
    for image, found in zip(images, together, strict=True):
        (alone,) = measure_coupling(wrapped, [image], **options)
        assert found.reason is None and found.position == 0 and len(found.tokens) == 17
        assert found.tokens == alone.tokens
        assert abs(found.normalized_miscoupling - alone.normalized_miscoupling).max() < 1e-4


def test_the_head_reads_vectors_as_if_they_were_the_class_token(float64_device):
    model, image = vision_cases.tiny_classifier("vit"), vision_cases.tiny_images()
    wrapped = wrapped_on(float64_device, model)
    trace = wrapped.trace(image, torch.float64)
    logits = wrapped.logits(trace.trajectory(0))
    assert logits.shape == (3, 5)
    torch.testing.assert_close(logits[-1].cpu(), model(image).logits[0])


def test_an_image_is_named_by_its_pixels():
    wrapped = ResidualModel.wrap(vision_cases.tiny_classifier("vit"))
    one, other = vision_cases.tiny_images(2)
    prompt = wrapped.encode(one)
    assert prompt == wrapped.encode(one[None].clone()) != wrapped.encode(other)
    assert len(prompt) == 17 == len(set(prompt)) and all(0 <= number < 2**63 for number in prompt)
    assert isinstance(prompt, ImageTokens) and torch.equal(prompt.pixels(), one)
    assert pickle.loads(pickle.dumps(prompt)) == prompt  # a plain tuple, without its pixels


@pytest.mark.parametrize(
    "architecture",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "deit3_small_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "beit_base_patch16_224",
        "vit_base_patch16_siglip_224",
        "vit_relpos_small_patch16_224",
    ],
)
def test_models_of_timm(architecture):
    pytest.importorskip("timm", exc_type=ImportError, reason="timm, which needs torchvision")
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4}
    torch.manual_seed(0)
    about = {
        "architecture": architecture,
        "num_classes": 5,
        "model_args": arguments,
    }  # labels would be asked for by name
    model = TimmWrapperForImageClassification(TimmWrapperConfig.from_dict(about)).double().eval()
    found = block_jacobians(
        ResidualModel.wrap(model), vision_cases.tiny_images(), output_token=0, dtype=torch.float64
    )
    assert found.method == ["closed", "closed"] and found.certificate.max() < 1e-10


@pytest.mark.parametrize("name", vision_cases.NO_STREAM)
def test_other_networks_are_refused_in_a_sentence(name):
    with pytest.raises(
        CouplingError, match=r"got a (ResNet|ConvNext|Swin)ForImageClassification.*expected"
    ):
        ResidualModel.wrap(vision_cases.tiny_classifier(name, torch.float32))


@pytest.mark.parametrize(
    "wrong", [torch.zeros(16, 16), torch.zeros(3, 16, 16, dtype=torch.uint8), [1, 2, 3]]
)
def test_what_is_no_image_is_told(wrong):
    wrapped = ResidualModel.wrap(vision_cases.tiny_classifier("vit"))
    with pytest.raises(
        CouplingError, match=r"as an image, expected pixel values \[channel, height, width\]"
    ):
        wrapped.trace(wrong)


@pytest.mark.parametrize(
    ("images", "words"),
    [((20, 16), "pixel_values .*20, 16.*does not take"), ((8, 8), "pixel_values")],
)
def test_an_image_of_another_size_is_told(images, words):
    wrapped = ResidualModel.wrap(vision_cases.tiny_classifier("vit"))
    with pytest.raises(CouplingError, match=words):
        wrapped.trace(torch.zeros(3, *images, dtype=torch.float64))


def test_images_of_two_sizes_are_not_put_together():
    wrapped = ResidualModel.wrap(vision_cases.tiny_classifier("vit"))
    with pytest.raises(CouplingError, match="of shapes .* together"):
        wrapped.traces([torch.zeros(3, 16, 16), torch.zeros(3, 8, 8)], torch.float64)
