"""Claims about the state a killed training resumes from."""

from pathlib import Path

import pytest
import torch
from odd_files import KINDS, put

from fleetcast.training.fit import BestEpoch, StateFile, TrainingState


def state(epoch: int = 2) -> TrainingState:
    weights = {"layer.weight": torch.arange(4.0)}
    optimizer = {
        "state": {0: {"step": torch.tensor(30.0), "exp_avg": torch.ones(4)}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "fused": True, "params": [0]}],
    }
    return TrainingState(epoch, weights, optimizer, '{"state": 1}', BestEpoch(0.25, 1, dict(weights)))


def test_a_state_comes_back_as_it_was_written(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "base_training.state", "this one")
    assert file.read() is None
    file.write(state())
    back = file.read()
    assert back is not None
    assert (back.epoch, back.random, back.best.loss, back.best.epoch) == (2, '{"state": 1}', 0.25, 1)
    assert torch.equal(back.weights["layer.weight"], torch.arange(4.0))
    assert torch.equal(back.optimizer["state"][0]["exp_avg"], torch.ones(4))
    assert back.optimizer["param_groups"] == state().optimizer["param_groups"]
    assert [path.name for path in tmp_path.iterdir()] == ["base_training.state"]
    file.remove()
    file.remove()
    assert file.read() is None


def test_the_state_of_another_training_is_left_aside(tmp_path: Path) -> None:
    StateFile(tmp_path / "s", "yesterday's data").write(state())
    assert StateFile(tmp_path / "s", "today's data").read() is None


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 torn"])
def test_a_damaged_state_begins_anew_and_says_so(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "s").write_bytes(content)
    assert StateFile(tmp_path / "s", "x").read() is None
    assert "starting anew" in caplog.text


def test_a_state_is_never_executed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Evil:
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"format": 1, "identity": Evil()}, tmp_path / "s")
    assert StateFile(tmp_path / "s", "x").read() is None
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_state_file_is_replaced(kind: str, tmp_path: Path) -> None:
    put(kind, tmp_path / "s")
    file = StateFile(tmp_path / "s", "x")
    assert file.read() is None
    file.write(state())
    assert file.read() is not None
