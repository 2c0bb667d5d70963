"""The zoo: recipes, spoiled text, the loss of transformers, ordinary runs of lm-eval."""

import functools
import json
import math
import sys
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from saved_runs import save, task_summary
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_coupling import load_records, load_runs
from lm_eval_coupling.errors import CouplingError

ANALYSIS = Path(__file__).parents[2] / "analysis"
SENTENCES = [
    "The sky is blue and the snow is white.",
    "A dog ran over the grass.",
    '"Where is the cat?" she said.',
]


@pytest.fixture(scope="module")
def parts():
    """The zoo's modules, found as the script finds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ANALYSIS)
        import zoo
        from zoo_parts import evaluation, recipes, text, training

        yield SimpleNamespace(
            zoo=zoo, evaluation=evaluation, recipes=recipes, text=text, training=training
        )
        for name in [
            name for name in sys.modules if name.partition(".")[0] in ("zoo", "zoo_parts")
        ]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def data(parts, tmp_path_factory):
    corpus, blimp, data = (tmp_path_factory.mktemp(name) for name in ("corpus", "blimp", "data"))
    pd.DataFrame({"text": [" ".join(SENTENCES) * 20, *SENTENCES] * 8}).to_parquet(
        corpus / "train.parquet"
    )
    pd.DataFrame({"text": SENTENCES}).to_parquet(corpus / "validation.parquet")
    parts.text.prepare(corpus, blimp, data)
    return data


@pytest.fixture(scope="module")
def small(parts):
    return parts.recipes.Recipe("small", "standard", layers=2, width=64, along=True)


def test_members_differ_from_the_standard_in_what_their_family_says(parts):
    members = parts.recipes.zoo()
    assert len(members) >= 24 and len({member.name for member in members}) == len(members)
    fields = {
        "depth": {"layers"},
        "width": {"width"},
        "shape": {"layers", "width"},
        "spoiled": {"shuffled", "noise"},
    }
    standard = [member for member in members if member.family == "standard"]
    assert [member.seed for member in standard[:3]] == [0, 1, 2]
    for member in members:
        assert member.width % parts.recipes.HEAD == 0 and member.width >= 64
        own = set() if member.family == "standard" else {member.family}
        allowed = fields.get(member.family, own) | {"seed"}
        changed = {
            name for name in vars(member) if getattr(member, name) != getattr(standard[0], name)
        }
        assert changed - {"name", "family", "along"} <= allowed


def test_steps_are_saved_on_a_logarithmic_scale(parts):
    Recipe = parts.recipes.Recipe
    assert Recipe("a", "b", along=True).saved(64) == [0, 2, 4, 8, 16, 32, 64]
    assert Recipe("a", "b").saved(64) == [64] and Recipe("a", "b", length=0.5).saved(64) == [32]
    assert Recipe("a", "b", length=0.001, along=True).saved(64) == [0, 1]


def test_words_are_shuffled_whole(parts):
    starts = torch.tensor([True, False, True, True])
    windows = torch.tensor([[0, 1, 1, 2, 3, 1], [1, 0, 2, 1, 3, 3]])
    seen = set()
    for seed in range(60):
        item, other = parts.text.with_shuffled_words(
            windows, starts, torch.Generator().manual_seed(seed)
        ).tolist()
        assert (
            "".join(map(str, sorted(item))) == "011123"
            and "011" in "".join(map(str, item))
            and "31" in "".join(map(str, item))
        )
        assert sorted(other) == [0, 1, 1, 2, 3, 3] and "21" in "".join(map(str, other))
        seen.add(tuple(item))
    assert len(seen) == 6  # all orders of three words


def test_spoiled_and_shortened_text(parts, data):
    Recipe, windows_of = parts.recipes.Recipe, parts.text.windows_of
    full = windows_of(Recipe("a", "b"), data, 1_000_000)
    tokens = np.load(data / "tokens.npz")["tokens"]
    assert full.shape == (len(tokens) // 128, 128)
    half, fewer = (
        windows_of(Recipe("a", "b", text=share), data, 1_000_000) for share in (0.5, 0.25)
    )
    assert torch.equal(half, full[: len(half)]) and torch.equal(fewer, half[: len(fewer)])
    assert torch.equal(
        windows_of(Recipe("a", "b", text=0.5), data, 4), full[:2]
    )  # of what there is time for
    noisy = windows_of(Recipe("a", "b", noise=0.5), data, 1_000_000)
    assert (noisy != full).double().mean().item() == pytest.approx(0.5, abs=0.05)
    shuffled = windows_of(Recipe("a", "b", shuffled=1.0), data, 1_000_000)
    assert torch.equal(shuffled.sort(dim=1).values, full.sort(dim=1).values) and not torch.equal(
        shuffled, full
    )


def test_kept_out_documents_are_whole_sentences(parts):
    text = "One. " + '"Two three?" said he! ' + "x" * 30
    assert parts.text.opening(text, 30) == 'One. "Two three?" said he!'
    assert parts.text.opening(text, 25) == 'One. "Two three?"'
    assert parts.text.opening("x" * 30, 20) == "" and parts.text.opening(" short", 20) == "short"
    assert parts.text.opening("ä" * 9 + ". b", 20) == "ä" * 9 + "."


def test_the_loss_is_that_of_transformers(parts, data, small, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    model = parts.training.fresh_model(small, tokenizer)
    model.save_pretrained(tmp_path)
    batch = parts.text.windows_of(small, data, 3)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)(batch, labels=batch).loss
    torch.testing.assert_close(parts.training.loss_of(model, batch), expected)


def test_everything_is_read_once_before_it_is_read_again(parts):
    order = parts.training.reading_order(5, 12, seed=1).tolist()
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5)) and order[:5] != order[5:10]


@pytest.fixture(scope="module")
def trained(parts, data, small, tmp_path_factory):
    """Through the function that a trainer process runs."""
    out = tmp_path_factory.mktemp("zoo")
    options = SimpleNamespace(data=data, out=out, steps=16, windows=4, device="cpu", turns=2)
    context = get_context("spawn")
    members, finished = context.SimpleQueue(), context.SimpleQueue()
    for recipe in (
        small,
        parts.recipes.Recipe("other", "standard", layers=2, width=64, seed=1, length=0.5),
        None,
    ):
        members.put(recipe)
    parts.zoo.train_members(options, members, finished)
    names = []
    while not finished.empty():
        names.append(finished.get())
    parts.zoo.write_facts([small], options)
    return out, names


def test_trainers_leave_ordinary_checkpoints(parts, data, small, trained):
    out, names = trained
    expected = {f"zoo/small/checkpoint-{step}" for step in small.saved(16)} | {
        "zoo/other/checkpoint-8"
    }
    assert set(names) == expected and all(
        (out / name / "model.safetensors").exists() for name in names
    )
    losses = pd.read_csv(out / "zoo/small/training.csv").set_index("step")["loss"]
    assert math.isnan(losses[0]) and losses[16] < losses[1] - 0.5
    first = AutoModelForCausalLM.from_pretrained(out / "zoo/small/checkpoint-0")
    fresh = parts.training.fresh_model(small, AutoTokenizer.from_pretrained(data / "tokenizer"))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), fresh.parameters(), strict=True)
    )


def test_a_checkpoint_is_evaluated_as_lm_eval_would(parts, data, trained, monkeypatch):
    """The bits per byte against transformers' own loss on each document; facts that join."""
    out, _ = trained
    # The index of lm-eval's own tasks takes ten seconds.
    own_alone = functools.partial(parts.evaluation.LoadedTasks, include_defaults=False)
    monkeypatch.setattr(parts.evaluation, "LoadedTasks", own_alone)
    evaluation = parts.evaluation.Evaluation(
        data, out, tasks=["kept_out"], pairs=5, measured=2, measures="depth", ranks="10"
    )
    name = "zoo/small/checkpoint-16"
    assert not parts.evaluation.has_results(out, name)
    evaluation.run(name)
    assert parts.evaluation.has_results(out, name) and not parts.evaluation.has_results(
        out, "zoo/small/checkpoint-1"
    )
    model, tokenizer = (
        cls.from_pretrained(out / name) for cls in (AutoModelForCausalLM, AutoTokenizer)
    )
    nats = size = 0
    for line in (data / "kept_out.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text)]])
        nats += model(tokens, labels=tokens).loss.item() * (tokens.shape[1] - 1)
        size += len(text.encode())
    (run,) = load_runs(out / "results", facts=out / "facts.csv").to_dict("records")
    assert run["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert (run["model"], run["step"], run["family"]) == (name, 16, "standard") and run[
        "lineage"
    ] == "zoo/small"
    assert run["training_tokens"] == 16 * 4 * 128 and run["measured"] == 2
    assert len(load_records(out / "results")) == 2


def test_small_copies_say_the_same(parts, tmp_path):
    groups, tasks = (
        {"blimp": ["one", "two"]},
        {"one": task_summary(0.2, n=3), "two": task_summary(0.4, n=5), "alone": task_summary()},
    )
    where = save(tmp_path / "full", tasks, groups=groups)
    (file,) = where.glob("results_*.json")
    run = json.loads(file.read_text())
    run["config"]["model_args"] = {
        "pretrained": "org/tiny",
        "dtype": "float32",
        "coupling_store": "/somewhere",
    }
    run["n-samples"] = {name: {"original": 9, "effective": 5} for name in tasks}
    file.write_text(json.dumps(run))
    from zoo_parts.records import write_small

    assert write_small(tmp_path / "full", tmp_path / "small") == 1
    full, small = (load_runs(tmp_path / name).set_index("task") for name in ("full", "small"))
    assert (
        list(small.index) == ["alone", "blimp"]
        and "somewhere" not in next((tmp_path / "small").rglob("*.json")).read_text()
    )
    numbers = [name for name in full.select_dtypes("number") if not name.startswith("n_")] + [
        "model",
        "variant",
        "fingerprint",
    ]
    assert (
        full.loc[small.index, numbers].equals(small[numbers])
        and small.loc["blimp", "n_samples"] == 10
    )
    assert small.loc["blimp", "coupling@10"] == pytest.approx((3 * 0.19 + 5 * 0.39) / 8)


@pytest.fixture
def records(tmp_path):
    """Twelve members of four families: BLiMP follows coupling, bits per byte do not."""
    draws, facts = np.random.default_rng(0), []
    for i in range(12):
        for step in (1, 2, 4, 8, 16) if i == 0 else (16,):
            name = f"zoo/m{i}/checkpoint-{step}"
            coupling = 0.1 + 0.02 * i + step / 1000
            tasks = {
                "blimp": task_summary(coupling),
                "kept_out": task_summary(0.2 + draws.normal() / 100),
            }
            where = save(
                tmp_path / "runs",
                tasks,
                model=name,
                n_params=1e6 * (1 + draws.random()),
                fingerprint=name,
            )
            (file,) = where.glob("results_*.json")
            run = json.loads(file.read_text())
            run["results"]["blimp"] = {"acc,none": 0.4 + coupling, "acc_stderr,none": 0.01}
            run["results"]["kept_out"] = {"bits_per_byte,none": 2 + draws.random()}
            file.write_text(json.dumps(run))
            family = ["standard", "spoiled", "depth", "width"][i % 4]
            facts.append(
                {"model": name, "member": f"m{i}", "family": family, "training_tokens": step * 1000}
            )
    pd.DataFrame(facts).to_csv(tmp_path / "facts.csv", index=False)
    return tmp_path


def test_findings_of_records_whose_truth_is_known(records, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ANALYSIS)
    import zoo_findings

    zoo_findings.main([str(records), "--out", str(records / "out")])
    members, actual, seeds, along = (
        pd.read_csv(records / "out" / f"{name}.csv")
        for name in ("members", "predictors", "seeds", "along_training")
    )
    assert (
        len(members) == 24
        and set(members["step"]) == {16}
        and (records / "out" / "along.png").exists()
    )
    actual = actual[actual["predictor"] == "coupling@10"].set_index(["score", "members", "given"])
    for given in ("nothing", "size", "loss"):
        assert actual.loc[("blimp", "all", given), "r"] == pytest.approx(1)
    assert actual.loc[("blimp", "all", "nothing"), "r2_left_out_family_with"] == pytest.approx(1)
    assert abs(actual.loc[("kept_out", "all", "nothing"), "r"]) < 0.7
    assert actual.loc[("blimp", "unspoiled", "nothing"), "n"] == 9
    left_out = pd.read_csv(records / "out" / "influence.csv").set_index("given").loc["nothing"]
    of = members[members["task"] == "kept_out"]
    for unit in ("member", "family"):
        by_hand = {}
        for key in of[unit].unique():
            others = of[of[unit] != key]
            by_hand[key] = others["coupling@10"].corr(others["score"])
        lowest = min(by_hand.values())
        assert left_out[f"lowest_without_{unit}"] == pytest.approx(lowest, abs=1e-6)
        assert left_out[f"highest_{unit}"] == max(by_hand, key=by_hand.__getitem__)
    same = seeds.set_index(["task", "number"]).loc[("blimp", "coupling@10")]
    assert same["n_seeds"] == 3 and same["seeds"] == pytest.approx(0.08) and 0 < same["n_zoo"] == 12
    levels = along[(along["score"] == "blimp") & (along["of"] == "levels")]
    assert (
        levels["member"].tolist() == ["m0"]
        and levels["spearman"].tolist() == [1]
        and "bits" in capsys.readouterr().out
    )


def test_what_cannot_be_is_refused(parts, tmp_path):
    with pytest.raises(CouplingError, match="got no member 'none', expected some of standard-0, "):
        parts.zoo.main(["--data", str(tmp_path), "--out", str(tmp_path / "o"), "--members", "none"])
    with pytest.raises(
        CouplingError, match="which is not prepared; give --corpus and --blimp once"
    ):
        parts.zoo.main(["--data", str(tmp_path), "--out", str(tmp_path / "o")])
    with pytest.raises(CouplingError, match="expected train.parquet and validation.parquet"):
        parts.text.prepare(tmp_path, tmp_path, tmp_path / "data")
    assert not (tmp_path / "data").exists() and not (tmp_path / "o").exists()
