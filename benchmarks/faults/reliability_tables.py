"""The tables of docs/reliability.md, made from the newest results and from nothing else.

    .venv/bin/python -m benchmarks.faults.reliability_tables

`make faults` calls it at its end; after a soak it is run by hand. `tests/test_reliability_tables.py`
holds the document to the results, so a figure cannot be typed in.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.results_file import RESULTS, ROOT
from fleetcast.files import read_json

_EARLIER_SLOPE = "memory_mb_per_hour_last_half"  # the same half hour, in a soak of an hour
DOCUMENT = ROOT / "docs" / "reliability.md"


@dataclass(frozen=True)
class Result:
    """What one scenario found; `why` is empty where it ran to its end."""

    fault: str
    times: int
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    recovered_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    why: str = ""

    @property
    def is_clean(self) -> bool:
        """Whether it ran and nothing was lost, doubled or wrong."""
        return not (self.why or self.lost or self.doubled or self.wrong)

    def as_row(self) -> str:
        """Return its line of the table."""
        if self.why:
            return f"| {self.fault} | {self.times} | **{self.why}** | | | |"
        times = sorted(self.recovered_s)
        recovered = f"{statistics.median(times):.1f} s (worst {times[-1]:.1f} s)" if times else "at once"
        figures = " | ".join(f"{n}" if not n else f"**{n}**" for n in (self.lost, self.doubled, self.wrong))
        return f"| {self.fault} | {self.times} | {figures} | {recovered} |"


def table(results: Sequence[Result]) -> str:
    """Return the table of faults."""
    head = ["| fault | times tried | lost | doubled | wrong | recovered in |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *(result.as_row() for result in results)])


def idle_table(processes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of a soak: one line per process."""
    lines = [
        "| process | memory in MB, second and last quarter | slope of the last half hour | handles | CPU |",
        "|---|---|---|---|---|",
    ]
    for name, found in processes.items():
        slope = found.get("memory_mb_per_hour_last_half_hour", found.get(_EARLIER_SLOPE))
        lines.append(
            f"| {name} | {found['memory_mb_second_quarter']}, {found['memory_mb_last_quarter']} "
            f"| {'not kept' if slope is None else f'{slope:+} MB/h'} "
            f"| {found['handles_second_quarter']}, {found['handles_last_quarter']} "
            f"| {found['cpu_percent_of_a_core']} % |"
        )
    return "\n".join(lines)


def newest(name: str) -> dict[str, Any] | None:
    """Return the newest `results/NAME_DATE.json`, None where there is none yet."""
    paths = sorted(RESULTS.glob(f"{name}_????-??-??.json"))
    payload = read_json(paths[-1]) if paths else None
    return payload if isinstance(payload, dict) else None


def _made(payload: Mapping[str, Any], by: str) -> str:
    load = payload["machine"]["load_1_min"]
    return (
        f"Made by `{by}`, ended {payload['measured_at']} UTC (revision {payload['revision']}), "
        f"{payload['machine']['cores']} cores, load {load} at the end."
    )


def fault_part(payload: Mapping[str, Any]) -> str:
    """Return what stands between the marks `faults`."""
    results = [Result(**row) for row in payload["faults"]]
    return f"{_made(payload, 'make faults')}\n\n{table(results)}"


def idle_part(payload: Mapping[str, Any]) -> str:
    """Return what stands between the marks `idle` or `attached`."""
    before = payload.get("minutes_before")
    when = "" if before is None else f" Watching began {before} minutes after the start."
    made = _made(payload, "benchmarks/loop/live_soak.py")
    note = f"{made} {payload['minutes']:.0f} minutes of `make run`.{when}"
    return f"{note}\n\n{idle_table(payload['processes'])}"


PARTS = (
    ("faults", "faults", fault_part),
    ("idle", "live_soak", idle_part),
    ("attached", "live_attached", idle_part),
)


def with_part(text: str, mark: str, part: str) -> str:
    """Put a part between its marks.

    >>> with_part("a <!-- x: begin -->old<!-- x: end --> b", "x", "new").splitlines()
    ['a <!-- x: begin -->', 'new', '<!-- x: end --> b']
    """
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{part}\n{end}{rest.partition(end)[2]}"


def rendered(text: str) -> str:
    """Return the document with every part that there are results for."""
    for mark, name, make in PARTS:
        payload = newest(name)
        if payload is not None:
            text = with_part(text, mark, make(payload))
    return text


def write_document(document: Path = DOCUMENT) -> None:
    """Make the tables again from the newest results."""
    document.write_text(rendered(document.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> int:
    """Rewrite the document."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    write_document()
    print(f"written {DOCUMENT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
