"""What the process that speaks to Ray makes of a training whose machine is small, busy, lost or fails."""

import importlib
import logging
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

MACHINE = {"Alive": True, "Resources": {"CPU": 1.0, "memory": 4e9}}
HEAD = {"Alive": True, "Resources": {"memory": 4e9}}
TOLD = {"cpus": 1, "memory_bytes": 1_200_000_000, "nice": 10, "room_s": 600.0}
JOB = np.arange(3, dtype=np.uint8)


class RayError(Exception):
    """As Ray's."""


class OutOfMemoryError(RayError):
    """As Ray's."""


class RayTaskError(RayError):
    """As Ray's."""


@dataclass
class FakeRay:
    """A cluster whose actors do what was written down: become ready (or never), then answer (or raise)."""

    answers: list[Any]
    is_free: bool = True
    machines: list[dict[str, Any]] = field(default_factory=lambda: [HEAD, MACHINE])
    vanishes_at_s: float = float("inf")
    starts_after_s: float = 0.0
    now_s: float = 0.0
    actors: list[SimpleNamespace] = field(default_factory=list)
    killed: list[SimpleNamespace] = field(default_factory=list)
    asked: dict[str, Any] = field(default_factory=dict)
    exceptions = SimpleNamespace(
        RayError=RayError, OutOfMemoryError=OutOfMemoryError, RayTaskError=RayTaskError
    )

    def put(self, value: Any) -> Any:
        return value

    def nodes(self) -> list[dict[str, Any]]:
        return self.machines if self.now_s < self.vanishes_at_s else [HEAD]

    def remote(self, _kind: type) -> Any:
        def start(_nice: int) -> SimpleNamespace:
            number = len(self.actors)
            called = {name: SimpleNamespace(remote=lambda *_, n=name: (n, number)) for name in METHODS}
            self.actors.append(SimpleNamespace(**called))
            return self.actors[-1]

        return SimpleNamespace(
            options=lambda **asked: self.asked.update(asked) or SimpleNamespace(remote=start)
        )

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        if references[0][0] == "ready" and not self.is_free:
            self.now_s += timeout
            return [], references
        return references, []

    def get(self, reference: Any, timeout: float = 0) -> Any:
        what, number = reference
        if what == "news":
            return ["epoch trained"]
        place = RayError("it is gone") if self.now_s < self.starts_after_s else f"node-{number}"
        answer = place if what == "ready" else self.answers[number]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def kill(self, actor: SimpleNamespace) -> None:
        self.killed.append(actor)


METHODS = ("ready", "train", "news")
CHECKPOINT = ({}, b"weights")


def actors_on(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module with a fake in the place of Ray, installed or not."""
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.delitem(sys.modules, "fleetcast.cluster.ray_actors", raising=False)
    module = importlib.import_module("fleetcast.cluster.ray_actors")
    monkeypatch.delitem(sys.modules, "fleetcast.cluster.ray_actors")
    monkeypatch.setattr(module, "monotonic", lambda: fake.now_s)
    monkeypatch.setattr(module, "sleep", fake.sleep)
    return module


@pytest.mark.parametrize(
    ("answers", "said", "n_actors"),
    [
        ([CHECKPOINT], {"node": "node-0"}, 1),
        ([({"failed": "few days", "exit_code": 5}, b"")], {"node": "node-0", "failed": "few days"}, 1),
        ([OutOfMemoryError("x")], {"failed": "the training ran out of memory on node-0"}, 1),
        ([RayTaskError("bug")], {"failed": "the training failed on node-0: RayTaskError: bug"}, 1),
        ([RayError("gone"), CHECKPOINT], {"node": "node-1"}, 2),
        ([RayError("gone")] * 2, {"away": "the training was lost with node-0: RayError: gone; the"}, 2),
    ],
    ids=["trained", "refused", "memory", "bug", "lost once", "lost twice"],
)
def test_a_lost_machine_is_replaced_once_and_a_failure_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, answers: list[Any], said: dict[str, Any], n_actors: int
) -> None:
    fake = FakeRay(answers)
    found, checkpoint = actors_on(fake, monkeypatch).train(JOB, TOLD)
    assert {name: str(found[name])[: len(text)] for name, text in said.items()} == said
    assert checkpoint == (b"weights" if answers[-1] is CHECKPOINT else b"")
    assert len(fake.actors) == n_actors
    lost = [actor for actor, answer in zip(fake.actors, answers, strict=True) if type(answer) is RayError]
    assert fake.killed == lost, "no two trainings at once"
    assert fake.asked["num_cpus"] == 1
    assert fake.asked["memory"] == TOLD["memory_bytes"]


def test_where_no_machine_is_large_enough_none_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay([], machines=[HEAD, {"Alive": False, "Resources": {"CPU": 8.0, "memory": 9e9}}])
    found, _ = actors_on(fake, monkeypatch).train(JOB, TOLD)
    assert found == {"away": "no machine of the Ray cluster has 1 CPU and 1.2 GB of memory"}
    assert fake.actors == []


@pytest.mark.parametrize(("vanishes_at_s", "waited_s"), [(float("inf"), 600), (40.0, 40)])
def test_a_busy_cluster_is_waited_for_as_long_as_it_has_such_a_machine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, vanishes_at_s: float, waited_s: float
) -> None:
    fake = FakeRay([], is_free=False, vanishes_at_s=vanishes_at_s)
    with caplog.at_level(logging.INFO):
        found, _ = actors_on(fake, monkeypatch).train(JOB, TOLD)
    assert found["away"].startswith("no machine of the Ray cluster ha")
    assert fake.now_s == pytest.approx(waited_s, abs=2)
    assert fake.killed == fake.actors
    assert caplog.text.count("the training waits") == 1


@pytest.mark.parametrize(("starts_after_s", "said"), [(12.0, "node-4"), (99.0, "became ready")])
def test_a_lost_machine_that_still_counts_is_tried_for_half_a_minute(
    monkeypatch: pytest.MonkeyPatch, starts_after_s: float, said: str
) -> None:
    fake = FakeRay([CHECKPOINT] * 5, starts_after_s=starts_after_s)
    found, _ = actors_on(fake, monkeypatch).train(JOB, TOLD)
    assert said in found.get("node", found.get("away"))
    assert len(fake.actors) == 5
