"""mtl_reverse.py: the tasks' losses, Algorithm 1, attackers, Carmon et al.'s file, runs."""
import json
import math
import shutil
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
    Run, UserError, build_model, ce_per_image, image_uniform, load_checkpoint, load_weights, pgd,
)  # fmt: skip
from mtl_reverse import (
    FOR_DEFENCE, TASKS, Args, Contrastive, Defence, Step, attack, build_branches, columns, enlarge,
    gather, image_rand, jobs, load_victim, main, mix_seeds, network_in_network, reverse,
    reverse_step, start, tasks_in_turn,
)  # fmt: skip

TINY = dict(
    dataset="digits", image_size=8, flip=False, arch="preact18", width=1 / 16, epochs=1, batch_size=240,
    lr=0.05, eps=0.1, attack_steps=2, eval_steps=2, branch_epochs=1, branch_batch_size=240, branch_lr=0.05,
    head_batch_size=240, head_lr=1e-2, branch_width=1 / 16, crop=0.5, reverse_steps=2, reverse_step_size=0.04,
    reverse_eps=0.15, weights=(1.0, 1.0, 1.0), views=2, bank=20, eval_attack="suite-fast", lambdas=(0.0, 5.0),
    adaptive_steps=1, eval_examples=40, eval_batch_size=20, workers=0, amp="off", device="cpu",
)  # fmt: skip


def tiny(**changes) -> Args:
    return Args(**(TINY | changes))


@pytest.fixture
def parts():
    """(classifier, branches): small random networks in eval mode, BatchNorm with statistics of images."""
    torch.manual_seed(0)
    classifier = build_model("preact18", {"class": 10}, width=1 / 16)
    branches = build_branches(tiny(), classifier)
    x = torch.rand(64, 3, 8, 8)
    for module in (classifier, *branches.values()):
        module.train()
        for _ in range(20):
            module(x)
        module.eval().requires_grad_(False)
    return classifier, branches


def defence_of(parts, name="mtl", tasks=TASKS, sign=False, **changes) -> Defence:
    classifier, branches = parts
    bank = F.normalize(torch.randn(30, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    return Defence(name, classifier, {t: branches[t] for t in tasks}, tiny(**changes), bank, sign)


def some_images(n=6, seed=0):
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x, mix_seeds(torch.arange(n), 0)


# ---- random numbers that belong to an image ----


def test_random_numbers_of_an_image_do_not_depend_on_its_batch():
    seeds = mix_seeds(torch.arange(50), 3)
    rand, alone = image_rand(seeds, 1), image_rand(seeds[[7]], 1)
    first, second = rand(50, 4, 1), rand(50, 300)
    assert torch.equal(first[7:8], alone(1, 4, 1)) and torch.equal(second[7:8], alone(1, 300))
    assert len(first.unique()) > 190 and not torch.equal(first[:, :, 0], second[:, :4])
    assert second.min() > 0 and second.max() < 1 and second.mean().item() == pytest.approx(0.5, abs=0.01)
    assert second.var().item() == pytest.approx(1 / 12, rel=0.02)
    others = [rand(50, 300).flatten(), image_rand(mix_seeds(seeds, 1), 1)(50, 300).flatten()]
    assert (torch.corrcoef(torch.stack([second.flatten(), *others])) - torch.eye(3)).abs().max() < 0.03
    uses = torch.stack([mix_seeds(mix_seeds(torch.arange(1000), a), b) for a in range(5) for b in range(10)])
    assert len(uses.unique()) == uses.numel()


# ---- the tasks ----


def test_contrastive_loss_against_loops(parts):
    _, branches = parts
    x, seeds = some_images()
    head, views, tau = branches["contrastive"], 3, 0.2
    z = head.embed(x, views, image_rand(seeds, views))
    assert z.shape == (6, 3, 16) and torch.allclose(z.norm(dim=2), torch.ones(6, 3))
    for bank in F.normalize(torch.randn(5, 16), dim=1), None:
        got = head(x, views, image_rand(seeds, views), bank)
        for i in range(6):
            others = bank if bank is not None else torch.cat([z[j] for j in range(6) if j != i])
            terms = []
            for a in range(views):
                for b in range(views):
                    if a != b:
                        rest = [z[i, c] for c in range(views) if c != a] + list(others)
                        total = sum(torch.exp(z[i, a] @ v / tau) for v in rest)
                        terms.append(-torch.log(torch.exp(z[i, a] @ z[i, b] / tau) / total))
            assert got[i].item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)


def test_rotation_loss_turns_the_image_all_four_ways(parts):
    _, branches = parts
    x, _ = some_images()
    got = branches["rotation"](x)
    for i in range(6):
        turned = [x[i].clone() for _ in range(4)]
        for k in range(4):
            for _ in range(k):
                turned[k] = turned[k].transpose(1, 2).flip(1)  # a quarter turn: transpose, then flip the rows
        losses = [-branches["rotation"].net(t[None]).log_softmax(1)[0, k] for k, t in enumerate(turned)]
        assert got[i].item() == pytest.approx(sum(losses).item() / 4, rel=1e-4)


@pytest.mark.parametrize("size", [8, 32, 64])
def test_gradient_of_enlarging_is_its_adjoint(size):
    """<up(a), b> = <a, down(b)>: down sums over the copies of a pixel."""
    a, b = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 3, size, size, dtype=torch.float64)
    up, k = enlarge(a.requires_grad_(), size), size // 8
    assert torch.equal(up, F.interpolate(a, size=(size, size), mode="nearest"))
    (g,) = torch.autograd.grad((up * b).sum(), a)
    assert torch.allclose(g, F.avg_pool2d(b, k) * k * k)


