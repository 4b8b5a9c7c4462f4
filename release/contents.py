"""What an sdist and a wheel have to hold: everything that is needed, and nothing else."""

from __future__ import annotations

import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

LEFT_OUT = (".ci/", "bench/results/")  # of the sdist: pyproject.toml's sdist.exclude
PACKAGES = {"cit_fast/": "cit_fast/", "kernels/": "cit_fast/kernels/"}  # of the sdist, of the wheel
BUILT = re.compile(r"cit_fast/_native\.cpython-3\d+-[\w-]+\.so")
ABOUT = re.compile(r"cit_fast-[\w.]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/LICENSE)")


def tracked_files(root: Path) -> set[str]:
    """The files that git knows in a checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True)
    return set(listed.stdout.split("\0")) - {""}


def sdist_files(sdist: Path) -> set[str]:
    """The files of an sdist, as they are named in the checkout."""
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def sdist_problems(sdist: Path, tracked: set[str]) -> list[str]:
    """One line for each file that the sdist lacks or should not have.

    Args:
        tracked: what belongs to the project (:func:`tracked_files`).
    """
    wanted = {name for name in tracked if not name.startswith(LEFT_OUT)} | {"PKG-INFO"}
    return _differences(sdist.name, wanted, sdist_files(sdist))


def wheel_problems(wheel: Path, sources: set[str]) -> list[str]:
    """One line for each file that the wheel lacks or should not have.

    Args:
        sources: the files of the sdist it is built from.
    """
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if not name.endswith("/")}
    wanted = {
        installed + name.removeprefix(folder)
        for folder, installed in PACKAGES.items()
        for name in sources
        if name.startswith(folder)
    }
    made = {name for name in found if BUILT.fullmatch(name)}
    about = {name for name in found if ABOUT.fullmatch(name)}
    problems = _differences(wheel.name, wanted, found - made - about)
    if len(made) != 1:
        problems.append(f"{wheel.name}: expected one native module, found {sorted(made)}")
    if len(about) != 5:
        problems.append(f"{wheel.name}: expected five files about the package, found {sorted(about)}")
    return problems


def _differences(archive: str, wanted: set[str], found: set[str]) -> list[str]:
    return [
        *(f"{archive}: {name} is missing" for name in sorted(wanted - found)),
        *(f"{archive}: {name} does not belong there" for name in sorted(found - wanted)),
    ]
