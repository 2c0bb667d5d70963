"""Lines and exponentials through (coupling, score), with or without the errors of either."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping

import numpy as np
from scipy import optimize, stats

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.statistics.estimates import (
    CONFIDENCE,
    Estimate,
    Result,
    Values,
    complete,
    is_constant,
    load_statsmodels,
)

# Of c·x over half the range of x; beyond it a curve is a step at the last points.
_STEEPEST = 10.0


@dataclasses.dataclass(frozen=True)
class Fit(Result):
    """A fitted curve ``y = intercept + slope·x`` or ``y = a + b·exp(c·x)``.

    ``errors`` tells which standard errors were used (``none``, ``y``, ``x and y``), and
    ``dispersion`` is the scatter in units of them: 1 where they explain it. ``p`` tests the curve
    against no dependence on x, and ``p_curvature`` the exponential against a line.
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
    confidence: float = CONFIDENCE
    reason: str | None = None
    notes: tuple[str, ...] = ()
    parameters: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    covariance: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    x_scale: tuple[float, float] = dataclasses.field(default=(0.0, 1.0), repr=False, compare=False)

    def predict(self, x: Values) -> np.ndarray:
        """Return the curve at x; NaN if there is none."""
        return self._curve(x)[0]

    def band(self, x: Values) -> tuple[np.ndarray, np.ndarray]:
        """Return confidence limits of the curve at x, to first order in its parameters.

        They are not limits of single observations.
        """
        value, gradient = self._curve(x)
        if self.covariance is None:
            return value, value
        df = self.n - len(gradient)
        half = stats.t.ppf((1 + CONFIDENCE) / 2, df) * np.sqrt(
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
) -> Fit:
    """Fit a straight line by least squares, or with errors in both (York et al. 2004).

    Standard errors weight the points, and intervals come from the scatter around the line. With
    errors in both, taken as independent, the scatter widens the intervals and never narrows them.
    ``r2`` is weighted alike, and NaN with errors in both.

    Returns:
        The coefficients with their intervals, or the ``reason`` why there is no fit.

    Raises:
        CouplingError: If columns differ in length, an error is not positive, or x_error comes
            without y_error.
    """
    points, result = _points("line", x, y, x_error, y_error)
    if result.reason:
        return result
    fit = _least_squares if x_error is None else _york
    return fit(points, result)


