"""A shard that a server named `poison` ends, and one named `sleep` stops."""

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from fleetcast.schema import Floats32
from fleetcast.serving import shard


class PoisonedShard(shard.Shard):
    """Dies of what it is asked."""

    def prepare(self, settings: Mapping[str, Any]) -> shard.Answer:
        answer = super().prepare(settings)

        def poisoned(asked: Mapping[str, Any], values: Floats32) -> Any:
            if "poison" in asked["names"]:
                os._exit(9)
            if "sleep" in asked["names"]:
                time.sleep(600)
            return answer(asked, values)

        return poisoned


if __name__ == "__main__":
    (own,) = shard.shards_of(sys.argv[1:], PoisonedShard)
    own.run()
