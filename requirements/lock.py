# SPDX-License-Identifier: Apache-2.0
"""Writes the versions that `make` installs: lock-pyXY.txt and, on top, -torch.txt and -tpu.txt.

Run by `make lock` with the interpreter to lock for. Pins are names and versions only: which index
serves them is the reader's own pip configuration.
"""

import json
import pathlib
import subprocess
import sys
import tomllib

HERE = pathlib.Path(__file__).parent
PYTHON = f"{sys.version_info.major}{sys.version_info.minor}"

# The PyTorch the parity goldens were computed with; the extra in pyproject.toml allows newer ones.
ORACLE = ["torch==2.13.0"]

# What PyTorch needs on a GPU machine. It pins these itself, and its CPU build has none of them.
GPU_ONLY = ("nvidia-", "cuda-", "triton")


def resolve(requirements: list[str]) -> dict[str, str]:
    """The closure of `requirements` as pip resolves it for this interpreter: name -> version."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    command += ["--quiet", "--report", "-", *requirements]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    found = [item["metadata"] for item in report["install"]]
    return {
        item["name"].lower().replace("_", "-"): item["version"].partition("+")[0] for item in found
    }


def write(path: pathlib.Path, why: str, pins: dict[str, str]) -> None:
    """Writes sorted `name==version` lines under a two-line header."""
    lines = [f"# {why}", "# Written by `make lock`; do not edit."]
    lines += [f"{name}=={version}" for name, version in sorted(pins.items())]
    path.write_text("\n".join(lines) + "\n")
    print(f"{path}: {len(pins)} packages")


def main() -> None:
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    base = resolve(project["dependencies"] + extras["dev"])
    pinned = [f"{name}=={version}" for name, version in base.items()]
    oracle = {
        name: version
        for name, version in resolve(pinned + extras["torch"] + ORACLE).items()
        if name not in base and not name.startswith(GPU_ONLY)
    }
    compiler = {"libtpu": resolve(pinned + extras["tpu"])["libtpu"]}
    write(HERE / f"lock-py{PYTHON}.txt", "Everything to run and to develop apollo_jax.", base)
    write(HERE / f"lock-py{PYTHON}-torch.txt", "On top of it: what `make parity` needs.", oracle)
    write(HERE / f"lock-py{PYTHON}-tpu.txt", "Beside it: what `make tpu` needs.", compiler)


if __name__ == "__main__":
    main()
