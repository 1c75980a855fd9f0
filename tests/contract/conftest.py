"""The places the printed commands run in: beside running daemons, after a training, in an empty folder."""

import os
import shutil
from collections.abc import Callable, Iterator

import pytest
from spec_blocks import BLOCKS, ROOT
from workplace import IN_A_HURRY, PROGRAMS, SAMPLE, Workplace, is_free, until

BUSY = "port 8000, where the printed commands work, is taken on this machine"


@pytest.fixture(scope="session")
def new_workplace(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Workplace]:
    """Make a folder that looks like the checkout: the printed commands name files in it."""

    def make(name: str) -> Workplace:
        folder = tmp_path_factory.mktemp(name)
        for program in (*PROGRAMS, "fleetcast"):
            (folder / program).symlink_to(ROOT / program)
        (folder / "fleetcast.toml").write_text(IN_A_HURRY)
        return Workplace(folder)

    return make


@pytest.fixture(scope="module")  # it holds port 8000, which the README's commands use, too
def daemons(new_workplace: Callable[[str], Workplace]) -> Iterator[Workplace]:
    """Both daemons, started as "Option 1" prints it and fed with three hours of real records."""
    if not is_free(8000):
        if os.environ.get("CI"):
            pytest.fail(BUSY)
        pytest.skip(BUSY)
    place = new_workplace("daemons")
    inference, retraining = BLOCKS["option-1-automated-recommended"].commands()
    place.start(inference)
    try:
        until(lambda: place.run("curl -sf http://localhost:8000/ready").returncode == 0, place)
        fed = place.feed(180)
        assert fed.returncode == 0, fed.stderr
        place.start(retraining)
        until(lambda: (place.folder / "retraining_state.json").exists(), place)
        until(lambda: any((place.folder / "data_buffer").glob("metrics_*.parquet")), place)
        yield place
    finally:
        codes = place.stop()
    assert codes == [0, 0], "a daemon did not end cleanly on SIGTERM"


@pytest.fixture(scope="session")
def filled(new_workplace: Callable[[str], Workplace]) -> Workplace:
    """A folder whose buffer holds three days of real records; no daemon runs."""
    place = new_workplace("filled")
    code = (
        "import pandas as pd\nfrom data_buffer import DataBuffer\n"
        f"df = pd.read_parquet({str(SAMPLE)!r})\n"
        "df = df[df.server_name != 'smd-machine-1-5']\n"
        "df = df[df.timestamp < df.timestamp.min() + pd.Timedelta('3D')]\n"
        # by whole days: what a training learns, and so its gate, does not depend on the hour of the test
        "df['timestamp'] += (pd.Timestamp.now('UTC') - df.timestamp.max()).floor('D')\n"
        "df = df.assign(cpu_pct=df.cpu_r_norm01 * 100, mem_pct=df.mem_u_norm01 * 100)\n"
        "b = DataBuffer()\n"
        "b.append(df[['timestamp', 'server_name', 'cpu_pct', 'mem_pct']])\n"
        "b.flush()\nb.close()\n"
    )
    (place.folder / "fill.py").write_text(code)
    filled = place.run("python fill.py")
    assert filled.returncode == 0, filled.stderr
    return place


@pytest.fixture(scope="session")
def trained(filled: Workplace) -> Workplace:
    """The same folder after the printed export and the printed training."""
    export, train = BLOCKS["step-by-step-process-3"].commands()
    head = "from data_buffer import DataBuffer; buffer = DataBuffer(); "  # the block takes it for granted
    for command in (f'python -c "{head}{export}"', train):
        done = filled.run(command, timeout_s=280)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-4000:])
    return filled


@pytest.fixture
def empty(new_workplace: Callable[[str], Workplace]) -> Workplace:
    """A folder in which nothing ever ran."""
    return new_workplace("empty")


@pytest.fixture(scope="session", autouse=True)
def jq_is_there() -> None:
    """The filters are tested with the real jq."""
    if shutil.which("jq") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("jq is not installed (.ci/run installs it)")