def test_the_inpainting_network_of_128_pixels():
    """128 to 4000 x 1 x 1 to 64; and what the network sees does not depend on the hole."""
    branch = build_branches(Args(), build_model("resnet18", {"class": 10}, width=1 / 16))["inpainting"].eval()
    convolutions = [tuple(m.weight.shape) for m in branch.modules() if isinstance(m, nn.Conv2d)]
    channels = [3, 64, 64, 128, 256, 512, 4000]
    assert convolutions == [(b, a, 4, 4) for a, b in zip(channels, channels[1:], strict=False)]
    transposed = [tuple(m.weight.shape) for m in branch.modules() if isinstance(m, nn.ConvTranspose2d)]
    channels = [4000, 512, 256, 128, 64, 3]
    assert transposed == [(a, b, 4, 4) for a, b in zip(channels, channels[1:], strict=False)]
    x = torch.rand(1, 3, 32, 32)
    output, truth = branch.reconstruct(x)
    assert output.shape == truth.shape == (1, 3, 56, 56)
    assert torch.equal(truth, 2 * F.interpolate(x, scale_factor=4)[:, :, 36:92, 36:92] - 1)
    changed = x.clone()
    changed[:, :, 9:23, 9:23] = 0.5  # the hole: 36 to 92 of 128 pixels
    assert torch.equal(branch.reconstruct(changed)[0], output)
    changed[:, :, 8, 16] = 0.5
    assert not torch.equal(branch.reconstruct(changed)[0], output)
    assert branch(x).item() == pytest.approx(((output - truth) ** 2).sum().item() / 9408, rel=1e-5)


def test_the_rotation_network_is_that_of_gidaris():
    network = network_in_network(1.0).eval()
    shapes = [tuple(m.weight.shape) for m in network.modules() if isinstance(m, nn.Conv2d)]
    ones = [(192, 192, 1, 1), (192, 192, 1, 1)]
    first = [(192, 3, 5, 5), (160, 192, 1, 1), (96, 160, 1, 1), (192, 96, 5, 5), *ones]
    assert shapes == first + 2 * [(192, 192, 3, 3), *ones]
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 192)


# ---- Algorithm 1 ----


class Linear(nn.Module):
    """A task with the loss c + <w, x> per image, whose gradient is w."""

    def __init__(self, c: float, w: torch.Tensor):
        super().__init__()
        self.c, self.w = c, w

    def forward(self, z, *_):
        return self.c + (z * self.w).sum((1, 2, 3))


def test_turns():
    turns = [tasks_in_turn(TASKS, k) for k in (1, 2, 3, 4)]
    assert turns == 2 * [["contrastive", "inpainting"], ["contrastive", "rotation"]]
    assert [tasks_in_turn(["rotation", "inpainting"], k) for k in (1, 2)] == [["inpainting"], ["rotation"]]
    for tasks in (["contrastive"], ["contrastive", "rotation"], ["inpainting"]):
        assert all(tasks_in_turn(tasks, k) == tasks for k in (1, 2))


@pytest.mark.parametrize("k", [1, 2])
def test_a_step_against_the_algorithm_line_by_line(k):
    """Known gradients and losses: x' - eta (L_t / L) g_t / max |g_t|, per image, with weights."""
    torch.manual_seed(0)
    x = 0.3 + 0.4 * torch.rand(4, 3, 8, 8)
    slopes = {t: 0.01 * torch.randn(3, 8, 8) for t in TASKS}
    constants, weights = (dict(zip(TASKS, v, strict=True)) for v in ((3.0, 1.0, 2.0), (1.0, 50.0, 10.0)))
    branches = {t: Linear(constants[t], slopes[t]) for t in TASKS}
    args = tiny(reverse_step_size=0.02, reverse_eps=0.5, weights=tuple(weights.values()))
    got = reverse_step(x, x, k, Defence("mtl", None, branches, args), torch.arange(4))
    for i in range(4):
        losses = {t: weights[t] * (constants[t] + (x[i] * slopes[t]).sum()) for t in TASKS}
        total = sum(losses.values())
        want = x[i]
        for t in ("contrastive", "rotation" if k % 2 == 0 else "inpainting"):
            want = want - 0.02 * losses[t] / total * slopes[t] / slopes[t].abs().max()
        assert torch.allclose(got[i], want, atol=1e-6)


def test_single_task_with_signs_is_mao_et_al(parts):
    """delta uniform in the ball, then delta <- clip(delta - eta sign grad L_s), K times."""
    _, branches = parts
    x, seeds = some_images()
    d = defence_of(parts, "ssl", ("contrastive",), sign=True, reverse_steps=3)
    z = start(x, d, seeds)
    assert 0.14 < (z - x).abs().max() <= 0.15 + 1e-6
    for k in (1, 2, 3):
        z.requires_grad_()
        (g,) = torch.autograd.grad(d.loss("contrastive", z, mix_seeds(seeds, k)).sum(), z)
        z = (x + (z.detach() - 0.04 * g.sign() - x).clamp(-0.15, 0.15)).clamp(0, 1)
    assert torch.allclose(reverse(x, d, seeds), z, atol=1e-6)


