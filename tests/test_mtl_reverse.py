"""mtl_reverse.py: the tasks' losses, Algorithm 1, attackers, Carmon et al.'s file, runs."""
import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import flags

import mtl_reverse
from common import (
    Run, UserError, build_model, ce_per_image, draw, image_uniform, load_checkpoint, load_data,
    load_model, pgd, rebuild, save_checkpoint,
)  # fmt: skip
from mtl_reverse import (
    FOR_ATTACKER, FOR_DEFENCE, FOR_START, TASKS, Args, Defence, DifferentiableStep, attack, build_branches,
    image_rand, load_victim, main, mix_seeds, reverse, reverse_step, start,
)  # fmt: skip

# A run of a few seconds: 150 digits of 8 pixels (see `few_digits`).
TINY = dict(
    dataset="digits", image_size=8, flip=False, arch="preact18", width=1 / 16, epochs=1, batch_size=60,
    lr=0.05, eps=0.1, attack_steps=2, eval_steps=2, branch_epochs=1, branch_batch_size=60, branch_lr=0.05,
    head_batch_size=60, head_lr=1e-2, branch_width=1 / 16, crop=0.5, reverse_steps=2, reverse_step_size=0.04,
    reverse_eps=0.15, weights=(1.0, 1.0, 1.0), views=2, bank=20, eval_attack="suite-fast", lambdas=(0.0, 5.0),
    adaptive_steps=1, eot=1, eval_examples=20, eval_batch_size=10, workers=0, amp="off", device="cpu",
)  # fmt: skip


def tiny(**changes) -> Args:
    return Args(**(TINY | changes))


@pytest.fixture(autouse=True, scope="module")
def few_digits():
    """The first 150 training images."""
    load = Run.load_data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "load_data", lambda run: (load(run)[0].subset(torch.arange(150)), load(run)[1]))
        yield


@pytest.fixture(scope="module")
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


