"""What a generator costs on this machine, precision by precision: bytes held, seconds an image, peak memory, quality.

Each precision is measured in a fresh process, so that none hides another's peak memory or profits from its warm
caches: `measure_apart` starts one, `measure` is what runs in it. On CUDA the peak is that of the tensors
(torch.cuda.max_memory_allocated), on a CPU it is how much the process grew from before the generator was loaded; the
code of the libraries that a generator imports is in it, and memory mapped from weights files as far as it was read.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedkeel.errors import ConfigError, FedkeelError, RunError, UserError
from fedkeel.files import write_json, write_tensors
from fedkeel.generators.base import Generator
from fedkeel.options import build, plain
from fedkeel.records import Samples
from fedkeel.registry import get, name_of

if TYPE_CHECKING:
    from fedkeel.job import Job

PRECISIONS = ("fp32", "bf16", "uint4")
"""What is measured unless the user names others."""
SMALL, LARGE = 8, 64
"""Images asked for at once; many of a generator that makes two in less than QUICK seconds."""
QUICK = 2.0
TIMES = 3
"""Batches timed, at least."""


@dataclass(frozen=True)
class Cost:
    """One precision ("" for a generator that has none).

    bytes: held, by component. load: seconds to load it. seconds: wall time an image, the median over full batches of
    `batch`, after calls that do not count. per_core: images per CPU second of one core; None on other devices. peak:
    bytes. accuracy: of the reference classifier on the images. difference: mean absolute difference from the fp32
    images of the same seeds, in levels of 255. error: why it could not be measured; all else is then empty.
    """

    precision: str
    bytes: Mapping[str, int]
    load: float = math.nan
    seconds: float = math.nan
    per_core: float | None = None
    peak: int | None = None
    batch: int = 0
    images: int = 0
    accuracy: float | None = None
    difference: float | None = None
    error: str = ""

    def as_json(self) -> dict[str, object]:
        """Plain values; None for what is not known."""
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value for key, value in vars(self).items()
        }


def costs(
    job: Job,
    precisions: Sequence[str] | None = None,
    each: int = 8,
    generator: Generator | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Cost]:
    """A row for each precision of the run's generator, or of `generator`, on `each` images of every class.

    Raises ConfigError when there is no generator, or a precision it does not have; when none could be measured, an
    UserError or RunError with the reason of the first.
    """
    from fedkeel.evaluate import evaluate
    from fedkeel.generators.quality import reference

    versions = variants(generator or job.config.generator, precisions)
    found: list[Cost] = []
    pictures: dict[str, Tensor] = {}
    mistakes: list[bool] = []
    with tempfile.TemporaryDirectory(prefix="fedkeel-") as folder:
        for at, (precision, version) in enumerate(versions.items()):
            progress("precisions", at, len(versions))
            cost, images, mistake = measure_apart(job, precision, version, each, Path(folder))
            found.append(cost)
            mistakes.append(mistake)
            if images is not None:
                pictures[precision] = images
        progress("precisions", len(versions), len(versions))
    if not pictures:
        raise (UserError if mistakes[0] else RunError)(found[0].error)
    judge, labels = reference(job, progress=progress), _labels(len(job.data.classes), each)
    exact = pictures.get("fp32")
    out = []
    for cost in found:
        images = pictures.get(cost.precision)
        if images is not None:
            right = evaluate(judge, images, labels, job.data.classes, job.transform, job.device)["accuracy"]
            gap = None if exact is None else float((images.double() - exact.double()).abs().mean())
            cost = Cost(**{**vars(cost), "accuracy": right, "difference": gap})
        out.append(cost)
    return out


def variants(generator: Generator | None, precisions: Sequence[str] | None) -> dict[str, Generator]:
    """The generator in each precision, checked but not loaded. Raises ConfigError."""
    if generator is None:
        raise ConfigError("generator", None, "there is nothing to profile: name a generator (fedkeel list generators)")
    name = name_of("generators", type(generator))
    if "precision" not in {each.name for each in fields(generator)}:  # type: ignore[arg-type]
        if precisions is not None:
            raise ConfigError(
                "--precisions", ",".join(precisions), f"generator {name!r} has no precisions to choose from"
            )
        return {"": generator}
    asked = list(dict.fromkeys(PRECISIONS if precisions is None else precisions))
    if not asked:
        raise ConfigError("--precisions", "", "must name some, such as fp32,bf16,uint4")
    out: dict[str, Generator] = {}
    for precision in asked:
        try:
            out[precision] = build(type(generator), {**plain(generator), "precision": precision}, "generator")
        except ConfigError as error:
            if error.key != "generator.precision":
                raise
            raise ConfigError("--precisions", precision, error.allowed, error.near) from None
    return out


def measure_apart(
    job: Job, precision: str, generator: Generator, each: int, folder: Path
) -> tuple[Cost, Tensor | None, bool]:
    """`measure` in a process of its own: what it costs, its images, and whether a failure was the user's mistake."""
    public = job.data.public
    request = {
        "precision": precision,
        "name": name_of("generators", type(generator)),
        "options": plain(generator),
        "classes": job.data.classes,
        "shape": job.data.shape,
        "device": str(job.device),
        "threads": job.config.threads,
        "each": each,
        "public": public is not None,
    }
    work = folder / (precision or "only")
    write_json(work / "request.json", request)
    if public is not None:
        write_tensors(work / "public.safetensors", {"x": public.x, "y": public.y})
    done = subprocess.run(
        [sys.executable, "-m", "fedkeel.generators.cost", str(work)], capture_output=True, text=True, check=False
    )
    answer = work / "answer.json"
    if not answer.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()]
        how = f"was killed (signal {-done.returncode})" if done.returncode < 0 else f"ended with {done.returncode}"
        reason = f"the process {how}: {said[-1] if said else 'it said nothing'}"
        return Cost(precision, {}, error=reason), None, False
    found = json.loads(answer.read_text())
    if "mistake" in found:
        return Cost(precision, {}, error=found["error"]), None, bool(found["mistake"])
    from safetensors.torch import load_file

    return Cost(**found), load_file(work / "images.safetensors")["images"], False


