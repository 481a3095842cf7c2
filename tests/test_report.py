"""report.py: what it reads, the numbers in its tables, and that its pictures show what they should."""
import json
import math
import re

import pytest
import torch
from conftest import ROOT, flags

import byorl
import report
from common import build_model, save_checkpoint
from jigsaw_at import Args as JigsawArgs
from rotation_at import PAPER, PAPER_EPS
from rotation_at import Args as RotationArgs


def result(script="rotation_at", name=None, accuracy=None, **changes) -> dict:
    args = vars((RotationArgs if script == "rotation_at" else JigsawArgs)(**changes))
    eps = PAPER_EPS[args["norm"]]
    accuracy = accuracy or [80.0 - 5 * i for i in range(len(eps))]
    rows = [{"name": name or args["variant"], "attack": "pgd-20" if e else "none", "norm": args["norm"], "eps": e, "examples": 10_000,
             "accuracy": a, "paper": None, "epoch": 1} for e, a in zip(eps, accuracy, strict=True)]  # fmt: skip
    return {"script": script, "args": args, "device": "", "torch": torch.__version__, "seconds": 1.0, "rows": rows}


def write(folder, *results):
    files = []
    for i, r in enumerate(results):
        (folder / f"{i}").mkdir()
        (folder / f"{i}" / "results.json").write_text(json.dumps(r))
        files.append(folder / f"{i}")
    return files


def line(text: str, table: str, row: str) -> list[str]:
    """The numbers of our row in a table."""
    part = text.split(f"## {table}")[1].split("\n## ")[0]
    (found,) = [x for x in part.splitlines() if x.startswith(f"| {row} | ours")]
    return [cell.strip() for cell in found.split("|")[3:-1]]


def test_tables_hold_the_papers_numbers_and_ours():
    found = report.curves([
        result(variant="T3"), result(variant="T0"), result("jigsaw_at", variant="T3", accuracy=[70.0 - i for i in range(9)]),
        result(variant="T0", name="P1 T0", accuracy=[60.0 - i for i in range(9)], pretrain="l2"),
        result(variant="T1", norm="l2", eps=0.5, accuracy=[50.0 - i for i in range(12)]),
    ])  # fmt: skip
    text = report.tables(found)
    for (norm, _, _), row in PAPER.items():
        assert " | ".join("" if v is None else f"{v:.2f}" for v in row) in text, norm
    assert "| Jigsaw | the paper | 83.90 | 72.39 | 67.91 | 63.18 | 57.99 | 52.89 | 47.57 | 42.31 | 37.66 |" in text
    assert line(text, "Table 1", "T1")[:3] == ["50.00", "49.00", "48.00"]
    assert line(text, "Table 2", "T3")[-1] == line(text, "Table 3", "Rotations")[-1] == line(text, "Table 4", "P0 T3")[-1] == "40.00"
    assert line(text, "Table 3", "Jigsaw")[0] == "70.00" and line(text, "Table 4", "P1 T0")[0] == "60.00"
    for table in ("Table 1", "Table 2", "Table 3", "Table 4"):  # a well-formed Markdown table
        rows = [x for x in text.split(f"## {table}")[1].split("\n## ")[0].splitlines() if x.startswith("|")]
        assert len({row.count("|") for row in rows}) == 1 and set(rows[1]) == {"|", "-"}


def test_seeds_are_averaged_and_settings_are_not():
    found = report.curves([
        result(seed=0, accuracy=[80.0] * 9), result(seed=1, accuracy=[84.0] * 9), result(seed=2, accuracy=[82.0] * 9, out="x"),
        result(seed=0, accuracy=[10.0] * 9, epochs=8), result("jigsaw_at", accuracy=[20.0] * 9),
    ])  # fmt: skip
    assert sorted((c.setting.split(", ")[2], c.mean(0)) for c in found) == [("100 epochs", 20.0), ("100 epochs", 82.0), ("8 epochs", 10.0)]
    text = report.tables(found)
    assert "82.00 ± 2.00" in text and "3 seeds" in text and "84.00" not in text


