"""Data of published examples that several tests of statistics use."""

import pytest

sm = pytest.importorskip(
    "statsmodels.api", reason="statsmodels (the extra `analysis`) is not installed"
)

ANSCOMBE = (
    [10, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5],
    [8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68],
)

_LOADED = sm.datasets.longley.load_pandas()
LONGLEY = _LOADED.exog.assign(TOTEMP=_LOADED.endog)
OTHERS = ["GNPDEFL", "GNP", "UNEMP", "ARMED", "POP"]