def test_stays_in_the_ball_around_the_original_image(parts):
    """Long steps would leave it if its centre moved along."""
    _, branches = parts
    x, seeds = some_images()
    z = reverse(x, defence_of(parts, reverse_steps=10, reverse_step_size=0.2), seeds)
    assert 0.149 < (z - x).abs().max() <= 0.15 + 1e-6
    assert z.min() >= 0 and z.max() <= 1


@pytest.mark.parametrize("tasks", [TASKS, ("contrastive",), ("rotation",), ("inpainting",)])
def test_losses_fall(parts, tasks):
    """The sum that is descended, measured with other views, from x and from x with noise."""
    _, branches = parts
    x, seeds = some_images(20)
    branches["contrastive"].crop = 0.9  # untrained features: of stronger views a step would see mostly noise
    d = defence_of(parts, tasks=tasks, reverse_steps=40, reverse_step_size=0.02, views=8)

    def total(z):
        return sum(d.loss(t, z, mix_seeds(seeds, n)) for t in tasks for n in range(70, 80)) / 10

    before, noisy, after = total(x), total(start(x, d, seeds)), total(reverse(x, d, seeds))
    assert after.mean() < before.mean() and after.mean() < noisy.mean() - 0.01
    assert (after < noisy).float().mean() > 0.8


def test_without_tasks_the_classifier_stands_alone(parts):
    classifier, _ = parts
    x, seeds = some_images()
    d = Defence("none", classifier, {}, tiny())
    assert reverse(x, d, seeds) is x and torch.equal(d.classify(x), classifier(x))


def test_an_image_does_not_depend_on_its_batch(parts):
    _, branches = parts
    x, seeds = some_images()
    d = defence_of(parts, reverse_steps=4)
    whole, rows = reverse(x, d, seeds), torch.tensor([3, 0, 5])
    assert torch.allclose(reverse(x[rows], d, seeds[rows]), whole[rows], atol=1e-5)
    assert torch.allclose(reverse(x[2:3], d, seeds[2:3]), whole[2:3], atol=1e-5)


def test_networks_stay_as_they_are(parts):
    _, branches = parts
    x, seeds = some_images()
    before = {t: {k: v.clone() for k, v in b.state_dict().items()} for t, b in branches.items()}
    modes = []
    modules = [m for b in branches.values() for m in b.modules()]
    hooks = [m.register_forward_hook(lambda m, *_: modes.append(m.training)) for m in modules]
    reverse(x, defence_of(parts), seeds)
    [hook.remove() for hook in hooks]
    assert modes and not any(modes)  # in eval mode
    for t, b in branches.items():
        assert same_state(b.state_dict(), before[t]) and all(p.grad is None for p in b.parameters())


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
            reverse(x, defence_of(parts, reverse_steps=steps), seeds)
        peaks.append(peak)
    assert peaks[1] < 1.2 * peaks[0]


# ---- attackers ----


@pytest.mark.parametrize("tasks, sign", [(TASKS, False), (("contrastive",), False), (("contrastive",), True)])
def test_unrolled_is_the_derivative_of_the_whole(parts, tasks, sign):
    """One graph through all iterations; a sign's derivative is that of the normalised gradient."""
    _, branches = parts
    x, seeds = some_images(3)
    d = defence_of(parts, tasks=tasks, reverse_steps=3, sign=sign)
    direction = torch.randn(3, 3, 8, 8)
    z = x.clone().requires_grad_()
    out = reverse(z, d, seeds, Step.apply)
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
        g = torch.Generator().manual_seed(seed)
        self.w = torch.randn(5, 12, generator=g, dtype=torch.float64)

    def forward(self, z, *_):
        return 1 + (z.flatten(1) @ self.w.T).tanh().square().sum(1)


def test_unrolled_against_finite_differences():
    branches = {t: Smooth(i) for i, t in enumerate(TASKS)}
    d = Defence("mtl", None, branches, tiny(reverse_steps=4, reverse_step_size=0.02, reverse_eps=0.05))
    g = torch.Generator().manual_seed(0)
    x = 0.3 + 0.4 * torch.rand(2, 3, 2, 2, dtype=torch.float64, generator=g)
    seeds = torch.arange(2)
    assert torch.autograd.gradcheck(
        lambda z: reverse(z, d, seeds, Step.apply), x.requires_grad_(), eps=1e-7, atol=1e-5
    )


