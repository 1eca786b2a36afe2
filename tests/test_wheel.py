"""The wheel: it builds, carries every file of the package, and works where nothing else of ours is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from fedkeel import registry

BUNDLED = """
import fedkeel, torch
from importlib.resources import files
from fedkeel import registry
from fedkeel.data.fashion import Fashion
print(fedkeel.__file__)
data = Fashion().load()
print(data.fingerprint, len(data.train_y), len(data.test_y))
sources = [registry.get("generators", name)() for name in ("bundled", "gaussian")]
print(*(source.load(data.classes, data.shape, torch.device("cpu")).fingerprint() for source in sources))
print((files("fedkeel.experiments") / "demo.toml").read_text().count("="))
"""
"""What comes inside the package beside its code."""

pytestmark = pytest.mark.full
ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "fedkeel"


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, started away from the repository and its import paths."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    [found] = folder.glob("fedkeel-*.whl")
    return found


@pytest.fixture(scope="module")
def binaries(wheel: Path) -> Path:
    """The folder of programs of an empty environment into which only the wheel is installed.

    The dependencies come from the outer environment through a line in a .pth file: its site-packages follow ours on the
    path, and its own .pth files, the editable fedkeel among them, are not read.
    """
    folder = wheel.parent / "env"
    venv.create(folder, with_pip=False)
    inside = {"base": str(folder), "platbase": str(folder)}
    python = Path(sysconfig.get_path("scripts", "venv", inside)) / "python"
    install = ("install", "--quiet", "--no-index", "--no-deps", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=wheel.parent)
    site = Path(sysconfig.get_path("purelib", "venv", inside))
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "outer.pth").write_text("\n".join(sorted(outer)) + "\n")
    return python.parent


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    ours = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - info == ours
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_installed_wheel_imports(binaries: Path) -> None:
    code = "import fedkeel, importlib.metadata as m; print(fedkeel.__file__); print(m.version('fedkeel'))"
    place, version = run(binaries / "python", "-c", code, cwd=binaries).split()
    assert Path(place).is_relative_to(binaries.parent)
    assert version in [path.name.split("-")[1] for path in binaries.parent.parent.glob("fedkeel-*.whl")]


def ours(room: str, name: str) -> bool:
    """Whether it is fedkeel's, not another test's."""
    return registry.get(room, name).__module__.startswith("fedkeel.")


def test_every_room_of_the_installed_wheel_is_scanned(binaries: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from fedkeel import registry\n"
        "for room in registry.PACKAGES: print(room, Path(registry.__file__).parent, *registry.names(room))"
    )
    lines = [line.split() for line in run(binaries / "python", "-c", code, cwd=binaries).splitlines()]
    assert {line[0] for line in lines if len(line) > 2} == set(registry.PACKAGES)
    own = {room: [name for name in registry.names(room) if ours(room, name)] for room in registry.PACKAGES}
    assert {line[0]: line[2:] for line in lines} == own
    assert all(Path(line[1]).is_relative_to(binaries.parent) for line in lines)


def test_the_installed_wheel_has_its_data_generators_and_demo(binaries: Path) -> None:
    """Loaded in the empty environment, they are what they are here."""
    lines = [line.split() for line in run(binaries / "python", "-c", BUNDLED, cwd=binaries).splitlines()]
    here = subprocess.run([sys.executable, "-c", BUNDLED], capture_output=True, text=True, check=True).stdout
    assert len(lines) == 4
    assert Path(lines[0][0]).is_relative_to(binaries.parent)
    assert lines[1:] == [line.split() for line in here.splitlines()][1:]


def test_console_script(binaries: Path) -> None:
    assert "Usage" in run(binaries / "fedkeel", "--help", cwd=binaries)
