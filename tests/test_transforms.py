"""Augmentation and normalisation against a loop over images written out plainly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkeel.data.transforms import Augment, Transform
from fedkeel.options import build

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def images(b: int = 32, c: int = 3, h: int = 6, w: int = 5) -> Tensor:
    return torch.randint(0, 256, (b, c, h, w), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def transform(channels: int = 3, **options: object) -> Transform:
    return Transform(mean=MEAN[:channels], std=STD[:channels], **options)  # type: ignore[arg-type]


def rng(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(out: Tensor) -> np.ndarray:
    """Back to [0, 255]."""
    mean, std = (torch.tensor(v[: out.shape[1]])[:, None, None] for v in (MEAN, STD))
    return ((out * std + mean) * 255).numpy()


@pytest.mark.parametrize("channels", [1, 3])
def test_evaluation_only_normalises(channels: int) -> None:
    x = images(c=channels)
    out = transform(channels, crop=2, flip=True, fresh_noise=0.5)(x, rng=None)
    mean, std = (np.array(v[:channels])[:, None, None] for v in (MEAN, STD))
    np.testing.assert_allclose(out.numpy(), (x.numpy() / 255 - mean) / std, atol=1e-5)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("crop", "flip"), [(2, True), (2, False), (0, True)])
def test_every_image_is_one_of_its_crops(channels: int, crop: int, flip: bool) -> None:
    """Each output is a window of its own image padded with black, mirrored or not, and all windows occur."""
    x = images(b=400, c=channels)
    out = pixels(transform(channels, crop=crop, flip=flip)(x, rng=rng())).round().astype(int)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (crop, crop), (crop, crop)))
    seen = set()
    for image, got in zip(padded, out, strict=True):
        found = [
            (i, j, mirrored)
            for i in range(2 * crop + 1)
            for j in range(2 * crop + 1)
            for mirrored in (False, True)
            if np.array_equal(image[:, i : i + 6, j : j + 5][..., :: -1 if mirrored else 1], got)
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == (2 * crop + 1) ** 2 * (1 + flip)


def test_only_marked_rows_change_and_marks_change_no_other_row() -> None:
    x, t = images(), transform(crop=2, flip=True)
    plain, everything = t(x, rng=None), t(x, rng=rng())
    marked = torch.arange(32) % 3 == 0
    some = t(x, rng=rng(), augment=marked)
    assert torch.equal(some[marked], everything[marked])
    assert torch.equal(some[~marked], plain[~marked])
    assert not torch.equal(everything[~marked], plain[~marked])


def test_one_switch_changes_nothing_else() -> None:
    """Crop on or off leaves the flips, noise leaves both, and the generator ends in the same state. With all off
    nothing is drawn, which touches nobody else's draws: the stream is this one's alone."""
    x = images()
    states = []
    assert not transform().random
    for options in ({"crop": 2}, {"flip": True}, {"crop": 2, "flip": True, "fresh_noise": 0.1}):
        generator = rng()
        transform(**options)(x, rng=generator)
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)
    flipped = transform(flip=True)(x, rng=rng())
    rows = (flipped != transform()(x, rng=None)).flatten(1).any(1)
    assert torch.equal(flipped[rows], transform()(x.flip(3)[rows], rng=None))
    assert 5 < int(rows.sum()) < 27


def test_synthetic_rows_are_augmented_on_request_but_never_noisy() -> None:
    x, none = images(), torch.zeros(32, dtype=torch.bool)
    on = transform(crop=2, flip=True, augment_synthetic=True)
    assert torch.equal(on(x, rng=rng(), augment=none), transform(crop=2, flip=True)(x, rng=rng()))
    noisy = transform(fresh_noise=0.3)
    assert torch.equal(noisy(x, rng=rng(), augment=none), noisy(x, rng=None))


def test_fresh_noise_has_its_strength_and_is_fresh() -> None:
    x = torch.full((64, 3, 16, 16), 128, dtype=torch.uint8)
    t, generator = transform(fresh_noise=0.1), rng()
    first, second = (pixels(t(x, rng=generator)) - 128 for _ in range(2))
    assert first.std() / 255 == pytest.approx(0.1, rel=0.02)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02


def test_the_input_is_left_alone() -> None:
    x = images()
    before = x.clone()
    transform(crop=2, flip=True, fresh_noise=0.2)(x, rng=rng())
    assert torch.equal(x, before)


def test_section() -> None:
    assert build(Augment, {"crop": 4, "flip": True}) == Augment(crop=4, flip=True, synthetic=False)
