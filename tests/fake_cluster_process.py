"""Stands in for the process that speaks to Ray: `python -m fake_cluster_process train REQUEST JOB ANSWER`.

`FAKE_CLUSTER` says what becomes of the training.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

from fleetcast.training.elsewhere import read_job, train_job


def main(what: str, request: str, job: str, answer: str) -> None:
    """Answer as the environment says."""
    assert what == "train"
    told, content = json.loads(request), Path(f"/dev/fd/{job}").read_bytes()
    mode, out = os.environ["FAKE_CLUSTER"], os.fdopen(int(answer), "wb")
    if mode in ("away", "failed", "short"):
        said = {"away": {"away": "no room"}, "short": {"failed": "few days", "exit_code": 5}}
        said["failed"] = {"failed": f"broken {told['address']} {told['cpus']} CPU", "exit_code": 1}
        out.write(json.dumps(said[mode]).encode() + b"\n")
        return
    trained = read_job(content).start.model.to_bytes() if mode == "old" else train_job(content)
    said = {"node": "there", "sha256": hashlib.sha256(trained).hexdigest()}
    out.write(json.dumps(said).encode() + b"\n" + trained[: 1000 if mode in ("torn", "killed") else None])
    out.flush()
    if mode == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
