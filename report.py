"""The papers' tables (Markdown) and figures (PNG) from the results.json files of any runs.

    python report.py runs/*                      # every run in runs/; writes report/
    python report.py results/*.json --out report
    python report.py --readme README.md          # rewrites the numbers and tables in it from the files that it names

Kucer et al. 2021 (rotation_at.py, jigsaw_at.py, eval_cifar10c.py):

    kucer-tables.md     Tables 1-4, the paper's rows above ours; runs that differ in nothing but the seed are averaged
    kucer-lambda-*.png       Figures 1 and 3: T1 for several lambda1 (0: T0), one picture per task, norm, radius and setting
    kucer-variants-*.png     the same for T0 ... T3 and both tasks; dashed: the paper's Tables 1-3
    kucer-corruptions-*.png  Figure 4: accuracy per type of corruption, clean above, attacked below

Gowal et al. 2021 (byorl.py):

    gowal-table.md           all heads: clean and robust accuracy, the paper's beside them
    gowal-labels-*.png       Figures 3, 4, 6, 7, 8: accuracy over the label fraction
    gowal-jitter-*.png       Figure 5: accuracy over --jitter-strength
    landscape-*.png          Figures 9 and 10 for any checkpoint: python report.py runs/X/byorl-robust-100%.pt

Chen et al. 2020 (chen_pretrain_finetune.py):

    chen-tables.md           Tables 3-8, as far as there are runs of ours, below the paper's rows
    chen-summary-*.png       Figure 1: robust over clean accuracy; the larger a marker, the more epochs; hollow: the paper
    chen-venn-*.png          Figure 5: which images, attacked for one model, fool two others; one picture per results.json

Rebuffi et al. 2023 (adv_mae.py; byorl.py's encoders fine-tuned by it):

    rebuffi-table.md         all fine-tuned networks: accuracy per test set, average, minus that of training from scratch, Table 1's number
    rebuffi-eps-*.png        Figure 1: average accuracy over the radius of the attack in pre-training, that of the best gamma
    rebuffi-methods-*.png    Figure 2: test sets by ways of pre-training, each with its best radius and gamma
    rebuffi-gamma-*.png      Figure 3: test sets by gamma (--layer-decay), one panel per encoder
    rebuffi-robust-*.png     Figure 5: accuracy over the radius of the attack on the fine-tuned network, one line per gamma
    rebuffi-filters.png      Figure 4 for any checkpoints of ViTs: python report.py runs/X/mae.pt runs/X/a-mae.pt

Lawhon et al. 2022 (mtl_reverse.py):

    lawhon-table.md          Table 1 per run, with standard errors and paired differences, all attacks, the losses before and after
    lawhon-losses-*.png      histograms of the tasks' losses of clean, attacked and reversed images

This is the only file that needs matplotlib; without it only the tables are written.
"""
import contextlib
import io
import json
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import adv_mae
import byorl
import chen_pretrain_finetune
import eval_cifar10c
import jigsaw_at
import mtl_reverse
import rotation_at
from common import (
    VITS, UserError, apgd, batches, ce_per_image, check_classifier, cli, eps_name, grouped_bars, l2_norm, load_checkpoint, load_data,
    margin, paper_numbers, rebuild, results_table, write_atomically,
)  # fmt: skip
from chen_pretrain_finetune import TASKS
from rotation_at import TABLE_EPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


SCRIPTS = {s.__name__: s for s in (rotation_at, jigsaw_at, byorl, chen_pretrain_finetune, adv_mae, mtl_reverse, eval_cifar10c)}


@dataclass
class Args:
    results: tuple[str, ...] = ()  # results.json files, or folders of runs, or checkpoints (*.pt) whose loss landscape (classifiers) or filters (ViTs) are wanted
    out: str = "report"  # folder to write to; files in it are replaced
    readme: str = ""  # a Markdown file: what stands between <!-- from results/X.json --> and <!-- end --> is made anew from those files, and nothing else is done


# What may differ between two runs that are averaged or drawn as one line: the seed, and where and how they were computed.
NOT_THE_SETTING = {
    "seed", "out", "resume", "device", "workers", "data_dir", "data_mirror", "compile", "plain", "quick", "init",
    "eval_eps", "pretrain", "pretrain_eps", "pretrain_epochs", "stage", "label_fractions", "heads",
}  # fmt: skip

# What names a run by itself, so that a setting's description need not.
NAMED = {"dataset", "arch", "width", "epochs", "norm", "eps", "variant", "eval_steps", "eval_attack", "method", "extra_data"}
JIGSAW_ONLY = {"grid", "num_permutations", "permutations"}
# chen_pretrain_finetune.py: which cells a run fills or compares, and what matters to some of them only (see `text_of`).
CHEN_CELLS = {"task", "pretrain", "finetune", "table3", "dpe_lambda", "models", "init"}
# What its rows hold besides, by kind; those of Table 3 have none.
CHEN_ROWS = {
    None: {"task", "pair", "pick", "best_epoch", "images"}, "transfer": {"source", "target"}, "venn": {"source", "target", "other"},
    "average": {"models"},
}  # fmt: skip
# The same of mtl_reverse.py.
LAWHON_ROWS = {
    None: {"name", "attack", "lambda", "eps", "examples", "accuracy", "se"}, "column": {"name", "column", "strongest", "examples", "accuracy", "se"},
    "difference": {"name", "column", "difference", "se"}, "losses": {"name", "task", "images", "mean", "values"},
}  # fmt: skip


# ---- reading -------------------------------------------------------------------------------------------------------


def read(paths: tuple[str, ...]) -> list[dict]:
    """The results of all runs named. Raises UserError if none of them can be read."""
    files = []
    for path in map(Path, paths):
        files += [path / "results.json"] if path.is_dir() and (path / "results.json").exists() else [path] if path.is_file() else []
        if not path.exists():
            raise UserError(f"there is no {path}; name results.json files or folders of runs.")
    results, damaged = [], []
    for file in files:
        try:
            result = json.loads(file.read_text())
            if isinstance(result, dict) and {"benchmark", "table"} & result.keys():
                print(f"left out: {file} is a benchmark's, for --readme.")
                continue
            if result["script"] not in SCRIPTS:
                print(f"left out: {file} is of {result['script']}.py, which report.py does not know.")
                continue
            needed = {"name", "attack", "norm", "eps", "examples", "accuracy"}
            args = {"dataset", "generate"} if result["script"] == "eval_cifar10c" else {"dataset", "arch", "epochs", "norm", "eps", "seed", "quick"}
            if result["script"] == "adv_mae":
                needed |= {"set", "recipe", "layer_decay", "pretrained", "checkpoint"}
                args |= {"recipe", "width"}
                if not all({"method", "norm", "eps", "epochs"} <= row["pretrained"].keys() for row in result["rows"]):
                    raise ValueError
            if result["script"] == "chen_pretrain_finetune":
                args |= {"models", "init", "dpe_lambda", "pretrain_images", "extra_data"}
                made = {(row.get("source"), row.get("target")) for row in result["rows"] if row.get("kind") == "transfer"}
                for row in result["rows"]:
                    if not CHEN_ROWS[row.get("kind")] <= row.keys():
                        raise ValueError
                    if row.get("kind") == "venn" and not {(row["source"], row["target"]), (row["source"], row["other"])} <= made:
                        raise ValueError
            if result["script"] == "mtl_reverse":
                args, needed = set(vars(mtl_reverse.Args())), set()
                if not all(LAWHON_ROWS[row.get("kind")] <= row.keys() for row in result["rows"]):
                    raise ValueError
            if not result["rows"] or not args <= result["args"].keys() or not all(needed <= row.keys() for row in result["rows"]):
                raise ValueError
        except (OSError, ValueError, AttributeError, TypeError, KeyError):
            damaged.append(f"{file} is not a results.json of these scripts.")
            continue
        results.append(result)
    if damaged and not results:
        raise UserError(damaged[0])
    for told in damaged:
        print(f"left out: {told}")
    if not results:
        raise UserError("no results.json found; name the files or the folders of finished runs, such as runs/*.")
    return results


def own_args(result: dict) -> Any:
    """The flags of a run as its script's Args; of an older run without those that have gone since."""
    cls = SCRIPTS[result["script"]].Args
    its = {k: tuple(v) if isinstance(v, list) else v for k, v in result["args"].items()}
    return cls(**{f.name: its[f.name] for f in fields(cls) if f.name in its})


def dataset_name(result: dict) -> str:
    """What was trained on; a file's own `dataset_name` (such as 'CIFAR-10 (JPEG copy)') wins."""
    a = result["args"]
    return result.get("dataset_name", f"folder {Path(a['data_dir']).name}" if a["dataset"] == "folder" else a["dataset"])


def unusual(result: dict, names: Iterable[str]) -> list[str]:
    """Those of the flags `names` that a run has set to something else than usual, as one types them."""
    args = result["args"]
    script = SCRIPTS[result["script"]]
    usual = vars(script.Args()) | (script.Args.QUICK if args["quick"] else {})
    parts = []
    for k in names:
        v, flag = args[k], k.replace("_", "-")
        if isinstance(v, list):  # tuples are lists in JSON
            v, usual[k] = (",".join(f"{x:g}" if isinstance(x, float) else str(x) for x in values) for values in (v, usual.get(k, v)))
        if v != usual.get(k, v):
            parts.append((f"--{flag}" if v else f"--no-{flag}") if isinstance(v, bool) else f"--{flag} {v:g}" if isinstance(v, float) else f"--{flag} {v}")
    return parts


