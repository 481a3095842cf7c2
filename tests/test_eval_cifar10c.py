"""eval_cifar10c.py: reading CIFAR-10-C, fetching it, the six corruptions made here, and the arithmetic of the table."""
import colorsys
import functools
import hashlib
import http.server
import importlib.util
import io
import json
import re
import subprocess
import sys
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, flags
from PIL import Image

import eval_cifar10c as script
import rotation_at
from common import (
    Run, UserError, build_model, draw, load_checkpoint, load_data, load_model, pgd, robust_accuracy, save_checkpoint,
)  # fmt: skip
from eval_cifar10c import BENCHMARK, EXTRA, GENERATED, Args, corrupt, evaluate_cell, main, means, open_arrays, table

CPU = torch.device("cpu")
RANDOM = {"gaussian_noise", "impulse_noise"}


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
    np.save(folder / "labels.npy", np.tile(np.arange(4), 5).astype(np.uint8))
    values = np.array([10 * s + i for s in range(1, 6) for i in range(4)], dtype=np.uint8)
    for name in BENCHMARK + EXTRA:
        np.save(folder / f"{name}.npy", np.broadcast_to(values[:, None, None, None], (20, 32, 32, 3)))
    return folder


# ---- reading ----


def test_severities_and_channels_land_in_the_right_cells(cifar_c):
    for severity in range(1, 6):
        images = open_arrays(cifar_c, "fog", severity, 10)
        assert images.pixels.shape == (4, 3, 32, 32) and images.pixels.dtype == torch.uint8
        assert images.pixels[:, 0, 0, 0].tolist() == [10 * severity + i for i in range(4)]
        assert images.labels.tolist() == [0, 1, 2, 3]
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.save(cifar_c / "fog.npy", pixels)
    images = open_arrays(cifar_c, "fog", 2, 10)
    assert np.array_equal(images.pixels[1].numpy(), pixels[5].transpose(2, 0, 1))