def test_what_is_not_another_seed_is_not_averaged(capsys):
    """The same run given twice, other starting points, other pre-training."""
    twice = [result(seed=0), result(seed=0, out="elsewhere")]
    (curve,) = report.curves(twice)
    assert len(curve.accuracy[0]) == 1 and "left out" in capsys.readouterr().out
    assert len(report.curves([result(name="init T0", init="a.pt"), result(name="init T0", init="b.pt", seed=1)])) == 2
    assert len(report.curves([result(name="P1 T0", pretrain="l2", pretrain_eps=e, seed=s) for s, e in enumerate((0.0, 1.0))])) == 2
    assert len(report.curves([result("jigsaw_at", grid=g) for g in (2, 4)])) == 2


def test_folders_are_not_seeds_of_each_other():
    runs = [result(dataset="folder", data_dir=f"/data/{name}", seed=i) for i, name in enumerate("ab")]
    assert sorted(c.setting.split(",")[0] for c in report.curves(runs)) == ["folder a", "folder b"]


def test_t1_without_its_loss_is_not_drawn_as_t0_beside_the_papers_t1(tmp_path, monkeypatch):
    """Figure 3's runs: one sweep over lambda1 and no pictures of variants."""
    drawn = []
    monkeypatch.setattr(report, "plot_curves", lambda lines, *a: drawn.append(list(lines)))
    report.curve_figures(report.curves([result(variant="T1", norm="l2", eps=0.5, lambda1=v) for v in (0.0, 0.25, 1.0)]), tmp_path)
    assert drawn == [["λ1 = 0 (T0)", "λ1 = 0.25", "λ1 = 1"]]


def test_other_radii_of_training_are_not_in_the_tables():
    assert "| ours" not in report.tables(report.curves([result(eps=4 / 255), result(norm="l2", eps=1.0)]))


def test_figures_draw_what_was_measured(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "plot_curves", lambda lines, *a: drawn.append((lines, *a)))
    runs = [result(variant="T0"), result("jigsaw_at", variant="T3")]
    runs += [result(variant="T1", lambda1=v, accuracy=[80 - 4 * v - 5 * i for i in range(9)]) for v in (0.25, 1.0)]
    report.curve_figures(report.curves(runs), tmp_path)
    (sweep,) = [lines for lines, *_ in drawn if "λ1 = 1" in lines]
    assert list(sweep) == ["λ1 = 0 (T0)", "λ1 = 0.25", "λ1 = 1"]
    assert sweep["λ1 = 1"][1][:2] == [76, 71]
    (variants,) = [lines for lines, *_ in drawn if "T3 jigsaw" in lines]
    assert {"T0", "T0, the paper", "T3 jigsaw", "T3 jigsaw, the paper"} <= set(variants)
    assert variants["T3 jigsaw, the paper"][1][6] == 47.57 and variants["T3 jigsaw, the paper"][2] == "--"


def corrupted() -> dict:
    rows = [{"name": n, "attack": k, "norm": "linf", "eps": 0.1, "examples": 9, "paper": None, "corruption": c, "severity": s,
             "accuracy": a - s, "generated": True}
            for n, a in (("plain", 60.0), ("T0", 80.0)) for k in ("none", "pgd-20") for c in ("fog", "snow") for s in (1, 5)]  # fmt: skip
    return {"script": "eval_cifar10c", "args": {"dataset": "digits", "generate": True, "severities": "1,5"}, "rows": rows}


def test_the_command_writes_what_the_runs_are_enough_for(tmp_path, command):
    pytest.importorskip("matplotlib")
    folders = write(tmp_path, result(variant="T0"), result(variant="T3"), corrupted())
    code, out, _ = command(report, *folders, "--out", tmp_path / "report")
    names = sorted(p.name for p in (tmp_path / "report").iterdir())
    assert code == 0 and len(names) == 3 and all(str(tmp_path / "report" / name) in out for name in names)
    assert names[0] == "kucer-corruptions-plain-T0.png" and names[1] == "kucer-tables.md" and "variants" in names[2]
    from PIL import Image

    for name in (names[0], names[2]):
        picture = Image.open(tmp_path / "report" / name).convert("RGB")
        assert picture.width > 500 and len(picture.getcolors(10**6)) > 50


