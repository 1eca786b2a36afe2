"""ReGL's multimodal condition: a caption for every image and the mean of the image features of every class.

Yao: Recovering Global Data Distribution Locally in Federated Learning. 2024, arXiv 2409.14063, section 4.1.2: the
generator is tuned on "A photo of {class}, {BLIP2 caption}, {intra-class visual feature}". Captions come from BLIP-2
(Li et al. 2023, arXiv 2301.12597), features from CLIP's image encoder (Radford et al. 2021, arXiv 2103.00020).

Both models are read from safetensors: a local folder, else the cache of the Hugging Face hub, else the hub where the
options allow it. A caption is made once and kept in the user's cache, on the machine of the client whose image it is.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedkeel import files
from fedkeel.errors import DataError, PoolError
from fedkeel.files import write_json
from fedkeel.generators import hub
from fedkeel.generators.names import digest, plain_name
from fedkeel.generators.pipelines import held_bytes, is_memory
from fedkeel.records import Samples
from fedkeel.rng import Streams

if TYPE_CHECKING:
    from PIL.Image import Image

Part = TypeVar("Part")
Kind = TypeVar("Kind", "Captioner", "Encoder")

BATCH = 16
"""Images per pass through the captioner or the encoder, until memory runs out."""
TOKENS = 24
"""Tokens of a caption at most."""


@dataclass(frozen=True)
class Condition:
    """What one client knows of its images.

    captions: per class, the captions of its images in their order, "" where there is none. means: [C, D] float32, the
    mean feature of each class, of length sqrt(D); NaN for a class without images, None without an encoder.
    """

    captions: tuple[tuple[str, ...], ...]
    means: Tensor | None

    def visual(self, label: int, missing: str) -> Tensor | None:
        """[D]: the mean feature of a class. For one without images, by `missing` (R-08): "client_mean", the mean over
        the classes that have some, "none", nothing; None means that no token is appended, which zeros would not."""
        if self.means is None:
            return None
        owned = self.means.isfinite().all(1)
        if owned[label]:
            return self.means[label]
        if missing == "none" or not owned.any():
            return None
        return unit(self.means[owned].mean(0))


def unit(features: Tensor) -> Tensor:
    """[..., D] features at length sqrt(D), so that their entries are of the size of a text embedding's, which the text
    encoder's last layer norm leaves at a mean square of about 1."""
    scaled: Tensor = normalize(features, dim=-1) * features.shape[-1] ** 0.5
    return scaled


def phrase(prompt: str, caption: str) -> str:
    """The text for an image: "A photo of {class}, {caption}"."""
    return f"{prompt}, {caption}" if caption else prompt


def class_means(
    encode: Callable[[Tensor], Tensor], samples: Samples, classes: Sequence[str], most: int, streams: Streams
) -> Tensor:
    """[C, D] float32: per class the mean of the features of up to `most` of its images, drawn at random (REQ-10).

    encode: uint8 [N, C, H, W] to features [N, D]. Each feature counts with length 1, the mean has length sqrt(D); a
    class without images has NaN.
    """
    chosen = []
    for label, name in enumerate(classes):
        rows = (samples.y == label).nonzero()[:, 0]
        order = torch.randperm(len(rows), generator=streams("visual", plain_name(name)))
        chosen.append(rows[order[:most]])
    features = normalize(encode(samples.x[torch.cat(chosen)]).float(), dim=-1)
    means = torch.full((len(classes), features.shape[1]), torch.nan)
    start = 0
    for label, rows in enumerate(chosen):
        if len(rows):
            means[label] = unit(features[start : start + len(rows)].mean(0))
        start += len(rows)
    return means


