"""mtl_reverse.py: the tasks' losses, Algorithm 1, the authors' branch, attackers that know the defence, Carmon et al.'s file."""
import json
import math
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, flags, same_state
from torch import nn

import common
import mtl_reverse
from common import (
    build_model, ce_per_image, image_uniform, load_checkpoint, load_weights, pgd,
)  # fmt: skip
from mtl_reverse import (
    load_carmon,
    FOR_DEFENCE, TASKS, Args, Contrastive, Defence, NiN, Unrolled, attack, build_branches, columns, enlarge, gather, image_rand, jobs,
    logits_of, main, mix_seeds, paper_number, reverse, reverse_as_published, reverse_step, ssl_loss, start, whose_turn,
)  # fmt: skip

TINY = dict(
    dataset="digits", image_size=8, flip=False, arch="preact18", width=1 / 16, epochs=1, batch_size=240, lr=0.05, eps=0.1, attack_steps=2,
    branch_epochs=1, branch_batch_size=240, branch_lr=0.05, head_batch_size=240, head_lr=1e-2, branch_width=1 / 16, inpaint_size=32, crop=0.5,
    reverse_steps=2, reverse_step_size=0.04, reverse_eps=0.15, views=2, bank=20, lambdas="0,5", adaptive_steps=1, eval_examples=40,
    eval_batch_size=20, workers=0, amp="off", device="cpu",
)  # fmt: skip


def tiny(**changes) -> Args:
    return Args(**(TINY | changes))


@pytest.fixture
def parts():
    """(classifier, branches): small random networks in eval mode, with BatchNorm statistics of some images, frozen."""
    torch.manual_seed(0)
    victim = build_model("preact18", {"class": 10}, width=1 / 16)
    branches = build_branches(tiny(), victim)
    x = torch.rand(64, 3, 8, 8)
    for module in (victim, *branches.values()):
        module.train()
        for _ in range(20):
            module(x)
        module.eval().requires_grad_(False)
    return victim, branches


def defence_of(branches, name="mtl", tasks=TASKS, weights=(1.0, 1.0, 1.0), bank=True, sign=False, **changes) -> Defence:
    vectors = F.normalize(torch.randn(30, 16, generator=torch.Generator().manual_seed(1)), dim=1) if bank else None
    return Defence(name, {t: branches[t] for t in tasks}, dict(zip(TASKS, weights, strict=True)), tiny(**changes), vectors, sign)


def some_images(n=6, seed=0):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), mix_seeds(torch.arange(n), 0)


# ---- random numbers that belong to an image ----


def test_random_numbers_of_an_image_do_not_depend_on_its_batch():
    seeds = mix_seeds(torch.arange(50), 3)
    rand, alone = image_rand(seeds), image_rand(seeds[[7]])
    first, second = rand(50, 4, 1), rand(50, 300)
    assert torch.equal(first[7:8], alone(1, 4, 1)) and torch.equal(second[7:8], alone(1, 300))
    assert len(first.unique()) > 190 and not torch.equal(first[:, :, 0], second[:, :4])
    assert second.min() > 0 and second.max() < 1 and second.mean().item() == pytest.approx(0.5, abs=0.01)
    assert second.var().item() == pytest.approx(1 / 12, rel=0.02)
    correlation = torch.corrcoef(torch.stack([second.flatten(), rand(50, 300).flatten(), image_rand(mix_seeds(seeds, 1))(50, 300).flatten()]))
    assert (correlation - torch.eye(3)).abs().max() < 0.03
    uses = torch.stack([mix_seeds(mix_seeds(torch.arange(1000), a), b) for a in range(5) for b in range(10)])
    assert len(uses.unique()) == uses.numel()


# ---- the tasks ----


def test_contrastive_loss_against_loops(parts):
    _, branches = parts
    x, seeds = some_images()
    head, views, tau = branches["contrastive"], 3, 0.2

    def rand():
        return image_rand(torch.cat([mix_seeds(seeds, v) for v in range(views)]))

    z = head.embed(x, views, rand())
    assert z.shape == (6, 3, 16) and torch.allclose(z.norm(dim=2), torch.ones(6, 3))
    bank = F.normalize(torch.randn(5, 16), dim=1)
    for negatives in bank, None:
        got = head(x, views, rand(), negatives)
        matrix = head.losses(x, views, rand(), negatives)
        published = torch.cat([matrix[:, :1, 1], matrix[:, 1:, 0]], 1).mean(1)
        for i in range(6):
            others = negatives if negatives is not None else torch.cat([z[j] for j in range(6) if j != i])
            terms, firsts = [], []
            for a in range(views):
                for b in range(views):
                    if a != b:
                        rest = [z[i, c] for c in range(views) if c != a] + list(others)
                        term = -torch.log(torch.exp(z[i, a] @ z[i, b] / tau) / sum(torch.exp(z[i, a] @ v / tau) for v in rest))
                        terms.append(term)
                        if b == (1 if a == 0 else 0):  # the first of the others
                            firsts.append(term)
            assert got[i].item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)
            assert published[i].item() == pytest.approx(torch.stack(firsts).mean().item(), rel=1e-4)


def test_rotation_loss_turns_the_image_all_four_ways(parts):
    _, branches = parts
    x, _ = some_images()
    got = branches["rotation"](x)
    for i in range(6):
        turned = [x[i].clone() for _ in range(4)]
        for k in range(4):
            for _ in range(k):
                turned[k] = turned[k].transpose(1, 2).flip(1)  # a quarter turn: transpose, then flip the rows
        losses = [-branches["rotation"].net(t[None], "rotation").log_softmax(1)[0, k] for k, t in enumerate(turned)]
        assert got[i].item() == pytest.approx(sum(losses).item() / 4, rel=1e-4)


@pytest.mark.parametrize("size", [8, 32, 64])
def test_gradient_of_enlarging_is_its_adjoint(size):
    """<up(a), b> = <a, down(b)>: down sums over the copies of a pixel."""
    a, b = torch.randn(2, 3, 8, 8, dtype=torch.float64).requires_grad_(), torch.randn(2, 3, size, size, dtype=torch.float64)
    up, k = enlarge(a, size), size // 8
    assert torch.equal(up, F.interpolate(a, size=(size, size), mode="nearest"))
    down = F.avg_pool2d(b, k) * k * k
    assert (up * b).sum().item() == pytest.approx((a * down).sum().item(), rel=1e-12)
    (g,) = torch.autograd.grad((up * b).sum(), a)
    assert torch.allclose(g, down)


