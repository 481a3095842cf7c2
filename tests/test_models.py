"""Section 3 of common.py: published sizes, second implementations, mixed precision."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common import (
    BasicBlock, Bottleneck, PreActBlock, PreActBottleneck, build_model, full_precision, place_model,
)  # fmt: skip


@pytest.mark.parametrize(("arch", "width", "count"), [
    ("resnet18", 1, 11_173_962), ("resnet34", 1, 21_282_122), ("resnet50", 1, 23_520_842),  # MadryLab's
    ("preact34", 1, 21.3e6), ("preact34", 2, 85.1e6), ("preact34", 4, 340e6),  # Gowal et al.
    ("vit_b16", 1, 85_647_360 + 7690),  # Dosovitskiy et al., without learned positions, by hand
])  # fmt: skip
def test_parameter_counts_are_the_published_ones(arch, width, count):
    with torch.device("meta"):
        model = build_model(arch, {"class": 10}, width=width)
    found = sum(p.numel() for p in model.parameters())
    assert found == pytest.approx(count, rel=0.005 if arch == "preact34" else 0)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_with_the_imagenet_stem_it_is_torchvisions_network(arch):
    """Also with two heads, and with the normalisation inside."""
    mean, std, x = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), torch.rand(2, 3, 64, 64)
    theirs = getattr(torchvision.models, arch)(num_classes=7).eval()
    ours = build_model(arch, {"class": 7, "rotation": 4}, stem="imagenet", mean=mean, std=std).eval()
    renamed = {"trunk." + k.replace("downsample.1", "shortcut.2").replace("downsample.0", "shortcut.1"): v
               for k, v in theirs.state_dict().items() if not k.startswith("fc")}  # fmt: skip
    renamed |= {"heads.class.weight": theirs.fc.weight, "heads.class.bias": theirs.fc.bias}
    ours.load_state_dict(ours.state_dict() | renamed)
    want = theirs(torchvision.transforms.functional.normalize(x, mean, std))
    logits, ss_logits = ours(x, "class", "rotation")
    assert torch.allclose(ours(x), want, atol=1e-4) and torch.allclose(logits, want, atol=1e-4)
    assert torch.allclose(ss_logits, ours.heads["rotation"](ours.features(x)), atol=1e-5)


@pytest.mark.parametrize(("c_in", "c", "stride"), [(8, 8, 1), (8, 16, 2), (8, 12, 1)])
def test_preact_block_by_hand(c_in, c, stride):
    """conv(relu(bn(x))) twice, plus x, or for another shape a 1x1 convolution of the activated x."""
    block, x = PreActBlock(c_in, c, stride).eval(), torch.randn(2, c_in, 6, 6)
    nn.init.normal_(block.bn1.running_mean)
    nn.init.normal_(block.bn2.running_mean)
    a = F.relu(block.bn1(x))
    out = F.conv2d(a, block.conv1.weight, stride=stride, padding=1)
    out = F.conv2d(F.relu(block.bn2(out)), block.conv2.weight, padding=1)
    out += x if (stride, c_in) == (1, c) else F.conv2d(a, block.shortcut[1].weight, stride=stride)
    assert torch.allclose(block(x), out, atol=1e-5)


def test_vit_against_torchs_transformer():
    """Patches row by row, positions of column and row, blocks, the mean of all but the class token."""
    torch.manual_seed(0)
    trunk, dim, x = build_model("vit_ti4", {}, width=2 / 3).trunk, 128, torch.rand(1, 3, 8, 12)
    for p in trunk.parameters():
        nn.init.normal_(p, std=0.1)
    angles = np.arange(3)[:, None] / 10_000 ** (np.arange(dim // 4) / (dim // 4))
    line = np.concatenate([np.sin(angles), np.cos(angles)], 1)  # (position, dim / 2)
    tokens = [trunk.cls_token[0, 0]]
    for row in range(2):
        for col in range(3):
            patch = x[0, :, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4].flatten()
            where = torch.from_numpy(np.concatenate([line[col], line[row]])).float()
            tokens.append(trunk.patch_embed.weight.flatten(1) @ patch + trunk.patch_embed.bias + where)
    h = torch.stack(tokens)[None]
    for block in trunk.blocks:
        more = dict(activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True)
        layer = nn.TransformerEncoderLayer(dim, 2, 4 * dim, **more).eval()
        names = {"attn.qkv.": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj", "mlp.fc": "linear"}
        weights = block.state_dict()
        for ours, theirs in names.items():
            weights = {k.replace(ours, theirs): v for k, v in weights.items()}
        layer.load_state_dict(weights)
        h = layer(h)
    assert torch.allclose(trunk(x), trunk.fc_norm(h[:, 1:].mean(1)), atol=1e-4)


@pytest.mark.parametrize(("amp", "close"), [("bf16", 0.1), ("fp16", 0.05)])
def test_mixed_precision_gives_the_same_gradients_nearly(amp, close):
    """To the images and to the weights, also of losses so small that float16 alone would lose them."""
    torch.manual_seed(0)
    model = build_model("resnet18", {"class": 10}, width=0.25, stem="imagenet").eval()
    x, y = torch.rand(16, 3, 32, 32).requires_grad_(), torch.arange(16) % 10

    def gradients():
        out = model(x)
        loss = 1e-5 * F.cross_entropy(out, y, reduction="sum")
        images, *weights = torch.autograd.grad(loss, [x, *model.parameters()])
        return out.detach(), images, torch.cat([g.flatten() for g in weights])

    exact = gradients()
    place_model(model, torch.device("cpu"), amp)
    for got, want in zip(gradients(), exact, strict=True):
        assert got.dtype == torch.float32 and not torch.equal(got, want)  # it did compute in low precision
        assert (got - want).norm() < close * want.norm()
    with full_precision(model):
        assert torch.allclose(model(x), exact[0], atol=1e-4)
    assert model.amp is not None


def test_full_precision_is_without_tf32_and_comes_back(monkeypatch):
    """In convolutions and in matrix products, whatever the user has set."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with full_precision(build_model("resnet18", {"class": 10}, width=1 / 16)):
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck, PreActBlock, PreActBottleneck])
def test_gradients_on_a_map_of_one_pixel(block):
    """oneDNN leaves the weight gradient of a strided convolution in bfloat16 uninitialised there."""
    torch.manual_seed(0)
    layer = block(32, 64, 2).to(memory_format=torch.channels_last)
    x = torch.randn(64, 32, 1, 1).to(memory_format=torch.channels_last)
    gradients = []
    for amp in False, True:
        rubbish = [torch.full((2**20,), 1e30) for _ in range(8)]
        del rubbish  # what uninitialised memory then holds
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = layer(x).float().square().sum()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in layer.parameters()]))
    exact, mixed = gradients
    assert (mixed - exact).norm() < 0.1 * exact.norm()