def describe(result: dict) -> str:
    """The setting of a run in a few words, for tables and legends."""
    a = result["args"]
    attack = f"PGD-{a['eval_steps']}" if a.get("eval_attack", "pgd20") == "pgd20" else a["eval_attack"]
    unsaid = NOT_THE_SETTING | NAMED
    if result["script"] == "chen_pretrain_finetune":  # whose tables have no place of their own for these
        attack += f" {a['norm']} {eps_name(a['eps'])}"
        unsaid = (unsaid | CHEN_CELLS) - {"extra_data"}
    network = [f"{a['arch']} x{a['width']:g}", f"{a['uat_epochs' if a.get('method') == 'uat-ft' else 'epochs']} epochs"]
    parts = [dataset_name(result), *([] if a.get("models") else network), attack, *(["--quick"] if a["quick"] else [])]  # models: have their own
    return ", ".join(parts + unusual(result, [k for k in a if k not in unsaid]))


def mean_sd(values: Iterable[float], digits: int = 2) -> str:
    """'47.57', or '47.57 ± 0.31' (standard deviation over seeds), or '' if there are none."""
    values = list(values)
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}" if values else ""


def count_seeds(*counts: int) -> str:
    """'1 seed', '3 seeds', or '1-3 seeds' where the numbers beside it are of so many."""
    return f"{'-'.join(map(str, sorted({min(counts), max(counts)})))} seed{'s' if max(counts) > 1 else ''}"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    header = list(header)
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows)])


@dataclass
class Curve:
    """Accuracy over the radius of the attack, of all runs that differ in the seed only."""

    script: str
    name: str  # of the row: T0, P1 T3, plain, ...
    args: dict
    setting: str
    accuracy: dict[float, list[float]]  # radius: one accuracy per seed
    seeds: set[int]

    def mean(self, eps: float) -> float:
        return fmean(self.accuracy[eps])

    def show(self, eps: float) -> str:
        return mean_sd(self.accuracy.get(eps, []))


def curves(results: list[dict]) -> list[Curve]:
    """All accuracy curves of the training scripts, seeds gathered."""
    found: dict[str, Curve] = {}
    for result in results:
        if result["script"] not in ("rotation_at", "jigsaw_at"):
            continue
        args = result["args"]
        for name in dict.fromkeys(row["name"] for row in result["rows"]):
            ignored = NOT_THE_SETTING - ({"init"} if name.startswith("init ") else set())
            ignored = ignored - ({"data_dir"} if args["dataset"] == "folder" else set())
            same = {k: v for k, v in args.items() if k not in ignored} | {"task": result["script"], "name": name}
            key = json.dumps([same, dataset_name(result)], sort_keys=True)
            curve = found.setdefault(key, Curve(result["script"], name, args, describe(result), defaultdict(list), set()))
            if args["seed"] in curve.seeds:
                print(f"left out: another run of {name} with the same arguments and seed ({curve.setting}, seed {args['seed']}).")
                continue
            curve.seeds.add(args["seed"])
            for row in result["rows"]:
                if row["name"] == name:
                    curve.accuracy[row["eps"]].append(row["accuracy"])
    return list(found.values())


# ---- tables --------------------------------------------------------------------------------------------------------


def kucer_numbers(script: str) -> dict[tuple[str, str, str], list[float | None]]:
    """{(norm, pre-training, variant): accuracies} of Kucer et al.'s tables, from results/paper.txt."""
    found = {}
    for line in (Path(__file__).resolve().parent / "results" / "paper.txt").read_text().splitlines():
        if line.startswith(script):
            _, flags, name, numbers = (part.strip() for part in line.split("|"))
            pretrain = {"P1": "l2", "P2": "linf"}.get(name.split()[0], "none")
            key = "l2" if "norm=l2" in flags else "linf", pretrain, name.split()[-1]
            found[key] = [None if v == "-" else float(v) for v in numbers.split()]
    return found


PAPER, JIGSAW_PAPER = kucer_numbers("rotation_at"), kucer_numbers("jigsaw_at")
TRAINED_AT = {"l2": 0.5, "linf": 8 / 255}
# Table 4 gives P0 T0 another time, from another run than Table 2.
TABLE4_P0T0 = [85.29, 71.90, 66.63, 60.96, 55.42, 49.52, 44.01, 39.28, 34.41]
ROTATION, JIGSAW, EITHER = ("rotation_at",), ("jigsaw_at",), ("rotation_at", "jigsaw_at")
# Table: (norm, caption, [(row, scripts, name in results.json, the paper's numbers)])
TABLES = {
    "Table 1": ("l2", "Rotation, l2, trained at 0.5", [
        (v, EITHER if v == "T0" else ROTATION, v, PAPER["l2", "none", v]) for v in ("T0", "T1", "T2", "T3")
    ]),
    "Table 2": ("linf", "Rotation, linf, trained at 8/255", [
        (v, EITHER if v == "T0" else ROTATION, v, PAPER["linf", "none", v]) for v in ("T0", "T1", "T2", "T3")
    ]),
    "Section 3.2": ("linf", "Rotated images in place of the upright ones (eq. 7), linf, trained at 8/255", [
        ("replace", ROTATION, "replace", PAPER["linf", "none", "replace"]),
    ]),
    "Table 3": ("linf", "Tasks (T3), linf, trained at 8/255", [
        ("Baseline", EITHER, "T0", JIGSAW_PAPER["linf", "none", "T0"]),
        ("Rotations", ROTATION, "T3", PAPER["linf", "none", "T3"]),
        ("Jigsaw", JIGSAW, "T3", JIGSAW_PAPER["linf", "none", "T3"]),
    ]),
    "Table 4": ("linf", "Pre-training (ours: with rotation), linf, trained at 8/255", [
        ("P0 T0", ROTATION, "T0", TABLE4_P0T0),
        ("P1 T0", ROTATION, "P1 T0", PAPER["linf", "l2", "T0"]),
        ("P2 T0", ROTATION, "P2 T0", PAPER["linf", "linf", "T0"]),
        ("P0 T3", ROTATION, "T3", PAPER["linf", "none", "T3"]),
        ("P1 T3", ROTATION, "P1 T3", PAPER["linf", "l2", "T3"]),
        ("P2 T3", ROTATION, "P2 T3", PAPER["linf", "linf", "T3"]),
    ]),
}  # fmt: skip


def tables(found: list[Curve]) -> str:
    """Tables 1-4 in Markdown: the paper's row, then ours, one per setting."""
    text = ["# Kucer et al. 2021, Tables 1-4\n", "Accuracy in percent over the radius of the attack; ± is the standard deviation over seeds."]
    for table, (norm, caption, rows) in TABLES.items():
        eps, radius = TABLE_EPS[norm], TRAINED_AT[norm]
        lines = []
        for label, scripts, name, paper in rows:
            lines.append([label, "the paper", *("" if v is None else f"{v:.2f}" for v in paper)])
            for curve in found:
                if curve.script in scripts and curve.name == name and (curve.args["norm"], curve.args["eps"]) == (norm, radius):
                    lines.append([label, f"ours: {curve.setting}, {count_seeds(len(curve.seeds))}", *map(curve.show, eps)])
        text.append(f"\n## {table}: {caption}\n\n" + markdown(["", "setting", *map(eps_name, eps)], lines))
    return "\n".join(text) + "\n"


# ---- figures -------------------------------------------------------------------------------------------------------


