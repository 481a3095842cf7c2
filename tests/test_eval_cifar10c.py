"""eval_cifar10c.py: reading CIFAR-10-C, fetching it, generating corruptions, and the arithmetic of the table."""
import colorsys
import hashlib
import io
import json
import math
import re
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, flags
from PIL import Image

import eval_cifar10c as script
import rotation_at
from common import Images, UserError, build_model, load_checkpoint, load_model, save_checkpoint
from eval_cifar10c import BENCHMARK, EXTRA, GENERATORS, Args, corrupt, main, open_arrays

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small network trained on digits, linf eps 0.1."""
    folder = tmp_path_factory.mktemp("trained") / "robust"
    rotation_at.main(rotation_at.Args(**TINY | dict(variant="T0", epochs=4, val_fraction=0.15, out=str(folder))))
    return folder / "best.pt"


@pytest.fixture
def cifar_c(tmp_path):
    """A hand-made CIFAR-10-C with 4 images per severity; image i of severity s is grey of value 10 s + i."""
    folder = tmp_path / "data" / "CIFAR-10-C"
    folder.mkdir(parents=True)
    labels = np.tile(np.arange(4), 5).astype(np.uint8)
    np.save(folder / "labels.npy", labels)
    values = np.array([10 * s + i for s in range(1, 6) for i in range(4)], dtype=np.uint8)
    for name in BENCHMARK + EXTRA:
        np.save(folder / f"{name}.npy", np.broadcast_to(values[:, None, None, None], (20, 32, 32, 3)))
    return folder


# ---- reading ----


def test_severity_blocks_land_in_the_right_cells(cifar_c):
    data = open_arrays(cifar_c, 10, CPU)
    assert data.types == BENCHMARK + EXTRA and len(data.types) == 19
    for severity in range(1, 6):
        images = data.cell("fog", severity)
        assert images.pixels.shape == (4, 3, 32, 32) and images.pixels.dtype == torch.uint8
        assert images.pixels[:, 0, 0, 0].tolist() == [10 * severity + i for i in range(4)]
        assert images.labels.tolist() == [0, 1, 2, 3]


def test_channels_are_not_mixed_up(cifar_c):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.save(cifar_c / "fog.npy", pixels)
    images = open_arrays(cifar_c, 10, CPU).cell("fog", 2)
    assert np.array_equal(images.pixels[1].numpy(), pixels[5].transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: np.save(f / "snow.npy", np.zeros((20, 32, 32, 3), np.float32)), "snow.npy holds float32"),
        (lambda f: np.save(f / "snow.npy", np.zeros((20, 3, 32, 32), np.uint8)), "expected uint8 .rows, size, size, 3"),
        (lambda f: np.save(f / "snow.npy", np.zeros((15, 32, 32, 3), np.uint8)), "15 rows, labels.npy 20"),
        (lambda f: np.save(f / "labels.npy", np.zeros(19, np.int64)), "5 severities of equal size"),
        (lambda f: np.save(f / "labels.npy", np.zeros(20, np.float32)), "expected integers"),
        (lambda f: np.save(f / "labels.npy", np.full(20, 10)), "labels from 10 to 10; expected 0 to 9"),
        (lambda f: np.save(f / "labels.npy", np.arange(20) % 10), "its five parts differ"),
        (lambda f: (f / "labels.npy").unlink(), "no labels.npy.*--download"),
        (lambda f: (f / "snow.npy").unlink(), "no 'snow' here.*--download"),
        (lambda f: (f / "snow.npy").write_bytes(b"\x93NUMPY rubbish"), "snow.npy is damaged"),
        (lambda f: (f / "snow.npy").write_bytes((f / "snow.npy").read_bytes()[:-5]), "snow.npy is damaged"),
        (lambda f: np.save(f / "snow.npy", np.array([object()]), allow_pickle=True), "snow.npy is damaged"),
    ],
)  # fmt: skip
def test_damaged_sets_are_one_sentence(cifar_c, checkpoint, one_sentence, damage, match):
    damage(cifar_c)
    argv = [checkpoint, "--data-dir", cifar_c.parent, "--eval-attack", "none", "--corruptions", "" if "unlink" in str(damage) else "snow"]
    if "no 'snow'" in match:
        argv = argv[:-2]
    assert re.search(match, one_sentence(script, *argv, "--out", cifar_c.parent / "run"))


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        ([], "at least one checkpoint"),
        (["nowhere.pt"], "no CIFAR-10-C in data"),
        (["nowhere.pt", "--generate", "--dataset", "digits"], "there is no nowhere.pt"),
        (["a.pt", "--generate", "--dataset", "digits", "--corruptions", "frost"], "no 'frost' here"),
        (["a.pt", "--dataset", "stl10"], "add --generate"),
        (["a.pt", "--dataset", "folder"], "<corruption>/<severity>/<class>"),
        (["a.pt", "--generate", "--dataset", "digits", "--severities", "0,1"], "numbers from 1 to 5"),
        (["a.pt", "--generate", "--dataset", "digits", "--image-size", "16"], "--image-size 32 or more"),
        (["a.pt", "--eps", "-1"], "--eps: invalid number value"),
        (["a.pt", "--flip"], "unrecognized"),
    ],
)  # fmt: skip
def test_wrong_flags(one_sentence, tmp_path, monkeypatch, argv, match):
    monkeypatch.chdir(tmp_path)
    assert re.search(match, one_sentence(script, *argv))
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").glob("*/results.json"))


def test_a_network_without_a_radius_needs_one(tmp_path, one_sentence):
    model = build_model("resnet18", {"class": 10}, width=1 / 16)
    save_checkpoint(tmp_path / "net.pt", {"network": model.spec, "model": model.state_dict()})
    argv = [tmp_path / "net.pt", "--generate", "--dataset", "digits", "--corruptions", "fog", "--severities", "1"]
    assert "give --norm and --eps" in one_sentence(script, *argv, "--out", tmp_path / "run")


def test_networks_that_do_not_fit_the_data(tmp_path, cifar_c, checkpoint, one_sentence):
    state = load_checkpoint(checkpoint)
    hundred = build_model("resnet18", {"class": 100}, width=1 / 16)
    save_checkpoint(tmp_path / "hundred.pt", {"network": hundred.spec, "model": hundred.state_dict(), "args": state["args"]})
    save_checkpoint(tmp_path / "pretrain.pt", state | {"stage": "pretrain"})
    more = ["--data-dir", cifar_c.parent, "--eval-attack", "none", "--corruptions", "fog"]
    assert "knows 100 classes, the data have 10" in one_sentence(script, tmp_path / "hundred.pt", *more, "--out", tmp_path / "a")
    assert "no finished classifier" in one_sentence(script, tmp_path / "pretrain.pt", *more, "--out", tmp_path / "a")
    assert "no finished classifier" in one_sentence(script, checkpoint.parent / "last.pt", *more, "--out", tmp_path / "a")
    assert "named twice" in one_sentence(script, checkpoint, checkpoint, *more, "--out", tmp_path / "a")
    save_checkpoint(tmp_path / "odd.pt", state | {"args": state["args"] | {"image_size": "large"}})
    assert "odd.pt is damaged" in one_sentence(script, tmp_path / "odd.pt", *more, "--out", tmp_path / "a")
    (cifar_c / "labels.npy").rename(tmp_path / "labels.npy")
    flat = ["--data-dir", cifar_c, *more[2:]]  # the arrays themselves, but no labels
    assert f"{cifar_c} has no labels.npy" in one_sentence(script, checkpoint, *flat, "--out", tmp_path / "a")
    labels = np.tile(np.array([0, -1, 2, 3]), 5)
    np.save(cifar_c / "labels.npy", labels)
    assert "labels from -1 to 3" in one_sentence(script, checkpoint, *more, "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()  # nothing was begun, so the corrected command can use the name


def test_imagenet_c_folders(tmp_path, checkpoint):
    """ImageNet-C's layout gives the accuracies of the same pixels in CIFAR-10-C's."""
    rng, labels = np.random.default_rng(0), np.tile(np.arange(10), 5)
    pixels = rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "labels.npy", labels)
    for name in ("fog", "snow"):
        np.save(tmp_path / f"{name}.npy", pixels)
        for i in range(50):
            file = tmp_path / name / str(i // 10 + 1) / f"class{labels[i]}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(file)
    more = dict(checkpoints=(str(checkpoint),), data_dir=str(tmp_path), eval_attack="none", workers=0)
    a = main(Args(**more, dataset="folder", out=str(tmp_path / "a")))
    b = main(Args(**more, corruptions="fog,snow", out=str(tmp_path / "b")))
    with pytest.raises(UserError, match="was trained on images of 32 pixels: give --image-size 32"):  # else shrunk, then enlarged
        main(Args(**more, dataset="folder", image_size=16, out=str(tmp_path / "d")))
    (tmp_path / "flat" / "fog" / "1").mkdir(parents=True)
    Image.fromarray(pixels[0]).save(tmp_path / "flat" / "fog" / "1" / "0.png")
    (tmp_path / "fog" / "2" / "class3").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="fog/2 has 9 class folders, others 10 .such as 'class3'."):
        main(Args(**more, dataset="folder", out=str(tmp_path / "c")))
    with pytest.raises(UserError, match="no class folders"):
        main(Args(**more | {"data_dir": str(tmp_path / "flat")}, dataset="folder", out=str(tmp_path / "e")))
    key = lambda r: (r["corruption"], r["severity"])  # noqa: E731
    assert {key(r): r["accuracy"] for r in a["rows"]} == {key(r): r["accuracy"] for r in b["rows"]}
    assert len(a["rows"]) == 11


# ---- fetching ----


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A web server that gives an archive with every file of CIFAR-10-C; host.cut makes it break off after that many bytes."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for name in [*BENCHMARK, *EXTRA, "labels"]:
            file = io.BytesIO()
            np.save(file, np.zeros(20, np.uint8) if name == "labels" else np.zeros((20, 32, 32, 3), np.uint8))
            info = tarfile.TarInfo(f"CIFAR-10-C/{name}.npy")
            info.size = len(file.getvalue())
            tar.addfile(info, io.BytesIO(file.getvalue()))
        for name in ("../outside.npy", "/tmp/eval_cifar10c_was_here.npy", "CIFAR-10-C/../../labels.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"bad"))
        link = tarfile.TarInfo("CIFAR-10-C/extra.npy")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    body = whole.getvalue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.headers.get("Range"))
            begin = int(m.group(1)) if server.ranges and (m := re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")) else 0
            if begin >= len(body):
                self.send_error(416)
                return
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(body) - begin))
            self.end_headers()
            self.wfile.write(body[begin : server.cut])

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.cut, server.ranges, server.body = [], None, True, body
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setitem(script.ARCHIVES, "cifar10", ("CIFAR-10-C", 1, hashlib.md5(body).hexdigest()))
    yield server
    server.shutdown()


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(tmp_path, host, ranges):
    host.cut, host.ranges = 100_000, ranges
    with pytest.raises(UserError, match="0.1 MB are kept.*run again"):
        script.download("cifar10", tmp_path, host.url)
    assert (tmp_path / "CIFAR-10-C.tar.part").stat().st_size == 100_000 and not (tmp_path / "CIFAR-10-C").exists()
    host.cut = None
    script.download("cifar10", tmp_path, host.url)
    assert host.asked == [None, "bytes=100000-"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["CIFAR-10-C"]
    assert {p.stem for p in (tmp_path / "CIFAR-10-C").iterdir()} == {*BENCHMARK, *EXTRA, "labels"}  # and nothing else
    assert not (tmp_path.parent / "outside.npy").exists()
    open_arrays(tmp_path / "CIFAR-10-C", 10, CPU).cell("fog", 5)
    script.download("cifar10", tmp_path, host.url)  # it is there: nothing is asked
    assert len(host.asked) == 2


def test_a_download_cut_between_the_last_byte_and_the_end_goes_on(tmp_path, host):
    (tmp_path / "CIFAR-10-C.tar.part").write_bytes(host.body)
    script.download("cifar10", tmp_path, host.url)
    assert (tmp_path / "CIFAR-10-C" / "labels.npy").exists()


def test_a_wrong_checksum_is_refused(tmp_path, host, monkeypatch, one_sentence):
    monkeypatch.setitem(script.ARCHIVES, "cifar10", ("CIFAR-10-C", 1, "0" * 32))
    argv = ["x.pt", "--download", "--data-mirror", host.url, "--data-dir", tmp_path, "--out", tmp_path / "run"]
    assert "not the official CIFAR-10-C.tar" in one_sentence(script, *argv)
    assert list(tmp_path.iterdir()) == []  # neither the archive nor anything out of it, nor a folder of the run
    (tmp_path / "CIFAR-10-C.tar").write_bytes(b"the user's own")
    assert "was there already" in one_sentence(script, *argv) and (tmp_path / "CIFAR-10-C.tar").exists()
    (tmp_path / "CIFAR-10-C.tar").unlink()
    assert "could not fetch nonsense" in one_sentence(script, *["nonsense" if a == host.url else a for a in argv])
    host.shutdown()
    host.server_close()
    assert re.search("could not fetch .*--data-mirror, or use --generate", one_sentence(script, *argv))


# ---- generating ----


@pytest.fixture(scope="module")
def pictures():
    """Coloured test images with edges and smooth parts, uint8 (8, 3, 32, 32)."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(8, 3, 6, 6, generator=g)
    x = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1)
    x[:, :, 8:20, 10:24] = torch.rand(8, 3, 1, 1, generator=g)
    return (x * 255).byte()


