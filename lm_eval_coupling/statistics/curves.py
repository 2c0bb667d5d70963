"""A line or an exponential through (coupling, score), with or without the errors of either."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping

import numpy as np
from scipy import optimize, stats

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.statistics.estimates import (
    Estimate,
    Result,
    Values,
    check_confidence,
    complete,
    constant,
    statsmodels,
)

_STEEPEST = 10.0  # of c·x over half the range of x; beyond it a curve is a step at the last points


@dataclasses.dataclass(frozen=True)
class Fit(Result):
    """A fitted curve ``y = intercept + slope·x`` or ``y = a + b·exp(c·x)``.

    ``errors``: whose standard errors were used (``none``, ``y``, ``x and y``). ``dispersion``: the scatter in units of
    them, 1 where they explain it. ``p``: of the curve against no dependence on x. ``p_curvature``: of the exponential
    against a line.
    """

    form: str
    errors: str
    coefficients: Mapping[str, Estimate]
    r2: float = math.nan
    p: float = math.nan
    p_curvature: float = math.nan
    dispersion: float = math.nan
    n: int = 0
    dropped: int = 0
    confidence: float = 0.95
    reason: str | None = None
    notes: tuple[str, ...] = ()
    parameters: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    covariance: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    x_scale: tuple[float, float] = dataclasses.field(default=(0.0, 1.0), repr=False, compare=False)

    def predict(self, x: Values) -> np.ndarray:
        """The curve at x; NaN if there is none."""
        return self._curve(x)[0]

    def band(self, x: Values) -> tuple[np.ndarray, np.ndarray]:
        """Confidence limits of the curve (not of single observations) at x, to first order in its parameters."""
        value, gradient = self._curve(x)
        if self.covariance is None:
            return value, value
        df = self.n - len(gradient)
        half = stats.t.ppf((1 + self.confidence) / 2, df) * np.sqrt(
            np.einsum("ix,ij,jx->x", gradient, self.covariance, gradient)
        )
        return value - half, value + half

    def _curve(self, x: Values) -> tuple[np.ndarray, np.ndarray]:
        x = np.asarray(x, dtype=np.float64)
        if self.parameters is None:
            return np.full(x.shape, math.nan), np.full((0, *x.shape), math.nan)
        if self.form == "line":
            return self.parameters @ [np.ones_like(x), x], np.stack([np.ones_like(x), x])
        center, half_range = self.x_scale
        z = (x - center) / half_range
        return _growth(z, *self.parameters), _growth_gradient(z, *self.parameters)


def line_fit(
    x: Values,
    y: Values,
    *,
    y_error: Values | None = None,
    x_error: Values | None = None,
    confidence: float = 0.95,
) -> Fit:
    """A straight line: least squares; weighted by ``y_error``; or with errors in both (York et al. 2004).

    Standard errors weigh the points; intervals come from the scatter around the line, and with errors in both are widened
    where it exceeds them (never narrowed). Errors of x and y are taken as independent. ``r2`` is weighted alike, and
    undefined (NaN) with errors in both.

    Returns:
        The coefficients and what is known of them, or a ``reason`` why there is no fit.

    Raises:
        CouplingError: if columns differ in length, an error is not positive, or x_error comes without y_error.
    """
    points, found = _points("line", x, y, x_error, y_error, confidence)
    if found.reason:
        return found
    return _york(points, found) if x_error is not None else _least_squares(points, found)


def exponential_fit(
    x: Values,
    y: Values,
    *,
    y_error: Values | None = None,
    confidence: float = 0.95,
    resamples: int = 999,
    seed: int = 0,
) -> Fit:
    """``y = a + b·exp(c·x)`` by (weighted) least squares, with a permutation test that redoes the search for c.

    Fitted as ``y = m + s·(exp(k·z) − 1)/k`` with z = x scaled to [−1, 1], which has a line (k = 0) in its middle; a and b
    are ill-determined there and the notes say so. No F test of the curve, as c does not exist without a dependence.

    Returns:
        The coefficients and what is known of them, or a ``reason`` why there is no fit.

    Raises:
        CouplingError: if columns differ in length or an error is not positive.
    """
    points, found = _points("exponential", x, y, None, y_error, confidence)
    if found.reason:
        return found
    x, y, n = points["x"], points["y"], found.n
    weights = points.get("y_error", np.ones(n)) ** -2.0
    center, half_range = (x.max() + x.min()) / 2, np.ptp(x) / 2
    z = (x - center) / half_range
    rates = np.linspace(-_STEEPEST, _STEEPEST, 201)
    shapes = np.stack([_growth(z, 0.0, 1.0, k) for k in rates])
    explained = _explained(shapes, y[None], weights[None])[:, 0]
    k = rates[explained.argmax()]
    s, m = np.polyfit(_growth(z, 0.0, 1.0, k), y, 1, w=np.sqrt(weights))
    parameters, covariance = _settle(z, y, weights, np.array([m, s, k]))
    residual = weights @ (y - _growth(z, *parameters)) ** 2
    rng = np.random.default_rng(seed)
    shuffled = np.stack([rng.permutation(n) for _ in range(resamples)])
    best = _explained(shapes, y[shuffled], weights[shuffled]).max(axis=0)
    total = weights @ (y - np.average(y, weights=weights)) ** 2
    straight = (1 - _explained(z[None], y[None], weights[None])[0, 0]) * total
    curvature = max(0.0, straight - residual) / (residual / (n - 3)) if residual > 0 else math.inf
    coefficients = _natural(parameters, covariance, center, half_range, n - 3, confidence)
    notes: tuple[str, ...] = ()
    if np.isnan(covariance).any():
        notes = ("the rate is not determined, as the curve rests on its outermost points",)
    elif coefficients["c"].low <= 0 <= coefficients["c"].high:
        notes = ("a line fits as well, so that a and b are hardly determined",)
    return dataclasses.replace(
        found,
        coefficients=coefficients,
        r2=float(1 - residual / total),
        p=float((1 + np.sum(best >= explained.max() * (1 - 1e-12))) / (1 + resamples)),
        p_curvature=float(stats.f.sf(curvature, 1, n - 3)),
        dispersion=math.sqrt(residual / (n - 3)) if y_error is not None else math.nan,
        notes=notes,
        parameters=parameters,
        covariance=covariance,
        x_scale=(float(center), float(half_range)),
    )


def proportion_error(score: Values | float, n: Values | int) -> np.ndarray | float:
    """Standard error of a proportion over n answers that is not 0 for a score of 0 or 1 (Agresti and Coull 1998)."""
    score, n = np.asarray(score, dtype=np.float64), np.asarray(n, dtype=np.float64)
    shrunk = (score * n + 2) / (n + 4)
    return np.sqrt(shrunk * (1 - shrunk) / (n + 4))


def _points(
    form: str,
    x: Values,
    y: Values,
    x_error: Values | None,
    y_error: Values | None,
    confidence: float,
) -> tuple[dict[str, np.ndarray], Fit]:
    check_confidence(confidence)
    if x_error is not None and y_error is None:
        raise CouplingError(
            "got x_error without y_error; give the standard errors of both, or of y"
        )
    points, dropped = complete(x=x, y=y, x_error=x_error, y_error=y_error)
    for name in ("x_error", "y_error"):
        if name in points and (points[name] <= 0).any():
            raise CouplingError(
                f"got {name} of {points[name].min():g}, expected positive standard errors; "
                "for scores of 0 or 1 use proportion_error(score, n)"
            )
    errors = "none" if y_error is None else "y" if x_error is None else "x and y"
    names = ("intercept", "slope") if form == "line" else ("a", "b", "c")
    n, least = len(points["x"]), len(names) + 1
    reason = None
    if n < least:
        reason = f"{n} complete observations, at least {least} are needed"
    elif constant(points["x"]):
        reason = "x is constant"
    elif constant(points["y"]):
        reason = "y is constant"
    elif len(np.unique(points["x"])) < len(names):
        reason = f"x has {len(np.unique(points['x']))} different values, at least {len(names)} are needed"
    empty = {name: Estimate() for name in names}
    return points, Fit(
        form, errors, empty, n=n, dropped=dropped, confidence=confidence, reason=reason
    )


def _least_squares(points: dict[str, np.ndarray], found: Fit) -> Fit:
    sm = statsmodels("api")
    weights = points["y_error"] ** -2.0 if "y_error" in points else 1.0
    fit = sm.WLS(points["y"], sm.add_constant(points["x"]), weights=weights).fit()
    return dataclasses.replace(
        found,
        coefficients=_estimates(
            ("intercept", "slope"), fit.params, fit.bse, fit.df_resid, found.confidence
        ),
        r2=float(fit.rsquared),
        p=float(fit.pvalues[1]),
        dispersion=math.sqrt(fit.scale) if "y_error" in points else math.nan,
        parameters=fit.params,
        covariance=fit.cov_params(),
    )


def _york(points: dict[str, np.ndarray], found: Fit) -> Fit:
    """York, Evensen, López Martínez and De Basabe Delgado, Am. J. Phys. 72 (2004) 367, eqs. 13, for independent errors."""
    x, y, var_x, var_y = points["x"], points["y"], points["x_error"] ** 2, points["y_error"] ** 2
    slope = np.polyfit(x, y, 1)[0]
    for _ in range(1000):
        weights = 1 / (var_y + slope**2 * var_x)
        mean_x, mean_y = np.average(x, weights=weights), np.average(y, weights=weights)
        u, v = x - mean_x, y - mean_y
        step = weights * (u * var_y + slope * v * var_x)  # from the mean to the adjusted x
        previous, slope = slope, (weights * step) @ v / ((weights * step) @ u)
        if not abs(slope - previous) > 1e-13 * abs(slope):
            break
    else:
        return dataclasses.replace(
            found, reason="the fit did not settle: x is not known well enough to fit a line"
        )
    if not math.isfinite(slope):
        return dataclasses.replace(
            found, reason="the fit did not settle: x is not known well enough to fit a line"
        )
    adjusted = mean_x + step
    mean_adjusted = np.average(adjusted, weights=weights)
    intercept = mean_y - slope * mean_x
    var_slope = 1 / (weights @ (adjusted - mean_adjusted) ** 2)
    covariance = np.array(
        [
            [1 / weights.sum() + mean_adjusted**2 * var_slope, -mean_adjusted * var_slope],
            [0, var_slope],
        ]
    )
    covariance[1, 0] = covariance[0, 1]
    df = found.n - 2
    dispersion = math.sqrt(weights @ (y - intercept - slope * x) ** 2 / df)
    covariance *= max(1.0, dispersion) ** 2
    parameters, stderrs = np.array([intercept, slope]), np.sqrt(np.diag(covariance))
    return dataclasses.replace(
        found,
        coefficients=_estimates(("intercept", "slope"), parameters, stderrs, df, found.confidence),
        p=float(2 * stats.t.sf(abs(slope / stderrs[1]), df)),
        dispersion=dispersion,
        parameters=parameters,
        covariance=covariance,
    )


def _estimates(
    names: tuple[str, ...],
    values: np.ndarray,
    stderrs: np.ndarray,
    df: float | int,
    confidence: float,
) -> dict[str, Estimate]:
    return {
        name: Estimate.from_t(value, stderr, df, confidence)
        for name, value, stderr in zip(names, values, stderrs, strict=True)
    }


def _settle(
    z: np.ndarray, y: np.ndarray, weights: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The least-squares m, s, k and their covariance; ``start`` and NaN where the search leaves the range of rates."""
    try:
        with (
            warnings.catch_warnings(),
            np.errstate(over="ignore"),
        ):  # of no covariance, and of steps that go too far
            warnings.simplefilter("ignore", optimize.OptimizeWarning)
            found = optimize.curve_fit(
                _growth,
                z,
                y,
                p0=start,
                sigma=1 / np.sqrt(weights),
                jac=lambda z, *p: _growth_gradient(z, *p).T,
            )
    except (RuntimeError, ValueError):  # too many steps, or overflow
        return start, np.full((3, 3), math.nan)
    settled = abs(found[0][2]) <= _STEEPEST and np.isfinite(found[1]).all()
    return found if settled else (start, np.full((3, 3), math.nan))


