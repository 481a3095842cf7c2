"""jigsaw_at.py: the task. All else is the text of rotation_at.py, which a test here asserts; see test_rotation_at.py."""
import difflib
import json
import re

import pytest
import torch
from conftest import ROOT, TINY, flags, same_state

import jigsaw_at
import rotation_at
from common import UserError, jigsaw, jigsaw_permutations, l2_norm, load_checkpoint, pgd
from jigsaw_at import Args, main

TINY = TINY | {"num_permutations": 5}


def tiny(**changes) -> Args:
    return Args(**(TINY | changes))


# ---- permutations ----


@pytest.mark.parametrize(("n", "count"), [(4, 30), (2, 23), (3, 100), (2, 1)])
def test_permutation_sets(n, count):
    orders = jigsaw_permutations(n, count, seed=3)
    assert orders.shape == (count + 1, n * n)
    assert orders[0].tolist() == list(range(n * n))  # label 0 is the unshuffled image
    assert len({tuple(order) for order in orders.tolist()}) == count + 1
    assert all(sorted(order) == list(range(n * n)) for order in orders.tolist())
    assert torch.equal(orders, jigsaw_permutations(n, count, seed=3))
    if count < 23:
        assert not torch.equal(orders, jigsaw_permutations(n, count, seed=4)) or count == 1


def test_random_permutations_are_uniform():
    """Every tile lands in every place about equally often: 3,000 permutations of 16, expected 187.5 each."""
    orders = jigsaw_permutations(4, 3000)[1:]
    counts = torch.stack([(orders == tile).sum(0) for tile in range(16)]).float()
    chi2 = ((counts - 187.5) ** 2 / 187.5).sum().item()
    assert 150 < chi2 < 310  # 225 degrees of freedom: mean 225, standard deviation 21


# ---- T(.) ----


@pytest.mark.parametrize("n", [2, 4])
def test_jigsaw_against_a_loop(n):
    x = torch.rand(6, 3, 32, 32)
    order = torch.stack([torch.randperm(n * n) for _ in range(6)])
    t = 32 // n
    want = torch.empty_like(x)
    for i in range(6):
        for j in range(n * n):
            (r, c), (rr, cc) = divmod(j, n), divmod(order[i, j].item(), n)
            want[i, :, r * t : r * t + t, c * t : c * t + t] = x[i, :, rr * t : rr * t + t, cc * t : cc * t + t]
    assert torch.equal(jigsaw(x, order), want)
    assert torch.equal(jigsaw(want, order.argsort(1)), x)  # the inverse restores the image
    assert torch.equal(jigsaw(x, torch.arange(n * n).expand(6, -1)), x)
    with pytest.raises(ValueError, match="grid"):
        jigsaw(torch.rand(1, 3, 30, 30), torch.arange(16)[None])


def test_jigsaw_keeps_norms_and_commutes_with_projections():
    x, delta, order = torch.rand(5, 3, 32, 32), torch.randn(5, 3, 32, 32), torch.stack([torch.randperm(16) for _ in range(5)])
    assert torch.allclose(l2_norm(jigsaw(delta, order)), l2_norm(delta))
    assert torch.equal(jigsaw(delta, order).abs().amax((1, 2, 3)), delta.abs().amax((1, 2, 3)))
    assert torch.equal(jigsaw((x + delta.clamp(-0.1, 0.1)).clamp(0, 1), order), (jigsaw(x, order) + jigsaw(delta, order).clamp(-0.1, 0.1)).clamp(0, 1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacking_through_the_puzzle_is_attacking_the_solved_image(norm):
    """For a linear loss, the adversarial image of the shuffled image is the shuffled adversarial image."""
    x, w = torch.rand(4, 3, 32, 32), torch.randn(1, 3, 32, 32)
    order = torch.stack([torch.randperm(16) for _ in range(4)])
    kw = dict(eps=0.1, norm=norm, steps=5)
    plain = pgd(lambda z: (z * w).sum((1, 2, 3)), x, start=x, **kw)
    shuffled = jigsaw(x, order)
    through = pgd(lambda z: (jigsaw(z, order.argsort(1)) * w).sum((1, 2, 3)), shuffled, start=shuffled, **kw)
    assert torch.allclose(through, jigsaw(plain, order), atol=1e-6)


# ---- the script ----


def test_the_diff_to_rotation_at_is_the_task_and_nothing_else():
    """At most 60 changed lines: of the docstring, of the flags, and those that speak of the task."""
    a, b = ((ROOT / f"{name}.py").read_text() for name in ("rotation_at", "jigsaw_at"))
    changed = [line for line in difflib.unified_diff(a.splitlines(), b.splitlines(), n=0, lineterm="") if re.match(r"[+-](?![+-])", line)]
    assert len(changed) <= 60
    docs = "".join(text[: text.index('"""', 3)] for text in (a, b))
    odd = [line for line in changed if line[1:] not in docs and not re.search(r"rotat|jigsaw|permut|grid|order|tile|label 0|Eq. 1|val_fraction", line)]
    assert not odd


def test_pretraining_solves_puzzles(tmp_path):
    """P2 with jigsaw: 3 orders of 4 tiles are told apart far better than by chance (25%), clean."""
    args = dict(grid=2, num_permutations=3, pretrain="linf", epochs=8, val_fraction=0.15, variant="T0")
    main(tiny(out=str(tmp_path), **args))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[7]["stage"] == "pretrain" and lines[7]["val_clean"] > 60


def test_t0_is_that_of_rotation_at(tmp_path):
    """The baseline has no task: the same weights but for the head that is not used."""
    main(tiny(variant="T0", out=str(tmp_path / "jigsaw")))
    rotation_at.main(rotation_at.Args(**{k: v for k, v in TINY.items() if k != "num_permutations"}, variant="T0", out=str(tmp_path / "rotation")))
    a, b = (load_checkpoint(tmp_path / name / "best.pt")["model"] for name in ("jigsaw", "rotation"))
    assert same_state({k: v for k, v in a.items() if "jigsaw" not in k}, {k: v for k, v in b.items() if "rotation" not in k})


@pytest.mark.parametrize("changes", [dict(variant="T1"), dict(variant="T2", ss_attack="shared"), dict(variant="T3", ss_attack="both", norm="l2"), dict(variant="replace")])
def test_variants_train_both_heads(tmp_path, changes):
    main(tiny(epochs=1, out=str(tmp_path), **changes))
    torch.manual_seed(0)
    state = load_checkpoint(tmp_path / "best.pt")
    fresh = jigsaw_at.build_model(**state["network"]).state_dict()
    assert not torch.equal(fresh["heads.jigsaw.weight"], state["model"]["heads.jigsaw.weight"])


def test_wrong_grids(one_sentence, tmp_path):
    for more, match in (
        ({"grid": 3}, "--grid 3 does not divide"), ({"grid": 2, "num_permutations": 24}, "23 permutations besides the identity"),
        ({"grid": 1}, "0 permutations besides the identity"), ({"num_permutations": 0}, "--num-permutations"),
    ):  # fmt: skip
        assert match in one_sentence(jigsaw_at, *flags(TINY | more | {"out": tmp_path / "run"}))
    with pytest.raises(UserError):
        jigsaw_permutations(2, 24)
