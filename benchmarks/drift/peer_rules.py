"""Do the rules written out in numpy answer like the libraries they stand for?

    .venv-peers/NAME/bin/python -m benchmarks.drift.peer_rules NAME     (run by peer_environments.py)

`drift_quality.py` asks Evidently's, NannyML's, the Kolmogorov-Smirnov and the ADWIN rule hundreds
of thousands of times, in its own environment. Here the original and its stand-in judge the same
seeded days, from unchanged to moved by one and a half standard deviations; printed is the share
of equal answers, as JSON.
"""

import argparse
import json
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from benchmarks.drift.parts import rules
from benchmarks.drift.parts.data import DAY
from benchmarks.drift.parts.rules import Stretch
from benchmarks.drift.parts.streams import WARM_DAYS, Adwin

PAIRS, DAYS, SEED = 40, 21, 11
LARGEST_SHIFT = 1.5

Bools = NDArray[np.bool_]
Rows = NDArray[np.float64]  # (bin, pair)


def pairs() -> tuple[Rows, Rows]:
    """Return references of three weeks and the days to judge, each moved by a little more."""
    random = np.random.default_rng(SEED)
    clock = 2 * np.pi * np.arange((DAYS + 1) * DAY) / DAY
    noise = random.normal(0, 1, (len(clock), PAIRS))
    for place in range(1, len(clock)):
        noise[place] += 0.8 * noise[place - 1]
    values = 50 + 3 * np.sin(clock)[:, None] + noise
    reference, day = values[: DAYS * DAY], values[DAYS * DAY :]
    return reference, day + np.linspace(0, LARGEST_SHIFT, PAIRS) * reference.std(axis=0)


def _stand_in(rule: Callable[[Stretch], Bools], reference: Rows, day: Rows) -> Bools:
    stretches = (Stretch("m", reference[:, j], day[:, j], np.zeros(DAY)) for j in range(PAIRS))
    return np.array([bool(rule(stretch)[-1]) for stretch in stretches])


def _evidently(reference: Rows, day: Rows) -> tuple[Bools, Bools]:
    import pandas as pd
    from evidently import Dataset, Report
    from evidently.presets import DataDriftPreset

    names = [f"c{j:02d}" for j in range(PAIRS)]
    old, new = (Dataset.from_pandas(pd.DataFrame(rows, columns=names)) for rows in (reference, day))
    found = Report([DataDriftPreset()]).run(new, old).dict()["metrics"]
    scores = {m["config"]["column"]: m for m in found if "column" in m.get("config", {})}
    said = [scores[name]["value"] >= scores[name]["config"]["threshold"] for name in names]
    return np.array(said), _stand_in(rules.evidently, reference, day)


def _nannyml(reference: Rows, day: Rows) -> tuple[Bools, Bools]:
    import nannyml
    import pandas as pd

    names = [f"c{j:02d}" for j in range(PAIRS)]
    detector = nannyml.UnivariateDriftCalculator(
        column_names=names, continuous_methods=["jensen_shannon"], chunk_size=DAY
    )
    detector.fit(pd.DataFrame(reference, columns=names))
    table = detector.calculate(pd.DataFrame(day, columns=names)).filter(period="analysis").to_df()
    said = [bool(table[(name, "jensen_shannon", "alert")].iloc[0]) for name in names]
    return np.array(said), _stand_in(rules.nannyml, reference, day)


def _scipy(reference: Rows, day: Rows) -> tuple[Bools, Bools]:
    from scipy import stats

    found = [stats.ks_2samp(day[:, j], reference[:, j], method="asymp").pvalue < 0.05 for j in range(PAIRS)]
    return np.array(found), _stand_in(rules.ks_test, reference, day)


def _river(reference: Rows, day: Rows) -> tuple[Bools, Bools]:
    from river import drift

    both = np.concatenate([reference[-WARM_DAYS * DAY :], day])
    said, own = [], []
    for values in ((both - reference.mean(axis=0)) / reference.std(axis=0)).T.tolist():
        original, small = drift.ADWIN(), Adwin()
        for value in values:
            original.update(value)
            said.append(original.drift_detected)
            own.append(small.update(value))
    return np.array(said), np.array(own)


CHECKS = {"scipy": _scipy, "evidently": _evidently, "nannyml": _nannyml, "river": _river}


def main() -> int:
    """Print {"answers", "equal_pct", "original_says_drift", "ours_says_drift"} of one library."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", choices=CHECKS)
    said, own = CHECKS[parser.parse_args().library](*pairs())
    figures = {
        "answers": len(said),
        "equal_pct": round(100 * float((said == own).mean()), 2),
        "original_says_drift": int(said.sum()),
        "ours_says_drift": int(own.sum()),
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