def _growth(z: np.ndarray, m: float, s: float, k: float) -> np.ndarray:
    """Return m + s·(exp(k·z) − 1)/k, a line for k → 0."""
    return m + s * (z if abs(k) < 1e-9 else np.expm1(k * z) / k)


def _growth_gradient(z: np.ndarray, m: float, s: float, k: float) -> np.ndarray:
    """Its derivatives by m, s and k, one row each."""
    if abs(k) < 1e-3:  # the closed form cancels
        by_k = z**2 / 2 + k * z**3 / 3
    else:
        by_k = (z * np.exp(k * z) - np.expm1(k * z) / k) / k
    return np.stack([np.ones_like(z), _growth(z, 0.0, 1.0, k), s * by_k])


def _explained(shapes: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Squared weighted correlation of every shape (rows) with every y (rows, with rows of weights)."""
    weights = weights / weights.sum(axis=1, keepdims=True)
    y = y - (weights * y).sum(axis=1, keepdims=True)
    shapes = shapes - shapes.mean(axis=1, keepdims=True)  # else the variance cancels
    variance = shapes**2 @ weights.T - (shapes @ weights.T) ** 2
    return (shapes @ (weights * y).T) ** 2 / (variance * (weights * y**2).sum(axis=1))


def _natural(
    parameters: np.ndarray,
    covariance: np.ndarray,
    center: float,
    half_range: float,
    df: int,
    confidence: float,
) -> dict[str, Estimate]:
    """a, b and c from m, s and k, errors by the delta method."""
    _, s, k = parameters
    with np.errstate(all="ignore"):
        base = np.exp(-k * center / half_range)
        values = np.array([parameters[0] - s / k, s / k * base, k / half_range])
        gradient = np.array(
            [
                [1, -1 / k, s / k**2],
                [0, base / k, -s / k * base * (1 / k + center / half_range)],
                [0, 0, 1 / half_range],
            ]
        )
        stderrs = np.sqrt(np.diag(gradient @ covariance @ gradient.T))
    return _estimates(("a", "b", "c"), values, stderrs, df, confidence)
