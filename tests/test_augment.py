"""The augmentations of common.py for contrastive learning, against torchvision's operators image by image."""
import math

import pytest
import torch
import torchvision.transforms.v2.functional as T

from common import adjust_hue, color_jitter, crop_resize, random_blur, random_flip, random_resized_crop, simclr_augment, to_grey


@pytest.fixture
def x():
    g = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(6, 3, 9, 9, generator=g), size=(32, 32), mode="bicubic").clamp(0, 1)
    return torch.cat([smooth, torch.rand(2, 3, 32, 32, generator=g)])


def test_crops_against_torchvision(x):
    """Crop and bicubic resize; at the border of the box torchvision repeats its pixels, ours reads on, so the inside is compared."""
    boxes = [(0, 0, 32, 32), (4, 6, 20, 24), (10, 3, 16, 16), (0, 0, 11, 13), (20, 20, 12, 12), (1, 2, 30, 29), (5, 5, 9, 10), (8, 0, 24, 32)]
    got = crop_resize(x, torch.tensor(boxes))
    for i, (left, top, width, height) in enumerate(boxes):
        want = T.resized_crop(x[i], top, left, height, width, [32, 32], interpolation=T.InterpolationMode.BICUBIC, antialias=False).clamp(0, 1)
        skip_y, skip_x = math.ceil(2 * 32 / height) + 1, math.ceil(2 * 32 / width) + 1
        inside = (slice(None), slice(skip_y, -skip_y), slice(skip_x, -skip_x))
        assert torch.allclose(got[i][inside], want[inside], atol=1e-4)
    assert torch.allclose(got[0], x[0], atol=1e-5)  # the whole image is itself


def test_boxes_have_the_distribution_they_should(monkeypatch):
    seen = []
    monkeypatch.setattr("common.crop_resize", lambda x, boxes: seen.append(boxes) or x)
    torch.manual_seed(0)
    random_resized_crop(torch.zeros(20_000, 1, 64, 64))
    left, top, width, height = seen[0].unbind(1)
    assert (left >= 0).all() and (top >= 0).all() and (left + width <= 64).all() and (top + height <= 64).all()
    area, aspect = width * height / 64**2, width / height
    assert area.min() > 0.06 and area.max() <= 1 and 0.7 < aspect.min() and aspect.max() < 1.43
    # torchvision's own draws
    from torchvision.transforms import RandomResizedCrop

    theirs = [RandomResizedCrop.get_params(torch.zeros(1, 64, 64), (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    their_area = torch.tensor([h * w / 64**2 for _, _, h, w in theirs])
    their_left = torch.tensor([float(left) for _, left, _, _ in theirs])
    assert area.mean().item() == pytest.approx(their_area.mean().item(), abs=0.015)
    assert area.std().item() == pytest.approx(their_area.std().item(), abs=0.015)
    assert left.mean().item() == pytest.approx(their_left.mean().item(), abs=0.8)


def test_hue_and_grey_against_torchvision(x):
    shift = torch.tensor([0.0, 0.1, -0.1, 0.5, -0.5, 0.25, 0.05, -0.3]).view(-1, 1, 1, 1)
    got = adjust_hue(x, shift)
    for i in range(8):
        assert torch.allclose(got[i], T.adjust_hue(x[i], shift[i].item()), atol=1e-4)
    assert torch.allclose(to_grey(x), T.rgb_to_grayscale(x), atol=1e-3)
    flat = torch.full((1, 3, 4, 4), 0.3)  # grey has no hue
    assert torch.allclose(adjust_hue(flat, torch.full((1, 1, 1, 1), 0.4)), flat)


@pytest.mark.parametrize("place", range(4))
def test_jitter_against_torchvision_image_by_image(x, place, monkeypatch):
    """The four operators one by one, each with a factor of its own for each image, in the order drawn."""
    torch.manual_seed(place)
    state = torch.get_rng_state()
    got = color_jitter(x, 0.4, 0.3, 0.5, 0.1, p=1.0)
    torch.set_rng_state(state)  # the same draws once more
    draws = [1 + v * (2 * torch.rand(8, 1, 1, 1) - 1) for v in (0.4, 0.3, 0.5, 0.1)]
    order = torch.rand(8, 4).argsort(1)
    operators = [T.adjust_brightness, T.adjust_contrast, T.adjust_saturation, lambda z, f: T.adjust_hue(z, f - 1)]
    for i in range(8):
        want = x[i]
        for op in order[i].tolist():
            want = operators[op](want, draws[op][i].item())
        assert torch.allclose(got[i], want, atol=2e-3), (i, order[i])
    assert len({tuple(o) for o in order.tolist()}) > 1  # images differ in their order, too


def test_each_image_draws_for_itself():
    torch.manual_seed(0)
    same = torch.rand(1, 3, 32, 32).expand(64, -1, -1, -1).contiguous()
    for augment in (random_resized_crop, lambda z: color_jitter(z, 0.4, 0.4, 0.4, 0.1), lambda z: random_blur(z, 1.0)):
        out = augment(same)
        assert len({tuple(image.flatten()[:50].tolist()) for image in out}) > 30
        assert out.shape == same.shape and out.min() >= 0 and out.max() <= 1
    flipped = (random_flip(same) != same).flatten(1).any(1).float().mean().item()
    assert 0.3 < flipped < 0.7
    untouched = (color_jitter(same, 0.4, 0.4, 0.4, 0.1, p=0.8) == same).flatten(1).all(1).float().mean().item()
    assert 0.05 < untouched < 0.4
    views = simclr_augment(same, blur=0.5)
    grey = (views[:, :1] - views).abs().amax((1, 2, 3)) < 1e-3
    assert 0.05 < grey.float().mean() < 0.4


def test_white_stays_white():
    """Rounding must not leave [0, 1]: the attacks would refuse the view."""
    torch.manual_seed(0)
    for _ in range(5):
        views = simclr_augment(torch.ones(16, 3, 96, 96), blur=1.0)
        assert views.max() <= 1 and views.min() >= 0


def test_blur_against_torchvision(x, monkeypatch):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    got = random_blur(torch.cat([x] * 2, 3), 1.0)[:, :, :, :32]  # wide images: the right half is not looked at
    torch.set_rng_state(state)
    sigma = 0.1 + 1.9 * torch.rand(8, 1)
    for i in range(8):
        want = T.gaussian_blur(torch.cat([x[i]] * 2, 2), [3, 3], [sigma[i].item()] * 2)[:, :, :32]
        assert torch.allclose(got[i], want, atol=1e-4)
