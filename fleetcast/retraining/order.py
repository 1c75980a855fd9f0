"""`--export` of the retraining daemon: the step before a training, in a process of its own.

Owns: which stretch of the buffer goes into the file. Does not know: what a trainer does with it.
"""

from pathlib import Path

from data_buffer import DataBuffer
from fleetcast.retraining.training_order import export_end
from fleetcast.settings import Settings


def export_for_training(settings: Settings, path: Path) -> str:
    """Write the newest days of records, in the model's bins; return what was done."""
    buffer = DataBuffer(settings.paths.data_buffer_dir, settings=settings.buffer, expire=False)
    until = export_end(settings.clock.mode, buffer.newest_record_time())
    days, bin_s = settings.retraining.training_days, settings.bins.bin_s
    n_rows = buffer.export_training_data(path, days, bin_s, until=until)
    return f"{n_rows} rows of the last {days} days written to {path}"