def test_pgd_is_pgd_on_the_classifier(parts):
    classifier, branches = parts
    x, seeds = some_images(12)
    y = classifier(x).argmax(1)
    d = defence_of(parts, eval_steps=4)
    got = attack("pgd", x, y, seeds, d)
    noise = 2 * image_uniform(mix_seeds(seeds, mtl_reverse.FOR_START), 192).view_as(x) - 1

    def loss(z):
        return ce_per_image(classifier(z), y)

    assert torch.equal(got, pgd(loss, x, eps=0.1, steps=4, step_size=0.05, start=x + 0.1 * noise))
    some = slice(5, 7)  # of an image alone, too
    assert torch.equal(got[some], attack("pgd", x[some], y[some], seeds[some], d))
    assert torch.equal(attack("aware", x, y, seeds, d, lam=0.0), got)
    assert torch.equal(attack("none", x, y, seeds, d), x)


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 1.0)])
@pytest.mark.parametrize("kind", mtl_reverse.ATTACKS)
def test_attacks_stay_in_their_ball(parts, kind, norm, eps):
    classifier, branches = parts
    x, seeds = some_images()
    d = defence_of(parts, norm=norm, eps=eps)
    x_adv = attack(kind, x, torch.zeros(6, dtype=torch.long), seeds, d, 1.0)
    delta = x_adv - x
    size = delta.abs().amax((1, 2, 3)) if norm == "linf" else delta.flatten(1).norm(dim=1)
    assert size.max() <= eps + 1e-5 and size.min() > 0 and x_adv.min() >= 0 and x_adv.max() <= 1


@pytest.mark.parametrize("kind", ["none", *mtl_reverse.ATTACKS])
def test_a_rank_without_images_takes_part(parts, kind):
    classifier, branches = parts
    x, seeds = some_images(0)
    d = defence_of(parts)
    x_adv = attack(kind, x, torch.zeros(0, dtype=torch.long), seeds, d, 1.0)
    assert reverse(x_adv, d, seeds).shape == (0, 3, 8, 8)


def test_the_aware_attack_spares_the_losses(parts):
    classifier, branches = parts
    x, seeds = some_images(20)
    d = defence_of(parts, eval_steps=10)
    y = classifier(x).argmax(1)

    def total(lam):
        z = attack("aware", x, y, seeds, d, lam)
        return sum(d.loss(t, z, mix_seeds(seeds, 5)).mean().item() for t in TASKS)

    assert total(100.0) < total(0.0)


def test_straight_through_takes_the_gradient_behind_the_defence(parts, monkeypatch):
    """One step of BPDA: along the sign of the classifier's gradient at the reversed image."""
    classifier, branches = parts
    x, seeds = some_images()
    x = 0.2 + 0.6 * x
    y = classifier(x).argmax(1)
    d = defence_of(parts, adaptive_steps=1, eot=3, step_size=0.02)
    used = []
    monkeypatch.setattr(mtl_reverse, "reverse", lambda z, d, s: used.append((z, s)) or reverse(z, d, s))
    got = attack("bpda", x, y, seeds, d)
    x_pgd = attack("pgd", x, y, seeds, d)
    assert len(used) == 6  # three draws for the gradient, three to see how high the loss is
    used, own = used[:3], tuple(mix_seeds(seeds, FOR_DEFENCE).tolist())
    assert len({tuple(s.tolist()) for _, s in used} | {own}) == 4  # the defence's own draws are others
    grad = 0
    for z, s in used:
        assert torch.allclose(z, x_pgd, atol=1e-6)
        z = reverse(z, d, s).requires_grad_()
        grad = grad + torch.autograd.grad(ce_per_image(classifier(z), y).sum(), z)[0]
    want = torch.clamp(torch.clamp(x_pgd + 0.02 * grad.sign(), x - 0.1, x + 0.1), 0, 1)
    moved = (got - want).abs().amax((1, 2, 3)) < 1e-5  # of the two points, the one of higher loss counts
    assert ((got - x_pgd).abs().amax((1, 2, 3)) < 1e-5)[~moved].all() and moved.sum() >= 3


@pytest.mark.parametrize("kind", ["bpda", "unrolled"])
def test_adaptive_attacks_do_more_to_the_defence_than_pgd(parts, kind):
    classifier, branches = parts
    x, seeds = some_images(30)
    d = defence_of(parts, reverse_steps=2, adaptive_steps=8, eot=2)
    y = classifier(x).argmax(1)

    def loss(by):  # after the defence, over a few of its draws
        x_adv, total = attack(by, x, y, seeds, d), 0
        for n in range(50, 55):
            total += ce_per_image(classifier(reverse(x_adv, d, mix_seeds(seeds, n))), y).mean().item() / 5
        return total

    assert loss(kind) > loss("pgd") + 0.01 > loss("none") + 0.01


# ---- evaluation ----


def test_columns_and_their_errors():
    g = torch.Generator().manual_seed(0)
    correct, rows = {}, []
    attacks = [("none", 0), ("pgd-7", 0), ("aware-7", 1.0), ("aware-7", 5.0), ("bpda-4", 0)]
    for name in ("none", "ssl", "mtl"):
        for kind, lam in attacks:
            c = correct[name, kind, lam] = (torch.rand(50, generator=g) < 0.6).float()
            bits = "".join(str(int(v)) for v in c)
            about = {"name": name, "attack": kind, "lambda": lam, "correct": bits}
            rows.append(about | mtl_reverse.accuracy(c))
    found, strongest = columns(rows), {}
    assert {r["column"] for r in found} == {"clean", "pgd", "defence-aware", "adaptive"}
    for name in ("none", "ssl", "mtl"):
        wanted = {"clean": attacks[:1], "defence-aware": attacks[1:4], "adaptive": attacks[1:]}
        for column, kinds in wanted.items():
            key = min(((name, *k) for k in kinds), key=lambda k: correct[k].mean())
            (row,) = [r for r in found if (r["kind"], r["name"], r["column"]) == ("column", name, column)]
            p = correct[key].mean().item()
            assert (row["strongest"], row["lambda"]) == key[1:]
            assert row["accuracy"] == pytest.approx(100 * p, abs=0.01)
            assert row["se"] == pytest.approx(100 * math.sqrt(p * (1 - p) / 50), abs=0.01)
            strongest[name, column] = correct[key]
    d = (strongest["mtl", "adaptive"] - strongest["ssl", "adaptive"]).numpy()
    (row,) = [r for r in found if (r["name"], r["column"]) == ("mtl - ssl", "adaptive")]
    assert row["difference"] == pytest.approx(100 * d.mean(), abs=0.01)
    assert row["se"] == pytest.approx(100 * d.std() / math.sqrt(50), abs=0.01)


