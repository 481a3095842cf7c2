"""Section 2 of common.py: data sets, splits, sharding, augmentation."""
import hashlib
import http.server
import io
import pickle
import shutil
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import UserError, batches, load_data, random_crop_flip, split_train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", "", CPU)


# ---- digits, splits, batches ----


def test_digits_are_complete(digits):
    train, test = digits
    assert (len(train), len(test)) == (1437, 360) and train.classes == list("0123456789")
    assert train.pixels.shape == (1437, 3, 32, 32) and train.pixels.dtype == torch.uint8
    assert torch.equal(train.pixels[:, 0], train.pixels[:, 2])  # grey
    assert torch.bincount(test.labels).min() >= 35  # all classes
    # Each 4x4 block of the 32x32 picture averages to about the 8x8 original (values 0-16).
    z = np.load(common.Path(common.__file__).parent / "assets" / "digits.npz")
    blocks = train.pixels[:, 0].float().view(-1, 8, 4, 8, 4).mean((2, 4)) * 16 / 255
    original = torch.from_numpy(z["images"][:1437]).float()
    assert torch.corrcoef(torch.stack([blocks.flatten(), original.flatten()]))[0, 1] > 0.97
    assert (common.Path(common.__file__).parent / "assets" / "digits.npz").stat().st_size <= 80_000


def test_the_split_depends_on_the_seed_alone(digits, ranks):
    train, _ = digits
    parts = []
    for r in range(3):
        ranks(r, 3)
        torch.manual_seed(r)  # other random numbers must not matter
        parts.append(split_train(train, val_fraction=0.15, seed=7))
    for a, b in parts:
        assert torch.equal(a.index, parts[0][0].index) and torch.equal(b.index, parts[0][1].index)
        assert (len(a), len(b)) == (1437 - 216, 216)  # 15%
        assert sorted(a.index.tolist() + b.index.tolist()) == list(range(1437))
    assert not torch.equal(split_train(train, val_fraction=0.15, seed=8)[0].index, parts[0][0].index)
    some, held = split_train(train, val_fraction=100, seed=7, label_fraction=0.1)
    assert (len(held), len(some)) == (100, 144) and not set(some.index.tolist()) & set(held.index.tolist())
    with pytest.raises(UserError, match="too few"):
        split_train(train, val_fraction=1437, seed=7)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize(("n", "batch"), [(1437, 64), (100, 7), (17, 16), (9, 100)])
def test_every_image_once_per_epoch(digits, ranks, world, n, batch):
    data = digits[0].subset(torch.randperm(1437, generator=torch.Generator().manual_seed(3))[:n])
    data.pixels = torch.zeros(1437, 3, 1, 1, dtype=torch.uint8)
    data.labels = torch.arange(1437)  # so that y tells which image it is
    per_rank = []
    for r in range(world):
        ranks(r, world)
        per_rank.append([y for _, y in batches(data, batch, CPU, shuffle=5)])
    together = [torch.cat(parts) for parts in zip(*per_rank, strict=True)]  # global batches: as many on every rank
    assert sorted(torch.cat(together).tolist()) == sorted(data.index.tolist())
    sizes = [len(b) for b in together]
    assert max(sizes) - min(sizes) <= 1 and (max(sizes) <= batch or batch < world)
    shares = [len(y) for parts in per_rank for y in parts]
    assert min(shares) >= 1 and max(shares) - min(shares) <= 1 + (max(sizes) > min(sizes))
    # The order is the seed's, whatever the number of ranks, and another one for another seed.
    ranks(0, 1)
    if batch >= world:
        assert torch.equal(torch.cat(together), torch.cat([y for _, y in batches(data, batch, CPU, shuffle=5)]))
    assert not torch.equal(torch.cat(together), torch.cat([y for _, y in batches(data, batch, CPU, shuffle=6)]))


def test_skipping_batches_leaves_the_rest_as_it_is(digits):
    whole = list(batches(digits[0], 100, CPU, shuffle=1))
    rest = list(batches(digits[0], 100, CPU, shuffle=1, skip=6))
    assert len(rest) == len(whole) - 6
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(whole[6:], rest, strict=True))
    x, y = next(batches(digits[0], 3, CPU))
    assert x.dtype == torch.float32 and torch.equal(x, digits[0].pixels[:3] / 255) and torch.equal(y, digits[0].labels[:3])


