"""Where weights of others come from: a local folder, else the hub's cache on this machine, else the hub if allowed.

Only safetensors are loaded: the older `.bin` files are pickles, which run code when read. Nothing here waits for the
network unless `download` is set, and then no longer than HUB_SECONDS for the hub's first answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedkeel.errors import ConfigError, DataError, MissingExtra

HUB_SECONDS = 10.0
"""How long the hub may take to say that a repository is there."""
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""How each library names the weights file of a model."""
SETTINGS = ("*.json", "*.txt", "*.model")
"""Configurations and tokenizers in a repository."""


def locate(
    name: str,
    revision: str,
    download: bool,
    missing: Callable[[Path], list[str]],
    *,
    key: str = "generator.model",
    patterns: Sequence[str] = (*SETTINGS, "*.safetensors"),
    skip: Sequence[str] = (),
) -> Path:
    """The folder that holds model `name`, which is a folder's path or the name of a hub repository.

    missing: the wanted files that a folder lacks, [] when it is whole; patterns, skip: what to fetch from the hub and
    what not; key: the option that named the model, for errors. Raises ConfigError for a name that cannot be one,
    DataError when the model is not there or not whole, with the command that fetches it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        lacking = missing(folder)
        if lacking:
            raise DataError(f"{key}: {folder} lacks {', '.join(lacking)}{_pickles(folder)}")
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise DataError(f"{key}: there is no folder {folder}")
    cached = _cached(name, revision, key)
    lacking = missing(cached) if cached else []
    if cached and not lacking:
        return cached
    command = fetch_command(name, revision, patterns, skip)
    if not download:
        state = (
            f"in the hub's cache lacks {', '.join(lacking)}{_pickles(cached)}" if cached else "is not on this machine"
        )
        raise DataError(
            f"{key}: {name} {state}. Fetch it with: {command} , or set generator.download = true, or name a folder"
        )
    return _fetch(name, revision, missing, key, patterns, skip, command)


def fetch_command(name: str, revision: str, patterns: Sequence[str], skip: Sequence[str] = ()) -> str:
    """What a user types to bring the model into the hub's cache."""
    words = ["hf download", name, *([f"--revision {revision}"] if revision else [])]
    words += [f'--include "{pattern}"' for pattern in patterns] + [f'--exclude "{pattern}"' for pattern in skip]
    return " ".join(words)


def weight_files(folder: Path, library: str, variant: str = "") -> list[Path]:
    """The safetensors files that `from_pretrained` would load from a model's folder, whether they are there or not.

    library: "diffusers" or "transformers"; variant: the part before the ending, as in `model.fp16.safetensors`.
    Raises DataError when the list of shards is damaged.
    """
    stem, part = STEMS[library], f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{part}.json"
    if not index.is_file():
        return [folder / f"{stem}{part}.safetensors"]
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is damaged: {error}") from error


def missing_model(folder: Path) -> list[str]:
    """What a folder lacks to be one transformers model: its configuration and its weights."""
    wanted = [folder / "config.json", *weight_files(folder, "transformers")]
    return [path.name for path in wanted if not path.is_file()]


def missing_tokenizer(folder: Path) -> list[str]:
    """What a folder lacks to be a tokenizer: its configuration, which says how long a text may be, and its words
    (tokenizer.json, vocab.json with merges.txt, vocab.txt, or a sentencepiece *.model)."""
    lacking = [] if (folder / "tokenizer_config.json").is_file() else ["tokenizer_config.json"]
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.txt").is_file() or any(folder.glob("*.model")):
        return lacking
    pair = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    return lacking + (["tokenizer.json"] if len(pair) == 2 else pair)


def check_weights(files: Iterable[Path]) -> None:
    """Raises DataError for a file that is truncated or no safetensors file; reads the headers only."""
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} is damaged or cut off ({error}): fetch it again") from error


def content_hash(files: Iterable[Path], root: Path) -> str:
    """SHA-256 hex over files by their paths below `root`: the same for a local folder and for the hub's cache.

    In a configuration the keys with a leading underscore (the library's version, where it was saved) do not count.
    """
    whole = hashlib.sha256()
    for path in sorted(files):
        whole.update(f"{path.relative_to(root).as_posix()}\n{_file_hash(path)}\n".encode())
    return whole.hexdigest()


def _file_hash(path: Path) -> str:
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # whoever loads it says what is wrong with it
            content = path.read_bytes().hex()
        if isinstance(content, dict):
            content = {key: value for key, value in content.items() if not key.startswith("_") or key == "_class_name"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    real = path.resolve()
    if real.parent.name == "blobs" and len(real.name) == 64:  # the hub's cache names large files by their SHA-256
        return real.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """diffusers and transformers without progress bars and remarks; what they say of broken weights is checked here."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(each, each.get_verbosity(), each.is_progress_bar_enabled()) for each in libraries]
    for each in libraries:
        each.set_verbosity_error()
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each, level, bar in before:
            each.set_verbosity(level)
            if bar:
                each.enable_progress_bar()


def need(*modules: str, what: str = "generator 'stable-diffusion'", extra: str = "diffusion") -> None:
    """Raises MissingExtra unless these modules can be imported. Also keeps the hub's library from reporting on us."""
    from importlib.util import find_spec

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if any(find_spec(module) is None for module in modules):
        raise MissingExtra(what, extra)


def _pickles(folder: Path) -> str:
    found = sorted({path.name for path in folder.glob("**/*.bin")})
    if not found:
        return ""
    return (
        f"; it holds {', '.join(found[:3])}, which are pickles and are not loaded: take a revision with safetensors, "
        f"or have the files converted (on the hub: the space safetensors/convert)"
    )


def _cached(name: str, revision: str, key: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:  # no file is asked for: which are wanted is checked by the caller, the library would want all there are
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ConfigError(key, name, "must be a folder that exists, or owner/name on the hub") from error


def _fetch(
    name: str,
    revision: str,
    missing: Callable[[Path], list[str]],
    key: str,
    patterns: Sequence[str],
    skip: Sequence[str],
    command: str,
) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    problem = _within(HUB_SECONDS, lambda: HfApi().model_info(name, revision=revision or None, timeout=HUB_SECONDS))
    if isinstance(problem, RevisionNotFoundError):
        raise DataError(f"{key}: {name} has no revision {revision!r} on the hub") from problem
    if isinstance(problem, RepositoryNotFoundError):
        raise DataError(f"{key}: the hub has no {name!r}, or it wants you to log in (hf auth login)") from problem
    if problem is not None:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise DataError(
            f"{key}: {name} is not on this machine and the hub cannot be reached ({reason}). "
            f"Where it can be, fetch it with: {command}"
        ) from problem
    try:
        folder = Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=list(patterns), ignore_patterns=list(skip)
            )
        )
    except Exception as error:  # the hub's library lets through whatever its HTTP client raises
        raise DataError(
            f"{key}: fetching {name} broke off ({error}); what came is kept, try again: {command}"
        ) from error
    lacking = missing(folder)
    if lacking:
        raise DataError(f"{key}: {name} on the hub lacks {', '.join(lacking)}: only safetensors are loaded")
    return folder


def _within(seconds: float, call: Callable[[], object]) -> Exception | None:
    """What went wrong with a call, TimeoutError when it did not come back: no timeout of its own covers name lookup."""
    outcome: list[Exception | None] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=run, daemon=True)  # left behind if it hangs
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else TimeoutError(f"no answer in {seconds:g} seconds")
