"""Settings of the trainer; `settings.py` puts them beside the others."""

from dataclasses import dataclass

from fleetcast.setting import setting


@dataclass(frozen=True)
class TrainerSettings:
    """How a model is trained."""

    epochs: int = setting(5, "epochs of an incremental training", low=1, high=1000)
    base_epochs: int = setting(
        16, "epochs of a fleet's first training, and of one from scratch", low=1, high=1000
    )
    patience_epochs: int = setting(
        4, "epochs without a better one after which a training from scratch stops; 0: never", low=0
    )
    steps_per_epoch: int = setting(100, "batches sampled per epoch", low=1)
    batch_size: int = setting(128, "windows per batch", low=1)
    hidden_size: int = setting(32, "width of a network trained from scratch", low=4, high=512)
    learning_rate: float = setting(5e-3, "peak of the cosine schedule", low=1e-6, high=1.0)
    incremental_learning_rate: float = setting(
        4e-3, "the same for an incremental training", low=1e-6, high=1.0
    )
    incremental_batch_size: int = setting(64, "windows per batch of an incremental training", low=1)
    changed_share: float = setting(
        0.35, "share of a batch drawn from drifting series after their change", low=0.0, high=0.9
    )
    specialist_max_share: float = setting(
        0.5,
        "share of the series up to which a change is learned by a specialist, the others' forecasts "
        "staying as they are; 0: never",
        low=0.0,
        high=1.0,
    )
    specialist_changed_share: float = setting(
        0.6, "changed_share in a training of a specialist", low=0.0, high=0.9
    )
    specialist_learning_rate: float = setting(
        8e-3, "the same for a specialist, which can spoil nothing but its own series", low=1e-6, high=1.0
    )
    keep_weight: float = setting(
        1.0, "weight in the loss of moving away from the old answers to replayed windows", low=0.0
    )
    recent_share: float = setting(
        0.5,
        "share of a batch drawn from the newest days, where no change is known",
        low=0.0,
        high=1.0,
    )
    recent_days: float = setting(3.0, "what counts as the newest days", unit="days", low=0.1)
    holdout_share: float = setting(
        0.1, "newest share of the data kept out of training, for the gate", low=0.02, high=0.5
    )
    holdout_max_s: float = setting(
        86_400.0, "longest tail kept out of training, for the gate", unit="s", low=3600.0
    )
    keep_versions: int = setting(
        20, "newest versions kept; what serves, the one before and the baseline's are kept besides", low=1
    )
    threads: int = setting(1, "torch threads of a training (2 on busy cores were slower)", low=1, high=64)
    seed: int = setting(7, "seed of weights and sampling", low=0)
