"""The README is true: its commands parse, its files exist, its numbers are those of the papers and of results/."""
import ast
import json
import re
import shlex
import textwrap
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY

import adv_mae
import byorl
import chen_pretrain_finetune
import common
import eval_cifar10c
import eval_unforeseen
import jigsaw_at
import mtl_reverse
import report
import rotation_at
from common import ViT, parse_args, pgd

README = (ROOT / "README.md").read_text()
SCRIPTS = {"rotation_at.py": rotation_at, "jigsaw_at.py": jigsaw_at, "eval_cifar10c.py": eval_cifar10c, "eval_unforeseen.py": eval_unforeseen, "report.py": report, "byorl.py": byorl,
           "chen_pretrain_finetune.py": chen_pretrain_finetune, "adv_mae.py": adv_mae, "mtl_reverse.py": mtl_reverse}  # fmt: skip


def commands():
    text = re.findall(r"`((?:python|torchrun)[^`\n]*)`", README) + re.findall(r"^(python .*)$", README, re.M)
    for source in SCRIPTS.values():
        text += re.findall(r"^    ((?:python|torchrun) [^#\n]*)", source.__doc__, re.M)
    return sorted({c for c in text if any(s in c for s in SCRIPTS) and "..." not in c})


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for part in line.split("&&"):
        words = shlex.split(part)
        script = next((w for w in words if w in SCRIPTS), None)
        if script and "--help" not in words:
            parse_args(SCRIPTS[script].Args, words[words.index(script) + 1 :])


def test_the_two_commands_are_there():
    assert "python -m pip install -r requirements.txt && python rotation_at.py --quick" in README
    assert "python -m pip install -r requirements.txt && python -m pytest" in README
    assert len(commands()) >= 15


def test_files_and_flags_exist():
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    known = "".join((ROOT / f).read_text() for f in (*SCRIPTS, "common.py", *sorted((ROOT / "benchmarks").glob("*.py"))))
    torchrun = {"--nproc-per-node", "--nnodes", "--rdzv-endpoint"}
    for flag in set(re.findall(r"--[a-z][a-z0-9-]+", README)) - torchrun:
        assert flag[2:].removeprefix("no-").replace("-", "_") in known, flag


def test_tables_and_outputs_are_made_from_results():
    """python report.py --readme README.md would change nothing, and every file in results/ is shown."""
    assert report.fill(README, ROOT) == README
    for path in (ROOT / "results").iterdir():
        assert f"results/{path.name}" in README, path.name


def test_the_text_has_no_numbers_of_its_own():
    """Decimals outside of those blocks, of commands and of code are the papers'; what we have measured stands in the blocks only."""
    text = README[: README.index("## Citation")]
    for left_out in (r"<!-- from .*?<!-- end -->", r"```.*?```", r"`[^`]*`"):
        text = re.sub(left_out, "", text, flags=re.S)
    papers = set()

    def add(v):
        if isinstance(v, dict | list | tuple):
            for part in v.values() if isinstance(v, dict) else v:
                add(part)
        elif isinstance(v, int | float):
            papers.update({f"{v:.2f}", f"{v:.1f}", f"{v:g}"})

    papers |= set(re.findall(r"\d+\.\d+", (ROOT / "results" / "paper.txt").read_text()))
    for script in SCRIPTS.values():
        for name in dir(script):
            if name.startswith(("PAPER", "TABLE")) and not isinstance(getattr(script, name), str):
                add(getattr(script, name))
    # Table 5 of Gowal et al.; Hendrycks et al. in Chen et al., section 4.4; Carmon et al.; MAE; differences in Rebuffi and Lawhon et al.
    papers |= set("65.14 45.44 62.39 41.58 47.07 31.57 65.27 43.83 62.40 41.06 47.64 31.99 69.64 65.48 66.39 61.90 55.06 51.00".split())
    papers |= {"83.69", "51.14", "89.69", "83.6", "3.64", "0.67", "0.3", "1.1", "0.0005", "1.2"}
    others = {"0.18", "1.6", "0.48", "0.7", "2.9", "3.10", "3.1", "3.2", "3.3", "4.0", "4.1", "4.2", "4.3", "4.4", "0.4", "0.1", "0.2"}  # a standard error, noise of Table 4, GB, Python, sections, a licence, jitter
    assert set(re.findall(r"(?<![\w./-])\d+\.\d+", text)) - papers - others == set()


