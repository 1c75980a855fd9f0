"""When an alert begins, fires and ends: rules and facts, without a clock, a file or a network."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fleetcast.alerts.rules import ENDED, FIRING, PENDING, Alert, Facts, Sample, judge, parse_rules
from fleetcast.errors import SettingsError
from fleetcast.schema import ALERT_RULES

AT = datetime(2026, 1, 15, 10, tzinfo=UTC)
ONLY_THERE = {"CannotFlush", "KeyRefused", "OverLimit", "PartFailed", "RetrainingSilent"}
ONLY_HERE = {"ChecksFail"}
OFF = tuple(f"{line.split(':')[0]}: off" for line in ALERT_RULES)


def look(
    rule: str, facts: Facts, standing: tuple[Alert, ...] = (), minutes: float = 0.0
) -> tuple[Alert, ...]:
    return judge(parse_rules((*OFF, rule)), facts, standing, AT + timedelta(minutes=minutes))


def drift(score: float) -> Facts:
    return {"drift_score": (Sample.of(score),)}


def states(alerts: tuple[Alert, ...]) -> list[str]:
    return [alert.state for alert in alerts]


def test_a_rule_fires_once_it_has_held_for_its_time_and_ends_once_it_has_not_for_the_other() -> None:
    rule = "DriftHigh: drift_score > 0.15 for 15m keep 10m warning"
    alerts = look(rule, drift(0.2))
    assert states(alerts) == [PENDING]
    alerts = look(rule, drift(0.2), alerts, 14)
    assert states(alerts) == [PENDING]
    alerts = look(rule, drift(0.3), alerts, 15)
    assert states(alerts) == [FIRING]
    assert alerts[0].sentence == "the combined drift score is 0.3 (> 0.15)"
    alerts = look(rule, drift(0.1), alerts, 20)
    assert states(alerts) == [FIRING], "it held five minutes ago"
    alerts = look(rule, drift(0.2), alerts, 24)
    alerts = look(rule, drift(0.1), alerts, 33)
    assert states(alerts) == [FIRING], "it held nine minutes ago"
    alerts = look(rule, drift(0.1), alerts, 34)
    assert states(alerts) == [ENDED]
    assert alerts[0].ended_at == AT + timedelta(minutes=34)
    assert look(rule, drift(0.1), alerts, 40) == alerts


def test_what_does_not_hold_long_enough_leaves_nothing() -> None:
    rule = "DriftHigh: drift_score > 0.15 for 15m warning"
    alerts = look(rule, drift(0.1), look(rule, drift(0.2)), 5)
    assert alerts == ()
    assert states(look(rule, drift(0.2), alerts, 15)) == [PENDING], "the time counts from the new begin"


def test_a_limit_itself_is_not_beyond_it() -> None:
    assert look("Low: free_disk_gb < 5 critical", {"free_disk_gb": (Sample.of(5.0),)}) == ()
    assert states(look("Many: trainings_7d >= 3 warning", {"trainings_7d": (Sample.of(3),)})) == [FIRING]


def test_a_fact_that_is_not_known_changes_nothing() -> None:
    rule = "NoData: data_age_s > 300 for 5m critical"
    pending = look(rule, {"data_age_s": (Sample.of(400.0),)})
    assert look(rule, {}, pending, 60) == pending
    firing = look(rule, {"data_age_s": (Sample.of(400.0),)}, pending, 61)
    assert states(firing) == [FIRING]
    assert look(rule, {}, firing, 600) == firing
    assert states(look(rule, {"data_age_s": ()}, firing, 601)) == [ENDED], "known, and no record ever came"


def test_each_series_has_an_alert_of_its_own() -> None:
    rule = "LimitLikely: capacity_p > 0.5 warning"
    rows = [Sample.of(p, server=f"web-{n}", metric="mem_pct") for n, p in enumerate((0.9, 0.6, 0.2))]
    alerts = look(rule, {"capacity_p": rows})
    assert [alert.subject for alert in alerts] == ["web-0 mem_pct", "web-1 mem_pct"]
    assert len({alert.fingerprint for alert in alerts}) == 2
    alerts = look(rule, {"capacity_p": rows[1:]}, alerts, 5)
    assert {alert.subject: alert.state for alert in alerts} == {
        "web-0 mem_pct": ENDED,
        "web-1 mem_pct": FIRING,
    }


def test_a_value_that_only_holds_keeps_an_alert_and_begins_none() -> None:
    rule = "LimitLikely: capacity_p > 0.5 warning"
    over = {"capacity_p": (Sample.of(None, "it is over the limit", server="db-1"),)}
    assert look(rule, over) == ()
    firing = look(rule, {"capacity_p": (Sample.of(0.8, server="db-1"),)})
    kept = look(rule, over, firing, 600)
    assert (states(kept), kept[0].sentence) == ([FIRING], "it is over the limit")


def test_what_ended_and_holds_again_is_a_new_alert_with_the_same_fingerprint() -> None:
    rule = "Many: trainings_7d >= 3 warning"
    three, two = {"trainings_7d": (Sample.of(3),)}, {"trainings_7d": (Sample.of(2),)}
    first = look(rule, three)
    ended = look(rule, two, first, 5)
    again = look(rule, three, ended, 10)
    assert again[0].fired_at == AT + timedelta(minutes=10)
    assert again[0].fingerprint == first[0].fingerprint


def test_an_alert_ends_with_its_rule() -> None:
    firing = look("Many: trainings_7d >= 3 warning", {"trainings_7d": (Sample.of(3),)})
    assert states(look("Other: backlog > 2 warning", {}, firing, 5)) == [ENDED]


def test_own_rules_join_the_shipped_ones_replace_them_or_end_them() -> None:
    shipped = {rule.name: rule for rule in parse_rules(())}
    own = {
        rule.name: rule
        for rule in parse_rules(
            ("DriftHigh: drift_score > 0.3 critical", "Slow: backlog > 9 for 1h info", "NoData: off")
        )
    }
    assert own.keys() == {*shipped, "Slow"} - {"NoData"}
    assert (own["DriftHigh"].limit, own["DriftHigh"].for_s, own["DriftHigh"].severity) == (0.3, 0, "critical")
    assert own["Slow"].for_s == 3600
    assert {rule.name: rule for rule in parse_rules(ALERT_RULES)} == shipped


def test_the_specifications_four_are_shipped() -> None:
    shipped = {rule.name: rule for rule in parse_rules(())}
    assert (shipped["DriftHigh"].fact, shipped["DriftHigh"].op, shipped["DriftHigh"].limit) == (
        "drift_score",
        ">",
        0.15,
    )
    assert {"training_failures", "trainings_7d", "free_disk_gb"} <= {rule.fact for rule in shipped.values()}
    assert (shipped["TrainsTooOften"].limit, shipped["TrainsTooOften"].severity) == (3, "warning")


def test_a_shipped_rule_and_prometheus_have_one_name_for_one_thing() -> None:
    page = (Path(__file__).parents[1] / "deploy" / "prometheus" / "fleetcast.rules.yml").read_text()
    theirs = set(re.findall(r"alert: Fleetcast(\w+)", page))
    ours = {rule.name for rule in parse_rules(())}
    assert theirs - ours == ONLY_THERE
    assert ours - theirs == ONLY_HERE


def test_every_wrong_rule_is_named_at_once_with_what_would_be_right() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_rules(("no rule", "A: drift_scor > 1 warning", "B: backlog > 1 loud"))
    first, second, third = caught.value.problems
    assert "must look like NAME: FACT OP NUMBER" in first
    assert "unknown fact drift_scor, nearest is drift_score" in second
    assert "must end with one of info, warning, critical, got loud" in third


def test_a_date_is_told_by_whole_days() -> None:
    rule = parse_rules(["Full: disk_full_days < 7 warning"])[-1]
    for days, says in ((0.0, "less than a day"), (0.9, "less than a day"), (2.5, "2.5 days")):
        (alert,) = judge([rule], {"disk_full_days": [Sample.of(days, server="a")]}, [], AT)
        assert alert.sentence == f"it is full in {says}, at the earliest (< 7 days)"
