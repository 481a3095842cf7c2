"""Tables (Markdown) and pictures from the results.json files of any runs.

    python results/report.py runs/*                # print the tables
    python results/report.py runs/* --out plots    # also write pictures to plots/ (needs matplotlib)
    python results/report.py                       # rewrite the tables in README.md and results/*.md

Runs that differ only in the seed become one line: mean ± standard deviation (number of seeds). Runs that
differ in anything else stay apart; a flag that the row's name does not tell is added to it, as in
`T3 (--lambda1 0.25)`. If the flags are the paper's, its numbers (results/paper.txt) stand below the line.

A table in a page stands between a comment that says how to make it and <!-- end -->:

    <!-- from quick-rotation_at.json -->                  the tables of these runs, or a file's "table"
    <!-- from speed-h200.json -->                         the rows of a benchmark
    <!-- paired quick-rotation_at.json: T3 - T0 -->       differences of two lines, seed by seed
    <!-- paired a.json b.json: T3 - T0, T3 - plain at 0.1 -->       of two pairs, at this radius only
    <!-- paired a.json: T3 - T0 at 0.1 paper +3.42; c.json: mtl - none -->    of several files, in one table

Files are relative to results/. A name in a pair is that of a line in the table, or its last word (P3F4 for
rotation-P3F4). Where rotation_at.py and jigsaw_at.py share a table, the task comes first: `jigsaw T3`.
"""
import importlib
import json
import math
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))
from common import (  # noqa: E402
    FREE_ON_RESUME, UserError, cli, eps_name, grouped_bars, number, paper_numbers, reading, write_atomically,
)  # fmt: skip


@dataclass
class Args:
    results: tuple[str, ...] = ()  # folders of runs, or JSON files; none: rewrite README.md and results/*.md
    out: str = ""  # folder for pictures; empty: tables only


# Flags that may differ within a line: where to compute, which rows there are, and what the rows' names tell.
FREE = FREE_ON_RESUME | {
    "seed", "quick", "plain", "variant", "method", "task", "pretrain", "finetune", "table3", "models",
    "checkpoints", "label_fractions", "heads", "layer_decay", "attacks", "lambdas", "eval_eps", "eval_data",
    "corruptions", "unforeseen",
}  # fmt: skip

# Captions of the kinds of rows. Rows without a kind are accuracies.
TITLES = {
    "": "Accuracy (%)",
    "column": "Accuracy (%) under the strongest attack of each kind",
    "losses": "Mean losses of the tasks",
    "average": "Accuracy (%) of networks and of averages of their probabilities",
    "transfer": "Images (%) that fool the network of the column when attacked for that of the line",
    "venn": "Images (%) that fool both networks of the column when attacked for that of the line",
}

# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom. The last serves for all larger numbers.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

paragraph = partial(textwrap.fill, width=118, break_on_hyphens=False, break_long_words=False)


# ---- reading -----------------------------------------------------------------------------------------


class Column(NamedTuple):
    """What identifies a number besides the name of its line."""

    kind: str  # a key of TITLES
    where: str  # test set, corruption, selected epoch, ...; '' if there is only one
    attack: str = ""  # 'clean', 'pgd-20', ...; '' if `where` says it
    norm: str = ""
    eps: float = 0.0

    def __str__(self) -> str:
        attack = f"{self.attack} {self.norm} {eps_name(self.eps)}" if self.eps else self.attack
        return ": ".join(filter(None, (self.where, attack)))


@dataclass
class Line:
    """What was measured of one network in all runs that differ only in the seed."""

    script: str
    name: str  # as in the rows: T3, plain, byorl robust 100%, ...
    setting: str  # data set, network and training, in words
    flags: dict[str, str]  # all flags but those of FREE
    label: str = ""  # the name, with what tells it from the other lines of a table
    runs: list[dict] = field(default_factory=list)
    values: dict[Column, dict[int, float]] = field(default_factory=dict)  # {seed: value}
    errors: dict[Column, float] = field(default_factory=dict)  # standard error over the images, or 0
    images: dict[Column, int] = field(default_factory=dict)  # number of test images
    papers: dict[Column, str] = field(default_factory=dict)  # the paper's number