def pyplot() -> ModuleType:
    """matplotlib.pyplot, drawing to files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: "Figure", path: Path) -> None:
    """Write a picture and forget it."""
    write_atomically(path, lambda f: figure.savefig(f, dpi=110, format="png"))
    pyplot().close(figure)


def plot_curves(lines: dict[str, tuple[list[float], list[float], str]], train_eps: float, norm: str, title: str, path: Path) -> None:
    """Figure 3: all curves above; below, the difference to the first line up to the radius of training, the curves around it,
    and the curves beyond. lines: {label: (radii, accuracies, matplotlib style)}; the first is the baseline."""
    plt = pyplot()
    scale, unit = (255, " (in 255ths)") if norm == "linf" else (1, "")
    figure = plt.figure(figsize=(9, 7), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=[3, 2])
    top = figure.add_subplot(grid[0, :])
    below = [figure.add_subplot(grid[1, i]) for i in range(3)]
    baseline = dict(zip(*next(iter(lines.values()))[:2], strict=True))
    color = {}
    for label, (eps, accuracy, style) in lines.items():
        own = label.removesuffix(", the paper")  # the paper's line has the colour of ours
        look = dict(color=color.setdefault(own, f"C{len(color) % 10}"), linestyle=style, marker="o", markersize=3)
        curve = list(zip(eps, accuracy, strict=True))
        top.plot([e * scale for e in eps], accuracy, label=label, **look)
        if style == "-":
            near = [(e * scale, a - baseline[e]) for e, a in curve if e in baseline and e <= train_eps + 1e-9]
            below[0].plot(*zip(*near, strict=True), **look)
        for ax, low, high in ((below[1], 0.5 * train_eps, 1.5 * train_eps), (below[2], train_eps, math.inf)):
            part = [(e * scale, a) for e, a in curve if low - 1e-9 <= e <= high + 1e-9]
            if part:
                ax.plot(*zip(*part, strict=True), **look)
    for ax in below:  # nothing to see if the attack went no farther than in training, or there is only the baseline
        if all(len(line.get_xdata()) < 2 for line in ax.lines) or (ax is below[0] and len(ax.lines) < 2):
            ax.set_visible(False)
    for ax in [top, *below]:
        ax.axvline(train_eps * scale, color="grey", linewidth=0.8, linestyle=":")
        ax.set_xlabel(f"radius of the attack, {norm}{unit}")
        ax.grid(alpha=0.3)
    top.set(ylabel="accuracy (%)", title=textwrap.fill(title, 100))
    top.legend(fontsize=8, ncols=2)
    below[0].set(ylabel=f"accuracy minus that of\n{next(iter(lines))} (points)", title="difference, up to training radius")
    below[1].set(ylabel="accuracy (%)", title="around it (dotted)")
    below[2].set(ylabel="accuracy (%)", title="beyond")
    save(figure, path)


def points(curve: Curve) -> tuple[list[float], list[float]]:
    """Radii and mean accuracies."""
    eps = sorted(curve.accuracy)
    return eps, [curve.mean(e) for e in eps]


def same_but(curve: Curve, *free: str) -> str:
    """A key that is equal for curves whose arguments differ in `free` only."""
    args = {k: v for k, v in curve.args.items() if k not in NOT_THE_SETTING | set(free) | JIGSAW_ONLY}
    return json.dumps([args, curve.setting.split(",")[0]], sort_keys=True)


VARIED = ("--lambda", "--ss-attack", "--grid", "--num-perm", "--perm")  # flags that differ within a figure


def curve_figures(found: list[Curve], out: Path) -> list[Path]:
    """Figures 1 and 3 (lambda1 varied in T1), and the like for the variants. Returns what was written."""
    written = []
    groups = defaultdict(list)
    for curve in found:
        if curve.name in ("T0", "T1", "T2", "T3"):
            groups["variants", same_but(curve, "variant", "lambda2", "ss_attack")].append(curve)
        if curve.name in ("T0", "T1"):  # T0 has no task
            for task in (curve.script,) if curve.name == "T1" else EITHER:
                groups[f"lambda-{task}", same_but(curve, "variant", "lambda1", "lambda2", "ss_attack")].append(curve)
    for (kind, _), group in groups.items():
        if kind != "variants" and not any(curve.name == "T1" for curve in group):
            continue
        group.sort(key=lambda c: (c.name, c.script != "rotation_at", c.args["lambda1"]))
        norm, eps = group[0].args["norm"], group[0].args["eps"]
        dataset = group[0].setting.split(",")[0].lower().replace("-", "")
        lines = {}
        for curve in group:
            zero = curve.name == "T0" or curve.args["lambda1"] == 0
            if kind == "variants" and zero and curve.name != "T0":
                continue  # T1 with lambda1 = 0 is T0, and would stand beside the paper's T1
            if kind != "variants":
                label = "λ1 = 0 (T0)" if zero else f"λ1 = {curve.args['lambda1']:g}"
            else:
                own = [part for part in curve.setting.split(", ") if part.startswith(VARIED)]
                label = " ".join([curve.name, curve.script.removesuffix("_at"), *own]) if not zero else "T0"
            if label in lines:
                print(f"not drawn, as {label} is there already: {curve.setting}")
                continue
            lines[label] = (*points(curve), "-")
            table = PAPER if curve.script == "rotation_at" else JIGSAW_PAPER
            paper = table.get((norm, "none", curve.name)) if eps == TRAINED_AT[norm] else None
            of_its_size = curve.args["arch"] == "resnet18" and curve.args["width"] == 1 and (dataset + " ").startswith("cifar10 ")
            usual = zero or (curve.args["lambda1"], curve.args["lambda2"]) == (0.5, 0.5)
            if kind == "variants" and paper and of_its_size and usual:  # beside a miniature the paper's lines would only flatten ours
                lines[f"{label}, the paper"] = (TABLE_EPS[norm], paper, "--")
        if sum(style == "-" for _, _, style in lines.values()) < 2:
            continue  # nothing to compare with
        setting = ", ".join(part for part in group[0].setting.split(", ") if not part.startswith(VARIED))
        path = unused(out / file_name(f"kucer-{kind}-{norm}-{eps_name(eps)}-{setting}"), written)
        plot_curves(lines, eps, norm, f"{setting}, trained with {norm} eps {eps_name(eps)}", path)
        written.append(path)
    return written


def file_name(text: str) -> str:
    """A name for a picture: only harmless characters, not too long."""
    return re.sub(r"[^\w.-]+", "_", text.replace("--", ""))[:120] + ".png"


def unused(path: Path, taken: list[Path]) -> Path:
    """`path`, or with -2, -3, ... if it is taken."""
    first, k = path, 2
    while path in taken:
        path, k = first.with_stem(f"{first.stem}-{k}"), k + 1
    return path


SAME_CORRUPTIONS = [
    "dataset", "data_dir", "generate", "seed", "image_size", "corruptions", "severities", "norm", "eps", "eval_attack", "eval_steps",
    "eval_examples", "eval_amp",
]  # fmt: skip


def figure4(results: list[dict], path: Path) -> None:
    """Bars per type of corruption (mean over severities), one colour per network: clean above, attacked below.

    results: those of eval_cifar10c.py. Dashed lines are the means the paper gives, where the setting is its own.
    """
    plt = pyplot()
    rows, seen = [], []
    for i, result in enumerate(results):
        mine = {row["name"] for row in result["rows"]}
        others = {row["name"] for j, other in enumerate(results) if j != i for row in other["rows"]}
        if result["rows"] in seen:
            continue  # the same run, named twice
        seen.append(result["rows"])
        rows += [row | {"name": f"{row['name']} ({i + 1})"} if row["name"] in mine & others else row for row in result["rows"]]
    cells = [row for row in rows if row["severity"] != "all"]
    names = list(dict.fromkeys(row["name"] for row in cells))
    types = list(dict.fromkeys(row["corruption"] for row in cells))
    panels = [clean for clean in (True, False) if any((row["attack"] == "none") == clean for row in cells)]
    figure, axes = plt.subplots(len(panels), 1, figsize=(max(6, 0.55 * len(types) + 1), 3 * len(panels) + 1), sharex=True, squeeze=False, layout="constrained")
    for ax, clean in zip(axes[:, 0], panels, strict=True):
        mine = [row for row in cells if (row["attack"] == "none") == clean]
        heights = defaultdict(list)
        for name in names:
            for kind in types:
                values = [row["accuracy"] for row in mine if (row["name"], row["corruption"]) == (name, kind)]
                heights[name].append(fmean(values) if values else 0)
        grouped_bars(ax, types, heights)
        for i, name in enumerate(names):
            for row in rows:
                if row["severity"] == "all" and row["paper"] and row["name"] == name and (row["attack"] == "none") == clean:
                    ax.axhline(row["paper"], color=f"C{i % 10}", linestyle="--", linewidth=1, label=f"{name}, the paper's mean")
                    break
        balls = dict.fromkeys(f"{row['norm']} {eps_name(row['eps'])}" for row in mine)
        what = "clean" if clean else f"under {mine[0]['attack'].upper()}\n{', '.join(balls)}; {mine[0]['examples']:,} images"
        ax.set_ylabel(f"accuracy (%) {what}")
    args = results[0]["args"]
    made = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}.get(args["dataset"], dataset_name(results[0]))
    if args["generate"]:
        made = f"{dataset_name(results[0])}, generated corruptions, not the official ones"
    axes[0, 0].set_title(f"{made}; mean over severities {args['severities']}")
    legend = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(legend.values(), legend.keys(), fontsize=9, ncols=4, loc="outside lower center")
    save(figure, path)


# ---- Gowal et al. --------------------------------------------------------------------------------------------------


@dataclass
class Head:
    """A classifier's accuracy in runs that differ in the seed only."""

    result: dict  # of the first such run
    row: dict  # its robust row
    clean: list[float]
    robust: list[float]
    paper: tuple[float | None, float | None]
    seeds: set[int]

    def name(self) -> str:
        """'BYORL, robust head', 'cifar10 UAT-FT 100% +500000, robust head'."""
        encoder = re.sub("byorl|byol|uat-ft", lambda found: found[0].upper(), self.row["encoder"])
        return encoder + (f", {self.row['head']} head" if self.row["head"] else "")

    def key(self, *free: str) -> str:
        """Equal for heads that differ in the arguments and keys `free` only."""
        args = {k: v for k, v in self.result["args"].items() if k not in NOT_THE_SETTING | set(free) | {"init", "extra_data", "method", "eps"}}
        row = {k: self.row[k] for k in ("encoder", "head", "label_fraction", "eps") if k not in free}
        return json.dumps([args, row, dataset_name(self.result)], sort_keys=True)


def all_heads(results: list[dict]) -> list[Head]:
    """Those of all runs of byorl.py, seeds gathered."""
    found: dict[str, Head] = {}
    for result in results:
        for clean, robust in zip(result["rows"][::2], result["rows"][1::2], strict=True) if result["script"] == "byorl" else []:
            known = paper_numbers("byorl", own_args(result), robust["name"]) or ["", ""]
            new = Head(result, robust, [], [], tuple(float(v) if v else None for v in known), set())
            head, seed = found.setdefault(new.key(), new), result["args"]["seed"]
            if seed in head.seeds:
                print(f"left out: {clean['name']} of another run with the same arguments and seed ({describe(result)}, seed {seed}).")
                continue
            head.seeds.add(seed)
            head.clean.append(clean["accuracy"])
            head.robust.append(robust["accuracy"])
    return list(found.values())


def gowal_table(heads: list[Head]) -> str:
    """All heads in Markdown, the paper's numbers beside them."""
    rows = []
    for h in heads:
        seeds = f", {count_seeds(len(h.clean))}" if len(h.clean) > 1 else ""
        rows.append([
            describe(h.result) + seeds, f"{h.row['norm']} {eps_name(h.row['eps'])}", h.name(), f"{100 * h.row['label_fraction']:g}%",
            f"{fmean(h.clean):.2f}", f"{fmean(h.robust):.2f}", *("" if v is None else f"{v:.2f}" for v in h.paper),
        ])  # fmt: skip
    header = ["setting", "ball", "encoder, head", "labels", "clean", "robust", "paper: clean", "paper: robust"]
    return "# Gowal et al. 2021\n\nAccuracy in percent; means over seeds.\n\n" + markdown(header, rows) + "\n"


