"""The mapping grammar: how one of our metrics is computed from an exporter's series.

    cpu_pct = clamp(100 * (1 - avg(rate(node_cpu_seconds_total{mode="idle"}))), 0, 100)

Owns: the grammar (a small part of PromQL, one line a metric), its messages, and evaluating a rule
on arrays, from sums of contributions. A rule is evaluated per scrape target: `sum`, `avg`, `min` and
`max` run over the series of one target that the selector matches, `rate` is the increase per second
between a counter's two newest samples. Does not know: samples.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fleetcast.errors import SettingsError, quote
from fleetcast.ingest.rules import is_metric_name
from fleetcast.schema import Codes, Flags, Floats, Longs

AGGREGATES = ("sum", "avg", "min", "max")
_START = {"sum": 0.0, "avg": 0.0, "min": np.inf, "max": -np.inf}


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


class TermSums:
    """Totals per row and term: how contributions add up, and what the rules make of them."""

    def __init__(self, rules: Sequence[MetricRule], terms: Sequence[Term]) -> None:
        self._rules = tuple(rules)
        self._terms = tuple(terms)
        self._own_terms = [[self._terms.index(term) for term in rule.terms] for rule in self._rules]
        self.starts: Floats = np.array([_START[term.aggregate] for term in self._terms])

    def sum_up(self, rows: Longs, terms: Codes, values: Floats, n_rows: int) -> tuple[Codes, Floats]:
        """Return (row, term) counts and totals of contributions."""
        n_terms = len(self._terms)
        cells = rows * n_terms + terms
        n_cells = n_rows * n_terms
        counts = np.bincount(cells, minlength=n_cells).astype(np.int32).reshape(n_rows, n_terms)
        totals = np.bincount(cells, values, minlength=n_cells).astype(np.float64).reshape(n_rows, n_terms)
        for place, term in enumerate(self._terms):
            if term.aggregate in ("min", "max"):
                chosen = terms == place
                totals[:, place] = self.starts[place]
                extreme = np.minimum if term.aggregate == "min" else np.maximum
                extreme.at(totals[:, place], rows[chosen], values[chosen])
        return counts, totals

    def merge(self, kept: Floats, more: Floats) -> Floats:
        """Return the totals (row, term) of both."""
        with np.errstate(invalid="ignore", over="ignore"):
            merged = kept + more
        for place, term in enumerate(self._terms):
            if term.aggregate == "min":
                merged[:, place] = np.minimum(kept[:, place], more[:, place])
            elif term.aggregate == "max":
                merged[:, place] = np.maximum(kept[:, place], more[:, place])
        return merged

    def evaluate(
        self,
        counts: Codes,
        totals: Floats,
        is_whole: Flags,
        touched: Flags,
        is_told: Flags,
    ) -> Floats:
        """Return (row, rule) values that are whole, and new or told otherwise; NaN for the others."""
        columns = {}
        for place, term in enumerate(self._terms):
            total = totals[:, place]
            columns[term] = total / np.maximum(counts[:, place], 1) if term.aggregate == "avg" else total
        values = np.full(is_told.shape, np.nan)
        is_due: Flags
        for number, (rule, own) in enumerate(zip(self._rules, self._own_terms, strict=True)):
            is_due = touched[:, own[0]] | ~is_told[:, number]
            for place in own[1:]:
                is_due |= touched[:, place]
            for place in own:
                is_due &= is_whole[:, place]
            if not is_due.any():
                continue
            result = rule.evaluate(columns)
            is_due &= np.isfinite(result)
            values[is_due, number] = result[is_due]
        return values


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
            problems.append(f"{source}: {fault} in {quote(text)}")
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
            raise RuleFault(f"metric names match [a-z][a-z0-9_]*, got {quote(metric)}")
        self._expect("=")
        expression = self._sum()
        if self._peek()[0] != "end":
            raise RuleFault(f"expected an operator or the end, got {quote(self._peek()[1])}")
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
            raise RuleFault(f"{quote(text)} is not a regular expression: {error}") from error

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
