"""The papers' tables (Markdown) and figures (PNG) from the results.json files of any runs.

    python report.py runs/*                      # every run in runs/; writes report/
    python report.py results/*.json --out report

Kucer et al. 2021 (rotation_at.py, jigsaw_at.py, eval_cifar10c.py):

    kucer-tables.md     Tables 1-4, the paper's rows above ours; runs that differ in nothing but the seed are averaged
    kucer-lambda-*.png       Figures 1 and 3: T1 for several lambda1 (0: T0), one picture per task, norm, radius and setting
    kucer-variants-*.png     the same for T0 ... T3 and both tasks; dashed: the paper's Tables 1-3
    kucer-corruptions-*.png  Figure 4: accuracy per type of corruption, clean above, attacked below

Gowal et al. 2021 (byorl.py):

    gowal-table.md           all heads: clean and robust accuracy, the paper's beside them
    gowal-labels-*.png       Figures 3, 4, 6, 7, 8: accuracy over the share of labels
    gowal-jitter-*.png       Figure 5: accuracy over --jitter-strength
    landscape-*.png          Figures 9 and 10 for any checkpoint: python report.py runs/X/byorl-robust-100%.pt

This is the only file that needs matplotlib; without it only the tables are written.
"""
import json
import math
import re
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

import byorl
import jigsaw_at
import rotation_at
from common import (
    UserError, apgd, batches, ce_per_image, cli, eps_name, l2_norm, load_checkpoint, load_data, load_model, margin, write_atomically,
)  # fmt: skip
from jigsaw_at import PAPER as JIGSAW_PAPER
from rotation_at import PAPER, PAPER_EPS


@dataclass
class Args:
    results: tuple[str, ...] = ()  # results.json files, or folders of runs, or checkpoints (*.pt) whose loss landscape is wanted
    out: str = "report"  # folder to write to; files in it are replaced


# What may differ between two runs that are averaged or drawn as one line: the seed, and where and how they were computed.
NOT_THE_SETTING = {
    "seed", "out", "resume", "device", "workers", "data_dir", "data_mirror", "compile", "plain", "quick", "init",
    "eval_eps", "pretrain", "pretrain_eps", "pretrain_epochs", "stage", "label_fractions", "heads",
}  # fmt: skip

# What names a run by itself, so that a setting's description need not.
NAMED = {"dataset", "arch", "width", "epochs", "norm", "eps", "variant", "eval_steps", "eval_attack", "method", "extra_data"}
JIGSAW_ONLY = {"grid", "num_permutations", "permutations"}


# ---- reading -------------------------------------------------------------------------------------------------------


def read(paths: tuple[str, ...]) -> list[dict]:
    """The results of all runs named. Raises UserError for a file that is none."""
    files = []
    for path in map(Path, paths):
        files += [path / "results.json"] if path.is_dir() and (path / "results.json").exists() else [path] if path.is_file() else []
        if not path.exists():
            raise UserError(f"there is no {path}; name results.json files or folders of runs.")
    results = []
    for file in files:
        try:
            result = json.loads(file.read_text())
            needed = {"name", "attack", "norm", "eps", "examples", "accuracy", "paper"}
            args = {"dataset", "generate"} if result["script"] == "eval_cifar10c" else {"dataset", "arch", "epochs", "norm", "eps", "seed", "quick"}
            if not result["rows"] or not args <= result["args"].keys() or not all(needed <= row.keys() for row in result["rows"]):
                raise ValueError
        except (OSError, ValueError, AttributeError, TypeError, KeyError):
            raise UserError(f"{file} is not a results.json of these scripts.") from None
        results.append(result)
    if not results:
        raise UserError("no results.json found; name the files or the folders of finished runs, such as runs/*.")
    return results


def dataset_name(result: dict) -> str:
    """What was trained on; a file's own `dataset_name` (such as 'CIFAR-10 (JPEG copy)') wins."""
    a = result["args"]
    return result.get("dataset_name", f"folder {Path(a['data_dir']).name}" if a["dataset"] == "folder" else a["dataset"])


