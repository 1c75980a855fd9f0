import inspect
from pathlib import Path

import pytest

from fleetcast import errors
from fleetcast.errors import (
    AlreadyRunning,
    BadCheckpoint,
    CannotStart,
    CorruptFile,
    ExitCode,
    FleetcastError,
    NotEnoughData,
    SettingsError,
)

TREE = [
    value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, FleetcastError)
]


def test_the_exit_codes_are_those_the_documents_name() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0,
        "FAILED": 1,
        "BAD_SETTINGS": 2,
        "CANNOT_START": 3,
        "ALREADY_RUNNING": 4,
        "NOT_ENOUGH_DATA": 5,
        "COULD_NOT_LOOK": 6,
    }


@pytest.mark.parametrize(
    ("kind", "code"), [(SettingsError, 2), (CannotStart, 3), (AlreadyRunning, 4), (NotEnoughData, 5)]
)
def test_an_error_knows_its_exit_code(kind: type[FleetcastError], code: int) -> None:
    assert kind.exit_code == code


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_every_error_says_when_it_is_raised(kind: type[FleetcastError]) -> None:
    first = (kind.__doc__ or "").split(".")[0]
    assert first.startswith("Raised when") or kind is FleetcastError or kind.__name__ == "UnknownFormat", (
        first
    )


def test_a_hint_follows_the_message_in_brackets() -> None:
    assert str(FleetcastError("port 8000 is taken", hint="use --port")) == "port 8000 is taken (use --port)"
    assert FleetcastError("x", hint="y").hint == "y"


def test_settings_errors_carry_every_problem() -> None:
    error = SettingsError(["a must be > 0", "b is unknown"])
    assert str(error) == "a must be > 0; b is unknown"
    assert error.problems == ("a must be > 0", "b is unknown")


def test_the_holder_of_a_lock_is_named_by_pid_where_it_is_known() -> None:
    assert str(AlreadyRunning("the buffer", 42)) == "the buffer is already held by pid 42"
    assert "another process" in str(AlreadyRunning("the buffer", None))


def test_a_corrupt_file_is_named_with_its_path() -> None:
    error = BadCheckpoint(Path("checkpoints/last.ckpt"), "sha256 differs")
    assert isinstance(error, CorruptFile)
    assert str(error) == "checkpoints/last.ckpt: sha256 differs"
