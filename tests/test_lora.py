"""Tuning a Stable Diffusion of a few ten thousand random weights on a client's images."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from standins.pipeline import pipeline
from standins.vision import blip2, clip
from tiny import config, data, samples
from torch import Tensor

from fedkeel.data.sources import arrays
from fedkeel.errors import DataError, PoolError
from fedkeel.generators import lora
from fedkeel.generators.base import Tunable
from fedkeel.generators.diffusion import DiffusionSource, StableDiffusion
from fedkeel.generators.lora import Schedule, TunedSource, attached, differentiable, masked
from fedkeel.loop import run
from fedkeel.records import Samples

CPU = torch.device("cpu")
CLASSES = ("boot", "bag", "dress")
SHAPE = (3, 16, 16)
OWNED = 2
"""Classes the client has images of: the first two."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, a captioner and two image encoders, in folders of their own."""
    root = tmp_path_factory.mktemp("weights")
    pipeline(root / "sd")
    clip(root / "clip", 24)
    clip(root / "same width", 32)
    blip2(root / "blip")
    return root


@pytest.fixture(scope="module")
def load(weights: Path) -> Callable[..., DiffusionSource]:
    def load(**options: object) -> DiffusionSource:
        given: dict[str, object] = {
            "model": str(weights / "sd"),
            "captioner": str(weights / "blip"),
            "image_encoder": str(weights / "clip"),
            "template": "regl-text",
            "steps": 2,
            "resolution": 32,
            "stored": 0,
            "batch": 2,
            "lora_rank": 2,
            "lora_alpha": 2.0,
            "lora_lr": 1e-2,
            "lora_steps": 4,
            "lora_batch": 3,
        }
        return StableDiffusion(**{**given, **options}).load(CLASSES, SHAPE, CPU)  # type: ignore[arg-type]

    return load


@pytest.fixture(scope="module")
def own() -> Samples:
    """Eight images of two of the three classes."""
    return samples(8, classes=OWNED, shape=SHAPE)


@pytest.fixture(scope="module")
def base(load: Callable[..., DiffusionSource]) -> DiffusionSource:
    return load()


@pytest.fixture(scope="module")
def tuned(base: DiffusionSource, own: Samples) -> TunedSource:
    made = base.tune(own, 1)
    assert isinstance(made, TunedSource)
    return made


ASKED = ((0, 1, 2, 0), (0, 0, 0, 1))
"""Labels and indices of four images."""


def test_the_loss_falls_on_two_images(tmp_path: Path, load: Callable[..., DiffusionSource], own: Samples) -> None:
    # asked for the image itself, which is always the same two: the noise is not to be guessed by so small a network
    folder = pipeline(tmp_path / "sd", prediction="sample")
    source = load(model=str(folder), lora_steps=30, lora_batch=4, lora_rank=8, lora_alpha=8.0, lora_lr=2e-2)
    made = source.tune(own.take(torch.tensor([0, 1])), 1)
    assert isinstance(made, TunedSource)
    losses = made.adapter.losses
    assert len(losses) == 30 and losses[-10:].mean() < 0.6 * losses[0]


def test_only_adapter_and_projection_learn(base: DiffusionSource, tuned: TunedSource) -> None:
    unet = base.pipe.unet
    before = {name: each.clone() for name, each in unet.state_dict().items()}
    layers = [name for name, _ in unet.named_modules() if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))]
    with attached(unet, 2, 2.0) as places:
        free = {name for name, each in unet.named_parameters() if each.requires_grad}
        assert len(free) == len(places) == 2 * len(layers) > 0
        assert all(".lora_A.client." in name or ".lora_B.client." in name for name in free)
        expected = {f"lora {layer}.lora_{half}.weight" for layer in layers for half in "AB"}
        assert set(places) == expected
    assert set(tuned.adapter.tensors) == expected | {"token weight", "token bias"}
    assert all(each.count_nonzero() for name, each in tuned.adapter.tensors.items())  # B and the bias began at zero
    after = unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(
        each.requires_grad for part in (unet, base.pipe.vae, base.pipe.text_encoder) for each in part.parameters()
    )