def test_the_inpainting_network_of_128_pixels():
    """The shapes of the fact sheet: 128 to 4000 x 1 x 1 to 64; and what the network sees does not depend on the hole."""
    args = Args()
    branch = build_branches(args, build_model("resnet18", {"class": 10}, width=1 / 16))["inpainting"].eval()
    convolutions = [tuple(m.weight.shape) for m in branch.net.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == [(64, 3, 4, 4), (64, 64, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (4000, 512, 4, 4)]
    transposed = [tuple(m.weight.shape) for m in branch.decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert transposed == [(4000, 512, 4, 4), (512, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), (64, 3, 4, 4)]
    x = torch.rand(1, 3, 32, 32)
    painted, truth, hole = branch.paint(x)
    assert painted.shape == truth.shape == (1, 3, 64, 64) and (hole.start, hole.stop) == (4, 60)
    assert torch.equal(truth, 2 * F.interpolate(x, scale_factor=4)[:, :, 32:96, 32:96] - 1)
    changed = x.clone()
    changed[:, :, 9:23, 9:23] = 0.5  # the hole: 36 to 92 of 128 pixels
    assert torch.equal(branch.paint(changed)[0], painted)
    changed[:, :, 8, 16] = 0.5
    assert not torch.equal(branch.paint(changed)[0], painted)
    error = (painted - truth)[:, :, 4:60, 4:60] ** 2
    assert branch(x).item() == pytest.approx(error.sum().item() / 9408, rel=1e-5)


def test_the_rotation_network_is_that_of_gidaris():
    weights = [tuple(m.weight.shape) for m in NiN(1.0).modules() if isinstance(m, nn.Conv2d)]
    assert weights == [(192, 3, 5, 5), (160, 192, 1, 1), (96, 160, 1, 1), (192, 96, 5, 5), (192, 192, 1, 1), (192, 192, 1, 1)] + 2 * [
        (192, 192, 3, 3), (192, 192, 1, 1), (192, 192, 1, 1)
    ]  # fmt: skip
    assert NiN(1.0).eval()(torch.rand(2, 3, 32, 32)).shape == (2, 192)


def test_shared_backbone_is_one_trunk(parts):
    victim, _ = parts
    branches = build_branches(tiny(backbone="shared"), victim)
    nets = {id(b.net) for b in branches.values()}
    assert len(nets) == 1
    net = branches["rotation"].net
    assert net is not victim and same_state(net.trunk.state_dict(), victim.trunk.state_dict()) and all(p.requires_grad for p in net.parameters())
    together = mtl_reverse.Shared(branches).eval()
    x, seeds = some_images()
    torch.manual_seed(0)
    total = together(x)
    torch.manual_seed(0)
    assert torch.allclose(total, branches["contrastive"](x) + branches["rotation"](x) + branches["inpainting"](x))


# ---- Algorithm 1 ----


class Linear(nn.Module):
    """A task with the loss c + <w, x> per image, whose gradient is w."""

    def __init__(self, c: float, w: torch.Tensor):
        super().__init__()
        self.c, self.w = c, w

    def forward(self, z, *_):
        return self.c + (z * self.w).sum((1, 2, 3))


def test_turns():
    assert [whose_turn(TASKS, k) for k in (1, 2, 3, 4)] == 2 * [["contrastive", "inpainting"], ["contrastive", "rotation"]]
    assert all(whose_turn(["contrastive"], k) == ["contrastive"] for k in (1, 2))
    assert all(whose_turn(["contrastive", "rotation"], k) == ["contrastive", "rotation"] for k in (1, 2))
    assert all(whose_turn(["inpainting"], k) == ["inpainting"] for k in (1, 2))
    assert [whose_turn(["rotation", "inpainting"], k) for k in (1, 2)] == [["inpainting"], ["rotation"]]


@pytest.mark.parametrize("k", [1, 2])
def test_a_step_against_the_algorithm_line_by_line(k):
    """Known gradients and losses: x' - eta (L_t / L) g_t / max |g_t|, per image, with weights; the shares of all tasks sum to one."""
    torch.manual_seed(0)
    x = 0.3 + 0.4 * torch.rand(4, 3, 8, 8)
    slopes = {t: 0.01 * torch.randn(3, 8, 8) for t in TASKS}
    constants, weights = dict(zip(TASKS, (3.0, 1.0, 2.0), strict=True)), dict(zip(TASKS, (1.0, 50.0, 10.0), strict=True))
    branches = {t: Linear(constants[t], slopes[t]) for t in TASKS}
    d = Defence("mtl", branches, weights, tiny(reverse_step_size=0.02, reverse_eps=0.5))
    got = reverse_step(x, x, k, d, torch.arange(4))
    for i in range(4):
        losses = {t: weights[t] * (constants[t] + (x[i] * slopes[t]).sum()) for t in TASKS}
        total = sum(losses.values())
        assert sum(v / total for v in losses.values()).item() == pytest.approx(1)
        want = x[i]
        for t in ("contrastive", "rotation" if k % 2 == 0 else "inpainting"):
            want = want - 0.02 * losses[t] / total * slopes[t] / slopes[t].abs().max()
        assert torch.allclose(got[i], want, atol=1e-6)


def test_single_task_with_signs_is_mao_et_al(parts):
    """delta uniform in the ball, then delta <- clip(delta - eta sign grad L_s), K times."""
    _, branches = parts
    x, seeds = some_images()
    d = defence_of(branches, "ssl", ("contrastive",), sign=True, reverse_steps=3)
    z = start(x, d, seeds)
    assert (z - x).abs().max() <= 0.15 + 1e-6 and (z - x).abs().max() > 0.14
    for k in (1, 2, 3):
        z.requires_grad_()
        (g,) = torch.autograd.grad(ssl_loss(d, "contrastive", z, mix_seeds(seeds, k)).sum(), z)
        z = (x + (z.detach() - 0.04 * g.sign() - x).clamp(-0.15, 0.15)).clamp(0, 1)
    assert torch.allclose(reverse(x, d, seeds), z, atol=1e-6)


def test_stays_in_the_ball_around_the_original_image(parts):
    """Long steps would leave it if its centre moved along."""
    _, branches = parts
    x, seeds = some_images()
    z = reverse(x, defence_of(branches, reverse_steps=10, reverse_step_size=0.2), seeds)
    assert (z - x).abs().max() <= 0.15 + 1e-6 and (z - x).abs().max() > 0.149
    assert z.min() >= 0 and z.max() <= 1


@pytest.mark.parametrize("tasks", [TASKS, ("contrastive",), ("rotation",), ("inpainting",)])
def test_losses_fall(parts, tasks):
    """The sum that is descended, measured with other views than those of the descent, from x and from x with noise."""
    _, branches = parts
    x, seeds = some_images(20)
    branches["contrastive"].crop = 0.9  # untrained features: of stronger augmentation a step would see little but noise
    d = defence_of(branches, tasks=tasks, reverse_steps=40, reverse_step_size=0.02, views=8)

    def total(z):
        return sum(ssl_loss(d, t, z, mix_seeds(seeds, n)) for t in tasks for n in range(70, 80)) / 10

    before, noisy, after = total(x), total(start(x, d, seeds)), total(reverse(x, d, seeds))
    assert after.mean() < before.mean() and after.mean() < noisy.mean() - 0.01
    assert (after < noisy).float().mean() > 0.8


def test_no_iterations_is_the_plain_classifier(parts):
    victim, branches = parts
    x, seeds = some_images()
    d = defence_of(branches, reverse_steps=0)
    assert reverse(x, d, seeds) is x
    assert torch.equal(logits_of(victim, reverse(x, d, seeds), d.args), victim(x))
    assert reverse(x, Defence("none", {}, {}, tiny()), seeds) is x


def test_an_image_does_not_depend_on_its_batch(parts):
    _, branches = parts
    x, seeds = some_images()
    d = defence_of(branches, reverse_steps=4)
    whole = reverse(x, d, seeds)
    order = torch.tensor([3, 0, 5])
    assert torch.allclose(reverse(x[order], d, seeds[order]), whole[order], atol=1e-5)
    assert torch.allclose(reverse(x[2:3], d, seeds[2:3]), whole[2:3], atol=1e-5)
    mates = replace(d, bank=None)  # with the paper's negatives it does
    assert not torch.allclose(reverse(x[order], mates, seeds[order]), reverse(x, mates, seeds)[order], atol=1e-3)


def test_networks_stay_as_they_are(parts):
    victim, branches = parts
    x, seeds = some_images()
    before = {t: {k: v.clone() for k, v in b.state_dict().items()} for t, b in branches.items()}
    modes = []
    hooks = [m.register_forward_hook(lambda m, *_: modes.append(m.training)) for b in branches.values() for m in b.modules()]
    reverse(x, defence_of(branches), seeds)
    [hook.remove() for hook in hooks]
    assert modes and not any(modes)  # in eval mode
    reverse_as_published(x, defence_of(branches, bank=False), seeds)
    for t, b in branches.items():
        assert same_state(b.state_dict(), before[t])
        assert not any(m.training for m in b.modules()) and all(p.grad is None for p in b.parameters())


def test_memory_does_not_grow_with_the_iterations(parts):
    """Bytes that autograd keeps at one time."""
    _, branches = parts
    x, seeds = some_images()
    peaks = []
    for steps in (2, 8):
        alive, peak = 0, 0

        class Saved:
            def __init__(self, t):
                nonlocal alive, peak
                self.t, self.bytes = t, t.nbytes
                alive += self.bytes
                peak = max(peak, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.bytes

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda s: s.t):
            reverse(x, defence_of(branches, reverse_steps=steps), seeds)
        peaks.append(peak)
    assert peaks[1] < 1.2 * peaks[0]


# ---- what the authors' branch computes ----


def test_as_published_raises_the_losses(parts):
    """Its last commit climbs the weighted sum that it computes, by rotation above all (50 of 61 parts); the one before descends."""
    _, branches = parts
    x, seeds = some_images(20)
    d = replace(defence_of(branches, bank=False, reverse_steps=20, reverse_step_size=0.02, views=4), published=True)

    def rotation(z):  # as it sees it
        net = branches["rotation"].net
        with common.batchnorm_mode(branches["rotation"], "train"):
            return branches["rotation"](z * net.std + net.mean).mean().item()

    climbed = reverse(x, d, seeds)
    descended = reverse(x, replace(d, args=replace(d.args, commit="855d32d")), seeds)
    assert rotation(climbed) > rotation(x) + 0.1 > rotation(descended) + 0.2
    assert (climbed - x).abs().max() <= 0.15 + 1e-6 and climbed.min() >= 0 and climbed.max() <= 1


class PublishedContrastive(nn.Module):
    """Losses of which only those of the first positive count: view 1 for view 0, view 0 for the others."""

    def __init__(self, w):
        super().__init__()
        self.w, self.seen, self.draws = w, [], []

    def losses(self, z, views, rand, bank=None):
        self.seen.append(z.detach())
        self.draws.append(rand(views * len(z), 5, device=z.device).unflatten(0, (views, len(z))))
        first = torch.zeros(views, views)
        first[0, 1] = first[1:, 0] = 1
        value = 3 + (z * self.w).sum((1, 2, 3))
        return torch.where(first > 0, value[:, None, None].expand(-1, views, views), 1000.0)


class PublishedOther(nn.Module):
    def __init__(self, w, size=0):
        super().__init__()
        self.w, self.size, self.seen = w, size, []
        self.net = nn.Module()
        self.net.mean, self.net.std = 0.25, 0.5

    def forward(self, z):
        self.seen.append((z.detach() - 0.25) / 0.5)  # what its network sees
        return 1 + (z * self.w).sum((1, 2, 3))

    def paint(self, z):
        self.seen.append((z.detach() - 0.25) / 0.5)
        return z * self.w, torch.zeros_like(z), slice(1, 3)


@pytest.mark.parametrize("commit", ["b8f5ea7", "855d32d"])
def test_as_published_line_by_line(commit, monkeypatch):
    """Three perturbations, of which two are copied on their own turn only; weights 1:50:10 of the batch; signs and scaling by commit."""
    g = torch.Generator().manual_seed(5)
    x = 0.3 + 0.4 * torch.rand(4, 3, 4, 4, generator=g)
    w = {t: 0.01 * torch.randn(3, 4, 4, generator=g) for t in ("contrastive", "rotation")} | {"inpainting": torch.rand(3, 16, 16, generator=g)}
    branches = {"contrastive": PublishedContrastive(w["contrastive"]), "rotation": PublishedOther(w["rotation"]), "inpainting": PublishedOther(w["inpainting"], 16)}
    convolutions, conv2d = [], F.conv2d
    monkeypatch.setattr(mtl_reverse.F, "conv2d", lambda g, weight, bias, stride: convolutions.append((weight, bias)) or conv2d(g, weight, bias, stride))
    eps, eta = 0.1, 0.05
    d = Defence("as published", branches, {}, tiny(reverse_steps=4, reverse_step_size=eta, reverse_eps=eps, views=3, commit=commit), published=True)
    result = reverse(x, d, mix_seeds(torch.arange(4), 0))
    seen = {t: branches[t].seen for t in TASKS}
    big = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
    delta = {t: seen[t][0] - (big if t == "inpainting" else x) for t in TASKS}  # the starts
    assert all(v.abs().max() <= eps + 1e-6 and v.abs().max() > 0.09 for v in delta.values())
    for i in range(4):
        z = {t: (big if t == "inpainting" else x) + delta[t] for t in TASKS}
        assert all(torch.allclose(seen[t][i], z[t], atol=1e-6) for t in TASKS), i
        losses = {
            "contrastive": (3 + (z["contrastive"] * w["contrastive"]).sum((1, 2, 3))).mean(),
            "rotation": 50 * (1 + ((0.5 * z["rotation"] + 0.25) * w["rotation"]).sum((1, 2, 3))).mean(),
            "inpainting": 10 * ((0.5 * z["inpainting"] + 0.25) * w["inpainting"]).square().mean(),
        }
        other = "inpainting" if i % 2 == 0 else "rotation"
        of_big = 10 * 2 * (0.5 * z["inpainting"] + 0.25) * w["inpainting"] ** 2 * 0.5 / z["inpainting"].numel()
        grads = {"contrastive": w["contrastive"].expand(4, -1, -1, -1), "rotation": w["rotation"].expand(4, -1, -1, -1)}
        grads["inpainting"] = conv2d(of_big, *convolutions[0], stride=4)
        for t in ("contrastive", other):
            g = grads[t]
            top = g.abs().amax((1, 2, 3), keepdim=True) if commit == "b8f5ea7" else g.abs().amax(1, keepdim=True)  # of an image, or of a pixel's colours
            step = eta * losses[t] / sum(losses.values()) * g / top
            delta["contrastive"] = (delta["contrastive"] + (step if commit == "b8f5ea7" else -step)).clamp(-eps, eps)
        delta["contrastive"] = (x + delta["contrastive"]).clamp(0, 1) - x
        copied = delta["contrastive"]
        delta[other] = copied.repeat_interleave(4, 2).repeat_interleave(4, 3) if other == "inpainting" else copied
    assert torch.allclose(result, x + delta["contrastive"], atol=1e-5)
    for draws in branches["contrastive"].draws:  # one for all images of a view, others for other views and iterations
        assert (draws == draws[:, :1]).all() and len(draws[:, 0].unique()) == 15
    assert len(torch.stack(branches["contrastive"].draws)[:, :, 0].unique()) == 60


def test_as_published_sees_raw_images_in_train_mode(parts):
    _, branches = parts
    x, seeds = some_images()
    seen, modes = {}, {}
    hooks = []
    for task in ("rotation", "inpainting"):
        def look(module, inputs, task=task):
            seen.setdefault(task, inputs[0])
            modes.setdefault(task, module.training)
        hooks.append(branches[task].net.trunk.register_forward_pre_hook(look))
    reverse_as_published(x, defence_of(branches, bank=False, reverse_steps=1, reverse_eps=0.0), seeds)
    [hook.remove() for hook in hooks]
    assert modes == {"rotation": True, "inpainting": True}
    assert torch.allclose(seen["rotation"][:6], x, atol=1e-6)
    big = enlarge(x, 32)
    assert torch.allclose(seen["inpainting"][:, :, :8], big[:, :, :8], atol=1e-6)
    fill = 2 * torch.tensor([117, 104, 123]) / 255 - 1
    assert torch.allclose(seen["inpainting"][:, :, 16, 16], fill.expand(6, 3), atol=1e-6)


# ---- attackers ----


@pytest.mark.parametrize("tasks, sign", [(TASKS, False), (("contrastive",), False), (("contrastive",), True)])
def test_unrolled_is_the_derivative_of_the_whole(parts, tasks, sign, monkeypatch):
    """One graph through all iterations, as autograd alone would make it; a sign's derivative is that of the normalised gradient."""
    _, branches = parts
    x, seeds = some_images(3)
    d = defence_of(branches, tasks=tasks, reverse_steps=3, sign=sign)
    direction = torch.randn(3, 3, 8, 8)
    monkeypatch.setattr(Unrolled, "PART", 2)  # images per graph
    z = x.clone().requires_grad_()
    out = Unrolled.apply(z, d, seeds)
    assert torch.allclose(out, reverse(x, d, seeds), atol=1e-6)
    (got,) = torch.autograd.grad((out * direction).sum(), z)
    z = x.clone().requires_grad_()
    whole = start(z, d, seeds)
    for k in (1, 2, 3):
        whole = reverse_step(whole, z, k, d, seeds, differentiable=True)
    (want,) = torch.autograd.grad((whole * direction).sum(), z)
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
    assert not torch.allclose(got, direction, atol=0.1)  # more than straight through


class Smooth(nn.Module):
    """A task with a smooth loss, for numerical derivatives."""

    def __init__(self, seed: int):
        super().__init__()
        self.w = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def forward(self, z, *_):
        return 1 + (z.flatten(1) @ self.w.T).tanh().square().sum(1)


def test_unrolled_against_finite_differences():
    branches = {t: Smooth(i) for i, t in enumerate(TASKS)}
    d = Defence("mtl", branches, dict.fromkeys(TASKS, 1.0), tiny(reverse_steps=4, reverse_step_size=0.02, reverse_eps=0.05))
    x = 0.3 + 0.4 * torch.rand(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda z: Unrolled.apply(z, d, torch.arange(2)), x.requires_grad_(), eps=1e-7, atol=1e-5)


def test_pgd_is_pgd_on_the_classifier(parts):
    victim, branches = parts
    x, seeds = some_images(12)
    y = victim(x).argmax(1)
    d = defence_of(branches, attack_steps=4)
    got = attack("pgd", x, y, seeds, victim, d)
    noise = 2 * image_uniform(mix_seeds(seeds, mtl_reverse.FOR_START), 192).view_as(x) - 1
    want = pgd(lambda z: ce_per_image(victim(z), y), x, eps=0.1, steps=4, step_size=0.05, start=x + 0.1 * noise)
    assert torch.equal(got, want)
    assert torch.equal(got[5:7], attack("pgd", x[5:7], y[5:7], seeds[5:7], victim, d))  # of an image alone, too
    assert torch.equal(attack("aware", x, y, seeds, victim, d, lam=0.0), got)
    assert torch.equal(attack("none", x, y, seeds, victim, d), x)


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 1.0)])
@pytest.mark.parametrize("kind", ["pgd", "aware", "bpda", "unrolled", "suite-fast", "standard"])
def test_attacks_stay_in_their_ball(parts, kind, norm, eps):
    victim, branches = parts
    x, seeds = some_images()
    d = defence_of(branches, norm=norm, eps=eps)
    x_adv = attack(kind, x, torch.zeros(6, dtype=torch.long), seeds, victim, d, 1.0)
    delta = x_adv - x
    size = delta.abs().amax((1, 2, 3)) if norm == "linf" else delta.flatten(1).norm(dim=1)
    assert size.max() <= eps + 1e-5 and size.min() > 0 and x_adv.min() >= 0 and x_adv.max() <= 1