def test_a_full_scale_run_would_be_shown():
    """Where the column of our numbers is empty there is no results.json of that command in results/."""
    have = [json.loads(path.read_text()) for path in (ROOT / "results").glob("*.json")]
    free = report.NOT_THE_SETTING - {"quick"}
    rows = re.findall(r"^\|[^|]*\| `python (\w+)\.py ([^`]*)` \|.*\| *\|$", README, re.M)
    assert len(rows) >= 24
    for name, given in rows:
        args = vars(parse_args(SCRIPTS[f"{name}.py"].Args, shlex.split(given)))
        for result in have:
            if result.get("script") == name:
                assert any(result["args"].get(k) != v for k, v in args.items() if k not in free), (name, given)


def test_paper_numbers_in_the_table():
    rows = re.findall(r"^\| [^|]* \| `python (\w+).py ([^`]*)` \| ([\d.]+) \| ([\d.]+) \|", README, re.M)
    assert len(rows) == 24
    for name, flags, clean, robust in rows:
        script = SCRIPTS[f"{name}.py"]
        args = parse_args(script.Args, shlex.split(flags))
        if script is byorl:
            assert common.paper_numbers("byorl", args, "byorl robust 100%") == [clean, robust]
            continue
        pretrained = {"runs/p1/pretrain.pt": "l2", "runs/p2/pretrain.pt": "linf"}.get(args.init, args.pretrain)
        numbers = report.kucer_numbers(name)[args.norm, pretrained, args.variant]
        paper = dict(zip(script.TABLE_EPS[args.norm], numbers, strict=True))
        assert (paper[0], paper[args.eps]) == (float(clean), float(robust))


def test_paper_numbers_of_byorl():
    lines = [line.split("|")[1:-1] for line in README.splitlines() if re.match(r"\| (Tables 2, 6|BYOR?L, \w+ head) ", line)]
    columns = [cell.split() for cell in lines[0][1:]]
    found = 0
    for encoder, *cells in lines[1:]:
        name, head, _ = encoder.replace(",", "").lower().split()
        for (dataset, norm), cell in zip(columns, cells, strict=True):
            args = byorl.Args(width=4.0, norm=norm, eps={"l2": 128 / 255, "linf": 8 / 255}[norm], dataset=dataset.lower().replace("-", ""))
            row = f"{'cifar10 ' * (dataset != 'CIFAR-10')}{name} +500000 {head} 100%"
            args = replace(args, extra_data="extra.npz") if dataset == "CIFAR-10" else replace(args, init="byorl.pt")
            if cell.strip():
                assert common.paper_numbers("byorl", args, row) == [v.strip() for v in cell.split("/")], (encoder, dataset, norm)
                found += 1
    assert found == 14


def test_paper_numbers_of_chen():
    found = 0
    for line in re.findall(r"^\| P\dF\d \|.*$", README, re.M):
        pair, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        for task, cell in zip(("selfie", "rotation", "jigsaw"), cells, strict=True):
            if cell != "the same":
                name = pair if pair.startswith("P1") else f"{task}-{pair}"
                known = common.paper_numbers("chen_pretrain_finetune", chen_pretrain_finetune.Args(table3=True), name)
                assert known[:2] == cell.split(" / "), name
                found += 1
    assert found == 20


