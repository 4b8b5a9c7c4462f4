"""``make wheel``: the sdist, and from it wheels, repaired, checked and tried, into ``dist/``.

With docker cibuildwheel makes them all, as pyproject.toml says. Without, each CPython that is here makes its own, whose
glibc is this machine's; what could not be built or tried is said at the end.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from release.contents import sdist_files, sdist_problems, tracked_files, wheel_problems

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
BIN = Path(sys.executable).parent
TORCH = os.environ.get("TORCH") or "torch>=2.11,<3"
TORCH_INDEX = os.environ.get("TORCH_INDEX")
OFF = "cmake.define.CIT_FAST_CUDA=OFF"
# Says a version, where it is a CPython with its headers and pip's venv.
PROBE = """
import os, sys, sysconfig, ensurepip
header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
print("%d.%d" % sys.version_info[:2] if sys.implementation.name == "cpython" and os.path.exists(header) else "")
"""


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def run(command: Iterable[object], environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
    subprocess.run([str(word) for word in command], check=True, env=environment, cwd=cwd)


def works(command: Iterable[object]) -> bool:
    done = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True)
    return done.returncode == 0


def wanted_versions() -> list[str]:
    """The versions of CPython that pyproject.toml tells cibuildwheel."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return [f"3.{minor}" for minor in re.findall(r'"cp3(\d+)-manylinux\*"', text)]


def version_of(python: Path) -> str | None:
    """The version of an interpreter that can build a wheel; ``None`` for any other file."""
    done = subprocess.run([str(python), "-c", PROBE], check=False, capture_output=True, text=True)
    return done.stdout.strip() or None if done.returncode == 0 else None


def interpreters(given: list[str]) -> dict[str, Path]:
    """An interpreter for each version that is here: those given, or those on the PATH, of pyenv and of uv."""
    candidates = [Path(name) for name in given]
    if not given:
        names = [f"python{version}" for version in wanted_versions()]
        folders = [Path(folder) for folder in os.get_exec_path()]
        for kept in (".pyenv/versions", ".local/share/uv/python"):
            folders += sorted(Path.home().glob(f"{kept}/*/bin"))
        candidates = [folder / name for name in names for folder in folders if (folder / name).is_file()]
    found: dict[str, Path] = {}
    for candidate in candidates:
        version = version_of(candidate)
        if version is not None:
            found.setdefault(version, candidate)
    return found


def build_sdist() -> Path:
    run([sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT])
    (sdist,) = DIST.glob("*.tar.gz")
    return sdist


def build_wheel(python: Path, sdist: Path, folder: Path) -> Path:
    """The wheel that one interpreter makes of the sdist, repaired, in ``dist/``."""
    run([BIN / "uv", "build", "--quiet", "--wheel", "--python", python, "-C", OFF, "--out-dir", folder / "raw", sdist])
    (raw,) = (folder / "raw").glob("*.whl")
    # Without libgomp, which torch brings (CMakeLists.txt).
    repair = [BIN / "auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", folder / "repaired", raw]
    run(repair, {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"})
    (repaired,) = (folder / "repaired").glob("*.whl")
    return Path(shutil.copy(repaired, DIST))


def install_torch(python: Path) -> bool:
    """The CPU build of torch, as `make setup` has it; whether there is one. Never gigabytes of CUDA instead."""
    uv = [BIN / "uv", "pip", "install", "--quiet", "--python", python]
    if TORCH_INDEX:
        return works([*uv, "--index-url", TORCH_INDEX, TORCH])
    pip = [python, "-m", "pip", "install", "--quiet", "--only-binary", "torch", f"{TORCH}+cpu"]
    return works([*uv, "--torch-backend", "cpu", TORCH]) or ("==" in TORCH and works(pip))


def try_wheel(python: Path, wheel: Path, folder: Path) -> bool:
    """Install it into a fresh environment and use it there, with no compiler; whether all of it was tried."""
    run([python, "-m", "venv", folder / "venv"])
    venv = folder / "venv" / "bin"
    environment = {**os.environ, "PATH": str(venv), "CC": "/bin/false", "CXX": "/bin/false"}
    environment.pop("PYTHONPATH", None)
    smoke: list[object] = [venv / "python", ROOT / "release" / "smoke.py"]
    if not install_torch(venv / "python"):
        run([venv / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel], environment)
        (module,) = folder.glob("venv/lib/*/site-packages/cit_fast/_native.*.so")
        run([*smoke, "--module", module], environment, cwd=folder)
        return False
    run([BIN / "uv", "pip", "install", "--quiet", "--python", venv / "python", wheel], environment)
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from toy_folders import bpe_tokenizer, llama_folder

    model = llama_folder(folder / "model", bpe_tokenizer(["user system assistant"], 300))
    run([*smoke, model], environment, cwd=folder)
    return True


def build_here(sdist: Path, given: list[str]) -> list[str]:
    """Wheels of the interpreters that are here; what has not been done, a line each."""
    found, left = interpreters(given), []
    for version in wanted_versions():
        if version not in found:
            left.append(f"CPython {version}: no interpreter with headers here, so no wheel")
            continue
        say(f"CPython {version}, {found[version]}")
        with tempfile.TemporaryDirectory() as folder:
            wheel = build_wheel(found[version], sdist, Path(folder))
            problems = wheel_problems(wheel, sdist_files(sdist))
            if problems:
                sys.exit("\n".join(problems))
            if not try_wheel(found[version], wheel, Path(folder)):
                left.append(f"CPython {version}: built, but only loaded: no CPU build of {TORCH} to be had for it here")
    return left


def main(given: list[str]) -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    say("sdist")
    sdist = build_sdist()
    problems = sdist_problems(sdist, tracked_files(ROOT))
    if problems:
        sys.exit("\n".join(problems))
    left = []
    if not given and works(["docker", "version"]):
        say("wheels in docker")
        run([sys.executable, "-m", "cibuildwheel", "--platform", "linux", "--output-dir", DIST, sdist])
    else:
        left = build_here(sdist, given)
    run([sys.executable, "-m", "twine", "check", "--strict", *sorted(DIST.iterdir())])
    for path in sorted(DIST.iterdir()):
        say(f"dist/{path.name}, {path.stat().st_size / 1e6:.1f} MB")
    for line in left:
        say(line)
    if not list(DIST.glob("*.whl")):
        sys.exit("no wheel was built")


if __name__ == "__main__":
    main(sys.argv[1:])