@pytest.mark.parametrize("kind", ["none", "pgd", "aware", "bpda", "unrolled", "suite-fast"])
def test_a_rank_without_images_takes_part(parts, kind):
    victim, branches = parts
    x, seeds = some_images(0)
    d = defence_of(branches)
    x_adv = attack(kind, x, torch.zeros(0, dtype=torch.long), seeds, victim, d, 1.0)
    assert reverse(x_adv, d, seeds).shape == (0, 3, 8, 8)


def test_the_random_convolution_is_drawn_once_per_call(parts, monkeypatch):
    _, branches = parts
    x, seeds = some_images()
    seen, conv2d = [], F.conv2d

    def spy(g, w, b=None, *more, **named):
        if w.shape == (3, 3, 4, 4):
            seen.append((w, b))
        return conv2d(g, w, b, *more, **named)

    monkeypatch.setattr(mtl_reverse.F, "conv2d", spy)
    for _ in range(2):
        reverse_as_published(x, defence_of(branches, bank=False, reverse_steps=4), seeds)
    reverse_as_published(x, defence_of(branches, bank=False, reverse_steps=1), seeds + 1)
    assert len(seen) == 5 and seen[0][0].shape == (3, 3, 4, 4) and seen[0][0].abs().max() <= 1 / math.sqrt(48)
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[3][1]) and not torch.equal(seen[0][0], seen[4][0])