class Describer:
    """A model that looks at images, up to `at_once` of them together."""

    key = ""
    """The option that names its weights."""

    def __init__(self, kind: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Raises DataError when the weights do not fit their configuration, PoolError when they do not into memory."""
        self.folder, self.device, self.at_once = folder, device, BATCH
        with self._fitting():
            self.model: Any = loaded(kind, folder, dtype).to(device)

    def back(self) -> None:
        """To its device, from where it waited. Raises PoolError when it does not fit into memory."""
        with self._fitting():
            self.model.to(self.device)

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_memory(error):
                raise
            raise PoolError(
                f"{self.key}: the model in {self.folder} does not fit into memory; name a smaller one, or none"
            ) from error

    def by_parts(self, x: Tensor, look: Callable[[Tensor], Part]) -> list[Part]:
        """What `look` makes of the images, part by part; smaller parts once memory ran out.

        Raises PoolError when a single image does not fit.
        """
        out: list[Part] = []
        done = 0
        while done < len(x):
            part = x[done : done + self.at_once]
            try:
                out.append(look(part))
            except (RuntimeError, MemoryError) as error:
                if not is_memory(error):
                    raise
                self._halve(len(part), error)
                continue
            done += len(part)
        return out

    def _halve(self, tried: int, error: BaseException) -> None:
        if tried == 1:
            raise PoolError(
                f"{self.key}: memory does not suffice to look at one image; name a smaller model, or none"
            ) from error
        self.at_once = tried // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(f"{self.key}: out of memory, going on with {self.at_once} images at a time", stacklevel=4)


class Encoder(Describer):
    """CLIP's image encoder with its projection: a CLIPModel or a CLIPVisionModelWithProjection."""

    key = "generator.image_encoder"

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Raises DataError when `folder` holds something else or is damaged."""
        import transformers

        kind = {"clip": "CLIPModel", "clip_vision_model": "CLIPVisionModelWithProjection"}.get(model_type(folder))
        if kind is None:
            raise DataError(f"{folder} holds a model of type {model_type(folder)!r}; image features need CLIP's")
        super().__init__(getattr(transformers, kind), folder, torch.float32, device)
        self.images: Any = part_of(folder, transformers.AutoImageProcessor)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """[N, D] float32 features on the CPU of uint8 images [N, C, H, W]. Raises PoolError when not finite."""
        features = torch.cat(self.by_parts(x, self._features))
        if not features.isfinite().all():
            raise PoolError("the image encoder returned features that are not finite")
        return features

    def _features(self, part: Tensor) -> Tensor:
        pixels = self.images(images=pictures(part), return_tensors="pt")["pixel_values"].to(self.device)
        if hasattr(self.model, "get_image_features"):
            made = self.model.get_image_features(pixel_values=pixels)
            made = getattr(made, "pooler_output", made)  # transformers 5 returns an output object, 4 a tensor
        else:
            made = self.model(pixel_values=pixels).image_embeds
        out: Tensor = made.float().cpu()
        return out


class Captioner(Describer):
    """BLIP-2 without a question: what is in the picture, in one phrase, the likeliest word at each step."""

    key = "generator.captioner"

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Raises DataError when `folder` holds something else or is damaged."""
        import transformers

        if model_type(folder) != "blip-2":
            raise DataError(f"{folder} holds a model of type {model_type(folder)!r}; captions need BLIP-2's")
        super().__init__(transformers.Blip2ForConditionalGeneration, folder, caption_dtype(device), device)
        self.images: Any = part_of(folder, transformers.AutoImageProcessor)
        self.tokenizer: Any = part_of(folder, transformers.AutoTokenizer)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> list[str]:
        """A caption for each of the uint8 images [N, C, H, W], "" where the model has nothing to say."""
        made = [caption for part in self.by_parts(x, self._said) for caption in part]
        return [" ".join(caption.split()).rstrip(" .") for caption in made]

    def _said(self, part: Tensor) -> list[str]:
        pixels = self.images(images=pictures(part), return_tensors="pt")["pixel_values"]
        ids = self.model.generate(
            pixel_values=pixels.to(self.device, self.model.dtype), max_new_tokens=TOKENS, do_sample=False
        )
        out: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return out


class Describers:
    """Captioner and encoder between one client and the next, so that 15 GB are read once and not for each.

    While another part of the work goes on they wait in the host's memory, and a GPU is free of them; where the host has
    no more free memory than they hold, they are let go and loaded anew.
    """

    def __init__(self) -> None:
        self._held: dict[type[Describer], Describer] = {}

    def captioner(self, folder: Path, device: torch.device) -> Captioner:
        """Raises as Captioner."""
        return self._get(Captioner, folder, device)

    def encoder(self, folder: Path, device: torch.device) -> Encoder:
        """Raises as Encoder."""
        return self._get(Encoder, folder, device)

    def rest(self) -> None:
        """Says that none is needed for now."""
        held = sum(held_bytes(each.model) for each in self._held.values())
        if free_memory() < held:
            self.release()
        for each in self._held.values():
            try:
                each.model.to("cpu")
            except (RuntimeError, MemoryError) as error:
                if not is_memory(error):
                    raise
                self.release()
                break

    def release(self) -> None:
        """Lets them go; the next client that needs them loads them anew."""
        self._held.clear()

    def _get(self, kind: type[Kind], folder: Path, device: torch.device) -> Kind:
        held = self._held.get(kind)
        if not isinstance(held, kind) or (held.folder, held.device) != (folder, device):
            self._held.pop(kind, None)
            held = self._held[kind] = kind(folder, device)
        held.back()
        return held


def free_memory() -> int:
    """Bytes of the host's memory that can be had without swapping; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)


def find(name: str, download: bool, key: str) -> Path:
    """The folder of a captioner or an encoder, as `hub.locate` finds it. name: a folder, or `owner/name` on the hub, or
    `owner/name@revision`; key: the option that says so.

    Raises ConfigError or DataError, naming what is missing and the command that fetches it.
    """
    hub.need("transformers", what="ReGL's condition (captions, image features)")

    def missing(folder: Path) -> list[str]:
        processor = ("preprocessor_config.json", "processor_config.json")
        lacking = [] if any((folder / each).is_file() for each in processor) else [processor[0]]
        if key == Captioner.key:
            lacking += hub.missing_tokenizer(folder)
        return hub.missing_model(folder) + lacking

    revision = ""
    if "@" in name and not Path(name).expanduser().is_dir():
        name, _, revision = name.rpartition("@")
    folder = hub.locate(name, revision, download, missing, key=key)
    hub.check_weights(hub.weight_files(folder, "transformers"))
    return folder


def caption_mark(folder: Path, device: torch.device) -> str:
    """SHA-256 hex over what decides a caption beside the image: the captioner's files, and how it is used."""
    return digest(content(folder), TOKENS, str(caption_dtype(device)))


@cache
def content(folder: Path) -> str:
    """SHA-256 hex over a model's files, once per process: the weights may be 15 GB, and many clients ask."""
    settings = [path for path in folder.glob("*.json") if not path.name.endswith(".index.json")]
    return hub.content_hash([*settings, *hub.weight_files(folder, "transformers")], folder)


def caption_dtype(device: torch.device) -> torch.dtype:
    """Half precision on a GPU, where BLIP-2 in float32 would take 15 GB."""
    return torch.float16 if device.type == "cuda" else torch.float32


def model_type(folder: Path) -> str:
    """What kind of model a folder says it holds, "" when it does not."""
    try:
        return str(json.loads((folder / "config.json").read_bytes()).get("model_type", ""))
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{folder / 'config.json'} is damaged: {error}") from error


def loaded(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A model from local safetensors, in evaluation mode. Raises DataError when weights are missing or do not fit."""
    try:
        with hub.quiet():
            model, info = kind.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if is_memory(error):
            raise
        raise DataError(f"{folder}: the model cannot be loaded: {error}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise DataError(f"{folder}: weights are missing: {', '.join(missing[:3])} ({len(missing)} in all)")
    return model.eval().requires_grad_(False)


def part_of(folder: Path, kind: Any) -> Any:
    """A processor or tokenizer from a local folder. Raises DataError."""
    try:
        with hub.quiet():
            return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: {kind.__name__} cannot be loaded: {error}") from error


def captions(x: Tensor, name: str, load: Callable[[], Callable[[Tensor], list[str]]]) -> list[str]:
    """A caption for each of the uint8 images [N, C, H, W], from the user's cache (files.cache) where it is there.

    name: the captioner's fingerprint; load: makes it, called only when a caption is missing. There is one JSON file per
    captioner, captions by the SHA-256 of the image, written every few hundred: an interruption loses those since.
    """
    path = files.cache() / "captions" / f"{name[:16]}.json"
    known = kept(path)
    keys = [image_key(image) for image in x]
    missing = list({key: row for row, key in enumerate(keys) if key not in known}.values())
    describe = load() if missing else None
    for start in range(0, len(missing), 16 * BATCH):
        assert describe is not None
        rows = missing[start : start + 16 * BATCH]
        made = dict(zip((keys[row] for row in rows), describe(x[rows]), strict=True))
        known = {**kept(path), **known, **made}  # another process may have written since
        write_json(path, known)
    return [known[key] for key in keys]


def kept(path: Path) -> dict[str, str]:
    """The captions at `path`; none when there is no such file or it is damaged, they can be made again."""
    try:
        return {str(key): str(value) for key, value in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def image_key(image: Tensor) -> str:
    """SHA-256 hex of a uint8 image's shape and pixels."""
    shape = "x".join(str(side) for side in image.shape)
    return hashlib.sha256(shape.encode() + image.contiguous().numpy().tobytes()).hexdigest()


def rgb(x: Tensor) -> Tensor:
    """[N, 3, H, W]: grey images three times over."""
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


def pictures(x: Tensor) -> list[Image]:
    """uint8 images [N, C, H, W] as the libraries want them."""
    from PIL import Image

    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in rgb(x)]