def test_which_attacks():
    """Those on the classifier alone are made once for all defences."""

    def made(*attacks):
        args = tiny(attacks=attacks)
        defences = [Defence(n, None, {}, args) for n in ("none", "ssl", "mtl")]
        return [(kind, lam, " ".join(d.name for d in on)) for kind, lam, on in jobs(defences)]

    assert made(*mtl_reverse.ATTACKS) == [
        ("none", 0, "none ssl mtl"), ("pgd", 0, "none ssl mtl"), ("suite", 0, "none ssl mtl"),
        ("bpda", 0, "none"),
        ("aware", 0, "ssl"), ("aware", 5, "ssl"), ("bpda", 0, "ssl"), ("unrolled", 0, "ssl"),
        ("aware", 0, "mtl"), ("aware", 5, "mtl"), ("bpda", 0, "mtl"), ("unrolled", 0, "mtl"),
    ]  # fmt: skip
    assert [kind for kind, _, _ in made("pgd")] == ["none", "pgd"]
    # PGD goes on against the classifier alone for as long as unrolled.
    assert made("unrolled")[2:] == [("bpda", 0, "none"), ("unrolled", 0, "ssl"), ("unrolled", 0, "mtl")]


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
    def __init__(self, c_in, c, stride, n):
        super().__init__()
        self.layer = nn.Sequential(TheirBlock(c_in, c, stride), *(TheirBlock(c, c, 1) for _ in range(n - 1)))

    def forward(self, x):
        return self.layer(x)


class TheirNetwork(nn.Module):
    """A WideResNet of 6 n + 4 layers with the names of Carmon et al.'s file; 16, c, 2 c and 4 c channels."""

    def __init__(self, c, n):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1, self.sub_block1 = TheirLayer(16, c, 1, n), TheirLayer(16, c, 1, n)
        self.block2, self.block3 = TheirLayer(c, 2 * c, 2, n), TheirLayer(2 * c, 4 * c, 2, n)
        self.bn1, self.fc = nn.BatchNorm2d(4 * c), nn.Linear(4 * c, 10)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.avg_pool2d(self.bn1(x).relu(), 8).flatten(1))


def their_network(n=4):
    torch.manual_seed(0)
    network = TheirNetwork(8, n).train()
    for _ in range(10):
        network(torch.rand(16, 3, 32, 32))
    return network.eval()


@pytest.fixture
def carmon(tmp_path):
    """carmon(network, change of its state dict, ...) writes a checkpoint in their format."""

    def write(network=None, change=lambda state: None, prefix="module.", **more):
        weights = (network or their_network()).state_dict()
        state = {prefix + k: v.clone() for k, v in weights.items()}
        change(state)
        whole = {"num_classes": 10, "state_dict": state, "normalize_input": False} | more
        torch.save(whole if prefix else state, tmp_path / "carmon.pt")
        return tmp_path / "carmon.pt"

    return write


@pytest.mark.parametrize("n, prefix", [(4, "module."), (4, ""), (1, "module.")])
def test_carmons_checkpoint_predicts_the_same(carmon, n, prefix):
    theirs = their_network(n)
    state = load_victim(carmon(theirs, prefix=prefix))
    ours = build_model(**state["network"])
    load_weights(ours, state["model"], "")
    x = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(x), theirs(x), atol=1e-5)
    assert (state["network"]["width"], state["network"]["arch"]) == (0.05, f"wrn{6 * n + 4}_10")


def test_the_published_size():
    model = build_model("wrn28_10", {"class": 10})
    assert sum(p.numel() for p in model.parameters()) == 36_479_194 and model.trunk.dim == 640


@pytest.mark.parametrize("change, told", [
    (lambda s: s.pop("module.block2.layer.1.bn2.weight"), "trunk.layer2.1.bn2.weight"),
    (lambda s: s.pop("module.fc.weight"), "heads.class.weight"),
    (lambda s: s.update({"module.block4.layer.0.bn1.weight": torch.ones(3)}), "trunk.layer4.0.bn1.weight"),
    (lambda s: s.update({"module.bn1.weight": torch.ones(3)}), "trunk.bn.weight"),
    (lambda s: s.clear(), "trunk.layer1.0.conv1.weight"),
])  # fmt: skip
def test_other_files_are_refused_by_name(carmon, change, told):
    path = carmon(change=change)
    with pytest.raises(UserError, match="carmon.pt is damaged, or not") as e:
        common.rebuild(load_victim(path), path)
    assert told in str(e.value)


