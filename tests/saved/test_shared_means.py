"""A mean over tasks is over the same tasks for every model, or there is none."""

import math

import numpy as np
import pandas as pd
import pytest

from lm_eval_coupling.saved.shared_means import mean_over_shared_items


def long(table, **more):
    rows = [
        {"model": model, "task": task, "score": value, "coupling": 2 * value, "error": 0.3}
        for model, values in table.items()
        for task, value in values.items()
    ]
    return pd.DataFrame(rows)


def means(table, **kwargs):
    return mean_over_shared_items(
        long(table), unit="model", item="task", required=["score"], optional=["coupling"],
        errors=["error"], **kwargs,
    )  # fmt: skip


FULL = {f"m{i}": {"a": i, "b": i + 1, "c": i + 5} for i in range(5)}


def test_the_mean_of_all():
    shared = means(FULL)
    assert shared.items == ("a", "b", "c") and not shared.incomplete_items
    assert shared.means["score"].tolist() == [i + 2 for i in range(5)]
    assert shared.means["coupling"].tolist() == [2 * i + 4 for i in range(5)]
    assert shared.means["error"].tolist() == pytest.approx([math.sqrt(3 * 0.09) / 3] * 5)
    assert set(shared.means["n"]) == {3}


@pytest.mark.parametrize("hole", [None, math.nan, math.inf])
def test_a_task_that_one_model_lacks_is_in_no_mean(hole):
    """A name without a value was counted, and its model's mean was that of the other tasks."""
    rows = {name: dict(values) for name, values in FULL.items()}
    if hole is None:
        del rows["m3"]["b"]
    else:
        rows["m3"]["b"] = hole
    shared = means(rows)
    assert shared.items == ("a", "c") and shared.incomplete_items == {"b": ("m3",)}
    assert shared.means["score"].tolist() == [i + 2.5 for i in range(5)]
    assert not shared.incomplete_units


def test_of_two_tasks_the_model_that_lacks_one_has_no_mean():
    rows = {name: {k: v for k, v in values.items() if k != "c"} for name, values in FULL.items()}
    rows["m0"]["b"] = math.nan
    shared = means(rows)
    assert shared.items == ("a", "b") and shared.incomplete_units == {"m0": ("b",)}
    assert list(shared.means.index) == ["m1", "m2", "m3", "m4"]


def test_where_nothing_is_shared_there_is_no_mean():
    shared = means({"m0": {"a": 1, "b": 2}, "m1": {"c": 1}, "m2": {"d": 1}})
    assert shared.means.empty and len(shared.incomplete_items) == 4 and shared.items == ()
    alone = means({"m0": {"a": 1, "b": 2}, "m1": {"a": 1}, "m2": {"a": 1}})
    assert (
        alone.means.empty and alone.items == ("a",) and alone.incomplete_items["b"] == ("m1", "m2")
    )


def test_a_hole_in_a_predictor_is_a_hole_in_its_mean_alone():
    rows = long(FULL)
    rows.loc[4, "coupling"] = np.nan
    rows.loc[4, "error"] = np.nan
    shared = mean_over_shared_items(
        rows, unit="model", item="task", required=["score"], optional=["coupling"],
        errors=["error"],
    )  # fmt: skip
    assert shared.means["score"].notna().all()
    assert shared.means["coupling"].isna().tolist() == [False, True, False, False, False]
    assert shared.means["error"].isna().tolist() == [False, True, False, False, False]


def test_one_model_twice_is_refused():
    with pytest.raises(ValueError, match="several rows of one model and task"):
        mean_over_shared_items(
            pd.concat([long(FULL)] * 2), unit="model", item="task", required=["score"]
        )