def as_zip(path, flag=0, method=0):
    """An .npz under the name of an .npy; with flag 1 marked as encrypted, with method 99 of an unknown compression."""
    array = np.load(path)
    with zipfile.ZipFile(path, "w") as archive, archive.open("images.npy", "w") as f:
        np.save(f, array)
    data = bytearray(path.read_bytes())
    for header, at in (b"PK\3\4", 6), (b"PK\1\2", 8):
        i = data.index(header)
        data[i + at], data[i + at + 2] = flag, method
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: np.save(f / "snow.npy", np.zeros((20, 32, 32, 3), np.float32)), "snow.npy .*float32"),
        (lambda f: np.save(f / "snow.npy", np.zeros((20, 3, 32, 32), np.uint8)), "snow.npy .*not uint8 .20, size, size, 3"),
        (lambda f: np.save(f / "snow.npy", np.zeros((15, 32, 32, 3), np.uint8)), r"snow.npy .*\(15, 32, 32, 3\), not uint8 .20"),
        (lambda f: np.save(f / "labels.npy", np.zeros(19, np.int64)), "labels.npy is damaged"),
        (lambda f: np.save(f / "labels.npy", np.full(20, 10)), "labels.npy .*from 0 to 9"),
        (lambda f: np.save(f / "labels.npy", np.tile([0, -1, 2, 3], 5)), "labels.npy .*from 0 to 9"),
        (lambda f: np.save(f / "labels.npy", np.arange(20) % 10), "labels.npy .*five times the same labels"),
        (lambda f: (f / "labels.npy").unlink(), "there is no CIFAR-10-C with labels.npy in .*data/CIFAR-10-C: try"),
        (lambda f: (f / "snow.npy").unlink(), "there is no .*snow.npy"),
        (lambda f: (f / "snow.npy").write_bytes(b"\x93NUMPY rubbish"), "snow.npy is damaged"),
        (lambda f: (f / "snow.npy").write_bytes((f / "snow.npy").read_bytes()[:-5]), "snow.npy is damaged"),
        (lambda f: np.save(f / "snow.npy", np.array([object()]), allow_pickle=True), "snow.npy is damaged"),
        (lambda f: as_zip(f / "snow.npy", flag=1), "snow.npy is damaged"),
        (lambda f: as_zip(f / "labels.npy", method=99), "labels.npy is damaged"),
    ],
)  # fmt: skip
def test_damaged_sets_are_one_sentence(cifar_c, checkpoint, one_sentence, damage, match):
    """100 labels of one severity are not cut into five, either: labels must repeat."""
    damage(cifar_c)
    assert re.search(match, one_sentence(script, checkpoint, "--data-dir", cifar_c.parent, "--out", cifar_c.parent / "run"))


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        ([], "at least one checkpoint"),
        (["nowhere.pt"], "there is no nowhere.pt"),
        (["a.pt"], "there is no CIFAR-10-C with labels.npy in data: try --download"),
        (["a.pt", "--generate", "--dataset", "digits"], "a.pt is damaged"),
        (["a.pt", "--generate", "--dataset", "digits", "--corruptions", "fog"], "no 'fog' here; there are gaussian_noise, "),
        (["a.pt", "--dataset", "stl10"], "add --generate"),
        (["a.pt", "--dataset", "folder"], "<corruption>/<severity>/<class>"),
        (["a.pt", "--severities", "0,1"], "numbers from 1 to 5"),
        (["a.pt", "--norm", "linf", "--eps", "8"], "--eps 8: .*such as 8/255"),
        (["a.pt", "--eps", "-1"], "--eps: invalid number value"),
        (["a.pt", "--flip"], "unrecognized"),
    ],
)  # fmt: skip
def test_wrong_flags(one_sentence, tmp_path, monkeypatch, argv, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_bytes(b"")
    assert re.search(match, one_sentence(script, *argv))
    assert not any(tmp_path.glob("runs/*/r*.json"))


def test_networks_that_do_not_fit(tmp_path, checkpoint, one_sentence):
    state, hundred = load_checkpoint(checkpoint), build_model("resnet18", {"class": 100}, width=1 / 16)
    bare = {"network": state["network"], "model": state["model"]}
    made = {
        "hundred": ({"network": hundred.spec, "model": hundred.state_dict()}, "no classifier of the 10 classes"),
        "pretrain": (state | {"stage": "pretrain"}, "no finished classifier"),
        "bare": (bare, "no attack with norm"),
        "size": (state | {"args": state["args"] | {"image_size": "large"}}, "size.pt is damaged"),
        "eps": (state | {"args": state["args"] | {"eps": [1]}}, "eps.pt is damaged"),
        "far": (state | {"args": state["args"] | {"eps": 8.0}}, "Give --norm linf"),
    }
    argv = ["--generate", "--dataset", "digits", "--corruptions", "contrast", "--severities", "1", "--out", tmp_path / "run"]
    for name, (saved, told) in made.items():
        save_checkpoint(tmp_path / f"{name}.pt", saved)
        assert told in one_sentence(script, tmp_path / f"{name}.pt", *argv)
    assert "Give --norm linf" in one_sentence(script, checkpoint, *argv, "--norm", "l2")
    assert "two of the checkpoints have the same name" in one_sentence(script, checkpoint, checkpoint, *argv)
    rows = main(Args((str(tmp_path / "bare.pt"),), dataset="digits", generate=True, norm="l2", eps=0.5, eval_steps=1,
                     eval_examples=5, corruptions="contrast", severities="1", out=str(tmp_path / "run")))["rows"]  # fmt: skip
    assert [(r["norm"], r["eps"]) for r in rows[:2]] == [("l2", 0), ("l2", 0.5)]


def test_imagenet_c_folders(tmp_path, checkpoint):
    """ImageNet-C's layout gives the accuracies of the same pixels in CIFAR-10-C's; all cells must have the same classes."""
    train, labels = load_data("digits", "", CPU)[0], np.tile(np.arange(10), 5)
    rows = [(train.labels == c).nonzero()[s].item() for s in range(5) for c in range(10)]
    pixels = train.pixels[rows].permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "labels.npy", labels)
    for name in ("fog", "snow"):
        np.save(tmp_path / f"{name}.npy", pixels)
        for i in range(50):
            file = tmp_path / name / str(i // 10 + 1) / f"class{labels[i]}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(file)
    more = dict(checkpoints=(str(checkpoint),), data_dir=str(tmp_path), eval_attack="none", workers=0)
    a = main(Args(**more, dataset="folder", image_size=16, out=str(tmp_path / "a")))  # the network's 32 pixels count
    b = main(Args(**more, corruptions="fog,snow", out=str(tmp_path / "b")))
    assert [r["accuracy"] for r in a["rows"]] == [r["accuracy"] for r in b["rows"]] and len(a["rows"]) == 11
    assert 20 < a["rows"][-1]["accuracy"] < 100
    (tmp_path / "fog" / "2" / "class3").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="fog 2 has not the classes and number of images"):
        main(Args(**more, dataset="folder", out=str(tmp_path / "c")))


