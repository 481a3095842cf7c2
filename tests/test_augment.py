"""The augmentations of common.py for contrastive learning, against torchvision's operators image by image."""
import math

import pytest
import torch
import torchvision.transforms.v2.functional as T
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from common import color_jitter, crop_resize, random_blur, random_flip, random_resized_crop, simclr_augment


@pytest.fixture
def x():
    torch.manual_seed(0)
    smooth = T.resize(torch.rand(6, 3, 9, 9), [32, 32], InterpolationMode.BICUBIC).clamp(0, 1)
    return torch.cat([smooth, torch.rand(2, 3, 32, 32)])


def test_crops_against_torchvision(x):
    """At the border of the box torchvision repeats its pixels, ours reads on: the inside is compared."""
    boxes = [(4, 6, 20, 24), (10, 3, 16, 16), (0, 0, 11, 13), (20, 20, 12, 12), (1, 2, 30, 29), (8, 0, 9, 32)]
    got = crop_resize(x[:6], torch.tensor(boxes))
    for image, ours, (left, top, width, height) in zip(x, got, boxes, strict=False):
        where = (top, left, height, width, [32, 32], InterpolationMode.BICUBIC)
        theirs = T.resized_crop(image, *where, antialias=False).clamp(0, 1)
        rows, cols = math.ceil(2 * 32 / height) + 1, math.ceil(2 * 32 / width) + 1
        inside = (slice(None), slice(rows, -rows), slice(cols, -cols))
        assert torch.allclose(ours[inside], theirs[inside], atol=1e-4)


def test_boxes_have_the_distribution_of_torchvision(monkeypatch):
    seen, one = [], torch.zeros(1, 64, 64)
    monkeypatch.setattr("common.crop_resize", lambda x, boxes: seen.append(boxes) or x)
    torch.manual_seed(0)
    random_resized_crop(one.expand(20_000, 1, 64, 64))
    left, top, width, height = seen[0].T
    assert min(left.min(), top.min()) >= 0 and max((left + width).max(), (top + height).max()) <= 64
    draws = [RandomResizedCrop.get_params(one, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    theirs = torch.tensor(draws).float()[:, [1, 0, 3, 2]].T
    for of in (lambda b: b[0], lambda b: b[1], lambda b: b[2] * b[3] / 64, lambda b: 64 * b[2] / b[3]):
        a, b = of(seen[0].T), of(theirs)
        assert abs(a.mean() - b.mean()) < 1 and abs(a.std() - b.std()) < 1  # of 64


@pytest.mark.parametrize("seed", range(4))
def test_jitter_against_torchvision_image_by_image(x, seed):
    """The four operators one by one, each with a factor of its own for each image, in the order drawn."""
    torch.manual_seed(seed)
    got = color_jitter(x, 0.4, 0.3, 0.5, 0.4, p=1.0)
    torch.manual_seed(seed)  # the same draws once more
    draws = [1 + v * (2 * torch.rand(8, 1, 1, 1) - 1) for v in (0.4, 0.3, 0.5, 0.4)]
    order = torch.rand(8, 4).argsort(1)
    hue = lambda z, f: T.adjust_hue(z, f - 1)  # noqa: E731
    operators = [T.adjust_brightness, T.adjust_contrast, T.adjust_saturation, hue]
    for i in range(8):
        want = x[i]
        for op in order[i].tolist():
            want = operators[op](want, draws[op][i].item())
        assert torch.allclose(got[i], want, atol=2e-3), (i, order[i])


def test_blur_against_torchvision(x):
    torch.manual_seed(3)
    got = random_blur(x, 1.0)
    torch.manual_seed(3)
    for ours, image, sigma in zip(got, x, 0.1 + 1.9 * torch.rand(8), strict=True):
        assert torch.allclose(ours, T.gaussian_blur(image, [3, 3], [sigma.item()] * 2), atol=1e-4)


def test_each_image_draws_for_itself():
    """With the probabilities asked for, and within [0, 1] also where rounding could leave it: white."""
    torch.manual_seed(0)
    same = torch.rand(1, 3, 32, 32).expand(400, -1, -1, -1)
    for view in (random_resized_crop(same), color_jitter(same, 0.4, 0.4, 0.4, 0.1), random_blur(same, 1.0)):
        assert len({tuple(image.flatten()[:50].tolist()) for image in view}) > 200
    jittered, grey = color_jitter(same, 0.4, 0.4, 0.4, 0.1, p=0.8), simclr_augment(same).std(1) < 1e-3
    for happened, p in ((random_flip(same) != same, 0.5), (jittered != same, 0.8), (~grey, 0.8)):
        assert happened.flatten(1).any(1).float().mean().item() == pytest.approx(p, abs=0.08)
    white = simclr_augment(torch.ones(80, 3, 96, 96), blur=1.0)
    assert white.min() >= 0 and white.max() <= 1
