"""Section 4 of common.py: PGD against closed forms, invariants of the four attacks, robust accuracy."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import (
    apgd, batchnorm_mode, build_model, ce_per_image, l2_norm, multi_targeted, pgd, robust_accuracy, square,
)  # fmt: skip

torch.manual_seed(0)
W = torch.randn(3, 8, 8, dtype=torch.float64)


def linear(x):  # (B, 3, 8, 8) -> (B,)
    return (x * W).sum((1, 2, 3))


def small_net():
    torch.manual_seed(1)
    return build_model("resnet18", {"class": 10}, width=1 / 16, stem="imagenet")


def run_attack(name, net, x, y, *, eps, norm, steps=6):
    """One of the four attacks with the same random numbers every time."""
    ball, generator = {"eps": eps, "norm": norm}, torch.Generator().manual_seed(0)
    if name == "pgd":
        torch.manual_seed(0)
        return pgd(lambda z: ce_per_image(net(z), y), x, steps=steps, **ball)
    if name == "apgd":
        return apgd(lambda z: ce_per_image(net(z), y), x, steps=steps, generator=generator, **ball)
    if name == "multi-targeted":
        return multi_targeted(net, x, y, steps=steps, generator=generator, **ball)
    return square(net, x, y, queries=10 * steps, generator=generator, **ball)


def size_of(delta, norm):
    return delta.flatten(1).norm(math.inf if norm == "linf" else 2, dim=1)


of_every_attack = pytest.mark.parametrize("name", ["pgd", "apgd", "multi-targeted", "square"])
in_both_norms = pytest.mark.parametrize("norm", ["linf", "l2"])


def test_the_optimum_of_a_linear_loss_in_ball_and_box_is_found():
    """linf reaches it; l2 comes near clip(x + t W) with t such that the length is eps, by bisection."""
    x = torch.rand(8, 3, 8, 8, dtype=torch.float64)
    x_adv = pgd(linear, x, eps=0.3, steps=10, step_size=0.1)
    assert torch.allclose(x_adv, (x + 0.3 * W.sign()).clamp(0, 1), atol=1e-12)
    x_adv = pgd(linear, x, eps=3.0, norm="l2", steps=200, step_size=0.1)
    for i in range(len(x)):
        low, high = 0.0, 1e3
        for _ in range(200):
            t = (low + high) / 2
            best = (x[i] + t * W).clamp(0, 1)
            low, high = (t, high) if (best - x[i]).norm() < 3.0 else (low, t)
        highest = linear(best[None] - x[i])
        assert 0.99 * highest < linear(x_adv[i : i + 1] - x[i]) <= highest + 1e-6


def test_random_starts_are_uniform_in_the_linf_ball_and_on_the_l2_sphere():
    x = torch.full((4000, 3, 4, 4), 0.5)
    linf = pgd(torch.sum, x, eps=0.1, steps=0) - x
    assert linf.abs().max() <= 0.1 + 1e-6 and abs(linf.mean()) < 1e-3
    assert linf.var().item() == pytest.approx(0.1**2 / 3, rel=0.02)
    l2 = l2_norm(pgd(torch.sum, x, eps=0.1, norm="l2", steps=0) - x)
    assert torch.allclose(l2, torch.full_like(l2, 0.1), atol=1e-5)


def test_the_default_step_is_the_papers():
    """linf 2/255, l2 2 eps / steps; in a ball that steps of 2/255 cannot cross, 2 eps / steps."""
    x, seen = torch.full((1, 3, 4, 4), 0.5), []
    for norm, eps, steps, want in ("linf", 4 / 255, 10, 2 / 255), ("linf", 0.1, 5, 0.04), ("l2", 1, 5, 0.4):
        pgd(lambda z: seen.append(z) or z.sum((1, 2, 3)), x, eps=eps, norm=norm, steps=steps, start=x)
        assert size_of(seen[1] - seen[0], norm).item() == pytest.approx(want, rel=1e-4)
        seen.clear()


@in_both_norms
def test_pgd_begins_at_the_projected_start_and_keeps_the_best_iterate(norm):
    """The best is that of a search through all iterates, image by image."""
    x, start, eps = torch.rand(6, 3, 4, 4), torch.rand(6, 3, 4, 4), {"linf": 0.1, "l2": 0.5}[norm]
    seen, w = [], 9 * torch.randn(3, 4, 4)

    def loss(z):
        seen.append(z.detach())
        return (w * z).sum((1, 2, 3)).sin()

    ball = {"eps": eps, "norm": norm, "steps": 8, "step_size": eps / 2}
    found = pgd(loss, x, start=start, keep_best=True, **ball)
    points, values = torch.stack(seen), torch.stack([(w * z).sum((1, 2, 3)).sin() for z in seen])
    assert (size_of(seen[0] - x, norm) <= eps + 1e-6).all() and ((seen[0] - x) * (start - x) >= 0).all()
    assert torch.equal(found, points[values.argmax(0), torch.arange(6)])
    assert len(seen) == 9 and values.argmax(0).unique().numel() > 1
    assert torch.equal(pgd(loss, x, start=start, **ball), points[-1])  # otherwise it is the last
    assert torch.allclose(pgd(lambda z: 0 * loss(z), x, start=x, **ball), x, atol=1e-7)  # zero gradients
    # The sign of NaN is 0: the images would stay where they were, and look robust.
    assert pgd(lambda z: math.nan * loss(z), x, start=x, **ball).isnan().all()


@in_both_norms
@of_every_attack
def test_attacks_stay_in_the_ball_and_the_box_and_leave_no_trace(name, norm):
    """Neither in the network (weights, BatchNorm, gradients, mode), nor suite attacks in torch's numbers."""
    net, x, y = small_net().eval(), torch.rand(5, 3, 32, 32), torch.arange(5)
    x[0], x[1] = 0.0, 1.0
    eps = {"linf": 0.05, "l2": 0.7}[norm]
    before, numbers = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    x_adv = run_attack(name, net, x, y, eps=eps, norm=norm)
    assert name == "pgd" or torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and not net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters()) and not x_adv.requires_grad
    moved = size_of(x_adv - x, norm)
    assert (0 < moved).all() and (moved <= eps * (1 + 1e-5)).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert torch.equal(x_adv, run_attack(name, net, x, y, eps=eps, norm=norm))