def test_the_aware_attack_spares_the_losses(parts):
    victim, branches = parts
    x, seeds = some_images(20)
    d = defence_of(branches, attack_steps=10)
    y = victim(x).argmax(1)

    def total(z):
        return sum(ssl_loss(d, t, z, mix_seeds(seeds, 5)).mean().item() for t in TASKS)

    assert total(attack("aware", x, y, seeds, victim, d, 100.0)) < total(attack("aware", x, y, seeds, victim, d, 0.0))


def test_straight_through_takes_the_gradient_behind_the_defence(parts, monkeypatch):
    """One step of BPDA: along the sign of the classifier's gradient at the reversed image."""
    victim, branches = parts
    x, seeds = some_images()
    x = 0.2 + 0.6 * x
    y = victim(x).argmax(1)
    d = defence_of(branches, adaptive_steps=1, eot=3, step_size=0.02)
    used = []
    monkeypatch.setattr(mtl_reverse, "reverse", lambda z, d, s: used.append((z, s)) or reverse(z, d, s))
    got = attack("bpda", x, y, seeds, victim, d)
    x_pgd = attack("pgd", x, y, seeds, victim, d)
    assert len(used) == 6  # three draws for the gradient, three to see how high the loss is then
    used = used[:3]
    assert len({tuple(s.tolist()) for _, s in used} | {tuple(mix_seeds(seeds, FOR_DEFENCE).tolist())}) == 4
    grad = 0
    for z, s in used:
        assert torch.allclose(z, x_pgd, atol=1e-6)
        z = reverse(z, d, s).requires_grad_()
        grad = grad + torch.autograd.grad(ce_per_image(victim(z), y).sum(), z)[0]
    want = torch.clamp(torch.clamp(x_pgd + 0.02 * grad.sign(), x - 0.1, x + 0.1), 0, 1)
    moved = (got - want).abs().amax((1, 2, 3)) < 1e-5  # of the two points, the one of higher loss counts
    assert ((got - x_pgd).abs().amax((1, 2, 3)) < 1e-5)[~moved].all() and moved.sum() >= 3


