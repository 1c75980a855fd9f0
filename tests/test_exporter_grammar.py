import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetcast.errors import SettingsError
from fleetcast.prometheus.rules import RuleFault, Term, parse_rule, parse_rules
from fleetcast.schema import NODE_EXPORTER_RULES
from fleetcast.settings import RemoteWriteSettings


def result(text: str, *values: float) -> float:
    """Evaluate an expression whose terms, in the order written, have these values."""
    rule = parse_rule(f"m = {text}")
    return float(rule.evaluate({t: np.array([v]) for t, v in zip(rule.terms, values, strict=True)})[0])


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("sum(a)", 8.0),
        ("100 - sum(a) * 2 + 1", 85.0),
        ("100 - (sum(a) + 2) / 4", 97.5),
        ("-sum(a)", -8.0),
        ("2 - -sum(a)", 10.0),
        ("16 / 4 / sum(a)", 0.5),
        ("1e2 * 1.5e-1 + 0 * sum(a)", 15.0),
        ("clamp(sum(a), 0, 5)", 5.0),
        ("clamp(sum(a) - 10, -1, 5)", -1.0),
        ("sum(a) + sum(a)", 16.0),
    ],
)
def test_arithmetic_has_the_usual_order(text: str, want: float) -> None:
    assert result(text, 8.0) == want


def test_a_division_by_zero_is_no_number_and_no_warning() -> None:
    assert np.isinf(result("sum(a) / sum(b)", 1.0, 0.0))
    assert np.isnan(result("sum(a) / sum(b)", 0.0, 0.0))


def test_each_distinct_term_is_listed_once() -> None:
    rule = parse_rule('m = sum(a{x="1"}) / (sum(a{x="1"}) + sum(a{x="2"}) + sum(rate(a{x="1"})))')
    assert [(t.is_rate, t.matchers[0].text) for t in rule.terms] == [(False, "1"), (False, "2"), (True, "1")]


@pytest.mark.parametrize(
    ("matcher", "matching", "other"),
    [
        ('dev="sda"', {"dev": "sda"}, {"dev": "sdb"}),
        ('dev!="sda"', {"dev": "sdb"}, {"dev": "sda"}),
        ('dev=~"sd.|vd."', {"dev": "vda"}, {"dev": "sda1"}),
        ('dev!~"sd.*"', {"dev": "vda"}, {"dev": "sda1"}),
        ('dev=""', {}, {"dev": "sda"}),
        ('dev!=""', {"dev": "sda"}, {}),
        ('dev!~"lo"', {}, {"dev": "lo"}),
        ("dev='a\\'b'", {"dev": "a'b"}, {"dev": "ab"}),
        (r'dev="a\\b"', {"dev": "a\\b"}, {"dev": "ab"}),
        (r'dev=~"\\d+"', {"dev": "42"}, {"dev": "d"}),
        ('dev="a",mode="idle"', {"dev": "a", "mode": "idle"}, {"dev": "a", "mode": "user"}),
        ('dev="a",', {"dev": "a"}, {"dev": "b"}),
    ],
)
def test_matchers_select_as_in_promql(matcher: str, matching: dict[str, str], other: dict[str, str]) -> None:
    (term,) = parse_rule(f"m = sum(node_x{{{matcher}}})").terms
    assert term.matches({"__name__": "node_x", **matching})
    assert not term.matches({"__name__": "node_x", **other})
    assert not term.matches({"__name__": "node_y", **matching})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a metric name, got 'the end'"),
        ("cpu_pct", "expected '=', got 'the end'"),
        ("Cpu = sum(a)", "metric names match"),
        ("m = 5", "expected at least one series"),
        ("m = node_load1", r"series stand inside one of sum, avg, min, max: sum\(node_load1\)"),
        ("m = sum(a", r"expected '\)', got 'the end'"),
        ("m = sum(a))", r"expected an operator or the end, got '\)'"),
        ("m = sum(rate(a[5m]))", r"takes no \[range\]"),
        ("m = sum()", "expected a series name"),
        ("m = rate(a)", "stand inside one of"),
        ("m = sum(a{b})", "expected = != =~ or !~ after b"),
        ("m = sum(a{b=c})", "expected a quoted text"),
        ('m = sum(a{b=~"("})', "not a regular expression"),
        ('m = sum(a{b="1" c="2"})', "expected ','"),
        ("m = clamp(sum(a), 5, 0)", "low <= high"),
        ("m = clamp(sum(a), 5)", "expected ','"),
        ("m = sum(a) ^ 2", r"cannot read '\^ 2'"),
        ('m = sum(a{b="1})', "cannot read"),
        ("m = sum(a) +", "expected a number, a bracket or an aggregate, got 'the end'"),
        ("m = " + "(" * 60 + "sum(a)" + ")" * 60, "nested more than 50 deep"),
        ("m = " + "-" * 60 + "sum(a)", "nested more than 50 deep"),
    ],
)
def test_a_rule_that_cannot_be_read_says_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(RuleFault, match=message):
        parse_rule(text)


def test_every_bad_rule_is_reported_at_once_with_its_text() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_rules(["a = sum(x)", "b = sum(", "c == 5"])
    assert len(caught.value.problems) == 2
    assert "'b = sum('" in caught.value.problems[0]


def test_of_two_rules_for_one_metric_the_later_one_holds() -> None:
    rules = parse_rules(["a = sum(x)", "b = sum(y)", "a = max(z)"])
    assert [(rule.metric, rule.terms[0].series_name) for rule in rules] == [("a", "z"), ("b", "y")]


def test_the_default_rules_yield_the_metrics_the_documents_name() -> None:
    assert [rule.metric for rule in parse_rules(RemoteWriteSettings().rules)] == [
        "cpu_pct",
        "mem_pct",
        "disk_io_mb_s",
        "net_in_mb_s",
        "net_out_mb_s",
        "load_average",
        "disk_usage_pct",
    ]


@pytest.mark.parametrize(
    ("series", "label", "counted", "not_counted"),
    [
        (
            "node_disk_read_bytes_total",
            "device",
            ["sda", "vda", "nvme0n1", "mmcblk0"],
            ["dm-0", "md127", "loop3", "sr0"],
        ),
        (
            "node_network_receive_bytes_total",
            "device",
            ["eth0", "enp3s0", "bond0", "wlan0"],
            ["lo", "veth12ab", "docker0", "br-5f", "cali9"],
        ),
        ("node_filesystem_size_bytes", "mountpoint", ["/"], ["/boot", "/home"]),
        ("node_cpu_seconds_total", "mode", ["idle"], ["user", "iowait"]),
    ],
)
def test_the_default_rules_count_each_byte_once(
    series: str, label: str, counted: list[str], not_counted: list[str]
) -> None:
    terms = [t for rule in parse_rules(NODE_EXPORTER_RULES) for t in rule.terms if t.series_name == series]

    def takes(term: Term, value: str) -> bool:
        return term.matches({"__name__": series, label: value})

    assert terms
    assert all(takes(term, value) for term in terms for value in counted)
    assert not any(takes(term, value) for term in terms for value in not_counted)


@given(st.text(alphabet="msuavg(){}=~!\"'\\,+-*/ 0.5[rate", max_size=40))
def test_any_text_is_a_rule_or_a_fault(text: str) -> None:
    with contextlib.suppress(RuleFault):
        parse_rule(text)
