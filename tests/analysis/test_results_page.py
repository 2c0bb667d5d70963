"""The numbers of the first page of analysis/RESULTS.md follow from the committed records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lm_eval_coupling.measures.formulas.headline import chance_coupling

ANALYSIS = Path(__file__).parents[2] / "analysis"
RESULTS = ANALYSIS / "results"
PAGE = " ".join((ANALYSIS / "RESULTS.md").read_text(encoding="utf-8").split())
DETAILS = " ".join((ANALYSIS / "RESULTS-details.md").read_text(encoding="utf-8").split())
SIX = ["arc_easy", "arc_challenge", "hellaswag", "winogrande", "truthfulqa_mc2", "mmlu"]


def correlation(x, y, given=()) -> float:
    """Return Pearson's correlation of what is left of x and y once ``given`` is regressed out."""
    defined = np.column_stack([np.ones(len(x)), *given])
    left = [np.asarray(v) - defined @ np.linalg.lstsq(defined, v, rcond=None)[0] for v in (x, y)]
    return float(np.corrcoef(*left)[0, 1])


def with_interval(r: float, n: int) -> str:
    """Write a correlation with its 95 % interval by Fisher's z."""
    z, step = np.arctanh(r), stats.norm.ppf(0.975) / np.sqrt(n - 3)
    return f"{r:.2f} ({np.tanh(z - step):.2f} to {np.tanh(z + step):.2f})".replace("-", "−")


def plain(number: float, digits: int = 2) -> str:
    return f"{number:.{digits}f}".replace("-", "−")


def bounded(mean: float, low: float, high: float) -> str:
    return f"{plain(mean, 3)} ({plain(low, 3)} to {plain(high, 3)})"


def over_seeds(change: pd.Series) -> str:
    """Write the mean of a change with its 95 % interval by Student's t."""
    interval = stats.ttest_1samp(change, 0).confidence_interval()
    return bounded(change.mean(), interval.low, interval.high)


@pytest.fixture(scope="module")
def pretrained() -> pd.DataFrame:
    documents = pd.read_csv(RESULTS / "real" / "documents.csv")
    return documents[(documents["rank"] == 10) & documents.task.str.startswith(tuple(SIX))]


def test_chance_is_that_of_a_random_matrix():
    assert f"chance {chance_coupling(10):.4f}" in PAGE


