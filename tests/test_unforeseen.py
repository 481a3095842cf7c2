"""eval_unforeseen.py: each of Kang et al.'s attacks stays in its ball, climbs its loss, and does what its definition says."""
import importlib.util
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, flags
from PIL import Image

import eval_unforeseen
import rotation_at
from common import (
    UserError, batches, build_model, ce_per_image, draw, load_data, load_model, robust_accuracy,
)  # fmt: skip
from eval_unforeseen import UNFORESEEN, frank_wolfe, from_jpeg, plasma, snow, snow_kernels, to_jpeg, unforeseen, warp

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained():
    """A small network trained on digits for a few seconds, its test images."""
    train, test = load_data("digits", "data", CPU, image_size=32)
    torch.manual_seed(0)
    model = build_model("resnet18", {"class": 10}, width=1 / 8, stem="imagenet").train()
    opt = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for epoch in range(8):
        for x, y in batches(train, 64, CPU, shuffle=epoch):
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
    return model.eval(), list(batches(test.subset(torch.arange(60)), 30, CPU))


def smooth_images(n: int = 3, size: int = 32) -> torch.Tensor:
    """Soft and far from black and white, so that little is clipped."""
    torch.manual_seed(1)
    return 0.4 + 0.2 * torch.nn.functional.interpolate(torch.rand(n, 3, 4, 4), size=(size, size), mode="bilinear")