@in_both_norms
@of_every_attack
def test_an_image_is_attacked_the_same_in_any_batch(name, norm):
    net, x, y = small_net().double().eval(), torch.rand(7, 3, 32, 32).double(), torch.arange(7)
    whole, part = (run_attack(name, net, x[:n], y[:n], eps=0.1, norm=norm) for n in (7, 3))
    assert (whole[:3] - part).abs().max() < 1e-9


@of_every_attack
def test_images_norms_and_radii_that_cannot_be_are_refused(name):
    net, x, y = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), torch.rand(2, 3, 4, 4), torch.arange(2)
    balls = (x, 0.1, "l1"), (x, -0.1, "l2"), (x, math.nan, "l2"), (x, 8.0, "linf")
    for bad, eps, norm in (*balls, (2 * x - 1, 0.1, "linf"), (x * math.nan, 0.1, "linf")):
        with pytest.raises(ValueError):
            run_attack(name, net, bad, y, eps=eps, norm=norm)


def test_data_and_networks_that_would_give_a_wrong_accuracy_are_refused():
    """A used generator, labels of another shape, a single logit, NaN anywhere, images outside [0, 1]."""
    x, y = torch.rand(30, 3, 4, 4), torch.arange(30) % 10
    net, one_logit = (nn.Sequential(nn.Flatten(), nn.Linear(48, n)) for n in (10, 1))
    bad = [(net, iter([])), (one_logit, [(x, 0 * y)]), (net, [(2 * x, y)])]
    bad += [(net, [(x, labels)]) for labels in (y[:, None], y[:10], F.one_hot(y).float())]
    bad += [(lambda x: torch.where(torch.arange(len(x))[:, None] == 7, math.nan, net(x)), [(x, y)])]
    for model, data in bad:
        with pytest.raises((ValueError, FloatingPointError)):
            robust_accuracy(model, data)


def test_batchnorm_under_attack_and_every_modules_mode_afterwards():
    """'eval': running statistics. 'train': those of the batch. The running ones move in neither. Weights need
    no gradient, but again afterwards, if they did before."""
    net, x = small_net().train(), torch.rand(8, 3, 32, 32)
    net.trunk.conv1.requires_grad_(False)
    with batchnorm_mode(net):
        assert not any(p.requires_grad for p in net.parameters())
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["trunk.conv1.weight"]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with batchnorm_mode(net, "eval"):
        assert torch.allclose(net(x)[:1], net(x[:1]), atol=1e-5)
    with batchnorm_mode(net, "train"):
        inside = net(x)
        assert not torch.allclose(net(x[:4]), inside[:4], atol=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.allclose(net(x), inside, atol=1e-5)  # the statistics of ordinary training mode
    assert not torch.equal(net.trunk.bn1.running_mean, before["trunk.bn1.running_mean"])  # which move again
    net.trunk.layer1.eval()  # a frozen part
    modes, before = [m.training for m in net.modules()], net.trunk.bn1.running_mean.clone()
    robust_accuracy(net, [(x, torch.arange(8))], lambda x, y: x)
    assert modes == [m.training for m in net.modules()] and torch.equal(net.trunk.bn1.running_mean, before)
