"""The inference daemon: takes records in, forecasts every closed bin, answers on port 8000.

    python tft_inference_daemon.py [--host H] [--port N] [--data-buffer-dir D]
        [--checkpoint-dir D] [--clock system|data] [--config FILE]

Owns: flags, signals, exit codes, and where the buffer and the model's code come from. HTTP runs
in a thread of its own; the main thread closes bins and forecasts (`fleetcast/inference.py`).
Does not know: drift, decisions, training: those belong to the retraining daemon.
"""

import argparse
import gc
import ipaddress
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fleetcast.errors import (
    CannotStart,
    ExitCode,
    OwnershipLost,
    SettingsError,
    StorageBroken,
    StorageFull,
)
from fleetcast.loop import Stop, SystemdNotifier, configure_logging, run_every
from fleetcast.program import require_ray, run_program, with_models_dir
from fleetcast.setting import weak_key
from fleetcast.settings import Settings, load_settings

if TYPE_CHECKING:
    from fleetcast.inference import InferenceService
    from fleetcast.serving.model_loader import Predictor

logger = logging.getLogger("tft_inference_daemon")  # not "__main__": people read this

LOG_FILE = Path("inference_daemon.log")
KEY_VARIABLE = "TFT_API_KEY"
TICK_S = 0.25
RESTORE_TIMEOUT_S = (
    600.0  # start-up time we ask of systemd: 3M stored rows a second, 8 days of 2,000 servers are 276M
)
LOADER_JOIN_S = 2.0


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run until a stop is requested; return the exit code."""
    options = _parser(prog).parse_args(argv)

    def work() -> int:
        settings = _settings(options)
        configure_logging(LOG_FILE, settings.logging)
        return InferenceDaemon(settings, os.environ.get(KEY_VARIABLE, "")).run()

    return run_program("tft_inference_daemon", work)


class InferenceDaemon:
    """One process: it takes the buffer and the port, works in cycles, and gives both back in good order."""

    def __init__(self, settings: Settings, api_key: str) -> None:
        self._settings = settings
        self._api_key = api_key
        self._stop = Stop()
        self._notifier = SystemdNotifier()

    def run(self) -> int:
        """Start, work until the stop, end; return the exit code.

        Raises:
            AlreadyRunning, CannotStart, SettingsError, StorageFull, StorageBroken: it did not start.
            OwnershipLost: the buffer's folder was taken away; it has stopped.
        """
        self._stop.install()
        service = self._build_service()
        service.start()
        gc.freeze()  # what is there now stays: a collection between two posts must not look through all of it
        self._notifier.ready(service.status_line())

        def cycle() -> None:
            service.cycle()
            self._notifier.alive(service.status_line())

        try:
            is_stop_requested = run_every(cycle, TICK_S, self._stop)
        except OwnershipLost as error:
            service.close()
            if not service.wait_for_loader(LOADER_JOIN_S):
                logger.error("%s", error)
                _exit_past_loader(ExitCode.FAILED)
            raise
        self._notifier.stopping()
        logger.info("stopping reason=%s", self._stop.reason or "too many failures in a row")
        service.close()
        logger.info("stopped")
        code = ExitCode.OK if is_stop_requested else ExitCode.FAILED
        if not service.wait_for_loader(LOADER_JOIN_S):
            _exit_past_loader(code)
        return int(code)

    def _build_service(self) -> "InferenceService":
        """Lock the buffer, bind the port, wire the parts; on a failure nothing stays taken."""
        # --help does without pyarrow and the HTTP library
        from fleetcast.api.listener import HttpListener
        from fleetcast.inference import InferenceService
        from fleetcast.storage.store import DataBuffer
        from fleetcast.storage.upkeep import UpkeepPace

        settings = self._settings
        expire, pace = settings.clock.mode != "data", UpkeepPace(bin_ms=settings.bins.bin_s * 1000)
        buffer = DataBuffer(
            settings.paths.data_buffer_dir, settings=settings.buffer, expire=expire, pace=pace
        )
        self._notifier.extend_timeout(RESTORE_TIMEOUT_S)
        with ExitStack() as undo:
            try:
                buffer.open()  # first of all: two daemons must not even begin
                undo.callback(buffer.close)
                listener = HttpListener(settings.server.host, settings.server.port)
                undo.callback(listener.stop, 0.0)
                load_model = partial(_load_model, settings)
                service = InferenceService(settings, buffer, listener, load_model, self._api_key, self._stop)
            except (StorageFull, StorageBroken) as error:
                raise CannotStart(f"cannot start: {error}") from error
            undo.pop_all()  # from here on `service.close` does it, in its order
        return service


def _exit_past_loader(code: ExitCode) -> None:
    """End without the interpreter's clean-up, which may abort a thread in the middle of an import."""
    logging.shutdown()
    os._exit(code)


def _load_model(settings: Settings, path: Path) -> "Predictor":
    # numpy and its libraries wait until the first post can be taken
    from fleetcast.forecast.predictor import Forecaster, set_threads

    set_threads(settings.forecast.torch_threads)
    return Forecaster.load(
        path,
        bin_ms=settings.bins.bin_s * 1000,
        horizon_bins=settings.forecast.horizon_bins,
        min_history_s=settings.forecast.model_min_history_s,
    )


def _settings(options: argparse.Namespace) -> Settings:
    settings = load_settings(
        options.config,
        {
            "server.host": options.host,
            "server.port": options.port,
            "paths.data_buffer_dir": options.data_buffer_dir,
            "paths.checkpoint_dir": options.checkpoint_dir,
            "clock.mode": options.clock,
            "forecast.shards": options.shards,
            "forecast.engine": options.engine,
        },
    )
    host = settings.server.host
    if not os.environ.get(KEY_VARIABLE) and not _is_loopback(host):
        raise SettingsError(
            [f"server.host {host} is open to others, and {KEY_VARIABLE} is not set"],
            hint=f"set {KEY_VARIABLE}, which clients then send as X-API-Key, or listen on 127.0.0.1",
        )
    require_ray(settings.forecast.engine, "forecast.engine")
    if (problem := weak_key(os.environ.get(KEY_VARIABLE, ""))) and not _is_loopback(host):
        raise SettingsError([f"server.host {host} is open to others: {problem}"])
    return with_models_dir(settings)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Take metrics in, forecast them, answer on HTTP.",
        epilog="exit codes: 0 stopped, 1 failed, 2 bad settings, 3 cannot start, 4 already running",
    )
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8000)")
    parser.add_argument("--data-buffer-dir", help="folder of the buffer (default: ./data_buffer)")
    parser.add_argument("--checkpoint-dir", help="folder of the model versions (default: ./checkpoints)")
    parser.add_argument("--clock", help="system, or data: now is the newest record's time")
    parser.add_argument("--engine", help="where shards run: local, or ray: a Ray cluster (docs/scaling.md)")
    parser.add_argument("--shards", type=int, metavar="N", help="processes that forecast (default: 1)")
    parser.add_argument("--config", type=Path, help="settings file (default: ./fleetcast.toml, if present)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
