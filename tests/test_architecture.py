"""The layer table, the owners of third-party libraries, and the house rules a machine can check."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = (
    "adaptive_retraining_daemon",
    "tft_inference_daemon",
    "tft_trainer",
    "data_buffer",
    "drift_monitor",
)
DAEMONS = PROGRAMS[:2]
# A module imports only its own row or lower ones; a noun of the package that is not named here is row 2,
# in whichever folder of the package it lives.
ROWS = {
    **dict.fromkeys(DAEMONS, 6),
    "tft_trainer": 5,
    "service": 5,  # the inference daemon's wiring
    "training_export": 5,  # a step of the daemon in a process of its own
    "data_buffer": 4,
    "drift_monitor": 4,
    "forecaster": 3,
    "candidate": 3,
    "judgement": 3,
    "routing": 3,
    "scope": 3,
    "server": 3,
    "setting": 1,
    "setting_sources": 1,
    "drift_settings": 1,
    "remote_write_settings": 1,
    "trainer_settings": 1,
    "settings": 1,
    "schema": 1,
    "loop": 1,
    "logs": 1,
    "sdnotify": 1,
    "errors": 0,
    "clock": 0,
    "files": 0,
}
DEFAULT_ROW = 2
OWNERS = {
    "torch": {
        "checkpoint",
        "forecaster",
        "network",
        "networkblocks",
        "sweepblocks",
        "sweepnetwork",
        "training",
        "training_epochs",
        "training_state",
    },
    "pytorch_forecasting": {"network"},
    "lightning": {"training", "training_epochs"},
    "requests": {"client"},
    "psutil": {"hostload", "local_agent"},
    "fastapi": {"server"},
    "starlette": {"door", "server", "bodies", "feed"},
    "uvicorn": {"connections", "listener"},
    "msgspec": {"bodies", "board", "json_records", "rejected"},
    "prometheus_client": {  # the service makes the registry
        "retraining_telemetry",
        "service",
        "telemetry",
    },
    "crc32c": {"frames"},
    "google": {"prompb", "remote_write"},
    "scipy": set(),
    "sklearn": set(),
}
FROM_ROW_2_UP = ("pandas", "pyarrow")
DURABLE_OWNERS = {"files", "wal"}
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 40
VAGUE_NAMES = ("util", "helper", "common", "manager", "misc")


def paths() -> list[Path]:
    package = sorted((ROOT / "fleetcast").rglob("*.py"))
    return [*package, *(path for path in (ROOT / f"{name}.py" for name in PROGRAMS) if path.exists())]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in paths()}
every_module = pytest.mark.parametrize("name", sorted(MODULES))


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def noun(name: str) -> str:
    """Return a module's own name, wherever in the package it lives."""
    return name.rsplit(".", 1)[-1]