def test_normalised_and_foreign_files_are_refused(carmon, tmp_path):
    with pytest.raises(UserError, match="normalize_input"):
        load_victim(carmon(normalize_input=True))
    for content in ([1, 2], {"a": 3}, {"state_dict": [1]}, {0: torch.ones(3)}):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match="x.pt is damaged, or not"):
            load_victim(tmp_path / "x.pt")


@pytest.mark.parametrize("changes, known", [
    (dict(attacks=("pgd",), lambdas=(1.0,), eot=20, branches="runs/x", seed=3), True),
    (dict(reverse_eps=8 / 255), True),
    (dict(weights=(1.0, 1.0, 1.0)), False), (dict(views=2), False), (dict(eval_examples=100), False),
    (dict(branch_epochs=20), False), (dict(eps=4 / 255), False),
])  # fmt: skip
def test_the_papers_numbers_stand_beside_its_own_setting(changes, known):
    args = Args(**dict(victim="carmon.pt") | changes)
    rows = [{"kind": "column", "name": n, "column": c, "accuracy": 1.0, "se": 1.0, "examples": 9}
            for n in ("none", "ssl", "mtl") for c in ("clean", "pgd")]  # fmt: skip
    losses = [{"kind": "losses", "name": "mtl", "task": "rotation", "images": i, "share": 1.0, "mean": 1.0,
               "values": [1.0]} for i in ("clean", "attacked", "reversed")]  # fmt: skip
    for source in (mtl_reverse.CARMON, ""):
        first = {"source": source, "examples": 9}
        text = mtl_reverse.table({"rows": [first, *rows, *losses]}, args)
        found = [line.split()[3:] for line in text.splitlines() if "the paper (RST_adv)" in line]
        want = [["89.7", "63.9"], ["86.6", "65.3"], ["87.7", "65.6"]]
        assert found == (want if known and source else [])


# ---- runs ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, results) of a run with all attackers."""
    out = tmp_path_factory.mktemp("mtl") / "run"
    return out, main(tiny(attacks=mtl_reverse.ATTACKS, out=str(out)))


def accuracies(results):
    return {(r["name"], r["attack"], r["lambda"]): r["accuracy"] for r in results["rows"] if "correct" in r}


def test_results(trained):
    folder, results = trained
    rows = results["rows"]
    cells = {(r["name"], r["attack"], r["lambda"]): r for r in rows if "correct" in r}
    attacks = [("none", 0), ("pgd-2", 0), ("aware-2", 0), ("aware-2", 5), ("bpda-1", 0), ("unrolled-1", 0)]
    for name in ("ssl", "mtl"):
        for key in (*attacks, ("suite-fast", 0)):
            row = cells[(name, *key)]
            p = row["accuracy"] / 100
            assert row["examples"] == len(row["correct"]) == 40 and row["correct"].count("1") == round(40 * p)
            assert row["se"] == pytest.approx(100 * math.sqrt(p * (1 - p) / 40), abs=0.01)
    assert cells["mtl", "aware-2", 0]["accuracy"] == cells["mtl", "pgd-2", 0]["accuracy"]
    assert ("none", "unrolled-1", 0) not in cells
    of_mtl = {r["column"] for r in rows if r.get("kind") == "column" and r["name"] == "mtl"}
    assert of_mtl == {"clean", "pgd", "defence-aware", "adaptive", "suite"}
    losses = [r for r in rows if r.get("kind") == "losses"]
    for kind in ("clean", "attacked", "reversed"):
        mine = {r["task"]: r for r in losses if r["name"] == "mtl" and r["images"] == kind}
        assert list(mine) == list(TASKS)
        each_value = [r["values"] for r in mine.values()]
        for r in mine.values():
            assert len(r["values"]) == 40 and r["mean"] == pytest.approx(sum(r["values"]) / 40, rel=1e-2)
            shares = [v / sum(each) for v, *each in zip(r["values"], *each_value, strict=True)]
            assert r["share"] == pytest.approx(100 * sum(shares) / 40, abs=0.1)
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    for name in ("classifier.pt", "contrastive.pt", "rotation.pt", "inpainting.pt", "reversed.png"):
        assert (folder / name).exists()
    head = load_checkpoint(folder / "contrastive.pt")["model"]
    assert all(k.startswith("head.") for k in head)  # without the classifier


def test_evaluated_alone_with_given_branches(trained, tmp_path):
    """The classifier and branches of another run give that run's numbers; their flags are that run's."""
    folder, results = trained
    given = dict(victim=str(folder / "classifier.pt"), branches=str(folder), temperature=9.0)
    again = main(tiny(**given, branch_width=1.0, attacks=("pgd",), out=str(tmp_path / "again")))
    assert again["args"]["branch_width"] == 1 / 16 and again["args"]["temperature"] == 0.2
    found = accuracies(again)
    assert len(found) == 6 and all(accuracies(results)[key] == v for key, v in found.items())


