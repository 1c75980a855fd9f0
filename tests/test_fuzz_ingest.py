"""The short form of benchmarks/ingest/fuzz_ingest.py: the same targets, a few thousand inputs."""

import random

import pytest

from benchmarks.ingest.parts.fuzz_targets import TARGETS, mutated

N_INPUTS = 3000


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_bodies_are_refused_or_read_right(name: str) -> None:
    target = TARGETS[name]()
    rng = random.Random(f"{name} 1")
    n_taken = sum(target.hit(mutated(rng, target.seeds)) for _ in range(N_INPUTS))
    assert 0 < n_taken < N_INPUTS  # both sides of the line were visited


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_is_taken(name: str) -> None:
    target = TARGETS[name]()
    seeds = target.seeds if name != "remote_write" else target.seeds[: len(target.seeds) // 2]
    assert all(target.hit(seed) for seed in seeds)
