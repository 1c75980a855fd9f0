"""Claims about the figure of the loop replay."""

from pathlib import Path

import pytest

from benchmarks.loop.parts.figure import draw_errors, mean_by_day


def test_the_mean_of_a_day_is_over_the_runs_that_know_it() -> None:
    assert mean_by_day([[0.5, None], [0.7, 0.8]]).tolist() == pytest.approx([0.6, 0.8])


def test_a_figure_is_written_for_the_policies_that_were_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    side = {"daily": [0.5, 0.6, None]}
    run = {"changed_on_day": [1.0], "policies": {"never": {"raw": side, "served": side}}}
    draw_errors({"natural": [run], "leaks": []}, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