def test_interrupted_and_resumed_is_uninterrupted(tmp_path, monkeypatch):
    changes = dict(attacks=("pgd", "bpda"), branch_epochs=2, epochs=2)
    whole = main(tiny(**changes, out=str(tmp_path / "whole")))
    log, keep, calls = Run.log, Run.keep_rows, []

    def stop(method):
        def spy(self, *a, **k):
            method(self, *a, **k)
            calls.append(1)
            if len(calls) in (8, 25, 40, 55, 58):
                raise KeyboardInterrupt

        return spy

    monkeypatch.setattr(Run, "log", stop(log))
    monkeypatch.setattr(Run, "keep_rows", stop(keep))
    stops = 0
    while True:
        try:
            parts = main(tiny(**changes, out=str(tmp_path / "parts"), resume=True))
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == 5 and parts["rows"] == whole["rows"]
    for file in (tmp_path / "whole").glob("*.pt"):
        if file.name != "last.pt":
            other = load_checkpoint(tmp_path / "parts" / file.name)
            assert same_state(load_checkpoint(file)["model"], other["model"]), file.name


def test_a_resumed_evaluation_repeats_nothing(trained, tmp_path, monkeypatch):
    folder, _ = trained
    given = dict(victim=str(folder / "classifier.pt"), branches=str(folder), attacks=("pgd", "bpda"))
    args, seen = tiny(**given, out=str(tmp_path / "run")), []

    def stop(kind, *a, **k):
        seen.append(kind)
        if kind == "bpda" and len(seen) == 5:
            raise KeyboardInterrupt
        return attack(kind, *a, **k)

    monkeypatch.setattr(mtl_reverse, "attack", stop)
    with pytest.raises(KeyboardInterrupt):
        main(args)
    assert seen == ["none", "none", "pgd", "pgd", "bpda"]  # two batches each
    main(replace(args, resume=True))
    assert seen[5:11] == 6 * ["bpda"]  # of three defences


def test_a_victim_of_carmons_format_at_the_command_line(command, carmon, tmp_path):
    more = dict(image_size=16, attacks=("pgd",), eval_examples=20, tasks=("rotation", "inpainting"))
    argv = flags(TINY | more)
    code, out, err = command(mtl_reverse, *argv, "--victim", carmon(), "--out", tmp_path / "run")
    assert code == 0 and "rotation+inpainting - ssl" in out and "the paper" not in out, err
    assert "adaptive" not in out and "defence-aware" not in out and "20 test images" in out


@pytest.mark.parametrize("argv, told", [
    (["--tasks", "jigsaw"], "--tasks"),
    (["--attacks", "fgsm"], "--attacks"),
    (["--weights", "1,2"], "--weights"),
    (["--weights", "1,0,1"], "--weights"),
    (["--image-size", "24"], "power of 2"),
    (["--branches", "x"], "--victim"),
    (["--victim", "nothing.pt"], "nothing.pt"),
    (["--val-fraction", "0"], "--val-fraction"),
    (["--views", "1"], "--views"),
    (["--branch-batch-size", "1"], "at least 2 images"),
])  # fmt: skip
def test_wrong_flags_are_one_sentence(one_sentence, tmp_path, monkeypatch, argv, told):
    monkeypatch.chdir(tmp_path)
    assert told in one_sentence(mtl_reverse, *flags(TINY), *argv)
    assert not list(tmp_path.glob("runs/*/*.pt"))  # before any training


def test_the_suite_keeps_the_first_image_that_fools(parts, monkeypatch):
    """Three attacks on a classifier that reads the mean: each gives the images that one line sets."""
    answers = [[0.9, 0.2, 0.2], [0.7, 0.8, 0.2], [0.6, 0.6, 0.1]]  # above 0.5 fools
    asked = []

    def attack_by(values):
        def run(model, x, y, restart):
            asked.append(len(x))
            numbers = (100 * x[:, 0, 0, 0]).round().int().tolist()
            return torch.stack([torch.full((3, 8, 8), values[i]) for i in numbers])

        return run

    monkeypatch.setattr(mtl_reverse, "suite_attacks", lambda *a: [("", 1, attack_by(v)) for v in answers])
    x = torch.stack([torch.full((3, 8, 8), i / 100) for i in range(3)])  # an image's value is its number
    defence = defence_of(parts)
    logits = lambda z: torch.stack([z.mean((1, 2, 3)) <= 0.5, z.mean((1, 2, 3)) > 0.5], 1).float()  # noqa: E731
    monkeypatch.setattr(Defence, "classify", lambda self, z: logits(z))
    out = mtl_reverse.suite(x, x, torch.zeros(3, dtype=torch.int64), defence)
    assert out[:, 0, 0, 0].tolist() == pytest.approx([0.9, 0.8, 0.02])
    assert asked == [3, 2, 1]


