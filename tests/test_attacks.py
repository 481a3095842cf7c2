"""Section 4 of common.py: PGD against closed forms, its invariants, and robust accuracy."""
import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import (
    apgd, batchnorm_mode, build_model, check_attack, l2_norm, multi_targeted, pgd, project, robust_accuracy, square,
    suite_accuracy,
)  # fmt: skip

torch.manual_seed(0)
W = torch.randn(3, 8, 8, dtype=torch.float64)


def linear(x):  # (B, 3, 8, 8) -> (B,)
    return (x * W).sum((1, 2, 3))


def small_net(dtype=torch.float32):
    torch.manual_seed(1)
    return build_model("resnet18", {"class": 10}, width=1 / 16, stem="imagenet").to(dtype)


# ---- closed forms ----


def test_linf_reaches_the_optimum_of_a_linear_loss_with_the_box():
    x = torch.rand(16, 3, 8, 8, dtype=torch.float64)
    x_adv = pgd(linear, x, eps=0.3, steps=10, step_size=0.1)
    assert torch.allclose(x_adv, (x + 0.3 * W.sign()).clamp(0, 1), atol=1e-12)


def test_l2_reaches_the_optimum_of_a_linear_loss():
    x = torch.full((16, 3, 8, 8), 0.5, dtype=torch.float64)  # far from the box
    x_adv = pgd(linear, x, eps=0.4, norm="l2", steps=60, step_size=0.2)
    assert torch.allclose(x_adv, x + 0.4 * W / W.norm(), atol=1e-6)