@pytest.mark.parametrize("kind", ["bpda", "unrolled"])
def test_adaptive_attacks_do_more_to_the_defence_than_pgd(parts, kind):
    victim, branches = parts
    x, seeds = some_images(30)
    d = defence_of(branches, reverse_steps=2, adaptive_steps=8, eot=2)
    y = victim(x).argmax(1)

    def loss(by):  # after the defence, over a few of its draws
        x_adv = attack(by, x, y, seeds, victim, d)
        return sum(ce_per_image(victim(reverse(x_adv, d, mix_seeds(seeds, n))), y).mean().item() for n in range(50, 55)) / 5

    assert loss(kind) > loss("pgd") + 0.01 > loss("none") + 0.01


def test_columns_and_their_errors():
    g = torch.Generator().manual_seed(0)
    bits = {(name, kind, lam): (torch.rand(50, generator=g) < 0.6).float()
            for name in ("none", "ssl", "mtl") for kind, lam in (("none", 0), ("pgd", 0), ("aware", 1.0), ("aware", 5.0), ("bpda", 0), ("unrolled", 0))}  # fmt: skip
    rows = columns(bits)
    worst = {}
    for name in ("none", "ssl", "mtl"):
        for column, kinds in ("defence-aware", ("pgd", "aware")), ("adaptive", ("pgd", "aware", "bpda", "unrolled")), ("clean", ("none",)):
            key = min((k for k in bits if k[0] == name and k[1] in kinds), key=lambda k: bits[k].mean())
            (row,) = [r for r in rows if r["kind"] == "column" and r["name"] == name and r["column"] == column]
            p = bits[key].mean().item()
            assert row["accuracy"] == pytest.approx(100 * p, abs=0.01) and (row["strongest"], row["lambda"]) == key[1:]
            assert row["se"] == pytest.approx(100 * math.sqrt(p * (1 - p) / 50), abs=0.01)
            worst[name, column] = bits[key]
    d = (worst["mtl", "adaptive"] - worst["ssl", "adaptive"]).numpy()
    (row,) = [r for r in rows if r["kind"] == "difference" and r["name"] == "mtl - ssl" and r["column"] == "adaptive"]
    assert row["difference"] == pytest.approx(100 * d.mean(), abs=0.01) and row["se"] == pytest.approx(100 * d.std() / math.sqrt(50), abs=0.01)


def test_which_attacks():
    """Those on the classifier alone are made once for all defences."""
    args = tiny(attacks="pgd,aware,bpda,unrolled,suite")
    defences = [Defence(name, {} if name == "none" else {"rotation": None}, {}, args) for name in ("none", "ssl", "as published")]
    defences[2].published = True
    assert [(kind, lam, [d.name for d in on]) for kind, lam, on in jobs(defences)] == [
        ("none", 0, ["none", "ssl", "as published"]), ("pgd", 0, ["none", "ssl", "as published"]), ("suite", 0, ["none", "ssl"]),
        ("bpda", 0, ["none"]), ("aware", 0, ["ssl"]), ("aware", 5, ["ssl"]), ("bpda", 0, ["ssl"]), ("unrolled", 0, ["ssl"]),
    ]  # fmt: skip
    pgd_only = [replace(d, args=tiny(attacks="pgd")) for d in defences]
    assert [kind for kind, _, _ in jobs(pgd_only)] == ["none", "pgd"]
    unrolled = [replace(d, args=tiny(attacks="unrolled")) for d in defences]  # PGD goes on against the classifier alone as long
    assert [(kind, [d.name for d in on]) for kind, _, on in jobs(unrolled)][2:] == [("bpda", ["none"]), ("unrolled", ["ssl"])]


