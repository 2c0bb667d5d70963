"""The callback: a training with it is the one without it, and values are the checkpoints'."""

import json
import logging
import math
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from evaluations import run
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lm_eval_coupling import ResidualModel, load_records, load_runs, measure_coupling
from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.measures.formulas.headline import chance_coupling
from lm_eval_coupling.training import CouplingCallback
from lm_eval_coupling.training import callback as callback_module

PROMPTS = [cases.tiny_tokens(n)[0].tolist() for n in (5, 9)]
ROWS = [cases.tiny_tokens(20 + i)[0][:16].tolist() for i in range(24)]
DATA = [{"input_ids": row, "labels": row} for row in ROWS]


def model_of(case="llama", **changes):
    return cases.tiny_model(case, torch.float32, **changes).train()


def coupled(out, **options):
    return CouplingCallback(PROMPTS, **{"every": 2, "ranks": (2, 3), "out": out} | options)


def train(folder, *callbacks, model=None, steps=4, reports=True, **arguments):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "learning_rate": 1e-3,
    }
    trainer = Trainer(
        model=model or model_of(),
        args=TrainingArguments(**settings | arguments),
        train_dataset=DATA,
        callbacks=list(callbacks),
    )
    for callback in callbacks if reports else ():
        if isinstance(callback, CouplingCallback):
            callback.set_trainer(trainer)
    trainer.train()
    return trainer


def losses(trainer):
    return [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]


def logged(trainer):
    return {r["step"]: r for r in trainer.state.log_history if "coupling@2" in r}


def weights(folder, step=4):
    model = AutoModelForCausalLM.from_pretrained(Path(folder) / f"checkpoint-{step}")
    return model, dict(model.state_dict())


def require_equal_training(folder, one, other):
    assert losses(one) == losses(other) and len(losses(one)) == 4
    for ours, theirs in zip(
        one.model.state_dict().values(), other.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))


DROPOUT = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda: model_of("gpt2", **DROPOUT), {}),
        (lambda: model_of("gpt2", **DROPOUT), {"gradient_checkpointing": True}),
        (lambda: model_of(), {"bf16": True}),
        (lambda: model_of(), {"torch_compile": True, "torch_compile_backend": "eager"}),
        (lambda: lora(model_of()), {}),
        (lambda: model_of(), {"gradient_accumulation_steps": 2}),
    ],
    ids=["dropout", "gradient checkpointing", "bf16 autocast", "compile", "lora", "accumulation"],
)
def test_the_training_is_unchanged_to_the_last_bit(tmp_path, make, arguments):
    plain = train(tmp_path / "plain", model=make(), **arguments)
    watched = train(tmp_path / "watched", coupled(tmp_path / "out"), model=make(), **arguments)
    require_equal_training(tmp_path, plain, watched)
    values = [row["coupling@2"] for row in logged(watched).values()]
    assert len(values) == 3 and all(map(math.isfinite, values)) and len(set(values)) == 3


