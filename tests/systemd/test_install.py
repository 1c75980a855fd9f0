"""docs/operations.md, followed word for word on a machine that has never seen these daemons.

The packages are there already: inside is no network to download them from.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from nested import INSTALLED, ROOT, STATE, TREE, NestedSystemd, why_not_here

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or "-")]

UNITS = ("tft-inference-daemon", "adaptive-retraining", "fleetcast-agent")
DOCUMENT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def _block_after(mark: str) -> str:
    found = re.search(r"```bash\n(.*?)```", DOCUMENT[DOCUMENT.index(mark) :], re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NestedSystemd]:
    with NestedSystemd(tmp_path_factory.mktemp("nested"), is_installed=False) as systemd:
        yield systemd


@pytest.fixture(scope="module")
def installed(machine: NestedSystemd) -> NestedSystemd:
    hardened = "umask 027"  # of a root that hides what it writes from others
    code, output = machine.run("bash", "-euc", f"{hardened}; cd {TREE}\n{_block_after('## Install')}")
    assert code == 0, output
    return machine


def _ask(machine: NestedSystemd, path: str, *header: str) -> dict[str, Any]:
    code, output = machine.run("curl", "-sf", f"http://127.0.0.1:8000{path}", *header)
    return dict(json.loads(output)) if code == 0 else {}


def test_the_documented_lines_start_all_three_services(installed: NestedSystemd) -> None:
    for unit in UNITS:
        state = installed.show(unit, "ActiveState", "UnitFileState", "NRestarts")
        assert state == {"ActiveState": "active", "UnitFileState": "enabled", "NRestarts": "0"}


def test_this_hosts_first_forecast_is_there_within_a_minute_for_who_has_the_key(
    installed: NestedSystemd,
) -> None:
    _, settings = installed.run("cat", "/etc/fleetcast/env")
    key = settings.strip().removeprefix("TFT_API_KEY=")
    header = ("-H", f"X-API-Key: {key}")

    def has_values() -> bool:
        return any(
            s["current"] for s in _ask(installed, "/predictions/current", *header)["predictions"].values()
        )

    installed.wait_for("records of the agent", has_values, 60)

    assert len(key) == 64
    assert _ask(installed, "/predictions/current") == {}  # 401


def test_the_code_is_roots_and_the_base_model_lies_beside_it(installed: NestedSystemd) -> None:
    _, owners = installed.run("find", INSTALLED, "-not", "-user", "root")

    assert owners == ""
    assert installed.run("test", "-e", f"{INSTALLED}/models/last.ckpt")[0] == 0


def test_the_questions_an_operator_asks_afterwards_are_answered(installed: NestedSystemd) -> None:
    questions = _block_after("**Does it work?**").replace("journalctl", "true")  # no journal in here

    code, output = installed.run("bash", "-euc", questions)

    assert code == 0, output
    assert '{"status":"ready"}' in output


def test_the_classes_can_be_imported_in_the_state_folder_as_its_user(installed: NestedSystemd) -> None:
    lines = _block_after("as `tft` in the state folder").replace("sudo -u tft bash\n", "")
    program = "from data_buffer import DataBuffer; print(DataBuffer().get_stats()['total_records'] > 0)"

    code, output = installed.run(
        "runuser", "-u", "tft", "--", "bash", "-euc", f'{lines}python -c "{program}"'
    )

    assert (code, output.strip()) == (0, "True")


def test_uninstalling_leaves_nothing(installed: NestedSystemd) -> None:
    code, output = installed.run("bash", "-euc", _block_after("**Uninstall**"))

    assert code == 0, output
    assert installed.run("id", "tft")[0] != 0
    assert (
        installed.run("sh", "-c", f"ls -d {INSTALLED} {STATE} /etc/fleetcast")[1].count("cannot access") == 3
    )
    assert all(installed.show(unit, "LoadState") == {"LoadState": "not-found"} for unit in UNITS)