def describe(result: dict) -> str:
    """The setting of a run in a few words, for tables and legends."""
    a = result["args"]
    script = {"rotation_at": rotation_at, "jigsaw_at": jigsaw_at, "byorl": byorl}[result["script"]]
    usual = vars(script.Args()) | (script.Args.QUICK if a["quick"] else {})
    attack = f"PGD-{a['eval_steps']}" if a.get("eval_attack", "pgd20") == "pgd20" else a["eval_attack"]
    parts = [dataset_name(result), f"{a['arch']} x{a['width']:g}", f"{a['uat_epochs' if a.get('method') == 'uat-ft' else 'epochs']} epochs", attack]
    parts += ["--quick"] if a["quick"] else []
    for k, v in a.items():
        if k not in NOT_THE_SETTING | NAMED and v != usual.get(k, v):
            flag = k.replace("_", "-")
            parts.append((f"--{flag}" if v else f"--no-{flag}") if isinstance(v, bool) else f"--{flag} {v:g}" if isinstance(v, float) else f"--{flag} {v}")
    return ", ".join(parts)


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
        return sum(self.accuracy[eps]) / len(self.accuracy[eps])

    def show(self, eps: float) -> str:
        """'47.57', or '47.57 ± 0.31' (standard deviation over seeds)."""
        values = self.accuracy.get(eps, [])
        if len(values) < 2:
            return f"{values[0]:.2f}" if values else ""
        spread = math.sqrt(sum((v - self.mean(eps)) ** 2 for v in values) / (len(values) - 1))
        return f"{self.mean(eps):.2f} ± {spread:.2f}"


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
            if args["pretrain"] != "none":
                ignored = ignored - {"pretrain_eps", "pretrain_epochs"}
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
        eps, radius = PAPER_EPS[norm], TRAINED_AT[norm]
        text.append(f"\n## {table}: {caption}\n\n| | setting | " + " | ".join(map(eps_name, eps)) + " |")
        text.append("|" + "---|" * (len(eps) + 2))
        for label, scripts, name, paper in rows:
            text.append(f"| {label} | the paper | " + " | ".join("" if v is None else f"{v:.2f}" for v in paper) + " |")
            for curve in found:
                if curve.script in scripts and curve.name == name and (curve.args["norm"], curve.args["eps"]) == (norm, radius):
                    setting = f"{curve.setting}, {len(curve.seeds)} seed{'s' if len(curve.seeds) > 1 else ''}"
                    text.append(f"| {label} | ours: {setting} | " + " | ".join(curve.show(e) for e in eps) + " |")
    return "\n".join(text) + "\n"


# ---- figures -------------------------------------------------------------------------------------------------------


