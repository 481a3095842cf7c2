"""The stronger attacks of common.py against definitions and the algorithms' authors' own code; the suite."""
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import common
import rotation_at
from common import (
    apgd, apgd_checkpoints, dlr, doubts, l2_norm, margin, multi_targeted, nth_target, robust_accuracy,
    suite_accuracy, suite_attacks, targeted_dlr,
)  # fmt: skip

EPS = {"linf": 0.2, "l2": 1.5}
SQUARE_500 = {"linf": 167, "l2": 325}  # images that withstand Square, see `reference`
in_both_norms = pytest.mark.parametrize("norm", ["linf", "l2"])


@pytest.fixture(scope="module")
def reference():
    """(networks by norm, x, y, {norm: {loss: (360,) bool}}): two small networks, 360 digits of 16 x 16, and
    which of them withstand the authors' own code (AutoPGD, 5 x 100 steps, Croce and Hein; for Square, 500
    queries, Andriushchenko et al., their number is SQUARE_500; seed 0)."""
    with np.load(Path(__file__).with_name("reference_attacks.npz")) as z:
        arrays = {k: torch.from_numpy(z[k].astype(np.float32)) for k in z.files}
    networks, withstands = {}, {}
    for norm, prefix in (("linf", "Linf_"), ("l2", "L2_")):
        conv = [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, 2, 1)]
        layers = [m for c in conv for m in (c, nn.ReLU())] + [nn.Flatten(), nn.Linear(512, 64), nn.ReLU()]
        networks[norm] = nn.Sequential(*layers, nn.Linear(64, 10)).eval()
        mine = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        withstands[norm] = {loss: mine.pop(f"{loss}_correct").bool() for loss in ("ce", "dlr")}
        networks[norm].load_state_dict(mine)
    x = (arrays["x"] / 256)[:, None].expand(-1, 3, -1, -1).contiguous()
    return networks, x, arrays["y"].long(), withstands


def chosen(kind, norm, *names):
    return [attack for attack in suite_attacks(kind, norm, EPS[norm]) if attack[0] in names]


@pytest.mark.parametrize(("norm", "kind", "names"), [
    ("linf", "suite", ["apgd-ce"]), ("linf", "standard", ["apgd-ce", "apgd-t"]),
    ("l2", "suite", ["apgd-dlr"]), ("l2", "standard", ["apgd-ce", "apgd-t"]),
])  # fmt: skip
def test_autopgd_fools_the_images_that_the_reference_fools(reference, norm, kind, names):
    """All but 2% of them; the standard suite those that the reference fools with either loss."""
    networks, x, y, withstands = reference
    ce, dlr = withstands[norm]["ce"], withstands[norm]["dlr"]
    some = ~{"apgd-ce": ce, "apgd-dlr": dlr, "apgd-t": ce & dlr}[names[-1]]
    some &= networks[norm](x).argmax(1) == y
    left = suite_accuracy(networks[norm], [(x[some], y[some])], chosen(kind, norm, *names))
    assert some.sum() > 90 and left["none"] == 100 and left[names[-1]] <= 2


@in_both_norms
def test_square_fools_as_many_as_the_reference(reference, norm):
    """An image that withstands AutoPGD is taken to withstand Square. One image more may be left."""
    networks, x, y, withstands = reference
    easy = ~(withstands[norm]["ce"] & withstands[norm]["dlr"])
    left = suite_accuracy(networks[norm], [(x[easy], y[easy])], chosen("suite-fast", norm, "square"))
    assert round(left["square"] * int(easy.sum()) / 100) + int((~easy).sum()) <= SQUARE_500[norm] + 1


def test_an_image_is_robust_only_if_no_restart_of_any_attack_fools_it():
    """Wrong images are not attacked; later attacks get the images that are left, in full batches."""
    x, y, seen = torch.arange(30).view(-1, 1, 1, 1) / 100, torch.zeros(30, dtype=torch.uint8), []
    y[:3] = 1  # wrong without attack: of class 0 are images below 0.5
    fools = {("a", 0): range(0, 30, 2), ("a", 1): range(0, 30, 3), ("b", 0): range(0, 30, 5)}

    def attack(name, model, x, y, restart):
        seen.append((name, restart, len(x)))
        hit = [round(100 * v.item()) in fools[name, restart] for v in x]
        return torch.where(torch.tensor(hit).view(-1, 1, 1, 1), 1 - x, x)

    def model(x):
        return torch.cat([0.5 - x, x - 0.5], 1).flatten(1)

    data = [(x[:9], y[:9]), (x[9:], y[9:])]
    assert robust_accuracy(model, data) == 90
    odd = robust_accuracy(model, data, lambda x, y: attack("a", model, x, y, 0))
    assert odd == pytest.approx(100 * 14 / 30) and seen == [("a", 0, 6), ("a", 0, 21)]
    seen.clear()
    attacks = [(name, n, lambda *a, name=name: attack(name, *a)) for name, n in (("a", 2), ("b", 1))]
    left = suite_accuracy(model, data, attacks, batch_size=8)
    robust = [i for i in range(3, 30) if i % 2 and i % 3]
    assert left["none"] == 90 and left["a"] == pytest.approx(100 * len(robust) / 30)
    assert left["b"] == pytest.approx(100 * sum(i % 5 > 0 for i in robust) / 30)
    assert seen == [*[("a", 0, 8)] * 3, ("a", 0, 3), ("a", 1, 8), ("a", 1, 6), ("b", 0, 8), ("b", 0, 1)]


