"""What the store spares: each measure of each prompt is measured once, and what failed for the
moment is tried again.
"""

import sqlite3

import cases
import numpy as np
import pytest
import torch

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.residual import ResidualModel
from lm_eval_coupling.runs import session as session_module
from lm_eval_coupling.runs import store as store_module
from lm_eval_coupling.runs.session import Session, Spot, Subject
from lm_eval_coupling.runs.store import MeasurementStore

PROMPTS = [tuple(cases.tiny_tokens(seq)[0].tolist()) for seq in (4, 6)]


@pytest.fixture(scope="module")
def model():
    return ResidualModel.wrap(cases.tiny_model("llama"))


@pytest.fixture
def store(tmp_path):
    with MeasurementStore(tmp_path / "store.sqlite") as opened:
        yield opened


@pytest.fixture
def asked(monkeypatch):
    """The measures that prompts were really measured for, batch by batch."""
    seen, right = [], session_module.measure_prompts

    def measured(model, prompts, position, settings, *rest):
        seen.append((settings.measures, len(prompts)))
        return right(model, prompts, position, settings, *rest)

    monkeypatch.setattr(session_module, "measure_prompts", measured)
    return seen


def records(model, store, *measures, prompts=PROMPTS, position=-1, **settings):
    chosen = Settings(ranks=(2,), measures=measures, dtype="float64", **settings)
    subject = Subject("trained", model)
    session = Session(
        subjects=[subject], settings=chosen, position=position, store=store, quiet=True
    )
    measured = session.measure([Spot.at(tokens, position) for tokens in prompts])
    return {spot.tokens: record for spot, record in measured.of("trained").items()}


def test_the_order_of_measures_does_not_matter(model, store, asked):
    records(model, store, "depth", "regularity")
    assert asked == [(("depth", "regularity"), 2)]
    found = records(model, store, "regularity", "depth")
    assert len(asked) == 1 and found[PROMPTS[0]].measures == ("depth", "regularity")


def test_one_more_measure_costs_only_itself(model, store, asked):
    first = records(model, store, "depth")
    both = records(model, store, "depth", "spectra")
    assert asked == [(("depth",), 2), (("spectra",), 2)]
    for tokens in PROMPTS:
        assert (
            both[tokens].measures == ("depth", "spectra")
            and both[tokens].effective_rank is not None
        )
        np.testing.assert_array_equal(
            both[tokens].normalized_miscoupling, first[tokens].normalized_miscoupling
        )
        assert both[tokens].method == first[tokens].method == ("closed", "closed")
    records(model, store, "spectra")
    assert len(asked) == 2


def test_prompts_that_lack_different_measures(model, store, asked):
    records(model, store, "depth", prompts=PROMPTS[:1])
    found = records(model, store, "depth", "regularity")
    assert sorted(asked[1:]) == [(("depth", "regularity"), 1), (("regularity",), 1)]
    assert all(record.line_shape_score > 1 and record.coupling(2) > 0 for record in found.values())


def test_what_numbers_depend_on_is_part_of_their_key(model, store, asked):
    records(model, store, "depth", "regularity")
    records(model, store, "depth", "regularity", window=1)  # of the trajectory alone
    assert asked[-1] == (("regularity",), 2)
    records(model, store, "depth", tokens="all")  # which depth does not read
    assert len(asked) == 2
    records(model, store, "depth", method="autodiff")
    assert len(asked) == 3
    other = cases.tiny_model("llama")
    other.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1e-3
    records(ResidualModel.wrap(other), store, "depth", method="autodiff")
    assert len(asked) == 4


def test_the_same_token_is_the_same_measurement(model, store, asked):
    records(model, store, "depth", prompts=PROMPTS[:1], position=-1)
    records(model, store, "depth", prompts=PROMPTS[:1], position=3)
    assert len(asked) == 1


def test_memory_that_ran_out_for_a_part_is_tried_again(model, store, asked, monkeypatch):
    """A record without entropy, for a passing lack of memory, was stored and reused by every later
    run.
    """
    with monkeypatch.context() as patch:

        def scarce(self, resid):
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(ResidualModel, "logits", scarce)
        found = records(model, store, "depth", "regularity")
    assert {record.reason for record in found.values()} == {"no entropy: out of memory"}
    assert {record.reason_codes for record in found.values()} == {("out_of_memory",)}
    again = records(model, store, "depth", "regularity")
    assert asked[1:] == [(("regularity",), 2)]
    assert all(record.entropy is not None and record.reason is None for record in again.values())


def test_what_failed_altogether_is_tried_again(model, store, asked, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            "lm_eval_coupling.measuring.batch.jacobians_of_traces",
            lambda *args: (_ for _ in ()).throw(
                RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")
            ),
        )
        found = records(model, store, "depth", prompts=PROMPTS[:1])
    assert found[PROMPTS[0]].reason == "out of memory" and len(store) == 0
    assert records(model, store, "depth", prompts=PROMPTS[:1])[PROMPTS[0]].reason is None


