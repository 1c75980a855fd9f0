"""Claims about what is installed: pyproject.toml, the requirement files and the code agree."""

import re
import tomllib
from pathlib import Path

import pytest
from house import PROGRAMS, ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fleetcast

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HASHED = ("requirements.txt", "requirements-dev.txt")
# what an import is called where it is not the distribution's name
DISTRIBUTIONS = {"google": "protobuf"}
PRESENT_BY_NEED = {"httptools"}  # chosen by name in uvicorn's settings


def pins(name: str) -> dict[str, str]:
    """Return the versions a requirement file pins, by canonical name."""
    found = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text(), re.M)
    return {canonicalize_name(package): version for package, version in found}


def test_the_wheel_holds_every_package_and_every_program() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    folders = sorted(path.parent for path in (ROOT / "fleetcast").rglob("__init__.py"))
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    wanted = packages | {"fleetcast.models", "fleetcast.samples"}
    assert setuptools["packages"] == sorted(wanted), "pyproject.toml lists each package once, in order"
    assert sorted(setuptools["py-modules"]) == sorted(PROGRAMS)


def test_the_wheel_holds_every_file_of_the_page() -> None:
    package = ROOT / "fleetcast"
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["fleetcast"]
    held = {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}
    assert held == {path for path in (package / "ui").rglob("*") if path.is_file()}


def test_the_version_stands_in_one_place_and_the_others_repeat_it() -> None:
    version = fleetcast.__version__
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fleetcast.__version__"}
    assert f"image: fleetcast:{version}\n" in (ROOT / "deploy" / "docker-compose.yml").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", HASHED)
def test_every_line_of_a_requirement_file_is_a_pin_with_hashes(name: str) -> None:
    text = (ROOT / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==\S+(\s+--hash=sha256:\w{64})+", line)] == []


def test_torch_alone_is_pinned_without_a_hash() -> None:
    (line,) = [
        line
        for line in (ROOT / "requirements-torch.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert line in PROJECT["project"]["dependencies"]
    assert all("torch" not in pins(name) for name in HASHED)


def test_no_package_is_pinned_twice() -> None:
    assert pins("requirements.txt").keys() & pins("requirements-dev.txt").keys() == set()


def test_the_pins_are_within_what_the_wheel_asks_for() -> None:
    pinned = pins("requirements.txt") | pins("requirements-torch.txt")
    for text in PROJECT["project"]["dependencies"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), text
    for text in PROJECT["project"]["optional-dependencies"]["plot"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins("requirements-dev.txt")[canonicalize_name(wanted.name)]), text


def test_the_wheel_asks_for_what_the_code_imports_and_nothing_else() -> None:
    imported = set()
    for path in [*(ROOT / "fleetcast").rglob("*.py"), *(ROOT / f"{name}.py" for name in PROGRAMS)]:
        imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M))
    asked = {Requirement(text).name for text in PROJECT["project"]["dependencies"]}
    used = {name for name in asked if name.replace("-", "_") in imported}
    used |= {name for module, name in DISTRIBUTIONS.items() if module in imported}
    assert asked - used == PRESENT_BY_NEED
    installed = pins("requirements.txt") | pins("requirements-torch.txt")
    third_party = {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in imported} & installed.keys()
    assert third_party - asked == set()


def test_the_program_has_a_licence_and_the_data_keep_their_own() -> None:
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert "fleetcast contributors" in (ROOT / "LICENSE").read_text()
    for folder in ("models", "samples"):
        assert (Path(ROOT) / folder / "LICENSE-smd.txt").exists()