def test_branches_of_another_classifier_are_refused(one_sentence, trained, tmp_path):
    folder, _ = trained
    torch.manual_seed(1)
    other = build_model("preact18", {"class": 10}, width=1 / 16)
    state = {"network": other.spec, "model": other.state_dict()}
    common.save_checkpoint(tmp_path / "other.pt", state)
    argv = [*flags(TINY), "--branches", folder, "--out", tmp_path / "o", "--victim"]
    assert "another classifier" in one_sentence(mtl_reverse, *argv, tmp_path / "other.pt")
    for classes in (4, 100):
        wrong = build_model("preact18", {"class": classes}, width=1 / 16)
        common.save_checkpoint(tmp_path / "wrong.pt", {"network": wrong.spec, "model": wrong.state_dict()})
        assert "10 classes" in one_sentence(mtl_reverse, *argv, tmp_path / "wrong.pt")
    assert "no finished classifier" in one_sentence(mtl_reverse, *argv, folder / "rotation.pt")
    shutil.copytree(folder, tmp_path / "copy")
    rotation = common.load_checkpoint(folder / "rotation.pt")
    digits, _ = common.load_data("digits", "", torch.device("cpu"), image_size=8)
    assert rotation["network"]["images"] == digits.digest
    rotation["network"]["images"] = "others"
    common.save_checkpoint(tmp_path / "copy" / "rotation.pt", rotation)
    others = ["--victim", folder / "classifier.pt", "--branches", tmp_path / "copy", "--out", tmp_path / "p"]
    assert "other images" in one_sentence(mtl_reverse, *flags(TINY), *others)
    larger = state | {"args": {"image_size": 32}}
    common.save_checkpoint(tmp_path / "larger.pt", larger)
    assert "images of 32 pixels" in one_sentence(mtl_reverse, *argv, tmp_path / "larger.pt")
    unfinished = ["--victim", folder / "classifier.pt", "--branches", tmp_path]
    shutil.copy(folder / "inpainting.pt", tmp_path)
    assert "no rows.json" in one_sentence(mtl_reverse, *flags(TINY), *unfinished, "--out", tmp_path / "o")


def test_a_vision_transformer_as_victim(tmp_path):
    """Attention has second derivatives, too; a checkpoint with a network and its weights alone will do."""
    torch.manual_seed(0)
    vit = build_model("vit_mini4", {"class": 10}, width=0.5)
    common.save_checkpoint(tmp_path / "vit.pt", {"network": vit.spec, "model": vit.state_dict()})
    args = dict(victim=str(tmp_path / "vit.pt"), attacks=("unrolled",), eval_examples=10)
    found = accuracies(main(tiny(**args, out=str(tmp_path / "run"))))
    assert {name for name, kind, _ in found if kind == "unrolled-1"} == {"ssl", "mtl"}


GATHERED = """
import sys; sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
from common import build_model, distribute
import mtl_reverse
torch.manual_seed(0)
classifier = build_model("preact18", {{"class": 10}}, width=1 / 16).eval().requires_grad_(False)
branch = mtl_reverse.Contrastive(classifier, mtl_reverse.Args()).eval()
def views(x, **more):  # the same on any rank
    return x + 0.1 * torch.arange(len(x)).view(-1, 1, 1, 1).div(len(x) // 2, rounding_mode="floor")
mtl_reverse.simclr_augment = views
x = torch.rand(7, 3, 8, 8)
share = x.tensor_split(2)[rank]
z, first = mtl_reverse.gather(branch.embed(share, 2))
ddp = distribute(branch)  # by a name, or its hooks are gone before the backward pass
losses = ddp(share)
(losses.sum() * 2 / 7).backward()  # DDP divides by the number of ranks
found = {{"z": z.detach(), "first": first, "losses": losses.detach()}}
torch.save(found | {{"grads": [p.grad for p in branch.head.parameters()]}}, f"{out}/{{rank}}.pt")
dist.barrier()
del ddp
dist.destroy_process_group()
"""


def torchrun(*argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *argv]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_two_ranks_contrast_with_all_images(tmp_path, monkeypatch):
    """Losses and gradients of an unequally shared batch are those of one process."""
    (tmp_path / "g.py").write_text(GATHERED.format(root=str(ROOT), out=tmp_path))
    torchrun(tmp_path / "g.py")
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]

    def views(x, **more):
        return x + 0.1 * torch.arange(len(x)).view(-1, 1, 1, 1).div(len(x) // 2, rounding_mode="floor")

    monkeypatch.setattr(mtl_reverse, "simclr_augment", views)
    torch.manual_seed(0)
    classifier = build_model("preact18", {"class": 10}, width=1 / 16).eval().requires_grad_(False)
    branch = Contrastive(classifier, Args()).eval()
    x = torch.rand(7, 3, 8, 8)
    losses = branch(x)
    losses.mean().backward()
    assert [r["first"] for r in ranks] == [0, 4] and gather(branch.embed(x, 2))[1] == 0
    assert all(torch.allclose(r["z"], branch.embed(x, 2), atol=1e-5) for r in ranks)
    assert torch.allclose(torch.cat([r["losses"] for r in ranks]), losses, atol=1e-5)
    for r in ranks:
        for a, b in zip(r["grads"], branch.head.parameters(), strict=True):
            assert torch.allclose(a, b.grad, atol=1e-5)


def test_two_ranks_train_and_evaluate_like_one(trained, tmp_path):
    """Every image is evaluated once, by the draws of one process (rounding may tip an image over)."""
    folder, results = trained
    args = flags(TINY | dict(attacks=("pgd", "bpda")))
    given = ["--victim", folder / "classifier.pt", "--branches", folder]
    torchrun(ROOT / "mtl_reverse.py", *args, *given, "--out", tmp_path / "two")
    two = accuracies(json.loads((tmp_path / "two" / "results.json").read_text()))
    assert len(two) == 9 and all(abs(accuracies(results)[key] - v) <= 2.5 for key, v in two.items())
    torchrun(ROOT / "mtl_reverse.py", *args, "--out", tmp_path / "all")
    assert all((tmp_path / "all" / f"{t}.pt").exists() for t in ("classifier", *TASKS))
