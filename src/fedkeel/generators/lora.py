"""Tuning Stable Diffusion on a client's own images: ReGL (FT).

Yao: Recovering Global Data Distribution Locally in Federated Learning. 2024, arXiv 2409.14063, section 4.1.2. Low-rank
adapters (Hu et al., "LoRA", arXiv 2106.09685) on the U-Net's attention learn to predict the noise of the client's
images, given "A photo of {class}, {caption}, {intra-class visual mean}". What the paper leaves open is read as R-07 and
R-08 say (docs/fine-tuning.md):

- The visual mean passes a linear layer, trained with the adapter, and becomes one token after the text's.
- Caption and token are each left out of a share of the training samples, so that images can be made without them.
  A token that is left out is not there: the sequence is shorter. Zeros would take part in attention. So it is with
  the unconditional half of guidance, where the token's place is masked.
- When images are made the adapter counts `lora_scale`; at 0 the token goes too, and the images are the untuned ones.

One pipeline serves any number of clients: an adapter is put into the U-Net while its source makes images, and taken out
again. Adapters, features and captions stay on the client: they can give its images away.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fedkeel.errors import PoolError
from fedkeel.files import write
from fedkeel.generators import hub, pipelines
from fedkeel.generators.condition import (
    Condition,
    caption_mark,
    captions,
    class_means,
    content,
    find,
    phrase,
    rgb,
)
from fedkeel.generators.diffusion import DiffusionSource, StableDiffusion
from fedkeel.generators.flow_tuning import finished, read, stopped
from fedkeel.generators.names import digest
from fedkeel.records import Samples
from fedkeel.rng import Streams, isolated, stream_seed

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""The layers of the U-Net that are adapted: the projections of its self- and cross-attention."""
NAME = "client"
"""The adapter's name within peft."""
EVERY = 50
"""Steps between two savings of a tuning under way."""
SEEN = 32
"""Images whose features make a class's mean, at most."""
HALF_SCALE = 1024.0
"""By what the loss is multiplied in float16, where small gradients would be lost otherwise."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Adapter:
    """What a client's tuning has learned.

    tensors: "lora <layer>" and, with an image token, "token weight" [D, E] and "token bias" [D], float32 on the CPU.
    losses: [steps] of each step. stopped: "steps" when all were done, "budget" when time was over.
    """

    tensors: Mapping[str, Tensor]
    condition: Condition
    losses: Tensor
    rank: int
    alpha: float
    stopped: str = "steps"

    def token(self, feature: Tensor) -> Tensor:
        """[D] the image token of a visual mean [E]."""
        return F.linear(feature, self.tensors["token weight"], self.tensors["token bias"])

    def digest(self) -> str:
        """SHA-256 hex over all that images are made from."""
        parts: list[str | bytes] = []
        for name, tensor in sorted({**self.tensors, **_means(self.condition)}.items()):
            parts += [name, tensor.numpy().tobytes()]
        return digest("adapter", len(self.losses), str(self.alpha), json.dumps(self.condition.captions), *parts)


class TunedSource(DiffusionSource):
    """A pipeline with one client's adapter, a `Source`; it shares the pipeline with the source it was tuned from."""

    def __init__(self, base: DiffusionSource, adapter: Adapter) -> None:
        self.base, at_once = base, base.batch
        super().__init__(base.options, base.pipe, base.weights, base.classes, base.shape)
        self.adapter, self._texts, self.batch = adapter, base._texts, at_once
        self.describers = base.describers
        self.tuned = base.options.lora_scale > 0 and len(adapter.losses) > 0
        """Whether the adapter changes anything."""

    @property
    def batch(self) -> int:
        """Images per pass: what memory has room for is the same for all that share the pipeline."""
        return self.base.batch

    @batch.setter
    def batch(self, value: int) -> None:
        self.base.batch = value

    def generate(self, labels: Sequence[int], indices: Sequence[int]) -> Tensor:
        """[N, C, H, W] uint8 on the CPU; see DiffusionSource."""
        if not self.tuned:
            return self.base.generate(labels, indices)
        unet, adapter = self.pipe.unet, self.adapter
        tokens = self.encode([self.options.negative]).shape[1]
        with attached(unet, adapter.rank, adapter.alpha, self.options.lora_scale) as places, masked(self.pipe, tokens):
            for name, place in places.items():
                place.data.copy_(adapter.tensors[name])
            return super().generate(labels, indices)

    def condition(self, label: int, index: int) -> str | Tensor:
        """[T, D]: the text's tokens and, where there is a visual mean, one more."""
        options, own = self.options, self.adapter.condition
        text = self.prompt(label)
        said = [caption for caption in own.captions[label] if caption]
        if options.caption == "sampled" and said:
            text = phrase(text, said[stream_seed(options.seed, "caption", self._names[label], index) % len(said)])
        embedding = self.encode([text])[0]
        feature = own.visual(label, options.visual_missing)
        if feature is None:
            return embedding
        return torch.cat([embedding, self.adapter.token(feature).to(embedding)[None]])

    def memory_bytes(self) -> dict[str, int]:
        """The pipeline's components, and the adapter with its visual means."""
        tensors = [*self.adapter.tensors.values(), *_means(self.adapter.condition).values()]
        return {**self.base.memory_bytes(), "adapter": sum(each.numel() * each.element_size() for each in tensors)}

    def fingerprint(self) -> str:
        """Over the base's, what was learned, and the options that decide what is made of it."""
        o = self.options
        return digest(self.base.fingerprint(), self.adapter.digest(), str(o.lora_scale), o.caption, o.visual_missing)