def test_l2_comes_near_the_optimum_with_the_box():
    x = torch.rand(8, 3, 8, 8, dtype=torch.float64)
    eps = 3.0
    x_adv = pgd(linear, x, eps=eps, norm="l2", steps=200, step_size=0.1)
    for i in range(len(x)):  # the optimum is clip(t * W) with t such that the length is eps: found by bisection
        low, high = 0.0, 1e3
        for _ in range(200):
            t = (low + high) / 2
            best = (x[i] + t * W).clamp(0, 1)
            low, high = (t, high) if (best - x[i]).norm() < eps else (low, t)
        assert 0.99 * linear(best[None] - x[i]) < linear(x_adv[i : i + 1] - x[i]) <= linear(best[None] - x[i]) + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_optimum_inside_the_ball_is_found_there(norm):
    """Projection shortens what is too long and leaves the rest alone."""
    torch.manual_seed(3)
    x = 0.3 + 0.4 * torch.rand(5, 3, 4, 4, dtype=torch.float64)
    best = x + 0.05 * (2 * torch.rand_like(x) - 1)  # ||best - x||_2 is about 0.2
    eps, step_size = {"linf": (0.1, 0.002), "l2": (1.0, 0.01)}[norm]
    x_adv = pgd(lambda z: -((z - best) ** 2).sum((1, 2, 3)), x, eps=eps, norm=norm, steps=400, step_size=step_size)
    assert (x_adv - best).abs().max() <= {"linf": 0.004, "l2": 0.02}[norm]  # it goes to and fro by a step


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_robust_accuracy_of_a_linear_classifier_is_the_closed_form(norm, dual):
    """Right under every perturbation iff margin > eps * ||w_0 - w_1||_dual; points lie far from the box."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 3 * 8 * 8, dtype=torch.float64))

        def forward(self, x):
            return (x - 0.5).flatten(1) @ self.w.T

    torch.manual_seed(2)
    model, eps = Linear(), {"linf": 0.001, "l2": 0.01}[norm]
    x = 0.5 + 0.03 * torch.randn(400, 3, 8, 8, dtype=torch.float64)
    y = torch.randint(0, 2, (400,))
    logits = model(x).detach()
    margin = torch.where(y == 0, 1, -1) * (logits[:, 0] - logits[:, 1])
    expected = 100 * (margin > eps * (model.w[0] - model.w[1]).norm(p=dual)).double().mean().item()

    def attack(x, y):
        return pgd(lambda z: F.cross_entropy(model(z), y, reduction="none"), x, eps=eps, norm=norm, steps=100, step_size=eps / 5)

    assert robust_accuracy(model, [(x[:150], y[:150]), (x[150:], y[150:])], attack) == pytest.approx(expected, abs=1e-9)
    clean = 100 * (margin > 0).double().mean().item()
    assert 5 < expected < clean - 5  # the comparison means something
    assert robust_accuracy(model, [(x, y)]) == pytest.approx(clean, abs=1e-9)


# ---- invariants ----


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_the_result_is_in_the_ball_and_in_the_box(norm, eps, steps):
    model = small_net().eval()
    x, y = torch.rand(8, 3, 16, 16), torch.arange(8)
    for start, best in itertools.product((None, x, torch.rand(8, 3, 16, 16)), (True, False)):
        x_adv = pgd(
            lambda z: F.cross_entropy(model(z), y, reduction="none"), x, eps=eps, norm=norm, steps=steps,
            step_size=3 * eps, start=start, keep_best=best,
        )  # fmt: skip
        delta = x_adv - x
        size = delta.abs().amax() if norm == "linf" else l2_norm(delta).amax()
        assert size <= eps * (1 + 1e-5) + 1e-7
        assert 0 <= x_adv.min() and x_adv.max() <= 1 and not x_adv.requires_grad
        if eps == 0:
            assert torch.equal(x_adv, x)


def test_random_starts_are_those_of_the_fact_sheet():
    x = torch.full((4000, 3, 4, 4), 0.5)
    zero = lambda z: 0 * z.sum((1, 2, 3))  # noqa: E731
    linf = pgd(zero, x, eps=0.1, steps=0) - x
    assert linf.abs().max() <= 0.1 + 1e-6 and abs(linf.mean()) < 1e-3
    assert linf.var().item() == pytest.approx(0.1**2 / 3, rel=0.02)  # uniform in [-eps, eps]
    l2 = l2_norm(pgd(zero, x, eps=0.1, norm="l2", steps=0) - x)
    assert torch.allclose(l2, torch.full_like(l2, 0.1), atol=1e-5)  # exactly on the sphere
    assert torch.equal(pgd(zero, x, eps=0.1, steps=0, start=x), x)


def test_the_default_step_is_the_papers():
    """linf 2/255, l2 2 eps / steps; in a ball that steps of 2/255 cannot cross, 2 eps / steps."""
    x = torch.full((1, 3, 4, 4), 0.5)
    for norm, eps, steps, want in ("linf", 4 / 255, 10, 2 / 255), ("linf", 0.1, 5, 0.04), ("l2", 0.5, 10, 0.1):
        seen = []
        pgd(lambda z: seen.append(z.detach()) or z.sum((1, 2, 3)), x, eps=eps, norm=norm, steps=steps, start=x)
        moved = seen[1] - seen[0]
        length = moved.abs().max() if norm == "linf" else moved.norm()
        assert length.item() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_zero_gradients_do_no_harm(norm):
    x = torch.rand(4, 3, 8, 8)
    x_adv = pgd(lambda z: 0 * z.sum((1, 2, 3)), x, eps=0.1, norm=norm, start=x)
    assert torch.allclose(x_adv, x, atol=1e-7)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_image_is_attacked_the_same_in_any_batch(norm):
    model = small_net(torch.float64).eval()
    x, y = torch.rand(7, 3, 32, 32, dtype=torch.float64), torch.arange(7)

    def attack(rows):
        loss = lambda z: F.cross_entropy(model(z), y[rows], reduction="none")  # noqa: E731
        return pgd(loss, x[rows], eps=0.1, norm=norm, steps=5, start=x[rows])

    whole = attack(torch.arange(7))
    parts = torch.cat([attack(torch.tensor([i])) for i in range(7)])
    assert (whole - parts).abs().max() < 1e-9
    assert torch.allclose(attack(torch.arange(6, -1, -1)).flip(0), whole, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_attack_beats_noise_and_keep_best_is_no_worse(norm):
    model = small_net().eval()
    x, y = torch.rand(32, 3, 32, 32), torch.randint(0, 10, (32,))
    eps = {"linf": 0.05, "l2": 1.0}[norm]
    loss = lambda z: F.cross_entropy(model(z), y, reduction="none")  # noqa: E731

    def attack(steps, **more):
        torch.manual_seed(0)
        return pgd(loss, x, eps=eps, norm=norm, steps=steps, step_size=2 * eps / max(steps, 1), **more)

    noise, few, many, best = attack(0), attack(3), attack(20), attack(20, keep_best=True)
    assert loss(x).mean() < loss(few).mean() < loss(many).mean() and loss(noise).mean() < loss(few).mean()
    assert (loss(best) >= loss(many) - 1e-5).all()


def test_wrong_use_is_told():
    x = torch.rand(2, 3, 4, 4)
    loss = lambda z: z.sum((1, 2, 3))  # noqa: E731
    with pytest.raises(ValueError, match="norm"):
        pgd(loss, x, eps=0.1, norm="l1")
    for eps in -0.1, math.nan, 8:
        with pytest.raises(ValueError, match="0 <= eps"):
            pgd(loss, x, eps=eps)
    with pytest.raises(ValueError, match="one value per image"):
        pgd(lambda z: z.sum(), x, eps=0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        pgd(loss, 2 * x, eps=0.1)
    with pytest.raises(RuntimeError, match="does not require grad"):
        pgd(lambda z: loss(z.detach()), x, eps=0.1)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        pgd(loss, x, eps=0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        robust_accuracy(small_net(), [(2 * x.repeat(1, 1, 8, 8), torch.tensor([0, 1]))])


# ---- what robust_accuracy takes and refuses ----


def accuracy_of(data, model=None, attack=None):
    """By robust_accuracy, and by suite_accuracy with the same attack."""
    model = model or nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    attacks = [("attack", 1, lambda model, x, y, start: attack(x, y))] if attack else []
    both = robust_accuracy(model, data(), attack), list(suite_accuracy(model, data(), attacks).values())[-1]
    assert both[0] == pytest.approx(both[1])
    return both[0]


def test_wrong_data_and_networks_are_refused():
    x, y = torch.rand(30, 3, 4, 4), torch.arange(30) % 10
    used = iter([(x, y)])
    next(used)
    one_logit = nn.Sequential(nn.Flatten(), nn.Linear(48, 1))
    for accuracy in robust_accuracy, lambda model, data: suite_accuracy(model, data, []):
        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
        with pytest.raises(ValueError, match="no images: .* used before"):
            accuracy(net, used)
        for labels in y[:, None], y[:10], F.one_hot(y).float():
            with pytest.raises(ValueError, match="labels"):
                accuracy(net, [(x, labels)])
        with pytest.raises(ValueError, match="2 classes or more"):
            accuracy(one_logit, [(x, 0 * y)])


def test_labels_of_any_integer_type_and_functions_instead_of_modules():
    torch.manual_seed(0)
    w = torch.randn(48, 10)
    f = lambda x: (x - 0.5).flatten(1) @ w  # noqa: E731
    x = torch.rand(200, 3, 4, 4)
    y = f(x).argmax(1)
    y[:50] = (y[:50] + 1) % 10

    class Module(nn.Module):  # without parameters
        def forward(self, x):
            return f(x)

    for attack in None, lambda x, y: pgd(lambda z: F.cross_entropy(f(z), y, reduction="none"), x, eps=0.02, start=x):
        expected = accuracy_of(lambda: [(x[:80], y[:80]), (x[80:], y[80:])], f, attack)
        assert expected == 75 if attack is None else 5 < expected < 70
        for kind in torch.int32, torch.uint8:
            assert accuracy_of(lambda: [(x, y.to(kind))], Module(), attack) == expected  # noqa: B023


def test_a_gradient_has_the_layout_of_its_image():
    """Attack libraries call .view on it."""
    model = small_net().eval()
    x = torch.rand(2, 3, 32, 32)
    for layout in torch.contiguous_format, torch.channels_last:
        z = x.to(memory_format=layout, copy=True).requires_grad_()
        (grad,) = torch.autograd.grad(model(z).logsumexp(1).sum(), z)
        assert grad.is_contiguous(memory_format=layout) and grad.stride() == z.stride()
        with torch.no_grad():
            assert torch.allclose(model(z), model(x), atol=1e-5)


# ---- what is left behind ----


def test_robust_accuracy_leaves_no_trace():
    model = small_net()
    model.train()
    model.trunk.layer1.eval()  # a frozen part
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8)
    attack = lambda x, y: pgd(lambda z: F.cross_entropy(model(z), y, reduction="none"), x, eps=0.1)  # noqa: E731
    robust_accuracy(model, [(x, y)], attack)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_clean_errors_are_broken_and_not_attacked():
    model = small_net().eval()
    x = torch.rand(20, 3, 32, 32)
    y = model(x).argmax(1)
    y[::2] = (y[::2] + 1) % 10
    seen = []

    def attack(x, y):
        seen.append(len(x))
        return x

    assert robust_accuracy(model, [(x, y)], attack) == 50.0 and seen == [10]
    assert robust_accuracy(model, [(x, (model(x).argmax(1) + 1) % 10)], attack) == 0.0 and seen == [10]


def test_nan_logits_are_refused():
    model = small_net()
    nn.init.constant_(model.heads["class"].bias, math.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        robust_accuracy(model, [(torch.rand(2, 3, 16, 16), torch.tensor([0, 0]))])


def test_nan_logits_are_refused_even_where_only_wrong_images_have_them():
    """NaN in an image that is not attacked must not vanish behind the finite logits of those that are."""

    class HalfNaN(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            z = torch.stack([x.mean((1, 2, 3)), 0 * x.mean((1, 2, 3))], 1) + self.w
            z[len(x) // 2 + 1 :] = math.nan
            return z

    x, y = torch.rand(8, 3, 4, 4), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    with pytest.raises(FloatingPointError):
        robust_accuracy(HalfNaN(), [(x, y)], lambda x, y: x[:1].expand_as(x))


def test_pgd_works_when_copied_out():
    """As the docstring of common.py says: with its three helpers, torch and two imports."""
    source = "import math\nfrom collections.abc import Callable\nimport torch\nfrom torch import Tensor\n"
    source += "\n".join(inspect.getsource(f) for f in (l2_norm, project, check_attack, pgd))
    names = {}
    exec(source, names)
    model, x, y = small_net(), torch.rand(4, 3, 32, 32), torch.arange(4)
    loss = lambda z: F.cross_entropy(model(z), y, reduction="none")  # noqa: E731
    model.eval()
    for norm in ("linf", "l2"):
        found = []
        for f in names["pgd"], pgd:
            torch.manual_seed(0)
            found.append(f(loss, x, eps=0.1, norm=norm, keep_best=True))
        assert torch.equal(*found)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(3, 5, 9), (1, 1, 1), (2, 2, 7), (1, 16, 4)])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_every_attack_takes_images_of_any_shape(norm, shape, batch):
    torch.manual_seed(0)
    x, y = torch.rand(batch, *shape), torch.arange(batch)
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 5))
    loss = lambda z: F.cross_entropy(net(z), y, reduction="none")  # noqa: E731
    ball = {"eps": 0.1, "norm": norm}
    for x_adv in (
        pgd(loss, x, steps=3, **ball), apgd(loss, x, steps=5, **ball), multi_targeted(net, x, y, steps=3, **ball),
        square(net, x, y, queries=20, **ball),
    ):  # fmt: skip
        delta = x_adv - x
        size = delta.flatten(1).norm(math.inf if norm == "linf" else 2, dim=1)
        assert x_adv.shape == x.shape and (size <= 0.1 + 1e-6).all() and ((x_adv >= 0) & (x_adv <= 1)).all()


def test_batchnorm_under_attack():
    model = small_net().train()
    x = torch.rand(8, 3, 32, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with batchnorm_mode(model, "eval"):
        alone = model(x[:1])
        assert torch.allclose(model(x)[:1], alone, atol=1e-5)  # running statistics: independent of the batch
    with batchnorm_mode(model, "train"):
        inside = model(x)
        assert not torch.allclose(model(x[:4]), inside[:4], atol=1e-3)  # batch statistics
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.allclose(model(x), inside, atol=1e-5)  # the statistics of ordinary training mode
    assert not torch.equal(model.trunk.bn1.running_mean, before["trunk.bn1.running_mean"])  # which move again


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.5)])
def test_start_is_where_pgd_begins(norm, eps):
    x, start = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)
    seen = []
    pgd(lambda z: seen.append(z.detach()) or z.sum((1, 2, 3)), x, eps=eps, norm=norm, steps=1, start=start)
    size = (seen[0] - x).abs().amax((1, 2, 3)) if norm == "linf" else (seen[0] - x).flatten(1).norm(dim=1)
    assert (size <= eps + 1e-6).all() and ((seen[0] - x) * (start - x) >= 0).all()  # projected
    near = (x + 0.01 * (0.5 - x)).clone()
    pgd(lambda z: seen.append(z.detach()) or z.sum((1, 2, 3)), x, eps=eps, norm=norm, steps=1, start=near)
    assert torch.allclose(seen[1], near, atol=1e-6)
