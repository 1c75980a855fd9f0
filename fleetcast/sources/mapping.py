"""How columns of a recording become metrics: `cpu_pct=cpu_r_norm01*100`.

Owns: the grammar of `--map`. Does not know: where columns come from.

    MAP    = METRIC | METRIC "=" TERM { "+" TERM }
    TERM   = COLUMN [ "*" FACTOR ]
    METRIC = a lower-case name as the daemon takes it: [a-z][a-z0-9_]*
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fleetcast.errors import SettingsError
from fleetcast.schema import Floats

METRIC_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Formula:
    """One metric as a weighted sum of columns. Where one of them is absent, so is the metric."""

    metric: str
    terms: tuple[tuple[str, float], ...]  # (column, factor)

    def evaluate(self, column: Callable[[str], Floats]) -> Floats:
        """Return the metric, given each column (NaN = absent)."""
        name, factor = self.terms[0]
        total = column(name) * factor
        for name, factor in self.terms[1:]:
            total = total + column(name) * factor
        return total


def parse_formula(text: str) -> Formula:
    """Return the formula a `--map` argument means.

    >>> parse_formula("disk_io_mb_s=disk_read_mb_s+disk_write_mb_s")
    Formula(metric='disk_io_mb_s', terms=(('disk_read_mb_s', 1.0), ('disk_write_mb_s', 1.0)))
    >>> parse_formula("cpu_pct=cpu_r_norm01*100").terms
    (('cpu_r_norm01', 100.0),)
    >>> parse_formula("mem_pct").terms
    (('mem_pct', 1.0),)

    Raises:
        SettingsError: it is none; says what would be one.
    """
    metric, _, right = text.partition("=")
    metric = metric.strip()
    if not METRIC_NAME.fullmatch(metric):
        raise SettingsError([f"--map {text!r}: a metric is named [a-z][a-z0-9_]*, got {metric!r}"])
    if "=" not in text:
        right = metric
    return Formula(metric, tuple(_parse_term(term, text) for term in right.split("+")))


def _parse_term(term: str, text: str) -> tuple[str, float]:
    column, _, factor_text = term.partition("*")
    column = column.strip()
    try:
        factor = float(factor_text) if "*" in term else 1.0
    except ValueError:
        factor = math.nan
    if not column or not math.isfinite(factor):
        raise SettingsError(
            [f"--map {text!r}: expected COLUMN or COLUMN*FACTOR, got {term.strip()!r}"],
            hint="for example cpu_pct=cpu_r_norm01*100 or io=read+write*0.5",
        )
    return column, factor


def check_distinct(formulas: Sequence[Formula]) -> None:
    """Refuse two formulas for one metric: the later would silently win."""
    names = [formula.metric for formula in formulas]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise SettingsError([f"--map gives {name} twice" for name in doubled])
