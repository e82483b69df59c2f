# SPDX-License-Identifier: Apache-2.0
"""What is installed is what was meant: the wheel, the locks, the wall between the packages."""

import ast
import importlib
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("apollo_jax", "data_pipeline")
LOCKS = {path.stem: path.read_text() for path in sorted((ROOT / "requirements").glob("lock-*.txt"))}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCES
]


def run(*command: str | pathlib.Path, cwd: pathlib.Path, pythonpath: pathlib.Path) -> str:
    """Standard output of a command that must succeed, with `pythonpath` before everything else."""
    environment = os.environ | {"PYTHONPATH": str(pythonpath), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """The wheel, built from the source tree."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out]
    run(*build, cwd=ROOT, pythonpath=ROOT)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> pathlib.Path:
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--target", target, wheel, cwd=wheel.parent, pythonpath=target)
    return target


def test_wheel_holds_the_two_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {*PACKAGES, f"apollo_jax-{PROJECT['version']}.dist-info"}
    files = {path for top in PACKAGES for path in (ROOT / top).rglob("*") if path.is_file()}
    files = {path for path in files if "__pycache__" not in path.parts}  # data files come along
    assert {path.relative_to(ROOT).as_posix() for path in files} <= set(names)


def test_installed_packages_import_from_another_directory(installed, tmp_path):
    code = "import apollo_jax as a, data_pipeline as d; print(a.__file__, d.__file__)"
    places = run(sys.executable, "-c", code, cwd=tmp_path, pythonpath=installed).split()
    assert places == [str(installed / name / "__init__.py") for name in PACKAGES]


def test_installed_cli_answers_from_another_directory(installed, tmp_path):
    help_text = run(
        sys.executable, "-m", "apollo_jax", "--help", cwd=tmp_path, pythonpath=installed
    )
    for verb in ("demo", "predecode", "train", "evaluate", "generate", "chat"):
        assert verb in help_text
    script = installed / "bin" / "apollo-jax"
    assert run(script, "--help", cwd=tmp_path, pythonpath=installed) == help_text


def test_installed_metadata(installed):
    (found,) = importlib.metadata.distributions(path=[str(installed)])
    assert found.version == PROJECT["version"]
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert found.metadata["License-File"] == "LICENSE"
    assert found.metadata["Requires-Python"] == PROJECT["requires-python"]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name):
    importlib.import_module(name)


def imported_names(path: pathlib.Path) -> set[str]:
    """The top-level packages that a source file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


def test_data_pipeline_never_imports_the_model_or_jax():
    for path in (ROOT / "data_pipeline").rglob("*.py"):
        assert not imported_names(path) & {"apollo_jax", "jax", "jaxlib", "flax", "torch"}, path


def test_data_pipeline_never_starts_a_jax_backend(tmp_path):
    # Grain imports jax by itself; what would take a chip away from the trainer is a backend.
    names = [name for name in MODULES if name.startswith("data_pipeline")]
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
assert "apollo_jax" not in sys.modules
bridge = sys.modules.get("jax._src.xla_bridge")
assert bridge is None or not bridge.backends_are_initialized()
"""
    run(sys.executable, "-c", code, cwd=tmp_path, pythonpath=ROOT)


def pins(lock: str) -> dict[str, str]:
    """name -> version of the lines of a lock."""
    lines = [line for line in lock.splitlines() if not line.startswith("#")]
    matches = [re.fullmatch(r"([a-z0-9.-]+)==([0-9][a-z0-9.]*)", line) for line in lines]
    bad = [line for line, match in zip(lines, matches, strict=True) if not match]
    assert not bad, f"not an exact version, or more than that: {bad}"
    return {canonicalize_name(match[1]): match[2] for match in matches if match}


@pytest.mark.parametrize("name", LOCKS)
def test_lock_is_names_and_versions_only(name):
    assert pins(LOCKS[name])
    assert "://" not in LOCKS[name]


@pytest.mark.parametrize("python", ["py311", "py312"])
def test_lock_satisfies_every_declared_dependency(python):
    extras = PROJECT["optional-dependencies"]
    locked = pins(LOCKS[f"lock-{python}"])
    oracle = pins(LOCKS[f"lock-{python}-torch"])
    for text in PROJECT["dependencies"] + extras["dev"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), text
    for text in extras["torch"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(oracle[canonicalize_name(requirement.name)]), text
    assert not locked.keys() & oracle.keys()


def test_locks_hold_the_two_supported_generations_of_jax():
    assert pins(LOCKS["lock-py311"])["jax"].startswith("0.10.")
    assert pins(LOCKS["lock-py312"])["jax"].startswith("0.12.")


def test_ci_runs_the_documented_commands():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = re.findall(r"^make (\w+)$", script.read_text(), flags=re.MULTILINE)
    assert commands == ["check", "test", "parity", "tpu"]
