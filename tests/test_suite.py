"""The stronger attacks of common.py: against closed forms, definitions, and the reference implementation's numbers."""
import math
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rotation_at
from common import (
    apgd, apgd_checkpoints, build_model, ce_per_image, dlr, doubts, l2_norm, margin, multi_targeted, nth_target, pgd,
    robust_accuracy, square, suite_accuracy, suite_attacks, targeted_dlr,
)  # fmt: skip

# ---- the reference: two small networks, 360 digits of 16 x 16, and how many the algorithms' authors' own code leaves standing
# (AutoPGD: Croce and Hein; Square: Andriushchenko et al.; seed 0). One image is 0.28 points.
REFERENCE = {
    ("linf", "apgd-ce"): 34.17, ("linf", "apgd-dlr"): 35.83, ("linf", "square"): 36.39,
    ("l2", "apgd-ce"): 71.39, ("l2", "apgd-dlr"): 73.06, ("l2", "square"): 84.17,
}  # fmt: skip
SQUARE_500 = {"linf": 46.39, "l2": 90.28}  # with 500 queries of the same schedule
EPS = {"linf": 0.2, "l2": 1.5}


def load_reference():
    """(networks by norm, x, y)"""
    with np.load(Path(__file__).with_name("reference_attacks.npz")) as z:
        arrays = {k: z[k] for k in z.files}
    x = torch.from_numpy(arrays["x"].astype(np.float32) / 256)[:, None].expand(-1, 3, -1, -1).contiguous()
    networks = {}
    for norm, prefix in (("linf", "Linf_"), ("l2", "L2_")):
        conv = [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, 2, 1)]
        net = nn.Sequential(*[m for c in conv for m in (c, nn.ReLU())], nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
        net.load_state_dict({k[len(prefix) :]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix) and "correct" not in k})
        networks[norm] = net.eval()
    return networks, x, torch.from_numpy(arrays["y"].astype(np.int64))


reference = pytest.fixture(scope="module")(load_reference)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "square"])
def test_as_strong_as_the_reference(reference, norm, name):
    """Each attack by itself, with the reference's budget (5 x 100; 500 queries), leaves at most one image more (0.28
    points). benchmarks/attacks.py compares Square with 5,000."""
    networks, x, y = reference
    kind = "suite-fast" if name == "square" else "suite"
    attack = [a for a in suite_attacks(kind, norm, EPS[norm]) if a[0] == name]
    left = suite_accuracy(networks[norm], [(x, y)], attack)
    assert left["none"] == pytest.approx({"linf": 92.5, "l2": 98.33}[norm], abs=0.01)
    assert left[name] <= (SQUARE_500[norm] if name == "square" else REFERENCE[norm, name]) + 0.3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_suite_is_never_weaker_than_pgd(reference, norm):
    networks, x, y = reference
    some = [(x[:60], y[:60])]
    left = suite_accuracy(networks[norm], some, suite_attacks("suite-fast", norm, EPS[norm]), batch_size=32)
    assert list(left) == ["none", "pgd-20", "apgd-ce", "apgd-dlr", "multi-targeted", "square"]
    values = list(left.values())
    assert values == sorted(values, reverse=True)
    torch.manual_seed(0)
    attack = partial(pgd, norm=norm, eps=EPS[norm], steps=20)
    alone = robust_accuracy(networks[norm], some, lambda x, y: attack(lambda z: ce_per_image(networks[norm](z), y), x))
    assert left["square"] <= alone


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_standard_suite_is_as_strong_as_each_of_the_references(reference, norm):
    """On a third of the images, and even without Square, which takes long."""
    networks, x, y = reference
    x, y = x[:120], y[:120]
    with np.load(Path(__file__).with_name("reference_attacks.npz")) as z:
        standing = [z[f"{norm.capitalize()}_{loss}_correct"][:120].mean() for loss in ("ce", "dlr")]
    attacks = suite_attacks("standard", norm, EPS[norm])
    assert [(name, starts) for name, starts, _ in attacks] == [("apgd-ce", 1), ("apgd-t", 9), ("square", 1)]
    left = suite_accuracy(networks[norm], [(x, y)], attacks[:2])
    assert left["apgd-t"] <= 100 * min(standing) + 0.01


