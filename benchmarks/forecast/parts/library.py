"""The library's own way to forecast, timed: TimeSeriesDataSet, from_dataset, predict(DataFrame).

Owns: the stock recipe at 288 -> 96 with hidden 32, one series per server and metric.
Does not know: our windows. Its `predict()` writes `lightning_logs/`, so it runs in a folder of its own.
"""

import contextlib
import logging
import tempfile
from collections.abc import Sequence
from time import process_time
from typing import Any

import numpy as np

PAST, AHEAD = 288, 96


def library_rates(sizes: Sequence[int], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return servers per CPU second for each fleet size; `predict()` alone is timed."""
    if not sizes:
        return []
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = []
    options = {"accelerator": "cpu", "logger": False}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for n_servers in sizes:
            frame = _frame(n_servers, metrics)
            model = _model(frame)
            started = process_time()
            # a fresh dict: predict() leaves its callback in it, and the next answer would be this one
            answer = model.predict(frame, mode="quantiles", batch_size=128, trainer_kwargs=dict(options))
            took = process_time() - started
            assert answer.shape == (n_servers * len(metrics), AHEAD, 3)
            rows.append(
                {"servers": n_servers, "cpu_s": round(took, 3), "servers_per_core_s": round(n_servers / took)}
            )
    return rows


def _model(frame: Any) -> Any:
    """Return the stock model for one frame's series; it does not know others."""
    import torch
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
    from pytorch_forecasting.data import EncoderNormalizer
    from pytorch_forecasting.metrics import QuantileLoss

    torch.manual_seed(7)
    dataset = TimeSeriesDataSet(
        frame,
        time_idx="step",
        target="value",
        group_ids=["series"],
        static_categoricals=["metric"],
        min_encoder_length=PAST,
        max_encoder_length=PAST,
        min_prediction_length=AHEAD,
        max_prediction_length=AHEAD,
        time_varying_known_reals=["hour_sin", "hour_cos"],
        time_varying_unknown_reals=["value"],
        target_normalizer=EncoderNormalizer(),
    )
    return TemporalFusionTransformer.from_dataset(
        dataset, hidden_size=32, attention_head_size=4, hidden_continuous_size=8,
        output_size=3, loss=QuantileLoss([0.1, 0.5, 0.9]),
    )  # fmt: skip


def _frame(n_servers: int, metrics: Sequence[str]) -> Any:
    import pandas as pd

    n_series, length = n_servers * len(metrics), PAST + AHEAD
    step = np.tile(np.arange(length), n_series)
    rng = np.random.default_rng(3)
    names = [f"server-{server}/{metric}" for server in range(n_servers) for metric in metrics]
    return pd.DataFrame(
        {
            "step": step,
            "series": np.repeat(names, length),
            "metric": np.repeat(list(metrics) * n_servers, length),
            "value": 50 + 10 * rng.standard_normal(n_series * length),
            "hour_sin": np.sin(2 * np.pi * step / PAST),
            "hour_cos": np.cos(2 * np.pi * step / PAST),
        }
    )
