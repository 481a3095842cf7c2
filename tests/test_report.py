"""results/report.py: merged seeds, paired differences, pages, and files that are not runs."""
import json
import math
import sys

import pytest
from conftest import ROOT, TINY

import chen_pretrain_finetune as chen
import rotation_at

sys.path.insert(0, str(ROOT / "results"))
import report  # noqa: E402


def run(accuracies: dict, script=rotation_at, seed=0, **changes) -> dict:
    """A run with the rows {(name, eps): accuracy}."""
    args = json.loads(json.dumps(vars(script.Args(seed=seed, **changes))))
    rows = []
    for (name, eps), accuracy in accuracies.items():
        about = {"attack": "pgd-20" if eps else "none", "norm": args["norm"], "eps": eps, "examples": 360}
        rows.append({"name": name, "accuracy": accuracy} | about)
    return {"script": script.__name__, "args": args, "device": "cpu", "rows": rows, "file": "a.json"}


def corrupted(name: str, accuracy: float, seed=0) -> dict:
    rows = [
        {"name": name, "attack": attack, "norm": "linf", "eps": eps, "examples": 60, "corruption": c,
         "severity": s, "accuracy": accuracy - 10 * s - 100 * eps, "paper": None}
        for c in ("fog", "snow") for s in (1, 3) for attack, eps in (("none", 0), ("pgd-20", 0.1))
    ]  # fmt: skip
    args = {"dataset": "digits", "severities": "1,3", "seed": seed, "generate": True}
    return {"script": "eval_cifar10c", "args": args, "device": "cpu", "rows": rows, "file": "c.json"}


