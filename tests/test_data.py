"""Section 2 of common.py: data sets, splits, sharding, augmentation."""
import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import UserError, batches, load_data, split_train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", "", CPU)


def test_the_split_depends_on_the_seed_alone(digits):
    """Parts are disjoint, and a larger label fraction contains a smaller one."""
    train, held = split_train(digits[0], val_fraction=0.15, seed=7)
    torch.manual_seed(1)
    again, _ = split_train(digits[0], val_fraction=0.15, seed=7)
    other, _ = split_train(digits[0], val_fraction=0.15, seed=8)
    assert torch.equal(train.index, again.index) and not torch.equal(train.index, other.index)
    assert len(held) == 216 and sorted(train.index.tolist() + held.index.tolist()) == list(range(1437))
    some, more = (split_train(digits[0], val_fraction=100, seed=7, label_fraction=f)[0] for f in (0.1, 0.2))
    assert len(some) == 144 and set(some.index.tolist()) < set(more.index.tolist())


@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize(("n", "batch"), [(3000, 64), (100, 7), (17, 16), (9, 100)])
def test_every_image_is_seen_once(digits, ranks, world, n, batch):
    """All as often, on one rank or several, in batches and shares of about one size, in the seed's order."""
    data = common.replace(digits[0], labels=torch.arange(1437))  # so that y tells which image it is
    data = common.draw(data, n, seed=3)
    assert n // 1437 <= torch.bincount(data.index, minlength=1437).min()
    assert torch.bincount(data.index).max() <= -(-n // 1437)
    per_rank = []
    for r in range(world):
        ranks(r, world)
        per_rank.append([y for _, y in batches(data, batch, CPU, shuffle=5)])
    steps = list(zip(*per_rank, strict=True))  # as many on every rank
    for sizes in ([len(torch.cat(step)) for step in steps], *([len(y) for y in step] for step in steps)):
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    together = torch.cat([y for step in steps for y in step])
    assert sorted(together.tolist()) == sorted(data.index.tolist())
    ranks(0, 1)
    x, y = (torch.cat(parts) for parts in zip(*batches(data, batch, CPU, shuffle=5), strict=True))
    assert torch.equal(together, y) and torch.equal(x, data.pixels[y] / 255)
    assert not torch.equal(y, torch.cat([y for _, y in batches(data, batch, CPU, shuffle=6)]))


@pytest.mark.parametrize("flip", [True, False])
def test_crop_and_flip_against_a_slow_version(flip):
    x = torch.rand(40, 3, 9, 9)
    torch.manual_seed(4)
    fast = common.random_crop_flip(x, pad=3, flip=flip)
    torch.manual_seed(4)  # the same draws, in the same order
    top, left = torch.randint(0, 7, (2, 40, 1))[:, :, 0].tolist()
    mirror = (torch.rand(40, 1) < 0.5)[:, 0].tolist() if flip else [False] * 40
    for i in range(40):
        padded = np.pad(x[i].numpy(), ((0, 0), (3, 3), (3, 3)))
        crop = padded[:, top[i] : top[i] + 9, left[i] : left[i] + 9]
        assert np.array_equal(fast[i].numpy(), crop[:, :, ::-1] if mirror[i] else crop)


@pytest.fixture
def folder(tmp_path):
    """A class may hold folders and links; hidden files are skipped, and a test/ without classes (Kaggle)."""
    rng = np.random.default_rng(0)
    for split, c in (("train", "cat"), ("train", "dog"), ("val", "cat"), ("val", "dog")):
        (tmp_path / split / c / ".hidden").mkdir(parents=True)
        (tmp_path / "store" / split / c).mkdir(parents=True)
        (tmp_path / split / c / "link").symlink_to(tmp_path / "store" / split / c)
        for name in (*(f"link/{i}.png" for i in range(6)), ".hidden/0.png", "._0.png", "../../test/0.png"):
            (tmp_path / split / c / name).parent.mkdir(exist_ok=True)
            pixels = rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / c / name)
    return tmp_path