MODELS = ["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "smollm2-135m", "gemma3-270m"]


def test_coupling_of_pretrained_models(pretrained):
    trained = pretrained[pretrained.weights == "trained"].groupby("model").coupling.mean()
    assert ", ".join(f"{trained[model]:.3f}" for model in MODELS) in PAGE


def test_untrained_twins_are_at_chance(pretrained):
    untrained = pretrained[pretrained.weights == "untrained"].groupby("model").coupling
    distances = (untrained.mean() - chance_coupling(10)) / untrained.sem()
    first, second, third, last = (plain(distances[model], digits=1) for model in MODELS)
    assert f"{first}, {second}, {third} and {last} standard errors from chance" in PAGE
    assert distances.abs().max() < 2


FOUR = ["smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "gemma3-270m"]


def test_parts_of_coupling_in_four_models():
    rows = pd.read_csv(RESULTS / "controls" / "coupling_parts.csv")
    above = rows.assign(above=rows["mean"] - rows["chance"])
    table = above.pivot_table(index=["model", "weights"], columns="measure", values="above")
    shares = table.div(table["coupling"], axis=0).xs("trained", level="weights")
    shares = 100 * shares.loc[FOUR]

    def listed(values: pd.Series) -> str:
        *first, last = (f"{value:.0f}" for value in values)
        return f"{', '.join(first)} and {last}"

    assert (
        f"{listed(shares.rotated)} % stays with both bases turned alike, "
        f"{listed(shares.without_identity)} % without the multiple of the identity, "
        f"{listed(shares.deflated)} % without the first pair of vectors"
    ) in PAGE
    documents = rows[(rows.weights == "trained") & (rows.measure == "coupling")]
    assert f"{listed(documents.set_index('model').n.loc[FOUR])} documents of six tasks" in PAGE
    untrained = above[(above.weights == "untrained") & above.chance.between(0.05, 0.06)]
    assert (untrained.above.abs() < 3 * untrained.stderr).all() and len(untrained) == 16


def test_parts_of_coupling_of_every_document(pretrained):
    """Their means are the table's, and their coupling is that of the runs without controls."""
    documents = pd.read_csv(RESULTS / "controls" / "documents.csv")
    table = pd.read_csv(RESULTS / "controls" / "coupling_parts.csv")
    means = table.pivot_table(index=["model", "weights"], columns="measure", values="mean")
    found = documents.groupby(["model", "weights"])[means.columns.tolist()].mean()
    pd.testing.assert_frame_equal(found, means, check_names=False, atol=1e-8)
    both = documents.merge(pretrained, on=["model", "weights", "doc_hash"], suffixes=("", "_there"))
    assert (both.weights == "trained").sum() == 3 * 102 + 60
    assert (both.coupling - both.coupling_there).abs().max() < 1e-6
    trained = documents[documents.weights == "trained"].groupby(["model", "task"])
    assert set(trained.size().unstack("model").min()) == {10, 17}
    chance = table.groupby("measure").chance.first()
    by_task = (trained[["rotated", "coupling"]].mean() - chance).dropna(axis="columns")
    kept = (100 * by_task.rotated / by_task.coupling).groupby("model").agg(["min", "max"]).round()
    ranges = {model: f"{low:.0f} to {high:.0f}" for model, (low, high) in kept.T.items()}
    smollm2, small, large, gemma = (ranges[model] for model in FOUR)
    assert f"{smollm2} % of SmolLM2's coupling above chance stays" in DETAILS
    assert f"{small} and {large} % of the Qwens', {gemma} % of Gemma's" in DETAILS


def test_gains_of_norms():
    rows = pd.read_csv(RESULTS / "norm_gains" / "norm_gains.csv").set_index(["model", "prompt"])
    trained, folded, equal = (
        rows[rows.gains == kind][["coupling", "loss"]] for kind in ("as trained", "folded", "equal")
    )
    assert (folded - trained).abs().coupling.max() < 2.5e-7
    assert (equal.coupling > chance_coupling(10)).all()
    trained, equal = (of.groupby("model").mean().loc[FOUR] for of in (trained, equal))
    listed = [
        ", ".join(f"{value:.{digits}f}" for value in of[column])
        for column, digits in (("coupling", 3), ("loss", 1))
        for of in (equal, trained)
    ]
    text = "with equal gains {} in place of {}; loss {} in place of {} nats".format(*listed)
    assert text in PAGE


def test_coupling_along_a_training():
    rows = pd.read_csv(RESULTS / "training" / "checkpoints.csv")
    rows = rows[(rows.measure == "coupling") & (rows.weights == "trained")].set_index("step")
    coupling = rows["mean"].dropna()
    peak = coupling.idxmax()
    text = f"{coupling[0]:.3f} at step 0, {coupling[peak]:.3f} at step {peak:.0f}"
    assert f"{text}, {coupling.iloc[-1]:.3f} at step {coupling.index[-1]:.0f}" in PAGE


def test_parts_of_coupling_along_trainings():
    parts = pd.read_csv(RESULTS / "training_parts" / "parts.csv")
    means = parts.pivot_table(index=["seed", "step"], columns="reading", values="mean")
    share = means["one_pair"].unstack("seed")
    peak, last = (
        f"{share.loc[step].min():.2f} to {share.loc[step].max():.2f}" for step in (40, 1280)
    )
    assert (means["coupling"].unstack("seed").idxmax() == 40).all()
    assert f"at step 40 a first pair with {peak} of ‖A‖², at step 1280 {last}" in PAGE
    trained = means.query("step > 0")
    less = {
        name: [
            stats.spearmanr(of[name], -of["loss"]).statistic for _, of in trained.groupby("seed")
        ]
        for name in ("coupling", "rotated")
    }
    coupling, rotated = (f"{min(r):.2f} to {max(r):.2f}" for r in less.values())
    assert f"{coupling} for coupling, {rotated} with both bases rotated alike" in PAGE


@pytest.fixture(scope="module")
def zoo() -> pd.DataFrame:
    members = pd.read_csv(RESULTS / "zoo" / "members.csv")
    return members[members.task == "kept_out"].set_index("member")


def less_bits(members: pd.DataFrame, reading: str, given: bool = False) -> float:
    """Correlate a reading with less bits per byte, given size and tokens or nothing."""
    fixed = np.log10([members.n_params, members.training_tokens])
    fixed = [*fixed, members.n_layers, members.d_model] if given else []
    return correlation(members[reading], -members.bits, fixed)


def bounds_of(influence: pd.DataFrame, reading: str, given: str = "nothing") -> str:
    (row,) = influence.query("predictor == @reading and given == @given").to_dict("records")
    return f"{plain(row['low'])} to {plain(row['high'])}"


@pytest.fixture(scope="module")
def influence() -> pd.DataFrame:
    return pd.read_csv(RESULTS / "zoo" / "influence.csv")


def test_coupling_in_the_zoo(zoo, influence):
    bounds = bounds_of(influence, "coupling@10")
    r = less_bits(zoo, "coupling@10")
    families = pd.read_csv(RESULTS / "zoo" / "predictors.csv").query(
        "predictor == 'coupling@10' and members == 'all' and given == 'nothing'"
    )
    of_families = f"{plain(families.low.iloc[0])} to {plain(families.high.iloc[0])}"
    without_text = plain(less_bits(zoo[zoo.family != "text"], "coupling@10"))
    assert (
        f"Pearson {plain(r)} with less bits per byte ({bounds} over members, {of_families} over "
        f"families); {without_text} without the family"
    ) in PAGE
    left_out = [less_bits(zoo.drop(m), "coupling@10") for m in zoo.index]
    assert f"{plain(min(left_out))} to {plain(max(left_out))} without any one" in PAGE
    assert f"{len(zoo)} small models of nine families" in PAGE and zoo.family.nunique() == 9


def test_parts_of_coupling_in_the_zoo(zoo, influence):
    for reading, words in {
        "rotated@10": "with both bases rotated alike",
        "deflated@10": "without the first pairs",
        "without_identity@10": "without the multiple of the identity",
    }.items():
        r = plain(less_bits(zoo, reading))
        assert f"{r} ({bounds_of(influence, reading)}) {words}" in PAGE


def test_coupling_in_the_zoo_given_size_and_tokens(zoo, influence):
    bounds = bounds_of(influence, "coupling@10", "size and tokens")
    r = plain(less_bits(zoo, "coupling@10", given=True))
    without_text = plain(less_bits(zoo[zoo.family != "text"], "coupling@10", given=True))
    assert f"{r} ({bounds}); {without_text} without the family that repeats its text" in PAGE


def test_coupling_of_damaged_copies():
    runs = pd.read_csv(RESULTS / "family" / "observations.csv").set_index("model")
    score, coupling = runs["acc,none"], runs["coupling,none"]
    assert with_interval(correlation(coupling, score), len(runs)) in PAGE
    better = score.sort_values().index[3:]
    without = plain(correlation(coupling[better], score[better]))
    assert f"without the three worst copies {without}" in PAGE


def mean_area(documents: pd.DataFrame) -> float:
    """Return the mean over models of the area for right answers, over pairs within a task."""
    areas = []
    for _, of_model in documents.groupby("model"):
        pairs, won = 0, 0.0
        for _, of in of_model.groupby("task"):
            values = of["coupling@10"].to_numpy()
            right, wrong = (values[of["right"] == answer] for answer in (1, 0))
            won += stats.mannwhitneyu(right, wrong).statistic
            pairs += len(right) * len(wrong)
        areas.append(won / pairs)
    return float(np.mean(areas))


def test_right_and_wrong_answers():
    areas = pd.read_csv(RESULTS / "answers" / "auroc.csv")
    areas = areas[(areas.predictor == "coupling@10") & (areas.model == "all models")]
    (row,) = areas[areas.task == "all tasks"].to_dict("records")
    assert f"{row['auroc']:.2f} ({row['low']:.2f} to {row['high']:.2f})" in PAGE
    assert f"p = {row['p_holm']:.2f} adjusted" in PAGE
    documents = pd.read_csv(RESULTS / "answers" / "documents.csv")
    assert mean_area(documents) == pytest.approx(row["auroc"], abs=1e-4)
    number = documents["doc_hash"].nunique()
    assert f"{len(documents)} answers of three models, {number} documents" in PAGE


def test_the_planned_confirmation():
    folder = RESULTS / "right_from_wrong"
    documents = pd.read_csv(folder / "documents.csv")
    rows = pd.read_csv(folder / "right_from_wrong.csv")
    (row,) = rows.query("model == 'all models' and predictor == 'coupling@10'").to_dict("records")
    assert mean_area(documents) == pytest.approx(row["auroc"], abs=1e-4)
    interval = f"{row['auroc']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
    assert f"area {interval}, p = {row['p_holm']:.2f} adjusted" in PAGE
    used = f"{len(documents)} answers of two models, {documents['doc_hash'].nunique()} documents"
    assert used in PAGE
    first = pd.read_csv(RESULTS / "answers" / "auroc.csv")
    first = first.query("predictor == 'coupling@10' and model == 'all models'")["auroc"]
    assert row["high"] < first.iloc[0]


def test_positions_of_tokens():
    rows = pd.read_csv(RESULTS / "token_positions_arc_easy.csv")
    table = rows.pivot(index=["line", "token"], columns="measure", values="median")

    def ranged(values: pd.Series) -> str:
        return " to ".join(dict.fromkeys((plain(values.min()), plain(values.max()))))

    couplings = [table.loc[model, "coupling"] for model in FOUR]
    early = [ranged(of[["1", "2"]]) for of in couplings]
    later = [ranged(of.drop(["1", "2"])) for of in couplings]
    pairs = "; ".join(f"{a} and {b}" for a, b in zip(early, later, strict=True))
    assert f"medians at the first two and at later tokens {pairs}; " in PAGE
    cosines = [table.loc[model, "erasing"] for model in FOUR]
    first = ", ".join(plain(of["1"]) for of in cosines)
    others = ", ".join(ranged(of.drop("1")) for of in cosines)
    assert f"cos(u, v) at the first token {first}, at others {others}" in PAGE
    for of in couplings[1:3]:  # the Qwens
        assert of[["1", "2"]].mean() == pytest.approx(of.drop(["1", "2"]).mean() * 2 / 3, rel=0.15)


def test_tied_embeddings():
    table = pd.read_csv(RESULTS / "tied" / "tied.csv")
    last = table[table.step == table.step.max()].set_index("reading")
    assert (last.seeds == 3).all()

    numbers = last[["difference", "low", "high"]]
    coupling, rotated = (bounded(*numbers.loc[reading]) for reading in ("coupling", "rotated"))
    assert f"{coupling} higher than untied, with both bases rotated alike {rotated}" in PAGE
    tied, untied = (
        pd.read_csv(RESULTS / name / "parts.csv").query("reading == 'coupling' and step == 1280")
        for name in ("tied", "training_parts")
    )
    change = tied.set_index("seed")["mean"] - untied.set_index("seed")["mean"]
    assert change.mean() == pytest.approx(last.loc["coupling", "difference"], abs=1e-6)


def test_effects_of_penalties():
    folders = "intervention", "intervention_weak"
    members = pd.concat(
        pd.read_json(RESULTS / name / "members.jsonl", lines=True) for name in folders
    ).drop_duplicates()
    table = members.set_index(["form", "strength", "seed"]).sort_index()

    def of(form: str, strength: float, outcome: str) -> pd.Series:
        return table.loc[(form, strength), outcome]

    def coupling(form: str, strength: float) -> str:
        return f"{of(form, strength, 'coupling').mean():.2f}"

    def effect(form: str, strength: float) -> str:
        return over_seeds(of(form, strength, "loss_kept_out") - of("none", 0, "loss_kept_out"))

    assert len(members) == 45
    control = coupling("none", 0)
    lowered = ("raw", 0.1), ("rotated", 0.1)
    raised = ("raw", -0.1), ("rotated", -0.1)
    first, second = (f"{effect(*member)}{{}} at {coupling(*member)}" for member in lowered)
    assert f"kept-out loss {first.format(' worse')} and {second.format('')}, " in PAGE
    effects = " and ".join(effect(*member) for member in raised)
    couplings = " and ".join(coupling(*member) for member in raised)
    assert f"{effects} worse at {couplings} in place of {control}; " in PAGE
    strong = [f"{effect('raw', s)} worse at {coupling('raw', s)}" for s in (1, -1)]
    assert f"ten times as strong {', '.join(strong)}" in PAGE
    assert f"loss {of('none', 0, 'loss_kept_out').mean():.2f}" in PAGE
    assert all(float(coupling(*member)) <= chance_coupling(10) for member in lowered)
    assert all(float(coupling(*member)) > 4 * float(control) for member in raised)
    least, most = (of("raw", s, "coupling").mean() for s in (1, -1))
    unchanged = of("none", 0, "coupling").mean()
    assert least < unchanged / 10 and most > 5 * unchanged


def test_vision_transformers_of_three_seeds():
    members = pd.read_csv(RESULTS / "vision_seeds" / "vision_seeds.csv")
    table = members.pivot(index="seed", columns="stochastic_depth")

    coupling, accuracy = (table[name][0.1] - table[name][0.0] for name in ("coupling", "accuracy"))
    assert f"coupling {over_seeds(coupling)} higher at stochastic depth 0.1 than without" in PAGE
    assert f"accuracy {over_seeds(accuracy)}" in PAGE
    assert len(coupling) == 3 and (coupling > 0).all()


def test_trajectories_are_straighter():
    table = pd.read_csv(RESULTS / "regularity.csv")
    scores = table[table.measure == "line_shape_score"].pivot_table(
        index="model", columns="weights", values="median"
    )
    assert (scores.trained < scores.untrained).all() and len(scores) == 4


def test_right_and_wrong_responses():
    tokens = pd.read_csv(RESULTS / "along_responses_gsm8k_cot_zeroshot_tokens.csv")
    tokens = tokens[(tokens.model == "qwen2.5-coder-0.5b") & (tokens.measure == "coupling")]
    documents = tokens.groupby(["answer", "doc_hash"]).value.mean()
    right, wrong = documents["right"], documents["wrong"]
    interval = stats.ttest_ind(right, wrong, equal_var=False).confidence_interval()
    difference = plain(right.mean() - wrong.mean(), 3)
    assert f"{difference} ({plain(interval.low, 3)} to {plain(interval.high, 3)})" in PAGE
    assert f"{len(right)} right and {len(wrong)} wrong responses" in PAGE
    slopes = {
        answer: np.mean([np.polyfit(of.share, of.value, 1)[0] for _, of in by.groupby("doc_hash")])
        for answer, by in tokens.groupby("answer")
    }
    assert f"slopes {plain(slopes['right'], 3)} and {plain(slopes['wrong'], 3)}" in PAGE
