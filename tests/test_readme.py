"""README and the pages in results/ are true: commands parse, links resolve, numbers are in the files."""
import ast
import functools
import json
import math
import re
import shlex
import sys
from collections.abc import Callable

import pytest
import torch
from conftest import ROOT, TINY

import common
import rotation_at
from common import build_model, check_radii, parse_args, pgd

sys.path.insert(0, str(ROOT / "results"))
sys.path.insert(0, str(ROOT / "benchmarks"))
import cost
import report

SCRIPTS = {path.name: __import__(path.stem) for path in sorted(ROOT.glob("*.py")) if path.stem != "common"}
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "results").glob("*.md")))}
CODE = [path for folder in (".", "tests", "benchmarks", "results") for path in (ROOT / folder).glob("*.py")]


def commands() -> list[str]:
    """Every command of README, the pages and the docstrings of the scripts."""
    found = []
    for text in PAGES.values():
        found += re.findall(r"`((?:python|torchrun) [^`]*)`", text)
        found += re.findall(r"^(?:python|torchrun) .*$", text, re.M)
    for script in SCRIPTS.values():
        found += re.findall(r"^    ((?:python|torchrun) [^#\n]*)", script.__doc__, re.M)
    return sorted({" ".join(command.split()) for command in found})


def test_commands_parse(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.inspect, "getsource", functools.cache(common.inspect.getsource))  # it is slow
    parsed = 0
    for part in (part for line in commands() for part in line.removesuffix("&").split("&&")):
        words = shlex.split(part)
        script = next((w for w in words if w in SCRIPTS), None)
        given = words[words.index(script) + 1 :] if script else []
        if script and "--help" not in given and "..." not in given and "CHECKPOINT" not in given:
            try:
                args = parse_args(SCRIPTS[script].Args, given)
                if hasattr(args, "norm"):
                    check_radii(args)
            except (SystemExit, Exception) as e:
                pytest.fail(f"{part}: {e!r}")
            parsed += 1
    assert parsed > 100


def test_files_anchors_and_flags_exist():
    known = "".join(path.read_text() for path in CODE)
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(((?!http)[^)]+)\)", text):
            path, _, anchor = link.partition("#")
            assert (page.parent / path).exists(), f"{page.name}: {link}"
            titles = re.findall(r"^#+ (.*)$", (page.parent / path).read_text() if anchor else "", re.M)
            anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert not anchor or anchor in anchors, f"{page.name}: {link}"
        for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", re.sub(r"<!--|-->|#SBATCH.*", "", text))):
            name = flag[2:].removeprefix("no-").replace("-", "_")
            torchrun = ("nproc_per_node", "nnodes", "rdzv_endpoint", "rdzv_backend", "rdzv_id")
            is_known = name in known or name.replace("_", "-") in known or name in torchrun
            assert is_known, f"{page.name}: {flag}"
    shown = "".join(PAGES.values())
    for path in (ROOT / "results").iterdir():
        if path.suffix in (".json", ".png"):
            assert path.name in shown, f"{path.name} is on no page"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_files(page):
    """`python results/report.py` would change nothing."""
    assert report.fill(PAGES[page], page.name) == PAGES[page]


def test_the_example_is_the_first_run():
    run = json.loads((ROOT / "results" / "quick-rotation_at.json").read_text())[0]
    for name, epoch in {(row["name"], row["epoch"]) for row in run["rows"]}:
        line = re.search(rf"^{name}, epoch {epoch} +(.*)$", README, re.M)[1]
        assert line.split() == [f"{row['accuracy']:.2f}" for row in run["rows"] if row["name"] == name]


def test_the_papers_numbers():
    """Outside of generated tables, commands and code, numbers with two decimals are those of paper.txt."""
    known = set(re.findall(r"\d+\.\d+", (ROOT / "results" / "paper.txt").read_text()))
    for page, text in PAGES.items():
        tables, links = r"<!-- (?:from|paired) .*?<!-- end -->", r"\(http[^)]*\)"
        for left_out in (tables, r"```.*?```", r"`[^`]*`", r"\$[^$]*\$", links):
            text = re.sub(left_out, "", text, flags=re.S)
        found = set(re.findall(r"(?<![\w./:-])\d+\.\d\d(?!\d)", text))
        assert sorted(found - known - OTHERS) == [], page.name


# Gowal et al., Table 5, which no script prints; accuracies that papers mention in their text; settings.
OTHERS = set(
    """65.14 45.44 62.39 41.58 47.07 31.57 65.27 43.83 62.40 41.06 47.64 31.99 69.64 65.48 66.39 61.90 55.06
    51.00 83.69 51.14 89.69 0.34 0.67 0.85 0.87 0.89 0.95 1.68 3.64 3.10 0.05 0.25 0.15 0.75 0.65""".split()
)