def test_random_numbers_follow_seed_and_restart_and_leave_torchs_alone(reference):
    networks, x, y, _ = reference
    state, found = torch.get_rng_state(), {}
    numbers = (0, 1), (0, 1), (1, 1), (0, 0)
    for kind, (seed, restart) in itertools.product(("suite-fast", "standard"), numbers):
        for name, _, attack in suite_attacks(kind, "linf", 0.2, seed)[:-1]:
            found.setdefault((kind, name), []).append(attack(networks["linf"], x[:2], y[:2], restart))
    for first, *others in found.values():
        assert [torch.equal(first, other) for other in others] == [True, False, False]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_row_has_what_the_suite_leaves(tmp_path, monkeypatch):
    """Attacked with the flags' suite and seed at each radius."""
    asked, left = [], {"none": 75.0, "pgd-20": 61.0, "square": 50.004}
    monkeypatch.setattr(common, "suite_attacks", lambda *given: asked.append(given))
    monkeypatch.setattr(common, "suite_accuracy", lambda *given, **more: left)
    few = TINY | dict(epochs=1, val_fraction=0.96)
    args = rotation_at.Args(**few | dict(eval_attack="standard", seed=3, out=str(tmp_path)))
    _, attacked = rotation_at.main(args)["rows"]
    assert asked == [("standard", "linf", 0.1, 3)]
    assert (attacked["attack"], attacked["accuracy"]) == ("standard", 50.0) and attacked["after"] == left


def test_checkpoints_of_autopgd_are_the_papers():
    assert apgd_checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert apgd_checkpoints(40) == [9, 17, 23, 28, 32, 35, 38, 40]


def slow_apgd(f, grad, x, eps, norm, steps, start):
    """Croce and Hein's Algorithm 1 once more, for one image, in numpy, with a history of all values."""

    def project(z):
        d = z - x
        d = np.clip(d, -eps, eps) if norm == "linf" else d * min(1.0, eps / max(np.linalg.norm(d), 1e-12))
        return np.clip(x + d, 0, 1)

    w = [0, *apgd_checkpoints(steps)]
    eta, value, g = 2 * eps, f(start), grad(start)
    x_max, f_max, g_max, before, z = start, value, g, start, start
    etas, f_maxs, rises = {0: eta}, {0: f_max}, []
    for k in range(1, steps + 1):
        a = 1.0 if k == 1 else 0.75
        ahead = project(z + eta * (np.sign(g) if norm == "linf" else g / (np.linalg.norm(g) + 1e-12)))
        z, before, last = project(z + a * (ahead - z) + (1 - a) * (z - before)), z, value
        value, g = f(z), grad(z)
        rises.append(value > last)
        if value > f_max:
            x_max, f_max, g_max = z, value, g
        if k in w:
            j = w.index(k)
            enough = sum(rises[w[j - 1] : w[j]]) >= 0.75 * (w[j] - w[j - 1])
            same_step = j == 1 or etas[w[j - 1]] == etas[w[j - 2]]
            if not enough or (same_step and f_max == f_maxs[w[j - 1]]):
                eta /= 2
                z, g, value = x_max, g_max, f_max
            etas[k], f_maxs[k] = eta, f_max
    return x_max


@in_both_norms
def test_autopgd_against_a_second_implementation(norm):
    """A rugged loss, on which both conditions halve steps and runs go back to their best points."""
    seed, eps = {"linf": (1, 0.1), "l2": (2, 0.5)}[norm]
    torch.manual_seed(seed)
    w = 2 * torch.randn(8, 3, 5, 5, dtype=torch.float64)
    x = 0.2 + 0.6 * torch.rand(8, 3, 5, 5, dtype=torch.float64)

    def loss(z, w=w):
        return (w * z).sum((1, 2, 3)).sin() + 0.3 * (3 * w * z).sin().sum((1, 2, 3))

    generator = torch.Generator()
    start = apgd(loss, x, eps=eps, norm=norm, steps=0, generator=generator.manual_seed(7))
    got = apgd(loss, x, eps=eps, norm=norm, steps=40, generator=generator.manual_seed(7))
    size = (start - x).abs().amax((1, 2, 3)) if norm == "linf" else l2_norm(start - x)
    assert torch.allclose(size, torch.full_like(size, eps))  # the start is on the surface
    for i in range(8):

        def grad(z):
            t = torch.from_numpy(z)[None].requires_grad_()
            return torch.autograd.grad(loss(t, w[i : i + 1]).sum(), t)[0][0].numpy()

        f = lambda z: loss(torch.from_numpy(z)[None], w[i : i + 1]).item()  # noqa: E731
        want = slow_apgd(f, grad, x[i].numpy(), eps, norm, 40, start[i].numpy())
        assert np.allclose(got[i].numpy(), want, atol=1e-7)


