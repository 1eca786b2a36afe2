"""What works on this machine, and the command that mends what does not."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

EXTRAS = {
    "diffusion": ("diffusers", "transformers", "peft", "accelerate", "sdnq"),
    "nf4": ("bitsandbytes",),
    "track": ("tensorboard", "mlflow"),
    "flower": ("flwr",),
    "ray": ("ray",),
    "dp": ("dp_accounting",),
}
"""What each extra of pyproject.toml brings, by the names under which it is imported."""
CORE = (
    "torch",
    "numpy",
    "safetensors",
    "datasets",
    "PIL",
    "typer",
    "rich",
    "tomli_w",
    "sklearn",
    "matplotlib",
    "plotly",
)
LITTLE = 2 << 30
"""Bytes free on a disk below which a run is likely to fill it."""


@dataclass(frozen=True)
class Check:
    """One finding. absent: something optional is not there; broken: fedkeel cannot work as it should."""

    name: str
    state: Literal["ok", "absent", "broken"]
    found: str
    mend: str = ""


def examine() -> list[Check]:
    """All checks, each of them whatever becomes of the others."""
    out = [_core()]
    if out[0].state == "ok":
        out += [_guarded(name, check) for name, check in _CHECKS.items()]
    return out + [_extra(name, packages) for name, packages in EXTRAS.items()]


def _core() -> Check:
    missing = [name for name in CORE if find_spec(name) is None]
    if missing:
        return Check("python", "broken", f"missing: {', '.join(missing)}", "pip install fedkeel")
    return Check("python", "ok", f"{platform.python_version()}, fedkeel {_version('fedkeel')}")


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        return Check(name, "broken", f"{type(error).__name__}: {error}", "pip install --force-reinstall fedkeel")


def _torch() -> Check:
    import torch

    devices = [f"{torch.cuda.get_device_name(i)} (cuda:{i})" for i in range(torch.cuda.device_count())]
    devices += ["Apple GPU (mps)"] if torch.backends.mps.is_available() else []
    return Check("torch", "ok", f"{torch.__version__}, {', '.join(devices) or 'no GPU: runs on the CPU'}")


def _threads() -> Check:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("threads", "ok", f"{cores} cores to use; PyTorch uses {torch.get_num_threads()}, a run config.threads")


def _data() -> Check:
    from fedkeel.data.fashion import Fashion

    data = Fashion().load()
    return Check("bundled data", "ok", f"fashion: {len(data.train_y)} train and {len(data.test_y)} test images")


def _generator() -> Check:
    import torch

    from fedkeel import registry
    from fedkeel.data.fashion import Fashion

    data = Fashion(train_limit=10, test_limit=10).load()
    source = registry.get("generators", "bundled")().load(data.classes, data.shape, torch.device("cpu"))
    source.generate([0], [0])
    size = sum(source.memory_bytes().values()) / 1e6
    return Check("bundled generator", "ok", f"fashion: {size:.1f} MB in memory")


def _cache() -> Check:
    from fedkeel.files import cache

    place = cache()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place):
            pass
    except OSError as error:
        return Check("cache", "broken", f"{place}: {error.strerror}", "export FEDKEEL_CACHE=FOLDER")
    return Check("cache", "ok", f"{place} can be written")


def _disk() -> Check:
    from fedkeel.files import cache

    places = {"here": Path.cwd(), "cache": cache()}
    free = {name: shutil.disk_usage(place).free for name, place in places.items() if place.exists()}
    found = ", ".join(f"{name} {size / 1e9:.1f} GB free" for name, size in free.items())
    if min(free.values()) < LITTLE:
        return Check("disk", "absent", found, "free some space, or set runs_dir and FEDKEEL_CACHE to another disk")
    return Check("disk", "ok", found)


def _pools() -> Check:
    from fedkeel.files import cache

    pools = [path.parent for path in sorted((cache() / "pools").glob("*/pool.json"))]
    size = sum(file.stat().st_size for pool in pools for file in pool.iterdir())
    held = f"{len(pools)}, {size / 1e6:.0f} MB, in {cache() / 'pools'}" if pools else "none yet"
    return Check("image pools", "ok", held)


def _cifar10() -> Check:
    from fedkeel.data.cifar10 import complete, vacant
    from fedkeel.files import cache

    place = cache() / "cifar10"
    if complete(place):
        return Check("cifar10", "ok", str(place))
    if not vacant(place):
        mend = f"rm -r {place}; fedkeel data get cifar10"
        return Check("cifar10", "absent", f"{place} is there, without all of its files", mend)
    return Check("cifar10", "absent", "not fetched", "fedkeel data get cifar10")


_CHECKS = {
    "torch": _torch,
    "threads": _threads,
    "bundled data": _data,
    "bundled generator": _generator,
    "cache": _cache,
    "disk": _disk,
    "image pools": _pools,
    "cifar10": _cifar10,
}


def _extra(name: str, packages: tuple[str, ...]) -> Check:
    there = {package: find_spec(package) is not None for package in packages}
    if all(there.values()):
        return Check(f"extra {name}", "ok", ", ".join(f"{package} {_version(package)}" for package in packages))
    missing = ", ".join(package for package, found in there.items() if not found)
    return Check(f"extra {name}", "absent", f"not installed: {missing}", f"pip install 'fedkeel[{name}]'")


def _version(package: str) -> str:
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return "of unknown version"
