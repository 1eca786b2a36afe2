"""Class names across spellings, and fingerprints: what all generators share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

import torch
from torch import Tensor

from fedkeel.errors import PoolError

BUNDLED = Path(__file__).parent / "bundled"
HASHES = Path(__file__).parents[1] / "data/bundled"


def plain_name(name: str) -> str:
    """Letters and digits only, so that "T-shirt/top", "T - shirt / top" and the folder "t-shirt_top" are one class; a
    name without any, such as "+", is left whole."""
    folded = normalize("NFC", name).casefold()
    return "".join(letter for letter in folded if letter.isalnum()) or folded.strip()


def knows(wanted: Sequence[str], known: Sequence[str]) -> bool:
    """Whether each wanted class is among the known ones."""
    return {plain_name(name) for name in wanted} <= {plain_name(name) for name in known}


def match(wanted: Sequence[str], known: Sequence[str]) -> list[int]:
    """The position in `known` of each wanted class. Raises PoolError naming the missing ones and the known ones."""
    place = {plain_name(name): i for i, name in enumerate(known)}
    exact = {name: i for i, name in enumerate(known)}
    missing = [name for name in wanted if plain_name(name) not in place]
    if missing:
        raise PoolError(f"no images of {', '.join(missing)}; there are {', '.join(known) or 'no classes at all'}")
    return [exact.get(name, place[plain_name(name)]) for name in wanted]


def digest(*parts: str | int | bytes) -> str:
    """SHA-256 hex over the parts in order."""
    whole = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()


def marks(images: Tensor) -> Tensor:
    """[N] int64: the first eight bytes of the SHA-256 of each image's pixels (uint8 [N, C, H, W]), to know it by."""
    hashes = (hashlib.sha256(image.numpy().tobytes()).digest()[:8] for image in images.contiguous())
    return torch.tensor([int.from_bytes(each, "little", signed=True) for each in hashes], dtype=torch.int64)


def beside(path: Path) -> Tensor | None:
    """[N] int64 marks of the images that a file of the package, `<generator>-<data>.safetensors`, was made from, where
    the package holds them beside the data; None for other files."""
    found = HASHES / f"{path.stem.partition('-')[2]}-public-sha256.bin"
    if path.parent != BUNDLED or not found.is_file():
        return None
    return torch.frombuffer(bytearray(found.read_bytes()), dtype=torch.int64)
