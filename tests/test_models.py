"""Section 3 of common.py: parameter counts, torchvision as second implementation, mixed precision, checkpoints."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from common import (
    PreActBlock, UserError, ViT, build_model, build_trunk, full_precision, load_model, place_model, save_checkpoint,
)


@pytest.mark.parametrize(
    ("arch", "count"), [("resnet18", 11_173_962), ("resnet34", 21_282_122), ("resnet50", 23_520_842)]
)
def test_parameter_counts_with_the_cifar_stem(arch, count):
    """The counts of the CIFAR ResNets in the robustness library (10 classes)."""
    assert sum(p.numel() for p in build_model(arch, {"class": 10}).parameters()) == count


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_with_the_imagenet_stem_it_is_torchvisions_network(arch):
    theirs = getattr(torchvision.models, arch)(num_classes=7)
    ours = build_model(arch, {"class": 7}, stem="imagenet", mean=(0, 0, 0), std=(1, 1, 1))
    renamed = {"trunk." + k.replace("downsample.1", "shortcut.2").replace("downsample.0", "shortcut.1"): v
               for k, v in theirs.state_dict().items() if not k.startswith("fc")}  # fmt: skip
    renamed |= {"heads.class.weight": theirs.fc.weight, "heads.class.bias": theirs.fc.bias}
    renamed |= {"mean": ours.mean, "std": ours.std}
    ours.load_state_dict(renamed)
    x = torch.rand(2, 3, 64, 64)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-4)


def test_shapes_heads_and_width():
    model = build_model("resnet18", {"class": 10, "rotation": 4}, width=0.25)
    x = torch.rand(2, 3, 32, 32)
    a, b = model(x, "class", "rotation")
    assert model.features(x).shape == (2, 128) and a.shape == (2, 10) and b.shape == (2, 4)
    assert model.trunk.layer4[1].conv2.weight.shape == (128, 128, 3, 3)
    model.eval()
    assert torch.equal(model(x), model(x, "class")) and torch.allclose(model(x), model(x, "class", "rotation")[0])
    with pytest.raises(UserError, match="unknown architecture"):
        build_model("resnet19", {"class": 10})


def test_very_narrow_networks_train():
    """With 8 channels oneDNN's strided 1x1 weight gradient corrupts the heap (hence `Subsample`)."""
    model = place_model(build_model("resnet18", {"class": 10}, width=0.125), torch.device("cpu"))
    for _ in range(10):
        F.cross_entropy(model(torch.rand(32, 3, 32, 32)), torch.arange(32) % 10).backward()


def test_normalisation_is_inside():
    raw = build_model("resnet18", {"class": 3}, width=1 / 16, mean=(0, 0, 0), std=(1, 1, 1)).eval()
    normalised = build_model("resnet18", {"class": 3}, width=1 / 16, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).eval()
    normalised.load_state_dict(raw.state_dict() | {k: getattr(normalised, k) for k in ("mean", "std")})
    x = torch.rand(2, 3, 32, 32)
    by_hand = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    assert torch.allclose(normalised(x), raw(by_hand), atol=1e-5)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_gives_the_same_gradients_nearly(amp):
    """To the image and to the weights; in particular the scaling for fp16 cancels."""
    torch.manual_seed(0)
    model = build_model("resnet18", {"class": 10}, width=0.25, stem="imagenet").eval()
    x, y = torch.rand(16, 3, 32, 32), torch.arange(16) % 10

    def gradients():
        z = x.clone().requires_grad_()
        model.zero_grad()
        out = model(z)
        F.cross_entropy(out, y).backward()
        weights = torch.cat([p.grad.flatten() for p in model.parameters()])
        return out.detach(), z.grad.flatten(), weights

    exact = gradients()
    place_model(model, torch.device("cpu"), amp)
    assert model.amp is {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    for got, want in zip(gradients(), exact, strict=True):
        assert got.dtype == torch.float32
        assert not torch.equal(got, want)  # it did compute in low precision
        assert (got - want).norm() < {"bf16": 0.1, "fp16": 0.05}[amp] * want.norm()
    with full_precision(model):
        assert model.amp is None
        assert torch.allclose(model(x), exact[0], atol=1e-4)
    assert model.amp is not None


def test_fp16_keeps_gradients_that_fp16_alone_loses():
    model = build_model("resnet18", {"class": 10}, width=0.25, stem="imagenet").eval()
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8)

    def image_gradient(scale):
        z = x.clone().requires_grad_()
        return torch.autograd.grad(scale * F.cross_entropy(model(z), y, reduction="none").sum(), z)[0]

    want = image_gradient(1e-5)
    model.amp, model.FP16_SCALE = torch.float16, 1.0
    plain = image_gradient(1e-5)
    model.FP16_SCALE = type(model).FP16_SCALE
    scaled = image_gradient(1e-5)
    assert (plain.sign() != want.sign()).float().mean() > 2 * (scaled.sign() != want.sign()).float().mean()
    assert (scaled - want).norm() < 0.1 * want.norm()


