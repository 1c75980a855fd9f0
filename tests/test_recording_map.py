import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetcast.errors import SettingsError
from fleetcast.sources.recording import Formula, check_distinct, parse_formula


def test_sums_and_factors_are_read_in_order() -> None:
    assert parse_formula("io = read*0.5 + write * 2").terms == (("read", 0.5), ("write", 2.0))


@pytest.mark.parametrize("text", ["", "=a", "A=b", "1x=a", "x-y=a", "a b=c"])
def test_a_name_the_daemon_would_refuse_is_refused_here(text: str) -> None:
    with pytest.raises(SettingsError, match=r"a metric is named \[a-z\]"):
        parse_formula(text)


@pytest.mark.parametrize("text", ["x=", "x=a+", "x=a*", "x=a*two", "x=*2", "x=a*nan", "x=a*inf", "x=a*1*2"])
def test_a_term_that_is_none_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SettingsError, match=r"for example cpu_pct=cpu_r_norm01\*100"):
        parse_formula(text)


def test_one_metric_given_twice_is_refused() -> None:
    with pytest.raises(SettingsError, match="gives cpu twice"):
        check_distinct([parse_formula("cpu=a"), parse_formula("cpu=b")])


columns = st.text("abcdefgh_0123456789.", min_size=1, max_size=12)
factors = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(columns, factors), min_size=1, max_size=4))
def test_a_printed_formula_is_read_back(terms: list[tuple[str, float]]) -> None:
    text = "m=" + "+".join(f"{column}*{factor!r}".replace("e+", "e") for column, factor in terms)
    assert parse_formula(text) == Formula("m", tuple(terms))