def attacked(kind: str, radius: float, x: torch.Tensor, steps: int = 8, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(x[0].numel(), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(seed)
    return unforeseen(lambda z: (z.flatten(1) * weight).sin().sum(1), x, kind, radius, steps)


@pytest.mark.parametrize("kind", UNFORESEEN)
def test_lowers_accuracy_and_goes_uphill(trained, kind):
    model, data = trained
    radius = UNFORESEEN[kind][0][4]
    torch.manual_seed(0)

    def attack(sign):
        return lambda x, y: unforeseen(lambda z: sign * ce_per_image(model(z), y), x, kind, radius, 10)

    clean, attacked = robust_accuracy(model, data), robust_accuracy(model, data, attack(1))
    assert clean > 85 and attacked < clean - 5, (clean, attacked)
    x, y = data[0]
    with torch.no_grad():
        up, down = (ce_per_image(model(attack(sign)(x, y)), y).mean() for sign in (1, -1))
    assert up > down
    assert all(0 <= v.amin() and v.amax() <= 1 for v in [attack(1)(x, y)])


@pytest.mark.parametrize("radius", UNFORESEEN["l1"][0])
def test_l1_stays_in_the_ball_and_reaches_its_surface(radius):
    x = torch.rand(3, 3, 32, 32)
    length = (attacked("l1", radius, x, 30) - x).abs().flatten(1).sum(1)
    assert (length <= radius / 255 * (1 + 1e-5)).all() and (length > 0.3 * radius / 255).all()


def test_frank_wolfe_goes_to_the_best_point_of_the_ball():
    """Against a loop that spends the radius entry by entry."""
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
    again = frank_wolfe(point, grad, 1, -x, 1 - x, radius)
    assert torch.allclose(again, point)  # the average of a point and itself


def coefficients(x: torch.Tensor) -> list[np.ndarray]:
    """JPEG's, of one image (3, S, S), from the definition: Y, Cb, Cr as arrays (blocks, 8, 8), not rounded."""
    r, g, b = (255 * x.double().numpy())
    y = 0.299 * r + 0.587 * g + 0.114 * b
    planes = [y - 128]
    for channel, factor in (b, 1.772), (r, 1.402):
        c = (channel - y) / factor
        planes.append((c[::2, ::2] + c[1::2, ::2] + c[::2, 1::2] + c[1::2, 1::2]) / 4)
    luminance = np.array(eval_unforeseen.JPEG_LUMINANCE, float)
    chrominance = np.full((8, 8), 99.0)
    chrominance[:4, :4] = eval_unforeseen.JPEG_CHROMINANCE
    out = []
    for plane, table in zip(planes, (luminance, chrominance, chrominance), strict=True):
        blocks = []
        for i in range(0, len(plane), 8):
            for j in range(0, len(plane), 8):
                block = np.zeros((8, 8))
                for u in range(8):
                    for v in range(8):
                        wave = np.outer(np.cos((2 * np.arange(8) + 1) * u * np.pi / 16), np.cos((2 * np.arange(8) + 1) * v * np.pi / 16))
                        scale = (math.sqrt(0.5) if u == 0 else 1) * (math.sqrt(0.5) if v == 0 else 1) / 4
                        block[u, v] = scale * (wave * plane[i : i + 8, j : j + 8]).sum()
                blocks.append(block / table)
        out.append(np.stack(blocks))
    return out


def test_jpeg_coefficients_by_definition_and_pillow():
    x = smooth_images(2)
    ours = to_jpeg(x)
    for b in range(2):
        assert np.allclose(ours[b].numpy(), np.concatenate([c.reshape(-1) for c in coefficients(x[b])]), atol=1e-3)
    assert ours.shape == (2, 3 * 32 * 32 // 2)
    # Rounded, they are what Pillow keeps at quality 50, whose tables are these.
    x = (x * 255).round() / 255
    decoded = from_jpeg(to_jpeg(x).round(), 32, 32).clamp(0, 1)
    for b in range(2):
        buffer = io.BytesIO()
        Image.fromarray((x[b] * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=50, subsampling=2)
        theirs = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1) / 255
        assert (decoded[b] - theirs).abs().mean() < 2 / 255  # it smooths colours when it enlarges them, we repeat pixels


@pytest.mark.parametrize("size", [16, 12, 30])
def test_jpeg_and_back(size):
    grey = torch.rand(2, 1, size, size).expand(-1, 3, -1, -1)  # no colours that would be halved
    assert torch.allclose(from_jpeg(to_jpeg(grey), size, size), grey, atol=1e-5)


@pytest.mark.parametrize(("kind", "norm"), [("jpeg-linf", math.inf), ("jpeg-l2", 2), ("jpeg-l1", 1)])
def test_jpeg_attacks_stay_in_their_balls(kind, norm):
    """Of half the radius that the published code names; each coefficient moves by 1 at most."""
    x, radius = smooth_images(), UNFORESEEN[kind][0][1]
    x_adv = attacked(kind, radius, x)
    assert x_adv.amin() > 0 and x_adv.amax() < 1  # nothing was clipped
    for b in range(3):
        moved = np.concatenate([(a - c).reshape(-1) for a, c in zip(coefficients(x_adv[b]), coefficients(x[b]), strict=True)])
        length = np.linalg.norm(moved, norm)
        assert 0.2 * radius / 2 < length <= radius / 2 * 1.01 + 1e-3
        assert np.abs(moved).max() <= 1.001


@pytest.mark.parametrize("radius", [0.25, 1.0])
def test_elastic_moves_pixels_by_the_radius_at_most(radius):
    """On a ramp brightness tells where a pixel came from."""
    ramp = torch.linspace(0, 1, 32)
    x = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.full((32, 32), 0.5)])[None]
    x_adv = attacked("elastic", radius, x)
    inside = (slice(None), slice(0, 2), slice(4, -4), slice(4, -4))
    moved = ((x_adv - x)[inside] * 31).abs().max().item()
    assert 0.3 * radius < moved <= radius + 1e-4
    assert torch.allclose(warp(x, torch.zeros(1, 2, 32, 32)), x, atol=1e-6)
    shifted = warp(x, torch.tensor([32 / 31, 0.0]).view(1, 2, 1, 1).expand(1, 2, 32, 32))  # a flow in 32nds, of 31 steps
    assert torch.allclose(shifted[:, :, :, :-1], x[:, :, :, 1:], atol=1e-5)


def test_fog_is_a_cloud_over_the_image():
    x, radius = smooth_images(), 128
    x_adv, e = attacked("fog", radius, x), radius / 255
    cloud = (x_adv * (x.amax((2, 3), keepdim=True) + e) - x) / e
    assert torch.allclose(cloud, cloud[:, :1].expand_as(cloud), atol=1e-5)  # grey
    assert cloud.amin() >= -1e-5 and cloud.amax() <= 1 + 1e-5 and cloud.flatten(1).std(1).min() > 0.05


def test_clouds_by_hand():
    """A torus of 4 x 4 against the average of the neighbours, written out."""
    rng = np.random.default_rng(0)
    noise = [rng.uniform(-1, 1, (1, n, n)) for n in (1, 1, 1, 2, 2, 2)]
    a = np.zeros((4, 4))
    a[2, 2] = noise[0][0, 0, 0] + a[0, 0]
    a[0, 2] = noise[1][0, 0, 0] + (2 * a[2, 2] + 2 * a[0, 0]) / 4
    a[2, 0] = noise[2][0, 0, 0] + (2 * a[2, 2] + 2 * a[0, 0]) / 4
    for i in (0, 1):
        for j in (0, 1):
            r, c = 2 * i + 1, 2 * j + 1
            a[r, c] = noise[3][0, i, j] / 3 + (a[r - 1, c - 1] + a[r - 1, (c + 1) % 4] + a[(r + 1) % 4, c - 1] + a[(r + 1) % 4, (c + 1) % 4]) / 4
    for i in (0, 1):
        for j in (0, 1):
            r, c = 2 * i, 2 * j + 1
            a[r, c] = noise[4][0, i, j] / 3 + (a[r - 1, c] + a[r + 1, c] + a[r, c - 1] + a[r, (c + 1) % 4]) / 4
            r, c = 2 * i + 1, 2 * j
            a[r, c] = noise[5][0, i, j] / 3 + (a[r, c - 1] + a[r, c + 1] + a[r - 1, c] + a[(r + 1) % 4, c]) / 4
    a = (a - a.min()) / (a - a.min()).max()
    assert np.allclose(plasma([torch.from_numpy(n) for n in noise], 3.0)[0].numpy(), a)


def test_gabor_adds_grey_noise_up_to_the_radius():
    x, radius = smooth_images(), 12.5
    noise = (attacked("gabor", radius, x) - x) * 255 / radius
    assert torch.allclose(noise, noise[:, :1].expand_as(noise), atol=1e-4)
    assert noise.amin() >= -1e-4 and noise.amax() <= 1 + 1e-4 and noise.flatten(1).amax(1).min() > 0.99


def test_snow_brightens_and_keeps_its_budget(monkeypatch):
    x, seen = smooth_images(), []
    monkeypatch.setattr(eval_unforeseen, "snow", lambda x, flakes, *more: seen.append(flakes.detach()) or snow(x, flakes, *more))
    x_adv = attacked("snow", 0.25, x)
    paler = snow(x, torch.zeros(3, 7, 8, 8), torch.zeros(7, 13, 13), 0.25)
    assert (x_adv >= paler - 1e-6).all() and (x_adv - paler).amax() > 0.05
    assert all(f.mean((2, 3)).max() <= 0.2 + 1e-6 and f.amin() >= 0 and f.amax() <= 1 for f in seen[1:])  # the first is the random start
    grey = 0.2126 * x[:, 0] + 0.7152 * x[:, 1] + 0.0722 * x[:, 2]
    assert torch.allclose(paler[:, 2], 0.75 * x[:, 2] + 0.25 * torch.maximum(x[:, 2], 1.5 * grey + 0.5).clamp(max=10), atol=1e-6)
    torch.manual_seed(0)
    kernels = snow_kernels()
    assert kernels.shape == (7, 13, 13) and (kernels[:, 6, 6] > 0.7).all() and torch.allclose(kernels, kernels.flip(1, 2), atol=1e-6)


def test_the_start_is_random():
    x = torch.rand(2, 3, 32, 32)
    for kind in UNFORESEEN:
        first, again, other = (attacked(kind, UNFORESEEN[kind][0][2], x, 2, seed) for seed in (0, 0, 3))
        assert torch.equal(first, again), kind
        if not kind.endswith("l1"):  # the first step of Frank and Wolfe leaves the start behind
            assert not torch.equal(first, other), kind


def test_radii():
    assert all(len(small) == len(large) == 6 and (ata is None or len(ata) == 6) and list(small) == sorted(small) for small, ata, large in UNFORESEEN.values())
    with pytest.raises(ValueError, match="kind must be one of"):
        unforeseen(lambda z: z.sum((1, 2, 3)), torch.rand(1, 3, 32, 32), "rain", 1.0)
    for x, eps in (torch.rand(1, 3, 32, 32), -1.0), (255 * torch.rand(1, 3, 32, 32), 1.0):
        with pytest.raises(ValueError, match="eps positive|in \\[0, 1\\]"):
            unforeseen(lambda z: z.sum((1, 2, 3)), x, "elastic", eps)


# ---- the script ----


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of two small networks that know a little."""
    folder = tmp_path_factory.mktemp("unforeseen")
    for name, seed in ("a", 0), ("b", 1):
        rotation_at.main(rotation_at.Args(**TINY | dict(variant="T0", epochs=1, seed=seed, out=str(folder / name))))
    return tuple(str(folder / name / "best.pt") for name in "ab")


def small(checkpoints, out, **changes):
    usual = dict(dataset="digits", eval_examples=30, unforeseen="l1,fog", unforeseen_steps=2, out=str(out))
    return eval_unforeseen.Args(checkpoints=checkpoints, **usual | changes)


def test_rows_table_and_resume_by_cell(tmp_path, checkpoints, capsys, monkeypatch):
    rows = eval_unforeseen.main(small(checkpoints, tmp_path / "whole"))["rows"]
    assert [(r["name"], r["attack"], r["strength"]) for r in rows[:14]] == [("a/best", "none", 0), *(("a/best", k, i) for k in ("l1", "fog") for i in range(1, 7)), ("b/best", "none", 0)]
    assert len(rows) == 26 and {r["eps"] for r in rows if r["attack"] == "l1"} == set(UNFORESEEN["l1"][0])
    _, test = load_data("digits", "", CPU)
    clean = robust_accuracy(load_model(checkpoints[0]), [next(batches(draw(test, 30, seed=0), 30, CPU))])
    assert rows[0]["accuracy"] == pytest.approx(clean, abs=0.01)
    out = capsys.readouterr().out
    mine = [r["accuracy"] for r in rows if (r["name"], r["attack"]) == ("b/best", "fog")]
    line = next(x.split() for x in out.splitlines() if x.startswith("fog     b/best"))
    assert line[2:] == [f"{v:.2f}" for v in (*mine, sum(mine) / 6)] and "2 steps towards a random wrong class" in out
    if importlib.util.find_spec("matplotlib"):
        picture = Image.open(tmp_path / "whole" / "unforeseen.png").convert("RGB")
        assert len(picture.getcolors(10**6)) > 50
    calls, accuracy = [], eval_unforeseen.robust_accuracy

    def interrupted(*a, **k):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return accuracy(*a, **k)

    monkeypatch.setattr(eval_unforeseen, "robust_accuracy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        eval_unforeseen.main(small(checkpoints, tmp_path / "again"))
    again = small(checkpoints, tmp_path / "again", resume=True)
    assert eval_unforeseen.main(again)["rows"] == rows and len(calls) == 20 + 26 - 19
    monkeypatch.undo()
    before = Path(checkpoints[0]).read_bytes()
    try:  # another network under the same name
        Path(checkpoints[0]).write_bytes(Path(checkpoints[1]).read_bytes())
        with pytest.raises(UserError, match="checkpoints are not those"):
            eval_unforeseen.main(again)
    finally:
        Path(checkpoints[0]).write_bytes(before)


def test_aims_where_it_is_told(tmp_path, checkpoints):
    """Towards a wrong class attacks are weaker than away from the right one (with these few steps always)."""
    accuracy = {}
    for targeted in True, False:
        rows = eval_unforeseen.main(small(checkpoints[:1], tmp_path / str(targeted), unforeseen="l2", unforeseen_steps=5, eval_examples=100, targeted=targeted))["rows"]
        accuracy[targeted] = [r["accuracy"] for r in rows]
    assert accuracy[True][0] == accuracy[False][0] and sum(accuracy[False]) < sum(accuracy[True]) < 7 * accuracy[True][0]


def test_uar_is_the_ratio_to_networks_trained_against_each_attack():
    """Accuracies 75, 70, ..., 50, in all 375, ATA 90, 80, ..., 40, in all 390; no ATA, no UAR."""
    rows = [{"name": "x", "attack": "none", "strength": 0, "accuracy": 85.0, "examples": 10_000, "ata": None}]
    for attack, ata in ("elastic", 1), ("fog", None):
        rows += [rows[0] | {"attack": attack, "strength": k, "accuracy": 80.0 - 5 * k, "ata": ata and 100.0 - 10 * k} for k in range(1, 7)]
    lines = [x.split() for x in eval_unforeseen.table({"rows": rows, "seconds": 1.0}, eval_unforeseen.Args()).splitlines()]
    assert ["elastic", "x", "75.00", "70.00", "65.00", "60.00", "55.00", "50.00", "62.50", f"{100 * 375 / 390:.1f}"] in lines
    assert ["fog", "x", "75.00", "70.00", "65.00", "60.00", "55.00", "50.00", "62.50"] in lines


def test_quick_evaluates_what_rotation_at_trains():
    ours, theirs = (s.Args(**s.Args.QUICK) for s in (eval_unforeseen, rotation_at))
    assert (ours.dataset, ours.image_size) == (theirs.dataset, theirs.image_size)


def test_wrong_flags_and_checkpoints(one_sentence, tmp_path, checkpoints):
    argv = ["--dataset", "digits", "--out", tmp_path / "run"]
    assert "name at least one checkpoint" in one_sentence(eval_unforeseen, *argv)
    assert "--unforeseen rain is not known; there are linf" in one_sentence(eval_unforeseen, checkpoints[0], *argv, "--unforeseen", "l1,rain")
    assert "take --image-size 32" in one_sentence(eval_unforeseen, checkpoints[0], *argv, "--image-size", 16)
    assert "there is no nowhere.pt" in one_sentence(eval_unforeseen, "nowhere.pt", *argv)


def test_a_damaged_file_of_rows_is_told(one_sentence, tmp_path, checkpoints):
    argv = [*checkpoints, *flags(dict(dataset="digits", eval_examples=30, unforeseen="l1", unforeseen_steps=1, out=tmp_path)), "--resume"]
    eval_unforeseen.main(small(checkpoints, tmp_path, unforeseen="l1", unforeseen_steps=1))
    whole = json.loads((tmp_path / "results.json").read_text())
    for key in "strength", "ata":
        rows = [{k: v for k, v in row.items() if k != key} for row in whole["rows"]]
        (tmp_path / "results.json").write_text(json.dumps(whole | {"rows": rows}))
        assert "results.json is damaged" in one_sentence(eval_unforeseen, *argv)
    (tmp_path / "results.json").unlink()
    (tmp_path / "rows.json").write_text(json.dumps(whole["rows"])[:-9])
    assert "rows.json is damaged" in one_sentence(eval_unforeseen, *argv)
