"""The sdist and the wheel made of it hold what they should, and the wheel works where no compiler is.

`make wheel` does this with an environment of its own for each version of Python, and repairs the wheels (release/).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from cit_fast import __version__, _native

sys.path.insert(0, str(Path(__file__).parents[1]))  # what makes releases is no package of the wheel
from release.build import interpreters, wanted_versions
from release.contents import sdist_files, sdist_problems, tracked_files, wheel_problems

ROOT = Path(__file__).parents[1]
needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist of this checkout, and the wheel made of it, but without compiling: that takes a minute or two."""
    folder = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "-C",
        "wheel.cmake=false",
        "--outdir",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
@needs_git
def test_what_the_sdist_and_the_wheel_hold(built, tmp_path):
    sdist, wheel = built
    assert sdist.name == f"cit_fast-{__version__}.tar.gz"
    assert wheel.name.startswith(f"cit_fast-{__version__}-")
    # A file that nobody has added to git yet is in the sdist of a developer, and no fault of the build.
    untracked = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    tracked = tracked_files(ROOT) | {name for name in untracked if not name.startswith(("bench/results/", ".ci/"))}
    tracked = {name for name in tracked if (ROOT / name).exists()}
    assert sdist_problems(sdist, tracked) == []
    sources = sdist_files(sdist)
    assert {
        "csrc/cuda/balance_ema/balance_ema.cu", "csrc/cpu/parallel.h", "CMakeLists.txt", "LICENSE",
        "cit_fast/py.typed", "cit_fast/methods/presets.yaml", "cit_fast/data/streams/trace-8.yaml",
        "cit_fast/data/builtin/words.py", "cit_fast/report/page.html.j2", "kernels/balance_ema.py",
    } <= sources  # fmt: skip
    assert wheel_problems(wheel, sources) == [f"{wheel.name}: expected one native module, found []"]
    with zipfile.ZipFile(wheel, "a") as whole:
        whole.writestr(f"cit_fast/{Path(_native.__file__).name}", "")
    assert wheel_problems(wheel, sources) == []

    # What lacks a file, or has one too many, is told.
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(tmp_path / wheel.name, "w") as damaged:
        for name in whole.namelist():
            if name != "cit_fast/methods/presets.yaml":
                damaged.writestr(name, "")
        damaged.writestr("tests/test_wheel.py", "")
    assert wheel_problems(tmp_path / wheel.name, sources) == [
        f"{wheel.name}: cit_fast/methods/presets.yaml is missing",
        f"{wheel.name}: tests/test_wheel.py does not belong there",
    ]
    with tarfile.open(tmp_path / sdist.name, "w:gz") as damaged:
        damaged.add(ROOT / "LICENSE", f"cit_fast-{__version__}/.venv/LICENSE")
    problems = sdist_problems(tmp_path / sdist.name, tracked)
    assert f"{sdist.name}: csrc/cpu/parallel.h is missing" in problems
    assert problems[-1] == f"{sdist.name}: .venv/LICENSE does not belong there"


@pytest.mark.slow
def test_the_wheel_works_without_a_compiler(built, tiny_model_folder, tmp_path):
    """In an environment that sees this one's packages, but of its cit-fast has the native module alone."""
    made = tmp_path / "venv"
    venv.create(made, symlinks=True)
    without = {**os.environ, "PATH": str(made / "bin"), "CC": "/bin/false", "CXX": "/bin/false"}
    without.pop("PYTHONPATH", None)
    pip = [sys.executable, "-m", "pip", "--python", str(made / "bin" / "python"), "install", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(built[1])], check=True, capture_output=True, env=without)
    # A .pth file of a folder that a .pth file names is not read, and so not that of the editable installation.
    (packages,) = made.glob("lib/python*/site-packages")
    shutil.copy(_native.__file__, packages / "cit_fast")
    others = Path(sysconfig.get_paths()["purelib"])
    (packages / "others.pth").write_text(str(others))
    (packages / "torch").symlink_to(others / "torch")  # beside cit-fast, as in any real environment
    done = subprocess.run(
        [str(made / "bin" / "python"), str(ROOT / "release" / "smoke.py"), str(tiny_model_folder)],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**without, "CIT_FAST_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "one OpenMP runtime, torch's" in done.stdout
    assert "cit-fast run: two stages, reported" in done.stdout


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_a_source_build_without_a_compiler_says_so(tmp_path):
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path)]
    environment = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "no C++ compiler works here. Install one" in said
    again = subprocess.run([*command, "-DCIT_FAST_SANITIZE=ON"], check=False, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr  # one that was installed since


def test_versions_are_written_once():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert wanted_versions() == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    assert f'requires-python = ">={wanted_versions()[0]}"' in text
    here = f"3.{sys.version_info.minor}"
    assert set(interpreters([sys.executable, "/bin/false"])) <= {here}