def test_a_folder_streamed_and_in_memory_is_the_same(folder, ranks):
    kept, test = load_data("folder", str(folder), CPU, image_size=32, workers=0)
    streamed, _ = load_data("folder", str(folder), CPU, image_size=32, stream=True)
    assert isinstance(kept.pixels, torch.Tensor) and not isinstance(streamed.pixels, torch.Tensor)
    assert kept.classes == ["cat", "dog"] and kept.labels.tolist() == [0] * 6 + [1] * 6 and len(test) == 12
    kept.labels = streamed.labels = torch.arange(12) + 100  # such as pseudo-labels
    for world, workers in ((1, 0), (2, 1)):
        ranks(world - 1, world)
        a, b = (list(batches(data, 5, CPU, shuffle=1, workers=workers)) for data in (streamed, kept))
        assert len(a) == len(b) == 3
        assert all(torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_every_kind_of_image_keeps_its_brightness(tmp_path, mode):
    """The left half is black, the right half a grey of 128."""
    grey = np.zeros((16, 16), np.uint8)
    grey[:, 8:] = 128
    wide = Image.fromarray(grey.astype("<u2") << 8)
    (wide if mode == "I;16" else Image.fromarray(grey).convert(mode)).save(tmp_path / "0.tif")
    pixels = np.asarray(common.read_image(str(tmp_path / "0.tif"))).astype(int)
    assert pixels.shape == (16, 16, 3) and abs(pixels - grey[:, :, None]).max() <= 2


def test_folders_that_will_not_do(folder):
    """A damaged image is named, and other classes in the test set are refused."""
    (folder / "train" / "dog" / "link" / "3.png").write_bytes(b"damaged")
    for more in (dict(workers=0), dict(workers=2, stream=True)):
        with pytest.raises(UserError, match=r"^cannot read the image .*3\.png"):
            list(batches(load_data("folder", str(folder), CPU, **more)[0], 4, CPU))
    (folder / "val" / "dog").rename(folder / "val" / "bird")
    with pytest.raises(UserError, match="different class folders .*bird"):
        load_data("folder", str(folder), CPU)


def test_cifar10_is_read_and_checked(tmp_path, monkeypatch):
    """CIFAR's own format, pickles of 10 images each, with torchvision's checksums set to match."""
    from torchvision.datasets import CIFAR10

    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3072), dtype=np.uint8)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    parts = {name: {"data": x, "labels": list(range(10))} for name, x in zip(names, pixels, strict=True)}
    parts["batches.meta"] = {"label_names": list("abcdefghij")}
    root, md5 = tmp_path / "cifar-10-batches-py", {}
    root.mkdir()
    for name, part in parts.items():
        (root / name).write_bytes(pickle.dumps(part))
        md5[name] = [name, hashlib.md5(pickle.dumps(part)).hexdigest()]
    monkeypatch.setattr(CIFAR10, "train_list", [md5[name] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [md5["test_batch"]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"][1]})
    train, test = load_data("cifar10", str(tmp_path), CPU)
    assert train.labels.tolist() == 5 * list(range(10)) and test.classes == list("abcdefghij")
    assert np.array_equal(torch.cat([train.pixels, test.pixels]).numpy(), pixels.reshape(60, 3, 32, 32))
    (root / "test_batch").write_bytes(pickle.dumps(parts["data_batch_1"]))
    with pytest.raises(UserError, match="no intact cifar10: .*127.0.0.1:9/cifar-10-python.tar.gz"):
        load_data("cifar10", str(tmp_path), CPU, data_mirror="http://127.0.0.1:9/")


@pytest.mark.parametrize("kind", ["npy", "npz"])
@pytest.mark.parametrize("limit", [2**30, 1000])
def test_extra_images_on_the_device_and_on_the_disk(digits, tmp_path, monkeypatch, kind, limit):
    """Channels last in an .npz, as generated CIFAR-10 images are published; channels first in an .npy."""
    monkeypatch.setattr(common, "IN_MEMORY_BYTES", limit)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    path, first = tmp_path / f"extra.{kind}", pixels.transpose(0, 3, 1, 2)
    np.save(path, first) if kind == "npy" else np.savez_compressed(path, image=pixels, label=np.zeros(20))
    some = digits[0].subset(torch.arange(5, 15))
    both = common.join(some, common.load_extra(path, 32, CPU))
    assert len(both) == 30 and both.classes == some.classes and both.digest != some.digest
    x, y = (torch.cat(parts) for parts in zip(*batches(both, 7, CPU), strict=True))
    assert torch.equal(x, torch.cat([some.pixels[5:15], torch.from_numpy(first)]) / 255)
    assert torch.equal(y, torch.cat([some.labels[5:15], torch.full((20,), -1)]))
