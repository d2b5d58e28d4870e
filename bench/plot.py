"""Draw a metrics.json (share kept of every matrix, block by block) or a frontier's results (perplexity over ratio).

    python bench/plot.py out/FOLDER/metrics.json bench/allocation.png
    python bench/plot.py bench/results/frontier-MODEL-0-1-to-0-7-0.json bench/frontier.png
"""
import json
import math
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LINES = ["#bbbbbb v:", "#56b4e9 s:", "#0072b2 D--", "#000000 o-", "#d55e00 *-", "#e69f00 ^--", "#999999 x:", "#009e73 P--"]


def allocation(report):
    rows = {}
    for layer in report["layers"]:
        kind = ".".join(layer["name"].split(".")[-2:])
        rows.setdefault(kind, []).append(layer["kept"] / math.prod(layer["shape"]))
    figure, axes = plt.subplots(figsize=(9, 0.35 * len(rows) + 1.3))
    image = axes.imshow(list(rows.values()), aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="block", title=f"share of each matrix kept, {report['method']} at ratio {report['ratio']:g}")
    figure.colorbar(image, ax=axes, pad=0.02)
    return figure


def frontier(report):
    """Lines that differ in marker and dashes too, for grey print; far above the dense model they leave the picture."""
    variants, curves = report["variants"], {}
    dense = variants.pop("dense")["ppl"]
    for variant, row in variants.items():
        name, ratio = variant.split(" at ")
        curves.setdefault(name, {0.0: dense})[float(ratio)] = row["ppl"]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    axes.axhline(dense, color="#bbbbbb", linewidth=1, label="dense")
    for style, (name, curve) in zip(LINES, curves.items()):
        color, style = style.split()
        axes.semilogy(*zip(*sorted(curve.items())), style, color=color, label=name)
    axes.set(xlabel="share of the block weights' parameters removed", ylabel="perplexity", ylim=(0.9 * dense, 50 * dense))
    axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        found = json.load(file)
    draw = allocation if "layers" in found else frontier
    draw(found).savefig(sys.argv[2], dpi=110, bbox_inches="tight")