@pytest.mark.parametrize("flip", [True, False])
def test_crop_and_flip_against_a_slow_version(flip):
    x = torch.rand(40, 3, 9, 9)
    torch.manual_seed(4)
    fast = random_crop_flip(x, pad=3, flip=flip)
    torch.manual_seed(4)  # the same draws, in the same order
    top, left = torch.randint(0, 7, (2, 40, 1))[:, :, 0].tolist()
    mirror = (torch.rand(40, 1) < 0.5)[:, 0].tolist() if flip else [False] * 40
    for i in range(40):
        padded = np.pad(x[i].numpy(), ((0, 0), (3, 3), (3, 3)))
        crop = padded[:, top[i] : top[i] + 9, left[i] : left[i] + 9]
        assert np.array_equal(fast[i].numpy(), crop[:, :, ::-1] if mirror[i] else crop)
    assert len(set(top)) > 3 and len(set(zip(top, left, strict=True))) > 10  # drawn per image
    assert fast.shape == x.shape and torch.equal(random_crop_flip(x, pad=0, flip=False), x)


# ---- folders ----


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for c in ("cat", "dog"):
            (tmp_path / split / c).mkdir(parents=True)
            for i in range(count):
                size = (48, 40) if i % 2 else (36, 60)
                Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / split / c / f"{i}.png")
    return tmp_path


def test_a_class_may_be_made_of_folders_and_links(folder, tmp_path_factory):
    """As the restricted ImageNet of Chen et al. is: 10 classes out of 190."""
    root = tmp_path_factory.mktemp("super")
    for split in ("train", "val"):
        (root / split / "thing").mkdir(parents=True)
        (root / split / "animal").mkdir()
        for c in ("cat", "dog"):
            (root / split / "animal" / c).symlink_to(folder / split / c)
        (root / split / "thing" / "0.png").symlink_to(folder / split / "cat" / "0.png")
    train, _ = load_data("folder", str(root), CPU, image_size=32, workers=0)
    assert train.classes == ["animal", "thing"] and train.labels.tolist() == [0] * 12 + [1]
    kept, _ = load_data("folder", str(folder), CPU, image_size=32, workers=0)
    assert torch.equal(train.pixels[:12], kept.pixels)


def test_a_folder_streamed_and_in_memory_is_the_same(folder, monkeypatch):
    kept, kept_test = load_data("folder", str(folder), CPU, image_size=32, workers=0)
    assert isinstance(kept.pixels, torch.Tensor) and kept.pixels.shape == (12, 3, 32, 32)
    assert kept.classes == ["cat", "dog"] and kept.labels.tolist() == [0] * 6 + [1] * 6 and len(kept_test) == 6
    monkeypatch.setattr(common, "IN_MEMORY_BYTES", 0)
    for workers in (0, 2):
        streamed, _ = load_data("folder", str(folder), CPU, image_size=32, workers=workers)
        assert not isinstance(streamed.pixels, torch.Tensor)
        part, _ = split_train(streamed, val_fraction=2, seed=0)
        same, _ = split_train(kept, val_fraction=2, seed=0)
        a = list(batches(part, 4, CPU, shuffle=1, skip=1, workers=workers))
        b = list(batches(same, 4, CPU, shuffle=1, skip=1))
        assert len(a) == len(b) == 2
        assert all(torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) for p, q in zip(a, b, strict=True))


def test_every_rank_keeps_a_whole_folder_and_takes_its_share(folder, ranks):
    whole, _ = load_data("folder", str(folder), CPU, workers=0)
    for r in range(3):
        ranks(r, 3)
        mine, _ = load_data("folder", str(folder), CPU, workers=0)
        assert torch.equal(mine.pixels, whole.pixels)
        assert torch.equal(next(batches(mine, 12, CPU))[1], whole.labels[4 * r : 4 * r + 4])


def test_fewer_images_than_ranks(folder, ranks, monkeypatch):
    for limit in (0, 2**30):
        monkeypatch.setattr(common, "IN_MEMORY_BYTES", limit)
        train, _ = load_data("folder", str(folder), CPU, workers=0)
        seen = []
        for r in range(5):
            ranks(r, 5)
            seen += [y for _, y in batches(train.subset(torch.tensor([0, 7])), 4, CPU, workers=0)]
        assert torch.cat(seen).tolist() == [0, 1]


def test_what_does_not_fit_is_told(digits, monkeypatch):
    monkeypatch.setattr(common, "IN_MEMORY_BYTES", 10**6)
    with pytest.raises(UserError, match="--dataset folder.*streamed"):
        load_data("digits", "", CPU)


