"""The quiet period: what is measured, what decides, what is reported."""

import math
from typing import Any

import pytest

from fleetcast.errors import DaemonAway
from fleetcast.retraining.quiet import FleetLoad, FleetMean, HostLoad, fleet_load, quiet_verdict
from fleetcast.schema import QuietVerdict
from fleetcast.settings import DecisionSettings

IDLE = HostLoad(load_1m=0.5, own_cores=0.1, cores=2, available_gb=8.0)


def verdict(fleet: FleetLoad, host: HostLoad = IDLE, **limits: float) -> QuietVerdict:
    settings = DecisionSettings(**limits)  # type: ignore[arg-type]
    cpu = FleetMean.of(fleet.cpu_percent, settings.quiet_cpu_percent)
    mem = FleetMean.of(fleet.mem_percent, settings.quiet_mem_percent)
    is_quiet = cpu < 60.0 and mem < 70.0
    return quiet_verdict(fleet, {"cpu": cpu, "mem": mem}, host, is_fleet_quiet=is_quiet, settings=settings)


@pytest.mark.parametrize(
    ("cpu", "mem", "is_quiet"),
    [(59.9, 69.9, True), (60.0, 10.0, False), (10.0, 70.0, False), (None, 10.0, True), (None, None, True)],
)
def test_a_quiet_fleet_is_below_both_limits_and_what_nobody_sends_does_not_block(
    cpu: float | None, mem: float | None, is_quiet: bool
) -> None:
    found = verdict(FleetLoad(3, cpu, mem))
    assert found.is_quiet is is_quiet
    assert found.measured["fleet_cpu_percent"] == cpu


def test_every_number_and_limit_is_reported() -> None:
    found = verdict(FleetLoad(3, 20.0, 30.0))
    assert found.measured == {
        "live_servers": 3,
        "fleet_cpu_percent": 20.0,
        "fleet_mem_percent": 30.0,
        "host_load_1m": 0.5,
        "host_own_cores": 0.1,
        "host_load_of_others": 0.4,
        "host_available_gb": 8.0,
    }
    assert found.limits == {
        "fleet_cpu_percent": 60.0,
        "fleet_mem_percent": 70.0,
        "host_load_of_others": 1.6,
        "host_available_gb": 4.0,
    }


@pytest.mark.parametrize(
    ("fleet", "host", "reason"),
    [
        (FleetLoad(away="refused"), IDLE, "the inference daemon cannot be asked: refused"),
        (FleetLoad(0), IDLE, "no live server to measure"),
        (FleetLoad(1, 75.0, 30.0), IDLE, "the fleet is busy: mean cpu 75.0 % (limit 60), mean mem 30.0 %"),
        (
            FleetLoad(1, 1.0, 1.0),
            HostLoad(2.0, 0.1, 2, 8.0),
            "the host is busy: load of others 1.90, limit 1.60",
        ),
        (FleetLoad(1, 1.0, 1.0), HostLoad(0.1, 0.0, 2, 3.9), "the host has 3.9 GB available, 4 needed"),
    ],
)
def test_the_reason_names_the_measurement_and_its_limit(
    fleet: FleetLoad, host: HostLoad, reason: str
) -> None:
    found = verdict(fleet, host)
    assert (found.is_quiet, found.reason) == (False, reason)


def test_a_first_training_may_ask_for_the_host_alone() -> None:
    assert verdict(FleetLoad(away="refused")).is_host_quiet
    assert not verdict(FleetLoad(1, 1.0, 1.0), HostLoad(9.0, 0.0, 2, 8.0)).is_host_quiet


def test_our_own_load_is_not_the_load_of_others() -> None:
    assert verdict(FleetLoad(1, 1.0, 1.0), HostLoad(2.5, 2.0, 2, 8.0)).is_quiet
    assert HostLoad(1.0, 3.0, 2, 8.0).load_of_others == 0.0


def test_a_setting_goes_before_the_literal_and_is_what_is_reported() -> None:
    found = verdict(FleetLoad(1, 75.0, 30.0), quiet_cpu_percent=80.0)
    assert found.is_quiet
    assert found.limits["fleet_cpu_percent"] == 80.0
    assert not verdict(FleetLoad(1, 50.0, 30.0), quiet_cpu_percent=40.0).is_quiet


def server(stale: bool = False, **current: Any) -> dict[str, Any]:
    return {"current": current, "stale": stale}


def test_the_means_are_over_live_servers_that_send_the_metric() -> None:
    document = {
        "predictions": {
            "a": server(cpu_pct=10.0, mem_pct=40.0),
            "b": server(cpu_pct=30.0),
            "gone": server(stale=True, cpu_pct=99.0, mem_pct=99.0),
            "odd": server(cpu_pct=None, mem_pct="high"),
        }
    }
    assert fleet_load(document) == FleetLoad(3, 20.0, 40.0)


def test_an_empty_fleet_has_no_means() -> None:
    assert fleet_load({"predictions": {}}) == FleetLoad(0, None, None)


@pytest.mark.parametrize("document", [{}, {"predictions": None}, {"predictions": [1]}])
def test_an_answer_of_another_shape_is_no_answer(document: dict[str, Any]) -> None:
    with pytest.raises(DaemonAway, match="another shape"):
        fleet_load(document)


def test_a_mean_that_is_not_measured_is_below_every_limit_and_notes_it() -> None:
    mean = FleetMean.of(None, None)
    assert math.isnan(mean)
    assert mean < 1.0
    assert mean.limit == 1.0
