"""Whatever is switched on outside, float32 is float32 inside, and everything is put back."""

import threading
import time

import pytest
import torch

from lm_eval_coupling.measures.formulas.miscoupling import coupling_matrix
from lm_eval_coupling.numerics.precision import exact_arithmetic, true_float32

NEWER = [
    ("generic", "all"),
    *((backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")),
]
TF32_AT_START = [("cuda", "conv"), ("cuda", "rnn")]


def settings():
    """Everything that can be read; the older switches cannot where the two ways disagree."""
    found = {}
    if hasattr(torch._C, "_get_fp32_precision_getter"):
        found = {place: torch._C._get_fp32_precision_getter(*place) for place in NEWER}
    for name, read in (
        ("products", torch.get_float32_matmul_precision),
        ("cublas", torch._C._get_cublas_allow_tf32),
        ("cudnn", torch._C._get_cudnn_allow_tf32),
    ):
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "disagreement"
    return found


def as_torch_starts():
    """Put back what any test, of this file or of another that ran in this process before, has
    switched on.
    """
    torch.set_float32_matmul_precision("highest")
    torch._C._set_cudnn_allow_tf32(True)
    for place in NEWER if hasattr(torch._C, "_set_fp32_precision_setter") else ():
        torch._C._set_fp32_precision_setter(*place, "tf32" if place in TF32_AT_START else "none")


@pytest.fixture(autouse=True)
def defaults():
    """Each test begins and ends with torch's own settings."""
    as_torch_starts()
    before = settings()
    yield
    as_torch_starts()
    assert settings() == before


def older_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True


def newer(place, value):
    def switch():
        if not hasattr(torch._C, "_set_fp32_precision_setter"):
            pytest.skip("this torch has the older way only")
        torch._C._set_fp32_precision_setter(*place, value)

    return switch


def mixed():
    torch.set_float32_matmul_precision("high")
    newer(("cuda", "matmul"), "ieee")()


SWITCHES = {
    "nothing": lambda: None,
    "allow_tf32": older_tf32,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "no convolutions": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "newer, everything": newer(("generic", "all"), "tf32"),
    "newer, CUDA": newer(("cuda", "all"), "tf32"),
    "newer, products": newer(("cuda", "matmul"), "tf32"),
    "newer, bf16 on a CPU": newer(("mkldnn", "matmul"), "bf16"),
    "both, disagreeing": mixed,
}


@pytest.mark.parametrize("name", SWITCHES)
def test_products_are_pinned_and_all_is_put_back(name):
    """With TensorFloat32 allowed outside, every certificate failed, and coupling matrices were off
    by up to 1e-3.
    """
    SWITCHES[name]()
    before = settings()
    with pytest.raises(KeyError), true_float32():
        inside = settings()
        assert (
            inside.pop("products") == "highest"
            and not inside.pop("cublas")
            and not inside.pop("cudnn")
        )
        assert set(inside.values()) <= {"ieee"}
        raise KeyError
    assert settings() == before


@pytest.mark.parametrize(
    "outside", [torch.inference_mode, torch.no_grad, lambda: torch.set_grad_enabled(False)]
)
def test_derivatives_can_be_taken(outside):
    with outside():
        was = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with exact_arithmetic():
            x = torch.ones(2, requires_grad=True)
            (gradient,) = torch.autograd.grad((x**2).sum(), x)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == was
    assert gradient.tolist() == [2, 2]


def test_autocast_does_not_reach_products():
    """Coupling matrices taken inside a training step's autocast are those taken outside, and can be
    differentiated.
    """
    J, U = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(0))
    J.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = coupling_matrix(J, U, U)
        assert torch.is_autocast_enabled("cpu") and (U @ U).dtype == torch.bfloat16
    assert (
        found.dtype == torch.float32
        and torch.equal(found, coupling_matrix(J, U, U))
        and found.requires_grad
    )


def test_threads_take_turns():
    """One that left put reduced precision back while another was at work, and found weights in
    another's dtype.
    """
    inside, most = [], []

    def work():
        with exact_arithmetic(), exact_arithmetic():
            inside.append(1)
            time.sleep(0.01)
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4