def test_folders_that_will_not_do(folder, monkeypatch):
    with pytest.raises(UserError, match="no images in .*nowhere.*--data-dir"):
        load_data("folder", str(folder / "nowhere"), CPU)
    (folder / "test" / "cat").mkdir(parents=True)  # a class without images
    with pytest.raises(UserError, match="no images in .*test"):
        load_data("folder", str(folder), CPU)
    (folder / "train" / "cat" / "0.png").rename(folder / "test" / "cat" / "0.png")
    with pytest.raises(UserError, match="different class folders .*dog"):
        load_data("folder", str(folder), CPU)


def test_a_flat_test_folder_gives_way_to_val(folder):
    """As on Kaggle: test/ holds images without classes, val/<class>/ those to evaluate on."""
    (folder / "test").mkdir()
    (folder / "train" / "cat" / "0.png").rename(folder / "test" / "0.png")
    train, val = load_data("folder", str(folder), CPU, workers=0)
    assert (len(train), len(val)) == (11, 6)


def test_one_class_is_refused(folder):
    for split in ("train", "val"):
        shutil.rmtree(folder / split / "dog")
    with pytest.raises(UserError, match="one class"):
        load_data("folder", str(folder), CPU, workers=0)


@pytest.mark.parametrize("hidden", ["train/.ipynb_checkpoints/0.png", "train/cat/.ipynb_checkpoints/0.png", "train/cat/._0.png", "train/.DS_Store"])
def test_hidden_files_and_folders_are_skipped(folder, hidden):
    kept, _ = load_data("folder", str(folder), CPU, workers=0)
    (folder / hidden).parent.mkdir(exist_ok=True)
    shutil.copy(folder / "train" / "cat" / "0.png", folder / hidden)
    train, _ = load_data("folder", str(folder), CPU, workers=0)
    assert train.classes == ["cat", "dog"] and torch.equal(train.pixels, kept.pixels) and train.digest == kept.digest


def grey_levels(mode):
    """An image of that Pillow mode whose left half is black, whose right half is a grey of 128, and that grey."""
    values = np.zeros((16, 16), np.uint8)
    values[:, 8:] = 128
    if mode.startswith("I;16"):
        return Image.fromarray((values.astype(np.uint16) << 8).astype(">u2" if mode.endswith("B") else "<u2"))
    if mode in ("I", "F"):
        return Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32))
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize(("mode", "suffix"), [
    ("L", "png"), ("P", "png"), ("RGB", "png"), ("RGBA", "png"), ("LA", "png"), ("I;16", "png"), ("I;16", "tif"), ("I;16B", "tif"),
    ("CMYK", "tif"), ("YCbCr", "tif"), ("RGB", "bmp"), ("L", "pgm"), ("RGB", "webp"),
])  # fmt: skip
def test_every_kind_of_image_keeps_its_brightness(folder, mode, suffix):
    (folder / "train" / "cat" / "0.png").unlink()
    grey_levels(mode).save(folder / "train" / "cat" / f"0.{suffix}")
    pixels = load_data("folder", str(folder), CPU, image_size=16, workers=0)[0].pixels[0].float()
    assert pixels[:, :, :7].max() <= 2 and (pixels[:, :, 9:] - 128).abs().max() <= 2


