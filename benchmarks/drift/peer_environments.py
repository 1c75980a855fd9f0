"""Other drift libraries, each in an environment of its own: their pins do not agree with ours.

    python -m benchmarks.drift.peer_environments [--only NAME]     makes .venv-peers/NAME (about 5 GB in all)

Owns: which libraries, their versions, and running a check in one of them. One that cannot be
installed is n/a, with the reason, wherever it would be shown. Does not know: what is measured.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.results_file import ROOT

FOLDER = ROOT / ".venv-peers"
INSTALL_LIMIT_S, CHECK_LIMIT_S = 600, 300
# import name -> what pip is asked for; pandas 3 breaks Evidently, NannyML lacks a requirement
REQUIREMENTS = {
    "scipy": ("scipy", "pandas"),
    "evidently": ("evidently==0.7.23", "pandas<3"),
    "alibi_detect": ("alibi-detect",),
    "nannyml": ("nannyml==0.13.1", "statsmodels"),
    "river": ("river", "pandas"),
}
JUDGED = ("scipy", "evidently", "nannyml", "river")  # whose rules drift_quality.py writes out in numpy
_REASON = "why-not.txt"


def python_of(name: str) -> str:
    """Return the interpreter of a library's environment."""
    return str(FOLDER / name / "bin" / "python")


def why_missing(name: str) -> str:
    """Return why a library cannot be measured, or ""."""
    reason = FOLDER / name / _REASON
    if reason.exists():
        return reason.read_text(encoding="utf-8")
    return "" if (FOLDER / name / "bin" / "python").exists() else "not installed: make bench-peers"


def install(name: str) -> str:
    """Make a library's environment; return why it failed, or ""."""
    if not (FOLDER / name).exists():
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER / name)], check=True)
    command = [python_of(name), "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_LIMIT_S)
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = "; ".join(errors)[:300] or f"pip exited {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        why = f"pip was not done after {INSTALL_LIMIT_S} s"
    if not why:
        tried = subprocess.run([python_of(name), "-c", f"import {name}"], capture_output=True, text=True)
        why = tried.stderr.strip().splitlines()[-1][:300] if tried.returncode else ""
    reason = FOLDER / name / _REASON
    reason.unlink(missing_ok=True)
    if why:
        reason.write_text(why, encoding="utf-8")
    return why


def measured(name: str) -> dict[str, Any]:
    """Return what a library's check costs, and how often its rule answers like our stand-in for it.

    Runs `drift_speed --peer NAME` and `peer_rules NAME` in its environment; {"why": ...} where that
    is not possible.
    """
    why = why_missing(name)
    if why:
        return {"why": why}
    figures = _answer(name, "benchmarks.drift.drift_speed", "--peer", name)
    return figures | ({"rule": _answer(name, "benchmarks.drift.peer_rules", name)} if name in JUDGED else {})


def _answer(name: str, module: str, *flags: str) -> dict[str, Any]:
    """Run a module in a library's environment and return the JSON of its last line."""
    command = [python_of(name), "-W", "ignore", "-m", module, *flags]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=CHECK_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return {"why": f"not done after {CHECK_LIMIT_S} s"}
    if done.returncode:
        return {"why": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def main(argv: Sequence[str] | None = None) -> int:
    """Make every environment that is asked for; 0 also where one failed: it is n/a then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=tuple(REQUIREMENTS), action="append")
    for name in parser.parse_args(argv).only or REQUIREMENTS:
        print(f"{name}: {install(name) or 'installed'}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
