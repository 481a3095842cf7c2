"""eval_unforeseen.py: each of Kang et al.'s attacks stays in its ball, climbs its loss, does what it says."""
import io
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from PIL import Image

import eval_unforeseen
import rotation_at
from common import batches, ce_per_image, draw, load_data, load_model, robust_accuracy
from eval_unforeseen import UNFORESEEN, frank_wolfe, from_jpeg, main, snow, table, to_jpeg, unforeseen, warp


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unforeseen")
    args = TINY | dict(variant="T0", eps=0.0, epochs=6, val_fraction=0.3, lr=0.05, out=str(folder / "a"))
    rotation_at.main(rotation_at.Args(**args))
    return folder / "a" / "best.pt"


def smooth_images() -> torch.Tensor:
    """Soft and far from black and white, so that little is clipped."""
    torch.manual_seed(1)
    return 0.4 + 0.2 * F.interpolate(torch.rand(3, 3, 4, 4), size=(32, 32), mode="bilinear")


def attacked(kind: str, radius: float, x: torch.Tensor, steps: int = 8) -> torch.Tensor:
    weight = torch.randn(x[0].numel(), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    return unforeseen(lambda z: (z.flatten(1) * weight).sin().sum(1), x, kind, radius, steps)


@pytest.mark.parametrize("kind", UNFORESEEN)
def test_lowers_accuracy_and_goes_uphill(checkpoint, kind):
    _, test = load_data("digits", "", torch.device("cpu"))
    model, (x, y) = load_model(checkpoint).eval(), next(batches(draw(test, 40, 0), 40, torch.device("cpu")))
    radius = UNFORESEEN[kind][0][4]

    def loss(sign):
        torch.manual_seed(0)
        x_adv = unforeseen(lambda z: sign * ce_per_image(model(z), y), x, kind, radius, 10)
        assert 0 <= x_adv.amin() and x_adv.amax() <= 1
        return ce_per_image(model(x_adv), y).mean().item(), (model(x_adv).argmax(1) == y).float().mean()

    (up, accuracy), (down, _) = loss(1), loss(-1)
    assert up > down and accuracy < (model(x).argmax(1) == y).float().mean() - 0.05


def test_l1_stays_in_the_ball_and_reaches_its_surface():
    x = torch.rand(3, 3, 32, 32)
    for radius in UNFORESEEN["l1"][0]:
        length = (attacked("l1", radius, x, 30) - x).abs().flatten(1).sum(1)
        assert (length <= radius / 255 * (1 + 1e-5)).all() and (length > 0.3 * radius / 255).all()


def test_frank_wolfe_goes_to_the_best_point_of_the_ball():
    """A loop spends the radius entry by entry."""
    torch.manual_seed(0)
    grad, x, radius = torch.randn(4, 20), torch.rand(4, 20), 2.5
    grad[0, :18] = 0  # then less than the radius is spent
    point = frank_wolfe(torch.randn(4, 20), grad, 0, -x, 1 - x, radius)
    for b in range(4):
        left, want = radius, np.zeros(20)
        for i in sorted(range(20), key=lambda i: -abs(grad[b, i].item())):
            g = grad[b, i].item()
            room = (1 - x[b, i].item() if g > 0 else x[b, i].item()) if g else 0
            want[i] = math.copysign(min(left, room), g)
            left -= min(left, room)
        assert np.allclose(point[b].numpy(), want, atol=1e-6)


def coefficients(x: torch.Tensor) -> np.ndarray:
    """JPEG's, of one image (3, S, S), from the definition: blocks of Y, Cb, Cr, not rounded."""
    r, g, b = 255 * x.double().numpy()
    y = 0.299 * r + 0.587 * g + 0.114 * b
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=50)
    luminance, chrominance = (np.reshape(t, (8, 8)) for t in Image.open(file).quantization.values())
    planes = [(y - 128, luminance)]
    for c in (b - y) / 1.772, (r - y) / 1.402:
        planes.append(((c[::2, ::2] + c[1::2, ::2] + c[::2, 1::2] + c[1::2, 1::2]) / 4, chrominance))
    dct = np.cos(np.outer(np.arange(8), 2 * np.arange(8) + 1) * np.pi / 16) / 2
    dct[0] /= math.sqrt(2)
    blocks = []
    for plane, quantisation in planes:
        for i, j in np.ndindex(len(plane) // 8, len(plane) // 8):
            block = plane[8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
            blocks.append((dct @ block @ dct.T / quantisation).reshape(-1))
    return np.concatenate(blocks)


def test_jpeg_coefficients_by_definition():
    """Quantised as by Pillow at quality 50; a grey image, also a padded one, comes back."""
    x = torch.rand(2, 3, 32, 32)
    for b in range(2):
        assert np.allclose(to_jpeg(x)[b].numpy(), coefficients(x[b]), atol=1e-3)
    for grey in x[:, :1].expand(-1, 3, -1, -1), x[:, :1, :30, :30].expand(-1, 3, -1, -1):
        assert torch.allclose(from_jpeg(to_jpeg(grey), *grey.shape[2:]), grey, atol=1e-5)


@pytest.mark.parametrize(("kind", "norm"), [("jpeg-linf", math.inf), ("jpeg-l2", 2), ("jpeg-l1", 1)])
def test_jpeg_attacks_stay_in_their_balls(kind, norm):
    """Of half the radius that the published code names; each coefficient moves by 1 at most."""
    x, radius = smooth_images(), UNFORESEEN[kind][0][1]
    x_adv = attacked(kind, radius, x)
    assert x_adv.amin() > 0 and x_adv.amax() < 1  # nothing was clipped
    for b in range(3):
        moved = coefficients(x_adv[b]) - coefficients(x[b])
        assert 0.2 * radius / 2 < np.linalg.norm(moved, norm) <= radius / 2 * 1.01 + 1e-3
        assert np.abs(moved).max() <= 1.001


@pytest.mark.parametrize("radius", [0.25, 1.0])
def test_elastic_moves_pixels_by_the_radius_at_most(radius):
    """On a ramp brightness tells where a pixel came from."""
    ramp = torch.linspace(0, 1, 32)
    x = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.full((32, 32), 0.5)])[None]
    moved = 31 * (attacked("elastic", radius, x) - x)[:, :2, 4:-4, 4:-4].abs().max().item()
    assert 0.3 * radius < moved <= radius + 1e-4
    flow = torch.tensor([32 / 31, 0.0]).view(1, 2, 1, 1).expand(1, 2, 32, 32)  # in 32nds, of 31 steps
    assert torch.allclose(warp(x, flow)[:, :, :, :-1], x[:, :, :, 1:], atol=1e-5)


