"""Rules: how one of our metrics follows from the series of an exporter.

    cpu_pct = clamp(100 * (1 - avg(rate(node_cpu_seconds_total{mode="idle"}))), 0, 100)

Owns: the grammar (a small part of PromQL, one line a metric), its messages, and evaluating a rule
on arrays. A rule is evaluated per server: `sum`, `avg`, `min` and `max` run over the series of one
server that the selector matches, `rate` is the increase per second between a counter's two newest
samples. Does not know: samples.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fleetcast.errors import SettingsError
from fleetcast.ingest.rules import is_metric_name
from fleetcast.schema import Floats

AGGREGATES = ("sum", "avg", "min", "max")


@dataclass(frozen=True)
class Matcher:
    """One condition on a label; an absent label is the empty text, as in PromQL."""

    label: str
    operator: str  # = != =~ !~
    text: str
    pattern: re.Pattern[str] | None = field(default=None, compare=False)

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether the labels satisfy the condition; patterns match the whole value."""
        value = labels.get(self.label, "")
        is_equal = self.pattern.fullmatch(value) is not None if self.pattern else value == self.text
        return is_equal != self.operator.startswith("!")


@dataclass(frozen=True)
class Term:
    """One aggregate over the matching series of a server."""

    aggregate: str
    is_rate: bool
    series_name: str
    matchers: tuple[Matcher, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether a series of these labels takes part."""
        if labels.get("__name__") != self.series_name:
            return False
        return all(matcher.matches(labels) for matcher in self.matchers)


@dataclass(frozen=True)
class Number:
    """A constant."""

    value: float

    def evaluate(self, values: Mapping[Term, Floats]) -> Floats:
        """Return the constant as an array that fits any other."""
        return np.array(self.value)


@dataclass(frozen=True)
class Aggregate:
    """The value of a term."""

    term: Term

    def evaluate(self, values: Mapping[Term, Floats]) -> Floats:
        """Look the term up."""
        return values[self.term]


@dataclass(frozen=True)
class Arithmetic:
    """Two expressions and one of + - * /."""

    operator: str
    left: "Expression"
    right: "Expression"

    def evaluate(self, values: Mapping[Term, Floats]) -> Floats:
        """Return the result; a division by zero is not finite, which means absent."""
        left, right = self.left.evaluate(values), self.right.evaluate(values)
        match self.operator:
            case "+":
                return left + right
            case "-":
                return left - right
            case "*":
                return left * right
        return left / right


@dataclass(frozen=True)
class Clamp:
    """An expression held between two bounds."""

    inner: "Expression"
    low: float
    high: float

    def evaluate(self, values: Mapping[Term, Floats]) -> Floats:
        """Return the inner values, bounded."""
        return np.clip(self.inner.evaluate(values), self.low, self.high)


Expression = Number | Aggregate | Arithmetic | Clamp


@dataclass(frozen=True)
class MetricRule:
    """One of our metrics and what it is computed from."""

    metric: str
    expression: Expression
    terms: tuple[Term, ...]  # distinct

    def evaluate(self, values: Mapping[Term, Floats]) -> Floats:
        """Return the metric; what is not finite is absent."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return self.expression.evaluate(values)


_NESTING_MAX = 50
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+\.?\d*(?:[eE][+-]?\d+)?)"
    r"|(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)"
    r'|(?P<text>"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\')'
    r"|(?P<sign>=~|!~|!=|[-+*/(){},=\[\]]))"
)


class RuleFault(ValueError):
    """Raised when a rule cannot be read; says where and what would be right."""


def parse_rules(texts: Sequence[str], source: str = "remote_write.rules") -> tuple[MetricRule, ...]:
    """Return the rules; of two rules for one metric the later one holds.

    Raises:
        SettingsError: names every rule that cannot be read.
    """
    rules: dict[str, MetricRule] = {}
    problems = []
    for text in texts:
        try:
            rule = parse_rule(text)
            rules[rule.metric] = rule
        except RuleFault as fault:
            problems.append(f"{source}: {fault} in {text!r}")
    if problems:
        raise SettingsError(problems, hint="docs/ingest.md has the grammar")
    return tuple(rules.values())


def parse_rule(text: str) -> MetricRule:
    """Return the rule that a line `metric = expression` states.

    >>> parse_rule("load_average = max(node_load1)").terms[0].series_name
    'node_load1'

    Raises:
        RuleFault: the line is not of the grammar.
    """
    return _Parser(text).rule()


