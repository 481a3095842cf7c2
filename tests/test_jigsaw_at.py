"""jigsaw_at.py: the task. All else is the text of rotation_at.py, as a test here asserts."""
import difflib
import itertools
import re

import pytest
import torch
from conftest import ROOT

from common import jigsaw, jigsaw_permutations
from jigsaw_at import Args, ss_task


def test_permutations_are_distinct_and_the_first_is_the_identity():
    for n, count in (4, 30), (2, 23), (3, 100):
        orders = jigsaw_permutations(n, count, seed=3)
        assert orders.shape == (count + 1, n * n) and orders[0].tolist() == list(range(n * n))
        assert len({tuple(order) for order in orders.tolist()}) == count + 1
        assert all(sorted(order) == list(range(n * n)) for order in orders.tolist())
    assert not torch.equal(jigsaw_permutations(4, 30, seed=3), jigsaw_permutations(4, 30, seed=4))


@pytest.mark.parametrize("n", [2, 4])
def test_the_task_against_a_loop(n):
    """T(x, k) puts the tiles of image i in order k[i]; label 0 leaves the image whole."""
    T, classes = ss_task(Args(grid=n, num_permutations=20, seed=3), torch.device("cpu"))
    orders, t = jigsaw_permutations(n, 20, seed=3), 32 // n
    x, k = torch.rand(6, 3, 32, 32), torch.tensor([0, 3, 20, 7, 1, 2])
    want = torch.empty_like(x)
    for i, j in itertools.product(range(6), range(n * n)):
        (r, c), (rr, cc) = ((t * v for v in divmod(tile, n)) for tile in (j, orders[k[i], j].item()))
        want[i, :, r : r + t, c : c + t] = x[i, :, rr : rr + t, cc : cc + t]
    assert classes == 21 and torch.equal(T(x, k), want) and torch.equal(want[0], x[0])
    assert torch.equal(jigsaw(want, orders[k].argsort(1)), x)  # the inverse restores the image


def test_the_diff_to_rotation_at_is_the_task_and_nothing_else():
    """At most 60 changed lines: of the docstring, of the flags, and those that speak of the task."""
    a, b = ((ROOT / f"{name}.py").read_text() for name in ("rotation_at", "jigsaw_at"))
    diff = difflib.unified_diff(a.splitlines(), b.splitlines(), n=0, lineterm="")
    changed = [line for line in diff if re.match(r"[+-](?![+-])", line)]
    docs = "".join(text[: text.index('"""', 3)] for text in (a, b))
    task = re.compile(r"rotat|jigsaw|permut|grid|order|tile|label 0|Eq. 1|val_fraction")
    assert len(changed) <= 60 and all(line[1:] in docs or task.search(line) for line in changed)
