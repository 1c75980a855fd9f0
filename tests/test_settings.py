import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd_files import KINDS, put

from fleetcast.errors import SettingsError
from fleetcast.setting import SettingInfo
from fleetcast.settings import Settings, every_setting, load_settings

EVERY = list(every_setting())


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def value_of(settings: Settings, info: SettingInfo) -> Any:
    return getattr(getattr(settings, info.part), info.name)


def problems(**kwargs: Any) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ={}, **kwargs)
    return caught.value.problems


def config(text: str) -> Path:
    path = Path("fleet.toml")
    path.write_text(text)
    return path


def test_nothing_given_means_the_defaults() -> None:
    assert load_settings(environ={}) == Settings()


def test_file_beats_default_environment_beats_file_and_flag_beats_all() -> None:
    path = config("[server]\nport = 1111\nhost = 'a'\nmax_body_bytes = 5000\n")
    settings = load_settings(
        path,
        flags={"server.port": 3333, "server.host": None},
        environ={"FLEETCAST_SERVER_PORT": "2222", "FLEETCAST_SERVER_HOST": "b", "PATH": "/bin"},
    )
    assert (settings.server.port, settings.server.host) == (3333, "b")
    assert settings.server.max_body_bytes == 5000


def test_a_file_in_the_working_folder_is_read_without_being_named() -> None:
    Path("fleetcast.toml").write_text("[bins]\nbin_s = 60\n")
    assert load_settings(environ={}).bins.bin_s == 60


def test_every_problem_is_reported_at_once_with_what_would_be_right() -> None:
    path = config("[server]\nport = 0\nprot = 1\n[retraining]\nmode = 'often'\n[bins]\nbin_s = 7\n")
    found = problems(config=path, flags={"retraining.interval_s": -5.0})
    assert found == (
        "unknown setting server.prot, nearest is server.port (fleet.toml)",
        "server.port must be >= 1, got 0 (fleet.toml)",
        "retraining.mode must be one of auto, advise, got 'often' (fleet.toml)",
        "retraining.interval_s must be >= 0.1, got -5.0 (flag)",
        "bins.bin_s must divide a day (86400 s), got 7",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nport = '8000'\n", "server.port must be int, got '8000'"),
        ("[server]\nport = true\n", "server.port must be int, got True"),
        ("[server]\nport = 8000.0\n", "server.port must be int, got 8000.0"),
        ("[server]\nhold_s = nan\n", "server.hold_s must be finite, got nan"),
        ("[server]\nhold_s = 61\n", "server.hold_s must be <= 60, got 61.0"),
        ("[bins]\nforecast_metrics = []\n", "bins.forecast_metrics must be a non-empty list, got []"),
        ("[bins]\nforecast_metrics = [1]\n", "forecast_metrics (element 1 of 1) must be str, got 1"),
        ("[bins]\nforecast_metrics = ['a', 3]\n", "forecast_metrics (element 2 of 2) must be str, got 3"),
        ("[server]\nzzz = 3\n", "unknown setting server.zzz (fleet.toml)"),
        ("[forecast]\nsettle_horizons = [1, 97]\n", "forecast.settle_horizons must be in 1..96"),
        ("[promotion]\nmax_hours = 23\n", "promotion.min_hours must be at most max_hours (23), got 24"),
        ("[promotion]\ncooldown_hours = 1e9\n", "promotion.cooldown_hours must be <= 8760"),
        ("[forecast]\nsettle_horizons = [0]\n", "forecast.settle_horizons must be in 1..96"),
        ("port = 8000\n", "port must be a table like [server]"),
        ("[serverr]\nport = 1\n", "unknown setting serverr.port, nearest is server.port"),
        ("[server\n", "fleet.toml cannot be read"),
    ],
)
def test_a_wrong_file_says_what_would_be_right(text: str, message: str) -> None:
    assert message in problems(config=config(text))[0]


def test_a_named_file_that_is_missing_is_an_error() -> None:
    assert problems(config=Path("no.toml")) == ("no.toml does not exist",)