def plot_curves(lines: dict[str, tuple[list[float], list[float], str]], train_eps: float, norm: str, title: str, path: Path) -> None:
    """Figure 3: all curves above; below, the difference to the first line up to the radius of training, the curves around it,
    and the curves beyond. lines: {label: (radii, accuracies, matplotlib style)}; the first is the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
    write_atomically(path, lambda f: figure.savefig(f, dpi=110, format="png"))
    plt.close(figure)


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
                lines[f"{label}, the paper"] = (PAPER_EPS[norm], paper, "--")
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
    "examples", "eval_amp",
]  # fmt: skip


def figure4(results: list[dict], path: Path) -> None:
    """Bars per type of corruption (mean over severities), one colour per network: clean above, attacked below.

    results: those of eval_cifar10c.py. Dashed lines are the means the paper gives, where the setting is its own.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
        for i, name in enumerate(names):
            heights = []
            for kind in types:
                values = [row["accuracy"] for row in mine if (row["name"], row["corruption"]) == (name, kind)]
                heights.append(sum(values) / len(values) if values else 0)
            width = 0.8 / len(names)
            ax.bar([j + (i - (len(names) - 1) / 2) * width for j in range(len(types))], heights, width, label=name, color=f"C{i % 10}")
            for row in rows:
                if row["severity"] == "all" and row["paper"] is not None and row["name"] == name and (row["attack"] == "none") == clean:
                    ax.axhline(row["paper"], color=f"C{i % 10}", linestyle="--", linewidth=1, label=f"{name}, the paper's mean")
                    break
        balls = dict.fromkeys(f"{row['norm']} {eps_name(row['eps'])}" for row in mine)
        what = "clean" if clean else f"under {mine[0]['attack'].upper()}\n{', '.join(balls)}; {mine[0]['examples']:,} images"
        ax.set_ylabel(f"accuracy (%) {what}")
        ax.grid(axis="y", alpha=0.3)
    args = results[0]["args"]
    made = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}.get(args["dataset"], dataset_name(results[0]))
    if args["generate"]:
        made = f"{dataset_name(results[0])}, generated corruptions, not the official ones"
    axes[0, 0].set_title(f"{made}; mean over severities {args['severities']}")
    legend = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(legend.values(), legend.keys(), fontsize=9, ncols=4, loc="outside lower center")
    axes[-1, 0].set_xticks(range(len(types)), [kind.replace("_", " ") for kind in types], rotation=45, ha="right")
    write_atomically(path, lambda f: figure.savefig(f, dpi=110, format="png"))
    plt.close(figure)


# ---- Gowal et al. --------------------------------------------------------------------------------------------------


@dataclass
class Head:
    """A classifier's accuracy in runs that differ in the seed only."""

    result: dict  # of the first such run
    row: dict  # its robust row
    clean: list[float]
    robust: list[float]
    paper: tuple[float | None, float | None]
    seeds: set[tuple[int, int]]  # of the run and of its encoder

    def name(self) -> str:
        """'BYORL, robust head', 'UAT-FT + 500000 images'."""
        head = f", {self.row['head']} head" if self.row["head"] else ""
        extra = f" + {self.row['extra_images']} images" if self.row["extra_images"] else ""
        before = self.row["pretrained"]  # what is said of it only where it is not as in judging
        other = [before["dataset"]] if before["dataset"] != self.result["args"]["dataset"] else []
        other += [f"{before['norm']} {eps_name(before['eps'])}"] if before["eps"] and (before["norm"], before["eps"]) != (self.row["norm"], self.row["eps"]) else []
        other += [f"{100 * self.row['encoder_fraction']:g}% of its labels"] if self.row["encoder"] == "uat-ft" and self.row["head"] else []
        return self.row["encoder"].upper() + extra + (f" from {', '.join(other)}" if other else "") + head

    def key(self, *free: str) -> str:
        """Equal for heads that differ in the arguments and keys `free` only."""
        args = {k: v for k, v in self.result["args"].items() if k not in NOT_THE_SETTING | set(free) | {"init", "extra_data", "method", "eps"}}
        row = {k: self.row[k] for k in ("encoder", "encoder_fraction", "head", "label_fraction", "extra_images", "eps") if k not in free}
        before = {k: v for k, v in self.row["pretrained"].items() if k != "seed" and k not in free}
        return json.dumps([args, row, before, dataset_name(self.result)], sort_keys=True)


def all_heads(results: list[dict]) -> list[Head]:
    """Those of all runs of byorl.py, seeds gathered."""
    found: dict[str, Head] = {}
    for result in results:
        for clean, robust in zip(result["rows"][::2], result["rows"][1::2], strict=True) if result["script"] == "byorl" else []:
            new = Head(result, robust, [], [], (clean["paper"], robust["paper"]), set())
            head, seeds = found.setdefault(new.key(), new), (result["args"]["seed"], robust["pretrained"]["seed"])
            if seeds in head.seeds:
                print(f"left out: {clean['name']} of another run with the same arguments and seeds ({describe(result)}, seed {seeds[0]}).")
                continue
            head.seeds.add(seeds)
            head.clean.append(clean["accuracy"])
            head.robust.append(robust["accuracy"])
    return list(found.values())