def test_scale_0_makes_the_untuned_images(
    load: Callable[..., DiffusionSource], base: DiffusionSource, tuned: TunedSource
) -> None:
    """REGL check 10."""
    plain = base.generate(*ASKED)
    assert not torch.equal(tuned.generate(*ASKED), plain)
    off = TunedSource(load(lora_scale=0.0), tuned.adapter)
    assert torch.equal(off.generate(*ASKED), plain)
    assert off.fingerprint() not in (base.fingerprint(), tuned.fingerprint())
    half = TunedSource(load(lora_scale=0.4), tuned.adapter)
    assert not torch.equal(half.generate(*ASKED), tuned.generate(*ASKED))
    assert torch.equal(base.generate(*ASKED), plain)  # the base is as it was


def test_what_an_adapter_adds_by_hand(base: DiffusionSource) -> None:
    """y = W x + scale * alpha / rank * B A x, here .5 * 6 / 2 = 1.5 times B A x."""
    rng, unet = torch.Generator().manual_seed(0), base.pipe.unet
    layer, name = next((each, name) for name, each in unet.named_modules() if name.endswith(".to_q"))
    w = layer.weight.detach().clone()
    a, b = torch.randn(2, w.shape[1], generator=rng), torch.randn(w.shape[0], 2, generator=rng)
    x = torch.randn(5, w.shape[1], generator=rng)
    assert layer.bias is None
    with attached(unet, 2, 6.0, 0.5) as places, torch.no_grad():
        places[f"lora {name}.lora_A.weight"].copy_(a)
        places[f"lora {name}.lora_B.weight"].copy_(b)
        y = unet.get_submodule(name)(x)
    assert torch.allclose(y, x @ w.T + 1.5 * x @ a.T @ b.T, atol=1e-4)
    assert not torch.allclose(y, x @ w.T + 0.5 * x @ a.T @ b.T, atol=1.0)


def test_what_else_is_asked_for_changes_no_image(tuned: TunedSource) -> None:
    together = tuned.generate(*ASKED)
    for row, (label, index) in enumerate(zip(*ASKED, strict=True)):
        assert torch.equal(tuned.generate([label], [index])[0], together[row])
    assert torch.equal(tuned.generate(ASKED[0][::-1], ASKED[1][::-1]).flip(0), together)


def test_two_clients_take_turns(
    base: DiffusionSource, tuned: TunedSource, load: Callable[..., DiffusionSource]
) -> None:
    other = base.tune(samples(8, seed=5, classes=OWNED, shape=SHAPE), 2)
    first, second, plain = (source.generate(*ASKED) for source in (tuned, other, base))
    assert not torch.equal(first, second) and not torch.equal(first, plain)
    for source, images in ((other, second), (base, plain), (tuned, first), (other, second)):
        assert torch.equal(source.generate(*ASKED), images)
    assert len({source.fingerprint() for source in (base, tuned, other)}) == 3
    assert tuned.pipe is other.pipe is base.pipe  # type: ignore[attr-defined]
    assert isinstance(base, Tunable)
    held = tuned.memory_bytes()
    assert held.pop("adapter") >= 4 * sum(each.numel() for each in tuned.adapter.tensors.values())
    assert held == base.memory_bytes()