@pytest.mark.parametrize("arguments", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_values_are_those_of_the_saved_checkpoint(tmp_path, arguments):
    trainer = train(tmp_path / "run", coupled(tmp_path / "out"), **arguments)
    for step in (2, 4):
        model, _ = weights(tmp_path / "run", step)
        wrapped = ResidualModel.wrap(model)
        own = measure_coupling(wrapped, PROMPTS, ranks=(2, 3), progress=False)
        log = logged(trainer)[step]
        for rank in (2, 3):
            mean = np.mean([record.coupling(rank) for record in own])
            assert log[f"coupling@{rank}"] == mean
            assert log[f"coupling@{rank}_excess"] == mean - chance_coupling(rank)
        assert log["line_shape_score"] == np.mean([record.line_shape_score for record in own])
        saved = load_records(tmp_path / "out")
        saved = saved[saved.revision == f"step{step}"].sort_values("doc_id")
        for record, kept in zip(own, saved.normalized_miscoupling, strict=True):
            assert np.array_equal(record.normalized_miscoupling, kept, equal_nan=True)
        assert set(saved.fingerprint) == {wrapped.fingerprint}


def test_runs_are_checkpoints_of_one_training(tmp_path):
    trainer = train(
        tmp_path / "run", coupled(tmp_path / "out"), include_num_input_tokens_seen="all"
    )
    runs = load_runs(tmp_path / "out").sort_values("step")
    assert runs["step"].tolist() == [0, 2, 4] and runs["lineage"].nunique() == 1
    assert runs["training_tokens"].tolist()[1:] == [2 * 2 * 16, 4 * 2 * 16]
    by_step = dict(losses(trainer))
    loss = runs["loss,none"].tolist()
    assert loss[1:] == [by_step[2], by_step[4]] and math.isnan(loss[0])
    logs = [row["coupling@2"] for row in logged(trainer).values()]
    assert runs["coupling@2"].tolist() == pytest.approx(logs, abs=1e-12)


class Recorder(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def test_reporters_get_the_values_and_the_trainers_own_log_is_as_before(tmp_path):
    plain, watched = Recorder(), Recorder()
    train(tmp_path / "plain", plain, logging_steps=2)
    trainer = train(tmp_path / "run", watched, coupled(tmp_path / "out"), logging_steps=2)
    ours = [(step, logs) for step, logs in watched.logs if "coupling@2" in logs]
    assert [step for step, _ in ours] == [0, 2, 4]
    assert {"coupling@3", "line_shape_score", "coupling_seconds", "epoch"} <= ours[0][1].keys()
    own = [(step, logs) for step, logs in watched.logs if "coupling@2" not in logs]
    names = ("loss", "grad_norm", "learning_rate")
    kept = [
        [(step, {k: v for k, v in logs.items() if k in names}) for step, logs in of]
        for of in (plain.logs, own)
    ]
    assert kept[0] == kept[1]
    assert [row["step"] for row in trainer.state.log_history if "coupling@2" in row] == [0, 2, 4]
    assert json.loads(Path(tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())


def test_without_set_trainer_the_log_history_alone_has_the_values(tmp_path, caplog):
    recorder = Recorder()
    with caplog.at_level(logging.WARNING, "lm_eval.coupling"):
        trainer = train(tmp_path / "run", recorder, coupled(tmp_path / "out"), reports=False)
    assert list(logged(trainer)) == [0, 2, 4] and len(losses(trainer)) == 4
    assert not any("coupling@2" in logs for _, logs in recorder.logs)
    assert "set_trainer" not in caplog.text  # nothing is reported to
    pytest.importorskip("tensorboard")
    with caplog.at_level(logging.WARNING, "lm_eval.coupling"):
        train(tmp_path / "t", coupled(tmp_path / "o"), reports=False, report_to=["tensorboard"])
    assert "tensorboard gets no coupling, because set_trainer was not called" in caplog.text


def test_texts_are_encoded_by_the_trainers_tokenizer(tmp_path):
    class Tokenizer:
        def encode(self, text):
            return [ord(c) % 60 for c in text]

        def decode(self, ids):
            return "decoded"

    callback = CouplingCallback("A prompt", every=2, ranks=2, out=tmp_path / "out")
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(model=model_of(), args=args, callbacks=[callback])
    trainer.callback_handler.processing_class = Tokenizer()
    trainer.state.is_world_process_zero = True
    trainer.callback_handler.on_train_begin(args, trainer.state, trainer.control)
    trainer.callback_handler.on_train_end(args, trainer.state, trainer.control)
    (row,) = load_records(tmp_path / "out").itertuples()
    assert list(row.tokens) == [ord(c) % 60 for c in "A prompt"] and row.text == "decoded"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["a text"]}, "a Trainer without a tokenizer, expected token ids; or give"),
        ({"prompts": [[1] * 65]}, "got a prompt of 65 tokens for a model of 64 positions"),
        ({"prompts": [[1, 61]]}, "got token id 61 in a prompt, expected 0 to 60"),
        ({"prompts": [[1, -100]]}, "got token id -100 in a prompt, expected 0 to 60"),
        ({"prompts": []}, "got no prompts to measure"),
        ({"ranks": (25,)}, "25"),
    ],
)
def test_what_cannot_be_measured_ends_the_training_before_its_first_step(
    tmp_path, options, message
):
    options = {"prompts": PROMPTS, "ranks": 2} | options
    callback = CouplingCallback(options.pop("prompts"), out=tmp_path / "out", **options)
    with pytest.raises(CouplingError, match=message):
        train(tmp_path / "run", callback)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "got every=0"),
        ({"ranks": "many"}, "coupling_ranks"),
        ({"measures": "breadth"}, "breadth"),
        ({"position": "last"}, "coupling_position=last"),
        ({"dtype": "float8"}, "float8"),
    ],
)
def test_wrong_settings_are_refused_at_once(tmp_path, options, message):
    with pytest.raises(CouplingError, match=message):
        coupled(tmp_path, **options)


def test_an_error_while_measuring_does_not_end_the_training(tmp_path, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(callback_module, "measure_documents", broken)
    with caplog.at_level(logging.WARNING, "lm_eval.coupling"):
        trainer = train(tmp_path / "run", coupled(tmp_path / "out"))
    assert len(losses(trainer)) == 4 and not logged(trainer)
    assert "step 2 is not measured (the disk is full); the training goes on" in caplog.text


def test_ctrl_c_while_measuring_ends_the_training(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lm_eval_coupling.runs.session.measure_prompts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", coupled(tmp_path / "out"))


def test_weights_spread_over_processes_are_refused(tmp_path):
    class FullyShardedDataParallel(torch.nn.Module):
        pass

    callback = coupled(tmp_path / "out")
    with pytest.raises(CouplingError, match="got a FullyShardedDataParallel, whose weights are sp"):
        callback.on_train_begin(None, None, None, model=FullyShardedDataParallel())


TWO = """
import sys
sys.path[:0] = {paths!r}
import json, pathlib
import test_callback as t
folder = pathlib.Path(sys.argv[1])
for name, callbacks in {{"plain": [], "watched": [t.coupled(folder / "out")]}}.items():
    model = t.model_of("gpt2", **t.DROPOUT)
    trainer = t.train(folder / name, *callbacks, model=model, ddp_backend="gloo")
    if trainer.is_world_process_zero():
        logged = [row for row in trainer.state.log_history if "loss" in row or "coupling@2" in row]
        (folder / (name + ".json")).write_text(json.dumps(logged))
        print("world", trainer.args.world_size)
"""


@pytest.mark.slow
def test_two_processes_train_as_without_it(tmp_path):
    """One of them measures; gradients are exchanged as before."""
    script = tmp_path / "two.py"
    here = Path(__file__).parent
    script.write_text(TWO.format(paths=[str(here), str(here.parent / "support")]))
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    said = run([*launcher, script, tmp_path])
    assert said.count("world 2") == 2
    plain, watched = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "watched")
    )
    of = [[row["loss"] for row in rows if "loss" in row] for rows in (plain, watched)]
    assert of[0] == of[1] and len(of[0]) == 4
    assert [row["step"] for row in watched if "coupling@2" in row] == [0, 2, 4]
    assert load_runs(tmp_path / "out")["step"].tolist() == [0, 2, 4]
    _, ours = weights(tmp_path / "plain")
    _, theirs = weights(tmp_path / "watched")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
