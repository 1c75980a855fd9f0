"""What a rule is: how one of our metrics follows from series of an exporter.

Owns: selectors, terms and evaluating a rule on arrays. Does not know: how rules are written
(`exporter_grammar`), nor samples.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

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