def test_a_killed_tuning_ends_like_one_that_was_not(
    base: DiffusionSource, own: Samples, tuned: TunedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "EVERY", 1)

    class Killed(Exception):
        pass

    def kill(done: int, total: int, after: int) -> None:
        assert total == 4
        if done > after:
            raise Killed

    keep, seen = tmp_path / "client-0.5", []
    for after in (1, 2):
        with pytest.raises(Killed):
            base.tune(own, 1, keep, progress=partial(kill, after=after))
        assert (tmp_path / "client-0.5.part.safetensors").is_file()
    with monkeypatch.context() as patch:  # nothing is looked at again but the latents
        patch.setattr(lora, "describe", None)
        done = base.tune(own, 1, keep, progress=lambda done, total: seen.append(done))
    assert seen == [3, 4]
    same = _same(done, tuned)
    assert same == [] and done.fingerprint() == tuned.fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["client-0.5.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(lora, "Tuning", None)  # a finished one is read
        again = base.tune(own, 1, keep)
    assert again.fingerprint() == tuned.fingerprint() and torch.equal(again.generate(*ASKED), tuned.generate(*ASKED))
    with safe_open(tmp_path / "client-0.5.safetensors", "pt") as file:
        note = file.metadata()
    assert note["stopped"] == "steps" and json.loads(note["captions"]) == [*map(list, tuned.adapter.condition.captions)]


def _same(a: object, b: TunedSource) -> list[str]:
    """Names of the tensors that differ."""
    assert isinstance(a, TunedSource)
    pairs = {**a.adapter.tensors, "losses": a.adapter.losses}, {**b.adapter.tensors, "losses": b.adapter.losses}
    assert pairs[0].keys() == pairs[1].keys()
    return [name for name in pairs[0] if not torch.equal(pairs[0][name], pairs[1][name])]


def test_what_decides_an_adapter(
    load: Callable[..., DiffusionSource], base: DiffusionSource, own: Samples, tuned: TunedSource, tmp_path: Path
) -> None:
    base.tune(own, 1, tmp_path / "a")
    for other in (partial(base.tune, own, 2), partial(base.tune, own.take(torch.arange(7)), 1)):
        with pytest.raises(PoolError, match=r"a\.safetensors was tuned from another generator.*remove it"):
            other(tmp_path / "a")
    with pytest.raises(PoolError, match="remove it"):
        load(lora_lr=1e-3).tune(own, 1, tmp_path / "a")
    # how images are made of it is free
    free = load(lora_scale=0.5, steps=1, caption="sampled", visual_missing="none").tune(own, 1, tmp_path / "a")
    assert isinstance(free, TunedSource) and _same(free, tuned) == []
    assert free.fingerprint() != tuned.fingerprint()
    (tmp_path / "a.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="is damaged .*begins again"):
        assert _same(base.tune(own, 1, tmp_path / "a"), tuned) == []


def test_captioner_and_encoder_count_by_their_content(
    load: Callable[..., DiffusionSource], own: Samples, weights: Path, tmp_path: Path
) -> None:
    shutil.copytree(weights / "clip", tmp_path / "copied")
    shutil.copytree(weights / "clip", tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "other": 1}))
    one, copied, changed, wider = (
        load(image_encoder=str(folder)).recipe(own, 1)
        for folder in (weights / "clip", tmp_path / "copied", tmp_path / "changed", weights / "same width")
    )
    assert one == copied and len({one, changed, wider, load(captioner="").recipe(own, 1)}) == 4
    assert load(fuse="none").recipe(own, 1) == load(fuse="none", image_encoder="").recipe(own, 1)  # it is not used


def test_images_per_pass_are_those_of_the_pipeline(load: Callable[..., DiffusionSource], tuned: TunedSource) -> None:
    base = load(batch=4)
    base.batch = 2  # memory ran out
    one, other = TunedSource(base, tuned.adapter), TunedSource(base, tuned.adapter)
    assert one.batch == 2
    with pytest.warns(UserWarning, match="going on with 1 images at a time"):
        one._halve(MemoryError())
    assert base.batch == other.batch == one.batch == 1