def cells(text: str, name: str) -> list[str]:
    """The cells of the only line of this name."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_seeds_are_merged():
    """Mean and standard deviation by hand: of 80, 84, 82 they are 82 and sqrt((4 + 4 + 0) / 2) = 2."""
    runs = [run({("T3", 0.1): v}, seed=s, out=f"{s}", workers=s) for s, v in enumerate((80.0, 84.0, 82.0))]
    assert cells(report.tables(runs), "T3") == ["82.0 ± 2.0 (3)"] and "over seeds" in report.tables(runs)
    assert cells(report.tables(runs[:1]), "T3") == ["80.00"] and "1 seed" in report.tables(runs[:1])


def test_a_tiny_run_can_be_read(tmp_path, capsys):
    rotation_at.main(rotation_at.Args(**TINY | {"epochs": 1, "out": str(tmp_path / "run")}))
    (tmp_path / "unfinished").mkdir()
    capsys.readouterr()
    report.main(report.Args(results=(str(tmp_path / "run"), str(tmp_path / "unfinished"))))
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    out, err = capsys.readouterr()
    assert cells(out, "T3") == [f"{row['accuracy']:.2f}" for row in rows] and "unfinished" in err


def test_what_differs_in_more_than_the_seed_stays_apart():
    runs = [run({("T3", 0.1): 80.0}, seed=s, lambda1=v) for s, v in enumerate((0.5, 0.25))]
    text = report.tables(runs)
    assert cells(text, "T3 (--lambda1 0.5)") == cells(text, "T3 (--lambda1 0.25)") == ["80.00"]
    # What the caption says makes another table; another folder of images is another data set.
    others = [{"eps": 0.1}, {"epochs": 8}, {"width": 0.25}, {"dataset": "folder", "data_dir": "data/a"}]
    runs = [run({("T3", 0.1): 80.0}, **change) for change in ({}, *others)]
    assert len(report.groups_of(runs)) == 5


def test_a_run_named_twice_counts_once_and_a_contradiction_is_an_error():
    twice = [run({("T3", 0.1): 80.0}), run({("T3", 0.1): 80.0}, out="copy")]
    assert cells(report.tables(twice), "T3") == ["80.00"]
    with pytest.raises(report.UserError, match="flags and the seed of another run"):
        report.tables([run({("T3", 0.1): 80.0}), run({("T3", 0.1): 81.0})])
    double = run({("T3", 0.1): 80.0})
    double["rows"] *= 2
    with pytest.raises(report.UserError, match="two rows of 'T3'"):
        report.tables([double])


def test_severities_are_averaged_and_seeds_of_checkpoints_merged():
    """fog: (80 - 10 + 80 - 30) / 2 = 60, and 62 of the network of the other seed."""
    runs = [corrupted("T3-s0/best", 80.0), corrupted("T3-s1/best", 82.0)]
    text = report.tables(runs)
    assert cells(text, "fog") == ["61.0 ± 1.4 (2)", "51.0 ± 1.4 (2)"] and "severities 1,3" in text
    assert "| T3/best, clean | T3/best, linf 0.1 |" in text


def test_strengths_of_an_unforeseen_attack_are_averaged():
    rows = [{"name": "plain", "attack": kind, "norm": kind, "eps": eps, "strength": eps, "examples": 60,
             "accuracy": 90.0 - 10 * eps} for kind, eps in (("none", 0), ("fog", 1), ("fog", 3))]  # fmt: skip
    args = {"dataset": "digits", "seed": 0}
    text = report.tables([run({}) | {"script": "eval_unforeseen", "args": args, "rows": rows}])
    assert cells(text, "clean") == ["90.00"] and cells(text, "fog") == ["70.00"]  # (80 + 60) / 2


def test_the_papers_numbers_stand_below_runs_with_its_flags_only():
    full = {("T3", eps): 50.0 for eps in rotation_at.TABLE_EPS["linf"]}
    assert cells(report.tables([run(full)]), "the paper")[6] == "48.11"
    assert "the paper" not in report.tables([run(full, epochs=8)])
    rows = run({("rotation-P3F4", 0): 50.0, ("rotation-P3F4", 8 / 255): 40.0}, chen)
    rows["rows"] = [row | {"pick": pick} for pick in ("ta", "ra") for row in rows["rows"]]
    assert cells(report.tables([rows]), "the paper") == ["", "", "85.66", "50.40"]  # F4: epoch of best RA


def paired(runs: list[dict], pairs: str, **more) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in report.differences(runs, pairs, **more)[1])


def pair(differences: list, **more) -> str:
    """T3 - T0. Seeds differ by more than the variants, and come in another order."""
    t0 = [run({("T0", 0.1): 7.0 * s, ("T0", 0): 90.0}, seed=s, variant="T0") for s in range(len(differences))]
    t3 = [run({("T3", 0.1): 7.0 * s + d, ("T3", 0): 90.0}, seed=s) for s, d in enumerate(differences)]
    return paired(t0 + t3[::-1], "T3 - T0", **more)


def test_paired_differences_by_hand():
    """1, 2, 3, 4, 5: mean 3, sd sqrt(2.5), error sqrt(0.5) = 0.707. 3 / 0.707 = 4.24 > t(4) = 2.776."""
    (line,) = [line for line in pair([1.0, 2.0, 3.0, 4.0, 5.0]).splitlines() if "linf 0.1 |" in line]
    assert line == "| T3 - T0 | pgd-20 linf 0.1 | +3.0 ± 0.7 | 5 | shown |"
    assert "| -3.0 ± 0.7 | 5 | shown |" in pair([-1.0, -2.0, -3.0, -4.0, -5.0])
    assert "clean" not in pair([1.0, 2.0, 3.0], radius=0.1)
    with pytest.raises(report.UserError, match="two seeds"):
        pair([1.0])


@pytest.mark.parametrize("n, t", [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (30, 2.228)])
def test_the_interval_is_students(n, t):
    """`shown` is mean / error above t of n - 1 degrees of freedom; above 10 of them, of 10."""
    spread = [1.0, -1.0] * (n // 2) + [0.0] * (n % 2)
    error = math.sqrt(sum(v * v for v in spread) / (n - 1) / n)
    for factor, verdict in ((1.01, "| shown |"), (0.99, "| not shown |")):
        assert verdict in pair([t * factor * error + v for v in spread], radius=0.1)


def test_names_in_pairs():
    runs = [run({("rotation-P3F4", 0.1): 60.0 + s, ("P1F4", 0.1): 50.0}, chen, seed=s) for s in range(3)]
    assert "| P3F4 - P1F4 | pgd-20 linf 0.1 | +11.0 ± 0.6 | 3 | shown |" in paired(runs, "P3F4 - P1F4")
    two = [run({("T3", 0.1): 50.0}, seed=s) for s in range(2)]
    two += [r | {"script": "jigsaw_at"} for r in two]
    assert "+0.0 ± 0.0 | 2 | not shown" in paired(two, "jigsaw T3 - rotation T3")
    for pairs, told in ("T3 - T0", "'T3'.*rotation T3, jigsaw T3"), ("jigsaw T3", "write A - B"):
        with pytest.raises(report.UserError, match=told):
            paired(two, pairs)
    with pytest.raises(report.UserError, match="two seeds"):
        paired(two[::2], "jigsaw T3 - rotation T3")


def test_blocks_are_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    runs = [run({("T3", 0.1): 50.0 + s * s, ("plain", 0.1): 0.0}, seed=s) for s in range(3)]
    for result in runs:
        del result["file"]
    (tmp_path / "a.json").write_text(json.dumps(runs))
    rows = [{"name": "ours", "images_per_s": 1234.5, "ratio": 2.5}, {"name": "an accuracy", "accuracy": 1}]
    (tmp_path / "speed.json").write_text(json.dumps({"device": "CPU", "torch": "2.14+cpu", "rows": rows}))
    other = {"what": "this", "torch": "2", "table": [["x", "y"], ["1", "2"]]}
    (tmp_path / "b.json").write_text(json.dumps(other))
    page = "\n".join(f"text {i}\n\n<!-- {block} -->\n<!-- end -->" for i, block in enumerate((
        "from a.json", "paired a.json: T3 - plain at 0.1", "from speed.json", "from b.json")))  # fmt: skip
    made = report.fill(page + "\nlast\n")
    assert "| T3 | 51.7 ± 2.1 (3) |" in made and "| pgd-20 linf 0.1 | +51.7 ± 1.2 | 3 | shown |" in made
    assert "| ours | 1,234 | 2.50 |" in made and "this; torch 2." in made and "| 1 | 2 |" in made
    assert report.fill(made) == made and made.endswith("<!-- end -->\nlast\n") and made.count("text") == 4
    assert all(len(line) <= 120 or line.startswith("|") for line in made.splitlines())
    with pytest.raises(report.UserError, match="my page.*gone.json"):
        report.fill("<!-- from gone.json -->\n<!-- end -->", "my page")
    with pytest.raises(report.UserError, match="no <!-- end -->"):  # the text between would be lost
        report.fill("<!-- from a.json -->\nkeep me\n" + page)