def test_paper_numbers():
    assert [paper_number(name, kind, Args(), True) for name in ("none", "ssl", "mtl") for kind in ("none", "pgd")] == [89.7, 63.9, 86.6, 65.3, 87.7, 65.6]
    assert paper_number("mtl", "bpda", Args(), True) is None and paper_number("mtl", "pgd", Args(), False) is None
    for changes in (dict(reverse_steps=0), dict(weights="1,50,10"), dict(reverse_eps=1 / 255), dict(views=2), dict(eval_examples=100)):
        assert paper_number("mtl", "pgd", Args(**changes), True) is None
    assert paper_number("ssl", "pgd", Args(weights="1,50,10", tasks="rotation"), True) == 65.3 and paper_number("mtl", "none", Args(weights=" 1, 1,1"), True) == 87.7
    assert paper_number("none", "pgd", Args(reverse_steps=0), True) == 63.9 and paper_number("mtl", "pgd", Args(reverse_eps=8 / 255), True) == 65.6
    assert paper_number("mtl", "pgd", Args(eps=4 / 255), True) is None and paper_number("as published", "pgd", Args(), True) is None


# ---- Carmon et al.'s file ----


class TheirBlock(nn.Module):
    def __init__(self, c_in, c, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(c), nn.Conv2d(c, c, 3, 1, 1, bias=False)
        if c_in != c:
            self.convShortcut = nn.Conv2d(c_in, c, 1, stride, bias=False)

    def forward(self, x):
        h = self.bn1(x).relu()
        out = self.conv2(self.bn2(self.conv1(h)).relu())
        return out + (self.convShortcut(h) if hasattr(self, "convShortcut") else x)


class TheirLayer(nn.Module):
    def __init__(self, c_in, c, stride):
        super().__init__()
        self.layer = nn.Sequential(TheirBlock(c_in, c, stride), *(TheirBlock(c, c, 1) for _ in range(3)))

    def forward(self, x):
        return self.layer(x)


class TheirNetwork(nn.Module):
    """WideResNet-28 with the names of Carmon et al.'s file, written down anew; 16, c, 2 c and 4 c channels."""

    def __init__(self, c):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1, self.sub_block1 = TheirLayer(16, c, 1), TheirLayer(16, c, 1)
        self.block2, self.block3 = TheirLayer(c, 2 * c, 2), TheirLayer(2 * c, 4 * c, 2)
        self.bn1, self.fc = nn.BatchNorm2d(4 * c), nn.Linear(4 * c, 10)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.avg_pool2d(self.bn1(x).relu(), 8).flatten(1))


@pytest.fixture
def carmon(tmp_path):
    """(their network, a writer of checkpoints in its format)"""
    torch.manual_seed(0)
    theirs = TheirNetwork(8)
    theirs.train()
    for _ in range(10):
        theirs(torch.rand(16, 3, 32, 32))

    def write(change=lambda state: None, prefix="module.", **more):
        state = {prefix + k: v.clone() for k, v in theirs.state_dict().items()}
        change(state)
        torch.save({"num_classes": 10, "state_dict": state, "normalize_input": False} | more, tmp_path / "carmon.pt")
        return tmp_path / "carmon.pt"

    return theirs.eval(), write


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_carmons_checkpoint_predicts_the_same(carmon, prefix):
    theirs, write = carmon
    state = load_carmon(write(prefix=prefix))
    ours = build_model(**state["network"])
    load_weights(ours, state["model"], "")
    x = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(x), theirs(x), atol=1e-5)
    assert state["network"]["width"] == 0.05


def test_old_files_without_batch_counts_load(carmon):
    state = load_carmon(carmon[1](lambda s: [s.pop(k) for k in list(s) if k.endswith("num_batches_tracked")]))
    assert state["model"]["trunk.bn.num_batches_tracked"] == 0


@pytest.mark.parametrize("change, told", [
    (lambda s: s.pop("module.block2.layer.1.bn2.weight"), "block2.layer.1.bn2.weight is missing"),
    (lambda s: s.pop("module.fc.weight"), "no fc.weight"),
    (lambda s: s.update({"module.block4.layer.0.bn1.weight": torch.ones(3)}), "it holds block4.layer.0.bn1.weight"),
    (lambda s: s.update({"module.bn1.weight": torch.ones(3)}), r"bn1.weight has shape \(3,\), not \(32,\)"),
    (lambda s: s.clear(), "no block1.layer.0.conv1.weight"),
])  # fmt: skip
def test_other_files_are_refused_by_name(carmon, change, told):
    with pytest.raises(common.UserError, match=told):
        load_carmon(carmon[1](change))