def test_time_is_over(
    base: DiffusionSource, own: Samples, tuned: TunedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(lora.time, "perf_counter", lambda: now[0])

    def tick(done: int, total: int) -> None:
        now[0] += 10

    with pytest.warns(UserWarning, match="after 2 of 4 steps: its 15 s are over"):
        short = base.tune(own, 1, tmp_path / "a", budget=15, progress=tick)
    assert isinstance(short, TunedSource) and len(short.adapter.losses) == 2 and short.adapter.stopped == "budget"
    assert not torch.equal(short.generate(*ASKED), base.generate(*ASKED))
    with pytest.warns(UserWarning, match="after 2 of 4 steps: its 15 s are over"):  # once more
        again = base.tune(own, 1, tmp_path / "a", budget=15, progress=tick)
    assert again.fingerprint() == short.fingerprint() and now[0] == 20
    done = base.tune(own, 1, tmp_path / "a", budget=45, progress=tick)  # the other two
    assert now[0] == 40 and isinstance(done, TunedSource) and done.adapter.stopped == "steps"
    assert _same(done, tuned) == [] and [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        note = file.metadata()
    assert (note["steps"], note["of"], float(note["seconds"])) == ("4", "4", 40)
    assert base.tune(own, 1, tmp_path / "a", budget=1).fingerprint() == tuned.fingerprint()
    with pytest.warns(UserWarning, match="after 0 of 4 steps: its 0 s are over; nothing was learned"):
        base.tune(own, 1, tmp_path / "b", budget=0)
    assert _same(base.tune(own, 1, tmp_path / "b"), tuned) == []
    with pytest.warns(UserWarning, match="nothing was learned"):
        none = base.tune(own, 1, budget=0)
    assert torch.equal(none.generate(*ASKED), base.generate(*ASKED))


def test_seconds_before_a_kill_count(
    base: DiffusionSource, own: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(lora.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(lora, "EVERY", 1)

    def tick(done: int, total: int) -> None:
        now[0] += 10
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base.tune(own, 1, tmp_path / "a", progress=tick)  # saved after two steps, at 20 s
    with pytest.warns(UserWarning, match="after 2 of 4 steps"):
        base.tune(own, 1, tmp_path / "a", budget=15)


def test_tokens_of_owned_and_missing_classes(
    load: Callable[..., DiffusionSource], base: DiffusionSource, tuned: TunedSource
) -> None:
    plain = base.encode([base.prompt(0)])[0]
    with_token = tuned.condition(0, 0)
    assert isinstance(with_token, Tensor) and torch.equal(with_token[:-1], plain)  # one token after the text's
    assert len(with_token) == len(plain) + 1
    missing = tuned.condition(2, 0)
    assert isinstance(missing, Tensor) and len(missing) == len(plain) + 1  # client_mean
    other, means = tuned.condition(1, 0), tuned.adapter.condition.means
    assert isinstance(other, Tensor) and not torch.equal(other[-1], with_token[-1]) and means is not None
    mean = torch.nn.functional.normalize(means[:2].mean(0), dim=0) * 24**0.5
    assert torch.allclose(missing[-1], tuned.adapter.token(mean), atol=1e-6)
    none = TunedSource(load(visual_missing="none"), tuned.adapter)
    left = none.condition(2, 0)
    assert isinstance(left, Tensor) and torch.equal(left, base.encode([base.prompt(2)])[0])  # shorter, no zeros
    assert torch.equal(none.condition(0, 0), with_token)  # type: ignore[arg-type]
    a, b = none.generate(*ASKED), tuned.generate(*ASKED)
    assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]]) and not torch.equal(a[2], b[2])


def test_captions_at_generation(
    load: Callable[..., DiffusionSource], base: DiffusionSource, tuned: TunedSource
) -> None:
    told = [{caption for caption in each if caption} for each in tuned.adapter.condition.captions]
    assert len(told[0]) > 1 and not told[2]
    sampled = TunedSource(load(caption="sampled"), tuned.adapter)
    texts = {f"{base.prompt(0)}, {caption}": caption for caption in told[0]}
    known = {text: base.encode([text])[0] for text in texts}
    used = set()
    for index in range(20):
        made = sampled.condition(0, index)
        assert isinstance(made, Tensor)
        used |= {text for text, embedding in known.items() if torch.equal(embedding, made[:-1])}
    assert len(used) > 1
    assert torch.equal(sampled.condition(0, 3), sampled.condition(0, 3))  # type: ignore[arg-type]
    assert torch.equal(sampled.condition(2, 0), tuned.condition(2, 0))  # type: ignore[arg-type]


def test_the_unconditional_half_has_no_token(base: DiffusionSource, tuned: TunedSource) -> None:
    """A masked token is one that is not there; zeros in its place are something else."""
    pipe, e = base.pipe, base.encode(["", base.prompt(0)])
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    longer = torch.cat([e, torch.randn(2, 1, e.shape[2], generator=torch.Generator().manual_seed(1))], dim=1)
    with torch.no_grad():
        short, long = (pipe.unet(x, 5, encoder_hidden_states=each).sample for each in (e, longer))
        zeros = pipe.unet(x, 5, encoder_hidden_states=torch.cat([e, torch.zeros_like(e[:, :1])], dim=1)).sample
        pipe._guidance_scale = 2.0
        with masked(pipe, e.shape[1]):
            both = pipe.unet(x, 5, encoder_hidden_states=longer).sample
            assert torch.equal(pipe.unet(x, 5, encoder_hidden_states=e).sample, short)
        pipe._guidance_scale = 1.0
        with masked(pipe, e.shape[1]):
            assert torch.equal(pipe.unet(x, 5, encoder_hidden_states=longer).sample, long)
    assert torch.allclose(both[0], short[0], atol=1e-5) and torch.allclose(both[1], long[1], atol=1e-5)
    for different in (long, zeros):
        assert (short - different).abs().max() > 1e-4


def test_dropout_leaves_captions_and_tokens_out(
    load: Callable[..., DiffusionSource], own: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, lengths, texts = load(condition_dropout=0.5, lora_steps=12), [], []
    plain = source.encode([source.prompt(0)]).shape[1]
    encode, forward = source.encode, source.pipe.unet.forward

    def listen(given: list[str]) -> Tensor:
        texts.extend(given)
        return encode(given)

    def count(*args: object, **words: Tensor) -> object:
        lengths.extend([words["encoder_hidden_states"].shape[1] - plain] * len(words["encoder_hidden_states"]))
        return forward(*args, **words)

    monkeypatch.setattr(source, "encode", listen)
    monkeypatch.setattr(source.pipe.unet, "forward", count)
    source.tune(own, 1)
    assert len(lengths) == 36 and 8 < sum(lengths) < 28
    prompts = {source.prompt(label) for label in range(OWNED)}
    alone = sum(text in prompts for text in texts)
    assert 8 < alone < len(texts)
    assert any(text.startswith("A photo of boot, ") for text in texts)


@pytest.mark.parametrize(("folder", "width"), [("clip", 24), ("same width", 32)])
def test_the_projection_brings_any_width_to_the_texts(
    load: Callable[..., DiffusionSource], own: Samples, weights: Path, folder: str, width: int
) -> None:
    made = load(image_encoder=str(weights / folder), captioner="", lora_steps=1).tune(own, 1)
    assert made.adapter.tensors["token weight"].shape == (32, width)  # type: ignore[attr-defined]
    assert made.condition(0, 0).shape[1] == 32  # type: ignore[attr-defined]


def test_without_captioner_and_encoder(load: Callable[..., DiffusionSource], own: Samples) -> None:
    source = load(captioner="", image_encoder="", lora_steps=2)
    with pytest.warns(UserWarning, match="tuned on the class's text alone"):
        made = source.tune(own, 1)
    assert isinstance(made, TunedSource) and made.adapter.condition.means is None
    assert torch.equal(made.condition(0, 0), source.encode([source.prompt(0)])[0])  # type: ignore[arg-type]
    assert not torch.equal(made.generate(*ASKED), source.generate(*ASKED))
    with pytest.warns(UserWarning, match="text alone"):
        fused = load(captioner="", fuse="none", lora_steps=2).tune(own, 1)
    assert isinstance(fused, TunedSource) and _same(fused, made) == []  # an encoder that is not used is not loaded


def test_missing_weights_are_named(load: Callable[..., DiffusionSource], own: Samples) -> None:
    with pytest.raises(DataError, match=r"generator\.captioner: Salesforce/blip2-opt-2\.7b .*hf download"):
        load(captioner="Salesforce/blip2-opt-2.7b").tune(own, 1)
    with pytest.raises(DataError, match=r"generator\.image_encoder: openai/clip-vit-large-patch14 .*hf download"):
        load(captioner="", image_encoder="openai/clip-vit-large-patch14").tune(own, 1)
    with pytest.raises(PoolError, match="no images to tune"):
        load().tune(own.take(torch.arange(0)), 1)


def test_a_tuning_that_diverges_is_said(load: Callable[..., DiffusionSource], own: Samples) -> None:
    with pytest.raises(PoolError, match=r"step \d of the tuning .*lower generator\.lora_lr = 1e\+30"):
        load(lora_lr=1e30).tune(own, 1)


def test_out_of_memory_takes_fewer_at_once(
    base: DiffusionSource, own: Samples, tuned: TunedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, most = base.pipe.unet.forward, 1

    def small(x: Tensor, *args: object, **words: object) -> object:
        if len(x) > most:
            raise torch.OutOfMemoryError("too many")
        return forward(x, *args, **words)

    monkeypatch.setattr(base.pipe.unet, "forward", small)
    with pytest.warns(UserWarning, match="out of memory: tuning goes on with 1 images"):
        made = base.tune(own, 1)
    assert isinstance(made, TunedSource)
    assert torch.allclose(made.adapter.losses, tuned.adapter.losses, rtol=1e-3)
    most = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(PoolError, match=r"lower generator\.lora_resolution"):
            base.tune(own, 1)
    monkeypatch.undo()
    assert torch.equal(tuned.generate([0], [0]), tuned.generate([0], [0]))  # the U-Net came out whole


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_half_precision(load: Callable[..., DiffusionSource], own: Samples, precision: str) -> None:
    source = load(precision=precision, lora_steps=2)
    made = source.tune(own, 1)
    assert isinstance(made, TunedSource)
    assert {each.dtype for each in made.adapter.tensors.values()} == {torch.float32}
    assert all(each.count_nonzero() for each in made.adapter.tensors.values())
    assert not torch.equal(made.generate(*ASKED), source.generate(*ASKED))


def test_over_four_bits(tmp_path: Path, load: Callable[..., DiffusionSource], own: Samples) -> None:
    """Gradients pass sdnq's packed layers as they pass the same weights unpacked."""
    from sdnq.utils import get_sdnq_params

    folder = pipeline(tmp_path / "sd", widths=(32, 128), cross=128)
    source = load(model=str(folder), precision="uint4", lora_steps=2)
    unet = source.pipe.unet
    packed = [layer for layer in unet.modules() if hasattr(layer, "sdnq_dequantizer")]
    assert {type(layer).__name__ for layer in packed} >= {"SDNQLinear", "SDNQConv2d"}
    held = source.memory_bytes()["unet"]
    layer, x = packed[0], torch.randn(2, packed[0].in_channels, 8, 8, requires_grad=True)
    with differentiable(unet):
        (made,) = torch.autograd.grad(layer(x).square().sum(), x)
    whole = torch.nn.functional.conv2d
    dense = layer.sdnq_dequantizer(**get_sdnq_params(layer))
    (right,) = torch.autograd.grad(
        whole(x, dense, layer.bias, stride=layer.stride, padding=layer.padding).square().sum(), x
    )
    assert torch.allclose(made, right, rtol=1e-4, atol=1e-5)
    assert not layer(x).requires_grad  # as it was
    tuned = source.tune(own, 1)
    assert isinstance(tuned, TunedSource) and all(each.count_nonzero() for each in tuned.adapter.tensors.values())
    assert not torch.equal(tuned.generate(*ASKED), source.generate(*ASKED))
    assert source.memory_bytes()["unet"] == held


def test_answers_by_hand() -> None:
    """signal .6 and noise .8 at step 0: x = 1, e = 2 make .6 + 1.6 = 2.2; v = .6 * 2 - .8 * 1 = .4."""
    x, e, first = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0), torch.tensor([0])
    answers = {"epsilon": 2.0, "v_prediction": 0.4, "sample": 1.0, "flow_prediction": 1.0}
    for prediction, answer in answers.items():
        schedule = Schedule(prediction, torch.tensor([0.6]), torch.tensor([0.8]), torch.tensor([7]))
        noisy, target = schedule.noised(x, e, first)
        assert noisy.item() == pytest.approx(2.2) and target.item() == pytest.approx(answer)


def test_schedules_are_the_schedulers_own() -> None:
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

    x, e = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    times = torch.tensor([0, 400, 999])
    for prediction in ("epsilon", "v_prediction", "sample"):
        theirs = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction)
        noisy, target = Schedule.of(theirs).noised(x, e, times)
        assert torch.allclose(noisy, theirs.add_noise(x, e, times), atol=1e-6)
        if prediction == "v_prediction":
            assert torch.allclose(target, theirs.get_velocity(x, e, times), atol=1e-6)
    flow = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    schedule = Schedule.of(flow)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # NumPy's remark on how diffusers makes arrays of tensors
        flow.set_timesteps(10)
    for time, sigma in zip(flow.timesteps, flow.sigmas[:-1], strict=True):  # what it tells the U-Net, and its noise
        near = int((schedule.times - time).abs().argmin())
        assert float(schedule.times[near]) == pytest.approx(float(time), abs=2)
        assert float(schedule.noise[near]) == pytest.approx(float(sigma), abs=2e-3)
    assert torch.allclose(schedule.signal + schedule.noise, torch.ones(1000))
    with pytest.raises(PoolError, match="prediction_type 'odd' cannot be tuned"):
        Schedule.of(
            type("Odd", (), {"config": type("C", (dict,), {"num_train_timesteps": 5})(prediction_type="odd")})()
        )


def test_how_images_are_drawn_changes_no_tuning(
    tmp_path: Path, load: Callable[..., DiffusionSource], own: Samples
) -> None:
    """PNDM takes no notice of a setting that changes the schedule which the pipeline was trained on."""
    folder = pipeline(tmp_path / "sd", prediction="v_prediction")
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
    sources = [load(model=str(folder), scheduler=name, steps=4, lora_steps=2) for name in ("own", "pndm")]
    assert len({source.recipe(own, 1) for source in sources}) == 1
    one, other = (source.tune(own, 1) for source in sources)
    assert isinstance(one, TunedSource) and isinstance(other, TunedSource)
    assert torch.equal(one.adapter.losses, other.adapter.losses)


def test_velocities_train(tmp_path: Path, load: Callable[..., DiffusionSource], own: Samples) -> None:
    folder = pipeline(tmp_path / "sd", prediction="v_prediction")
    source = load(model=str(folder), lora_steps=1)
    made = source.tune(own, 1)
    assert isinstance(made, TunedSource) and made.adapter.losses.isfinite().all()


def test_grey_images_are_tuned_on_too(weights: Path, load: Callable[..., DiffusionSource]) -> None:
    options = load(lora_steps=1).options
    source = options.load(CLASSES, (1, 28, 28), CPU)
    made = source.tune(samples(4, classes=OWNED, shape=(1, 28, 28)), 1)
    assert made.generate([0], [0]).shape == (1, 1, 28, 28)


def test_a_whole_run_of_regl(weights: Path, tmp_path: Path) -> None:
    """ReGL (FT) by Stable Diffusion from a configuration: clients of two profiles, in two precisions, tune on their own
    images and fill from pools of their own. A second run finds adapters and images there and comes to the same."""
    x, y = data(48).train_x.numpy()[:, 0], data(48).train_y.numpy() % len(CLASSES)
    images = arrays(train=(x, y), test=(x[:12], y[:12]), classes=list(CLASSES))
    generator = {
        "name": "stable-diffusion",
        "model": str(weights / "sd"),
        "captioner": str(weights / "blip"),
        "image_encoder": str(weights / "clip"),
        "template": "regl-text",
        "steps": 1,
        "resolution": 32,
        "stored": 0,
        "lora_steps": 2,
        "lora_batch": 2,
        "lora_rank": 2,
    }
    table = {
        "generator": generator,
        "generators": {"constrained": {"precision": "uint4"}},
        "profiles": {"unconstrained_ids": [1]},
        "algorithm": {"name": "regl", "tune": True, "volume": 1},
        "pool": {"dir": str(tmp_path / "pools")},
    }
    made = config("rounds=1", "clients=2", "local.epochs=1", table=table)
    first = run(made, data=images, folder=tmp_path / "one")
    adapters = json.loads((tmp_path / "one" / "adapters.json").read_text())
    assert len(adapters) == 2 and all(each["steps"] == each["of"] == 2 for each in adapters)
    spent = json.loads((tmp_path / "one" / "generators.json").read_text())
    assert {key: each["images"] for key, each in spent.items()} == {"generator": 3, "constrained": 3}
    again = run(made, data=images, folder=tmp_path / "two")
    assert all(torch.equal(again.weights[name], value) for name, value in first.weights.items())
    kept = json.loads((tmp_path / "two" / "adapters.json").read_text())
    assert kept == adapters
    spent = json.loads((tmp_path / "two" / "generators.json").read_text())
    assert not any(each["images"] for each in spent.values())
