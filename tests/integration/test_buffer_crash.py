"""A writer killed at random moments loses nothing that it acknowledged and doubles nothing."""

from pathlib import Path

import pytest

from benchmarks.buffer.buffer_crash import CrashRounds


@pytest.mark.slow
def test_twenty_five_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    tally = CrashRounds(tmp_path / "buffer", n_threads=2, seed=25).run(25)
    assert tally.kills == 25
    assert tally.acknowledged > 100
    assert tally.is_clean, tally