def test_random_starts_follow_the_seed_and_leave_torchs_alone(reference):
    networks, x, y = reference
    state, found = torch.get_rng_state(), {}
    for kind in "suite-fast", "standard":
        for seed in 0, 0, 1:
            for name, _, attack in suite_attacks(kind, "linf", 0.2, seed)[:-1]:
                x_adv = attack(networks["linf"], x[:2], y[:2], 1)
                found.setdefault((kind, name), []).append(x_adv)
    assert torch.equal(torch.get_rng_state(), state)
    for first, again, other in found.values():
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_survivors_only_and_full_batches(reference):
    networks, x, y = reference
    seen = []

    def attack(model, x, y, start):
        seen.append((start, len(y)))
        return torch.where(torch.arange(len(y)).view(-1, 1, 1, 1) % 2 == 0, 1 - x, x)  # about half of them fall

    left = suite_accuracy(networks["linf"], [(x[i : i + 40], y[i : i + 40]) for i in range(0, 360, 40)], [("half", 3, attack)], batch_size=100)
    standing = [sum(n for s, n in seen if s == start) for start in range(3)]
    assert standing[0] == 333 and standing[0] > 1.5 * standing[1] and standing[1] > standing[2]
    for start in range(3):
        sizes = [n for s, n in seen if s == start]
        assert all(n == 100 for n in sizes[:-1])  # gathered anew
    assert 0 < left["half"] < left["none"] / 4


# ---- AutoPGD ----


@pytest.mark.parametrize(
    ("steps", "paper"),
    [
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),
        (60, [14, 25, 35, 42, 48, 53, 56, 60]),
        (40, [9, 17, 23, 28, 32, 35, 38, 40]),
        (10, [3, 5, 6, 7, 8, 9, 10]),
    ],
)
def test_checkpoints(steps, paper):
    assert apgd_checkpoints(steps) == paper


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_finds_the_optimum_of_a_linear_loss(norm):
    w = torch.randn(4, 3, 8, 8, generator=seeded(0))
    x = torch.full((4, 3, 8, 8), 0.5)
    got = apgd(lambda z: (w * z).sum((1, 2, 3)), x, eps=0.1, norm=norm, steps=30)
    want = x + 0.1 * (w.sign() if norm == "linf" else w / l2_norm(w))
    assert ((w * got).sum((1, 2, 3)) >= 0.9999 * (w * (want - x)).sum((1, 2, 3)) + (w * x).sum((1, 2, 3))).all()


def quadratic(curvature):
    """Concave, with its top within the ball at x = 0.55 and another curvature for each image."""
    return lambda z: -(curvature * (z - 0.55) ** 2).sum((1, 2, 3))


def test_apgd_more_steps_are_never_worse_and_images_do_not_matter_to_each_other():
    x = torch.full((3, 3, 6, 6), 0.5)
    curvature = torch.tensor([1.0, 30.0, 0.01]).view(3, 1, 1, 1)
    losses = []
    for k in 5, 10, 20, 40:
        losses.append(quadratic(curvature)(apgd(quadratic(curvature), x, eps=0.2, steps=k, generator=seeded(0))))
    # With few steps the checkpoints lie elsewhere, so only the trend is sure: more steps come closer to the top, 0.
    assert (losses[3] > losses[0]).all() and (losses[3] > -1e-2 * curvature.flatten()).all()
    alone = apgd(quadratic(curvature[:1]), x[:1], eps=0.2, steps=20, generator=seeded(0))
    together = apgd(quadratic(curvature), x, eps=0.2, steps=20, generator=seeded(0))
    assert torch.allclose(alone, together[:1], atol=1e-6)


def test_apgd_halves_where_the_paper_says():
    """On a loss whose values only fall, although its gradient is one everywhere: halved at each checkpoint, and back to the start."""
    points, x = [], torch.full((2, 3, 4, 4), 0.5, dtype=torch.float64)

    def loss(z):
        points.append(z.detach().clone())
        return 1.0 / len(points) + (z - z.detach()).flatten(1).sum(1)

    apgd(loss, x, eps=0.01, norm="l2", steps=40)
    assert len(points) == 41
    step = 2 * 0.01
    for w in [9, 17, 23, 28, 32, 35, 38]:
        step /= 2
        # From the best point, the first, by the halved step (projected) with weight 0.75, and 0.25 of the way from the point before.
        ahead = points[0] + step * torch.ones_like(x) / 48**0.5
        ahead = x + (ahead - x) * (0.01 / l2_norm(ahead - x)).clamp(max=1)
        want = points[0] + 0.75 * (ahead - points[0]) + 0.25 * (points[0] - points[w - 1])
        want = x + (want - x) * (0.01 / l2_norm(want - x)).clamp(max=1)
        assert torch.allclose(points[w + 1], want, atol=1e-12)


