"""The stock recipe as a peer: pytorch-forecasting's temporal fusion transformer as its tutorial builds it.

Owns: a TimeSeriesDataSet with GroupNormalizer, one category per server, 288 bins past, 96 ahead, one model
per metric, hidden size 32, quantile loss. Short gaps are carried forward, as the tutorial's data set asks
for; a window with an unknown past has no forecast. Servers it never saw have none either: it has a
category per server. It takes minutes per metric, so its steps are an option and stand in the results.
"""

import warnings
from typing import Any

import numpy as np
import pandas as pd

from fleetcast.schema import QUANTILES, Floats32, HistoryWindow
from fleetcast.training.grid import TrainingGrid

PAST, AHEAD = 288, 96
_BATCH, _HIDDEN, _RATE, _CLIP = 64, 32, 3e-3, 0.1
_LONGEST_CARRY = 12  # bins


class StockRecipe:
    """One network per metric, in the library's own words."""

    def __init__(
        self, grid: TrainingGrid, metrics: tuple[str, ...], steps: int, seed: int, threads: int = 1
    ) -> None:
        """Train `steps` batches of 64 windows for each of `metrics`."""
        import lightning
        import torch

        torch.set_num_threads(threads)
        lightning.seed_everything(seed, verbose=False)
        self._names = grid.server_names
        columns = [grid.metrics.index(metric) for metric in metrics]
        self._fitted = {column: self._fit(grid, column, steps) for column in columns}

    def _fit(self, grid: TrainingGrid, metric: int, steps: int) -> tuple[Any, Any]:
        import lightning
        from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
        from pytorch_forecasting.data import GroupNormalizer
        from pytorch_forecasting.metrics import QuantileLoss

        rows = _rows(grid.values[:, metric], grid.server_names, grid.start_ms, grid.bin_ms)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = TimeSeriesDataSet(
                rows,
                time_idx="bin",
                target="value",
                group_ids=["server"],
                max_encoder_length=PAST,
                max_prediction_length=AHEAD,
                static_categoricals=["server"],
                time_varying_known_reals=["bin", "hour_sin", "hour_cos"],
                time_varying_unknown_reals=["value"],
                target_normalizer=GroupNormalizer(groups=["server"]),
                allow_missing_timesteps=True,
            )
            network = TemporalFusionTransformer.from_dataset(
                data,
                hidden_size=_HIDDEN,
                hidden_continuous_size=8,
                attention_head_size=4,
                dropout=0.1,
                learning_rate=_RATE,
                loss=QuantileLoss(list(QUANTILES)),
            )
            trainer = lightning.Trainer(
                accelerator="cpu",
                max_steps=steps,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
                gradient_clip_val=_CLIP,
            )
            trainer.fit(network, data.to_dataloader(train=True, batch_size=_BATCH, num_workers=0))
        return data, network.eval()

    def predict(self, window: HistoryWindow) -> Floats32:
        """Return quantiles (server, metric, horizon, quantile), NaN where it has no forecast."""
        shape = (len(window.server_names), len(window.metrics), AHEAD, len(QUANTILES))
        answer = np.full(shape, np.nan, np.float32)
        for metric, (data, network) in self._fitted.items():
            answer[:, metric] = self._forecast(window, metric, data, network)
        return answer

    def _forecast(self, window: HistoryWindow, metric: int, data: Any, network: Any) -> Floats32:
        import torch

        past = _carried(window.values[:, metric, -PAST:])
        known = np.isfinite(past).all(axis=1) & np.isin(window.server_names, self._names)
        answer = np.full((len(past), AHEAD, len(QUANTILES)), np.nan, np.float32)
        if past.shape[1] < PAST or not known.any():
            return answer
        names = tuple(name for name, is_known in zip(window.server_names, known, strict=True) if is_known)
        whole = np.concatenate([past[known], np.repeat(past[known, -1:], AHEAD, axis=1)], axis=1)
        start_ms = window.end_bin_ms - (PAST - 1) * window.bin_ms
        rows = _rows(whole, names, start_ms, window.bin_ms)
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            loader = (
                type(data)
                .from_dataset(data, rows, predict=True)
                .to_dataloader(train=False, batch_size=len(names), num_workers=0)
            )
            inputs, _ = next(iter(loader))
            answer[known] = network.to_quantiles(network(inputs)).numpy()
        return np.sort(answer, axis=-1)


def _carried(past: Floats32) -> Floats32:
    """Return the past with short gaps filled by the value before."""
    return pd.DataFrame(past.T).ffill(limit=_LONGEST_CARRY).to_numpy(np.float32).T


def _rows(values: Floats32, names: tuple[str, ...], start_ms: int, bin_ms: int) -> pd.DataFrame:
    """Return (server, bin) values in long form, without those that are unknown."""
    n_bins = values.shape[1]
    bins = start_ms // bin_ms + np.arange(n_bins)
    phase = 2 * np.pi * (bins * bin_ms % 86_400_000) / 86_400_000
    frame = pd.DataFrame(
        {
            "server": np.repeat(np.array(names, object), n_bins),
            "bin": np.tile(bins, len(names)),
            "hour_sin": np.tile(np.sin(phase), len(names)),
            "hour_cos": np.tile(np.cos(phase), len(names)),
            "value": _carried(values).reshape(-1),
        }
    )
    return frame[np.isfinite(frame["value"])].reset_index(drop=True)