def test_what_would_end_the_same_way_is_kept(store, asked):
    """A block that adds nothing has no coupling today nor tomorrow."""
    silent = cases.tiny_model("llama", num_hidden_layers=3)
    for weight in (
        silent.model.layers[1].self_attn.o_proj.weight,
        silent.model.layers[1].mlp.down_proj.weight,
    ):
        weight.data.zero_()
    silent = ResidualModel.wrap(silent)
    first = records(silent, store, "depth", "regularity", prompts=PROMPTS[:1])[PROMPTS[0]]
    again = records(silent, store, "depth", "regularity", prompts=PROMPTS[:1])[PROMPTS[0]]
    assert (
        len(asked) == 1
        and again.reason == first.reason
        and "5 of 9 layer pairs are undefined" in again.reason
    )
    assert again.reason_codes == ("zero_or_low_rank", "undefined")


def test_a_token_that_is_not_there_is_no_measurement(model, store, asked):
    found = records(model, store, "depth", position=5)
    assert found[PROMPTS[0]].reason_codes == ("no_such_token",) and found[PROMPTS[1]].reason is None
    assert len(store) == 1


def test_a_store_of_another_version_is_refused_in_a_sentence(tmp_path):
    import sqlite3

    path = tmp_path / "older.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE measurements (key TEXT PRIMARY KEY, columns BLOB, created TEXT)")
        db.execute("CREATE TABLE meta (schema_version INTEGER)")
        db.execute("INSERT INTO meta VALUES (1)")
    db.close()
    with pytest.raises(
        CouplingError,
        match="older.sqlite of schema version 1, expected version 2; move it away or choose",
    ):
        MeasurementStore(path)


def test_why_a_block_was_slower_is_in_the_record_and_once_in_the_log(store, caplog):
    """The exception that sent a block to a slower level was swallowed."""
    experts = ResidualModel.wrap(cases.tiny_model("mixtral"))
    chosen = Settings(ranks=(2,), measures=("depth",), dtype="float64")
    session = Session(
        subjects=[Subject("trained", experts)], settings=chosen, position=-1, store=store
    )
    with caplog.at_level("INFO", logger="lm_eval.coupling"):
        found = session.measure([Spot.at(tokens, -1) for tokens in PROMPTS]).of("trained")
    for record in found.values():
        assert record.method == ("token-local",) * 2
        assert all(why.startswith("closed: ") and len(why) > 12 for why in record.slower_because)
    (told,) = [line for line in caplog.messages if "slower level" in line]
    assert (
        "4 Jacobians came from a slower level than the fastest: " in told and " × closed: " in told
    )


def test_a_batch_is_one_transaction(model, store, monkeypatch):
    """It was one a prompt: with a hundred prompts a second, most of the time was the disk's."""
    sizes, right = [], MeasurementStore.put

    def put(self, entries):
        sizes.append(len(entries))
        right(self, entries)

    monkeypatch.setattr(MeasurementStore, "put", put)
    records(model, store, "depth", "regularity")
    assert sizes == [2 * len(PROMPTS)] and len(store) == 4


def test_what_cannot_be_stored_of_one_prompt_costs_no_other(model, store, monkeypatch, caplog):
    right, (first, _) = store_module._encode, PROMPTS

    def encode(found, key):
        if len(found.columns.get("line_shape_scores", ())) == len(first):
            raise TypeError("no such thing")
        return right(found, key)

    monkeypatch.setattr(store_module, "_encode", encode)
    found = records(model, store, "regularity")
    assert len(found) == 2 and len(store) == 1
    assert [r.getMessage() for r in caplog.records] == [
        "coupling: what was measured of 1 prompts could not be stored (no such thing); "
        "it stays in this run's tables"
    ]


def test_a_device_is_not_kept_waiting_for_one_prompt():
    """There one takes as long as many do; on a CPU what one costs is known sooner."""
    batches = [
        (Settings(ranks=(2,)), [Spot((i,) * n, 0) for i in range(m)])
        for n, m in ((3, 2), (5, 3), (9, 1))
    ]
    assert session_module._in_order(batches, torch.device("cuda")) == [
        batches[1],
        batches[0],
        batches[2],
    ]
    assert [len(batch) for _, batch in session_module._in_order(batches, torch.device("cpu"))] == [
        1,
        2,
        2,
        1,
    ]


def test_a_store_that_takes_nothing_is_asked_once(model, store, monkeypatch, caplog):
    """One that is locked lets everyone wait for a minute."""
    tried = []

    def put(self, entries):
        tried.append(len(entries))
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(MeasurementStore, "put", put)
    records(model, store, "depth")
    assert tried == [2] and [r.getMessage().split(";")[0] for r in caplog.records] == [
        "coupling: what was measured of 2 prompts could not be stored (database is locked)"
    ]