@pytest.mark.parametrize("mode", ["1", "I", "F"])
def test_bilevel_images_are_read_and_32_bits_refused(folder, mode):
    path = folder / "train" / "cat" / ("0.png" if mode == "1" else "0.tif")
    (folder / "train" / "cat" / "0.png").unlink()
    grey_levels(mode).save(path)
    if mode == "1":  # dithered: half of the right side is white
        assert 100 < load_data("folder", str(folder), CPU, image_size=16, workers=0)[0].pixels[0, :, :, 8:].float().mean() < 156
        return
    with pytest.raises(UserError, match=r"cat.0\.tif.*32-bit"):
        load_data("folder", str(folder), CPU, workers=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_enormous_image_is_named(folder, workers):
    path = folder / "train" / "dog" / "3.png"
    Image.new("1", (20_000, 20_000)).save(path)  # Pillow takes it for a decompression bomb
    with pytest.raises(UserError, match=r"^cannot read the image .*dog.3\.png"):
        load_data("folder", str(folder), CPU, workers=workers)


def test_the_digest_knows_names_numbers_and_labels(folder, digits):
    first = load_data("folder", str(folder), CPU, workers=0)[0].digest
    assert first == load_data("folder", str(folder), CPU, workers=0, stream=True)[0].digest
    (folder / "train" / "cat" / "5.png").rename(folder / "train" / "cat" / "6.png")
    renamed = load_data("folder", str(folder), CPU, workers=0)[0].digest
    (folder / "train" / "cat" / "6.png").unlink()
    removed = load_data("folder", str(folder), CPU, workers=0)[0].digest
    for split in ("train", "val"):
        (folder / split / "dog").rename(folder / split / "bird")
    other_class = load_data("folder", str(folder), CPU, workers=0)[0].digest
    assert len({first, renamed, removed, other_class, digits[0].digest, digits[1].digest}) == 6


@pytest.mark.parametrize("limit", [0, 2**30])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named(folder, monkeypatch, limit, workers):
    monkeypatch.setattr(common, "IN_MEMORY_BYTES", limit)
    path = folder / "train" / "dog" / "3.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"^cannot read the image .*dog.3\.png"):
        train, _ = load_data("folder", str(folder), CPU, workers=workers)
        list(batches(train, 4, CPU, workers=workers))


# ---- CIFAR: files on disk, a mirror, checksums ----


@pytest.fixture
def fake_cifar(tmp_path, monkeypatch):
    """A CIFAR-10 archive of 10 images a file on a local server, with torchvision's checksums set to match."""
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    archive, files = io.BytesIO(), {}
    for name in ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]:
        entry = {"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))}
        files[name] = pickle.dumps(entry)
    files["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    md5 = {k: hashlib.md5(v).hexdigest() for k, v in files.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", md5[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.getvalue()).hexdigest())
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "cifar-10-python.tar.gz").write_bytes(archive.getvalue())

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *a):
            super().__init__(*a, directory=str(tmp_path / "www"))

        def log_message(self, *a):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, f"http://127.0.0.1:{server.server_port}", tmp_path, pickle.loads(files["test_batch"])
    server.shutdown()
    server.server_close()


def test_cifar_comes_from_the_mirror_once(fake_cifar):
    server, url, tmp, test_batch = fake_cifar
    train, test = load_data("cifar10", str(tmp / "data"), CPU, data_mirror=url + "/")
    assert train.pixels.shape == (50, 3, 32, 32) and len(test) == 10 and test.labels.tolist() == list(range(10))
    assert np.array_equal(test.pixels.numpy().reshape(10, -1), test_batch["data"])  # stored channel by channel
    server.shutdown()
    server.server_close()  # from now on there is no network
    again, _ = load_data("cifar10", str(tmp / "data"), CPU, data_mirror=url)
    assert torch.equal(again.pixels, train.pixels)
    # The archive alone is enough, and a damaged file is taken from it again.
    (tmp / "data" / "cifar-10-batches-py" / "test_batch").write_bytes(b"damaged")
    assert torch.equal(load_data("cifar10", str(tmp / "data"), CPU)[1].pixels, test.pixels)


def test_an_archive_with_the_wrong_checksum_is_refused(fake_cifar):
    _, url, tmp, _ = fake_cifar
    path = tmp / "www" / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="no intact cifar10"):
        load_data("cifar10", str(tmp / "data"), CPU, data_mirror=url)
    assert not (tmp / "data" / "cifar-10-batches-py").exists()  # nothing was unpacked


def test_stl10_is_read_and_resized(tmp_path, monkeypatch):
    """Files in STL-10's own format (column-major, labels from 1), with torchvision's checksums set to match."""
    from torchvision.datasets import STL10

    rng = np.random.default_rng(0)
    root = tmp_path / "stl10_binary"
    root.mkdir()
    pixels = {"train": rng.integers(0, 256, (4, 3, 96, 96), dtype=np.uint8), "test": np.full((2, 3, 96, 96), 7, np.uint8)}
    files = {"unlabeled_X.bin": b""}
    for split, x in pixels.items():
        files[f"{split}_X.bin"] = x.transpose(0, 1, 3, 2).tobytes()
        files[f"{split}_y.bin"] = bytes(range(1, len(x) + 1))
    for name, content in files.items():
        (root / name).write_bytes(content)
    (root / "class_names.txt").write_text("\n".join("abcdefghij"))
    (root / "fold_indices.txt").write_text("")
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    names = [name for name, _ in STL10.train_list], [name for name, _ in STL10.test_list]
    monkeypatch.setattr(STL10, "train_list", [[name, md5[name]] for name in names[0]])
    monkeypatch.setattr(STL10, "test_list", [[name, md5[name]] for name in names[1]])
    train, test = load_data("stl10", str(tmp_path), CPU, image_size=96)
    assert np.array_equal(train.pixels.numpy(), pixels["train"]) and train.labels.tolist() == [0, 1, 2, 3]
    small, _ = load_data("stl10", str(tmp_path), CPU, image_size=32)
    assert small.pixels.shape == (4, 3, 32, 32) and small.classes == list("abcdefghij")
    means = pixels["train"].reshape(4, 3, 32, 3, 32, 3).mean((3, 5))  # antialiased halving averages about 3x3 pixels
    assert abs(small.pixels.numpy().astype(float) - means).mean() < 20 and (test.pixels == 7).all()