def accuracy_figures(heads: list[Head], over: str, out: Path) -> list[Path]:
    """Robust accuracy on the left, clean on the right, over the label fraction or --jitter-strength; one line per encoder and head,
    a picture per setting. Stars are the paper's numbers. Returns what was written."""
    plt = pyplot()
    labels = over == "label_fraction"
    groups, written = defaultdict(list), []
    for head in heads:
        groups[head.key(over, "encoder", "head", "eps", "dataset") + f"{head.row['eps']}"].append(head)
    for group in groups.values():
        lines = defaultdict(list)
        for head in group:
            share = "" if labels else f", {100 * head.row['label_fraction']:g}% of the labels"
            lines[head.name() + share].append((100 * head.row[over] if labels else head.result["args"][over], head))
        lines = {name: sorted(line, key=lambda p: p[0]) for name, line in lines.items() if len({at for at, _ in line}) > 1}
        if not lines:
            continue
        figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharex=True)
        for i, (name, line) in enumerate(lines.items()):
            at = [p for p, _ in line]
            for ax, values, paper in (axes[0], [fmean(h.robust) for _, h in line], 1), (axes[1], [fmean(h.clean) for _, h in line], 0):
                ax.plot(at, values, label=name, marker="o", markersize=3, color=f"C{i % 10}")
                known = [(p, h.paper[paper]) for p, h in line if h.paper[paper] is not None]
                if known:
                    ax.plot(*zip(*known, strict=True), "*", markersize=10, color=f"C{i % 10}", label=f"{name}, the paper")
        row, setting = group[0].row, describe(group[0].result)
        if not labels:
            setting = ", ".join(part for part in setting.split(", ") if not part.startswith("--jitter"))
        for ax, what in (axes[0], f"robust, {row['norm']} {eps_name(row['eps'])}"), (axes[1], "clean"):
            ax.set(xlabel="labels (%)" if labels else "--jitter-strength", ylabel=f"accuracy (%), {what}")
            if labels:
                ax.set_xscale("log")
                ticks = sorted({p for line in lines.values() for p, _ in line})
                ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
                ax.minorticks_off()
            ax.grid(alpha=0.3)
        figure.suptitle(textwrap.fill(f"{setting}; {row['examples']:,} test images", 110), fontsize=10)
        axes[0].legend(fontsize=8)
        kind = "labels" if labels else "jitter"
        path = unused(out / file_name(f"gowal-{kind}-{row['norm']}-{eps_name(row['eps'])}-{setting}"), written)
        save(figure, path)
        written.append(path)
    return written


def landscape(
    model: torch.nn.Module, x: Tensor, y: Tensor, eps: float, norm: str, points: int = 41, reach: float = 2.0
) -> tuple[Tensor, Tensor]:
    """The margin (below 0: misclassified) on the plane through each image that is spanned by the worst perturbation AutoPGD finds, u, and
    a random vector of signs, v (Gowal et al., appendix D). Returns the axis (points,) from -reach to reach, in radii of the ball, and
    margins (B, points, points), rows along v, columns along u. u and v are made as long as the radius; images are not clipped to [0, 1].
    """
    start = torch.Generator(x.device).manual_seed(0)
    u = apgd(lambda z: ce_per_image(model(z), y), x, eps=eps, norm=norm, steps=100, generator=start) - x
    u = u * (eps / (u.abs().flatten(1).amax(1) if norm == "linf" else u.flatten(1).norm(dim=1)).clamp(min=1e-12)).view(-1, 1, 1, 1)  # to the sphere
    generator = torch.Generator().manual_seed(0)
    v = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
    v = v * eps if norm == "linf" else v * eps / l2_norm(v)
    axis = torch.linspace(-reach, reach, points)
    rows = []
    with torch.no_grad():
        for b in axis.tolist():
            rows.append(torch.stack([margin(model(x + a * u + b * v), y) for a in axis.tolist()], 1))
    return axis, torch.stack(rows, 1)


def landscape_figure(checkpoint: str, out: Path, taken: list[Path], images: int = 4) -> Path:
    """Figures 9 and 10 for a checkpoint: `images` random test images of the data set it was trained on, the ball drawn in."""
    plt = pyplot()
    state = load_checkpoint(checkpoint)
    args = state.get("args", {})
    check_classifier(state, checkpoint)
    if not {"dataset", "data_dir", "image_size", "norm", "eps"} <= args.keys():
        raise UserError(f"{checkpoint} does not say on which data and in which ball it was trained.")
    model, norm, eps = rebuild(state, checkpoint).eval(), args["norm"], args["eps"]
    _, test = load_data(args["dataset"], args["data_dir"], torch.device("cpu"), image_size=args["image_size"])
    some = test.subset(torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:images])
    x, y = next(batches(some, images, torch.device("cpu"), workers=0))
    axis, margins = landscape(model, x, y, eps, norm)
    # The ball in the plane: a circle for l2 (u and v are nearly at right angles), a diamond for linf (|a| + |b| <= 1, as |u| = |v| = eps).
    t = torch.linspace(0, 2 * math.pi, 200)
    ball = (t.cos(), t.sin()) if norm == "l2" else (torch.tensor([1.0, 0, -1, 0, 1]), torch.tensor([0.0, 1, 0, -1, 0]))
    figure = plt.figure(figsize=(4.2 * images, 4.2))
    a, b = torch.meshgrid(axis, axis, indexing="xy")
    for i in range(images):
        ax = figure.add_subplot(1, images, i + 1, projection="3d")
        z = margins[i]
        ax.plot_surface(a.numpy(), b.numpy(), z.numpy(), cmap="viridis", alpha=0.8, linewidth=0)
        ax.contour(a.numpy(), b.numpy(), z.numpy(), levels=[0.0], colors="red")  # where the class changes
        ax.plot(*(v.numpy() for v in ball), zs=float(z.min()), color="black")
        ax.set(xlabel="u, worst (radii)", ylabel="v, random signs", zlabel="margin")
        ax.set_title(test.classes[int(y[i])], fontsize=9)
    name = Path(checkpoint).parent.name + "-" + Path(checkpoint).stem
    figure.suptitle(f"{name}: margin around {images} test images; black: the {norm} ball of radius {eps_name(eps)}; red: margin 0", fontsize=10)
    path = unused(out / file_name(f"landscape-{name}"), taken)
    save(figure, path)
    return path


# ---- Chen et al. ---------------------------------------------------------------------------------------------------

PAIRS = [pair for pair in chen_pretrain_finetune.PAIRS if not pair.startswith("RS")]  # the lines of Table 3
CHEN_PAPER, PAPER_TABLE4, CHEN_TABLE6, PAPER_TABLE7 = {}, {}, {}, {}  # filled from results/paper.txt
PAPER_TABLE5_JIGSAW = ()
for _line in (Path(__file__).resolve().parent / "results" / "paper.txt").read_text().splitlines():
    if _line.startswith("chen_pretrain_finetune"):
        _, _flags, _name, _numbers = (part.strip() for part in _line.split("|"))
        _known = tuple(int(v) if v.isdigit() else float(v) for v in _numbers.split())
        _task, _pair = ("", _name) if "-" not in _name else _name.split("-", 1)
        if " -> " in _name:
            _source, _target = _name.replace("-P3F4", "").split(" -> ")
            PAPER_TABLE4[_source, _source if _target == "itself" else _target] = _known[0]
        elif " + " in _name:
            CHEN_TABLE6[tuple(sorted(_name.replace("-P3F4", "").split(" + ")))] = _known
        elif "Table 5" in _name:  # Table 5, and Figure 1 with it, have another Jigsaw than Table 3
            PAPER_TABLE5_JIGSAW = _known
        elif "pretrain_images" in _flags:
            PAPER_TABLE7[int(re.search(r"pretrain_images=(\d+)", _flags)[1]), _pair] = _known
        else:
            CHEN_PAPER[{"ensemble": "se" if "dpe_lambda=0" in _flags else "dpe"}.get(_task, _task), _pair] = _known
CHEN_TABLE5 = {task: CHEN_PAPER[task, "P3F4"] for task in TASKS} | {"jigsaw": PAPER_TABLE5_JIGSAW}
CHEN_TABLE5 |= {"AP+SE": CHEN_PAPER["se", "P3F4"], "AP+DPE": CHEN_PAPER["dpe", "P3F4"]}
Values = dict[tuple, dict[int, float]]  # {what (see `measured`): {seed: value}}


@dataclass
class Setting:
    """What runs measured that differ in nothing but the seed and CHEN_CELLS."""

    result: dict  # of the first such run
    values: dict[tuple[str, str], Values]  # by kind of row and `text_of`
    paper: bool = False  # has it the paper's flags?

    def of(self, kind: str) -> list[tuple[str, Values]]:
        """[(text, values)] of a kind."""
        return [(text, values) for (of, text), values in self.values.items() if of == kind]


def text_of(result: dict, row: dict) -> str:
    """`describe`, and what else tells a row from others of its Setting: where it started, the ensemble's flags, whose checkpoints."""
    args, names = result["args"], []
    if args["models"]:
        return f"{describe(result)}, checkpoints of {', '.join(dict.fromkeys(str(Path(model).parent) for model in args['models']))}"
    if not row.get("pair", "").startswith("P1"):
        names += ["init", "pretrain_epochs"]
    if row.get("task") == "ensemble":
        names += ["dpe_lambda"] if args["dpe_lambda"] > 0 else []
    return ", ".join([describe(result), *unusual(result, names)])


