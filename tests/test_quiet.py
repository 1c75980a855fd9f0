"""The quiet period: what is measured, what decides, what is reported."""

import pytest

from fleetcast.retraining.inquiry import FleetLoad
from fleetcast.retraining.quiet import HostLoad, quiet_verdict
from fleetcast.schema import QuietVerdict
from fleetcast.settings import DecisionSettings

LIMITS = {"quiet_cpu_percent": 60.0, "quiet_mem_percent": 70.0}
IDLE = HostLoad(load_1m=0.5, own_cores=0.1, cores=2, available_gb=8.0)


def verdict(fleet: FleetLoad, host: HostLoad = IDLE, **limits: float) -> QuietVerdict:
    settings = DecisionSettings(**limits)  # type: ignore[arg-type]
    cpu, mem = LIMITS.values()
    is_quiet = fleet.avg_cpu < cpu and fleet.avg_mem < mem
    return quiet_verdict(fleet, host, LIMITS, settings, is_fleet_quiet=is_quiet)


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
        (
            FleetLoad(1, 75.0, 30.0),
            IDLE,
            "the fleet is busy: mean cpu 75.0 % (limit 60), mean mem 30.0 % (limit 70)",
        ),
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