def test_normalised_and_foreign_files_are_refused(carmon, tmp_path):
    with pytest.raises(common.UserError, match="normalize_input"):
        load_carmon(carmon[1](normalize_input=True))
    for content in ([1, 2], {"a": 3}, {"state_dict": [1]}, {0: torch.ones(3)}):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(common.UserError, match="neither a checkpoint of ours nor"):
            load_carmon(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_text("nothing")
    with pytest.raises(common.UserError, match="is damaged, or not"):
        load_carmon(tmp_path / "x.pt")


def test_the_published_size():
    model = build_model("wrn28_10", {"class": 10})
    assert sum(p.numel() for p in model.parameters()) == 36_479_194 and model.trunk.dim == 640


# ---- runs ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, results) of a run with all attackers."""
    out = tmp_path_factory.mktemp("mtl") / "run"
    return out, main(tiny(attacks="pgd,aware,bpda,unrolled,suite-fast", sweep=True, as_published=True, out=str(out)))


def test_results(trained):
    folder, results = trained
    rows = results["rows"]
    cells = {(r["name"], r["attack"], r["lambda"]): r for r in rows if "kind" not in r}
    for name in ("ssl", "mtl"):
        for attack_name, lam in (("none", 0), ("pgd-2", 0), ("aware-2", 0), ("aware-2", 5), ("bpda-1", 0), ("unrolled-1", 0), ("suite-fast", 0)):
            row = cells[name, attack_name, lam]
            p = row["accuracy"] / 100
            assert row["examples"] == 40 and row["se"] == pytest.approx(100 * math.sqrt(p * (1 - p) / 40), abs=0.01) and row["paper"] is None
    assert cells["mtl", "aware-2", 0]["accuracy"] == cells["mtl", "pgd-2", 0]["accuracy"]
    assert ("none", "unrolled-1", 0) not in cells and ("as published", "pgd-2", 0) in cells
    assert {r["column"] for r in rows if r.get("kind") == "column" and r["name"] == "mtl"} == {"clean", "pgd", "defence-aware", "adaptive", "suite"}
    losses = [r for r in rows if r.get("kind") == "losses"]
    assert {(r["task"], r["images"]) for r in losses if r["name"] == "mtl"} == {(t, i) for t in TASKS for i in ("clean", "attacked", "reversed")}
    for r in losses:
        assert len(r["values"]) == 40 and r["mean"] == pytest.approx(sum(r["values"]) / 40, rel=1e-2)
    swept = {(r["name"], r["attack"], round(r["reverse_eps"], 4), r["reverse_steps"]): r["accuracy"] for r in rows if r.get("kind") == "sweep"}
    assert swept["mtl", "none", 0.15, 2] == cells["mtl", "none", 0]["accuracy"]  # the table's setting is among them
    assert swept["ssl", "pgd", 0.15, 2] == cells["ssl", "pgd-2", 0]["accuracy"]
    assert len(swept) == 2 * 2 * 4 * 3
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    for name in ("classifier.pt", "contrastive.pt", "rotation.pt", "inpainting.pt", "reversed.png"):
        assert (folder / name).exists()
    assert not any(k.startswith("net.") for k in load_checkpoint(folder / "contrastive.pt")["model"])  # the head only


def test_evaluated_alone_with_given_branches(trained, tmp_path):
    """The classifier and branches of another run give that run's numbers."""
    folder, results = trained
    again = main(tiny(victim=str(folder / "classifier.pt"), branches=str(folder), attacks="pgd", out=str(tmp_path / "again")))
    accuracy = {(r["name"], r["attack"]): r["accuracy"] for r in results["rows"] if "kind" not in r and r["lambda"] == 0}
    for row in again["rows"]:
        if "kind" not in row:
            assert row["accuracy"] == accuracy[row["name"], row["attack"]]


@pytest.mark.parametrize("backbone", ["separate", "shared"])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, monkeypatch, backbone):
    changes = dict(backbone=backbone, attacks="pgd", branch_epochs=2, epochs=2)
    whole = main(tiny(**changes, out=str(tmp_path / "whole")))
    update, count = common.Epoch.update, [0]
    for stop in (3, 20, 34):

        def interrupt(self, *a, stop=stop, **k):
            update(self, *a, **k)
            count[0] += 1
            common._Signals.received = 15 if count[0] == stop else 0

        monkeypatch.setattr(common.Epoch, "update", interrupt)
        if stop < {"separate": 50, "shared": 30}[backbone]:
            with pytest.raises(KeyboardInterrupt):
                main(tiny(**changes, out=str(tmp_path / "parts"), resume=True))
        common._Signals.received = 0
    monkeypatch.setattr(common.Epoch, "update", update)
    parts = main(tiny(**changes, out=str(tmp_path / "parts"), resume=True))
    assert parts["rows"] == whole["rows"]
    for file in (tmp_path / "whole").glob("*.pt"):
        if file.name != "last.pt":
            assert same_state(load_checkpoint(file)["model"], load_checkpoint(tmp_path / "parts" / file.name)["model"]), file.name


def test_a_resumed_evaluation_judges_nothing_twice(trained, tmp_path, monkeypatch):
    folder, _ = trained
    args = tiny(victim=str(folder / "classifier.pt"), branches=str(folder), attacks="pgd,bpda", out=str(tmp_path / "run"))
    seen = []

    def stop(kind, *a, **k):
        seen.append(kind)
        if kind == "bpda":
            raise KeyboardInterrupt
        return attack(kind, *a, **k)

    monkeypatch.setattr(mtl_reverse, "attack", stop)
    with pytest.raises(KeyboardInterrupt):
        main(args)
    assert seen == ["none", "none", "pgd", "pgd", "bpda"]  # two batches each
    monkeypatch.setattr(mtl_reverse, "attack", lambda kind, *a, **k: seen.append(kind) or attack(kind, *a, **k))
    resumed = main(replace(args, resume=True))
    assert seen[5:11] == 6 * ["bpda"]  # of three defences
    monkeypatch.setattr(mtl_reverse, "attack", attack)
    assert resumed["rows"] == main(replace(args, out=str(tmp_path / "undisturbed")))["rows"]


def test_stages_at_the_command_line(command, tmp_path):
    """The command that --stage train-branches prints is one that works."""
    more = TINY | dict(attacks="pgd, bpda", tasks="rotation, inpainting", backbone="shared")
    code, out, err = command(mtl_reverse, *flags(more), "--stage", "train-branches", "--out", tmp_path / "a")
    assert code == 0, err
    line = out.split("go on with: python mtl_reverse.py ")[1].strip()
    assert f"--victim {tmp_path}/a/classifier.pt --branches {tmp_path}/a" in line and "--stage" not in line
    code, out, err = command(mtl_reverse, *shlex.split(line), "--out", tmp_path / "b")
    assert code == 0, err
    for text in ("rotation+inpainting - ssl", "pgd-2", "adaptive, the strongest attack on each: none", "of 40 test images", "on 40 test images"):
        assert text in out


def test_only_what_table_1_shows(trained, command, tmp_path):
    folder, _ = trained
    code, out, err = command(
        mtl_reverse, *flags(TINY | {"attacks": "pgd", "val_fraction": 0.0}), "--victim", folder / "classifier.pt", "--branches", folder, "--out", tmp_path / "a"
    )
    assert code == 0 and "adaptive" not in out and "defence-aware" not in out and "pgd-2" in out, err


def test_a_victim_of_carmons_format_at_the_command_line(command, carmon, tmp_path):
    path = carmon[1]()
    more = dict(image_size=16, attacks="pgd", eval_examples=20)
    code, out, err = command(mtl_reverse, *flags(TINY | more), "--victim", path, "--out", tmp_path / "run")
    assert code == 0 and "mtl - ssl" in out and "the paper" not in out, err


