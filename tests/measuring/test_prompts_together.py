"""Prompts measured together have the same numbers as alone; a failure is of its prompt only."""

import cases
import numpy as np
import pytest
import torch
from wrapping import wrapped_on

from lm_eval_coupling.errors import Unmeasurable
from lm_eval_coupling.jacobians import closed
from lm_eval_coupling.measures.formulas import miscoupling as formulas
from lm_eval_coupling.measuring import prompt as measure
from lm_eval_coupling.measuring.batch import TracedPrompt
from lm_eval_coupling.measuring.prompt import measure_prompt
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.numerics import memory
from lm_eval_coupling.numerics.transfer import all_on_host, rows_on_host
from lm_eval_coupling.residual import ResidualModel

PROMPTS = [cases.tiny_tokens(seq).flatten().tolist() for seq in (3, 17, 9, 3, 5)]


@pytest.fixture
def in_the_same_operations(monkeypatch):
    """Pairs of several prompts at once, as on a GPU; how many came together each time."""
    sizes = []
    right = formulas.at_ranks

    def counted(A, *rest):
        sizes.append(len(A))
        return right(A, *rest)

    monkeypatch.setattr(formulas, "at_ranks", counted)
    monkeypatch.setattr(memory, "prompts_at_once", lambda *_: 3)
    return sizes


def test_pairs_of_several_prompts_are_those_of_each(in_the_same_operations, float64_device):
    wrapped, settings = (
        wrapped_on(float64_device, cases.tiny_model("llama")),
        Settings((2, 4), dtype="float64"),
    )
    found = measure.measure_prompts(wrapped, PROMPTS, -1, settings)
    assert in_the_same_operations == [3, 2]
    for record, tokens in zip(found, PROMPTS, strict=True):
        alone = measure_prompt(wrapped, tokens, -1, settings)
        assert record.reason is None and record.to_columns().keys() == alone.to_columns().keys()
        for name, value in alone.to_columns().items():
            together = getattr(record, name)
            assert np.shape(together) == np.shape(value) and type(together) is type(value), name
            if (
                isinstance(value, np.ndarray)
                and value.dtype.kind == "f"
                and name not in ("certificate", "svd_residual")
            ):
                # The joint sign of U and V is arbitrary, and so is a rotation if the gap is small.
                np.testing.assert_allclose(together, value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_prompt_that_cannot_be_measured_leaves_the_others_of_its_group(
    in_the_same_operations, monkeypatch
):
    right = TracedPrompt.triplets.fget

    def failing(self):
        if len(self.tokens) == 17:
            raise Unmeasurable("refused", "this one is refused")
        return right(self)

    monkeypatch.setattr(TracedPrompt, "triplets", property(failing))
    found = measure.measure_prompts(
        ResidualModel.wrap(cases.tiny_model("llama")), PROMPTS, -1, Settings((2,))
    )
    assert in_the_same_operations == [
        1,
        1,
        2,
    ]  # those beside it one by one, the next group together
    reasons = [record.reason for record in found]
    assert reasons == [None, "no depth: this one is refused", None, None, None]
    assert all(np.isfinite(record.coupling(2)) for record in found if record.reason is None)
    assert found[1].line_shape_score > 1


def test_results_leave_a_device_as_they_were(device):
    values = [
        torch.arange(6.0).view(2, 3),
        torch.tensor(7.0),
        torch.arange(4).view(2, 2),
        torch.empty(0, 3),
    ]
    for there, value in zip(
        all_on_host([value.to(device) for value in values]), values, strict=True
    ):
        assert (
            there.device.type == "cpu" and there.dtype == value.dtype and torch.equal(there, value)
        )
    first, second = rows_on_host({"a": values[0].to(device), "b": values[0][:, 0].to(device)})
    assert first["a"].tolist() == [0, 1, 2] and second["a"].tolist() == [3, 4, 5]
    assert first["b"].shape == () and second["b"] == 3


@pytest.mark.parametrize(
    "case", ["llama", "gemma3", "gpt2", "bloom", "falcon-alibi", "mixtral", "qwen3-next"]
)
def test_prompts_measured_together_are_those_measured_alone(case, float64_device):
    """Padding on the right and a batch of the closed level change nothing but rounding."""
    together = wrapped_on(float64_device, cases.tiny_model(case))
    prompts = [cases.tiny_tokens(seq).flatten().tolist() for seq in (3, 17, 9, 3)]
    settings = Settings((2, 4), dtype="float64")
    for position in (-1, 1):
        found = measure.measure_prompts(together, prompts, position, settings)
        for record, tokens in zip(found, prompts, strict=True):
            alone = measure_prompt(together, tokens, position, settings)
            assert (
                record.reason is None
                and record.tokens == tuple(tokens)
                and record.position == position % len(tokens)
            )
            assert record.method == alone.method and record.certificate.max() < 1e-10
            np.testing.assert_allclose(record.singular_values, alone.singular_values, rtol=1e-5)
            np.testing.assert_allclose(record.norms, alone.norms, rtol=1e-6)
            np.testing.assert_allclose(record.miscoupling, alone.miscoupling, rtol=1e-4, atol=1e-6)


def test_a_batch_really_is_one(monkeypatch):
    wrapped = ResidualModel.wrap(cases.tiny_model("llama"))
    widths = []
    right = closed.Tape.watch

    def watch(self, value, tangent=None):
        widths.append(value.shape)
        return right(self, value, tangent)

    monkeypatch.setattr(closed.Tape, "watch", watch)
    measure.measure_prompts(wrapped, [[1, 2, 3], [4, 5, 6, 7]], -1, Settings((2,)))
    assert widths[0] == (2, 24)


def test_one_bad_prompt_of_a_batch_costs_the_others_nothing():
    wrapped = ResidualModel.wrap(cases.tiny_model("llama"))
    good, empty, unknown = measure.measure_prompts(
        wrapped, [[1, 2, 3], [], [1, 10**6]], -1, Settings((2,))
    )
    assert good.reason is None and good.certificate.max() < 1e-4
    assert empty.reason and unknown.reason


def test_prompts_are_grouped_by_length_within_memory(monkeypatch):
    wrapped = ResidualModel.wrap(cases.tiny_model("llama"))
    prompts = [[1] * n for n in (1500, 4, 900, 3, 1000, 5)]
    settings = Settings((2,))
    assert measure.groups(wrapped, prompts, settings) == [[3, 1, 5], [2, 4], [0]]
    monkeypatch.setattr(memory, "PROMPTS", 2)
    assert measure.groups(wrapped, prompts, settings) == [[3, 1], [5], [2, 4], [0]]
    monkeypatch.setattr(memory, "BYTES", 1)
    assert all(len(group) == 1 for group in measure.groups(wrapped, prompts, settings))