def read(paths: Iterable[Path]) -> list[dict]:
    """What JSON files and folders of runs hold. Raises UserError."""
    found = []
    for path in paths:
        if path.is_dir() and not (path / "results.json").exists():
            print(f"left out: {path} holds no results.json yet", file=sys.stderr)
            continue
        path = path / "results.json" if path.is_dir() else path
        with reading(path):
            content = json.loads(path.read_text())
            found += [run | {"file": path} for run in (content if isinstance(content, list) else [content])]
    if not found:
        raise UserError("there are no results; name the folders of finished runs, such as runs/*.")
    return found


def shown(value: Any) -> str:
    """A flag's value as one types it. The seed in the name of a run's folder is left out."""
    if isinstance(value, list):
        return ",".join(map(shown, value))
    return eps_name(value) if isinstance(value, float) else re.sub(r"-s\d+(?=/)", "", str(value))


def setting_of(run: dict) -> str:
    """Data set, network and training in words."""
    args = run["args"]
    data = f"folder {Path(args['data_dir']).name}" if args["dataset"] == "folder" else args["dataset"]
    words = [run.get("dataset_name", data) + " (generated corruptions)" * args.get("generate", False)]
    if "arch" in args:
        network = f"{args['arch']} x{args['width']:g}, {args['epochs']} epochs"
        how = "attacked" if args.get("victim") else "trained"
        how += f" with {args['norm']} eps {eps_name(args['eps'])}"
        if "recipe" in args:  # adv_mae.py: encoders of several radii share a table
            how = f"fine-tuned by {args['recipe']}"
        words += [shown(args.get("victim", "")) or network, how]
    return ", ".join(words)


def read_row(script: str, row: dict) -> tuple[str, Column, float]:
    """Name of the line, column and value of a row of results.json."""
    kind, name, value = row.get("kind", ""), row["name"], row.get("accuracy")
    if kind == "losses":
        return f"{name}: {row['task']} loss", Column(kind, row["images"]), row["mean"]
    if kind == "column":
        return name, Column(kind, row["column"]), value
    if kind in ("transfer", "venn"):  # the row's accuracy is the share of the images that do not fool
        targets = [row["target"]] + [row["other"]] * (kind == "venn")
        return row["source"], Column(kind, " and ".join(targets)), 100 - value
    if script == "eval_unforeseen":  # the radius is left out: we show the mean over an attack's strengths
        return name, Column(kind, row["attack"] if row["strength"] else "clean"), value
    where, attack = row.get("set", row.get("corruption", "test")), row["attack"].replace("none", "clean")
    where = f"best {row['pick'].upper()}" if "pick" in row else "" if where == "test" else where
    attack += f" λ {row['lambda']:g}" if attack.startswith("aware") else ""
    return name, Column(kind, where, attack, row["norm"], row["eps"]), value


def groups_of(runs: list[dict]) -> list[list[Line]]:
    """Merge seeds. Returns the lines of each table. Raises UserError."""
    lines, groups = {}, defaultdict(list)
    for run in (run for run in runs if "script" in run):
        found = defaultdict(list)
        with reading(run["file"]):
            script, setting = run["script"], setting_of(run)
            evaluation = script.startswith("eval_")  # its networks' folders tell the seeds of their training
            flags = {k: shown(v) for k, v in run["args"].items() if k not in FREE}
            for row in (row for row in run["rows"] if row.get("kind") != "difference"):  # see `differences`
                name, column, value = read_row(script, row)
                seed = re.search(r"-s(\d+)/", name) if evaluation else None
                seed = int(seed[1] if seed else run["args"]["seed"])
                found[shown(name) if evaluation else name, column, seed].append((float(value), row))
        for (name, column, seed), pairs in found.items():
            if len(pairs) > 1 and not evaluation:
                raise UserError(f"{run['file']} has two rows of '{name}' for '{column}'.")
            value, row = fmean(value for value, _ in pairs), pairs[0][1]  # over severities or strengths
            key = json.dumps([script, name, setting, flags], sort_keys=True)
            line = lines.setdefault(key, Line(script, name, setting, flags))
            if line.values.setdefault(column, {}).setdefault(seed, value) != value:
                other = f"another run, {line.runs[0]['file']}, but other numbers of '{name}': leave one out"
                raise UserError(f"{run['file']} has the flags and the seed of {other}.")
            line.runs += [run] * (run not in line.runs)
            line.errors[column] = row.get("se", 0.0)
            line.images[column] = row.get("examples") or len(row["values"])  # of losses
            if row.get("paper") is not None:
                line.papers[column] = f"{row['paper']:.2f}"
    for line in lines.values():
        line.papers |= papers_of(line)
        groups[line.script.replace("jigsaw", "rotation"), line.setting].append(line)  # Kucer et al. share
    for group in groups.values():
        name_lines(group)
    return list(groups.values())