def reference_apgd(f, grad, x, eps, steps, start):
    """Algorithm 1 once more, for one image in l2, in plain Python with a history of all values (the paper's checkpoints)."""

    def project(z):
        d = z - x
        d = d * min(1.0, eps / max(float(np.linalg.norm(d)), 1e-12))
        return np.clip(x + d, 0, 1)

    w = [0, *apgd_checkpoints(steps)]
    eta, history = 2 * eps, [f(start)]
    x_max, f_max, g_max = start, history[0], grad(start)
    before, z, g = start, start, g_max
    etas, f_maxs, rises, current = {0: eta}, {0: f_max}, [], history[0]
    for k in range(1, steps + 1):
        a = 1.0 if k == 1 else 0.75
        ahead = project(z + eta * g / (np.linalg.norm(g) + 1e-12))
        z, before = project(z + a * (ahead - z) + (1 - a) * (z - before)), z
        value = f(z)
        rises.append(value > current)
        current, g = value, grad(z)
        if value > f_max:
            x_max, f_max, g_max = z, value, g
        if k in w:
            j = w.index(k)
            enough = sum(rises[w[j - 1] : w[j]]) >= 0.75 * (w[j] - w[j - 1])
            stuck = j > 1 and etas[w[j - 1]] == etas[w[j - 2]] and f_max == f_maxs[w[j - 1]]
            stuck = stuck or (j == 1 and f_max == f_maxs[0])
            etas[k] = eta
            f_maxs[k] = f_max
            if not enough or stuck:
                eta /= 2
                z, g, current = x_max, g_max, f_max
            etas[k] = eta
    return x_max


def test_apgd_against_a_second_implementation():
    """A rugged loss, so that steps are halved and runs go back to their best points, in float64."""
    rng = seeded(0)
    w = torch.randn(3, 3, 5, 5, generator=rng, dtype=torch.float64) * 6  # more than 20 steps would amplify rounding
    x = 0.2 + 0.6 * torch.rand(3, 3, 5, 5, generator=rng, dtype=torch.float64)

    def loss(z, w=w):
        return (w * z).sum((1, 2, 3)).sin() + 0.3 * (3 * w * z).sin().sum((1, 2, 3))

    got = apgd(loss, x, eps=0.5, norm="l2", steps=20, generator=seeded(7))
    u = torch.randn(x.shape, generator=seeded(7), dtype=torch.float64)
    start = (x + 0.5 * u / l2_norm(u)).clamp(0, 1)
    for i in range(3):
        f = lambda z: loss(torch.from_numpy(z)[None], w[i : i + 1]).item()  # noqa: B023, E731

        def grad(z):
            t = torch.from_numpy(z)[None].requires_grad_()
            return torch.autograd.grad(loss(t, w[i : i + 1]).sum(), t)[0][0].numpy()  # noqa: B023

        want = reference_apgd(f, grad, x[i].numpy(), 0.5, 20, start[i].numpy())
        assert np.allclose(got[i].numpy(), want, atol=1e-7)


def test_apgd_returns_the_last_point_that_fooled():
    """Even where another point has a higher loss."""
    x = torch.full((1, 3, 4, 4), 0.5)
    seen = []

    def loss(z):
        seen.append(z.detach().clone())
        return z.flatten(1).sum(1), torch.tensor([len(seen) == 4])

    assert torch.equal(apgd(loss, x, eps=0.1, steps=20), seen[3])


# ---- invariants of all ----


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["apgd", "multi-targeted", "square"])
def test_ball_box_and_no_side_effects(name, norm):
    torch.manual_seed(0)
    model = build_model("resnet18", {"class": 10}, width=1 / 16, stem="imagenet").train()
    x, y = torch.rand(5, 3, 32, 32), torch.arange(5)
    x[0], x[1] = 0.0, 1.0
    eps, new = {"linf": 0.05, "l2": 0.7}[norm], lambda: seeded(0)
    attacks = {
        "apgd": lambda: apgd(lambda z: ce_per_image(model(z), y), x, eps=eps, norm=norm, steps=6, generator=new()),
        "multi-targeted": lambda: multi_targeted(model, x, y, eps=eps, norm=norm, steps=6, generator=new()),
        "square": lambda: square(model, x, y, eps=eps, norm=norm, queries=40, generator=new()),
    }
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    x_adv = attacks[name]()
    assert torch.equal(torch.get_rng_state(), state)  # torch's own random numbers are not touched
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not model.training
    assert all(p.grad is None for p in model.parameters()) and not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    delta = x_adv - x
    assert (delta.abs().max() if norm == "linf" else l2_norm(delta).max()) <= eps * (1 + 1e-5)
    assert (delta.flatten(1).abs().amax(1) > 0).all()
    assert torch.equal(x_adv, attacks[name]())  # and the attacks' own are the same each time