def test_load_model_rebuilds_the_network(tmp_path):
    torch.manual_seed(0)
    model = build_model("resnet34", {"class": 5, "rotation": 4}, width=1 / 8, stem="imagenet", mean=(0.3,) * 3).eval()
    save_checkpoint(tmp_path / "m.pt", {"network": model.spec, "model": model.state_dict()})
    x = torch.rand(3, 3, 40, 40)
    again = load_model(tmp_path / "m.pt")
    assert not again.training and again.amp is None
    assert torch.equal(again(x), model(x))
    bad = {"network": model.spec | {"arch": "resnet99"}, "model": model.state_dict()}
    save_checkpoint(tmp_path / "bad.pt", bad)
    with pytest.raises(UserError, match="unknown architecture 'resnet99'"):
        load_model(tmp_path / "bad.pt")
    save_checkpoint(tmp_path / "pretrain.pt", {"network": model.spec, "model": model.state_dict(), "stage": "pretrain"})
    with pytest.raises(UserError, match="no finished classifier"):  # its class head is untrained
        load_model(tmp_path / "pretrain.pt")


def test_full_precision_is_without_tf32_and_comes_back():
    """In convolutions and in matrix products, whatever the user has set."""
    model = build_model("resnet18", {"class": 10}, width=1 / 16)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        with pytest.raises(KeyError), full_precision(model):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
            raise KeyError
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        with full_precision(model, enabled=False):
            assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_vits_that_cannot_be_are_told():
    for wrong in dict(dim=6, heads=1), dict(dim=16, heads=3), dict(dim=16, heads=2, learned=6):
        with pytest.raises(ValueError, match="must be a multiple of 4"):
            ViT(patch=4, depth=1, **wrong)


def test_compiled_and_plain_network_agree():
    torch.manual_seed(0)
    model = build_model("resnet18", {"class": 10}, width=1 / 16, stem="imagenet").eval()
    x = torch.rand(4, 3, 32, 32)
    want, keys = model(x), list(model.state_dict())
    place_model(model, torch.device("cpu"), "off", compile=True)
    assert torch.allclose(model(x), want, atol=1e-4) and list(model.state_dict()) == keys