def defence_of(parts, tasks=TASKS, sign=False, **changes) -> Defence:
    classifier, branches = parts
    bank = F.normalize(torch.randn(30, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    return Defence("name", classifier, {t: branches[t] for t in tasks}, tiny(**changes), bank, sign)


def some_images(n=6):
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, mix_seeds(torch.arange(n), 0)


def test_contrastive_loss_against_loops(parts):
    """Negatives come from the bank or, in training, from the batch."""
    x, seeds = some_images()
    head, views, tau = parts[1]["contrastive"], 3, 0.2
    z = head.embed(x, views, image_rand(seeds, views))
    assert z.shape == (6, 3, 16) and torch.allclose(z.norm(dim=2), torch.ones(6, 3))
    for bank in F.normalize(torch.randn(5, 16), dim=1), None:
        got = head(x, views, image_rand(seeds, views), bank)
        for i in range(6):
            others = bank if bank is not None else torch.cat([z[j] for j in range(6) if j != i])
            terms = []
            for a, b in itertools.permutations(range(views), 2):
                rest = [z[i, c] for c in range(views) if c != a] + list(others)
                total = sum(torch.exp(z[i, a] @ v / tau) for v in rest)
                terms.append(-torch.log(torch.exp(z[i, a] @ z[i, b] / tau) / total))
            assert got[i].item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)


def test_rotation_loss_is_the_mean_over_four_quarter_turns(parts):
    x, _ = some_images()
    branch = parts[1]["rotation"]
    for image, got in zip(x, branch(x), strict=True):
        losses = []
        for k in range(4):
            losses.append(-branch.net(image[None]).log_softmax(1)[0, k])
            image = image.transpose(1, 2).flip(1)  # a quarter turn: transpose, then flip the rows
        assert got.item() == pytest.approx(sum(losses).item() / 4, rel=1e-4)


def test_inpainting_does_not_see_the_hole_and_its_loss_is_measured_there():
    """The hole is 36 to 92 of 128 pixels."""
    args = Args(branch_width=1 / 8)
    branch = build_branches(args, build_model("resnet18", {"class": 10}, width=1 / 16))["inpainting"].eval()
    x = torch.rand(1, 3, 32, 32)
    output, truth = branch.reconstruct(x)
    assert torch.equal(truth, 2 * F.interpolate(x, scale_factor=4)[:, :, 36:92, 36:92] - 1)
    assert branch(x).item() == pytest.approx(((output - truth) ** 2).sum().item() / 9408, rel=1e-5)
    changed = x.clone()
    changed[:, :, 9:23, 9:23] = 0.5
    assert torch.equal(branch.reconstruct(changed)[0], output)
    changed[:, :, 8, 16] = 0.5
    assert not torch.equal(branch.reconstruct(changed)[0], output)


@pytest.mark.parametrize(("tasks", "moves"), [
    (TASKS, [("contrastive", "inpainting"), ("contrastive", "rotation")]),  # in odd and in even iterations
    (TASKS[:2], 2 * [TASKS[:2]]), (TASKS[1:], [TASKS[2:], TASKS[1:2]]),
])  # fmt: skip
def test_a_step_against_the_algorithm_line_by_line(tasks, moves):
    """Known gradients and losses: x' - eta (L_t / L) g_t / max |g_t|, per image, with weights."""
    torch.manual_seed(0)
    x = 0.3 + 0.4 * torch.rand(4, 3, 8, 8)
    slopes = {t: 0.01 * torch.randn(3, 8, 8) for t in TASKS}
    constants, weights = (dict(zip(TASKS, v, strict=True)) for v in ((3.0, 1.0, 2.0), (1.0, 50.0, 10.0)))
    branches = {t: lambda z, *_, t=t: constants[t] + (z * slopes[t]).sum((1, 2, 3)) for t in tasks}
    args = tiny(reverse_step_size=0.02, reverse_eps=0.5, weights=tuple(weights.values()))
    for k in (1, 2, 3, 4):
        got = reverse_step(x, x, k, Defence("mtl", None, branches, args), torch.arange(4))
        for i in range(4):
            losses = {t: weights[t] * (constants[t] + (x[i] * slopes[t]).sum()) for t in tasks}
            want = x[i]
            for t in moves[(k - 1) % 2]:
                want = want - 0.02 * losses[t] / sum(losses.values()) * slopes[t] / slopes[t].abs().max()
            assert torch.allclose(got[i], want, atol=1e-6)


def test_single_task_with_signs_is_mao_et_al(parts):
    """delta is uniform in the ball around the given image, then delta <- clip(delta - eta sign grad L_s)."""
    x, seeds = some_images()
    d = defence_of(parts, ("contrastive",), sign=True, reverse_steps=5)
    z = start(x, d, seeds)
    assert -0.151 < (z - x).min() < -0.14 and 0.14 < (z - x).max() < 0.151
    for k in range(1, 6):
        z.requires_grad_()
        (g,) = torch.autograd.grad(d.loss("contrastive", z, mix_seeds(seeds, k)).sum(), z)
        z = (x + (z.detach() - 0.04 * g.sign() - x).clamp(-0.15, 0.15)).clamp(0, 1)
    assert torch.allclose(reverse(x, d, seeds), z, atol=1e-6)


@pytest.mark.parametrize(("tasks", "sign"), [(TASKS, False), (TASKS[:1], True)])
def test_unrolled_is_the_derivative_of_the_whole(parts, tasks, sign):
    """One graph through all iterations; a sign's derivative is that of the normalised gradient."""
    x, seeds = some_images(3)
    d = defence_of(parts, tasks, sign, reverse_steps=3)
    direction = torch.randn(3, 3, 8, 8)
    z = x.clone().requires_grad_()
    out = reverse(z, d, seeds, DifferentiableStep.apply)
    assert torch.allclose(out, reverse(x, d, seeds), atol=1e-6)
    (got,) = torch.autograd.grad((out * direction).sum(), z)
    whole = start(z, d, seeds)
    for k in (1, 2, 3):
        whole = reverse_step(whole, z, k, d, seeds, differentiable=True)
    (want,) = torch.autograd.grad((whole * direction).sum(), z)
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
    assert not torch.allclose(got, direction, atol=0.1)  # more than straight through
    z = (0.2 + 0.6 * x).requires_grad_()  # where nothing is clipped
    one, other = (reverse_step(z, z.detach(), 1, replace(d, sign=s), seeds, True) for s in (sign, False))
    a, b = (torch.autograd.grad((after * direction).sum(), z)[0] for after in (one, other))
    assert torch.allclose(a, b, atol=1e-4)


def test_unrolled_against_finite_differences():
    """In float64, with smooth losses."""
    g = torch.Generator().manual_seed(0)
    w = {t: torch.randn(12, 5, generator=g, dtype=torch.float64) for t in TASKS}
    branches = {t: lambda z, *_, t=t: 1 + (z.flatten(1) @ w[t]).tanh().square().sum(1) for t in TASKS}
    d = Defence("mtl", None, branches, tiny(reverse_steps=4, reverse_step_size=0.02, reverse_eps=0.05))
    x = 0.3 + 0.4 * torch.rand(2, 3, 2, 2, dtype=torch.float64, generator=g)
    through = lambda z: reverse(z, d, torch.arange(2), DifferentiableStep.apply)  # noqa: E731
    assert torch.autograd.gradcheck(through, x.requires_grad_(), eps=1e-7, atol=1e-5)


def test_pgd_and_aware_are_pgd_from_a_start_of_each_image(parts):
    """pgd ascends CE(F(x)), aware CE(F(x)) - lambda L(x) with new draws in each step."""
    classifier, _ = parts
    x, seeds = some_images(12)
    y = classifier(x).argmax(1)
    d = defence_of(parts, eval_steps=3)
    noise = 2 * image_uniform(mix_seeds(seeds, FOR_START), 192).view_as(x) - 1
    for kind, lam in ("pgd", 0), ("aware", 5.0):
        draws = iter(range(FOR_ATTACKER + 1, 10_000))

        def loss(z, lam=lam, draws=draws):
            drawn = mix_seeds(seeds, next(draws))
            return ce_per_image(classifier(z), y) - lam * sum(d.loss(t, z, drawn) for t in TASKS)

        want = pgd(loss, x, eps=0.1, steps=3, start=x + 0.1 * noise)
        assert torch.allclose(attack(kind, x, y, seeds, d, lam), want, atol=1e-6)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 1.0)])
