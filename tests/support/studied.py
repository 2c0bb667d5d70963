"""Records of known numbers for the studies, and what their scripts leave."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pandas as pd
import saved_runs

from lm_eval_coupling.saved.tables import write_tables

ANALYSIS = Path(__file__).parents[2] / "analysis"


CHANCE = 1 - saved_runs.CHANCE[10]  # coupling of unrelated layers


PAIRS = np.array([[0, 0.2, 0.4], [0.6, 0, 0.8], [1, 0.5, 0]], dtype=np.float32)


NOT_OURS = ("correlate", "controlled_family")


def load_script(name):
    """Return a script of analysis/ as a module of its own, which shares no state with another."""
    spec = importlib.util.spec_from_file_location(f"analysis_{name}", ANALYSIS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(name):
    return load_script(name).main


def record(doc_id, *, task="arc", weights="trained", shift=0.0, **changes):
    """Return a record of three layers and two ranks; ``shift`` is added to all its numbers."""
    layers, n = 3, 6
    found = saved_runs.record(task, doc_id, layers=layers)
    miscoupling = np.stack([PAIRS + np.float32(shift), np.full((layers, layers), 0.9, np.float32)])
    pairs = (
        np.arange(2 * layers * layers * 4, dtype=np.float32).reshape(2, layers, layers, 2, 2) / 100
    )
    return (
        found
        | {
            "n_tokens": n,
            "tokens": tuple(range(n)),
            "position": n - 1,
            "normalized_miscoupling": miscoupling,
            "singular_values": np.array(
                [[1 / (k + layer) for k in range(1, 31)] for layer in range(1, 4)], np.float32
            ),
            "line_shape_score": 1.5 + shift,
            "expodistance": 0.5 + shift,
            "norms": np.array([1, 2, 4, 8], np.float32),
            "equidistance": 0.25 + shift,
            "step_lengths": np.array([1, 2, 4], np.float32),
            "windowed_line_shape": np.array([1.1, 1.2], np.float32),
            "windowed_expodistance": np.array([0.1, 0.2], np.float32),
            "window": 2,
            "entropy": np.array([4, 3, 2, 1], np.float32),
            "effective_rank": np.array([5, 6, 7], np.float32),
            "participation_ratio": np.array([2, 3, 4], np.float32),
            "depth_slope": np.full(30, 1, np.float32),
            "depth_r2": np.full(30, 0.9, np.float32),
            "frobenius_norms": np.array([[8, 1, 0, 2, 3, 4]] * layers, np.float32)
            + np.float32(shift),
            "spectral_norms": np.array([[4, 1, 0, 1, 1, 2]] * layers, np.float32),
            "self_tokens": (n - 2, n - 1),
            "self_layers": (0, 1, 2),
            "self_miscoupling": pairs + np.float32(shift),
            "context_tokens": (n - 2, n - 1),
            "context_layers": (0, 1, 2),
            "context_input_miscoupling": pairs,
            "context_output_miscoupling": pairs,
            "trajectories": np.arange(n * 4 * 3, dtype=np.float32).reshape(n, 4, 3),
            "trajectory_variance": np.array([0.6, 0.3, 0.1], np.float32),
            "weights": weights,
        }
        | changes
    )


def save(
    folder,
    rows,
    *,
    model="org/tiny",
    revision="main",
    date=saved_runs.DATE,
    fingerprint="f",
    seed=0,
):
    """The tables of one run; ``seed`` is that of its untrained twin."""
    about = {
        "model": model,
        "revision": revision,
        "fingerprint": fingerprint,
        "untrained": {"seed": seed, "tasks": {}},
    }
    write_tables(rows, folder / f"{model}-{revision}".replace("/", "__"), date, about)
    return folder


def table(out, name, of="_arc"):
    """The numbers of a study of these tasks, "" for all of several, whose pictures are there."""
    name += of
    for suffix, start in {"png": b"\x89PNG", "svg": b"<?xml"}.items():
        assert (out / f"{name}.{suffix}").read_bytes().startswith(start)
    return pd.read_csv(out / f"{name}.csv")


def pair_rows(**tasks):
    about = {
        "model": "m",
        "revision": "main",
        "weights": "trained",
        "measure": "coupling",
        "depth": math.nan,
    }
    return pd.DataFrame(
        about | {"task": task, "doc_hash": doc, "value": value}
        for task, values in tasks.items()
        for doc, value in values.items()
    )


def quartile_rows(**changes):
    about = {
        "panel": "coupling",
        "line": "m",
        "weights": "trained",
        "n": 5,
        "undefined": 0,
        "chance": CHANCE,
    }
    depth = np.arange(1, 5)
    return pd.DataFrame(
        about
        | {"depth": depth, "median": depth / 10, "q25": depth / 20, "q75": depth / 5}
        | changes
    )