@pytest.mark.parametrize(("width", "millions"), [(1, 21.3), (2, 85.1), (4, 340)])
def test_preact34_has_the_sizes_of_the_paper(width, millions):
    """Gowal et al.'s encoders with basic blocks: 21.3, 85.1 and 340 million weights, features of 512 * width."""
    with torch.device("meta"):
        trunk = build_trunk("preact34", width, "cifar")
    assert trunk.dim == 512 * width
    assert sum(p.numel() for p in trunk.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


def test_preact_block_by_hand():
    """x -> conv(relu(bn(x))) twice, plus the input, or plus a 1x1 convolution of the activated input where the shape changes."""
    for c_in, c, stride in ((8, 8, 1), (8, 16, 2), (8, 12, 1)):
        block = PreActBlock(c_in, c, stride).double().eval()
        for m in block.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(m.running_mean)
                torch.nn.init.uniform_(m.weight)
        x = torch.randn(2, c_in, 6, 6, dtype=torch.float64)
        a = F.relu(F.batch_norm(x, block.bn1.running_mean, block.bn1.running_var, block.bn1.weight, block.bn1.bias))
        out = F.conv2d(a, block.conv1.weight, stride=stride, padding=1)
        out = F.relu(F.batch_norm(out, block.bn2.running_mean, block.bn2.running_var, block.bn2.weight, block.bn2.bias))
        out = F.conv2d(out, block.conv2.weight, padding=1)
        out += x if (stride, c_in) == (1, c) else F.conv2d(a, block.shortcut[1].weight, stride=stride)
        assert torch.allclose(block(x), out)
    model = build_model("preact18", {"class": 10}, width=1 / 8)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert len([m for m in model.modules() if isinstance(m, PreActBlock)]) == 8


# ---- Vision Transformer ----


def test_vit_b16_has_the_size_of_the_paper():
    """Dosovitskiy et al., Table 1: 86 million weights; counted by hand without head and learned positions: 85,647,360."""
    with torch.device("meta"):
        trunk = build_trunk("vit_b16", 1.0, "cifar")
    assert sum(p.numel() for p in trunk.parameters()) == 768 * 16 * 16 * 3 + 768 + 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768 == 85_647_360


@pytest.mark.parametrize(("arch", "width", "patch", "rows", "cols", "heads"), [("vit_ti4", 2 / 3, 4, 2, 3, 2), ("vit_b16", 1.0, 16, 14, 14, 12)])
def test_vit_by_hand(arch, width, patch, rows, cols, heads):
    """Patch by patch, head by head, in float64, from the equations of Dosovitskiy et al."""
    torch.manual_seed(0)
    trunk = build_trunk(arch, width, "cifar").double()
    dim = 64 * heads
    assert trunk.dim == dim
    for p in trunk.parameters():
        torch.nn.init.normal_(p, std=0.02 if dim > 128 else 0.1)
    p = {k: v.detach().numpy() for k, v in trunk.state_dict().items()}
    x = torch.rand(1, 3, patch * rows, patch * cols, dtype=torch.float64)
    image = x[0].numpy()

    def norm(h, name):
        h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-6)
        return h * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(h, name):
        return h @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    tokens = [p["cls_token"][0, 0]]
    for row in range(rows):
        for col in range(cols):
            part = image[:, patch * row : patch * row + patch, patch * col : patch * col + patch].reshape(-1)
            where = []
            for position in (col, row):
                angle = [position / 10_000 ** (i / (dim / 4)) for i in range(dim // 4)]
                where += [math.sin(a) for a in angle] + [math.cos(a) for a in angle]
            tokens.append(p["patch_embed.weight"].reshape(dim, -1) @ part + p["patch_embed.bias"] + np.array(where))
    h = np.stack(tokens)
    for i in range(12):
        block = f"blocks.{i}"
        q, k, v = np.split(linear(norm(h, f"{block}.norm1"), f"{block}.attn.qkv"), 3, 1)
        out = []
        for j in range(heads):
            part = slice(64 * j, 64 * j + 64)
            score = np.exp(q[:, part] @ k[:, part].T / math.sqrt(64))
            out.append(score / score.sum(1, keepdims=True) @ v[:, part])
        h = h + linear(np.concatenate(out, 1), f"{block}.attn.proj")
        m = linear(norm(h, f"{block}.norm2"), f"{block}.mlp.fc1")
        m = m * 0.5 * (1 + torch.erf(torch.from_numpy(m) / math.sqrt(2)).numpy())
        h = h + linear(m, f"{block}.mlp.fc2")
    want = norm(h[1:].mean(0, keepdims=True), "fc_norm")
    assert np.allclose(trunk(x).detach().numpy(), want, atol=1e-6)  # the positions are float32


def test_vit_refuses_images_it_cannot_cut():
    with pytest.raises(ValueError, match="cannot be cut into patches of 4"):
        build_trunk("vit_ti4", 1 / 3, "cifar")(torch.rand(1, 3, 30, 32))