def test_autopgd_returns_the_last_point_that_fooled():
    """Even where another point has a higher loss."""
    seen = []

    def loss(z):
        seen.append(z.detach().clone())
        return z.flatten(1).sum(1), torch.tensor([len(seen) == 4])

    assert torch.equal(apgd(loss, torch.full((1, 3, 4, 4), 0.5), eps=0.1, steps=20), seen[3])


def test_margin_dlr_and_targeted_dlr_by_hand():
    """Croce and Hein 2020, eq. 6 and 7."""
    logits, y = torch.randn(100, 7), torch.arange(100) % 7
    target = (y + 3) % 7
    for i, (z, a, t) in enumerate(zip(logits.tolist(), y.tolist(), target.tolist(), strict=True)):
        top, gap = sorted(z, reverse=True), z[a] - max(v for j, v in enumerate(z) if j != a)
        assert margin(logits, y)[i].item() == pytest.approx(gap, abs=1e-6)
        assert dlr(logits, y)[i].item() == pytest.approx(-gap / (top[0] - top[2]), rel=1e-3)
        want = -(z[a] - z[t]) / (top[0] - (top[2] + top[3]) / 2)
        assert targeted_dlr(logits, y, target)[i].item() == pytest.approx(want, rel=1e-3)


def test_multitargeted_reaches_the_wrong_classes_in_turn(reference):
    logits, y = torch.tensor([[3.0, 1.0, 2.0, 0.0], [1.0, 4.0, 2.0, 3.0]]), torch.tensor([0, 3])
    assert [nth_target(logits, y, n).tolist() for n in range(4)] == [[2, 1], [1, 2], [3, 0], [2, 1]]
    networks, x, y, _ = reference
    net, x, y = networks["linf"], x[:8], y[:8]
    end = net(multi_targeted(net, x, y, eps=0.6, restart=4, steps=40)).argmax(1)
    assert (end == nth_target(net(x), y, 4)).float().mean() > 0.6  # the ball is large; chance is 10%


def test_nan_in_the_course_of_an_attack_is_not_overlooked(reference):
    """Also where the attack returns to an earlier point."""
    networks, x, y, _ = reference
    for name in "apgd-ce", "multi-targeted", "square":
        calls = itertools.count(1)
        breaks = lambda z: networks["linf"](z) * (math.nan if next(calls) == 12 else 1)  # noqa: E731
        with pytest.raises(FloatingPointError, match="NaN"):
            suite_accuracy(breaks, [(x[:20], y[:20])], chosen("suite-fast", "linf", name))


@pytest.mark.parametrize(("spoil", "told"), [
    (lambda net, x: net((x * 8).round() / 8) + 0 * x.sum(), "image is zero .* Square leaves less"),
    (lambda net, x: net(x) + torch.randn(len(x), 10), "outputs for one image differ"),
    (lambda net, x: net(x)[:, :1], "single logit"),
    (lambda net, x: net(x) - net(x).mean(0), "depend on the rest of its batch"),
    (lambda net, x: net(x).softmax(1), "probabilities"), (lambda net, x: net(x), None),
])  # fmt: skip
def test_signs_that_attacks_fail_are_seen(reference, spoil, told):
    networks, x, y, _ = reference
    torch.manual_seed(0)
    found = " ".join(doubts(lambda x: spoil(networks["linf"], x), x[:40], y[:40], eps=0.2))
    assert found == "" if told is None else re.search(told, found)


class Reads(TorchDispatchMode):
    """Counts the operations after which a CPU waits for a GPU: those that read values. Square draws its
    positions, whole numbers, on the CPU."""

    times = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, bools = func.overloadpacket.__name__, torch.bool
        mask = name in ("index", "index_put_") and any(t is not None and t.dtype == bools for t in args[1])
        position = name == "_local_scalar_dense" and args[0].dtype == torch.int64
        self.times += mask or name in ("_local_scalar_dense", "nonzero", "equal") and not position
        return func(*args, **(kwargs or {}))


@in_both_norms
def test_the_loop_of_an_attack_reads_no_value(reference, norm):
    """On a GPU it would wait in each step. Before the loop, `check_attack` reads one."""
    networks, x, y, _ = reference
    x, y, model = x[:8], y[:8], networks[norm]

    def loss(z):
        return F.cross_entropy(model(z), y, reduction="none")

    ball = dict(eps=EPS[norm], norm=norm)
    attacks = {
        "pgd": lambda n: common.pgd(loss, x, steps=n, keep_best=True, **ball),
        "apgd": lambda n: apgd(loss, x, steps=n, **ball),
        "multi_targeted": lambda n: multi_targeted(model, x, y, steps=n, **ball),
        "square": lambda n: common.square(model, x, y, queries=n, **ball),
    }
    for name, attack in attacks.items():
        times = []
        for steps in (3, 30):
            with Reads() as reads:
                attack(steps)
            times.append(reads.times)
        assert times == [1, 1], name