def ours(text: str, *numbers: dict[int, float]) -> str:
    """What stands beside numbers of ours."""
    return f"ours: {text}, {count_seeds(*(len(n) for n in numbers if n))}"


def measured(result: dict, row: dict) -> dict[tuple, float]:
    """What a row says. Of a cell's two checkpoints that of best TA is reported."""
    args, kind, value = result["args"], row.get("kind"), row["accuracy"]
    clean = row["attack"] == "none"
    if kind is None and row["pick"] == "ta":
        task = ("AP+DPE" if args["dpe_lambda"] > 0 else "AP+SE") if row["task"] == "ensemble" else row["task"]
        cell = (task, row["pair"])
        return {(*cell, "TA"): value} if clean else {(*cell, "RA"): value, (*cell, "epochs"): row["best_epoch"], (*cell, "images"): row["images"] or 0}
    if kind == "transfer":
        return {(row["source"], row["target"]): 100 - value}
    if kind == "average":
        return {(tuple(row["models"]), "TA" if clean else "RA"): value}
    return {}  # of "venn" there is a picture per run, not a table


def chen_settings(results: list[dict]) -> list[Setting]:
    """Those of all runs of chen_pretrain_finetune.py, seeds gathered."""
    found: dict[str, Setting] = {}
    mine = [result for result in results if result["script"] == "chen_pretrain_finetune"]
    for result in sorted(mine, key=lambda r: bool(r["args"]["models"])):  # first those that trained: they describe the setting
        args, seed, again = result["args"], result["args"]["seed"], False
        ignored = (NOT_THE_SETTING | CHEN_CELLS) - ({"data_dir"} if args["dataset"] == "folder" else set())
        key = json.dumps([{k: v for k, v in args.items() if k not in ignored}, dataset_name(result)], sort_keys=True)
        setting = found.setdefault(key, Setting(result, defaultdict(lambda: defaultdict(dict))))
        setting.paper |= any(paper_numbers(result["script"], own_args(result), row["name"]) for row in result["rows"] if "pair" in row)
        for row in result["rows"]:
            for what, value in measured(result, row).items():
                seeds = setting.values[row.get("kind", "cell"), text_of(result, row)][what]
                again |= seed in seeds
                seeds.setdefault(seed, value)
        if again:
            print(f"left out: what was measured before with the same arguments and seed ({describe(result)}, seed {seed}).")
    return list(found.values())


def cell_row(label: str, text: str, values: Values, cells: list[tuple[str, str]]) -> list[list[str]]:
    """Our row of TA, RA and epochs of one or more cells (task, pair), if there is anything of them."""
    numbers = [values.get((*cell, what), {}) for cell in cells for what in ("TA", "RA", "epochs")]
    shown = [mean_sd(n.values(), 0 if i % 3 == 2 else 2) for i, n in enumerate(numbers)]
    return [[label, ours(text, *numbers), *shown]] if any(numbers) else []


def paper_row(label: str, known: list[tuple | None]) -> list[list[str]]:
    """The paper's, likewise."""
    return [[label, "the paper", *(n for k in known for n in ((f"{k[0]:.2f}", f"{k[1]:.2f}", f"{k[2]}") if k else [""] * 3))]] if any(known) else []


def cell_rows(settings: list[Setting], lines: Iterable[tuple[str, list[tuple[str, str]], list[tuple | None]]]) -> list[list[str]]:
    """The paper's row and ours for each of lines: (label, [(task, pair)], the paper's numbers for each)."""
    rows = []
    for label, cells, known in lines:
        rows += paper_row(label, known)
        for setting in settings:
            for text, values in setting.of("cell"):
                rows += cell_row(label, text, values, cells)
    return rows