def tune(
    source: DiffusionSource,
    samples: Samples,
    seed: int,
    keep: Path | None = None,
    budget: float | None = None,
    progress: Progress | None = None,
) -> TunedSource:
    """`source` tuned on a client's own images by the options lora_*, captioner, image_encoder; see `Tunable`.

    A tuning that is killed goes on from its last saving, and ends with the bits of one that was not. Raises DataError
    when captioner or encoder are not there; PoolError when there are no images, the losses are not finite, `keep`
    holds another tuning, or a single image does not fit into memory.
    """
    if not len(samples):
        raise PoolError("there are no images to tune the generator on")
    hub.need("peft", what="tuning a client's generator")
    began = time.perf_counter()
    recipe = source.recipe(samples, seed)
    if keep is not None:
        done = finished(keep.with_name(f"{keep.name}.safetensors"), recipe, budget)
        if done is not None:
            return TunedSource(source, _adapter(*done))
    part = None if keep is None else keep.with_name(f"{keep.name}.part.safetensors")
    under_way = None if part is None else read(part, recipe)
    o = source.options
    if not o.captioner and not (o.image_encoder and o.fuse == "token"):
        warnings.warn(
            "tuned on the class's text alone: generator.captioner and generator.image_encoder name no weights "
            "(docs/fine-tuning.md)",
            stacklevel=3,
        )
    tuning = Tuning(source, samples, seed, under_way)
    with differentiable(source.pipe.unet):
        adapter, seconds = tuning.run(began, budget, progress, part, recipe)
    if keep is not None and part is not None:
        tensors, note = _stored(adapter)
        note |= {"recipe": recipe, "of": str(o.lora_steps), "seconds": str(seconds)}
        write(keep.with_name(f"{keep.name}.safetensors"), save(tensors, note))
        if adapter.stopped == "steps":
            part.unlink(missing_ok=True)
    return TunedSource(source, adapter)