def exponential_fit(
    x: Values,
    y: Values,
    *,
    y_error: Values | None = None,
    resamples: int = 999,
    seed: int = 0,
) -> Fit:
    """Fit ``y = a + b·exp(c·x)`` by (weighted) least squares.

    The curve is ``y = m + s·(exp(k·z) − 1)/k`` with z = x scaled to [−1, 1]; k = 0 is a line, near
    which a and b are ill-determined, as the notes say. The permutation test repeats the search for
    c: there is no F test, because c does not exist without a dependence.

    Returns:
        The coefficients with their intervals, or the ``reason`` why there is no fit.

    Raises:
        CouplingError: If columns differ in length or an error is not positive.
    """
    points, result = _points("exponential", x, y, None, y_error)
    if result.reason:
        return result
    x, y, n = points["x"], points["y"], result.n
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
    gain, curvature = straight - residual, 0.0
    if gain > 1e-14 * total:  # below, both are rounding, as of points on a line
        curvature = gain / (residual / (n - 3)) if residual > 0 else math.inf
    coefficients = _natural(parameters, covariance, center, half_range, n - 3)
    notes: tuple[str, ...] = ()
    if np.isnan(covariance).any():
        notes = ("the rate is not determined, as the curve rests on its outermost points",)
    elif coefficients["c"].low <= 0 <= coefficients["c"].high:
        notes = ("a line fits as well, so that a and b are hardly determined",)
    return dataclasses.replace(
        result,
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
    """Return the standard error of a proportion over n answers.

    It is not 0 for a score of 0 or 1 (Agresti and Coull 1998).
    """
    score, n = np.asarray(score, dtype=np.float64), np.asarray(n, dtype=np.float64)
    shrunk = (score * n + 2) / (n + 4)
    return np.sqrt(shrunk * (1 - shrunk) / (n + 4))


def _points(
    form: str, x: Values, y: Values, x_error: Values | None, y_error: Values | None
) -> tuple[dict[str, np.ndarray], Fit]:
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
    elif is_constant(points["x"]):
        reason = "x is constant"
    elif is_constant(points["y"]):
        reason = "y is constant"
    elif (distinct := len(np.unique(points["x"]))) < len(names):
        reason = f"x has {distinct} different values, at least {len(names)} are needed"
    empty = {name: Estimate() for name in names}
    return points, Fit(form, errors, empty, n=n, dropped=dropped, reason=reason)


def _least_squares(points: dict[str, np.ndarray], result: Fit) -> Fit:
    sm = load_statsmodels("api")
    weights = points["y_error"] ** -2.0 if "y_error" in points else 1.0
    x, y = points["x"], points["y"]
    # Beside a large mean, the differences of x and y would be lost to rounding.
    center, scale, level = x.mean(), np.ptp(x), y.mean()
    fit = sm.WLS(y - level, sm.add_constant((x - center) / scale), weights=weights).fit()
    back = np.array([[1, -center / scale], [0, 1 / scale]])
    parameters = back @ fit.params + [level, 0]
    covariance = back @ fit.cov_params() @ back.T
    stderrs = np.sqrt(np.diag(covariance))
    return dataclasses.replace(
        result,
        coefficients=_estimates(("intercept", "slope"), parameters, stderrs, fit.df_resid),
        r2=float(fit.rsquared),
        p=float(fit.pvalues[1]),
        dispersion=math.sqrt(fit.scale) if "y_error" in points else math.nan,
        parameters=parameters,
        covariance=covariance,
    )


def _york(points: dict[str, np.ndarray], result: Fit) -> Fit:
    """Return the fit of a line with independent errors in x and y.

    York, Evensen, López Martínez and De Basabe Delgado, Am. J. Phys. 72 (2004) 367, eqs. 13.
    """
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
        slope = math.nan
    if not math.isfinite(slope):
        return result.with_reason(
            "the fit did not settle: x is not known well enough to fit a line"
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
    df = result.n - 2
    dispersion = math.sqrt(weights @ (y - intercept - slope * x) ** 2 / df)
    covariance *= max(1.0, dispersion) ** 2
    parameters, stderrs = np.array([intercept, slope]), np.sqrt(np.diag(covariance))
    return dataclasses.replace(
        result,
        coefficients=_estimates(("intercept", "slope"), parameters, stderrs, df),
        p=float(2 * stats.t.sf(abs(slope / stderrs[1]), df)),
        dispersion=dispersion,
        parameters=parameters,
        covariance=covariance,
    )


def _estimates(
    names: tuple[str, ...], values: np.ndarray, stderrs: np.ndarray, df: float | int
) -> dict[str, Estimate]:
    return {
        name: Estimate.from_t(value, stderr, df)
        for name, value, stderr in zip(names, values, stderrs, strict=True)
    }


def _settle(
    z: np.ndarray, y: np.ndarray, weights: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return m, s, k and their covariance; ``start`` and NaN where the rate leaves its range."""
    try:
        with (
            warnings.catch_warnings(),
            np.errstate(over="ignore"),
        ):  # overflow: steps that go too far; the warning: no covariance
            warnings.simplefilter("ignore", optimize.OptimizeWarning)
            solution = optimize.curve_fit(
                _growth,
                z,
                y,
                p0=start,
                sigma=1 / np.sqrt(weights),
                jac=lambda z, *p: _growth_gradient(z, *p).T,
            )
    except (RuntimeError, ValueError):  # too many steps, or overflow
        return start, np.full((3, 3), math.nan)
    is_settled = abs(solution[0][2]) <= _STEEPEST and np.isfinite(solution[1]).all()
    return solution if is_settled else (start, np.full((3, 3), math.nan))


def _growth(z: np.ndarray, m: float, s: float, k: float) -> np.ndarray:
    """Return m + s·(exp(k·z) − 1)/k, a line for k → 0."""
    return m + s * (z if abs(k) < 1e-9 else np.expm1(k * z) / k)


def _growth_gradient(z: np.ndarray, m: float, s: float, k: float) -> np.ndarray:
    """Return the derivatives of the growth by m, s and k, one row each."""
    if abs(k) < 1e-3:  # the closed form cancels
        by_k = z**2 / 2 + k * z**3 / 3
    else:
        by_k = (z * np.exp(k * z) - np.expm1(k * z) / k) / k
    return np.stack([np.ones_like(z), _growth(z, 0.0, 1.0, k), s * by_k])


def _explained(shapes: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the squared weighted correlation of every shape (row) with every y (row).

    Each y has its own row of weights.
    """
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
) -> dict[str, Estimate]:
    """Return a, b and c from m, s and k, with errors by the delta method."""
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
    return _estimates(("a", "b", "c"), values, stderrs, df)