def name_lines(group: list[Line]) -> None:
    """Give each line of a table a label: its name, and the flags in which it differs from the others."""
    for line in group:
        namesakes = [o for o in group if (o.script, o.name) == (line.script, line.name)]
        words = []
        for flag, value in line.flags.items():
            values = [o.flags[flag] for o in group if flag in o.flags]
            usual = values.count(value) > len(values) / 2  # most lines have it: it need not be told
            if not usual and len({*values, *(o.flags.get(flag) for o in namesakes)}) > 1:
                flag = flag.replace("_", "-")
                switch = {"True": f"--{flag}", "False": f"--no-{flag}"}
                words.append(switch.get(value, f"--{flag} {value or '(empty)'}"))
        task = line.script.removesuffix("_at") + " " if len({o.script for o in group}) > 1 else ""
        line.label = task + line.name + (f" ({' '.join(words)})" if words else "")


def papers_of(line: Line) -> dict[Column, str]:
    """The paper's numbers for a line, if its flags are the paper's."""
    run, script, name = line.runs[0], line.script, line.name
    if not (RESULTS.parent / f"{script}.py").exists() or run["rows"][0].get("source") == "":
        return {}  # source: the classifier of mtl_reverse.py is not the paper's
    try:
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in run["args"].items()}
        args = importlib.import_module(script).Args(**given)
    except TypeError:  # a run of an older version, with other flags
        return {}
    # Chen et al.'s comparisons: what the paper calls the networks
    in_paper = {row["name"]: row["in_paper"] for row in run["rows"] if "in_paper" in row}
    kind = "column" if script == "mtl_reverse" else "average" if name in in_paper else ""
    name = in_paper.get(name, name)
    known, columns = paper_numbers(script, args, name), [c for c in line.values if c.kind == kind]
    if script == "chen_pretrain_finetune":  # TA, RA and an epoch, of F2 and F4 that of best RA
        known, best = known[:2], "best RA" if name.endswith(("F2", "F4")) else "best TA"
        columns = [c for c in columns if c.where in ("", best)]
    found = dict(zip(columns, known, strict=False))
    for column in (c for c in line.values if c.kind == "transfer"):
        target = "itself" if column.where == line.name else in_paper.get(column.where)
        found[column] = "".join(paper_numbers(script, args, f"{name} -> {target}"))
    return {column: known for column, known in found.items() if known}


# ---- tables ------------------------------------------------------------------------------------------