def test_paper_numbers_of_rebuffi():
    found = 0
    for line in re.findall(r"^\| (?:supervised|RotNet|MAE|BYOL) \| \d.*$", README, re.M):
        method, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        for cell, where in zip(cells, [(d, r) for d in ("cifar10", "cifar100") for r in ("sgd", "adamw")], strict=True):
            name = " ".join((*where, method.lower()))
            assert common.paper_numbers("adv_mae", adv_mae.Args(), name) == cell.split(" / "), name
            found += 1
    assert found == 16


def test_paper_numbers_of_lawhon():
    rows = re.findall(r"^\| (none|SSL|MTL)[^|]* \| ([\d.]+) \| ([\d.]+) \| *\|", README, re.M)
    assert [name for name, *_ in rows] == ["none", "SSL", "MTL"]
    for name, *numbers in rows:
        assert common.paper_numbers("mtl_reverse", mtl_reverse.Args(victim="carmon2019.pt"), name.lower()) == numbers


def test_the_vit_is_copied_with_what_the_readme_lists():
    """The names beside `ViT` are enough: executed alone, they make the network of common.py."""
    line = next(line for line in README.splitlines() if line.startswith("A Vision Transformer: "))
    names = set(re.findall(r"`(\w+)`", line)) - {"load_vit"}
    source = ast.parse((ROOT / "common.py").read_text())
    parts = [node for node in source.body if getattr(node, "name", "") in names]
    assert {node.name for node in parts} == names
    alone = {}
    imports = next(b for b in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S) if "import contextlib" in b)  # those that the README lists
    exec(imports + "\n".join(map(ast.unparse, parts)), alone)
    torch.manual_seed(0)
    copied, ours = alone["ViT"](4, 128, 2, 2), ViT(4, 128, 2, 2)
    copied.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(copied(x), ours(x))


def test_the_attacks_are_copied_with_what_the_readme_lists():
    """The whole section "Attacks" runs with those imports and nothing else of common.py."""
    source = (ROOT / "common.py").read_text()
    imports = next(b for b in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S) if "import contextlib" in b)
    alone = {}
    exec(imports + source[source.index("# 4. Attacks") : source.index("# 5. Results")], alone)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)).eval()
    x, y = torch.rand(60, 3, 8, 8), torch.randint(0, 10, (60,))
    y = torch.where(torch.arange(60) < 50, model(x).argmax(1), y)
    left = alone["suite_accuracy"](model, [(x, y)], [a for a in alone["suite_attacks"]("suite-fast", "linf", 0.02) if a[0] != "square"])
    assert left["none"] > left["multi-targeted"]
    assert isinstance(alone["doubts"](lambda z: model(z).round(), x, y, eps=0.02), list)


def test_every_public_function_has_a_docstring():
    for path in [ROOT / "common.py", *(ROOT / s for s in SCRIPTS)]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and node.name != "Args":
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_the_snippets_run(tmp_path):
    """The evaluation of a trained network by all attacks, on digits, the CPU and with less work; the attack of one line within it."""
    rotation_at.main(rotation_at.Args(**TINY | {"epochs": 1, "out": str(tmp_path)}))
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", README, re.M | re.S)
    code = textwrap.dedent(next(b for b in blocks if "load_model" in b))
    changes = {
        '"runs/rotation_at-T3-linf-8_255-s0/best.pt"': repr(str(tmp_path / "best.pt")), "print(": "left = (", "batches(test, 500": "batches(test.subset(torch.arange(40)), 500",
        "cuda": "cpu", '"cifar10"': '"digits"', '"suite"': '"suite-fast"',
    }  # fmt: skip
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    names = {}
    exec(code, names)
    assert list(names["left"]) == ["none", "pgd-20", "apgd-ce", "apgd-dlr", "multi-targeted", "square"]
    one_line = next(b for b in blocks if b.startswith("x_adv = pgd("))
    x, y = next(names["batches"](names["test"], 8, torch.device("cpu")))
    exec(one_line, names | {"x": x, "y": y, "pgd": pgd, "F": torch.nn.functional}, names)
    assert 0 < (names["x_adv"] - x).abs().max() <= 8 / 255 + 1e-6