class Tuning:
    """One client's tuning under way: its images as latents, its condition, what is trained."""

    def __init__(
        self,
        source: DiffusionSource,
        samples: Samples,
        seed: int,
        under_way: tuple[dict[str, Tensor], dict[str, str]] | None,
    ) -> None:
        self.source, self.options, self.streams = source, source.options, Streams(seed)
        options, pipe = source.options, source.pipe
        self.unet, self.device, self.dtype = pipe.unet, source.device, source.encode([source.prompt(0)]).dtype
        # every image once before any comes twice; those that no step sees are neither captioned nor encoded
        wanted, order = options.lora_steps * options.lora_batch, []
        for epoch in range(-(-wanted // len(samples))):
            order.append(torch.randperm(len(samples), generator=self.streams("tune-order", epoch)))
        rows, self.order = torch.unique(torch.cat(order)[:wanted], return_inverse=True)
        self.labels = samples.y[rows].tolist()
        self.schedule = Schedule.of(source.pipe.scheduler)  # as in `recipe`: how images are made changes no tuning
        if under_way is None:
            self.captions, means = describe(source, samples, samples.x[rows], self.streams)
        else:
            self.captions = json.loads(under_way[1]["image captions"])
            means = under_way[0].get("means")
        by_class: list[list[str]] = [[] for _ in source.classes]
        for label, caption in zip(self.labels, self.captions, strict=True):
            by_class[label].append(caption)
        self.condition = Condition(tuple(map(tuple, by_class)), means)
        self.mean, self.spread = encoded(source, samples.x[rows])
        self.start = under_way
        self.at_once = options.lora_batch
        """Samples that pass through the U-Net together; fewer once memory ran out."""

    def run(
        self, began: float, budget: float | None, progress: Progress | None, part: Path | None, recipe: str
    ) -> tuple[Adapter, float]:
        """Trains until all steps are done or the time is over, and says how many seconds it took in all."""
        o = self.options
        with attached(self.unet, o.lora_rank, o.lora_alpha) as places:
            trained = self._fresh(places)
            optimizer = torch.optim.AdamW(trained.values(), lr=o.lora_lr)
            losses, spent = self._go_on(trained, optimizer)
            while len(losses) < o.lora_steps and (budget is None or spent + time.perf_counter() - began < budget):
                losses.append(self._step(len(losses), trained, optimizer))
                if progress is not None:
                    progress(len(losses), o.lora_steps)
                if part is not None and len(losses) % EVERY == 0 and len(losses) < o.lora_steps:
                    seconds = spent + time.perf_counter() - began
                    self._save(part, recipe, seconds, self._adapter(trained, losses), trained, optimizer)
            adapter, seconds = self._adapter(trained, losses), spent + time.perf_counter() - began
            if len(losses) < o.lora_steps:
                warnings.warn(stopped(len(losses), o.lora_steps, budget), stacklevel=4)
                if part is not None:  # to go on from when there is more time
                    self._save(part, recipe, seconds, adapter, trained, optimizer)
            return adapter, seconds

    def _fresh(self, places: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """What is trained, before the first step: adapters that change nothing, a projection at random."""
        for name, place in places.items():
            if ".lora_A." in name:
                rng = self.streams("tune-first", name)
                place.data.copy_(torch.randn(place.shape, generator=rng) / math.sqrt(place.shape[1]))
            else:
                place.data.zero_()
        trained = dict(places)
        if self.condition.means is not None:
            inner, outer = self.condition.means.shape[1], self.unet.config.cross_attention_dim
            weight = torch.randn(outer, inner, generator=self.streams("tune-first", "token")) / math.sqrt(inner)
            trained["token weight"] = nn.Parameter(weight.to(self.device))
            trained["token bias"] = nn.Parameter(torch.zeros(outer, device=self.device))
        return trained

    def _step(self, step: int, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> float:
        """One step of AdamW; its loss, the mean squared error over the batch."""
        o, rng = self.options, self.streams("tune-step", step)
        rows = self.order[step * o.lora_batch : (step + 1) * o.lora_batch]
        times = torch.randint(len(self.schedule.times), (len(rows),), generator=rng)
        shape = (len(rows), *self.mean.shape[1:])
        sampled, noise = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
        without = torch.rand(2, len(rows), generator=rng) < o.condition_dropout  # caption, token
        config = self.source.pipe.vae.config
        x = self.mean[rows].float() + self.spread[rows].float() * sampled
        x = (x - (config.get("shift_factor") or 0.0)) * config.scaling_factor
        noisy, target = self.schedule.noised(x, noise, times)
        text, token = self._texts(rows.tolist(), without[0].tolist()), self._visible(without[1])
        while True:
            optimizer.zero_grad()
            try:
                loss = 0.0
                for group in (token.nonzero()[:, 0], (~token).nonzero()[:, 0]):  # sequences of one length each
                    for first in range(0, len(group), self.at_once):
                        some = group[first : first + self.at_once]
                        given = text[some]
                        if token[some[0]]:
                            labels = [self.labels[row] for row in rows[some].tolist()]
                            given = torch.cat([given, self._tokens(labels, trained)], dim=1)
                        made = self.unet(
                            noisy[some].to(self.device, self.dtype),
                            self.schedule.times[times[some]].to(self.device),
                            encoder_hidden_states=given,
                        ).sample
                        wrong = (made.float() - target[some].to(self.device)).square().mean((1, 2, 3)).sum() / len(rows)
                        (wrong * (HALF_SCALE if self.dtype == torch.float16 else 1.0)).backward()
                        loss += float(wrong.detach())
                break
            except (RuntimeError, MemoryError) as error:
                if not pipelines.is_memory(error):
                    raise
                self._halve(error)
        if self.dtype == torch.float16:
            for parameter in trained.values():
                if parameter.grad is not None:
                    parameter.grad /= HALF_SCALE
        norm = nn.utils.clip_grad_norm_(trained.values(), 1.0)
        if not math.isfinite(loss) or not bool(norm.isfinite()):
            raise PoolError(
                f"step {step + 1} of the tuning came to numbers that are not finite; lower generator.lora_lr = "
                f"{o.lora_lr:g}, or take another generator.precision than {o.precision!r}"
            )
        optimizer.step()
        return loss

    def _halve(self, error: BaseException) -> None:
        if self.at_once == 1:
            raise PoolError(
                f"one image at {resolution(self.options)} pixels is too much to tune on in this memory; lower "
                f"generator.lora_resolution, or take fewer bits (generator.precision)"
            ) from error
        self.at_once //= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(f"out of memory: tuning goes on with {self.at_once} images at a time", stacklevel=2)

    def _texts(self, rows: list[int], plain: list[bool]) -> Tensor:
        """[B, T, D] embeddings, of the class alone where `plain`."""
        captions = ["" if alone else self.captions[row] for row, alone in zip(rows, plain, strict=True)]
        texts = [phrase(self.source.prompt(self.labels[row]), c) for row, c in zip(rows, captions, strict=True)]
        return self.source.encode(texts)

    def _visible(self, dropped: Tensor) -> Tensor:
        """[B] bool: who gets the token."""
        return torch.zeros_like(dropped) if self.condition.means is None else ~dropped

    def _tokens(self, labels: list[int], trained: Mapping[str, nn.Parameter]) -> Tensor:
        """[B, 1, D] image tokens of owned classes."""
        assert self.condition.means is not None
        features = self.condition.means[labels].to(self.device)
        return F.linear(features, trained["token weight"], trained["token bias"])[:, None].to(self.dtype)

    def _adapter(self, trained: Mapping[str, nn.Parameter], losses: list[float]) -> Adapter:
        o = self.options
        tensors = {name: each.detach().cpu().clone() for name, each in trained.items()}
        stopped = "steps" if len(losses) >= o.lora_steps else "budget"
        return Adapter(tensors, self.condition, torch.tensor(losses), o.lora_rank, o.lora_alpha, stopped)

    def _save(
        self,
        path: Path,
        recipe: str,
        seconds: float,
        adapter: Adapter,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        tensors, note = _stored(adapter)
        for name, parameter in trained.items():
            for kind in ("exp_avg", "exp_avg_sq"):
                # a projection that no sample of any step so far has used has no moments yet
                if kind in optimizer.state[parameter]:
                    tensors[f"{kind} {name}"] = optimizer.state[parameter][kind].cpu().contiguous()
            if "step" in optimizer.state[parameter]:
                tensors[f"step {name}"] = optimizer.state[parameter]["step"].cpu()
        note |= {"recipe": recipe, "of": str(self.options.lora_steps), "seconds": str(seconds)}
        note["image captions"] = json.dumps(self.captions)
        write(path, save(tensors, note))

    def _go_on(
        self, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[list[float], float]:
        """Puts a saved state in place; the losses so far and the seconds they took."""
        if self.start is None:
            return [], 0.0
        tensors, note = self.start
        for name, parameter in trained.items():
            parameter.data.copy_(tensors[name])
            if f"step {name}" in tensors:
                moments = {kind: tensors[f"{kind} {name}"].to(self.device) for kind in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": tensors[f"step {name}"], **moments}
        return tensors["losses"].tolist(), float(note["seconds"])


@dataclass(frozen=True)
class Schedule:
    """How a pipeline's scheduler mixes image and noise, and what its U-Net is asked for.

    At step t of T the input is signal[t] x + noise[t] e. times: [T] what the U-Net is told. prediction: "epsilon" (e),
    "v_prediction" (signal e - noise x; Salimans and Ho 2022, arXiv 2202.00512), "sample" (x), or "flow_prediction"
    (e - x).
    """

    prediction: str
    signal: Tensor
    noise: Tensor
    times: Tensor

    @staticmethod
    def of(scheduler: Any) -> Schedule:
        """By the scheduler's own configuration. Raises PoolError for one that is not understood."""
        config = scheduler.config
        prediction, steps = str(config.get("prediction_type", "epsilon")), int(config.num_train_timesteps)
        if prediction == "flow_prediction":
            shift = float(config.get("flow_shift") or 1.0)
            even = torch.arange(1, steps + 1) / steps
            sigma = shift * even / (1 + (shift - 1) * even)
            return Schedule(prediction, 1 - sigma, sigma, sigma * steps)
        if prediction not in ("epsilon", "v_prediction", "sample") or not hasattr(scheduler, "alphas_cumprod"):
            raise PoolError(
                f"{type(scheduler).__name__} with prediction_type {prediction!r} cannot be tuned; known: epsilon, "
                f"v_prediction, sample, flow_prediction"
            )
        kept = scheduler.alphas_cumprod.float().cpu()
        return Schedule(prediction, kept.sqrt(), (1 - kept).sqrt(), torch.arange(len(kept)))

    def noised(self, x: Tensor, e: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy latents [B, C, h, w] at `times` ([B] int64), and what the U-Net should answer."""
        signal, noise = self.signal[times, None, None, None], self.noise[times, None, None, None]
        answers = {"epsilon": e, "v_prediction": signal * e - noise * x, "sample": x, "flow_prediction": e - x}
        return signal * x + noise * e, answers[self.prediction]


@contextmanager
def attached(unet: Any, rank: int, alpha: float, scale: float = 1.0) -> Iterator[dict[str, nn.Parameter]]:
    """The U-Net with an adapter in float32, times `scale`; taken out again, so that the U-Net is then as it was.

    Yields the adapter's parameters by name, "lora <layer>.lora_A.weight" and B; their values are not set yet.
    """
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS))
    try:
        try:
            with isolated(torch.Generator()), hub.quiet():
                unet.add_adapter(config, NAME)
        except ValueError as error:
            raise PoolError(f"{type(unet).__name__} has no attention layers {', '.join(TARGETS)} to adapt") from error
        places = {}
        for name, parameter in unet.named_parameters():
            if f".{NAME}." in name:
                parameter.data = parameter.data.float()
                places["lora " + name.replace(f".{NAME}.", ".")] = parameter
        unet.set_adapters([NAME], [scale])
        yield places
    finally:
        unet.unload_lora()


@contextmanager
def masked(pipe: Any, tokens: int) -> Iterator[None]:
    """With guidance, what follows the first `tokens` is hidden from the unconditional half of each batch (diffusers
    puts it first), which has no image token."""

    def hide(unet: nn.Module, args: Any, words: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = words["encoder_hidden_states"]
        if given.shape[1] > tokens and pipe.do_classifier_free_guidance:
            seen = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
            seen[: len(given) // 2, tokens:] = False
            words = {**words, "encoder_attention_mask": seen}
        return args, words

    hook = pipe.unet.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def differentiable(unet: nn.Module) -> Iterator[None]:
    """Layers in four bits (sdnq) with gradients to their inputs: sdnq runs them under no_grad. Their weights are
    unpacked once more in the backward pass, so that they are never all unpacked at once."""
    changed: list[tuple[Any, Any]] = []
    try:
        for layer in unet.modules():
            forward = getattr(layer, "forward_func", None)
            if forward is None:
                continue
            plain = getattr(forward, "__wrapped__", None)
            if plain is None or forward.__name__ not in ("quantized_linear_forward", "quantized_conv_forward"):
                raise PoolError(
                    f"{type(layer).__name__} in generator.precision = 'uint4' passes no gradient on in this version of "
                    f"sdnq: tune in bf16 or fp32"
                )
            changed.append((layer, forward))
            own: Any = layer
            own.forward_func = partial(checkpoint, plain, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for layer, forward in changed:
            layer.forward_func = forward


def describe(
    source: DiffusionSource, samples: Samples, seen: Tensor, streams: Streams
) -> tuple[list[str], Tensor | None]:
    """A caption for each of the images `seen`, and the visual mean of each class ([C, E], None without an encoder).

    Captioner and encoder are loaded only when needed and take turns; afterwards they wait for the next client
    (condition.Describers). Raises PoolError when memory does not suffice.
    """
    o, device, held = source.options, source.device, source.describers
    said, means = [""] * len(seen), None
    if o.captioner:
        folder = find(o.captioner, o.download, "generator.captioner")
        said = captions(seen, caption_mark(folder, device), lambda: held.captioner(folder, device))
        held.rest()
    if o.image_encoder and o.fuse == "token":
        encoder = held.encoder(find(o.image_encoder, o.download, "generator.image_encoder"), device)
        means = class_means(encoder, samples, source.classes, SEEN, streams)
        held.rest()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return said, means


@torch.no_grad()
def encoded(source: DiffusionSource, x: Tensor) -> tuple[Tensor, Tensor]:
    """[N, 4, h, w] twice: mean and standard deviation of the autoencoder's latents of uint8 images [N, C, H, W], in
    float16 on the CPU (64 KiB for an image of 512 pixels). Raises PoolError when they are not finite, and when memory
    does not suffice for one image."""
    vae, side, parts = source.pipe.vae, resolution(source.options), []
    for start in range(len(x)):  # one at a time: at 512 pixels this is where memory peaks
        image = rgb(x[start : start + 1]).float()
        if image.shape[-1] != side or image.shape[-2] != side:
            image = F.interpolate(image, size=(side, side), mode="bicubic", antialias=True)
        try:
            latent = vae.encode((image.clamp(0, 255) / 127.5 - 1).to(source.device, vae.dtype)).latent_dist
        except (RuntimeError, MemoryError) as error:
            if not pipelines.is_memory(error):
                raise
            raise PoolError(
                f"the autoencoder cannot read one image of {side}x{side} in this memory: lower "
                f"generator.lora_resolution, or take fewer bits (generator.precision)"
            ) from error
        parts.append(torch.cat([latent.mean, latent.std]).half().cpu())
    both = torch.stack(parts)
    if not both.isfinite().all():
        raise PoolError(
            f"the autoencoder made no valid latents in generator.precision = {source.options.precision!r}: take bf16"
        )
    return both[:, 0], both[:, 1]


def resolution(options: StableDiffusion) -> int:
    """Side in pixels of the images tuned on."""
    return options.lora_resolution or options.resolution


def recipe(source: DiffusionSource, samples: Samples, seed: int) -> str:
    """What decides an adapter; how images are made of it (steps, guidance, scale, policies) is left out.

    Captioner and encoder count by the content of their files, which must therefore be there.
    """
    o = source.options
    options = (o.precision, o.lora_rank, o.lora_alpha, o.lora_lr, o.lora_steps, o.lora_batch, resolution(o))
    captioner = content(find(o.captioner, o.download, "generator.captioner")) if o.captioner else ""
    sees = o.image_encoder and o.fuse == "token"
    encoder = content(find(o.image_encoder, o.download, "generator.image_encoder")) if sees else ""
    prompts = [source.prompt(label) for label in range(len(source.classes))]
    images = (samples.x.contiguous().numpy().tobytes(), samples.y.contiguous().numpy().tobytes())
    condition = (str(o.condition_dropout), captioner, encoder)
    schedule = Schedule.of(source.pipe.scheduler)
    noise = [x.numpy().tobytes() for x in (schedule.signal, schedule.noise, schedule.times)]
    how: list[str | bytes] = [*map(str, options), *condition, schedule.prediction, *noise]
    return digest("lora", source.weights, *how, *prompts, *images, seed)


def _means(condition: Condition) -> dict[str, Tensor]:
    return {} if condition.means is None else {"means": condition.means}


def _stored(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and notes of an adapter's file."""
    note = {
        "rank": str(adapter.rank),
        "alpha": str(adapter.alpha),
        "stopped": adapter.stopped,
        "steps": str(len(adapter.losses)),
        "captions": json.dumps(adapter.condition.captions),
    }
    return {**adapter.tensors, **_means(adapter.condition), "losses": adapter.losses}, note


def _adapter(tensors: dict[str, Tensor], note: Mapping[str, str]) -> Adapter:
    """The reverse."""
    condition = Condition(tuple(map(tuple, json.loads(note["captions"]))), tensors.pop("means", None))
    losses = tensors.pop("losses")
    return Adapter(tensors, condition, losses, int(note["rank"]), float(note["alpha"]), note["stopped"])