def test_the_costs_are_computed():
    """GPU hours in README are images x epochs / images per second, and that speed is measured (but for ~)."""
    measured = json.loads((ROOT / "results" / "speed-h200.json").read_text())["rows"]
    speeds = {row["images_per_s"] for row in measured}
    rows = re.findall(r"^\| `[^|]*\| ([\d,]+)(?: × (\d+))? \| (~?)([\d,.]+) \| ~?([\d.]+) \|", README, re.M)
    assert len(rows) == 4
    for images, epochs, roughly, speed, hours in rows:
        images, epochs, speed = int(images.replace(",", "")), int(epochs or 1), float(speed.replace(",", ""))
        assert roughly or speed in speeds
        assert float(hours) == pytest.approx(images * epochs / speed / 3600, rel=0.1)


def test_lines_are_short():
    for path in CODE:
        assert max(map(len, path.read_text().splitlines())) <= 110, path.name
    for page, text in PAGES.items():
        lines = re.sub(r"<!-- (from|paired) .*?<!-- end -->", "", text, flags=re.S).splitlines()
        assert max(len(line) for line in lines if not line.startswith("|")) <= 120, page.name
    assert len(README.splitlines()) <= 250


def test_pgd_is_copied_with_what_the_readme_lists():
    names = {"pgd", *re.search(r"take it with `(\w+)`, `(\w+)` and\s+`(\w+)`", README).groups()}
    parts = [n for n in ast.parse((ROOT / "common.py").read_text()).body if getattr(n, "name", "") in names]
    alone = {"math": math, "Callable": Callable, "torch": torch, "Tensor": torch.Tensor}
    exec("\n".join(map(ast.unparse, parts)), alone)
    x, weights = torch.rand(4, 3, 8, 8), torch.randn(3, 8, 8)
    both = []
    for attack in pgd, alone["pgd"]:
        torch.manual_seed(0)
        both.append(attack(lambda z: (z * weights).sum((1, 2, 3)), x, eps=0.1, norm="l2"))
    assert torch.equal(*both) and len(names) == len(parts) == 4


def test_the_snippets_run(tmp_path, monkeypatch):
    """README's blocks of Python, with digits and a CPU in place of CIFAR-10 and a GPU, and less work."""
    monkeypatch.chdir(tmp_path)
    rotation_at.main(rotation_at.Args(**TINY | {"epochs": 1, "out": str(tmp_path / "run")}))
    evaluation, attack, notebook = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    changes = {
        '"runs/rotation_at-T3-linf-8_255-s0/best.pt"': repr(str(tmp_path / "run" / "best.pt")),
        "print(": "left = (", "batches(test, 500": "batches(test.subset(torch.arange(40)), 500",
        "cuda": "cpu", '"cifar10"': '"digits"', '"standard"': '"suite-fast"',
    }  # fmt: skip
    for old, new in changes.items():
        assert old in evaluation
        evaluation = evaluation.replace(old, new)
    names = {}
    exec(evaluation, names)
    assert list(names["left"]) == ["none", "pgd-20", "apgd-ce", "apgd-dlr", "multi-targeted", "square"]
    names["x"], names["y"] = next(names["batches"](names["test"], 8, torch.device("cpu")))
    names["network"] = names["model"]
    exec(attack, names)
    assert 0 < (names["x_adv"] - names["x"]).abs().max() <= 8 / 255 + 1e-6
    monkeypatch.setattr(rotation_at.Args, "QUICK", TINY | {"epochs": 1})
    exec(notebook, names)  # in miniature
    assert names["results"]["rows"]


def test_flops_and_memory_are_those_by_hand():
    """T0: ten passes forward and back to the images, one that also goes to the weights."""
    command, passes = cost.COMMANDS["rotation_at.py --variant T0"], []
    model = build_model("resnet18", {"class": 10, "rotation": 4})

    def count(layer, inputs, output):
        passes.append(2 * layer.weight.numel() * output[0].numel() // output.shape[1])

    for layer in (m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))):
        layer.register_forward_hook(count)
    model(torch.rand(1, 3, 32, 32))
    flops, weights, optimiser, peak = cost.measure(command, 2)
    assert flops == pytest.approx(23 * sum(passes) - passes[0], rel=1e-4)  # at last no gradient for images
    assert weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.nbytes for n, p in model.named_parameters() if "rotation" not in n)
    assert optimiser == 2 * trained and peak > 3 * trained  # gradients and momentum
    assert (flops, weights, optimiser, peak) == cost.measure(command, 2, fake=False)