def mean_sd(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds (0 for one seed)."""
    values = list(values)
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def cell(line: Line, column: Column) -> str:
    """'52.8 ± 1.9 (5)'; of one seed '52.78', with the standard error over the test images if it is known."""
    n, (mean, sd) = len(line.values[column]), mean_sd(line.values[column].values())
    digits = 3 if column.kind == "losses" else 1 if n > 1 else 2
    text = f"{mean:.{digits}f}"
    if n > 1:
        return f"{text} ± {sd:.{digits}f} ({n})"
    return text + (f" ± {line.errors[column]:.{digits}f}" if line.errors[column] else "")


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]], words: int = 1) -> str:
    """A table; `words` columns are aligned on the left, the others, of numbers, on the right."""
    lines = [list(header), *rows]
    lines.insert(1, ["---"] * words + ["---:"] * (len(lines[0]) - words))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def about(lines: list[Line]) -> str:
    """Script, data set, network and training of the lines of a table."""
    quick = " --quick" * all(run["args"].get("quick", False) for line in lines for run in line.runs)
    scripts = " and ".join(f"`{script}.py{quick}`" for script in dict.fromkeys(line.script for line in lines))
    setting = " and ".join(dict.fromkeys(line.setting for line in lines))
    setting += " (plain: without attack)" * any(line.name == "plain" for line in lines)
    balls = {f"{line.flags['norm']} eps {line.flags['eps']}" for line in lines if "recipe" in line.flags}
    return f"{scripts}: {setting}" + (f", pre-trained with {min(balls)}." if len(balls) == 1 else ".")


def caption(lines: list[Line], kind: str) -> str:
    """Attack, test images, seeds and devices of the numbers of a kind."""
    numbers = [(line, column) for line in lines for column in line.values if column.kind == kind]
    attacks = {column.attack for _, column in numbers if column.eps}
    text = TITLES[kind] + (f" under {min(attacks)}" if len(attacks) == 1 else "")
    if severities := lines[0].runs[0]["args"].get("severities"):
        text += f", mean over severities {severities}"
    if lines[0].script == "eval_unforeseen":
        text += ", mean over the strengths of an attack"
    images = {line.images[column] for line, column in numbers if not column.eps}  # several test sets?
    attacked = {line.images[column] for line, column in numbers if column.eps}
    text += f"; {'up to ' * (len(images) > 1)}{max(images | attacked):,} test images"
    text += f" ({min(attacked):,} attacked)" if attacked and min(attacked) < max(images | attacked) else ""
    if max(len(line.values[column]) for line, column in numbers) > 1:
        text += "; mean ± standard deviation over seeds (their number)"
    else:
        errors = any(line.errors[column] for line, column in numbers)
        text += "; 1 seed" + "; ±: standard error over the images" * errors
    return f"{text}; {' and '.join({str(run.get('device')): 0 for line in lines for run in line.runs})}."


def table(lines: list[Line], kind: str) -> str:
    """A line per network and a column per attack; of eval_*.py a line per corruption or attack."""
    grid, rows = defaultdict(dict), []  # {line: {column: (ours, the paper's)}}
    attacks = {column.attack for line in lines for column in line.values if column.eps}
    for line in lines:
        for column in (c for c in line.values if c.kind == kind):
            row, head = line.label, str(column)
            if line.script.startswith("eval_"):
                row, head = column.where, f"{line.label}, {column._replace(where='')}".removesuffix(", ")
            if len(attacks) == 1 and column.eps:  # the caption says which
                head = head.replace(f"{column.attack} ", "")
            grid[row][head] = cell(line, column), line.papers.get(column, "")
    heads = list(dict.fromkeys(head for row in grid.values() for head in row))
    for label, cells in grid.items():
        ours, papers = zip(*(cells.get(head, ("", "")) for head in heads), strict=True)
        rows += [[label, *ours]] + [["the paper", *papers]] * any(papers)
    return markdown(["", *heads], rows)


def tables(runs: list[dict]) -> str:
    """All tables of these runs, benchmarks and other files, with captions."""
    parts = []
    for content in (run for run in runs if "script" not in run):
        with reading(content["file"]):
            parts.append(table_of_file(content))
    for lines in groups_of(runs):
        first = about(lines) + " "
        for kind in TITLES:
            if some := [line for line in lines if any(column.kind == kind for column in line.values)]:
                parts += [paragraph(first + caption(some, kind)), table(some, kind)]
                first = ""
    return "\n\n".join(parts)


def table_of_file(content: dict) -> str:
    """The table of a file without runs: {"table": [header, *rows]}, or the {"rows": [...]} of a benchmark."""
    known = ("what", "benchmark", "network", "library", "mixed precision", "device")
    words = [str(content[key]).replace("torch.", "") for key in known if key in content]
    text = paragraph("; ".join([*words, f"torch {content['torch'].split('+')[0]}"]) + ".")
    if "table" in content:
        return f"{text}\n\n{markdown(content['table'][0], content['table'][1:])}"
    formats = {
        "batch": ("batch", "d"), "images_per_s": ("images/s", ",.4g"), "ratio": ("ratio", ".2f"),
        "peak_mb": ("peak MB", ",.0f"),
        "gflops_per_image": ("GFLOP/image", ",.4g"), "share_of_matmul_peak": ("share of peak", ".0%"),
    }  # fmt: skip
    rows = [row for row in content["rows"] if "images_per_s" in row]
    keys = [key for key in formats if any(row.get(key) for row in rows)]
    lines = [[r["name"], *(format(r[k], formats[k][1]) if r.get(k) else "" for k in keys)] for r in rows]
    return f"{text}\n\n{markdown(['step', *(formats[key][0] for key in keys)], lines)}"


def paired(words: str) -> str:
    """The table of <!-- paired WORDS -->: differences between runs of the same seed."""
    rows, texts = [], []
    for part in words.split("; "):
        form = r"(?P<files>[^:]+): (?P<pairs>.+?)(?: at (?P<radius>\S+))?(?: paper (?P<paper>.+))?"
        if not (found := re.fullmatch(form, part)):
            raise UserError(f"'{part}' is not of the form FILE: A - B.")
        runs = read(RESULTS / name for name in found["files"].split())
        text, some = differences(runs, found["pairs"], number(found["radius"]) if found["radius"] else None)
        texts.append(text)
        several = found["files"].replace(".json", "") + ": "
        some = [[several * ("; " in words) + pair, *row] for pair, *row in some]
        rows += [[*row, found["paper"] or ""] for row in some]
    columns = 6 if any(row[-1] for row in rows) else 5
    text = texts[0] if len(texts) == 1 else ""
    text = f"{text} Differences in accuracy (points) between runs of the same seed: mean ± standard error. "
    text = paragraph(text.strip() + " Shown: the 95% t interval leaves out zero.")
    header = ["pair", "under", "difference", "seeds", "95%", "the paper"][:columns]
    return f"{text}\n\n{markdown(header, [row[:columns] for row in rows], words=2)}"


def differences(runs: list[dict], pairs: str, radius: float | None = None) -> tuple[str, list[list[str]]]:
    """(what the runs are, rows): the differences of the lines of each pair in 'A - B, C - D'."""
    every = [o for group in groups_of(runs) for o in group if any(c.kind in ("", "column") for c in o.values)]
    used, rows = [], []

    def find(name: str) -> Line:
        some = [o for o in every if o.label == name]
        some = some or [o for o in every if re.split("[ /-]", o.label)[-1] == name]
        if len(some) != 1:
            labels = ", ".join(o.label for o in every)
            raise UserError(f"'{name}' is not the name of one line; there are: {labels}.")
        return some[0]

    for pair in pairs.split(", "):
        if pair.count(" - ") != 1:
            raise UserError(f"'{pair}' is no pair; write A - B.")
        a, b = (find(name.strip()) for name in pair.split(" - "))
        used += [a, b]
        for column in a.values:
            # 'clean', 'pgd' and 'suite' of mtl_reverse.py hold one attack, which has rows of its own.
            strongest = column.kind == "column" and column.where not in ("clean", "pgd", "suite")
            elsewhere = radius is not None and not math.isclose(column.eps, radius, rel_tol=1e-3)
            if not (column.kind == "" or strongest) or elsewhere or column not in b.values:
                continue
            seeds = a.values[column].keys() & b.values[column].keys()
            if len(seeds) < 2:
                raise UserError(f"'{pair}' needs both in at least two seeds.")
            mean, sd = mean_sd(a.values[column][seed] - b.values[column][seed] for seed in seeds)
            error = sd / math.sqrt(len(seeds))
            t = T_QUANTILES[min(len(seeds) - 1, len(T_QUANTILES)) - 1]
            verdict = "shown" if abs(mean) > t * error else "not shown"
            under = f"{column}{' (the strongest attack on each)' * strongest}"
            rows.append([pair, under, f"{mean:+.1f} ± {error:.1f}", str(len(seeds)), verdict])
    if not rows:
        raise UserError(f"the lines of '{pairs}' have no such attack in common.")
    return about(used), rows


# ---- pages -------------------------------------------------------------------------------------------


def fill(text: str, page: str = "the page") -> str:
    """A page with the tables of all its blocks made anew. Raises UserError, naming page and block."""

    def block(found: re.Match) -> str:
        kind, words = found["kind"], " ".join(found["words"].split())
        try:
            body = paired(words) if kind == "paired" else tables(read(map(RESULTS.joinpath, words.split())))
        except (UserError, ValueError) as e:
            raise UserError(f"{page}, <!-- {kind} {words} -->: {e}") from None
        return f"{found['head']}\n{body}\n<!-- end -->"

    begin = r"^(?P<head><!-- (?P<kind>from|paired) (?P<words>[^>]+) -->)\n"
    text, count = re.subn(begin + r"(?:(?!<!--).*\n)*<!-- end -->$", block, text, flags=re.M)
    if count < len(re.findall(begin, text, re.M)):
        raise UserError(f"{page}: a block has no <!-- end --> of its own.")
    return text


# ---- pictures ----------------------------------------------------------------------------------------


def place(kind: str, line: Line, column: Column) -> tuple[str, str, Any] | None:
    """Where a number stands in a plot of this kind: (panel, series, x), or None."""
    attack, label = str(column._replace(where="")), line.label
    if kind == "radius" and column.kind == "" and column.norm:
        return f"{column.where} {column.norm}".strip(), label, column.eps
    if kind == "labels" and (name := re.fullmatch(r"(.*) ([\d.]+)%( \(.*)?", label)):  # byorl robust 10%
        return attack, name[1] + (name[3] or ""), float(name[2])
    if kind == "corruptions" and line.script.startswith("eval_"):
        return attack, label, column.where
    if kind == "settings" and (name := re.fullmatch(r"(.*P\d|RS)(F\d)( \(.*)?", label)):  # rotation-P3F4
        return str(column), name[1] + (name[3] or ""), name[2]
    if kind == "settings" and line.script == "adv_mae" and len({c.where for c in line.values}) > 1:
        return attack, column.where or "test", label
    return None


def draw_curves(ax: Any, series: dict) -> None:
    """Curves with error bars. series, here and below: {label: {x: (mean, standard deviation)}}."""
    for label, points in series.items():
        x = sorted(points)
        mean, sd = zip(*(points[v] for v in x), strict=True)
        ax.errorbar(x, mean, sd, marker="o", capsize=3, label=label)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def draw_bars(ax: Any, series: dict) -> None:
    """Groups of bars, one bar of each series in a group."""
    groups = list(dict.fromkeys(x for points in series.values() for x in points))
    every = {label: [points.get(x, (math.nan, 0.0)) for x in groups] for label, points in series.items()}
    means, sds = ({label: [pair[i] for pair in pairs] for label, pairs in every.items()} for i in (0, 1))
    grouped_bars(ax, groups, means, sds)
    ax.legend(fontsize=8)


def draw_heat_map(ax: Any, series: dict) -> None:
    """Means and standard deviations in coloured cells, a row of each series."""
    columns = sorted({x for points in series.values() for x in points})
    means = [[points.get(x, (math.nan, 0))[0] for x in columns] for points in series.values()]
    ax.imshow(means, cmap="YlGn", aspect="auto", vmin=0, vmax=150)  # light enough for black numbers
    for i, points in enumerate(series.values()):
        for x, (mean, sd) in points.items():
            text = f"{mean:.1f}" + (f"\n± {sd:.1f}" if sd else "")
            ax.text(columns.index(x), i, text, ha="center", va="center", fontsize=8)
    ax.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    ax.set_yticks(range(len(series)), list(series))


PLOTS = {  # kind: (how to draw it, least number of points, label of the x axis)
    "radius": (draw_curves, 3, "radius of the attack"),
    "labels": (draw_curves, 2, "labels (%)"),
    "corruptions": (draw_bars, 1, ""),
    "settings": (draw_heat_map, 2, ""),
}


def pictures(groups: list[list[Line]], out: Path) -> None:
    """Write the plots that there are numbers for, as OUT/<number of the table>-<script>-<kind>.png."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: python -m pip install matplotlib.") from None
    out.mkdir(parents=True, exist_ok=True)
    for i, lines in enumerate(groups, start=1):
        for kind, (draw, least, x_label) in PLOTS.items():
            panels = defaultdict(lambda: defaultdict(dict))
            for line in lines:
                for column, values in line.values.items():
                    if at := place(kind, line, column):
                        panels[at[0]][at[1]][at[2]] = mean_sd(values.values())
            panels = {name: p for name, p in panels.items() if max(map(len, p.values())) >= least}
            if not panels:
                continue
            figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
            axes = figure.subplots(1, len(panels), squeeze=False)[0]
            for ax, (title, series) in zip(axes, panels.items(), strict=True):
                draw(ax, series)
                ax.set(title=title, xlabel=x_label)
                if kind == "labels":
                    ax.set_xscale("log")
                    ax.xaxis.set_major_formatter("{x:g}")
            axes[0].set_ylabel("" if kind == "settings" else "accuracy (%)")
            figure.suptitle(textwrap.fill(about(lines).replace("`", ""), 70 * len(panels)), fontsize=9)
            path = out / f"{i}-{lines[0].script}-{kind}.png"
            write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=120))
            print(path)


# ---- the command -------------------------------------------------------------------------------------


def main(args: Args) -> None:
    """Print the tables of the runs that are named and write their pictures, or rewrite the pages."""
    if args.results:
        runs = read(map(Path, args.results))
        print(tables(runs))
        return pictures(groups_of(runs), Path(args.out)) if args.out else None
    pages = {page: page.read_text() for page in (RESULTS.parent / "README.md", *sorted(RESULTS.glob("*.md")))}
    made = {page: fill(text, page.name) for page, text in pages.items()}  # nothing is written if one fails
    for page, text in made.items():
        write_atomically(page, lambda f: f.write(text.encode()))
        print(f"{page.name}: {'unchanged' if text == pages[page] else 'rewritten'}")


if __name__ == "__main__":
    cli(main, Args)