def test_networks_of_one_name_stay_apart(tmp_path, monkeypatch):
    """Two evaluations of different networks in folders of the same name; and of one with another attack."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.axes

    bars = []
    real = matplotlib.axes.Axes.bar
    monkeypatch.setattr(matplotlib.axes.Axes, "bar", lambda self, x, height, *a, **k: bars.append((k["label"], height)) or real(self, x, height, *a, **k))
    other = corrupted()
    other["rows"] = [row | {"accuracy": row["accuracy"] / 2} for row in other["rows"]]
    report.figure4([corrupted(), other, corrupted()], tmp_path / "a.png")
    labels = [label for label, _ in bars]
    assert labels == ["plain (1)", "T0 (1)", "plain (2)", "T0 (2)"] * 2
    assert bars[1][1] == [77, 77] and bars[3][1] == [38.5, 38.5]


def test_mistakes_are_one_sentence(tmp_path, one_sentence):
    assert "there is no" in one_sentence(report, tmp_path / "nowhere")
    assert "no results.json found" in one_sentence(report)
    (tmp_path / "bad.json").write_text("[1]")
    assert "is not a results.json" in one_sentence(report, tmp_path / "bad.json")
    assert "unrecognized" in one_sentence(report, *flags({"epochs": 1}))


def test_the_results_in_the_repository_are_results():
    files = sorted((ROOT / "results").glob("*.json"))
    for r in report.read(tuple(map(str, files))):
        assert r["args"]["out"] == "" and not re.search(r"/(tmp|work|home|root)/", json.dumps(r))
        if r["args"]["dataset"] == "folder":
            assert "JPEG copy" in r["dataset_name"]


# ---- Gowal et al. ----


def byorl_result(seed=0, method="byorl", fractions=(0.01, 0.1, 1.0), base=50.0, **changes):
    args = vars(byorl.Args(seed=seed, method=method, norm="linf", eps=8 / 255, **changes))
    rows = []
    for f in fractions:
        for eps, accuracy in (0, base + 30 + 5 * f), (8 / 255, base + 5 * f + seed):
            encoder = method if args["eps"] else "byol"
            rows.append({
                "name": f"{encoder} {100 * f:g}%", "attack": "suite" if eps else "none", "norm": "linf", "eps": eps, "examples": 10_000,
                "accuracy": accuracy, "paper": (43.24 if eps else 80.80) if f == 1 and method == "byorl" else None, "label_fraction": f,
                "head": "robust" if method == "byorl" else "", "encoder": encoder, "extra_images": 0, "encoder_fraction": 1.0,
                "pretrained": {k: args[k] for k in ("dataset", "norm", "eps", "batch_size", "weight_decay", "seed")},
            })  # fmt: skip
    return {"script": "byorl", "args": args, "device": "CPU", "torch": "2", "seconds": 1.0, "rows": rows}


def test_gowal_table_and_figures(tmp_path, capsys):
    runs = [byorl_result(0), byorl_result(2), byorl_result(2), byorl_result(method="uat-ft", base=40.0), byorl_result(jitter_strength=0.3, fractions=(1.0,))]
    for i, run in enumerate(runs):
        (tmp_path / f"{i}.json").write_text(json.dumps(run))
    written = report.main(report.Args(results=tuple(str(tmp_path / f"{i}.json") for i in range(5)), out=str(tmp_path / "report")))
    assert "left out" in capsys.readouterr().out  # the third run
    text = (tmp_path / "report" / "gowal-table.md").read_text()
    assert "BYORL, robust head | 100% | 85.00 | 56.00 | 80.80 | 43.24 |" in text  # seeds 0 and 2: 55 and 57
    assert "UAT-FT | 1% | 70.05 | 40.05 |  |  |" in text and "--jitter-strength 0.3" in text and text.count("2 seeds") == 3
    names = [p.name for p in written]
    assert sum(n.startswith("gowal-labels-linf-8_255") for n in names) == 1  # BYORL and UAT-FT in one picture
    assert sum(n.startswith("gowal-jitter-linf-8_255") for n in names) == 1
    assert all((tmp_path / "report" / n).stat().st_size > 5000 for n in names if n.endswith(".png"))


def test_heads_on_other_encoders_are_other_heads(tmp_path):
    """Same flags of the run, another encoder: neither averaged nor left out."""
    for i, (seed, changes) in enumerate([(0, {}), (1, {"eps": 4 / 255}), (1, {"dataset": "cifar100"}), (1, {"seed": 1})]):
        run = byorl_result(seed, fractions=(1.0,))
        for row in run["rows"]:
            row["pretrained"] |= changes
        (tmp_path / f"{i}.json").write_text(json.dumps(run))
    report.main(report.Args(results=tuple(str(tmp_path / f"{i}.json") for i in range(4)), out=str(tmp_path / "report")))
    lines = (tmp_path / "report" / "gowal-table.md").read_text().splitlines()[6:]
    assert len(lines) == 4 - 1 and "2 seeds" in lines[0] and "from linf 4/255" in lines[1] and "from cifar100" in lines[2]


def test_landscape_of_a_linear_network():
    """Margins of a linear network are linear in u and v: every value by hand, and the worst point of the ball lies at u = 1."""
    torch.manual_seed(0)
    w = torch.randn(2, 3 * 4 * 4, dtype=torch.float64)
    x, y = torch.full((3, 3, 4, 4), 0.5, dtype=torch.float64), torch.tensor([0, 1, 0])

    def model(z):
        return z.flatten(1) @ w.T

    for norm, eps in ("linf", 0.05), ("l2", 0.3):
        axis, margins = report.landscape(model, x, y, eps, norm, points=5, reach=2.0)
        assert axis.tolist() == [-2, -1, 0, 1, 2] and margins.shape == (3, 5, 5)
        slope = w[0] - w[1]
        sign = torch.tensor([1, -1, 1])
        clean = sign * (x.flatten(1) @ slope)
        fall = eps * (slope.abs().sum() if norm == "linf" else slope.norm())  # the most that the ball allows
        assert torch.allclose(margins[:, 2, 2], clean) and torch.allclose(margins[:, 2, 3], clean - fall, atol=1e-3)
        v = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0)).to(x) * 2 - 1
        v = eps * v if norm == "linf" else eps * v / math.sqrt(48)
        along = sign * (v.flatten(1) @ slope)
        want = clean[:, None, None] - fall * axis[None, None, :] + along[:, None, None] * axis[None, :, None]
        assert torch.allclose(margins, want, atol=3e-3)


def test_landscape_picture_of_a_checkpoint(tmp_path, one_sentence):
    args = dict(dataset="digits", data_dir="", image_size=8, norm="l2", eps=0.5)
    model = build_model("preact18", {"class": 10}, width=1 / 16)
    save_checkpoint(tmp_path / "best.pt", {"network": model.spec, "model": model.state_dict(), "args": args})
    (path,) = report.main(report.Args(results=(str(tmp_path / "best.pt"),), out=str(tmp_path / "report")))
    assert path.name.startswith("landscape-") and path.stat().st_size > 20_000
    save_checkpoint(tmp_path / "none.pt", {"network": model.spec, "model": model.state_dict()})
    assert "no trained classifier" in one_sentence(report, str(tmp_path / "none.pt"), "--out", str(tmp_path / "r"))


def test_the_results_of_this_repository_can_be_reported(tmp_path):
    """Older files lack newer flags."""
    files = sorted(map(str, (ROOT / "results").glob("*.json")))
    written = report.main(report.Args(results=tuple(files), out=str(tmp_path)))
    assert {"kucer-tables.md", "gowal-table.md"} <= {p.name for p in written}
    assert "BYORL, plain head | 100% | 34.90 | 24.40" in (tmp_path / "gowal-table.md").read_text()