def test_fog_and_gabor_add_grey_within_the_radius():
    """Fog is a cloud over the image; gabor's noise reaches the radius."""
    x = smooth_images()
    e = 128 / 255
    cloud = (attacked("fog", 128, x) * (x.amax((2, 3), keepdim=True) + e) - x) / e
    noise = (attacked("gabor", 12.5, x) - x) * 255 / 12.5
    for added in cloud, noise:
        assert torch.allclose(added, added[:, :1].expand_as(added), atol=1e-4)
        assert added.amin() >= -1e-4 and added.amax() <= 1 + 1e-4 and added.flatten(1).std(1).min() > 0.05
    assert noise.flatten(1).amax(1).min() > 0.99


def test_snow_brightens_and_keeps_its_budget(monkeypatch):
    """At most 0.2 flakes on average; without flakes the image is paler, as in the published code."""
    x, seen = smooth_images(), []
    spy = lambda x, flakes, *more: seen.append(flakes.detach()) or snow(x, flakes, *more)  # noqa: E731
    monkeypatch.setattr(eval_unforeseen, "snow", spy)
    x_adv, paler = attacked("snow", 0.25, x), snow(x, torch.zeros(3, 7, 8, 8), torch.zeros(7, 13, 13), 0.25)
    assert (x_adv >= paler - 1e-6).all() and (x_adv - paler).amax() > 0.05
    for flakes in seen[1:]:  # the first is the random start
        assert flakes.mean((2, 3)).max() <= 0.2 + 1e-6 and flakes.amin() >= 0 and flakes.amax() <= 1
    grey = 0.2126 * x[:, :1] + 0.7152 * x[:, 1:2] + 0.0722 * x[:, 2:]
    assert torch.allclose(paler, 0.75 * x + 0.25 * torch.maximum(x, 1.5 * grey + 0.5), atol=1e-6)


def test_rows_of_a_run(tmp_path, checkpoint):
    """Attacks towards a wrong class are weaker than those away from the right one."""
    _, test = load_data("digits", "", torch.device("cpu"))
    data = [next(batches(draw(test, 40, seed=0), 40, torch.device("cpu")))]
    accuracies = []
    for targeted in (True, False):
        args = dict(checkpoints=(str(checkpoint),), dataset="digits", eval_examples=40, unforeseen="l2")
        args |= dict(unforeseen_steps=3, targeted=targeted, out=str(tmp_path / str(targeted)))
        rows = main(eval_unforeseen.Args(**args))["rows"]
        wanted = [("none", 0), *(("l2", eps) for eps in UNFORESEEN["l2"][0])]
        assert [(r["attack"], r["eps"]) for r in rows] == wanted and rows[0]["name"] == "a/best"
        clean, *others = [r["accuracy"] for r in rows]
        assert clean == pytest.approx(robust_accuracy(load_model(checkpoint), data), abs=0.01)
        accuracies.append(sum(others))
    assert accuracies[1] < accuracies[0] < 4.5 * clean


def test_uar_is_the_ratio_to_networks_trained_against_each_attack():
    """Accuracies 75, 70, ..., 50, in all 375, ATA 90, 80, ..., 40, in all 390; no ATA, no UAR."""
    rows = [{"name": "x", "attack": "none", "strength": 0, "accuracy": 85.0, "examples": 10_000, "ata": None}]
    for attack, k in itertools.product(("elastic", "fog"), range(1, 7)):
        ata = 100.0 - 10 * k if attack == "elastic" else None
        rows.append(rows[0] | {"attack": attack, "strength": k, "accuracy": 80.0 - 5 * k, "ata": ata})
    lines = map(str.split, table({"rows": rows, "seconds": 1.0}, eval_unforeseen.Args()).splitlines())
    found = {line[0]: line[8:] for line in lines if line[1:2] == ["x"]}
    assert found == {"elastic": ["62.50", f"{100 * 375 / 390:.1f}"], "fog": ["62.50"]}
