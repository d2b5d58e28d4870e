"""Draw the share kept of each matrix, from metrics.json, or perplexity over ratio, from ablate.py's frontier.

    python bench/plot.py out/FOLDER/metrics.json bench/allocation.png
    python bench/plot.py bench/results/frontier-MODEL-0.json bench/frontier.png
"""
import json
import math
import sys

from matplotlib import pyplot

STYLES = ["s:#56b4e9", "d--#0072b2", "D:#000000", "*-#009e73", "o-#d55e00", "^--#e69f00", "v--#cc79a7"]


def allocation(report):
    rows = {}
    for layer in report["layers"]:
        kind = ".".join(layer["name"].split(".")[-2:])
        rows.setdefault(kind, []).append(layer["kept"] / math.prod(layer["shape"]))
    figure, axes = pyplot.subplots(figsize=(9, 0.35 * len(rows) + 1.3))
    image = axes.imshow(list(rows.values()), aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="block", title=f"share kept of each matrix, {report['method']}, ratio {report['ratio']}")
    figure.colorbar(image, ax=axes, pad=0.02)


def frontier(report):
    """Markers and dashes tell the lines apart in grey print; what is far above the dense model is cut off."""
    dense, curves = report["variants"].pop("dense")["ppl"], {}
    for variant, row in report["variants"].items():
        name, ratio = variant.split(" at ")
        curves.setdefault(name, {0: dense})[float(ratio)] = row["ppl"]
    axes = pyplot.figure(figsize=(7, 4.5)).add_subplot()
    axes.axhline(dense, color="#bbbbbb", label="dense")
    for style, (name, curve) in zip(STYLES, curves.items()):
        axes.semilogy(*zip(*sorted(curve.items())), style[:-7], color=style[-7:], label=name)
    axes.set(xlabel="share of the block weights' parameters removed", ylabel="perplexity")
    axes.set_ylim(0.9 * dense, min(50 * dense, 1.1 * max(max(curve.values()) for curve in curves.values())))
    axes.legend(fontsize=8)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with open(sys.argv[1]) as file:
        report = json.load(file)
    draw = allocation if "layers" in report else frontier
    draw(report)
    pyplot.savefig(sys.argv[2], dpi=110, bbox_inches="tight")