def measure(
    precision: str,
    generator: Generator,
    classes: tuple[str, ...],
    shape: tuple[int, int, int],
    device: torch.device,
    each: int,
    public: Samples | None = None,
) -> tuple[Cost, Tensor]:
    """What it costs to load the generator and to make `each` images of every class, and the images
    ([classes * each, C, H, W] uint8, class by class)."""
    before = _forget_peak(device)
    start = time.perf_counter()
    source = generator.load(classes, shape, device, public)
    load = time.perf_counter() - start
    labels = _labels(len(classes), each).tolist()
    # batches mix classes as a run's do
    order = sorted(range(len(labels)), key=lambda row: row % each)
    images = torch.empty((len(labels), *shape), dtype=torch.uint8)

    def make(rows: Sequence[int]) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        images[torch.tensor(rows)] = source.generate([labels[row] for row in rows], [row % each for row in rows])
        return time.perf_counter() - wall, time.process_time() - cpu

    make(order[:2])  # the first call is slower than any other
    batch = LARGE if make(order[:2])[0] < QUICK else SMALL
    batches = max(TIMES, -(-len(order) // batch))  # all of them full: the last goes on with the first images
    spent = [make([order[(at * batch + row) % len(order)] for row in range(batch)]) for at in range(batches)]
    wall, cpu = (statistics.median(part) / batch for part in zip(*spent, strict=True))
    peak = _peak(device, before)
    cost = Cost(
        precision,
        source.memory_bytes(),
        load=load,
        seconds=wall,
        per_core=1 / max(cpu, 1e-9) if device.type == "cpu" else None,
        peak=peak,
        batch=batch,
        images=len(images),
    )
    return cost, images


def machine(job: Job) -> dict[str, object]:
    """On what and how it was measured."""
    card = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else ""
    return {
        "device": card or str(job.device),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": job.config.threads,
        "torch": torch.__version__,
    }


def _labels(classes: int, each: int) -> Tensor:
    return torch.arange(classes).repeat_interleave(each)


def _forget_peak(device: torch.device) -> int:
    """Starts a new measure of the peak; returns what is held now."""
    gc.collect()  # garbage that is freed during the measure would hide as much of its peak
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call] # a fresh process has no statistics yet, and asks in vain
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    with suppress(OSError):  # Linux only; elsewhere the peak so far is the start, as nothing large was held yet
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") or most()


def _peak(device: torch.device, before: int) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return max(0, (_status("VmHWM") or most()) - before)


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes, 0 where there is none."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def most() -> int:
    """The largest the process has been, in bytes; the unit of the system differs."""
    import resource  # POSIX only

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _main(work: Path) -> None:
    """The process of one measure: request.json in, answer.json and images.safetensors out."""
    from fedkeel.job import quiet

    quiet()
    request = json.loads((work / "request.json").read_text())
    torch.set_num_threads(request["threads"])
    try:
        public = None
        if request["public"]:
            from safetensors.torch import load_file

            parts = load_file(work / "public.safetensors")
            public = Samples.real_ones(parts["x"], parts["y"])
        generator: Generator = build(get("generators", request["name"]), request["options"], "generator")
        c, h, w = request["shape"]
        device = torch.device(request["device"])
        classes = tuple(request["classes"])
        cost, images = measure(request["precision"], generator, classes, (c, h, w), device, request["each"], public)
    except FedkeelError as error:
        write_json(work / "answer.json", {"error": str(error), "mistake": isinstance(error, UserError)})
        return
    write_tensors(work / "images.safetensors", {"images": images})
    write_json(work / "answer.json", asdict(cost))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