def test_no_network_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="looked for .*cifar-100-python.*--data-dir.*--data-mirror.*--quick"):
        load_data("cifar100", str(tmp_path), CPU, data_mirror="http://127.0.0.1:9")
    with pytest.raises(UserError, match="no intact cifar10"):
        load_data("cifar10", str(tmp_path), CPU, data_mirror="http://127.0.0.1:port")


# ---- more images ----


@pytest.mark.parametrize("kind", ["npy", "npz", "npy channels first"])
def test_extra_images_on_the_device_and_on_the_disk(tmp_path, monkeypatch, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    path = tmp_path / f"extra.{kind[:3]}"
    if kind == "npz":
        np.savez_compressed(path, image=pixels, label=np.zeros(20))  # as the generated CIFAR-10 images are published
    else:
        np.save(path, pixels.transpose(0, 3, 1, 2) if "first" in kind else pixels)
    train, _ = load_data("digits", "", CPU, image_size=8)
    want = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    given = []
    for limit in (common.IN_MEMORY_BYTES, 1000):
        monkeypatch.setattr(common, "IN_MEMORY_BYTES", limit)
        extra = common.load_extra(path, 8, CPU)
        both = common.join(train.subset(torch.arange(5, 15)), extra)
        assert len(both) == 30 and both.classes == train.classes and both.digest != train.digest
        x = torch.cat([x for x, _ in batches(extra, 7, CPU)])
        assert torch.allclose(x, want)
        stream = list(batches(both, 7, CPU, workers=1))
        x, y = (torch.cat(parts) for parts in zip(*stream, strict=True))
        assert torch.allclose(x[10:], want) and torch.equal(y, torch.cat([train.labels[5:15], torch.full((20,), -1)]))
        given.append(x)
    assert torch.equal(*given)


@pytest.mark.parametrize(("flag", "method"), [(1, 0), (0, 99)], ids=["encrypted", "unknown compression"])
def test_an_archive_that_cannot_be_unpacked_is_told(tmp_path, flag, method):
    np.savez(tmp_path / "extra.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    data = bytearray((tmp_path / "extra.npz").read_bytes())
    for header, at in (b"PK\3\4", 6), (b"PK\1\2", 8):  # the flags, then the method of compression
        i = data.index(header)
        data[i + at], data[i + at + 2] = flag, method
    (tmp_path / "extra.npz").write_bytes(data)
    with pytest.raises(UserError, match="extra.npz is damaged, or not a file of the kind"):
        common.load_extra(tmp_path / "extra.npz", 8, CPU)


def test_labels_of_a_streamed_set_can_be_replaced(folder):
    """Pseudo-labels are given to images that are read from files."""
    data = common.open_folder(folder / "train", 8)
    data.labels = torch.arange(len(data)) + 100
    got = torch.cat([y for _, y in batches(data, 4, CPU, workers=0, shuffle=1)])
    assert sorted(got.tolist()) == data.labels.tolist() and got.tolist() != data.labels.tolist()


def test_draw_takes_every_image_equally_often(digits):
    some = digits[0].subset(torch.arange(10))
    for n in (3, 10, 27):
        counts = torch.bincount(common.draw(some, n, seed=1).index, minlength=10)
        assert counts.sum() == n and counts.max() - counts.min() <= 1
    assert not torch.equal(common.draw(some, 3, 1).index, common.draw(some, 3, 2).index)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError("")])
def test_a_broken_connection_to_a_reader_is_told(monkeypatch, error):
    """A killed reader may show itself by its socket before torch notices its death."""
    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", lambda self: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match="a process that reads images died"):
        next(common._read(torch.utils.data.TensorDataset(torch.zeros(2)), [torch.arange(2)], workers=1))
