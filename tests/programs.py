"""The programs as processes, for tests (kept beside the benchmarks that drive them, too)."""

from benchmarks.programs import InferenceDaemon, Program, free_port, wait_for

__all__ = ["InferenceDaemon", "Program", "free_port", "wait_for"]
