"""The words and order of a verdict."""

import numpy as np
from rhythm_fleet import usual_reference

from fleetcast.drift.seasonal.detector import DriftingSeries, DriftVerdict


def series(server: str, ratio: float) -> DriftingSeries:
    return DriftingSeries(server, "cpu_pct", "fds", "higher_24h", "has risen", ratio, 0, 0, 10.0, 20.0)


def test_servers_come_worst_first_and_once() -> None:
    verdict = DriftVerdict(
        end_ms=0,
        status="ready",
        scores={},
        combined=0.0,
        needs_retraining=False,
        alarm_share=0.0,
        sustained_share=0.0,
        n_compared=3,
        drifting=(series("b", 3.0), series("a", 2.0), series("b", 1.1)),
        not_compared={},
        events=(),
        ratios=np.zeros((4, 3), np.float32),
        reference=usual_reference(),
    )

    assert verdict.drifting_servers() == ("b", "a")


def test_a_sentence_says_who_what_from_and_to() -> None:
    said = series("web-01", 2.04).sentence()

    assert said == "web-01 cpu_pct has risen: usually about 10, now 20 (2.0 times the limit)"