def gowal_table(heads: list[Head]) -> str:
    """All heads in Markdown, the paper's numbers beside them."""
    text = ["# Gowal et al. 2021\n", "Accuracy in percent; means over seeds.\n"]
    text += ["| setting | ball | encoder, head | labels | clean | robust | paper: clean | paper: robust |", "|" + "---|" * 8]
    for h in heads:
        paper = ["" if v is None else f"{v:.2f}" for v in h.paper]
        seeds = f", {len(h.clean)} seeds" if len(h.clean) > 1 else ""
        text.append(
            f"| {describe(h.result)}{seeds} | {h.row['norm']} {eps_name(h.row['eps'])} | {h.name()} | {100 * h.row['label_fraction']:g}% | "
            f"{fmean(h.clean):.2f} | {fmean(h.robust):.2f} | {' | '.join(paper)} |"
        )
    return "\n".join(text) + "\n"


def accuracy_figures(heads: list[Head], over: str, out: Path) -> list[Path]:
    """Robust accuracy on the left, clean on the right, over the share of labels or --jitter-strength; one line per encoder and head,
    a picture per setting. Stars are the paper's numbers. Returns what was written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = over == "label_fraction"
    groups, written = defaultdict(list), []
    for head in heads:
        groups[head.key(over, "encoder", "encoder_fraction", "head", "extra_images", "eps", "dataset") + f"{head.row['eps']}"].append(head)
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
        write_atomically(path, lambda f, figure=figure: figure.savefig(f, dpi=110, format="png"))
        plt.close(figure)
        written.append(path)
    return written


def landscape(
    model: torch.nn.Module, x: Tensor, y: Tensor, eps: float, norm: str, points: int = 41, reach: float = 2.0
) -> tuple[Tensor, Tensor]:
    """The margin (below 0: misclassified) on the plane through each image that is spanned by the worst perturbation AutoPGD finds, u, and
    a random vector of signs, v (Gowal et al., appendix D). Returns the axis (points,) from -reach to reach, in radii of the ball, and
    margins (B, points, points), rows along v, columns along u. u and v are made as long as the radius; images are not clipped to [0, 1].
    """
    u = apgd(lambda z: ce_per_image(model(z), y), x, eps=eps, norm=norm, steps=100) - x
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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    state = load_checkpoint(checkpoint)
    args = state.get("args", {})
    if not {"dataset", "data_dir", "image_size", "norm", "eps"} <= args.keys() or not state["network"].get("heads", {}).get("class"):
        raise UserError(f"{checkpoint} is no trained classifier of these scripts; take a file such as best.pt or byorl-robust-100%.pt.")
    model, norm, eps = load_model(checkpoint), args["norm"], args["eps"]
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
    write_atomically(path, lambda f: figure.savefig(f, dpi=110, format="png"))
    plt.close(figure)
    return path


# ---- the run -------------------------------------------------------------------------------------------------------


def main(args: Args) -> list[Path]:
    """Write all that the given results are enough for; returns the files."""
    checkpoints = [path for path in args.results if path.endswith(".pt")]
    others = tuple(path for path in args.results if path not in checkpoints)
    results = read(others) if others or not checkpoints else []
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the folder {out} ({e.strerror}); choose another --out.") from None
    written = []
    found = curves(results)
    if found:
        write_atomically(out / "kucer-tables.md", lambda f: f.write(tables(found).encode()))
        written.append(out / "kucer-tables.md")
    heads = all_heads(results)
    if heads:
        write_atomically(out / "gowal-table.md", lambda f: f.write(gowal_table(heads).encode()))
        written.append(out / "gowal-table.md")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("matplotlib is not installed: no figures")
    else:
        written += curve_figures(found, out)
        written += accuracy_figures(heads, "label_fraction", out) + accuracy_figures(heads, "jitter_strength", out)
        for checkpoint in checkpoints:
            written.append(landscape_figure(checkpoint, out, written))
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