def test_wrong_use_is_told(reference):
    networks, x, y = reference
    attacks = {
        "apgd": lambda x, **kw: apgd(lambda z: ce_per_image(networks["linf"](z), y[:4]), x, steps=2, **kw),
        "multi-targeted": lambda x, **kw: multi_targeted(networks["linf"], x, y[:4], steps=2, **kw),
        "square": lambda x, **kw: square(networks["linf"], x, y[:4], queries=2, **kw),
    }
    for attack in attacks.values():
        with pytest.raises(ValueError, match="norm must be"):
            attack(x[:4], eps=0.1, norm="Linf")
        for eps in -0.1, float("nan"):
            with pytest.raises(ValueError, match="0 <= eps"):
                attack(x[:4], eps=eps)
        with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
            attack(x[:4], eps=0.1)
        for bad in (2 * x[:4] - 1, x[:4] * float("nan")):
            with pytest.raises(ValueError, match=r"\[0, 1\]"):
                attack(bad, eps=0.1)
    with pytest.raises(ValueError, match="kind"):
        suite_attacks("fast", "linf", 0.1)


def test_empty_batches_and_attacks_that_do_not_enable_gradients(reference):
    networks, x, y = reference
    net, some = networks["linf"], [(x[:0], y[:0]), (x[:50], y[:50])]

    def fgsm(x, y):
        z = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net(z), y), z)
        return (x + 0.2 * grad.sign()).clamp(0, 1)

    clean, fooled = robust_accuracy(net, some), robust_accuracy(net, some, fgsm)
    assert fooled < clean - 20
    left = suite_accuracy(net, [some[0]] * 9 + some[1:], [("fgsm", 1, lambda model, x, y, start: fgsm(x, y))], batch_size=20)
    assert left == {"none": pytest.approx(clean), "fgsm": pytest.approx(fooled)}
    none_right = [(x[:30], (net(x[:30]).argmax(1) + 1) % 10)]
    assert set(suite_accuracy(net, none_right, suite_attacks("suite-fast", "linf", 0.1)).values()) == {0}


class Waits(TorchDispatchMode):
    """Counts the operations that would make the CPU wait for a GPU. (Integers are read from CPU generators.)"""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        reads = name == "_local_scalar_dense" and args[0].dtype != torch.int64
        self.count += reads or name in ("nonzero", "masked_select") or (name == "index" and args[1][0].dtype == torch.bool)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_waits_for_the_gpu_once(reference, norm):
    """To check the range of the images."""
    networks, x, y = reference
    loss = lambda z: (ce_per_image(networks[norm](z), y[:8]), networks[norm](z).argmax(1) != y[:8])  # noqa: E731
    ball = {"eps": EPS[norm], "norm": norm}
    for attack in (
        lambda: pgd(lambda z: loss(z)[0], x[:8], steps=9, keep_best=True, **ball), lambda: apgd(loss, x[:8], steps=30, **ball),
        lambda: multi_targeted(networks[norm], x[:8], y[:8], steps=9, **ball),
        lambda: square(networks[norm], x[:8], y[:8], queries=30, **ball),
    ):  # fmt: skip
        with Waits() as waits:
            attack()
        assert waits.count == 1


def test_nan_in_the_course_of_an_attack_is_not_overlooked(reference):
    """Also where the attack returns to an earlier point."""
    networks, x, y = reference
    calls = []

    def breaks(z):
        calls.append(1)
        return networks["linf"](z) * (math.nan if len(calls) == 12 else 1)

    for name in "apgd-ce", "multi-targeted":
        calls.clear()
        attacks = [attack for attack in suite_attacks("suite-fast", "linf", 0.05) if attack[0] == name]
        with pytest.raises(FloatingPointError, match="NaN"):
            suite_accuracy(breaks, [(x[:20], y[:20])], attacks)