def test_attacks_stay_in_their_ball(parts, norm, eps):
    """Also on a rank without images."""
    x, seeds = some_images(3)
    y = torch.zeros(3, dtype=torch.long)
    d = defence_of(parts, norm=norm, eps=eps)
    for kind in mtl_reverse.ATTACKS:
        x_adv = attack(kind, x, y, seeds, d, 1.0)
        size = (x_adv - x).flatten(1).norm(dim=1, p=math.inf if norm == "linf" else 2)
        assert size.max() <= eps + 1e-5 and size.min() > 0 and x_adv.min() >= 0 and x_adv.max() <= 1, kind
        assert reverse(attack(kind, x[:0], y[:0], seeds[:0], d, 1.0), d, seeds[:0]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("kind", ["bpda", "unrolled"])
def test_adaptive_attacks_go_through_the_defence(parts, monkeypatch, kind):
    """From where pgd ended, along the mean gradient over draws: at reversed images, or through all steps."""
    classifier, _ = parts
    x, seeds = some_images()
    x = 0.2 + 0.6 * x
    y = classifier(x).argmax(1)
    d = defence_of(parts, eot=3, step_size=0.02)
    used = []
    monkeypatch.setattr(mtl_reverse, "reverse", lambda *a: used.append(a) or reverse(*a))
    got, x_pgd = attack(kind, x, y, seeds, d), attack("pgd", x, y, seeds, d)
    assert len(used) == 6  # three draws for the gradient, three to see how high the loss is
    own = tuple(mix_seeds(seeds, FOR_DEFENCE).tolist())
    assert len({tuple(s.tolist()) for _, _, s, *_ in used[:3]} | {own}) == 4  # the defence's own are others
    grad = 0
    for z, _, s, *_ in used[:3]:
        assert torch.allclose(z, x_pgd, atol=1e-6)
        z = z.detach().requires_grad_()
        if kind == "bpda":
            z = after = reverse(z, d, s).requires_grad_()
        else:
            after = reverse(z, d, s, DifferentiableStep.apply)
        grad = grad + torch.autograd.grad(ce_per_image(classifier(after), y).sum(), z)[0]
    want = torch.clamp(torch.clamp(x_pgd + 0.02 * grad.sign(), x - 0.1, x + 0.1), 0, 1)
    moved = (got - want).abs().amax((1, 2, 3)) < 1e-5  # of the two points, the one of higher loss counts
    assert ((got - x_pgd).abs().amax((1, 2, 3)) < 1e-5)[~moved].all() and moved.sum() >= 3


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_carmons_checkpoint_predicts_the_same(tmp_path, prefix):
    """One for normalised images is refused."""
    torch.manual_seed(0)
    more = dict(width=0.05, mean=(0.0,) * 3, std=(1.0,) * 3)
    ours, path = build_model("wrn10_10", {"class": 10}, **more).train(), tmp_path / "carmon.pt"
    ours(torch.rand(16, 3, 32, 32))
    theirs = {}
    for name, value in ours.eval().state_dict().items():
        name = re.sub(r"trunk\.layer(\d)", r"block\1.layer", name).replace("shortcut.1", "convShortcut")
        name = name.replace("heads.class", "fc").replace("trunk.bn", "bn1").removeprefix("trunk.")
        theirs |= {prefix + name: value} if name not in ("mean", "std") else {}
        theirs |= {prefix + "sub_" + name: value} if "block1" in name else {}
    assert {prefix + "block2.layer.0.convShortcut.weight", prefix + "fc.bias"} < theirs.keys()
    file = {"num_classes": 10, "state_dict": theirs, "normalize_input": False}
    torch.save(file if prefix else theirs, path)
    x, victim = torch.rand(5, 3, 32, 32), load_victim(path)
    assert torch.equal(rebuild(victim, path).eval()(x), ours(x))
    assert victim["source"] == ""  # it is not the paper's network
    torch.save(file | {"normalize_input": True}, path)
    with pytest.raises(UserError, match="normalize_input"):
        load_victim(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, results) of a run with all attackers."""
    out = tmp_path_factory.mktemp("mtl") / "run"
    return out, main(tiny(attacks=mtl_reverse.ATTACKS, epochs=2, out=str(out)))


def rows_of(results):
    return {(r["name"], r["attack"], r["lambda"]): r for r in results["rows"] if "correct" in r}


def test_rows(trained):
    """Columns have the strongest of their attacks and binomial errors; differences have paired errors."""
    folder, results = trained
    rows, found = rows_of(results), results["rows"]
    assert [name for name, *_ in rows] == 3 * ["none", "ssl", "mtl"] + ["none"] + 4 * ["ssl"] + 4 * ["mtl"]
    _, test = load_data("digits", "", torch.device("cpu"), image_size=8)
    some = draw(test, 20, seed=0).index
    correct = load_model(folder / "classifier.pt")(test.pixels[some] / 255).argmax(1) == test.labels[some]
    assert rows["none", "none", 0]["correct"] == "".join(str(int(c)) for c in correct)
    wanted = {"clean": ("none",), "pgd": ("pgd",), "defence-aware": ("pgd", "aware"), "suite": ("suite",)}
    wanted["adaptive"] = ("pgd", "aware", "suite", "bpda", "unrolled")
    bits = {}
    for cell in (r for r in found if r.get("kind") == "column"):
        name, column = cell["name"], cell["column"]
        mine = [r for r in rows.values() if r["name"] == name and r["attack"].split("-")[0] in wanted[column]]
        p = min(r["correct"].count("1") for r in mine) / 20
        assert cell["accuracy"] == pytest.approx(100 * p, abs=0.01)
        assert cell["se"] == pytest.approx(100 * math.sqrt(p * (1 - p) / 20), abs=0.01)
        strongest = rows[name, cell["strongest"], cell["lambda"]]
        assert strongest in mine and strongest["accuracy"] == cell["accuracy"]
        bits[name, column] = torch.tensor([float(c) for c in strongest["correct"]])
    assert len(bits) == 15
    for row in (r for r in found if r.get("kind") == "difference"):
        b, a = row["name"].split(" - ")
        d = 100 * (bits[b, row["column"]] - bits[a, row["column"]])
        assert row["difference"] == pytest.approx(d.mean().item(), abs=0.01)
        assert row["se"] == pytest.approx(d.std(correction=0).item() / math.sqrt(20), abs=0.01)


def test_branches_of_another_run(one_sentence, trained, tmp_path):
    """They give its numbers with its flags; refused are those for another classifier or other images."""
    folder, results = trained
    given = dict(victim=str(folder / "classifier.pt"), branches=str(folder), attacks=("pgd",))
    again = main(tiny(**given, temperature=9.0, out=str(tmp_path / "again")))
    assert again["args"]["temperature"] == 0.2 and len(rows_of(again)) == 6
    assert all(rows_of(results)[key]["correct"] == row["correct"] for key, row in rows_of(again).items())
    digits, _ = load_data("digits", "", torch.device("cpu"), image_size=8)
    victim, others = load_checkpoint(folder / "classifier.pt"), tmp_path / "others"
    others.mkdir()
    for task in TASKS:
        state = load_checkpoint(folder / f"{task}.pt")
        assert state["network"]["images"] == digits.digest
        save_checkpoint(others / f"{task}.pt", state | {"network": state["network"] | {"images": "others"}})
    another = {k: v + 1 if k == "heads.class.bias" else v for k, v in victim["model"].items()}
    for state, branches, told in (
        (victim, others, "rows.json"), (victim, others, "other images"),
        (victim | {"model": another}, folder, "another classifier"),
    ):  # fmt: skip
        save_checkpoint(tmp_path / "victim.pt", state)
        argv = ["--victim", tmp_path / "victim.pt", "--branches", branches, "--out", tmp_path / "run"]
        assert told in one_sentence(mtl_reverse, *flags(TINY), *argv)
        (others / "rows.json").write_text("[]")
