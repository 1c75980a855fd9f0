"""The buffer by hand: `DataBuffer` to import, and its statistics to print.

    python data_buffer.py [--data-buffer-dir DIR] [--config FILE]     print the statistics

Owns: the printed form. Does not know: how the buffer works (`fleetcast/storage/store.py`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetcast.errors import ExitCode, StorageBroken
from fleetcast.program import buffer_folder, run_program
from fleetcast.settings import load_settings

if TYPE_CHECKING:
    from fleetcast.storage.store import AppendReport, DataBuffer

__all__ = ["AppendReport", "DataBuffer"]


def __getattr__(name: str) -> Any:
    """Import the buffer when it is asked for: --help does not wait for pyarrow."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    from fleetcast.storage import store

    return getattr(store, name)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Print the statistics of the buffer."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Print what the data buffer holds.",
        epilog="exit codes: 0 printed, 1 failed, 2 bad settings, 6 no such folder",
    )
    parser.add_argument("--data-buffer-dir", help="folder of the buffer (default: ./data_buffer)")
    parser.add_argument("--config", type=Path, help="settings file (default: ./fleetcast.toml, if present)")
    options = parser.parse_args(argv)
    return run_program("data_buffer", lambda: _print_stats(options.config, options.data_buffer_dir))


def _print_stats(config: Path | None, folder: str | None) -> int:
    from fleetcast.storage.store import DataBuffer

    settings = load_settings(config, {"paths.data_buffer_dir": folder})
    try:
        stats = DataBuffer(buffer_folder(settings), settings=settings.buffer).get_stats()
    except OSError as error:  # a folder that may not be read
        raise StorageBroken(str(error)) from error
    print(f"buffer       {settings.paths.data_buffer_dir}")
    for title, counts in (("records", stats), ("predictions", stats["predictions"])):
        span = counts["date_range"]
        days = f"{span['start']} to {span['end']}" if span["start"] else "no day yet"
        print(
            f"{title:<12} {counts['total_records']:,} rows in {counts['file_count']} day files,"
            f" {days}, {counts['disk_usage_mb']} MB"
        )
    return ExitCode.OK


if __name__ == "__main__":
    raise SystemExit(main())
