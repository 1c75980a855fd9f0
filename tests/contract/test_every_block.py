"""No printed block without a test, no test of a block that is gone, no quiet edit of the document."""

import hashlib
import importlib
from pathlib import Path

from spec_blocks import BLOCKS, SPEC, TESTED

SPEC_SHA256 = "41955952c360023979dd26e57ee797dd2c2216ea3fd89cf2f3b3284ebfe2d3a3"


def test_every_block_of_the_spec_has_a_test_written_for_its_content() -> None:
    for path in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(path.stem)
    assert {key: block.digest for key, block in BLOCKS.items()} == TESTED


def test_the_spec_is_the_users_own_document_unchanged() -> None:
    assert hashlib.sha256(SPEC.read_bytes()).hexdigest() == SPEC_SHA256


def test_commands_are_found_whole() -> None:
    counts = {key: len(block.commands()) for key, block in BLOCKS.items() if block.language == "bash"}
    assert counts == {
        "option-1-automated-recommended": 2,
        "option-2-manual-testing": 3,
        "adaptive_retraining_daemon.py-400-lines-3": 2,
        "step-by-step-process-3": 2,
        "check-drift-status": 1,
        "check-buffer-status": 1,
        "check-retraining-state": 1,
        "issue-retraining-not-triggered-despite-high-drift": 2,
        "issue-data-buffer-empty": 2,
        "issue-training-failed": 2,
        "systemd-service-linux-2": 3,
    }