def asr_blocks(settings: list[Setting]) -> list[str]:
    """Table 4: a small table per setting, the paper's first."""

    def block(title: str, names: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
        return f"{title}\n\n" + markdown(["evaluated", *(f"made for {name}" for name in names)], rows)

    blocks = [block("the paper (P3F4):", TASKS, [[t, *(f"{PAPER_TABLE4[s, t]:.2f}" for s in TASKS)] for t in TASKS])]
    for setting in settings:
        for text, values in setting.of("transfer"):
            names = list(dict.fromkeys(source for source, _ in values))
            rows = [[t, *(mean_sd(values.get((s, t), {}).values()) for s in names)] for t in names]
            blocks.append(block(ours(text, *values.values()) + ":", names, rows))
    return blocks


def subset(models: Iterable[str]) -> tuple[str, ...]:
    """Models as the paper names them, 'rotation' for 'rotation-P3F4.ta'; others by their own names."""
    return tuple(sorted(re.sub(r"^.*/|-P3F4(\.[tr]a)?$", "", model) for model in models))


def average_rows(settings: list[Setting]) -> list[list[str]]:
    """Table 6."""
    found = defaultdict(list)
    for setting in settings:
        for text, values in setting.of("average"):
            for models in dict.fromkeys(models for models, _ in values):
                numbers = [values.get((models, what), {}) for what in ("TA", "RA")]
                row = [" + ".join(models), ours(text, *numbers), *(mean_sd(n.values()) for n in numbers)]
                found[subset(models)].append(row)
    rows = []
    for names in dict.fromkeys([*CHEN_TABLE6, *found]):
        if names in CHEN_TABLE6:
            rows.append([" + ".join(names), "the paper", *(f"{v:.2f}" for v in CHEN_TABLE6[names])])
        rows += found[names]
    return rows


def size_rows(settings: list[Setting]) -> list[list[str]]:
    """Table 7, if there is a run with --pretrain-images or --extra-data."""
    if not any(setting.result["args"][flag] for setting in settings for flag in ("pretrain_images", "extra_data")):
        return []
    pairs = ("P3F2", "P3F4")
    rows = [row for n in dict.fromkeys(n for n, _ in PAPER_TABLE7) for row in paper_row(f"{n:,}", [PAPER_TABLE7[n, pair] for pair in pairs])]
    sized = []
    for setting in settings:
        for text, values in setting.of("cell"):
            for task in CHEN_TABLE5:
                images = [n for pair in pairs for n in values.get((task, pair, "images"), {}).values()]
                sized += [(max(images), row) for row in cell_row(f"{max(images):,}, {task}", text, values, [(task, pair) for pair in pairs])] if images else []
    return rows + [row for _, row in sorted(sized, key=lambda of: of[0])]


def chen_tables(settings: list[Setting]) -> str:
    """Tables 3-8 in Markdown: those of which there is something of ours; '' if there is nothing."""
    cells = dict.fromkeys(what[:2] for setting in settings for _, values in setting.of("cell") for what in values)
    by_task = [f"{task.capitalize()} {what}" for task in TASKS for what in ("TA", "RA", "epochs")]

    def pairs(known: tuple[str, ...], smoothed: bool) -> list[list[str]]:
        lines = []
        for pair in dict.fromkeys([*known, *(pair for _, pair in cells if pair.startswith("RS") == smoothed)]):
            row = [("" if pair.startswith("P1") else task, pair) for task in TASKS]
            lines.append((pair, row, [CHEN_PAPER.get(cell) for cell in row]))
        return cell_rows(settings, lines)

    single = [(task, [(task, "P3F4")], [known]) for task, known in CHEN_TABLE5.items()]
    single += [(f"{task}, {pair}", [(task, pair)], []) for task, pair in cells if task.startswith("AP+") and pair != "P3F4"]
    found = {
        "Table 3: pairs of pre-training and fine-tuning": (["pair", "setting", *by_task], pairs(PAIRS, False)),
        "Table 5: pre-training on one task and on all (P3F4)": (["pre-training", "setting", "TA", "RA", "epochs"], cell_rows(settings, single)),
        "Table 6: averaged predictions (P3F4)": (["models", "setting", "TA", "RA"], average_rows(settings)),
        "Table 7: number of images in pre-training (the paper names no task)": (
            ["images", "setting", *(f"{pair} {what}" for pair in ("P3F2", "P3F4") for what in ("TA", "RA", "epochs"))], size_rows(settings),
        ),
        "Table 8: pre-training on noisy images": (["pair", "setting", *by_task], pairs(("RSF2", "RSF4"), True)),
    }  # fmt: skip
    sections = {title: markdown(*table) for title, table in found.items() if any(cell.startswith("ours: ") for row in table[1] for cell in row)}
    blocks = asr_blocks(settings)
    if len(blocks) > 1:
        sections["Table 4: share (%) of images that, attacked for one model, another gets wrong"] = "\n\n".join(blocks)
    if not sections:
        return ""
    what = "TA: clean accuracy (%), RA: under attack, epochs: that of best RA on held-out images (F1, F3: of best TA); ± is the standard deviation over seeds."
    return "\n\n".join(["# Chen et al. 2020", what] + [f"## {title}\n\n{sections[title]}" for title in sorted(sections)]) + "\n"


def summary_figures(settings: list[Setting], out: Path) -> list[Path]:
    """Figure 1: RA over TA, one picture per setting; the cross-hair is at P1F4. Returns what was written."""
    plt, written = pyplot(), []
    paper = {("", "P1F4"): CHEN_PAPER["", "P1F4"]} | {(task, "P3F4"): known for task, known in CHEN_TABLE5.items()}
    paper |= {names: (*known, sum(CHEN_TABLE5[name][2] for name in names)) for names, known in CHEN_TABLE6.items()}
    for setting in settings:
        marks, epochs = [], {}  # [(key of `paper`, label, TA, RA, epochs or None, marker)], {model: epochs}
        for text, values in setting.of("cell"):
            for task, pair, what in values:
                if what != "epochs" or (task, pair, "TA") not in values:
                    continue
                ta, ra, epoch = (fmean(values[task, pair, w].values()) for w in ("TA", "RA", what))
                epochs.setdefault(f"{'ensemble' if task.startswith('AP+') else task}-{pair}".removeprefix("-"), epoch)
                if (task, pair) in paper:
                    label = "P1F4 (no pre-training)" if pair == "P1F4" else task
                    marks.append(((task, pair), label + text.removeprefix(describe(setting.result)), ta, ra, epoch, "o"))
        averages = [(text, models, values) for text, values in setting.of("average") for models, what in values if what == "RA" and len(models) > 1]
        for text, models, values in averages:
            if (models, "TA") in values:
                of = [epochs.get(re.sub(r"\.[tr]a$", "", model)) for model in models]
                marker = "*" if len(models) == max(len(m) for _, m, _ in averages) else "s"
                ta, ra = (fmean(values[models, w].values()) for w in ("TA", "RA"))
                label = f"average of {', '.join(subset(models))}" + "".join(text.partition(", checkpoints")[1:])
                marks.append((subset(models), label, ta, ra, None if None in of else sum(of), marker))
        if len(marks) < 2:
            continue
        shown = {mark[0]: paper[mark[0]] for mark in marks if setting.paper and mark[0] in paper}
        largest = max([known[2] for known in shown.values()] + [mark[4] or 1 for mark in marks])
        figure, ax = plt.subplots(figsize=(9, 5.5), layout="constrained")
        for i, (key, label, ta, ra, epoch, marker) in enumerate(marks):
            look = dict(marker=marker, zorder=3, alpha=0.8)
            color = "black" if key == ("", "P1F4") else f"C{i % 10}"
            ax.scatter(ta, ra, 20 + 380 * (epoch or 0) / largest, color=color, label=textwrap.fill(label + ("" if epoch is None else f" ({epoch:g})"), 45), **look)
            if key in shown:
                known = shown.pop(key)
                ax.scatter(*known[:2], 20 + 380 * known[2] / largest, facecolors="none", edgecolors=color, **look)
            if key == ("", "P1F4"):
                ax.axvline(ta, color="black", linewidth=0.8, linestyle="--")
                ax.axhline(ra, color="black", linewidth=0.8, linestyle="--")
        ax.set(xlabel="TA: clean accuracy (%)", ylabel="RA: accuracy under attack (%)")
        ax.margins(0.12)
        ax.grid(alpha=0.3)
        ax.set_title(textwrap.fill(describe(setting.result), 90), fontsize=10)
        title = "area of a marker, (n): epochs" + ("\nhollow: the paper" if setting.paper else "")
        legend = figure.legend(title=title, fontsize=8, title_fontsize=8, alignment="left", labelspacing=0.8, loc="outside right upper")
        for handle in legend.legend_handles:
            handle.set_sizes([50])
        path = unused(out / file_name(f"chen-summary-{describe(setting.result)}"), written)
        save(figure, path)
        written.append(path)
    return written


def circles(a: float, b: float, both: float) -> tuple[float, float, float]:
    """Radii of two circles and the distance of their centres, such that their areas are a and b and that of what they share `both`."""
    r, q = (max(math.sqrt(area / math.pi), 1e-6) for area in (a, b))
    near, far = abs(r - q), r + q
    for _ in range(50):  # the shared area falls as they move apart
        d = (near + far) / 2
        x = (d * d + r * r - q * q) / (2 * d)  # of the line through the two points where they meet
        shared = sum(s * s * math.acos(max(-1, min(1, t / s))) - t * math.sqrt(max(0, s * s - t * t)) for s, t in ((r, x), (q, d - x)))
        near, far = (d, far) if shared > both else (near, d)
    return r, q, d


def venn_figures(results: list[dict], out: Path) -> list[Path]:
    """Figure 5: of the images attacked for one model, those that fool two others; a picture per run. Returns what was written."""
    plt, written = pyplot(), []
    for result in results:
        rows = [row for row in result["rows"] if row.get("kind") == "venn"]
        if not rows:
            continue
        asr = {(row["source"], row["target"]): 100 - row["accuracy"] for row in result["rows"] if row.get("kind") == "transfer"}
        wide = min(3, len(rows))
        big = math.sqrt(max(1, *(asr[row["source"], row[other]] for row in rows for other in ("target", "other"))) / math.pi)  # largest radius
        high = math.ceil(len(rows) / wide)
        figure, axes = plt.subplots(high, wide, figsize=(max(4 * wide, 6), 2.8 * high + 0.6), squeeze=False, layout="constrained")
        for ax in axes.flat:
            ax.axis("off")
        for ax, row in zip(axes.flat, rows, strict=False):
            a, b = asr[row["source"], row["target"]], asr[row["source"], row["other"]]
            both = 100 - row["accuracy"]
            r, q, d = circles(a, b, both)
            middle = (d + q - r) / 2
            for x, radius, side, name, share, color in (0, r, -1, row["target"], a, "green"), (d, q, 1, row["other"], b, "mediumvioletred"):
                align = "left" if side > 0 else "right"
                ax.add_patch(plt.Circle((x, 0), radius, facecolor=color, edgecolor="black", alpha=0.3))
                ax.text(x + side * (radius + 0.1 * big), 0, f"only\n{max(0, share - both):.2f}%", ha=align, va="center")
                ax.text(middle + side * 0.1 * big, -1.15 * big, f"{name}\n{share:.2f}%", ha=align, va="top", color=color)
            ax.text((d - q + r) / 2, 0, f"{both:.2f}%", ha="center", va="center", weight="bold")
            ax.set(xlim=(middle - 2.5 * big, middle + 2.5 * big), ylim=(-1.75 * big, 1.05 * big), aspect="equal")
            ax.set_title(f"attacked for {row['source']}", fontsize=10)
        shown = f"{describe(result)}, seed {result['args']['seed']}; of {rows[0]['examples']:,} images those that fool either model and both"
        figure.suptitle(textwrap.fill(shown, 45 * wide), fontsize=10)
        path = unused(out / file_name(f"chen-venn-s{result['args']['seed']}-{describe(result)}"), written)
        save(figure, path)
        written.append(path)
    return written


# ---- Rebuffi et al. ------------------------------------------------------------------------------------------------

# Flags of adv_mae.py that a table shows in a place of their own, that do not matter to a fine-tuned network, or that are its pre-training's.
REBUFFI_SHOWN = {
    "method", "layer_decay", "recipe", "norm", "eps", "eval_data", "real", "eval_eps", "eval_norm", "eval_attack", "eval_steps",
    "attack_examples", "accumulate", "pretrain_epochs", "image_size",
}  # fmt: skip
METHODS = {"supervised": "supervised", "rotnet": "RotNet", "mae": "MAE", "byol": "BYOL"}


@dataclass
class Tuned:
    """A fine-tuned network, in runs that differ in the seed only."""

    setting: str  # data, network, recipe
    method: str
    norm: str  # of the attack in pre-training; "" if there was none
    eps: float
    gamma: float | None  # None: trained from scratch, not fine-tuned
    epochs: int | None  # of pre-training
    clean: dict[str, list[float]]  # {test set: accuracy per seed}
    robust: dict[tuple[str, str, float], list[float]]  # {(attack, norm, radius): accuracy per seed}

    def average(self, sets: Iterable[str]) -> float:
        return fmean(fmean(self.clean[s]) for s in sets)

    @property
    def name(self) -> str:
        return f"{METHODS.get(self.method, self.method)} {f'{self.norm} {eps_name(self.eps)}' if self.eps else 'nominal'}"


def corruption_means(results: list[dict]) -> dict[Path, float]:
    """{checkpoint: its mean clean accuracy over the 15 types of corruption} of what eval_cifar10c.py has evaluated."""
    means = {}
    for result in results:
        if result["script"] == "eval_cifar10c":
            names = dict.fromkeys(row["name"] for row in result["rows"])
            for path, name in zip(result["args"].get("checkpoints", []), names, strict=False):
                for row in result["rows"]:
                    if (row["name"], row["attack"], row["corruption"]) == (name, "none", "mean of 15"):
                        means[Path(path).resolve()] = row["accuracy"]
    return means


def tuned_networks(results: list[dict]) -> dict[str, list[Tuned]]:
    """{setting: its networks}, those of adv_mae.py."""
    means, found, seen = corruption_means(results), {}, set()
    for result in results:
        if result["script"] != "adv_mae":
            continue
        a = result["args"]
        flags = unusual(result, [k for k in a if k not in NOT_THE_SETTING | NAMED | REBUFFI_SHOWN])
        for row in result["rows"]:
            about = row["pretrained"]
            setting = ", ".join([
                dataset_name(result), f"{a['arch']} x{a['width']:g}", f"{a['image_size']} pixels",
                f"recipe {'imagenet' if row['layer_decay'] is None else row['recipe']}",  # from scratch: the figures compare it with these
                *(["--quick"] if a["quick"] else []), *flags,
            ])  # fmt: skip
            one = (Path(row["checkpoint"]).resolve(), row["set"], row["attack"], row["norm"], row["eps"])
            if one in seen:  # evaluated again by --recipe none
                continue
            seen.add(one)
            key = (setting, about["method"], about["norm"] if about["eps"] else "", about["eps"], row["layer_decay"], about["epochs"])
            tuned = found.setdefault(key, Tuned(*key, {}, {}))
            if row["eps"]:
                tuned.robust.setdefault((row["attack"], row["norm"], row["eps"]), []).append(row["accuracy"])
                continue
            tuned.clean.setdefault(row["set"], []).append(row["accuracy"])
            corrupted = means.get(Path(row["checkpoint"]).resolve())
            if row["set"] == "test" and corrupted is not None:
                tuned.clean.setdefault("corruptions", []).append(corrupted)
    groups = defaultdict(list)
    for tuned in found.values():
        groups[tuned.setting].append(tuned)
    return groups


def shared_sets(networks: list[Tuned]) -> list[str]:
    """The test sets on which all of them were evaluated, in order."""
    shared = [s for s in networks[0].clean if all(s in t.clean for t in networks)]
    return sorted(shared, key="corruptions".__eq__)  # last


def from_scratch(networks: list[Tuned]) -> Tuned | None:
    """Trained from scratch without attack: what Figure 1 subtracts."""
    return next((t for t in networks if t.method == "supervised" and not t.eps and t.gamma is None), None)


def rebuffi_table(groups: dict[str, list[Tuned]]) -> str:
    """A table per setting, a line per network."""
    parts = ["# Rebuffi et al.: accuracy (%) after fine-tuning on clean images"]
    for setting, networks in groups.items():
        sets, scratch = shared_sets(networks), from_scratch(networks)
        attacks = list(dict.fromkeys(key for t in networks for key in t.robust))
        more = ["average"] * (len(sets) > 1) + ["minus scratch"] * (scratch is not None)
        header = ["pre-training", "epochs", "γ", *sets, *more, *(f"{attack.upper()} {norm} {eps_name(eps)}" for attack, norm, eps in attacks)]
        rows = []
        for t in sorted(networks, key=lambda t: (list(METHODS).index(t.method) if t.method in METHODS else 9, t.norm, t.eps, t.gamma or 0)):
            row = [t.name, "" if t.epochs is None else str(t.epochs), "" if t.gamma is None else f"{t.gamma:g}", *(mean_sd(t.clean[s]) for s in sets)]
            row += [f"{t.average(sets):.2f}"] * (len(sets) > 1)
            row += [f"{t.average(sets) - scratch.average(sets):+.2f}"] if scratch else []
            rows.append([*row, *(mean_sd(t.robust.get(key, [])) for key in attacks)])
        seeds = [len(v) for t in networks for v in t.clean.values()]
        parts.append(f"## {setting}; {count_seeds(*seeds)}\n\n{markdown(header, rows)}")
    return "\n\n".join(parts) + "\n"


def best(networks: Iterable[Tuned], sets: list[str]) -> list[Tuned]:
    """Of networks that differ in gamma (or epochs) only, that of the best average."""
    chosen = {}
    for t in networks:
        key = (t.method, t.norm, t.eps)
        if key not in chosen or t.average(sets) > chosen[key].average(sets):
            chosen[key] = t
    return list(chosen.values())


def heat_map(ax: "Axes", networks: list[Tuned], sets: list[str], columns: list[str]) -> None:
    """Rows: test sets and their average; the colour is normalised within each row."""
    rows = [[fmean(t.clean[s]) for t in networks] for s in sets] + [[t.average(sets) for t in networks]] * (len(sets) > 1)
    shade = [[(v - min(row)) / max(max(row) - min(row), 1e-9) for v in row] for row in rows]
    ax.imshow(shade, cmap="YlGn", vmin=0, vmax=1.6, aspect="auto")
    for i, row in enumerate(rows):
        for j, v in enumerate(row):
            ax.text(j, i, f"{v:.1f}", ha="center", va="center", fontsize=9, fontweight="bold" if v == max(row) else None)
    ax.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    ax.set_yticks(range(len(rows)), [*sets, "average"][: len(rows)])


def rebuffi_figures(groups: dict[str, list[Tuned]], out: Path) -> list[Path]:
    """Figures 1, 2, 3 and 5, as far as there are enough networks. Returns what was written."""
    plt, written = pyplot(), []

    def write(figure: "Figure", kind: str, setting: str) -> None:
        path = unused(out / file_name(f"rebuffi-{kind}-{setting}"), written)
        save(figure, path)
        written.append(path)

    for setting, networks in groups.items():
        sets, scratch, title = shared_sets(networks), from_scratch(networks), textwrap.fill(setting, 90)
        tuned = [t for t in networks if t is not scratch]
        if not sets or not tuned:
            continue
        winners, minus = best(tuned, sets), scratch.average(sets) if scratch else 0.0
        norms = [norm for norm in ("linf", "l2") if len({t.eps for t in winners if t.norm == norm}) + any(not t.eps for t in winners) > 1 and any(t.norm == norm for t in winners)]
        if norms:  # Figure 1
            figure, axes = plt.subplots(1, len(norms), figsize=(4.5 * len(norms) + 1, 4), sharey=True, squeeze=False, layout="constrained")
            for ax, norm in zip(axes[0], norms, strict=True):
                for i, method in enumerate(METHODS):
                    line = sorted((t for t in winners if t.method == method and t.norm in ("", norm)), key=lambda t: t.eps)
                    if line:
                        scale = 255 if norm == "linf" else 1
                        ax.plot([t.eps * scale for t in line], [t.average(sets) - minus for t in line], marker="o", color=f"C{i}", label=METHODS[method])
                ax.set_xlabel(f"radius in pre-training, {norm}{' (in 255ths)' if norm == 'linf' else ''}")
                ax.grid(alpha=0.3)
            axes[0, 0].set_ylabel(f"average accuracy (%){', minus that from scratch' if scratch else ''}")
            axes[0, 0].legend()
            figure.suptitle(title, fontsize=10)
            write(figure, "eps", setting)
        columns = [max(same, key=lambda t: t.average(sets)) for m in METHODS for norm in ("", "linf", "l2") if (same := [t for t in winners if (t.method, t.norm) == (m, norm)])]
        if len(columns) > 1:  # Figure 2
            figure, ax = plt.subplots(figsize=(1.1 * len(columns) + 2.5, 0.45 * len(sets) + 2.5), layout="constrained")
            heat_map(ax, columns, sets, [t.name for t in columns])
            ax.set_title(title, fontsize=10)
            write(figure, "methods", setting)
        # Of each method the encoders of the best average, with and without attack: all of their gammas.
        leaders = {(t.method, t.eps > 0): t for t in sorted(winners, key=lambda t: t.average(sets))}
        lines = {key: sorted((o for o in tuned if (o.name, o.epochs) == (t.name, t.epochs) and o.gamma is not None), key=lambda o: o.gamma) for key, t in leaders.items()}
        panels = {line[0].name: line for m in METHODS if len(line := lines.get((m, True)) or lines.get((m, False), [])) > 1}
        if panels:  # Figure 3
            wide = sum(map(len, panels.values()))
            figure, axes = plt.subplots(1, len(panels), figsize=(0.9 * wide + 2.5, 0.45 * len(sets) + 2.2), squeeze=False, sharey=True, layout="constrained")
            for ax, (name, line) in zip(axes[0], panels.items(), strict=True):
                heat_map(ax, line, sets, [f"{t.gamma:g}" for t in line])
                ax.set(title=name, xlabel="γ")
            figure.suptitle(title, fontsize=10)
            write(figure, "gamma", setting)
        shown = {m: [t for attacked in (True, False) for t in lines.get((m, attacked), []) if t.robust] for m in METHODS}
        shown = {m: line for m, line in shown.items() if line}
        for ball in dict.fromkeys(key[:2] for line in shown.values() for t in line for key in t.robust):  # Figure 5
            figure, axes = plt.subplots(1, len(shown), figsize=(4.5 * len(shown) + 1, 4), sharey=True, squeeze=False, layout="constrained")
            for ax, line in zip(axes[0], shown.values(), strict=True):
                gammas = list(dict.fromkeys(t.gamma for t in line))
                for t in line:
                    radii = sorted(key[2] for key in t.robust if key[:2] == ball)
                    curve = [(0, fmean(t.clean["test"])), *((eps, fmean(t.robust[(*ball, eps)])) for eps in radii)]
                    look = dict(color=f"C{gammas.index(t.gamma) % 10}", linestyle="-" if t.eps else "--", marker="o", markersize=3)
                    ax.plot(*zip(*curve, strict=True), label=f"{t.name}, γ {t.gamma:g}", **look)
                ax.set_xlabel(f"radius of the attack ({ball[0].upper()}, {ball[1]})")
                ax.grid(alpha=0.3)
                ax.legend(fontsize=8)
            axes[0, 0].set_ylabel("accuracy (%)")
            figure.suptitle(title, fontsize=10)
            write(figure, "robust", setting)
    return written


def filter_figure(states: dict[str, dict], out: Path) -> Path:
    """Figure 4: a row of principal components for each checkpoint of a ViT."""
    plt = pyplot()
    rows = {name: adv_mae.filters(state) for name, state in states.items()}
    count = max(map(len, rows.values()))
    figure, axes = plt.subplots(len(rows), count, figsize=(0.45 * count + 1.5, 0.55 * len(rows) + 0.2), squeeze=False, layout="constrained")
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for ax in line:
            ax.axis("off")
        for ax, picture in zip(line, pictures, strict=False):
            ax.imshow(picture.permute(1, 2, 0).numpy())
        line[0].text(-0.3, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    path = out / "rebuffi-filters.png"
    save(figure, path)
    return path


# ---- Lawhon et al. -------------------------------------------------------------------------------------------------


def reversal_setting(result: dict) -> str:
    """The setting of a run of mtl_reverse.py in a few words."""
    a = result["args"]
    hidden = NOT_THE_SETTING | {"dataset", "arch", "width", "norm", "eps", "victim", "branches", "attacks"}
    network = a["victim"] or f"{a['arch']} x{a['width']:g}"
    n = next(row["examples"] for row in result["rows"] if row.get("kind") is None)
    parts = [dataset_name(result), network, f"attacked with {a['norm']} {eps_name(a['eps'])}", f"{n:,} test images", *(["--quick"] if a["quick"] else [])]
    return ", ".join(parts + unusual(result, [k for k in a if k not in hidden]))


def kind_of(result: dict, kind: str | None) -> list[dict]:
    """The rows of one kind."""
    return [row for row in result["rows"] if row.get("kind") == kind]


def lawhon_table(results: list[dict]) -> str:
    """Of every run: Table 1, paired differences, all attacks, the losses."""
    parts = ["# Lawhon et al.: accuracy (%) with and without reversal, ± standard error"]
    for result in results:
        cells, differences = ({(row["name"], row["column"]): row for row in kind_of(result, kind)} for kind in ("column", "difference"))
        columns = list(dict.fromkeys(column for _, column in cells))
        rows = [[name, *(f"{cells[name, c]['accuracy']:.2f} ± {cells[name, c]['se']:.2f}" if (name, c) in cells else "" for c in columns)]
                for name in dict.fromkeys(name for name, _ in cells)]  # fmt: skip
        for name in dict.fromkeys(name for name, _ in differences):
            rows.append([name, *(f"{d['difference']:+.2f} ± {d['se']:.2f}" if (d := differences.get((name, c))) else "" for c in columns)])
        single = [[row["name"], row["attack"] + (f", λ {row['lambda']:g}" if row["attack"].startswith("aware") else ""), f"{row['accuracy']:.2f} ± {row['se']:.2f}"]
                  for row in kind_of(result, None)]  # fmt: skip
        losses = {}
        for row in kind_of(result, "losses"):
            losses.setdefault((row["name"], row["task"]), {})[row["images"]] = f"{row['mean']:.3f}"
        parts += [
            f"## {reversal_setting(result)}", markdown(["defence", *columns], rows), markdown(["defence", "attack", "accuracy"], single),
            markdown(["defence", "loss", "clean", "attacked", "reversed"], ([*key, *v.values()] for key, v in losses.items())),
        ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def lawhon_figures(results: list[dict], out: Path) -> list[Path]:
    """Histograms of the losses. Returns what was written."""
    plt, written = pyplot(), []

    def write(figure: "Figure", kind: str, result: dict) -> None:
        figure.suptitle(textwrap.fill(reversal_setting(result), 90), fontsize=10)
        path = unused(out / file_name(f"lawhon-{kind}-{reversal_setting(result)}"), written)
        save(figure, path)
        written.append(path)

    for result in results:
        losses = kind_of(result, "losses")
        names, tasks = (list(dict.fromkeys(row[k] for row in losses)) for k in ("name", "task"))
        if losses:
            figure, axes = plt.subplots(len(names), len(tasks), figsize=(4 * len(tasks), 2.6 * len(names) + 0.6), squeeze=False, layout="constrained")
            for line, name in zip(axes, names, strict=True):
                for ax, task in zip(line, tasks, strict=True):
                    mine = {row["images"]: row["values"] for row in losses if (row["name"], row["task"]) == (name, task)}
                    if not mine:
                        ax.axis("off")
                        continue
                    everything = torch.tensor(sum(mine.values(), []))
                    low, high = everything.quantile(torch.tensor([0.0, 0.99])).tolist()  # a few large losses would leave no room for the others
                    bins = torch.linspace(low, max(high, low + 1e-6), 31).tolist()
                    for i, (images, values) in enumerate(mine.items()):
                        ax.hist([min(v, bins[-1]) for v in values], bins, histtype="step", color=f"C{i}", linewidth=1.5, label=images)
                        ax.axvline(fmean(values), color=f"C{i}", linestyle=":")
                    ax.set_title(f"{name}: {task} loss (dotted: mean)", fontsize=9)
            axes[0, 0].legend(fontsize=8)
            write(figure, "losses", result)
    return written


# ---- README.md -----------------------------------------------------------------------------------------------------


def fill(text: str, folder: Path) -> str:
    """Markdown with all its blocks made anew. A block begins with <!-- from FILE [FILE ...] -->, relative to `folder`, and ends with
    <!-- end -->. Of results.json it holds what the script printed, several of one script as one table; of benchmarks/*.py --json a table."""

    def block(found: re.Match) -> str:
        paths = [folder / name for name in found[1].split()]
        try:
            contents = [json.loads(path.read_text()) for path in paths]
        except (OSError, ValueError) as e:
            raise UserError(f"a block wants {found[1]}, which cannot be read ({e}).") from None
        if "table" in contents[0]:
            header, *rows = contents[0]["table"]
            body = markdown(header, rows)
        elif "benchmark" in contents[0]:
            body = benchmark_table(contents)
        else:
            body = f"```\n{printed(read(tuple(map(str, paths))))}\n```"
        return f"<!-- from {found[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- from (.*?) -->\n.*?<!-- end -->", block, text, flags=re.S)


def printed(results: list[dict]) -> str:
    """What the script printed at the end of a run, without the folder; several runs of rotation_at.py and jigsaw_at.py as one table."""
    first, rows = results[0], []
    for result in results:
        task = f" {result['script'].removesuffix('_at')}"
        rows += [row | {"name": row["name"] + (task if len(results) > 1 and row["name"] != "T0" else "")} for row in result["rows"]]
    merged = first | {"rows": rows, "args": first["args"] | {"dataset": dataset_name(first)}, "seconds": sum(r["seconds"] for r in results)}
    script, out = SCRIPTS[first["script"]], io.StringIO()
    with contextlib.redirect_stdout(out):
        if hasattr(script, "show"):
            script.show(merged, Path())
        elif hasattr(script, "table"):
            print(script.table(merged, own_args(merged)))
        else:
            args = own_args(merged)
            rule = "the last" if args.select == "last" else f"best {args.select} validation accuracy"
            print(results_table(merged, args, rule))
    lines = [line.rstrip() for line in out.getvalue().splitlines() if not line.startswith("results.json")]
    return "\n".join(lines).strip()


def benchmark_table(benchmarks: list[dict]) -> str:
    """All benchmarks in one table; the share is of the speed of a large matrix product in the same precision on the same device."""
    rows = []
    for benchmark in benchmarks:
        for row in benchmark["rows"]:
            if "images_per_s" in row:
                share = f"{100 * row['share_of_matmul_peak']:.0f}% of {row['matmul_tflops_per_s']:g} TFLOP/s" if "share_of_matmul_peak" in row else ""
                rows.append([
                    f"`{benchmark['benchmark']}`", row["name"], f"{benchmark['device']}, torch {benchmark['torch'].split('+')[0]}", f"{row['images_per_s']:g}",
                    f"{row['ratio']:.2f}", f"{row['peak_mb']:,}" if row["peak_mb"] else "", f"{row['gflops_per_image']:g}" if share else "", share,
                ])  # fmt: skip
    return markdown(["benchmark", "step", "device", "images/s", "ratio", "peak MB", "GFLOP/image", "share of peak"], rows)


# ---- the run -------------------------------------------------------------------------------------------------------


def main(args: Args) -> list[Path]:
    """Write all that the given results are enough for; returns the files."""
    if args.readme:
        path = Path(args.readme)
        try:
            text = path.read_text()
        except OSError as e:
            raise UserError(f"cannot read {path} ({e.strerror}).") from None
        write_atomically(path, lambda f: f.write(fill(text, path.parent).encode()))
        print(path)
        return [path]
    checkpoints = [path for path in args.results if path.endswith(".pt")]
    others = tuple(path for path in args.results if path not in checkpoints)
    results = read(others) if others or not checkpoints else []
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the folder {out} ({e.strerror}); choose another --out.") from None
    written = []
    found, heads, settings, tuned = curves(results), all_heads(results), chen_settings(results), tuned_networks(results)
    texts = {"kucer-tables.md": found and tables(found), "gowal-table.md": heads and gowal_table(heads), "chen-tables.md": chen_tables(settings)}
    texts["rebuffi-table.md"] = tuned and rebuffi_table(tuned)
    reversals = [result for result in results if result["script"] == "mtl_reverse"]
    texts["lawhon-table.md"] = reversals and lawhon_table(reversals)
    for name, text in texts.items():
        if text:
            write_atomically(out / name, lambda f: f.write(text.encode()))
            written.append(out / name)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("matplotlib is not installed: no figures")
    else:
        written += curve_figures(found, out)
        written += accuracy_figures(heads, "label_fraction", out) + accuracy_figures(heads, "jitter_strength", out)
        written += summary_figures(settings, out) + venn_figures(results, out)
        written += rebuffi_figures(tuned, out) + lawhon_figures(reversals, out)
        states = {path: load_checkpoint(path) for path in checkpoints}
        vits = {f"{Path(path).parent.name} {Path(path).stem}": state for path, state in states.items() if state["network"].get("arch") in VITS}
        if vits:
            written.append(filter_figure(vits, out))
        for path, state in states.items():
            if state["network"].get("arch") not in VITS:
                written.append(landscape_figure(path, out, written))
        groups = defaultdict(list)  # runs on the same data with the same attack go into one picture
        for result in results:
            if result["script"] == "eval_cifar10c":
                groups[tuple(result["args"].get(k) for k in SAME_CORRUPTIONS)].append(result)
        for group in groups.values():
            name = "-".join(dict.fromkeys(row["name"] for result in group for row in result["rows"]))
            path = unused(out / file_name(f"kucer-corruptions-{name}"), written)
            figure4(group, path)
            written.append(path)
    for path in written:
        print(path)
    return written


if __name__ == "__main__":
    cli(main, Args)
