"""Drawing from a seed, beside a run that draws on its own."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lm_eval_coupling.numerics.randomness import seeded, undrawn

DEVICES = [
    "cpu",
    *(["cuda"] if torch.cuda.is_available() else []),
    *(["mps"] if torch.backends.mps.is_available() else []),
]


@pytest.mark.parametrize("device", DEVICES)
def test_nobody_notices_that_something_was_drawn(device):
    """A twin with fresh weights reseeded the GPU: texts sampled after it were others than those of
    `--model hf`.
    """
    torch.manual_seed(5)
    torch.rand(3, device=device)
    expected = torch.rand(7, device=device)
    torch.manual_seed(5)
    torch.rand(3, device=device)
    with seeded(11):
        torch.rand(100)
        torch.rand(100, device=device)
    assert torch.equal(torch.rand(7, device=device), expected)


def test_no_accelerator_is_seeded(monkeypatch):
    """`torch.manual_seed` seeds those too that have not started yet, when they start: nobody could
    put them back.
    """

    def reached(*_):
        raise AssertionError("an accelerator's generator was seeded")

    for module, name in (
        (torch.cuda, "manual_seed_all"),
        (torch.mps, "manual_seed"),
        (torch.xpu, "manual_seed_all"),
    ):
        monkeypatch.setattr(module, name, reached)
    monkeypatch.setattr(torch.cuda, "manual_seed", reached)
    with seeded(3):
        assert torch.rand(2).shape == (2,)


def test_the_seed_alone_counts():
    """Also where the caller has another default device."""
    with seeded(3):
        expected = torch.rand(5)
    torch.rand(9)
    torch.set_default_device("meta")
    try:
        with seeded(3):
            found = torch.rand(5)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)
    with seeded(4):
        assert not torch.equal(torch.rand(5), expected)


def test_an_exception_puts_everything_back():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(1):
        torch.rand(1 // 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_that_another_thread_makes_are_initialized():
    """A model made beside a measurement in a thread had whatever its memory held."""

    def made():
        torch.manual_seed(0)
        return torch.nn.Linear(3, 3).weight

    expected = made()
    with undrawn(), ThreadPoolExecutor(1) as threads:
        assert torch.equal(threads.submit(made).result(), expected)
    assert torch.equal(made(), expected)