class _Parser:
    """Recursive descent over the tokens of one line."""

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._place = 0
        self._depth = 0
        self._terms: dict[Term, None] = {}

    def rule(self) -> MetricRule:
        """Read the whole line."""
        metric = self._take("name", "a metric name")
        if not is_metric_name(metric):
            raise RuleFault(f"metric names match [a-z][a-z0-9_]*, got {metric!r}")
        self._expect("=")
        expression = self._sum()
        if self._peek()[0] != "end":
            raise RuleFault(f"expected an operator or the end, got {self._peek()[1]!r}")
        if not self._terms:
            raise RuleFault("expected at least one series, such as sum(node_load1)")
        return MetricRule(metric, expression, tuple(self._terms))

    def _sum(self) -> Expression:
        expression = self._product()
        while self._peek()[1] in ("+", "-") and self._peek()[0] == "sign":
            operator = self._next()[1]
            expression = Arithmetic(operator, expression, self._product())
        return expression

    def _product(self) -> Expression:
        expression = self._atom()
        while self._peek()[1] in ("*", "/") and self._peek()[0] == "sign":
            operator = self._next()[1]
            expression = Arithmetic(operator, expression, self._atom())
        return expression

    def _atom(self) -> Expression:
        self._depth += 1
        if self._depth > _NESTING_MAX:
            raise RuleFault(f"nested more than {_NESTING_MAX} deep")
        try:
            return self._parse_atom()
        finally:
            self._depth -= 1

    def _parse_atom(self) -> Expression:
        kind, text = self._next()
        if kind == "number":
            return Number(float(text))
        if text == "-" and kind == "sign":
            return Arithmetic("-", Number(0.0), self._atom())
        if text == "(":
            inner = self._sum()
            self._expect(")")
            return inner
        if text == "clamp":
            return self._clamp()
        if text in AGGREGATES:
            return self._aggregate(text)
        if kind == "name":
            raise RuleFault(f"series stand inside one of {', '.join(AGGREGATES)}: sum({text})")
        raise RuleFault(f"expected a number, a bracket or an aggregate, got {text or 'the end'!r}")

    def _clamp(self) -> Expression:
        self._expect("(")
        inner = self._sum()
        self._expect(",")
        low = self._signed_number()
        self._expect(",")
        high = self._signed_number()
        self._expect(")")
        if low > high:
            raise RuleFault(f"clamp needs low <= high, got {low:g}, {high:g}")
        return Clamp(inner, low, high)

    def _signed_number(self) -> float:
        sign = 1.0
        if self._peek()[1] == "-":
            self._next()
            sign = -1.0
        return sign * float(self._take("number", "a number"))

    def _aggregate(self, aggregate: str) -> Expression:
        self._expect("(")
        series_name = self._take("name", "a series name")
        is_rate = series_name == "rate" and self._peek()[1] == "("
        if is_rate:
            self._next()
            series_name = self._take("name", "a series name")
        matchers = self._matchers()
        if self._peek()[1] == "[":
            raise RuleFault("rate() takes no [range]: it spans the two newest samples")
        if is_rate:
            self._expect(")")
        self._expect(")")
        term = Term(aggregate, is_rate, series_name, matchers)
        self._terms[term] = None
        return Aggregate(term)

    def _matchers(self) -> tuple[Matcher, ...]:
        if self._peek()[1] != "{":
            return ()
        self._next()
        matchers = []
        while self._peek()[1] != "}":
            matchers.append(self._matcher())
            if self._peek()[1] != "}":
                self._expect(",")
        self._next()
        return tuple(matchers)

    def _matcher(self) -> Matcher:
        label = self._take("name", "a label name")
        operator = self._next()[1]
        if operator not in ("=", "!=", "=~", "!~"):
            raise RuleFault(f"expected = != =~ or !~ after {label}, got {operator!r}")
        text = re.sub(r'\\([\\"\'])', r"\1", self._take("text", "a quoted text")[1:-1])
        if "~" not in operator:
            return Matcher(label, operator, text)
        try:
            return Matcher(label, operator, text, re.compile(text))
        except re.error as error:
            raise RuleFault(f"{text!r} is not a regular expression: {error}") from error

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._place] if self._place < len(self._tokens) else ("end", "")

    def _next(self) -> tuple[str, str]:
        token = self._peek()
        self._place += 1
        return token

    def _take(self, kind: str, what: str) -> str:
        found, text = self._next()
        if found != kind:
            raise RuleFault(f"expected {what}, got {text or 'the end'!r}")
        return text

    def _expect(self, sign: str) -> None:
        found, text = self._next()
        if found != "sign" or text != sign:
            raise RuleFault(f"expected {sign!r}, got {text or 'the end'!r}")


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens = []
    place = 0
    end = len(text.rstrip())
    while place < end:
        found = _TOKEN.match(text, place)
        if found is None:
            raise RuleFault(f"cannot read {text[place:].strip()[:20]!r}")
        kind = str(found.lastgroup)
        tokens.append((kind, found.group(kind)))
        place = found.end()
    return tokens
