"""report.py: what it reads, the numbers in its tables, and that its pictures show what they should."""
import json
import math
import re

import pytest
import torch
from conftest import ROOT, TINY, flags

import adv_mae
import byorl
import chen_pretrain_finetune as chen
import mtl_reverse
import report
import rotation_at
from common import build_model, save_checkpoint
from jigsaw_at import Args as JigsawArgs
from report import PAPER
from rotation_at import TABLE_EPS
from rotation_at import Args as RotationArgs


def result(script="rotation_at", name=None, accuracy=None, **changes) -> dict:
    args = vars((RotationArgs if script == "rotation_at" else JigsawArgs)(**changes))
    eps = TABLE_EPS[args["norm"]]
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


def test_a_run_as_it_is_written_can_be_read(tmp_path):
    rotation_at.main(rotation_at.Args(**TINY | {"epochs": 1, "out": str(tmp_path / "run")}))
    (found,) = report.read((str(tmp_path / "run"),))
    assert len(found["rows"]) == 2 and report.tables(report.curves([found]))


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
    assert len(report.curves([result(name="P1 T0", pretrain="l2", epochs=e, seed=s) for s, e in enumerate((100, 50))])) == 2
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
    rows = [{"name": n, "attack": k, "norm": "linf", "eps": 0.1, "examples": 9, "corruption": c, "severity": s,
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


def test_mistakes_are_one_sentence(tmp_path, one_sentence, capsys):
    assert "there is no" in one_sentence(report, tmp_path / "nowhere")
    assert "no results.json found" in one_sentence(report)
    (tmp_path / "bad.json").write_text("[1]")
    assert "is not a results.json" in one_sentence(report, tmp_path / "bad.json")
    assert len(report.read((str(tmp_path / "bad.json"), str(ROOT / "results" / "quick-byorl.json")))) == 1  # one damaged file does not hold up the others
    assert "bad.json is not a results.json" in capsys.readouterr().out
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
                "name": f"{encoder} {'robust ' * (method == 'byorl')}{100 * f:g}%", "attack": "suite" if eps else "none", "norm": "linf",
                "eps": eps, "examples": 10_000, "accuracy": accuracy, "epoch": 9, "label_fraction": f,
                "head": "robust" if method == "byorl" else "", "encoder": encoder,
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
    assert "does not say on which data" in one_sentence(report, str(tmp_path / "none.pt"), "--out", str(tmp_path / "r"))
    save_checkpoint(tmp_path / "pretrain.pt", {"network": model.spec, "model": model.state_dict(), "args": args, "stage": "pretrain"})
    assert "no finished classifier" in one_sentence(report, str(tmp_path / "pretrain.pt"), "--out", str(tmp_path / "r"))


def test_the_results_of_this_repository_can_be_reported(tmp_path):
    """Older files lack newer flags."""
    files = sorted(map(str, (ROOT / "results").glob("*.json")))
    written = report.main(report.Args(results=tuple(files), out=str(tmp_path)))
    assert {"kucer-tables.md", "gowal-table.md"} <= {p.name for p in written}
    assert "BYORL, plain head | 100% | 34.90 | 24.40" in (tmp_path / "gowal-table.md").read_text()


# ---- Chen et al. ----


ABOUT = {"attack": "pgd-20", "norm": "linf", "eps": 8 / 255, "examples": 10_000}
CLEAN = ABOUT | {"attack": "none", "eps": 0}


def cell(task, pair, ta, ra, epoch=50, pick="ta", images=45_000) -> list[dict]:
    rest = {"name": f"{task}-{pair}".removeprefix("-"), "task": task, "pair": pair, "pick": pick, "best_epoch": epoch, "epoch": epoch,
            "images": images if task else None}  # fmt: skip
    return [CLEAN | rest | {"accuracy": ta}, ABOUT | rest | {"accuracy": ra}]


def compared(joint: dict[tuple, float], models=("selfie-P3F4", "rotation-P3F4", "jigsaw-P3F4")) -> list[dict]:
    """Transfer and Venn rows; joint: {(made for, evaluated) or (made for, evaluated, the other): share fooled}."""
    rows = []
    for (source, target, *other), share in joint.items():
        names = {"source": models[source], "target": models[target]} | ({"other": models[other[0]]} if other else {})
        rows.append(ABOUT | {"kind": "venn" if other else "transfer", "name": " -> ".join(names.values()), "accuracy": 100 - share} | names)
    return rows


def average(models: tuple[str, ...], ta: float, ra: float) -> list[dict]:
    names = {"kind": "average", "models": list(models), "name": " + ".join(models)}
    return [CLEAN | names | {"accuracy": ta}, ABOUT | names | {"accuracy": ra}]


def chen_result(*rows: list[dict], **changes) -> dict:
    return {"script": "chen_pretrain_finetune", "args": vars(chen.Args(**changes)), "device": "CPU", "torch": "2", "seconds": 1.0, "rows": sum(rows, [])}


def chen_text(*results: dict) -> str:
    return report.chen_tables(report.chen_settings(list(results)))


ASR = {(0, 0): 48.0, (0, 1): 38.0, (0, 2): 37.0, (0, 1, 2): 24.5, (1, 0): 36.0, (1, 1): 49.0, (1, 2): 39.5, (1, 0, 2): 30.0,
       (2, 0): 35.0, (2, 1): 36.0, (2, 2): 51.0, (2, 0, 1): 35.0}  # fmt: skip


def table3(seed=0, **changes) -> dict:
    """All cells of Table 3, transfer, Figure 5 and Table 6; `seed` is added to all accuracies."""
    rows = []
    for (task, pair), (ta, ra, epoch) in report.CHEN_PAPER.items():
        if pair in report.PAIRS and task not in ("se", "dpe"):
            rows += cell(task, pair, ta - 1 + seed, ra - (ra > 0) + seed, epoch + seed)
            rows += cell(task, pair, 1.0, 1.0, epoch, "ra")
    models = [f"{task}-P3F4" for task in chen.TASKS]
    for chosen in ((0,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
        rows += average([models[i] for i in chosen], 85.0 + seed, 50.0 + len(chosen) + seed)
    return chen_result(rows, compared({k: v - seed for k, v in ASR.items()}), table3=True, seed=seed, **changes)


def test_chen_tables_hold_the_papers_numbers():
    ours = [cell(t, p, 50, 20) for t in chen.TASKS for p in chen.PAIRS if p[:2] != "P1"]
    ours += [cell("", "P1F4", 50, 20), compared({(0, 0): 40.0}), average(("a", "b"), 60, 30)]
    text = chen_text(chen_result(*ours), chen_result(cell("rotation", "P3F2", 50, 20), pretrain_images=30_000))
    for pair in chen.PAIRS:
        known = [report.CHEN_PAPER["" if pair[:2] == "P1" else task, pair] for task in chen.TASKS]
        assert f"| {pair} | the paper | " + " | ".join(f"{ta:.2f} | {ra:.2f} | {e}" for ta, ra, e in known) + " |" in text
    table5 = text.split("## Table 5")[1].split("\n## ")[0]
    assert "| jigsaw | the paper | 83.74 | 48.83 | 48 |" in table5 and "84.50 | 49.61" not in table5
    for name, key in ("AP+SE", "se"), ("AP+DPE", "dpe"):
        assert f"| {name} | the paper | " + " | ".join(f"{v:.2f}" for v in report.CHEN_PAPER[key, "P3F4"][:2]) + " | " in table5
    for known in "| rotation | 38.92 | 49.60 | 38.12 |", "| jigsaw + rotation + selfie | the paper | 86.04 | 54.64 |":
        assert known in text
    assert "| 150,000 | the paper | 67.73 | 30.24 | 95 | 85.18 | 50.61 | 55 |" in text
    for table in text.split("\n## ")[1:]:  # well-formed Markdown tables
        for part in table.split("\n\n"):
            rows = [x for x in part.splitlines() if x.startswith("|")]
            assert len({row.count("|") for row in rows}) <= 1 and (not rows or set(rows[1]) == {"|", "-"})


def test_chen_tables_hold_our_numbers_and_average_seeds():
    dpe, se = (chen_result(cell("ensemble", "P3F4", 70, 40, e), task="ensemble", dpe_lambda=v) for v, e in ((0.1, 56), (0.0, 47)))
    text = chen_text(table3(0), table3(2), dpe, se, chen_result(cell("rotation", "P3F4", 60, 30), task="rotation", seed=1))
    assert line(text, "Table 3", "P3F4") == ["86.02 ± 1.41", "51.05 ± 1.41", "51 ± 1", "77.11 ± 14.85", "43.60 ± 11.82", "48 ± 2",
                                             "84.50 ± 1.41", "49.61 ± 1.41", "49 ± 1"]  # fmt: skip
    assert "2-3 seeds" in text and "| P1F3 | ours: cifar10, resnet50v2 x1, 100 epochs, PGD-20 linf 8/255, 2 seeds |" in text
    assert line(text, "Table 3", "P1F4") == ["84.72 ± 1.41", "47.22 ± 1.41", "100 ± 1"] * 3
    assert line(text, "Table 5", "AP+DPE") == ["70.00", "40.00", "56"] and line(text, "Table 5", "AP+SE") == ["70.00", "40.00", "47"]
    asr = text.split("## Table 4")[1].split("\n## ")[0].split("ours: ")[1]
    assert "| evaluated | made for selfie-P3F4 | made for rotation-P3F4 | made for jigsaw-P3F4 |" in asr
    assert "| rotation-P3F4 | 37.00 ± 1.41 | 48.00 ± 1.41 | 35.00 ± 1.41 |" in asr
    assert line(text, "Table 6", "selfie-P3F4 + rotation-P3F4 + jigsaw-P3F4") == ["86.00 ± 1.41", "54.00 ± 1.41"]
    assert line(text, "Table 6", "selfie-P3F4") == ["86.00 ± 1.41", "52.00 ± 1.41"]
    assert "Table 7" not in text and "Table 8" not in text


def test_the_checkpoint_of_best_clean_accuracy_is_reported():
    rows = cell("rotation", "P3F4", 80, 40), cell("rotation", "P3F4", 75, 45, pick="ra")
    assert line(chen_text(chen_result(*rows)), "Table 3", "P3F4")[3:6] == ["80.00", "40.00", "50"]


def test_chen_settings_are_not_averaged(capsys):
    """Other flags, another start, other epochs of pre-training, another lambda, other checkpoints: all are rows of their own."""

    def run(seed, ra, task="rotation", pair="P3F4", **changes):
        return chen_result(cell(task, pair, 80, ra), seed=seed, **changes)

    runs = [run(0, 10), run(1, 12), run(2, 14, eps=4 / 255), run(3, 16, init="a/pretrain-P3-rotation.pt"), run(4, 18, pretrain_epochs=5),
            run(5, 20, extra_data="tiny.npz"), run(6, 21, dataset="folder", data_dir="x/a")]  # fmt: skip
    text = chen_text(*runs)
    ours = [x.split("|")[2:] for x in text.split("## Table 5")[0].splitlines() if x.startswith("| P3F4 | ours")]
    assert [x[5].strip() for x in ours] == ["11.00 ± 1.41", "16.00", "18.00", "14.00", "20.00", "21.00"]
    for x, word in zip(ours, ("2 seeds", "--init a/pretrain-P3-rotation.pt", "--pretrain-epochs 5", "linf 4/255", "--extra-data tiny.npz", "folder a"), strict=True):
        assert word in x[0]
    ensembles = enumerate((0.1, 0.5, 0.0))
    text = chen_text(*(chen_result(cell("ensemble", "P3F4", 80, 10 + i), seed=i, task="ensemble", dpe_lambda=v) for i, v in ensembles))
    assert text.count("| AP+DPE | ours") == 2 and "--dpe-lambda 0.5" in text and "| AP+SE | ours" in text and "±" not in text.split("## Table 5")[1]
    ones = [chen_result(average(("x", "y"), 80, ra), models=(f"{where}/x.pt", f"{where}/y.pt"), seed=i)
            for i, (where, ra) in enumerate((("a", 30), ("a", 34), ("b", 50)))]  # fmt: skip
    text = chen_text(*ones)
    assert "checkpoints of a, 2 seeds | 80.00 ± 0.00 | 32.00 ± 2.83 |" in text and "checkpoints of b, 1 seed | 80.00 | 50.00 |" in text
    # P1 has no pre-training, so that its epochs make no other setting; the same run twice is taken once.
    capsys.readouterr()
    text = chen_text(run(0, 10, "", "P1F4"), run(1, 12, "", "P1F4", pretrain_epochs=5), run(1, 99, "", "P1F4"))
    assert "10.00" not in text and "11.00 ± 1.41" in text and "left out" in capsys.readouterr().out


def test_sizes_of_pre_training():
    """Table 7: by number of images; it is not there for runs on all images only."""
    runs = [chen_result(cell("rotation", "P3F4", 80, 10 + i, images=n or 45_000), cell("rotation", "P3F2", 70, 5, images=n or 45_000), pretrain_images=n)
            for i, n in enumerate((0, 30_000, 5_000))]  # fmt: skip
    table = chen_text(*runs).split("## Table 7")[1].split("\n## ")[0]
    assert re.findall(r"\| ([\w,]+), rotation \| ours", table) == ["5,000", "30,000", "45,000"]
    assert "--pretrain-images 5000, 1 seed | 70.00 | 5.00 | 50 | 80.00 | 12.00 | 50 |" in table
    assert "## Table 7" not in chen_text(runs[0])


def test_chen_pictures_show_what_was_measured(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.axes

    calls = []
    for kind in ("scatter", "text", "bar", "axvline", "axhline"):
        real = getattr(matplotlib.axes.Axes, kind)
        monkeypatch.setattr(matplotlib.axes.Axes, kind, lambda *a, kind=kind, real=real, **k: calls.append((kind, a[1:], k)) or real(*a, **k))
    ensemble = chen_result(cell("ensemble", "P3F4", 83, 52, 56), task="ensemble")
    settings = report.chen_settings([table3(0), table3(2), ensemble])
    (path,) = report.summary_figures(settings, tmp_path)  # runs of one setting, one picture
    points = {k["label"]: a for kind, a, k in calls if kind == "scatter" and "label" in k}
    hollow = [a[:2] for kind, a, k in calls if kind == "scatter" and k.get("facecolors") == "none"]
    assert points["selfie (51)"][:2] == pytest.approx((86.02, 51.05)) and points["AP+DPE (56)"][:2] == (83, 52)
    assert points["average of jigsaw, rotation, selfie (147)"][:2] == (86, 54) and points["P1F4 (no pre-training) (100)"][:2] == pytest.approx((84.72, 47.22))
    sizes = [points[name][2] for name in ("rotation (47)", "AP+DPE (56)", "P1F4 (no pre-training) (100)", "average of jigsaw, rotation, selfie (147)")]
    assert sizes == sorted(sizes) and len(points) == 9
    assert sorted(hollow) == sorted([(84.72, 47.22), (86.02, 51.05), (85.66, 50.40), (83.74, 48.83), (83.00, 52.22), (85.36, 53.08), (85.64, 53.32),
                                     (86.51, 53.83), (86.04, 54.64)])  # fmt: skip
    lines = [(kind, a[0]) for kind, a, _ in calls if kind.startswith("ax")]
    assert lines == [("axvline", pytest.approx(84.72)), ("axhline", pytest.approx(47.22))]
    calls.clear()
    report.summary_figures(report.chen_settings([table3(width=0.5)]), tmp_path)
    assert not [k for kind, _, k in calls if kind == "scatter" and k.get("facecolors") == "none"]

    calls.clear()
    report.venn_figures([table3()], tmp_path)
    words = [a[2].replace("\n", " ") for kind, a, _ in calls if kind == "text"]
    assert words[:5] == ["only 13.50%", "rotation-P3F4 38.00%", "only 12.50%", "jigsaw-P3F4 37.00%", "24.50%"] and len(words) == 15


def test_circles_have_the_areas_asked_for():
    for a, b, both in (39, 38, 24), (10, 40, 3), (20, 20, 20), (30, 10, 10), (30, 10, 0), (0, 10, 0):
        r, q, d = report.circles(a, b, both)
        n = 400
        y, x = torch.meshgrid(torch.linspace(-4, 12, 4 * n), torch.linspace(-4, 12, 4 * n), indexing="ij")
        one, other = x**2 + y**2 < r * r, (x - d) ** 2 + y**2 < q * q
        share = [float(v.sum()) * (16 / (4 * n - 1)) ** 2 for v in (one, other, one & other)]
        assert share == pytest.approx((a, b, both), abs=0.3), (a, b, both)


def test_chen_files_are_written_as_far_as_there_are_runs(tmp_path, command):
    pytest.importorskip("matplotlib")
    runs = [table3(), chen_result(cell("rotation", "P3F4", 80, 40), norm="l2")]
    folders = write(tmp_path, *runs)
    for i, names in enumerate((["summary", "tables", "venn"], ["tables"])):
        code, _, _ = command(report, folders[i], "--out", tmp_path / f"report{i}")
        files = sorted((tmp_path / f"report{i}").iterdir())
        assert code == 0 and [f.name.split("-")[1].split(".")[0] for f in files] == names and all(f.name.startswith("chen-") for f in files)
        for file in files:
            if file.suffix == ".png":
                from PIL import Image

                picture = Image.open(file).convert("RGB")
                assert picture.width > 500 and len(picture.getcolors(10**6)) > 50


def test_incomplete_chen_results_are_refused(tmp_path, one_sentence):
    complete = table3()["rows"]
    for row in [complete[0], *({r["kind"]: r for r in complete if "kind" in r}.values())]:
        for key in {"pair", "pick", "best_epoch", "images", "target", "other", "models", "accuracy"} & row.keys():
            (tmp_path / "bad.json").write_text(json.dumps(chen_result([{k: v for k, v in row.items() if k != key}])))
            assert "is not a results.json" in one_sentence(report, tmp_path / "bad.json")
    for rows in compared({(0, 1, 2): 20.0}), [complete[0] | {"kind": "new"}]:  # the Venn picture needs the success rates too
        (tmp_path / "bad.json").write_text(json.dumps(chen_result(rows)))
        assert "is not a results.json" in one_sentence(report, tmp_path / "bad.json")


# ---- Rebuffi et al. ----


def tuned(method="mae", eps=0.5, norm="l2", gamma=0.75, clean=None, robust=None, seed=0, checkpoint="", epochs=800, **changes) -> dict:
    """A results.json of adv_mae.py with one network; clean: {set: accuracy}, robust: {radius: accuracy}."""
    args = vars(adv_mae.Args(seed=seed, init="x", data_dir="imagenet", **changes))
    pretrained = {"method": method, "norm": norm, "eps": eps, "epochs": epochs}
    row = {"name": "a", "norm": "l2", "examples": 100, "epoch": 1, "recipe": args["recipe"], "layer_decay": gamma, "pretrained": pretrained, "checkpoint": checkpoint or f"{method}-{norm}-{eps}-{gamma}-{seed}.pt"}
    rows = [row | {"attack": "none", "eps": 0, "set": s, "accuracy": a} for s, a in (clean or {"test": 80.0}).items()]
    rows += [row | {"attack": "pgd-20", "eps": e, "set": "test", "accuracy": a} for e, a in (robust or {}).items()]
    return {"script": "adv_mae", "args": args, "device": "", "torch": "", "seconds": 1.0, "rows": rows}


def corruptions_of(checkpoints: dict[str, float]) -> dict:
    """A results.json of eval_cifar10c.py: {checkpoint: its mean over 15 types}."""
    row = {"attack": "none", "norm": "l2", "eps": 0, "examples": 100, "paper": None}
    rows = [row | {"name": f"n{i}", "corruption": what, "severity": s, "accuracy": a + d} for i, a in enumerate(checkpoints.values()) for what, s, d in (("fog", 1, 5), ("mean of 15", "all", 0))]
    return {"script": "eval_cifar10c", "args": {"dataset": "folder", "generate": False, "checkpoints": [*checkpoints]}, "rows": rows}


def test_rebuffi_table_averages_and_subtracts():
    results = [
        tuned(clean={"test": 80.0, "a": 40.0}, robust={0.5: 30.0}, checkpoint="runs/x/a.pt"), tuned(clean={"test": 82.0, "a": 42.0}, robust={0.5: 34.0}, seed=1, checkpoint="runs/y/a.pt"),
        tuned("supervised", 0.0, gamma=None, clean={"test": 70.0, "a": 20.0}, checkpoint="runs/z/s.pt", epochs=300), tuned(eps=0.0, clean={"test": 79.0, "a": 31.0}, checkpoint="runs/w/a.pt"),
        corruptions_of({"runs/z/s.pt": 30.0, "runs/x/a.pt": 60.0, "runs/y/a.pt": 62.0}),
    ]  # fmt: skip
    groups = report.tuned_networks(results)
    assert len(groups) == 1
    text = report.rebuffi_table(groups)
    rows = {tuple(c.strip() for c in line.split("|")[1:4]): [c.strip() for c in line.split("|")[4:-1]] for line in text.splitlines() if line.startswith("|")}
    assert rows["pre-training", "epochs", "γ"] == ["test", "a", "average", "minus scratch", "PGD-20 l2 0.5"]  # corruptions are not of all
    assert rows["MAE l2 0.5", "800", "0.75"] == ["81.00 ± 1.41", "41.00 ± 1.41", "61.00", "+16.00", "32.00 ± 2.83"]
    assert rows["supervised nominal", "300", ""] == ["70.00", "20.00", "45.00", "+0.00", ""]
    assert rows["MAE nominal", "800", "0.75"] == ["79.00", "31.00", "55.00", "+10.00", ""]
    (networks,) = report.tuned_networks(results[:3] + results[4:]).values()
    assert report.shared_sets(networks) == ["test", "a", "corruptions"]
    assert {t.name: t.clean["corruptions"] for t in networks} == {"MAE l2 0.5": [60.0, 62.0], "supervised nominal": [30.0]}


def test_a_network_evaluated_twice_counts_once():
    (networks,) = report.tuned_networks([tuned(seed=0), tuned(seed=1), tuned(seed=0)]).values()
    assert [len(network.clean["test"]) for network in networks] == [2]


def test_best_gamma_counts():
    (networks,) = report.tuned_networks([tuned(gamma=g, clean={"test": a}) for g, a in ((0.65, 70.0), (0.75, 72.0), (0.85, 71.0))]).values()
    assert [t.gamma for t in report.best(networks, ["test"])] == [0.75]


def test_rebuffi_figures_are_drawn(tmp_path, monkeypatch):
    """Which lines and cells they hold."""
    results = [
        tuned(m, eps, "l2", gamma, {"test": 80 + 10 * gamma - eps, "a": 40.0}, {0.5: 50.0 - 10 * gamma + eps, 1.0: 20.0})
        for m in ("mae", "byol") for eps in (0.0, 0.5, 1.0) for gamma in (0.65, 0.75)
    ]  # fmt: skip
    results.append(tuned("supervised", 0.0, gamma=None, clean={"test": 78.0, "a": 38.0}))
    drawn = {}
    monkeypatch.setattr(report, "save", lambda figure, path: drawn.__setitem__(path.name.split("-")[1], figure))
    paths = report.rebuffi_figures(report.tuned_networks(results), tmp_path)
    assert {p.name.split("-")[1] for p in paths} == {"eps", "methods", "gamma", "robust"} == drawn.keys()
    (ax,) = drawn["eps"].axes  # no linf run, no panel
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["MAE"].get_xdata().tolist() == [0, 0.5, 1] and lines["MAE"].get_ydata().tolist() == pytest.approx([(87.5 - e + 40) / 2 - 58 for e in (0, 0.5, 1)])
    cells = [t.get_text() for t in drawn["methods"].axes[0].texts]
    assert cells == ["87.5", "87.0", "87.5", "87.0", *["40.0"] * 4, "63.8", "63.5", "63.8", "63.5"]  # test, a, average
    assert [ax.get_title() for ax in drawn["gamma"].axes] == ["MAE l2 0.5", "BYOL l2 0.5"]
    assert len(drawn["robust"].axes) == 2 and len(drawn["robust"].axes[0].lines) == 4
    assert drawn["robust"].axes[0].lines[0].get_ydata().tolist() == [86.0, 44.0, 20.0]


def test_filters_of_vits_are_drawn(tmp_path, capsys):
    model = build_model("vit_mini4", {})
    for name in "ab":
        save_checkpoint(tmp_path / f"{name}.pt", {"network": model.spec, "model": model.state_dict()})
    written = report.main(report.Args(results=(str(tmp_path / "a.pt"), str(tmp_path / "b.pt")), out=str(tmp_path / "out")))
    assert [p.name for p in written] == ["rebuffi-filters.png"] and written[0].stat().st_size > 1000


def test_a_damaged_result_of_adv_mae_is_refused(one_sentence, tmp_path):
    result = tuned()
    del result["rows"][0]["layer_decay"]
    (folder,) = write(tmp_path, result)
    assert "is not a results.json" in one_sentence(report, folder)


# ---- Lawhon et al. ----


def reversal(**changes) -> dict:
    """A results.json of mtl_reverse.py."""
    args = json.loads(json.dumps(vars(mtl_reverse.Args(**changes))))
    cell = {"lambda": 0.0, "norm": "linf", "examples": 400, "se": 2.5, "epoch": 1}
    rows = [{"name": n, "attack": a, "eps": e, "accuracy": v} | cell for n, a, e, v in (("none", "none", 0, 90.0), ("none", "pgd-10", 0.03, 60.0), ("mtl", "aware-10", 0.03, 55.5))]
    rows += [{"kind": "column", "name": n, "column": c, "strongest": "pgd", "lambda": 0.0, "examples": 400, "accuracy": v, "se": 1.25}
             for n, c, v in (("none", "clean", 90.0), ("none", "pgd", 60.0), ("mtl", "clean", 88.0), ("mtl", "pgd", 61.5))]  # fmt: skip
    rows.append({"kind": "difference", "name": "mtl - none", "column": "pgd", "examples": 400, "difference": 1.5, "se": 0.75})
    rows += [{"kind": "losses", "name": "mtl", "task": t, "images": i, "mean": 1.0 + j, "values": [0.5 + j, 1.5 + j]}
             for t in mtl_reverse.TASKS for j, i in enumerate(("clean", "attacked", "reversed"))]  # fmt: skip
    return {"script": "mtl_reverse", "args": args, "device": "", "torch": "", "seconds": 1.0, "rows": rows}


def test_lawhon_table():
    text = report.lawhon_table([reversal(victim="carmon2019.pt", weights=(1.0, 2.5, 3.0))])
    assert "## cifar10, carmon2019.pt, attacked with linf 8/255, 400 test images, --weights 1,2.5,3" in text
    for row in (
        "| none | 90.00 ± 1.25 | 60.00 ± 1.25 |", "| mtl | 88.00 ± 1.25 | 61.50 ± 1.25 |", "| mtl - none |  | +1.50 ± 0.75 |", "| mtl | aware-10, λ 0 | 55.50 ± 2.50 |",
        "| mtl | rotation | 1.000 | 2.000 | 3.000 |",
    ):  # fmt: skip
        assert row in text, row
    for table in text.split("\n\n"):
        rows = [x for x in table.splitlines() if x.startswith("|")]
        assert len({x.count("|") for x in rows}) <= 1


def test_lawhon_figures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(report, "save", lambda figure, path: drawn.append(figure))
    paths = report.lawhon_figures([reversal()], tmp_path)
    assert [p.name.split("-")[1] for p in paths] == ["losses"]
    (histograms,) = drawn
    assert [ax.get_title() for ax in histograms.axes] == [f"mtl: {t} loss (dotted: mean)" for t in mtl_reverse.TASKS]


def test_a_damaged_result_of_mtl_reverse_is_refused(one_sentence, tmp_path):
    for i, damage in enumerate((lambda r: r["rows"][0].pop("se"), lambda r: r["rows"][-1].pop("values"), lambda r: r["args"].pop("victim"))):
        broken = reversal()
        damage(broken)
        (tmp_path / f"{i}.json").write_text(json.dumps(broken))
        assert "not a results.json" in one_sentence(report, tmp_path / f"{i}.json", "--out", tmp_path / "out")


def test_blocks_of_a_readme_are_made_from_files(tmp_path, command, capsys):
    """Numbers come from the files, whatever stood there; other text stays; twice is once. A file that is missing is one sentence."""
    row = {"name": "T0", "attack": "none", "norm": "linf", "eps": 0, "examples": 50, "accuracy": 12.34, "paper": None, "epoch": 3}
    args = vars(rotation_at.Args()) | {"data_dir": "x"}
    run = {"script": "rotation_at", "args": args, "device": "d", "torch": "t", "seconds": 1.0, "rows": [row, row | {"eps": 8 / 255, "attack": "pgd-20", "accuracy": 5.67}]}
    step = {"name": "ours", "images_per_s": 12.5, "ratio": 3.0, "peak_mb": 1234, "gflops_per_image": 2.5, "matmul_tflops_per_s": 0.9, "share_of_matmul_peak": 0.61}
    for name, content in {"run": run, "speed": {"benchmark": "b.py", "device": "CPU", "torch": "2.14.1+cu130", "rows": [step, {"name": "other"}]},
                          "table": {"table": [["a", "b"], ["1", "2"]]}}.items():  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    page = tmp_path / "page.md"
    page.write_text("one 99.99\n<!-- from run.json -->\n99.99\n<!-- end -->\ntwo\n<!-- from speed.json -->\n<!-- end -->\n<!-- from table.json -->\nold\n<!-- end -->\n")
    code, _, _ = command(report, "--readme", page)
    text = page.read_text()
    assert code == 0 and text.startswith("one 99.99\n") and text.count("99.99") == 1
    assert "T0, epoch 3  12.34   5.67" in text and "results.json" not in text
    assert "| `b.py` | ours | CPU, torch 2.14.1 | 12.5 | 3.00 | 1,234 | 2.5 | 61% of 0.9 TFLOP/s |" in text and "| other |" not in text
    assert "| a | b |\n|---|---|\n| 1 | 2 |" in text
    command(report, "--readme", page)
    assert page.read_text() == text
    page.write_text("<!-- from nowhere.json -->\n<!-- end -->\n")
    code, _, err = command(report, "--readme", page)
    assert code == 1 and err.startswith("error: a block wants nowhere.json")


def test_runs_of_other_scripts_are_left_out(tmp_path, capsys):
    (tmp_path / "mine.json").write_text(json.dumps({"script": "my_at", "args": {}, "rows": [{}]}))
    with pytest.raises(report.UserError, match="no results"):
        report.read((str(tmp_path / "mine.json"),))
    assert "left out" in capsys.readouterr().out