@pytest.mark.parametrize("f", GENERATORS, ids=lambda f: f.__name__)
def test_corruptions(pictures, f):
    """Same seed, same pixels; another seed, other noise; severity 5 is farther from the original than severity 1."""
    name = f.__name__
    out = {s: corrupt(pictures, name, s, seed=1) for s in range(1, 6)}
    assert all(o.dtype == torch.uint8 and o.shape == pictures.shape for o in out.values())
    assert torch.equal(out[3], corrupt(pictures, name, 3, seed=1))
    random = {"gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "fog", "elastic_transform", "speckle_noise"}
    assert torch.equal(out[3], corrupt(pictures, name, 3, seed=2)) == (name not in random)
    distance = {s: (o.float() - pictures.float()).square().mean().item() for s, o in out.items()}
    assert 0 < distance[1] < 90**2
    if name != "elastic_transform":  # its constants begin with the largest shift of the whole image and end with the finest warping
        assert distance[5] > distance[3 if name == "saturate" else 1]  # 1 and 2 take colour away, 3 to 5 add some


def test_noise_has_the_official_strength():
    x = torch.full((20, 3, 32, 32), 128, dtype=torch.uint8)
    v = 128 / 255
    for s in range(5):
        std = lambda name: corrupt(x, name, s + 1).float().std().item() / 255  # noqa: B023, E731
        assert std("gaussian_noise") == pytest.approx([0.04, 0.06, 0.08, 0.09, 0.10][s], rel=0.03)
        assert std("shot_noise") == pytest.approx(math.sqrt(v / [500, 250, 100, 75, 50][s]), rel=0.03)
        assert std("speckle_noise") == pytest.approx(v * [0.06, 0.1, 0.12, 0.16, 0.2][s], rel=0.03)
        hit = corrupt(x, "impulse_noise", s + 1)
        assert (hit != 128).float().mean().item() == pytest.approx([0.01, 0.02, 0.03, 0.05, 0.07][s], rel=0.1)
        assert set(hit.unique().tolist()) == {0, 128, 255}


@pytest.mark.parametrize("name", ["brightness", "saturate"])
def test_colours_against_hsv_pixel_by_pixel(pictures, name):
    """Python's own conversion to HSV and back, the way the official script does it."""
    x = pictures[:2].clone()
    x[0, :, 0] = torch.arange(32).byte() * 8  # greys, black among them
    for s in range(5):
        got = corrupt(x, name, s + 1)
        for i, r, c in [(0, 0, 0), (0, 0, 5), (0, 0, 31), (0, 9, 15), (1, 3, 3), (1, 30, 2), (1, 16, 20)]:
            h, sat, v = colorsys.rgb_to_hsv(*(x[i, :, r, c] / 255).tolist())
            if name == "brightness":
                v = min(1, v + [0.05, 0.1, 0.15, 0.2, 0.3][s])
            else:
                scale, shift = [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)][s]
                sat = min(1, max(0, sat * scale + shift))
            want = [255 * value for value in colorsys.hsv_to_rgb(h, sat, v)]
            assert np.allclose(got[i, :, r, c], want, atol=1.01)


