"""A shard that a server named `poison` ends, one named `sleep` stops, and `rules` makes fail."""

import os
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from fleetcast.serving import shard


class PoisonedShard(shard.Shard):
    """Dies of what it is asked."""

    def _answer(self, asked: dict[str, Any], *given: Any) -> bytes:
        if "poison" in asked["names"]:
            os._exit(9)
        if "sleep" in asked["names"]:
            time.sleep(600)
        return super()._answer(asked, *given)


if __name__ == "__main__":
    channel, questions, answers = (int(text) for text in sys.argv[1:])
    PoisonedShard(Connection(channel), shard.SharedArrays(questions), shard.SharedArrays(answers)).run()