def test_square_does_not_depend_on_the_batch(reference):
    networks, x, y = reference
    for norm in ("linf", "l2"):
        whole = square(networks[norm], x[:20], y[:20], eps=EPS[norm], norm=norm, queries=60, generator=seeded(0))
        part = square(networks[norm], x[7:12], y[7:12], eps=EPS[norm], norm=norm, queries=60, generator=seeded(0))
        assert torch.allclose(whole[7:12], part, atol=1e-6)


def test_more_queries_leave_a_smaller_margin(reference):
    networks, x, y = reference
    for norm in ("linf", "l2"):
        few, many = (
            margin(networks[norm](square(networks[norm], x[:40], y[:40], eps=EPS[norm], norm=norm, queries=q, generator=seeded(0))), y[:40])
            for q in (20, 300)
        )
        assert (many <= few).all() and many.mean() < few.mean() - 0.5


# ---- losses ----


def test_margin_and_dlr():
    logits = torch.randn(200, 7, generator=seeded(0))
    y = torch.arange(200) % 7
    for i in range(200):
        others = [v for j, v in enumerate(logits[i].tolist()) if j != y[i]]
        top = sorted(logits[i].tolist(), reverse=True)
        assert margin(logits, y)[i].item() == pytest.approx(logits[i, y[i]].item() - max(others), abs=1e-6)
        assert dlr(logits, y)[i].item() == pytest.approx(-(logits[i, y[i]].item() - max(others)) / (top[0] - top[2]), rel=1e-4)
    wrong = logits.argmax(1) != y
    assert torch.equal(margin(logits, y) < 0, wrong) and torch.equal(dlr(logits, y) > 0, wrong)
    assert torch.allclose(dlr(5 * logits + 3, y), dlr(logits, y), atol=1e-4)


def test_targeted_dlr():
    """Croce and Hein 2020, eq. 7, by hand."""
    logits = torch.randn(100, 7, generator=seeded(0))
    y, target = torch.arange(100) % 7, (torch.arange(100) + 3) % 7
    for i in range(100):
        z, top = logits[i].tolist(), sorted(logits[i].tolist(), reverse=True)
        want = -(z[y[i]] - z[target[i]]) / (top[0] - (top[2] + top[3]) / 2)
        assert targeted_dlr(logits, y, target)[i].item() == pytest.approx(want, rel=1e-4)
    assert torch.allclose(targeted_dlr(5 * logits + 3, y, target), targeted_dlr(logits, y, target), atol=1e-4)


def test_targets_in_turn():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [1.0, 4.0, 2.0, 3.0]])
    y = torch.tensor([0, 3], dtype=torch.int32)
    assert [nth_target(logits, y, n).tolist() for n in range(4)] == [[2, 1], [1, 2], [3, 0], [2, 1]]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", ["suite-fast", "standard"])