# ---- fetching ----


@pytest.fixture
def host(tmp_path, monkeypatch):
    """(URL, folder that it serves) of a web server with an archive of every file of CIFAR-10-C, whose MD5 is the official one."""
    folder = tmp_path / "host"
    (folder / "CIFAR-10-C").mkdir(parents=True)
    for name in [*BENCHMARK, *EXTRA, "labels"]:
        np.save(folder / "CIFAR-10-C" / f"{name}.npy", np.zeros(20 if name == "labels" else (20, 32, 32, 3), np.uint8))
    with tarfile.open(folder / "CIFAR-10-C.tar", "w") as tar:
        tar.add(folder / "CIFAR-10-C", "CIFAR-10-C")
    digest = hashlib.md5((folder / "CIFAR-10-C.tar").read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setitem(script.ARCHIVES, "cifar10", ("CIFAR-10-C", 10, 1, digest))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", folder
    server.shutdown()
    server.server_close()


def test_download(tmp_path, host, checkpoint):
    """From a mirror; what is not the official archive is refused, and fetched again the next time."""
    url, folder = host
    whole, data = (folder / "CIFAR-10-C.tar").read_bytes(), tmp_path / "data"

    def evaluate(out, mirror=url, **more):
        args = dict(data_dir=str(data), eval_attack="none", download=True, data_mirror=mirror, out=str(tmp_path / out))
        return main(Args((str(checkpoint),), **args | more))["rows"]

    for mirror in ("nonsense", "http://127.0.0.1:1", url + "nowhere"):
        with pytest.raises(UserError, match="could not fetch .*--data-mirror, or --generate"):
            evaluate("run", mirror)
    (folder / "CIFAR-10-C.tar").write_bytes(whole[:-1000])
    with pytest.raises(UserError, match="could not fetch .*corrupted"):
        evaluate("run")
    assert not (data / "CIFAR-10-C").exists()
    (folder / "CIFAR-10-C.tar").write_bytes(whole)
    assert len(evaluate("run")) == 19 * 5 + 2 and [p.name for p in data.iterdir()] == ["CIFAR-10-C"]
    assert len(evaluate("again", "nonsense", corruptions="fog")) == 6  # it is there: nothing is fetched


# ---- corruptions made here ----


@pytest.fixture(scope="module")
def pictures():
    """Coloured test images with edges and smooth parts, uint8 (8, 3, 32, 32)."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(8, 3, 6, 6, generator=g)
    x = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1)
    x[:, :, 8:20, 10:24] = torch.rand(8, 3, 1, 1, generator=g)
    return (x * 255).byte()


@pytest.mark.parametrize("name", GENERATED)
def test_corruptions(pictures, name):
    """Same seed, same pixels; another seed, other noise; severity 5 is farther from the original than severity 1."""
    out = {s: corrupt(pictures, name, s, seed=1) for s in range(1, 6)}
    assert all(o.dtype == torch.uint8 and o.shape == pictures.shape for o in out.values())
    assert torch.equal(out[3], corrupt(pictures, name, 3, seed=1))
    assert torch.equal(out[3], corrupt(pictures, name, 3, seed=2)) == (name not in RANDOM)
    distance = {s: (o.float() - pictures.float()).square().mean().item() for s, o in out.items()}
    assert 0 < distance[1] < distance[5] < 90**2


def test_noise_has_the_official_strength_and_its_own_seed():
    x, number = torch.full((20, 3, 32, 32), 128, dtype=torch.uint8), {"gaussian_noise": 0, "impulse_noise": 2}
    for s in range(5):
        noisy = corrupt(x, "gaussian_noise", s + 1)
        assert noisy.float().std().item() / 255 == pytest.approx([0.04, 0.06, 0.08, 0.09, 0.10][s], rel=0.03)
        hit = corrupt(x, "impulse_noise", s + 1)
        assert (hit != 128).float().mean().item() == pytest.approx([0.01, 0.02, 0.03, 0.05, 0.07][s], rel=0.1)
        assert set(hit.unique().tolist()) == {0, 128, 255}
        for name, n in number.items():  # the place among all types, so that fewer generators draw the same numbers
            g = torch.Generator().manual_seed(3_000 + 10 * n + s + 1)
            first = torch.randn(x.shape, generator=g) if n == 0 else torch.rand(x.shape, generator=g)
            changed = corrupt(x, name, s + 1, seed=3).float() - 128
            assert (changed[first > 0.5] >= 0).all() if n == 0 else (changed[first > 0.08] == 0).all()


def test_brightness_against_hsv_pixel_by_pixel(pictures):
    """Python's own conversion to HSV and back, the way the official script does it."""
    x = pictures[:2].clone()
    x[0, :, 0] = torch.arange(32).byte() * 8  # greys, black among them
    for s in range(5):
        got = corrupt(x, "brightness", s + 1)
        for i, r, c in [(0, 0, 0), (0, 0, 5), (0, 0, 31), (0, 9, 15), (1, 3, 3), (1, 30, 2), (1, 16, 20)]:
            h, sat, v = colorsys.rgb_to_hsv(*(x[i, :, r, c] / 255).tolist())
            want = [255 * value for value in colorsys.hsv_to_rgb(h, sat, min(1, v + [0.05, 0.1, 0.15, 0.2, 0.3][s]))]
            assert np.allclose(got[i, :, r, c], want, atol=1.01)


def test_blur_keeps_a_flat_image_and_has_the_variance_of_a_gaussian():
    flat = torch.full((3, 3, 32, 32), 77, dtype=torch.uint8)
    dot = torch.zeros(1, 1, 33, 33)
    dot[..., 16, 16] = 1
    for s, sigma in enumerate([0.4, 0.6, 0.7, 0.8, 1]):
        assert (corrupt(flat, "gaussian_blur", s + 1).int() - 77).abs().max() <= 1
        spread = script.blur(dot, sigma)
        assert spread.sum().item() == pytest.approx(1, abs=1e-5)
        line = np.exp(-0.5 * (np.arange(-8, 9) / sigma) ** 2)  # the sampled Gaussian's own variance
        want = (line * np.arange(-8, 9) ** 2).sum() / line.sum()
        for direction in (0, 1):
            variance = (spread[0, 0].sum(direction) * (torch.arange(33) - 16) ** 2).sum().item()
            assert variance == pytest.approx(want, rel=0.01)


def test_contrast_and_jpeg_against_their_definitions(pictures):
    got = corrupt(pictures, "contrast", 5).float()
    average = pictures.float().mean((2, 3), keepdim=True)
    assert ((pictures - average) * 0.15 + average - got).abs().max() < 1.01
    file = io.BytesIO()
    Image.fromarray(pictures[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=40)
    assert np.array_equal(corrupt(pictures, "jpeg_compression", 5)[0].permute(1, 2, 0), np.array(Image.open(file)))


# ---- evaluating ----


def small(checkpoints, out, **changes) -> Args:
    usual = dict(generate=True, dataset="digits", severities="1,5", corruptions="brightness,contrast,gaussian_blur",
                 eval_examples=40, eval_steps=3, out=str(out))  # fmt: skip
    return Args(tuple(map(str, checkpoints)), **usual | changes)


def test_accuracies_and_means_equal_an_independent_computation(tmp_path, checkpoint, capsys):
    """And nothing counts twice that is named twice."""
    rows = main(small([checkpoint], tmp_path, severities="1,5,1", corruptions="brightness, contrast,gaussian_blur,contrast"))["rows"]
    cells = [r for r in rows if r["severity"] != "all"]
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
    assert len(cells) == 3 * 2 * 2 and all(r["generated"] and r["name"] == "robust/best" for r in rows)
    assert {"name", "attack", "norm", "eps", "examples", "accuracy", "corruption", "severity", "generated"} <= rows[0].keys()
    model, (_, test) = load_model(checkpoint), load_data("digits", "", CPU)
    for r in cells:
        x = corrupt(test.pixels, r["corruption"], r["severity"]) / 255
        if r["attack"] == "none":
            right = model(x).argmax(1) == test.labels
            assert (r["examples"], r["eps"], r["correct"]) == (360, 0, right.sum().item())
        else:
            some = draw(test, 40, seed=0).index
            torch.manual_seed(0)
            attack = lambda x, y: pgd(lambda z: torch.nn.functional.cross_entropy(model(z), y, reduction="none"), x, eps=0.1, steps=3)  # noqa: E731
            want = robust_accuracy(model, [(x[some], test.labels[some])], attack)
            assert (r["attack"], r["norm"], r["eps"], r["examples"]) == ("pgd-3", "linf", 0.1, 40)
            assert r["accuracy"] == pytest.approx(want, abs=0.01)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    for attack in ("none", "pgd-3"):
        for title, types in (("mean of 2 of 15", ("brightness", "contrast")), ("mean of 3", ("brightness", "contrast", "gaussian_blur"))):
            mine = [r for r in cells if r["attack"] == attack and r["corruption"] in types]
            (row,) = [r for r in rows if (r["corruption"], r["severity"], r["attack"]) == (title, "all", attack)]
            assert row["accuracy"] == round(sum(100 * r["correct"] / r["examples"] for r in mine) / len(mine), 2)
            assert f"{row['accuracy']:.2f}" in next(words for words in printed if words[: len(title.split())] == title.split())


def cell(corruption, severity, correct, examples, **more) -> dict:
    row = {"name": "a", "attack": "none", "norm": "linf", "eps": 0, "examples": examples, "correct": correct, "generated": False}
    return row | {"corruption": corruption, "severity": severity, "accuracy": round(100 * correct / examples, 2)} | more


def test_means_are_not_those_of_rounded_accuracies():
    """2, 2 and 0 of 3 are 44.44% on average, 66.67, 66.67 and 0.00 would be 44.45%."""
    cells = [cell("fog", s, correct, 3) for s, correct in ((1, 2), (2, 2), (3, 0))]
    rows = cells + means(cells, {"a": [None, None]})
    assert rows[-1]["accuracy"] == 44.44
    lines = [line.split() for line in table({"rows": rows, "seconds": 1}, Args()).splitlines()]
    assert ["fog", "44.44"] in lines and ["mean", "of", "1", "of", "15", "44.44"] in lines


def test_the_paper_stands_beside_its_own_setting_only(tmp_path):
    model = build_model("resnet18", {"class": 10}, width=1 / 16)

    def papers(args=Args(("x.pt",)), n=10_000, stage="train", rotation="rotation_at", **changes):  # noqa: B008
        trained = vars(rotation_at.Args(norm="l2", eps=1.0, variant="T3")) | changes
        save_checkpoint(tmp_path / "x.pt", {"network": model.spec, "model": model.state_dict(), "args": trained, "script": rotation, "stage": stage})
        cells = [cell(c, s, 5_000, n, attack=a) for c in BENCHMARK + EXTRA for s in range(1, 6) for a in ("none", "pgd-20")]
        rows = means(cells, {"a": script.load_network(tmp_path / "x.pt", 10, args)["paper"]})
        printed = re.findall(r"the paper +(\S*)", table({"rows": cells + rows, "seconds": 1}, args))
        assert [float(v) for v in printed] == [r["paper"] for r in rows if r["paper"]][:2]  # clean, if there is that, else attacked
        return [r["paper"] for r in rows]

    assert papers() == [76.52, 76.52, 38.33, 38.33]  # of 15 and of 19 types
    assert papers(variant="T1") == [80.23, 80.23, None, None] and papers(norm="linf", eps=8 / 255)[2:] == [36.22, 36.22]
    for changed in (dict(width=0.5), dict(eps=0.5), dict(epochs=8), dict(dataset="folder"), dict(stage="plain"), dict(rotation="jigsaw_at"),
                    dict(lambda2=0.0), dict(attack_steps=1), dict(n=1_000)):  # fmt: skip
        assert papers(**changed) == [None] * 4
    for changed in (dict(generate=True), dict(corruptions="fog"), dict(severities="1"), dict(eval_examples=9), dict(eps=0.5), dict(eval_amp=True)):
        assert papers(Args(("x.pt",), **changed)) == [None] * 4


def test_several_checkpoints_and_resume(tmp_path, checkpoint, capsys):
    """Killed after some cells and resumed: the same results, and no cell is computed twice."""
    other = tmp_path / "other" / "net.pt"
    other.parent.mkdir()
    state = load_checkpoint(checkpoint)
    save_checkpoint(other, state | {"args": state["args"] | {"norm": "l2", "eps": 1.0}})
    more = dict(corruptions="brightness,contrast", eval_examples=20, eval_steps=2)
    whole = main(small([checkpoint, other], tmp_path / "whole", **more))
    assert [(r["norm"], r["eps"]) for r in whole["rows"] if r["severity"] == 1 and r["attack"] == "pgd-2"][::2] == [("linf", 0.1), ("l2", 1.0)]
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import eval_cifar10c
real, calls = eval_cifar10c.evaluate_cell, []
def patched(*a):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a)
eval_cifar10c.evaluate_cell = patched
eval_cifar10c.cli(eval_cifar10c.main, eval_cifar10c.Args)
"""
    args = small([checkpoint, other], tmp_path / "killed", **more)
    argv = [*args.checkpoints, *flags({k: getattr(args, k) for k in ("generate", "dataset", "severities", "out", *more)})]
    assert subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, timeout=120).returncode == -9
    assert len(json.loads((tmp_path / "killed" / "rows.json").read_text())) == 4  # two cells, clean and attacked
    args.resume = True
    assert main(args)["rows"] == whole["rows"]
    out = capsys.readouterr().out
    assert "robust/best clean" in out and "other/net pgd-2" in out and "GENERATED" in out
    save_checkpoint(other, state | {"model": {k: v * 1.5 for k, v in state["model"].items()}})
    for _ in range(2):  # a table of two networks under one name is refused, finished or not
        with pytest.raises(UserError, match="the checkpoints are not those"):
            main(args)
        (tmp_path / "killed" / "results.json").unlink(missing_ok=True)


def test_resuming_with_other_data_is_refused(tmp_path, cifar_c, checkpoint):
    args = Args((str(checkpoint),), data_dir=str(cifar_c), eval_attack="none", out=str(tmp_path / "run"))
    main(args)
    (tmp_path / "run" / "results.json").unlink()
    args.resume = True
    main(args)
    (tmp_path / "run" / "results.json").unlink()
    np.save(cifar_c / "fog.npy", np.load(cifar_c / "fog.npy") + 1)
    with pytest.raises(UserError, match="the data are not those"):
        main(args)


def test_larger_networks_see_larger_images(checkpoint):
    """A network trained at 64 pixels gets corrupted images of 32 enlarged to 64."""
    sizes, model = [], load_model(checkpoint)
    model.register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[-1]))
    args = Args(eval_attack="none")
    run = Run(ROOT / "nowhere", CPU, "eval_cifar10c", args)
    images = draw(load_data("digits", "", CPU)[1], 4, seed=0)
    evaluate_cell(model, {"norm": "linf", "eps": 0.1, "size": 64}, images, "none", run, "")
    assert set(sizes) == {64}


def test_the_picture(tmp_path, checkpoint):
    """With matplotlib only; without it, and without tqdm, the rest is the same."""
    args = small([checkpoint], tmp_path / "with", severities="1", corruptions="contrast", eval_attack="apgd", eval_examples=3)
    assert main(args)["rows"][1]["attack"] == "apgd"
    assert (tmp_path / "with" / "corruptions.png").exists() == bool(importlib.util.find_spec("matplotlib"))
    block = f"import sys; sys.modules['matplotlib'] = sys.modules['tqdm'] = None; sys.path.insert(0, {str(ROOT)!r})\n"
    code = block + "import eval_cifar10c as s; s.cli(s.main, s.Args)"
    argv = [checkpoint, *flags({k: getattr(args, k) for k in ("generate", "dataset", "severities", "corruptions")}), "--eval-attack", "none", "--out", tmp_path / "run"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "contrast" in done.stdout and not done.stderr
    assert not (tmp_path / "run" / "corruptions.png").exists()


def test_quick_evaluates_what_rotation_at_trains():
    ours, theirs = (s.Args(**s.Args.QUICK) for s in (script, rotation_at))
    assert (ours.dataset, ours.image_size) == (theirs.dataset, theirs.image_size)
