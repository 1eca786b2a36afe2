"""Captions and visual means, on BLIP-2 and CLIP of a few thousand random weights."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from standins.vision import blip2, clip
from tiny import samples

from fedkeel import files
from fedkeel.errors import DataError, PoolError
from fedkeel.generators import condition
from fedkeel.generators.condition import (
    Captioner,
    Condition,
    Describers,
    Encoder,
    caption_mark,
    captions,
    class_means,
    find,
    free_memory,
    image_key,
    phrase,
    unit,
)
from fedkeel.generators.diffusion import StableDiffusion
from fedkeel.generators.lora import describe, encoded
from fedkeel.rng import Streams

CPU = torch.device("cpu")
NAMES = ("boot", "bag", "dress")


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blip2(tmp_path_factory.mktemp("blip"))


def test_captions_are_words_of_the_image_whatever_the_batch(blip: Path) -> None:
    x, captioner = samples(6, shape=(3, 20, 20)).x, Captioner(blip, CPU)
    said = captioner(x)
    assert len(set(said)) > 1 and any(said)
    assert all("image" not in caption and "<" not in caption for caption in said)  # no special words, no prompt
    captioner.at_once = 2
    assert captioner(x) == said
    grey = samples(2, shape=(1, 28, 28)).x
    assert captioner(grey) == captioner(grey.expand(-1, 3, -1, -1))


def test_captions_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDKEEL_CACHE", str(tmp_path))
    x, seen = samples(4).x, []

    def describe(part: torch.Tensor) -> list[str]:
        seen.append(len(part))
        return [f"sum {int(image.sum())}" for image in part]

    twice = torch.cat([x, x[:1]])  # the same image again is described once
    first = captions(twice, "mark", lambda: describe)
    assert first == [f"sum {int(image.sum())}" for image in twice] and seen == [4]
    assert json.loads((tmp_path / "captions" / "mark.json").read_text())[image_key(x[0])] == first[0]

    def refuse() -> object:
        raise AssertionError("the captioner was loaded")

    assert captions(twice, "mark", refuse) == first  # type: ignore[arg-type]
    (tmp_path / "captions" / "mark.json").write_text("{")  # damage costs the captions, not the run
    assert captions(x, "mark", lambda: describe) == first[:4] and seen == [4, 4]
    captions(x, "another captioner", lambda: describe)
    assert seen == [4, 4, 4]


def test_an_image_is_known_by_shape_and_pixels() -> None:
    x = torch.arange(12, dtype=torch.uint8)
    assert image_key(x.view(1, 3, 4)) != image_key(x.view(1, 4, 3))
    assert image_key(x.view(1, 3, 4)) == image_key(x.view(1, 3, 4).clone())


def test_captioner_is_known_by_its_weights(blip: Path, tmp_path: Path) -> None:
    same = tmp_path / "same"
    same.mkdir()
    for path in blip.iterdir():
        (same / path.name).write_bytes(path.read_bytes())
    assert caption_mark(same, CPU) == caption_mark(blip, CPU)
    assert caption_mark(same, torch.device("cuda")) != caption_mark(blip, CPU)  # other arithmetic, other words
    other = blip2(tmp_path / "other")
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert caption_mark(other, CPU) != caption_mark(blip, CPU)


@pytest.mark.parametrize("vision_only", [False, True])
def test_features_of_either_form_of_clip(tmp_path: Path, vision_only: bool) -> None:
    encoder = Encoder(clip(tmp_path / "clip", 24, vision_only=vision_only), CPU)
    x = samples(5, shape=(1, 28, 28)).x
    features = encoder(x)
    assert features.shape == (5, 24) and features.dtype == torch.float32
    assert torch.allclose(features[:2], encoder(x[:2]), atol=1e-5)
    assert not torch.allclose(features[0], features[1], atol=1e-3)


@pytest.mark.parametrize("which", ["captioner", "image_encoder"])
def test_out_of_memory_halves_the_batch(
    blip: Path, tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    describer = Captioner(blip, CPU) if which == "captioner" else Encoder(clip(tmp_path / "clip", 8), CPU)
    x, room = samples(8).x, [4]
    name = "generate" if which == "captioner" else "get_image_features"
    whole, look = describer(x), getattr(describer.model, name)

    def small(**words: Any) -> Any:
        if len(words["pixel_values"]) > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return look(**words)

    monkeypatch.setattr(describer.model, name, small)
    with pytest.warns(UserWarning, match=rf"generator\.{which}: out of memory, going on with 4 images at a time"):
        again = describer(x)
    assert again == whole if isinstance(whole, list) else torch.allclose(again, whole, atol=1e-5)  # type: ignore[arg-type]
    assert describer.at_once == 4
    room[0], describer.at_once = 0, 1
    with pytest.raises(PoolError, match=rf"generator\.{which}: memory does not suffice"):
        describer(x)


def test_a_model_too_large_to_load(blip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.Blip2ForConditionalGeneration.from_pretrained", full)
    with pytest.raises(PoolError, match=r"generator\.captioner: the model in .* does not fit into memory"):
        Captioner(blip, CPU)


def test_describers_are_loaded_once_until_memory_is_short(
    blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, folder, free = Describers(), clip(tmp_path / "clip", 8), [1 << 40]
    monkeypatch.setattr("fedkeel.generators.condition.free_memory", lambda: free[0])
    captioner, encoder = held.captioner(blip, CPU), held.encoder(folder, CPU)
    held.rest()
    assert held.captioner(blip, CPU) is captioner and held.encoder(folder, CPU) is encoder
    assert held.encoder(clip(tmp_path / "other", 8), CPU) is not encoder
    free[0] = 10
    held.rest()
    assert held.captioner(blip, CPU) is not captioner
    held.release()
    gone = weakref.ref(captioner.model)
    del captioner
    gc.collect()
    assert gone() is None
    monkeypatch.undo()
    assert free_memory() >= 0


def test_a_model_that_has_no_room_when_it_comes_back(blip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another part of the work may have taken the memory that it had before."""
    held = Describers()
    captioner = held.captioner(blip, CPU)

    def full(device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(captioner.model, "to", full)
    with pytest.raises(PoolError, match=r"generator\.captioner: the model in .* does not fit into memory"):
        held.captioner(blip, CPU)


def test_clients_share_captioner_and_encoder(blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDKEEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fedkeel.generators.condition.free_memory", lambda: 1 << 40)
    loads, load = [], condition.loaded
    monkeypatch.setattr(condition, "loaded", lambda *words: (loads.append(words[0].__name__), load(*words))[1])
    options = StableDiffusion(captioner=str(blip), image_encoder=str(clip(tmp_path / "clip", 8)))
    source: Any = SimpleNamespace(options=options, device=CPU, classes=NAMES, describers=Describers())
    for client in range(3):
        own = samples(4, seed=client)
        said, means = describe(source, own, own.x, Streams(client))
        assert len(said) == 4 and means is not None
    assert loads == ["Blip2ForConditionalGeneration", "CLIPModel"]
    source.describers.release()
    describe(source, own, own.x, Streams(2))  # all captions are known
    assert loads[2:] == ["CLIPModel"]


def test_an_autoencoder_without_memory_says_what_to_change() -> None:
    def full(x: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    pipe = SimpleNamespace(vae=SimpleNamespace(encode=full, dtype=torch.float32))
    source: Any = SimpleNamespace(options=StableDiffusion(resolution=64), device=CPU, pipe=pipe)
    with pytest.raises(PoolError, match=r"one image of 64x64 in this memory: lower generator\.lora_resolution"):
        encoded(source, samples(1).x)


def test_features_where_the_library_returns_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, x = Encoder(clip(tmp_path / "clip", 8), CPU), samples(2).x
    made = encoder(x)
    new = encoder.model.get_image_features
    monkeypatch.setattr(encoder, "model", SimpleNamespace(get_image_features=lambda **kw: new(**kw).pooler_output))
    assert torch.equal(encoder(x), made)


def test_class_means_by_hand() -> None:
    """Features (3, 4) and (0, 2) count with length 1: (.6, .8) and (0, 1); their mean is (.3, .9), of length sqrt(.9),
    and is brought to length sqrt(2): (.3, .9) * sqrt(2 / .9)."""
    table = {0: (3.0, 4.0), 1: (0.0, 2.0), 2: (-5.0, 0.0)}
    data = samples(3, shape=(1, 1, 1))
    data.x[:, 0, 0, 0] = torch.tensor([0, 1, 2])
    data.y[:] = torch.tensor([0, 0, 2])

    def encode(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([table[int(image)] for image in x.flatten()])

    means = class_means(encode, data, NAMES, 8, Streams(1))
    assert torch.allclose(means[0], torch.tensor([0.3, 0.9]) * (2 / 0.9) ** 0.5)
    assert means[1].isnan().all() and torch.allclose(means[2], torch.tensor([-(2**0.5), 0.0]))
    one = class_means(encode, data, NAMES, 1, Streams(1))[0]  # of one image drawn at random
    assert any(torch.allclose(one, unit(torch.tensor(table[i]))) for i in (0, 1))
    assert torch.equal(one, class_means(encode, data, NAMES, 1, Streams(1))[0])
    drawn = {tuple(class_means(encode, data, NAMES, 1, Streams(seed))[0].tolist()) for seed in range(20)}
    assert len(drawn) == 2


def test_missing_classes_get_the_clients_mean_or_nothing() -> None:
    means = torch.tensor([[2.0**0.5, 0.0], [torch.nan, torch.nan], [0.0, 2.0**0.5]])
    known = Condition(((), (), ()), means)
    assert torch.equal(known.visual(0, "none"), means[0])  # type: ignore[arg-type]
    assert known.visual(1, "none") is None
    style = known.visual(1, "client_mean")
    assert style is not None and torch.allclose(style, torch.ones(2))
    assert Condition(((), (), ()), None).visual(0, "client_mean") is None
    assert Condition(((), (), ()), torch.full((3, 2), torch.nan)).visual(0, "client_mean") is None


def test_phrases() -> None:
    assert phrase("A photo of boot", "a red boot on grass") == "A photo of boot, a red boot on grass"
    assert phrase("A photo of boot", "") == "A photo of boot"


def test_missing_and_wrong_weights_are_named(blip: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"generator.captioner: Salesforce/blip2 .*hf download Salesforce/blip2 "):
        find("Salesforce/blip2", False, "generator.captioner")
    with pytest.raises(DataError, match=r"hf download openai/clip --revision v1"):
        find("openai/clip@v1", False, "generator.image_encoder")
    half = Path(shutil.copytree(blip, tmp_path / "half"))
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (half / name).unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"lacks tokenizer\.json$"):
        find(str(half), False, "generator.captioner")
    with pytest.raises(DataError, match="there is no folder"):
        find("./nowhere", False, "generator.captioner")
    assert find(str(blip), False, "generator.captioner") == blip
    with pytest.raises(DataError, match="type 'blip-2'; image features need CLIP"):
        Encoder(blip, CPU)
    folder = clip(tmp_path / "clip", 8)
    with pytest.raises(DataError, match="type 'clip'; captions need BLIP-2"):
        Captioner(folder, CPU)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match=r"lacks preprocessor_config\.json"):
        find(str(folder), False, "generator.image_encoder")
    with pytest.raises(DataError, match="AutoImageProcessor"):
        Encoder(folder, CPU)
    folder = clip(tmp_path / "cut", 8)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged or cut off"):
        find(str(folder), False, "generator.image_encoder")


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    folder = clip(tmp_path / "clip", 8)
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("visual_projection.weight")
    files.write_tensors(folder / "model.safetensors", weights)
    with pytest.raises(DataError, match=r"visual_projection\.weight"):
        Encoder(folder, CPU)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        Encoder(folder, CPU)
    assert config["model_type"] == "clip"
