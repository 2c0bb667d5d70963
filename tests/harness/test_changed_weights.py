"""One model object evaluated several times, as during training: each evaluation is of the weights
as they are then.
"""

import lm_eval
import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.harness.lm import CouplingLM


@pytest.mark.parametrize("storage", ["the same", "new"])
def test_weights_changed_between_evaluations_are_measured_as_they_are(
    home, manager, tmp_path, storage
):
    """The second evaluation reused the first one's numbers, under the first one's fingerprint."""
    from lm_eval_coupling.harness import plugin

    plugin.install()
    given = {
        "pretrained": str(home / "float32"),
        "device": "cpu",
        "coupling_ranks": "2+4",
        "coupling_limit": 1,
    }
    lm = CouplingLM(**given, coupling_store=str(tmp_path / "store.sqlite"))

    def evaluated():
        found = lm_eval.simple_evaluate(
            model=lm, tasks=["tiny_choice"], task_manager=manager, bootstrap_iters=2
        )
        about = found["config"]["coupling"]
        return (
            found["results"]["tiny_choice"]["coupling,none"],
            about["fingerprint"],
            about["reused"],
        )

    before = evaluated()
    assert evaluated() == (*before[:2], 1)
    weights = {name: t.clone() for name, t in lm.model.state_dict().items()}
    with torch.no_grad():
        if storage == "new":
            lm.model.load_state_dict({name: t * 1.1 for name, t in weights.items()}, assign=True)
        else:
            for parameter in lm.model.parameters():
                parameter.mul_(1.1)
    after = evaluated()
    assert after[0] != before[0] and after[1] != before[1] and after[2] == 0
    lm.model.load_state_dict(weights)
    assert evaluated() == (*before[:2], 1)


def test_hooks_that_go_by_places_in_the_batch_are_refused_where_it_has_several(home, tmp_path):
    """Prompts are measured alone; they were measured as without the hook."""
    model = AutoModelForCausalLM.from_pretrained(home / "float32")
    model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: output * 3 if len(output) > 1 else None
    )
    given = {"device": "cpu", "coupling_ranks": "2", "tokenizer": str(home / "float32")}
    given["coupling_store"] = str(tmp_path / "store.sqlite")
    assert CouplingLM(model, batch_size=1, **given).session is not None
    for several in (4, "auto"):
        with pytest.raises(CouplingError, match="evaluate with batch_size=1"):
            CouplingLM(model, batch_size=several, **given)