def test_an_unknown_variable_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(SettingsError, match="nearest is FLEETCAST_SERVER_PORT"):
        load_settings(environ={"FLEETCAST_SERVER_PROT": "1"})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("FLEETCAST_BINS_FORECAST_METRICS", "cpu_pct, net_mb_s", ("cpu_pct", "net_mb_s")),
        ("FLEETCAST_FORECAST_SETTLE_HORIZONS", "1,12", (1, 12)),
        ("FLEETCAST_DRIFT_PER_THRESHOLD", "0.3", 0.3),
        ("FLEETCAST_DECISION_MAX_TRAININGS_PER_WEEK", "5", 5),
    ],
)
def test_environment_text_becomes_the_settings_type(name: str, text: str, expected: object) -> None:
    settings = load_settings(environ={name: text})
    info = next(info for info in EVERY if info.environment == name)
    assert value_of(settings, info) == expected


def test_environment_text_of_another_type_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"server.port must be int, got 'http'"):
        load_settings(environ={"FLEETCAST_SERVER_PORT": "http"})


def test_a_whole_number_is_a_fine_float() -> None:
    path = config("[retraining]\ninterval_s = 60\n")
    assert load_settings(path, environ={}).retraining.interval_s == 60.0


@pytest.mark.parametrize("info", EVERY, ids=lambda info: info.key)
def test_every_setting_has_a_help_text_and_a_default_within_its_bounds(info: SettingInfo) -> None:
    assert info.meta["help"]
    if info.default is not None:
        loaded = load_settings(flags={info.key: info.default}, environ={})
        assert value_of(loaded, info) == info.default


def test_settings_cannot_be_changed_after_loading() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().server.port = 1  # type: ignore[misc]


def toml_text(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_text(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


NUMBERS = [info for info in EVERY if info.default.__class__ in (int, float) and info.key != "bins.bin_s"]


@given(st.sampled_from(NUMBERS), st.data())
def test_a_value_within_bounds_survives_file_and_environment(info: SettingInfo, data: st.DataObject) -> None:
    low, high = info.meta["low"], info.meta["high"]
    kind = type(info.default)
    source = (
        st.integers(int(low or 0), int(high or max(10**6, 2 * info.default)))
        if kind is int
        else st.floats(float(low or 0), float(high or 1e6), allow_nan=False)
    )
    value = data.draw(source)
    others: dict[str, object] = {"forecast.settle_horizons": (1,)}  # the default 96 needs a horizon of 96
    if info.key == "promotion.max_hours":
        others["promotion.min_hours"] = 1
    path = config(f"[{info.part}]\n{info.name} = {toml_text(value)}\n")
    assert value_of(load_settings(path, flags=others, environ={}), info) == value
    from_environment = load_settings(flags=others, environ={info.environment: repr(value)})
    assert value_of(from_environment, info) == value


@pytest.mark.parametrize("kind", KINDS)
def test_a_settings_file_that_is_none_is_a_problem_and_no_hang(tmp_path: Path, kind: str) -> None:
    put(kind, tmp_path / "fleetcast.toml")
    with pytest.raises(SettingsError, match=r"fleetcast\.toml cannot be read"):
        load_settings(tmp_path / "fleetcast.toml", environ={})


def test_a_secret_is_in_no_message_about_it() -> None:
    found = problems(config=config("[alerts]\nslack_url = ['topsecret']\nwebhook_url = 7\n"))
    assert found == (
        "alerts.slack_url must be str, got a secret of type list (fleet.toml)",
        "alerts.webhook_url must be str, got a secret of type int (fleet.toml)",
    )


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ('[paths]\ndata_buffer_dir = "a\\u0000b"', "paths.data_buffer_dir must hold no NUL, got 'a\\x00b'"),
        ('[server]\nallowed_hosts = ["a\\u0000"]', "must hold no NUL"),
        (
            '[remote_write]\npath = "write"',
            "remote_write.path must be a path such as /api/v1/write, got 'write'",
        ),
        ('[remote_write]\npath = "/{x}"', "remote_write.path must be a path"),
        ('[remote_write]\npath = "/a b"', "remote_write.path must be a path"),
        ('[bins]\nforecast_metrics = ["CPU %"]', "must be names of the form [a-z][a-z0-9_]*, got 'CPU %'"),
        ('[bins]\nforecast_metrics = ["cpu_pct", "cpu_pct"]', "must name each metric once"),
    ],
)
def test_values_that_no_program_could_use_are_refused(tmp_path: Path, given: str, wrong: str) -> None:
    config = tmp_path / "fleetcast.toml"
    config.write_text(given)
    with pytest.raises(SettingsError) as refused:
        load_settings(config, environ={})
    assert wrong in str(refused.value)
