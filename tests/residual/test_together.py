"""Prompts are traced in one padded pass, unless the model cannot be padded."""

import cases
import pytest
import torch
import vision_cases
from wrapping import wrapped_once

from lm_eval_coupling import ResidualModel

ALONE = {"falcon-alibi", "mpt", "bloom"}  # ALiBi's distances are not those of a padded prompt


@pytest.mark.parametrize("case", cases.CASES)
def test_prompts_are_traced_together(case):
    """A trial that fails counts as a no: prompts then go one by one, which is slow."""
    _, wrapped = wrapped_once(case, torch.device("cpu"))
    prompts = [cases.tiny_tokens(n)[0].tolist() for n in (9, 4)]
    together = wrapped.traces(prompts, torch.float64)
    assert wrapped.tracer._pads_on_the_right(torch.float64) == (case not in ALONE)
    for prompt, trace in zip(prompts, together, strict=True):
        alone = wrapped.trace(prompt, torch.float64)
        assert torch.allclose(
            trace.trajectories(slice(None)), alone.trajectories(slice(None)), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("case", vision_cases.CASES)
def test_images_are_traced_together(case):
    wrapped = ResidualModel.wrap(vision_cases.tiny_classifier(case))
    assert wrapped.tracer._pads_on_the_right(torch.float64)
