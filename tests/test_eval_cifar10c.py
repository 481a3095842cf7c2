"""eval_cifar10c.py: reading CIFAR-10-C, the six corruptions made here, the arithmetic of the table."""
import colorsys
import io

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import rotation_at
from common import UserError, ce_per_image, draw, load_data, load_model, pgd, robust_accuracy
from eval_cifar10c import Args, corrupt, main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small network trained on digits, linf eps 0.1."""
    folder = tmp_path_factory.mktemp("trained") / "robust"
    args = TINY | dict(variant="T0", epochs=4, val_fraction=0.6, out=str(folder))
    rotation_at.main(rotation_at.Args(**args))
    return folder / "best.pt"


def test_noise_has_the_official_strength_and_depends_on_the_seed():
    x = torch.full((20, 3, 32, 32), 128, dtype=torch.uint8)
    for s, (std, p) in enumerate([(0.04, 0.01), (0.06, 0.02), (0.08, 0.03), (0.09, 0.05), (0.10, 0.07)]):
        noisy, hit = (corrupt(x, kind, s + 1) for kind in ("gaussian_noise", "impulse_noise"))
        assert noisy.float().std().item() / 255 == pytest.approx(std, rel=0.03)
        assert (hit != 128).float().mean().item() == pytest.approx(p, rel=0.1)
        assert set(hit.unique().tolist()) == {0, 128, 255}
        assert not torch.equal(noisy, corrupt(x, "gaussian_noise", s + 1, seed=1))


def test_brightness_against_hsv_pixel_by_pixel():
    """By Python's own conversion to HSV and back."""
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    x[0, :, 0] = torch.arange(32).byte() * 8  # greys, black among them
    for s, c in enumerate([0.05, 0.1, 0.15, 0.2, 0.3]):
        got = corrupt(x, "brightness", s + 1)
        for i, row, col in [(0, 0, 0), (0, 0, 5), (0, 0, 31), (0, 9, 15), (1, 3, 3), (1, 30, 2), (1, 16, 20)]:
            h, sat, v = colorsys.rgb_to_hsv(*(x[i, :, row, col] / 255).tolist())
            want = [255 * value for value in colorsys.hsv_to_rgb(h, sat, min(1, v + c))]
            assert np.allclose(got[i, :, row, col], want, atol=1.01)


def test_blur_of_a_dot_is_a_gaussian():
    dot, x = torch.zeros(1, 1, 33, 33), np.arange(-16, 17)
    dot[..., 16, 16] = 1
    for s, sigma in enumerate([0.4, 0.6, 0.7, 0.8, 1]):
        line = np.exp(-0.5 * (x / sigma) ** 2)
        got = corrupt((255 * dot).byte(), "gaussian_blur", s + 1)[0, 0]
        assert np.allclose(got, 255 * np.outer(line, line) / line.sum() ** 2, atol=1.01)


def test_contrast_and_jpeg_against_their_definitions():
    pictures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    average = pictures.float().mean((2, 3), keepdim=True)
    for s, (c, quality) in enumerate([(0.75, 80), (0.5, 65), (0.4, 58), (0.3, 50), (0.15, 40)]):
        got = corrupt(pictures, "contrast", s + 1).float()
        assert ((pictures - average) * c + average - got).abs().max() < 1.01
        file = io.BytesIO()
        Image.fromarray(pictures[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        got = corrupt(pictures, "jpeg_compression", s + 1)[0].permute(1, 2, 0)
        assert np.array_equal(got, np.array(Image.open(file)))


def test_arrays_and_folders_give_the_same_accuracies(tmp_path, checkpoint):
    """CIFAR-10-C's layout and ImageNet-C's; a missing class, other images and other labels are refused."""
    train, labels = load_data("digits", "", torch.device("cpu"))[0], np.tile(np.arange(10), 5)
    rows = [(train.labels == c).nonzero()[s].item() for s in range(5) for c in range(10)]
    pixels = train.pixels[rows].permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "labels.npy", labels)
    np.save(tmp_path / "fog.npy", pixels)
    for i in range(50):
        file = tmp_path / "fog" / str(i // 10 + 1) / f"class{labels[i]}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(file)
    more = dict(checkpoints=(str(checkpoint),), data_dir=str(tmp_path), eval_attack="none", workers=0)
    arrays = Args(**more, corruptions="fog", out=str(tmp_path / "a"))
    folders = Args(**more, dataset="folder", image_size=16, out=str(tmp_path / "b"))  # the network's 32 count
    a, b = (main(args)["rows"] for args in (arrays, folders))
    assert [r["accuracy"] for r in a] == [r["accuracy"] for r in b] and len(a) == 6
    (tmp_path / "fog" / "2" / "class3").rename(tmp_path / "elsewhere")
    np.save(tmp_path / "fog.npy", pixels + 1)
    for args, match in (folders, "fog 2: other classes or number"), (arrays, "the data are not those"):
        (tmp_path / args.out / "results.json").unlink()
        args.resume = True
        with pytest.raises(UserError, match=match):
            main(args)
    np.save(tmp_path / "labels.npy", np.arange(50) // 5)
    with pytest.raises(UserError, match="five times the same labels"):
        main(arrays)


def test_rows_equal_an_independent_computation(tmp_path, checkpoint):
    """Means are those of the cells, for the types of the benchmark and for all types."""
    less = dict(dataset="digits", severities="1,5", eval_examples=40, eval_steps=3, workers=0)
    less |= dict(corruptions="brightness,contrast,gaussian_blur", generate=True)
    rows = main(Args((str(checkpoint),), **less, out=str(tmp_path)))["rows"]
    cells = [r for r in rows if r["severity"] != "all"]
    model, (_, test) = load_model(checkpoint), load_data("digits", "", torch.device("cpu"))
    some = draw(test, 40, seed=0).index
    for r in cells:
        x = corrupt(test.pixels, r["corruption"], r["severity"]) / 255
        if r["attack"] == "none":
            right = model(x).argmax(1) == test.labels
            assert (r["examples"], r["eps"], r["correct"]) == (360, 0, right.sum().item())
        else:
            torch.manual_seed(0)
            attack = lambda x, y: pgd(lambda z: ce_per_image(model(z), y), x, eps=0.1, steps=3)  # noqa: E731
            want = robust_accuracy(model, [(x[some], test.labels[some])], attack)
            assert (r["attack"], r["norm"], r["eps"], r["examples"]) == ("pgd-3", "linf", 0.1, 40)
            assert r["accuracy"] == pytest.approx(want, abs=0.01)
    for attack in ("none", "pgd-3"):
        mine = [100 * r["correct"] / r["examples"] for r in cells if r["attack"] == attack]
        for title, count in ("mean of 2 of 15", 4), ("mean of 3", 6):
            (row,) = [r for r in rows if (r["corruption"], r["attack"]) == (title, attack)]
            assert row["accuracy"] == round(sum(mine[:count]) / count, 2)