@pytest.mark.parametrize("argv, told", [
    (["--tasks", "jigsaw"], "contrastive,rotation,inpainting"),
    (["--tasks", "rotation,rotation"], "contrastive,rotation,inpainting"),
    (["--attacks", "fgsm"], "pgd,aware,bpda,unrolled"),
    (["--weights", "1,2"], "three numbers"),
    (["--weights", "1,0,1"], "three numbers"),
    (["--lambdas", ""], "--lambdas"),
    (["--image-size", "24"], "power of 2"),
    (["--inpaint-size", "16"], "power of 2"),
    (["--image-size", "64"], "--inpaint-size"),
    (["--commit", "855d32d"], "--as-published"),
    (["--branches", "x"], "--victim"),
    (["--branches", "x", "--victim", "y.pt"], "no folder"),
    (["--branches", ".", "--victim", "y.pt", "--stage", "train-branches"], "leave out --branches"),
    (["--attacks", "bpda", "--lambdas", "abc"], "abc"),
    (["--compile"], "second derivatives"),
    (["--victim", "nothing.pt"], "nothing.pt"),
    (["--as-published", "--backbone", "shared"], "separate"),
    (["--val-fraction", "0"], "--val-fraction"),
    (["--views", "1"], "--views"),
])  # fmt: skip
def test_wrong_flags_are_one_sentence(one_sentence, tmp_path, monkeypatch, argv, told):
    monkeypatch.chdir(tmp_path)
    assert told in one_sentence(mtl_reverse, *flags(TINY), *argv)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_branches_of_another_classifier_are_refused(one_sentence, trained, tmp_path):
    folder, _ = trained
    torch.manual_seed(1)
    other = build_model("preact18", {"class": 10}, width=1 / 16)
    common.save_checkpoint(tmp_path / "other.pt", {"network": other.spec, "model": other.state_dict(), "epoch": 1, "args": {}})
    given = ["--branches", folder]
    assert "another classifier" in one_sentence(mtl_reverse, *flags(TINY), *given, "--victim", tmp_path / "other.pt", "--out", tmp_path / "o")
    same = [*given, "--victim", folder / "classifier.pt", "--out", tmp_path / "p"]
    assert "branch_width" in one_sentence(mtl_reverse, *flags(TINY | {"branch_width": 0.125}), *same)
    assert "temperature" in one_sentence(mtl_reverse, *flags(TINY | {"temperature": 0.5}), *same)
    same[-1] = tmp_path / "r"
    assert "holds no shared.pt" in one_sentence(mtl_reverse, *flags(TINY | {"backbone": "shared"}), *same)
    no_classes = build_model("preact18", {"rotation": 4}, width=1 / 16)
    common.save_checkpoint(tmp_path / "none.pt", {"network": no_classes.spec, "model": no_classes.state_dict(), "epoch": 1, "args": {}})
    for file in (tmp_path / "none.pt", folder / "rotation.pt", folder / "last.pt"):
        assert "is no finished classifier" in one_sentence(mtl_reverse, *flags(TINY), "--victim", file, "--out", tmp_path / "q")
    state = load_checkpoint(folder / "classifier.pt")
    for i, network in enumerate((state["network"] | {"arch": "nothing"}, state["network"] | {"depth": 3}, state["network"] | {"width": 0.125})):
        common.save_checkpoint(tmp_path / f"{i}.pt", state | {"network": network})
        told = ("unknown architecture", "unexpected keyword", "size mismatch")[i]
        assert told in one_sentence(mtl_reverse, *flags(TINY), "--victim", tmp_path / f"{i}.pt", "--out", tmp_path / "q")
    assert not any((tmp_path / k).exists() for k in "opqr")  # no folder is left behind


def test_a_vision_transformer_as_victim(tmp_path):
    """Attention has second derivatives, too; a checkpoint with nothing but a network and its weights will do."""
    torch.manual_seed(0)
    vit = build_model("vit_mini4", {"class": 10}, width=0.5)
    common.save_checkpoint(tmp_path / "vit.pt", {"network": vit.spec, "model": vit.state_dict()})
    args = dict(victim=str(tmp_path / "vit.pt"), attacks="unrolled", eval_examples=10, out=str(tmp_path / "run"))
    rows = main(tiny(**args))["rows"]
    assert {r["name"] for r in rows if r.get("attack") == "unrolled-1"} == {"ssl", "mtl"}


GATHERED = """
import sys; sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
from common import build_model, distribute
import mtl_reverse
torch.manual_seed(0)
victim = build_model("preact18", {{"class": 10}}, width=1 / 16).requires_grad_(False)
branch = mtl_reverse.Contrastive(victim, mtl_reverse.Args(flip=False)).eval()
branch.augment = lambda x, rand: x + 0.1 * torch.arange(len(x)).view(-1, 1, 1, 1).div(len(x) // 2, rounding_mode="floor")  # the same views on any rank
x = torch.rand(7, 3, 8, 8)
share = x.tensor_split(2)[rank]
z, first = mtl_reverse.gather(branch.embed(share, 2))
ddp = distribute(branch, sync_bn=False)  # by a name, or its hooks are gone before the backward pass
losses = ddp(share)
(losses.sum() * 2 / 7).backward()  # DDP divides by the number of ranks
torch.save({{"z": z.detach(), "first": first, "losses": losses.detach(), "grads": [p.grad for p in branch.head.parameters()]}}, f"{out}/{{rank}}.pt")
dist.barrier()
del ddp
dist.destroy_process_group()
"""


def test_two_ranks_contrast_with_all_images(tmp_path):
    """Losses and gradients of an unequally shared batch are those of one process."""
    (tmp_path / "g.py").write_text(GATHERED.format(root=str(ROOT), out=tmp_path))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "g.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    torch.manual_seed(0)
    victim = build_model("preact18", {"class": 10}, width=1 / 16).requires_grad_(False)
    branch = Contrastive(victim, Args(flip=False)).eval()
    branch.augment = lambda x, rand: x + 0.1 * torch.arange(len(x)).view(-1, 1, 1, 1).div(len(x) // 2, rounding_mode="floor")
    x = torch.rand(7, 3, 8, 8)
    losses = branch(x)
    losses.mean().backward()
    assert [r["first"] for r in ranks] == [0, 4] and gather(branch.embed(x, 2))[1] == 0
    assert all(torch.allclose(r["z"], branch.embed(x, 2), atol=1e-5) for r in ranks)
    assert torch.allclose(torch.cat([r["losses"] for r in ranks]), losses, atol=1e-5)
    for r in ranks:
        for a, b in zip(r["grads"], branch.head.parameters(), strict=True):
            assert torch.allclose(a, b.grad, atol=1e-5)


def test_two_ranks_evaluate_like_one_and_train(trained, tmp_path):
    """torchrun: every image is judged once, by the same draws as in one process (an image may tip over by rounding)."""
    folder, results = trained
    args = TINY | dict(victim=str(folder / "classifier.pt"), attacks="pgd,bpda", out=str(tmp_path / "two"))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "mtl_reverse.py")]
    done = subprocess.run([*run, *flags(args), "--branches", str(folder)], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = ({(r["name"], r["attack"]): r["accuracy"] for r in rows if "kind" not in r and r["lambda"] == 0}
                for rows in (results["rows"], json.loads((tmp_path / "two" / "results.json").read_text())["rows"]))  # fmt: skip
    assert len(two) == 9
    assert all(abs(one[key] - accuracy) <= 2.5 for key, accuracy in two.items())
    trained_by_two = subprocess.run(
        [*run, *flags(args | {"out": str(tmp_path / "branches")}), "--stage", "train-branches"], capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert trained_by_two.returncode == 0, trained_by_two.stderr
    assert all((tmp_path / "branches" / f"{t}.pt").exists() for t in TASKS)
