"""One drift check of other libraries, as their documents show it; imported only where installed."""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]  # (row, column)


def _scipy(reference: Rows, window: Rows) -> Callable[[], Any]:
    from scipy import stats

    return lambda: [stats.ks_2samp(window[:, j], reference[:, j]) for j in range(reference.shape[1])]


def _evidently(reference: Rows, window: Rows) -> Callable[[], Any]:
    import pandas as pd
    from evidently import Dataset, Report
    from evidently.presets import DataDriftPreset

    names = [f"c{j}" for j in range(reference.shape[1])]
    base = Dataset.from_pandas(pd.DataFrame(reference, columns=names))
    new = Dataset.from_pandas(pd.DataFrame(window, columns=names))
    return lambda: Report([DataDriftPreset()]).run(new, base)


def _alibi_detect(reference: Rows, window: Rows) -> Callable[[], Any]:
    from alibi_detect.cd import KSDrift

    detector = KSDrift(reference, p_val=0.05)
    return lambda: detector.predict(window)


def _nannyml(reference: Rows, window: Rows) -> Callable[[], Any]:
    import nannyml
    import pandas as pd

    names = [f"c{j}" for j in range(reference.shape[1])]
    detector = nannyml.UnivariateDriftCalculator(
        column_names=names, continuous_methods=["kolmogorov_smirnov"], chunk_number=1
    )
    detector.fit(pd.DataFrame(reference, columns=names))
    new = pd.DataFrame(window, columns=names)
    return lambda: detector.calculate(new)


def _river(reference: Rows, window: Rows) -> Callable[[], Any]:
    """Feed one ADWIN per column the window, value by value: it keeps no reference."""
    from river import drift

    streams = window.T.tolist()

    def check() -> int:
        detectors = [drift.ADWIN() for _ in streams]
        for detector, values in zip(detectors, streams, strict=True):
            for value in values:
                detector.update(value)
        return sum(detector.n_detections for detector in detectors)

    return check


def version_of(name: str) -> str:
    """Return the version of an installed library."""
    return importlib.metadata.version(name.replace("_", "-"))


PEER_CHECKS: dict[str, Callable[[Rows, Rows], Callable[[], Any]]] = {
    "scipy": _scipy,
    "evidently": _evidently,
    "alibi_detect": _alibi_detect,
    "nannyml": _nannyml,
    "river": _river,
}
