"""How strong the attacks of common.py are: the accuracy (%) they leave on 360 digits and two small networks, beside what the code of the
attacks' authors leaves with the same budget (AutoPGD: Croce and Hein; Square: Andriushchenko et al.; the numbers are in tests/test_suite.py).

    python benchmarks/attacks.py --json attacks.json      # three minutes on two CPU cores
"""
import argparse
import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests")]
from test_suite import EPS, REFERENCE, load_reference  # noqa: E402

from common import choose_device, device_name, suite_accuracy, suite_attacks, text_table  # noqa: E402


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto")
    p.add_argument("--json", default="", help="write the table to this file")
    flags = p.parse_args()
    device = choose_device(flags.device)
    networks, x, y = load_reference()
    names = ["none", *(name for name, _, _ in suite_attacks("suite", "linf", 0.1)), "suite", "standard"]
    left = {}
    for norm, network in networks.items():
        attacks = suite_attacks("suite", norm, EPS[norm])
        for attack in attacks:  # each by itself
            left[norm] = left.get(norm, {}) | suite_accuracy(network.to(device), [(x, y)], [attack])
        for kind in "suite", "standard":  # all in turn
            left[norm][kind] = suite_accuracy(network, [(x, y)], suite_attacks(kind, norm, EPS[norm]))["square"]
    header = ["attack", *(f"{norm} {EPS[norm]:g}: {whose}" for norm in networks for whose in ("ours", "authors'"))]
    rows = []
    for name in names:
        theirs = {norm: REFERENCE.get((norm, name)) for norm in networks}
        rows.append([name, *(t for n in networks for t in (f"{left[n][name]:.2f}", "" if theirs[n] is None else f"{theirs[n]:.2f}"))])
    print(text_table(header, rows))
    if flags.json:
        result = {"benchmark": "attacks.py", "device": device_name(device), "torch": torch.__version__, "table": [header, *rows]}
        Path(flags.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