def test_glass_blur_against_the_sequential_loop(pictures):
    """The official loop goes from the last pixel to the first and copies neighbours; ours moves all at once."""
    x = pictures[:1].float() / 255
    g = torch.Generator().manual_seed(5)
    got = script.glass_blur(x, 0, g)
    dx, dy = torch.randint(-1, 1, (2, 1, 32, 32), generator=torch.Generator().manual_seed(5))
    y = (script.smooth(x, 0.05) * 255).floor()[0].permute(1, 2, 0).numpy() / 255
    for h in range(31, 1, -1):
        for w in range(31, 1, -1):
            a, b = h + int(dy[0, h, w]), w + int(dx[0, h, w])
            y[h, w], y[a, b] = y[a, b], y[h, w]
    want = script.smooth(torch.from_numpy(y).permute(2, 0, 1)[None], 0.05)
    assert torch.allclose(got, want, atol=1e-6)


def test_blurs_keep_a_flat_image_and_its_mass(pictures):
    flat = torch.full((3, 3, 32, 32), 77, dtype=torch.uint8)
    for name in ("gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "glass_blur", "pixelate", "elastic_transform", "contrast"):
        for s in (1, 5):
            assert (corrupt(flat, name, s).int() - 77).abs().max() <= 1, name
    dot = torch.zeros(1, 1, 33, 33)
    dot[..., 16, 16] = 1
    for s in range(5):
        spread = script.gaussian_blur(dot, s, None)
        sigma = [0.4, 0.6, 0.7, 0.8, 1][s]
        assert spread.sum().item() == pytest.approx(1, abs=1e-5)
        variance = (spread[0, 0].sum(0) * (torch.arange(33) - 16) ** 2).sum().item()
        line = np.exp(-0.5 * (np.arange(-8, 9) / sigma) ** 2)  # the sampled Gaussian's own variance
        assert variance == pytest.approx((line * np.arange(-8, 9) ** 2).sum() / line.sum(), rel=0.01)


def test_contrast_and_jpeg_and_pixelate_against_their_definitions(pictures):
    got = corrupt(pictures, "contrast", 5).float()
    mean = pictures.float().mean((2, 3), keepdim=True)
    assert ((pictures - mean) * 0.15 + mean - got).abs().max() < 1.01
    image = Image.fromarray(pictures[0].permute(1, 2, 0).numpy())
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    assert np.array_equal(corrupt(pictures, "jpeg_compression", 5)[0].permute(1, 2, 0), np.array(Image.open(file)))
    small = image.resize((20, 20), Image.BOX).resize((32, 32), Image.BOX)
    assert np.array_equal(corrupt(pictures, "pixelate", 5)[0].permute(1, 2, 0), np.array(small))


def test_fog_is_a_cloud_over_each_image(pictures):
    generator = torch.Generator().manual_seed(0)
    noise = [2 * torch.rand(4, 2**i, 2**i, generator=generator) - 1 for i in range(5) for _ in range(3)]
    cloud = script.plasma(noise, 4.0)
    assert cloud.shape == (4, 32, 32) and not torch.equal(cloud[0], cloud[1])
    assert torch.equal(cloud.amin((1, 2)), torch.zeros(4)) and torch.equal(cloud.amax((1, 2)), torch.ones(4))
    near = (cloud - cloud.roll(1, 2)).abs().mean()
    far = (cloud - cloud.roll(16, 2)).abs().mean()
    assert near < 0.5 * far  # neighbours are alike
    rough = script.plasma(noise, 1.44)
    assert (rough - rough.roll(1, 2)).abs().mean() > 2 * near  # a smaller decay is a finer cloud


# ---- evaluating ----


def test_accuracies_and_means_equal_an_independent_computation(tmp_path, checkpoint):
    args = Args(checkpoints=(str(checkpoint),), generate=True, dataset="digits", severities="1,5", corruptions="fog,contrast,saturate", eval_examples=40, eval_steps=3, out=str(tmp_path))
    rows = main(args)["rows"]
    cells = [r for r in rows if r["severity"] != "all"]
    assert len(cells) == 3 * 2 * 2 and all(r["generated"] for r in rows)
    # clean accuracy, by hand
    model = load_model(checkpoint)
    _, test = script.load_data("digits", "", CPU)
    for r in [r for r in cells if r["attack"] == "none"]:
        with torch.no_grad():
            right = model(corrupt(test.pixels, r["corruption"], r["severity"]) / 255).argmax(1) == test.labels
        assert r["accuracy"] == pytest.approx(100 * right.float().mean().item(), abs=0.01) and r["examples"] == 360
    for r in [r for r in cells if r["attack"] != "none"]:
        assert (r["norm"], r["eps"], r["examples"], r["attack"]) == ("linf", 0.1, 40, "pgd-3")
        clean = next(c for c in cells if c["attack"] == "none" and (c["corruption"], c["severity"]) == (r["corruption"], r["severity"]))
        assert r["accuracy"] <= clean["accuracy"] + 15  # other images, but not another world
    means = {(r["corruption"], r["attack"]): r["accuracy"] for r in rows if r["severity"] == "all"}
    for attack in ("none", "pgd-3"):
        for key, types in (("mean of 2 of 15", ("fog", "contrast")), ("mean of 3", ("fog", "contrast", "saturate"))):
            found = [r["accuracy"] for r in cells if r["attack"] == attack and r["corruption"] in types]
            assert means[key, attack] == pytest.approx(np.mean(found), abs=0.006)
    assert all(r["paper"] is None for r in rows)


def test_the_attack_is_centred_on_the_corrupted_image(tmp_path, checkpoint, monkeypatch):
    seen = []

    def spy(loss, x, *, norm, eps, **kw):
        x_adv = real(loss, x, norm=norm, eps=eps, **kw)
        seen.append((x, x_adv, norm, eps))
        return x_adv

    real = script.pgd
    monkeypatch.setattr(script, "pgd", spy)
    main(Args(checkpoints=(str(checkpoint),), generate=True, dataset="digits", severities="5", corruptions="contrast", eval_examples=30, out=str(tmp_path)))
    _, test = script.load_data("digits", "", CPU)
    possible = {tuple(image.flatten().tolist()) for image in corrupt(test.pixels, "contrast", 5)}
    for x, x_adv, norm, eps in seen:
        assert (norm, eps) == ("linf", 0.1)
        assert all(tuple((image * 255).round().byte().flatten().tolist()) in possible for image in x)
        assert 0 < (x_adv - x).abs().max() <= 0.1 + 1e-6


def test_the_paper_stands_beside_its_own_setting_only():
    own = vars(rotation_at.Args(norm="l2", eps=1.0, variant="T3"))
    own |= {"stage": "train", "task": "rotation", "attack_norm": "l2", "attack_eps": 1.0}
    rows = [{"name": "a", "attack": k, "corruption": c, "severity": s, "accuracy": 50.0, "paper": None}
            for k in ("none", "pgd-20") for c in BENCHMARK + EXTRA for s in range(1, 6)]  # fmt: skip

    def papers(trained, as_paper=True, rows=rows):
        return [(r["corruption"], r["paper"]) for r in script.summarise(rows, {"a": (None, trained)}, as_paper)]

    assert papers(own) == [("mean of 15", 76.52), ("mean of 19", 76.52), ("mean of 15", 38.33), ("mean of 19", 38.33)]
    for changed in ({"width": 0.5}, {"eps": 0.5, "attack_eps": 0.5}, {"epochs": 8}, {"dataset": "folder"}, {"stage": "plain"},
                    {"task": "jigsaw"}, {"lambda2": 0.0}, {"attack_steps": 1}):  # fmt: skip
        assert all(p is None for _, p in papers(own | changed))
    assert all(p is None for _, p in papers(own, as_paper=False))
    assert [p for _, p in papers(own | {"attack_eps": 0.5})] == [76.52, 76.52, None, None]
    assert [p for _, p in papers(own, rows=[r for r in rows if r["corruption"] != "fog"])] == [None] * 4


def test_nothing_counts_twice(tmp_path, checkpoint):
    argv = dict(checkpoints=(str(checkpoint),), generate=True, dataset="digits", eval_attack="none")
    a = main(Args(**argv, severities="1, 5,1", corruptions="fog, contrast,fog", out=str(tmp_path / "a")))
    b = main(Args(**argv, severities="1,5", corruptions="fog,contrast", out=str(tmp_path / "b")))
    assert a["rows"] == b["rows"]


def test_a_resumed_run_does_not_mix_networks(tmp_path, checkpoint):
    """A checkpoint that changed since: refused, rather than a table of two networks."""
    mine = tmp_path / "net.pt"
    state = load_checkpoint(checkpoint)
    save_checkpoint(mine, state)
    argv = dict(checkpoints=(str(mine),), generate=True, dataset="digits", severities="1", eval_attack="none", corruptions="fog", out=str(tmp_path / "run"))
    main(Args(**argv))
    save_checkpoint(mine, state | {"model": {k: v * 1.5 for k, v in state["model"].items()}})
    with pytest.raises(UserError, match="has changed since"):
        main(Args(**argv, resume=True))
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(UserError, match="have changed since"):
        main(Args(**argv, resume=True))


def test_without_matplotlib_there_is_no_picture_but_a_table(tmp_path, checkpoint):
    block = f"import sys; sys.modules['matplotlib'] = sys.modules['tqdm'] = None; sys.path.insert(0, {str(ROOT)!r})\n"
    code = block + "import common, eval_cifar10c; common.old_cli(eval_cifar10c.main, eval_cifar10c.Args)"
    argv = [str(checkpoint), "--generate", "--dataset", "digits", "--corruptions", "fog", "--severities", "1", "--eval-attack", "none"]
    done = subprocess.run([sys.executable, "-c", code, *argv, "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "no picture" in done.stdout and "fog" in done.stdout and not done.stderr


def test_several_checkpoints_and_resume(tmp_path, checkpoint, capsys):
    """Killed after some cells and resumed: the same results, and no cell is computed twice."""
    other = tmp_path / "other" / "net.pt"
    other.parent.mkdir()
    state = load_checkpoint(checkpoint)
    save_checkpoint(other, state | {"args": state["args"] | {"norm": "l2", "eps": 1.0}})
    argv = dict(checkpoints=(str(checkpoint), str(other)), generate=True, dataset="digits", severities="1,5", corruptions="fog,contrast", eval_examples=20, eval_steps=2)
    whole = main(Args(**argv, out=str(tmp_path / "whole")))
    assert [(r["norm"], r["eps"]) for r in whole["rows"][:4] if r["attack"] != "none"] == [("linf", 0.1), ("l2", 1.0)]
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import common, eval_cifar10c
real, calls = eval_cifar10c.evaluate_cell, []
def patched(*a):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a)
eval_cifar10c.evaluate_cell = patched
common.old_cli(eval_cifar10c.main, eval_cifar10c.Args)
"""
    flat = [*argv["checkpoints"], *flags({k: v for k, v in argv.items() if k != "checkpoints"}), "--out", str(tmp_path / "killed")]
    assert subprocess.run([sys.executable, "-c", code, *flat], capture_output=True, timeout=120).returncode == -9
    done = (tmp_path / "killed" / "cells.jsonl").read_text().splitlines()
    assert len(done) == 4  # one cell: two networks, clean and attacked
    resumed = main(Args(**argv, out=str(tmp_path / "killed"), resume=True))
    assert resumed["rows"] == whole["rows"]
    out = capsys.readouterr().out
    assert "robust clean" in out and "other pgd-2" in out and "GENERATED" in out


def test_larger_networks_see_larger_images(tmp_path, checkpoint):
    """A network trained at 64 pixels gets corrupted images of 32 enlarged to 64."""
    state = load_checkpoint(checkpoint)
    sizes = []
    model = load_model(checkpoint)
    model.register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[-1]))
    images = Images(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), ["0"], torch.arange(4))
    run = script.start_run(Args(out=str(tmp_path)))
    script.evaluate_cell(model, state["args"] | {"image_size": 64, "attack_norm": "linf", "attack_eps": 0.1}, images, Args(eval_attack="none"), run, "")
    assert set(sizes) == {64}


def test_saved_rows_can_be_read_back(tmp_path, checkpoint):
    results = main(Args(checkpoints=(str(checkpoint),), generate=True, dataset="digits", severities="1", corruptions="fog", eval_attack="none", out=str(tmp_path)))
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["rows"] == results["rows"]
    for row in saved["rows"]:
        assert {"name", "attack", "norm", "eps", "examples", "accuracy", "paper", "corruption", "severity", "generated"} <= row.keys()