def test_few_classes(classes, kind):
    """DLR needs three, its targeted form four; the suites work with fewer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, classes))
    x = torch.rand(40, 3, 4, 4)
    y = net(x).argmax(1)
    left = suite_accuracy(net, [(x, y)], suite_attacks(kind, "linf", 0.05)[:-1])
    # Exact for a linear network: an image is robust if its margin to each class exceeds eps ||w_y - w_k||_1.
    gaps = net(x).gather(1, y[:, None]) - net(x)
    sizes = 0.05 * (net[1].weight[y][:, None] - net[1].weight).abs().sum(2)
    robust = 100 * (gaps >= sizes).all(1).float().mean().item()
    assert left["none"] == 100 and 5 < robust < 95 and list(left.values())[-1] == pytest.approx(robust, abs=2.6)


def test_multi_targeted_takes_the_targets_in_turn(reference):
    networks, x, y = reference
    net = networks["linf"]
    right = net(x).argmax(1) == y
    x, y = x[right][:8], y[right][:8]
    order = net(x).argsort(1, descending=True)  # the true class first: these images are classified correctly
    ends = [net(multi_targeted(net, x, y, eps=0.6, restart=r, steps=40)).argmax(1) for r in range(9)]
    hits = torch.stack([end == order[:, r + 1] for r, end in enumerate(ends)]).float()
    assert hits.mean() > 0.6  # the ball is large: most images reach their target class (chance: 10%)
    starts = [multi_targeted(net, x, y, eps=0.01, restart=r, steps=0, generator=seeded(0)) for r in (0, 9)]
    assert torch.equal(*starts)  # restart 9 has the target of restart 0


# ---- doubts ----


class Masked(nn.Module):
    def __init__(self, net, how):
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x):
        if self.how == "quantised":  # no gradient comes through
            return self.net((x * 8).round() / 8) + 0 * x.sum()
        logits = self.net(x)
        if self.how == "random":
            return logits + torch.randn_like(logits)
        if self.how == "one logit":
            return logits[:, :1]
        if self.how == "of the batch":
            return logits - logits.mean(0)
        return {"probabilities": lambda: logits.softmax(1), "confident": lambda: 1000 * logits, "honest": lambda: logits}[self.how]()


@pytest.mark.parametrize(
    ("how", "match"),
    [("quantised", "gradient for the image is zero"), ("quantised", "Square"), ("random", "outputs for one image differ"),
     ("one logit", "single logit"), ("of the batch", "depend on the rest of its batch"),
     ("probabilities", "probabilities"), ("confident", "gradient for the image is zero"), ("honest", None)],
)  # fmt: skip
def test_doubts_are_raised(reference, how, match):
    networks, x, y = reference
    torch.manual_seed(0)
    found = doubts(Masked(networks["linf"], how), x[:120], y[:120], eps=0.2)
    assert found == [] if match is None else any(match in line for line in found), found


class Shy(nn.Module):
    """Behaves at the image, and within a small distance of it leads every attack away: PGD that goes farther does worse."""

    def __init__(self, x, y, radius):
        super().__init__()
        self.register_buffer("x", x)
        self.y, self.radius = y, radius

    def forward(self, z):
        distance = (z[:, None] - self.x[None]).abs().flatten(2).amax(2)  # (B, N)
        near, which = distance.min(1)
        own = F.one_hot(self.y[which], 10).float()
        inside = ((near > 0.5 * self.radius) & (near < 1.5 * self.radius)).float()[:, None]  # wrong in this shell only
        return (own * (1 - 2 * inside)) * 5 + z.flatten(1).mean(1, keepdim=True) * (1 - own)


def test_doubts_about_larger_radii(reference):
    _, x, y = reference
    found = doubts(Shy(x[:40], y[:40], 0.02), x[:40], y[:40], eps=0.02)
    assert any("twice the radius leaves more accuracy" in line for line in found), found


class Impatient(nn.Module):
    """Its outputs are wrong for the images of the first 20 steps of an attack and right for those of a longer one: a caricature
    of an attack that oscillates."""

    def __init__(self, y):
        super().__init__()
        self.y, self.calls = y, 0

    def forward(self, z):
        self.calls += 1
        y = self.y[: len(z)]
        logits = F.one_hot(y, 10).float() + 0.1 * z.flatten(1).mean(1, keepdim=True) * F.one_hot((y + 1) % 10, 10)
        # doubts: 3 calls for determinism, 1 gradient, 20 steps and 1 look, then 60 steps and 1 look
        return logits.roll(1, 1) if self.calls == 25 else logits


def test_doubts_about_more_steps(reference):
    _, x, y = reference
    found = doubts(Impatient(y[:40]), x[:40], y[:40], eps=0.02)
    assert any("PGD with 60 steps leaves more accuracy (100%) than with 20 (0%)" in line for line in found), found


def test_the_suite_tells_of_signs_by_itself(reference):
    """Those that it sees: of the network's outputs and gradients, and that Square finds what gradients did not."""
    networks, x, y = reference
    net = networks["linf"]
    attacks = [attack for attack in suite_attacks("suite-fast", "linf", 0.2) if attack[0] in ("pgd-20", "square")]
    with pytest.warns(UserWarning) as told:
        left = suite_accuracy(Masked(net, "quantised"), [(x[:60], y[:60])], attacks)
    told = [str(w.message) for w in told]
    fooled = round(60 * (left["pgd-20"] - left["square"]) / 100)
    assert "the gradient for the image is zero for 100% of the images" in told[0] and f"fools {fooled} more images" in told[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        suite_accuracy(net, [(x[:60], y[:60])], attacks)


def test_the_flag_reaches_the_table(tmp_path, capsys):
    args = rotation_at.Args(**TINY | dict(variant="T0", epochs=1, eval_examples=30, eval_attack="suite-fast", out=str(tmp_path)))
    rows = rotation_at.main(args)["rows"]
    assert [r["attack"] for r in rows] == ["none", "suite-fast"]
    assert rows[1]["accuracy"] == round(rows[1]["after"]["square"], 2) <= rows[1]["after"]["pgd-20"]
    assert "under suite-fast, float32" in capsys.readouterr().out
