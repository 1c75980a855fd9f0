"""Two peers that a user would pick: statsforecast's MSTL and neuralforecast's NHITS.

Owns: how they are set up, by their authors' defaults wherever there is one. MSTL is fitted anew to the
eight days before each origin: a daily season of 288 bins and a trend by AutoETS, since AutoETS itself knows
no season beyond 24 steps. NHITS is one network for all series and metrics, trained once; like ours it
forecasts servers that it never saw. Gaps are carried forward, nothing falls below 0. Not installed: a peer
is missing, and its column n/a. Neither is a requirement of anything; statsforecast even asks for
pandas < 3, so they go into a folder of their own, beside the pinned environment and without their
requirements (which would bring another torch):

    pip install --no-deps --target .venv-peers/nixtla statsforecast==2.1.1 neuralforecast==3.3.0 \\
        coreforecast utilsforecast statsmodels patsy fugue triad adagio six \\
        optuna colorlog safetensors tornado
    PYTHONPATH=.venv-peers/nixtla python -m benchmarks.forecast.forecast_accuracy ... --mstl --nhits-steps 400
"""

import logging
import warnings
from importlib.util import find_spec
from time import process_time
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.forecast.parts.rounds import Forecasts
from fleetcast.schema import QUANTILES, Floats32, HistoryWindow
from fleetcast.training.grid import TrainingGrid

AHEAD, DAY = 96, 288
MSTL, NHITS = "mstl", "nhits"
_LIBRARIES = {MSTL: "statsforecast", NHITS: "neuralforecast"}
_LEVEL = 80  # percent, of an interval from p10 to p90
_PAST = 5 * AHEAD  # bins that NHITS sees: the longest its authors try by default
_LEAST_KNOWN = 2 * DAY  # for a season of a day


def available(name: str) -> bool:
    """Return whether a peer's library is installed."""
    return find_spec(_LIBRARIES[name]) is not None


class Timed:
    """A peer whose forecasts are timed."""

    def __init__(self, peer: Forecasts) -> None:
        self._peer, self.cpu_s, self.n_series = peer, 0.0, 0

    def predict(self, window: HistoryWindow) -> Floats32:
        """Return what the peer forecasts."""
        began = process_time()
        answer = self._peer.predict(window)
        self.cpu_s += process_time() - began
        self.n_series += answer.shape[0] * answer.shape[1]
        return answer


class Mstl:
    """Daily season by repeated LOESS, the rest by exponential smoothing; fitted at every origin."""

    def __init__(self) -> None:
        from statsforecast.models import MSTL as Model
        from statsforecast.models import AutoETS

        self._model = Model(season_length=[DAY], trend_forecaster=AutoETS(model="ZZN"))

    def predict(self, window: HistoryWindow) -> Floats32:
        """Return quantiles (server, metric, horizon, quantile), NaN for a series of less than two days."""
        shape = window.values.shape[:2]
        answer = np.full((*shape, AHEAD, len(QUANTILES)), np.nan, np.float32)
        for place in np.ndindex(shape):
            known = _carried(window.values[place])
            known = known[np.isfinite(known)]
            if len(known) >= _LEAST_KNOWN:
                answer[place] = self._forecast(known)
        return np.maximum(answer, 0)

    def _forecast(self, past: Floats32) -> Floats32:
        if np.ptp(past) == 0:  # nothing to decompose
            return np.full((AHEAD, len(QUANTILES)), past[-1], np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = self._model.forecast(past, AHEAD, level=[_LEVEL])
        columns = [found[f"lo-{_LEVEL}"], found["mean"], found[f"hi-{_LEVEL}"]]
        return np.asarray(np.stack(columns, axis=-1), np.float32)


class Nhits:
    """One NHITS for all series of a grid, with quantile loss."""

    def __init__(self, grid: TrainingGrid, steps: int, seed: int, threads: int = 1) -> None:
        """Train.

        Args:
            steps: of its default batch, 32 series and 1,024 windows of them.
        """
        import torch
        from neuralforecast import NeuralForecast
        from neuralforecast.losses.pytorch import MQLoss
        from neuralforecast.models import NHITS as Model

        torch.set_num_threads(threads)
        quiet = {"enable_progress_bar": False, "logger": False, "enable_model_summary": False}
        for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
            logging.getLogger(name).setLevel(logging.ERROR)
        network = Model(
            h=AHEAD,
            input_size=_PAST,
            loss=MQLoss(quantiles=list(QUANTILES)),
            max_steps=steps,
            scaler_type="standard",  # of each window: metrics have scales of their own
            random_seed=seed,
            accelerator="cpu",
            enable_checkpointing=False,
            **quiet,
        )
        self._fitted = NeuralForecast(models=[network], freq=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._fitted.fit(_frame(grid.values.reshape(-1, grid.n_bins)))

    def predict(self, window: HistoryWindow) -> Floats32:
        """Return quantiles (server, metric, horizon, quantile), NaN where the whole past is unknown."""
        series = window.values.reshape(-1, window.values.shape[2])[:, -_PAST:]
        known = np.flatnonzero(np.isfinite(series).any(axis=1))
        answer = np.full((len(series), AHEAD, len(QUANTILES)), np.nan, np.float32)
        if len(known):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = self._fitted.predict(df=_frame(series[known]))
            columns = [name for name in found.columns if name.startswith("NHITS")]
            made = found[columns].to_numpy(np.float32).reshape(len(known), AHEAD, len(QUANTILES))
            answer[known] = np.sort(made, axis=-1)
        return np.maximum(answer, 0).reshape(*window.values.shape[:2], AHEAD, len(QUANTILES))


def _carried(past: Floats32) -> Floats32:
    return pd.Series(past).ffill().to_numpy(np.float32)


def _frame(series: Floats32) -> pd.DataFrame:
    """Return (series, bin) in the library's long form: gaps filled, and marked as not to be learned."""
    n_series, n_bins = series.shape
    filled = pd.DataFrame(series.T).ffill().bfill().fillna(0.0).to_numpy(np.float32).T
    columns: dict[str, Any] = {
        "unique_id": np.repeat(np.arange(n_series), n_bins),
        "ds": np.tile(np.arange(n_bins), n_series),
        "y": filled.reshape(-1),
        "available_mask": np.isfinite(series).reshape(-1).astype(np.float32),
    }
    return pd.DataFrame(columns)
