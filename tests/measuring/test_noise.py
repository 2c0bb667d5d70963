"""Noise on the input embeddings: nothing at level 0, by hand beyond."""

import cases
import pytest
import torch
from coupling_analysis.noise_robustness import noise_robustness
from studied import load_script
from wrapping import wrapped_on

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measuring.prompt import measure_coupling

PROMPTS = [cases.tiny_tokens(5).flatten().tolist(), cases.tiny_tokens(7).flatten().tolist()]


@pytest.fixture(scope="module")
def model(float64_device):
    return wrapped_on(float64_device, cases.tiny_model("llama"))


def test_no_noise_changes_nothing_and_much_noise_much(model):
    rows = noise_robustness(
        model, PROMPTS, [0.0, 0.01, 3.0], rank=3, dtype="float64", progress=False
    )
    clean = [
        record.coupling(3)
        for record in measure_coupling(model, PROMPTS, ranks=(3,), dtype="float64", progress=False)
    ]
    still = rows[rows["level"] == 0]
    assert still["coupling"].tolist() == pytest.approx(clean, abs=1e-6)
    assert still["cosine_first"].tolist() == pytest.approx([1, 1]) == still["cosine_last"].tolist()
    little, much = rows[rows["level"] == 0.01], rows[rows["level"] == 3]
    assert (0.99 < little["cosine_first"]).all() and (little["cosine_first"] < 1).all()
    assert (much["cosine_first"] < 0.9).all() and (
        much["coupling"] - still["coupling"].to_numpy()
    ).abs().min() > 1e-4
    again = noise_robustness(model, PROMPTS, [3.0], rank=3, dtype="float64", progress=False)
    assert again["coupling"].tolist() == much["coupling"].tolist()


def test_the_stream_starts_from_what_is_given(model):
    with model.first_block_given(lambda resid: resid * 2):
        doubled = model.trace(PROMPTS[0])
    plain = model.trace(PROMPTS[0])
    assert torch.equal(doubled.calls[0].resid_pre, 2 * plain.calls[0].resid_pre)
    assert not torch.allclose(doubled.resid_final, plain.resid_final)
    with torch.no_grad(), doubled.calls[0].ready():
        assert torch.allclose(
            doubled.calls[0](doubled.calls[0].resid_pre), doubled.calls[1].resid_pre, atol=1e-5
        )


def test_noise_has_the_size_asked_for(model):
    from coupling_analysis.noise_robustness import _draw_noise

    resid = torch.rand(1, 50, 400) + 1
    ratio = _draw_noise(resid, 0, 1).norm(dim=-1) / resid.norm(dim=-1)
    assert ratio.mean().item() == pytest.approx(1, abs=0.02)
    assert not torch.equal(_draw_noise(resid, 0, 1), _draw_noise(resid, 0, 2))


def test_the_script(model, tmp_path, monkeypatch):
    import pandas as pd
    import saved_runs
    from coupling_analysis import prompt_matrices

    rows = [
        saved_runs.record("arc", i) | {"tokens": tuple(prompt)} for i, prompt in enumerate(PROMPTS)
    ]
    run = saved_runs.save(tmp_path, {"arc": saved_runs.task_summary()}, rows=rows)
    monkeypatch.setattr(prompt_matrices, "load_model", lambda name: model)
    script = load_script("noise")
    out = tmp_path / "figures"
    script.main(
        ["tiny", str(run), "--prompts", "2", "--levels", "0", "1", "--rank", "3", "--out", str(out)]
    )
    written = pd.read_csv(out / "noise_arc.csv")
    with pytest.raises(
        CouplingError, match="got records of tiny, none of org/other; give the folder of a run"
    ):
        script.main(["org/other", str(run)])
    assert len(written) == 4 and written["cosine_last"][0] == pytest.approx(1)
    assert (out / "noise_arc.png").stat().st_size > 1000