def row(name: str) -> int:
    return ROWS.get(noun(name), 0 if name == "fleetcast" else DEFAULT_ROW)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(tree: ast.AST, *, with_types: bool = True) -> Iterator[str]:
    """Yield every imported module, those inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                full if (full := f"{node.module}.{alias.name}") in MODULES else node.module
                for alias in node.names
            )
        elif with_types or not is_type_checking(node):
            yield from imports(node, with_types=with_types)


def own_imports(name: str, *, with_types: bool = True) -> set[str]:
    return {found for found in imports(tree_of(name), with_types=with_types) if found in MODULES} - {name}


def functions(name: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def attributes(name: str) -> Iterator[str]:
    return (ast.unparse(node) for node in ast.walk(tree_of(name)) if isinstance(node, ast.Attribute))


@every_module
def test_imports_point_down_the_layer_table(name: str) -> None:
    upward = {found for found in own_imports(name) if row(found) > row(name)}
    assert upward == set()


@every_module
def test_nobody_imports_a_daemon_or_the_trainer(name: str) -> None:
    assert own_imports(name) & {*DAEMONS, "tft_trainer"} == set()


def test_there_is_no_import_cycle() -> None:
    waiting = {name: own_imports(name, with_types=False) for name in MODULES}
    while free := {name for name, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {name: needs for name, needs in waiting.items() if name not in free}
    assert waiting == {}


@every_module
def test_a_third_party_library_is_imported_by_its_owner_only(name: str) -> None:
    libraries = {found.split(".")[0] for found in imports(tree_of(name))}
    foreign = {library for library in libraries & OWNERS.keys() if noun(name) not in OWNERS[library]}
    assert foreign == set()
    if row(name) < 2:
        assert libraries.isdisjoint(FROM_ROW_2_UP)


@every_module
def test_only_the_clock_reads_the_time(name: str) -> None:
    if noun(name) == "clock":
        return
    assert "time" not in set(imports(tree_of(name)))
    readers = ("datetime.now", "datetime.utcnow", "datetime.today", "date.today")
    assert [found for found in attributes(name) if found.endswith(readers)] == []


@every_module
def test_only_files_and_wal_make_things_durable(name: str) -> None:
    if noun(name) in DURABLE_OWNERS:
        return
    durable = ("os.replace", "os.rename", "os.fsync", "os.fdatasync")
    assert [found for found in attributes(name) if found in durable] == []
    assert "fcntl" not in set(imports(tree_of(name)))


@every_module
def test_nothing_unpickles_or_evaluates(name: str) -> None:
    assert {"cloudpickle", "joblib", "marshal", "shelve"}.isdisjoint(imports(tree_of(name)))
    calls = [node for node in ast.walk(tree_of(name)) if isinstance(node, ast.Call)]
    for call in calls:
        called = ast.unparse(call.func)
        assert called not in ("eval", "exec"), ast.unparse(call)
        assert not called.startswith("pickle."), ast.unparse(call)  # its exceptions may be caught
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if called == "torch.load":
            assert keywords.get("weights_only") == "True", ast.unparse(call)
        if called == "np.load":
            assert keywords.get("allow_pickle", "False") == "False", ast.unparse(call)


@every_module
def test_a_file_is_one_noun_of_readable_length(name: str) -> None:
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{MODULES[name].name} has {lines} lines: split it by noun"
    assert not any(vague in name for vague in VAGUE_NAMES)


@every_module
def test_functions_are_short(name: str) -> None:
    def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        body = node.body[1:] if ast.get_docstring(node) else node.body
        return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0

    long = {node.name: length(node) for node in functions(name) if length(node) > MAX_FUNCTION_LINES}
    assert long == {}


@every_module
def test_modules_classes_and_public_functions_say_what_they_do(name: str) -> None:
    tree = tree_of(name)
    assert ast.get_docstring(tree), "the module says nothing about itself"
    public = [
        node
        for scope in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef)))
        for node in scope.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
        and not any(
            "overload" in ast.unparse(item) or ".setter" in ast.unparse(item) for item in node.decorator_list
        )
    ]
    silent = [
        node.name for node in public if not ast.get_docstring(node) and not is_protocol_method(tree, node)
    ]
    assert silent == []


def is_protocol_method(tree: ast.Module, node: ast.AST) -> bool:
    protocols = [
        scope
        for scope in tree.body
        if isinstance(scope, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in scope.bases)
    ]
    # what a base class or protocol documents already
    inherited = ("now", "format", "forward", "training_step", "configure_optimizers", "on_train_epoch_end")
    return any(node in scope.body for scope in protocols) or getattr(node, "name", "") in inherited


@every_module
def test_errors_are_caught_narrowly(name: str) -> None:
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
            assert "BaseException" not in ast.unparse(node.type) or reraises(node), f"line {node.lineno}"


def reraises(handler: ast.ExceptHandler) -> bool:
    return any(isinstance(node, ast.Raise) and node.exc is None for node in ast.walk(handler))


@every_module
def test_there_is_no_leftover_and_no_emoji(name: str) -> None:
    text = MODULES[name].read_text(encoding="utf-8")
    assert "TODO" not in text
    assert "FIXME" not in text
    assert [char for char in text if ord(char) > 0x2BFF] == []


def loaded_after(code: str, tmp_path: Path) -> set[str]:
    """Return the modules a fresh interpreter holds after `code`."""
    watched = "import sys\n" + code + "\nprint('\\n' + ' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", watched],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_answers_without_torch_pandas_and_scipy(program: str, tmp_path: Path) -> None:
    code = (
        f"import runpy\nsys.argv = ['{program}.py', '--help']\n"
        f"try: runpy.run_path({str(ROOT / program)!r} + '.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
    )
    assert loaded_after(code, tmp_path).isdisjoint({"torch", "pandas", "scipy", "pyarrow", "lightning"})


@pytest.mark.parametrize("name", [*PROGRAMS, "fleetcast.sources.replay"])
def test_importing_does_nothing(name: str, tmp_path: Path) -> None:
    code = (
        f"import {name}, logging, threading, signal\n"
        "assert not logging.getLogger().handlers\n"
        "assert threading.active_count() == 1\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
    )
    assert loaded_after(code, tmp_path).isdisjoint({"torch", "scipy"})
    assert list(tmp_path.iterdir()) == []
