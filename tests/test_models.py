"""Models: every registered one splits into features and head; known sizes; weights of others load by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedkeel import registry
from fedkeel.errors import ConfigError, DataError
from fedkeel.models.cnn import CNN
from fedkeel.models.mlp import MLP
from fedkeel.models.resnet import ResNet18, ResNet34
from fedkeel.models.split import Model, Split
from fedkeel.options import build, options
from fedkeel.rng import Streams, isolated


def variants() -> list[tuple[str, str]]:
    """Every registered model with every normalisation it offers ("" for those that offer none)."""
    found = []
    for name in registry.names("models"):
        norms = [option.kind.split(" | ") for option in options(registry.get("models", name)) if option.name == "norm"]
        found += [(name, norm) for norm in (norms[0] if norms else [""])]
    return found


def make(name: str, norm: str, **more: object) -> Model:
    table = {"norm": norm} if norm else {}
    model: Model = build(registry.get("models", name), {**table, **more}, "model")
    return model


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images(shape: tuple[int, int, int], batch: int = 2) -> Tensor:
    return torch.rand(batch, *shape, generator=Streams(0)("test"))


@pytest.mark.parametrize(("name", "norm"), variants())
def test_splits_into_features_and_head(name: str, norm: str) -> None:
    model = make(name, norm).build((3, 32, 24), 7)
    x = images((3, 32, 24))
    model.eval()
    with torch.no_grad():
        z = model.features(x)
        assert z.shape == (2, model.width)
        assert torch.equal(model.head(z), model(x))
        assert model(x).shape == (2, 7)
    assert bool(list(model.buffers())) == (norm == "batch")  # group normalisation has no running statistics


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 28, 28), (2, 17, 31), (3, 64, 48)])
def test_small_networks_take_any_size(shape: tuple[int, int, int]) -> None:
    for small in (CNN(norm="group"), MLP(hidden=(8, 4))):
        assert small.build(shape, 5)(images(shape)).shape == (2, 5)


@pytest.mark.parametrize(("name", "norm"), variants())
def test_one_sample_trains(name: str, norm: str) -> None:
    model = make(name, norm).build((3, 16, 16), 4)
    loss = nn.functional.cross_entropy(model(images((3, 16, 16), 1)), torch.tensor([2]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("name", "norm"), variants())
def test_seed_decides_the_weights_and_they_survive_a_round_trip(name: str, norm: str) -> None:
    def fresh(seed: int) -> Split:
        with isolated(Streams(seed)("init")):
            return make(name, norm).build((1, 16, 16), 3).eval()

    before = torch.get_rng_state()
    first, again, other = fresh(1), fresh(1), fresh(2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in first.state_dict().items())
    assert not torch.equal(first.head.weight, other.head.weight)

    other.load_state_dict(first.state_dict())
    x = images((1, 16, 16))
    assert torch.equal(first(x), other(x))


@pytest.mark.parametrize(
    ("options", "shape", "classes", "parameters"),
    [
        (CNN(), (1, 28, 28), 10, 201_538),
        (CNN(width=8, hidden=32, norm="group"), (1, 16, 16), 10, 208 + 16 + 3216 + 32 + (16 * 32 + 32) + 330),
        (MLP(), (1, 28, 28), 10, 784 * 200 + 200 + 2010),
        (MLP(hidden=()), (1, 28, 28), 10, 7850),
        (ResNet18(), (3, 32, 32), 10, 11_173_962),
        (ResNet18(norm="group"), (3, 32, 32), 10, 11_173_962),
        (ResNet18(), (3, 224, 224), 1000, 11_689_512),
        (ResNet34(), (3, 32, 32), 10, 21_282_122),
        (ResNet34(), (3, 224, 224), 1000, 21_797_672),
    ],
    ids=str,
)
def test_known_sizes(options: Model, shape: tuple[int, int, int], classes: int, parameters: int) -> None:
    assert count(options.build(shape, classes)) == parameters


@torch.no_grad()
def test_imagenet_stem() -> None:
    """At 224 pixels the four layers make 56, 28, 14 and 7 pixels."""
    model = ResNet18(norm="group").build((3, 224, 224), 20)
    body = model.features
    x = images((3, 224, 224), 1)
    y = body.maxpool(body.relu(body.bn1(body.conv1(x))))
    for layer, pixels in zip((body.layer1, body.layer2, body.layer3, body.layer4), (56, 28, 14, 7), strict=True):
        y = layer(y)
        assert y.shape[2:] == (pixels, pixels)
    assert torch.equal(model.head(y.mean(dim=(2, 3))), model(x))


@pytest.mark.parametrize(
    ("stem", "side", "kernel"), [("auto", 64, 3), ("auto", 65, 7), ("imagenet", 64, 7), ("cifar", 96, 3)]
)
def test_stem_by_size_or_by_choice(stem: str, side: int, kernel: int) -> None:
    model = make("resnet18", "batch", stem=stem).build((3, 32, side), 10)
    assert model.features.conv1.kernel_size == (kernel, kernel)


def test_resnet_starts_with_he_weights() -> None:
    """Variance 2 / (outputs x 9) for a 3x3 convolution; normalisation starts as the identity."""
    with isolated(Streams(3)("init")):
        body = ResNet18().build((3, 32, 32), 10).features
    weight = body.layer3[1].conv1.weight
    assert float(weight.detach().std()) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    assert torch.equal(body.layer3[1].bn1.weight, torch.ones(256))
    assert torch.equal(body.layer3[1].bn1.bias, torch.zeros(256))


@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 65, 67), (1, 32, 33)])
def test_a_stride_shrinks_the_first_layer(shape: tuple[int, int, int]) -> None:
    model = CNN(stride=2, hidden=8).build(shape, 10)
    assert model(images(shape)).shape == (2, 10)
    assert count(model) < count(CNN(hidden=8).build(shape, 10))
    assert count(CNN(stride=1).build((1, 28, 28), 10)) == 201_538


@pytest.mark.parametrize(
    ("name", "more", "shape", "smallest"),
    [
        ("cnn", {}, (1, 28, 15), 16),
        ("cnn", {"stride": 2}, (3, 64, 31), 32),
        ("resnet18", {}, (3, 7, 32), 8),
        ("resnet34", {"stem": "imagenet"}, (3, 32, 31), 32),
    ],
)
def test_too_small_images(name: str, more: dict[str, object], shape: tuple[int, int, int], smallest: int) -> None:
    with pytest.raises(ConfigError) as caught:
        make(name, "", **more).build(shape, 10)
    assert name in str(caught.value)
    assert f"{smallest} x {smallest}" in str(caught.value)
    assert f"{shape[1]} x {shape[2]}" in str(caught.value)


@pytest.mark.parametrize(("name", "more"), [("resnet18", {"groups": 24}), ("cnn", {"width": 6, "groups": 4})])
def test_groups_must_divide_the_channels(name: str, more: dict[str, object]) -> None:
    make(name, "batch", **more)  # not used, so not checked
    with pytest.raises(ConfigError, match=r"model\.groups"):
        make(name, "group", **more)


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"model\.hidden\[0\]"):
        make("mlp", "", hidden=[0])
    with pytest.raises(ConfigError, match="Did you mean 'batch'"):
        make("resnet18", "batsh")


def published(model: Split) -> dict[str, Tensor]:
    """The weights of a model under torchvision's names."""
    return {
        f"fc.{key.removeprefix('head.')}" if key.startswith("head.") else key.removeprefix("features."): value.clone()
        for key, value in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder with ResNet-18 weights of 6 classes, as torchvision names them, and what is in it."""
    folder = tmp_path_factory.mktemp("pretrained")
    with isolated(Streams(5)("init")):
        weights = published(ResNet18(stem="imagenet").build((3, 32, 32), 6))
    weights["bn1.running_mean"] += 0.5
    save_file(weights, folder / "model.safetensors")
    return folder, weights


def test_published_names(pretrained: tuple[Path, dict[str, Tensor]]) -> None:
    """Names that torchvision's resnet18 is known to have, and how many: 62 parameters and 60 buffers."""
    _, weights = pretrained
    known = {"conv1.weight", "bn1.running_var", "layer2.0.downsample.0.weight", "layer2.0.downsample.1.bias"}
    assert known | {"layer4.1.conv2.weight", "fc.bias"} <= weights.keys()
    assert "layer1.0.downsample.0.weight" not in weights
    assert len(weights) == 122


def test_pretrained_weights_load(pretrained: tuple[Path, dict[str, Tensor]]) -> None:
    folder, weights = pretrained
    for place in (folder, folder / "model.safetensors"):
        model = ResNet18(stem="imagenet", pretrained=str(place)).build((3, 32, 32), 6)
        loaded = published(model)
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_pretrained_body_with_another_head(pretrained: tuple[Path, dict[str, Tensor]]) -> None:
    """With another class count the head is the one a fresh model of that seed has."""
    folder, weights = pretrained
    with isolated(Streams(7)("init")):
        fresh = ResNet18(stem="imagenet").build((3, 32, 32), 4)
    with isolated(Streams(7)("init")):
        model = ResNet18(stem="imagenet", pretrained=str(folder)).build((3, 32, 32), 4)
    assert torch.equal(model.head.weight, fresh.head.weight)
    assert torch.equal(model.features.layer4[0].conv1.weight, weights["layer4.0.conv1.weight"])


def test_pretrained_without_head_and_counters(pretrained: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    _, weights = pretrained
    few = {k: v for k, v in weights.items() if not k.startswith("fc.") and not k.endswith("num_batches_tracked")}
    save_file(few, tmp_path / "body.safetensors")
    model = ResNet18(stem="imagenet", pretrained=str(tmp_path)).build((3, 32, 32), 6)
    assert torch.equal(model.features.bn1.running_mean, weights["bn1.running_mean"])


def test_pretrained_that_does_not_fit(pretrained: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, _ = pretrained
    with pytest.raises(
        ConfigError, match=r"features\.conv1\.weight is \[64, 3, 7, 7\] in it, \[64, 3, 3, 3\] in the model"
    ):
        ResNet18(pretrained=str(folder)).build((3, 32, 32), 6)
    with pytest.raises(ConfigError, match=r"the model has no features\.bn1\.running_mean; .* and 37 more"):
        ResNet18(stem="imagenet", norm="group", pretrained=str(folder)).build((3, 32, 32), 6)
    with pytest.raises(ConfigError, match=r"it lacks features\.layer1\.2\.bn1\.bias; .* and 77 more"):
        ResNet34(stem="imagenet", pretrained=str(folder)).build((3, 32, 32), 6)
    with pytest.raises(ConfigError, match="no such file"):
        ResNet18(pretrained=str(tmp_path / "none.safetensors")).build((3, 32, 32), 6)
    with pytest.raises(ConfigError, match=r"one \.safetensors file, not 0"):
        ResNet18(pretrained=str(tmp_path)).build((3, 32, 32), 6)
    (tmp_path / "damaged.safetensors").write_bytes(b"not tensors")
    with pytest.raises(DataError, match="damaged"):
        ResNet18(pretrained=str(tmp_path / "damaged.safetensors")).build((3, 32, 32), 6)
