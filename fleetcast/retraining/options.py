"""The command line and the constructor's arguments of the retraining daemon, as settings.

Owns: their names and what they override. Does not know: what the daemon does with them.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from fleetcast.errors import BadData
from fleetcast.settings import Settings, load_settings


def parser() -> argparse.ArgumentParser:
    """Return the parser of `adaptive_retraining_daemon.py`."""
    own = argparse.ArgumentParser(description="Watch drift and retrain the model when it is due.")
    own.add_argument("--daemon-url", help="inference daemon (default: http://localhost:8000)")
    own.add_argument("--interval", type=float, help="seconds between checks (default: 300)")
    own.add_argument("--data-buffer-dir", help="folder of the buffer (default: ./data_buffer)")
    own.add_argument("--checkpoint-dir", help="folder of the models (default: ./checkpoints)")
    own.add_argument("--mode", choices=("auto", "advise"), help="advise: decide, but never train")
    own.add_argument("--clock", choices=("system", "data"), help="what now means (default: system)")
    own.add_argument("--config", type=Path, help="settings file (default: ./fleetcast.toml, if present)")
    action = own.add_mutually_exclusive_group()
    action.add_argument(
        "--once", action="store_true", help="check once, print, wait for a training it starts"
    )
    action.add_argument("--export", type=Path, metavar="FILE", help="write the training export and end")
    return own


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings with the flags in them.

    Raises:
        SettingsError: names every problem.
    """
    flags = {
        "retraining.daemon_url": options.daemon_url,
        "retraining.interval_s": options.interval,
        "retraining.mode": options.mode,
        "paths.data_buffer_dir": options.data_buffer_dir,
        "paths.checkpoint_dir": options.checkpoint_dir,
        "clock.mode": options.clock,
    }
    return load_settings(options.config, flags)


def with_arguments(
    settings: Settings,
    daemon_url: str | None,
    check_interval: float | None,
    data_buffer_dir: str | None,
    training_script: str | None,
) -> Settings:
    """Return the settings with the constructor's arguments in them; None leaves a setting as it is.

    Raises:
        BadData: an argument makes no sense.
    """
    if check_interval is not None and not check_interval > 0:
        raise BadData(f"check_interval must be > 0 seconds, got {check_interval!r}")
    own = settings.retraining
    return replace(
        settings,
        paths=replace(settings.paths, data_buffer_dir=data_buffer_dir or settings.paths.data_buffer_dir),
        retraining=replace(
            own,
            daemon_url=daemon_url or own.daemon_url,
            interval_s=check_interval or own.interval_s,
            training_script=training_script or own.training_script,
        ),
    )
