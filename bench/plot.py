"""Draw metrics.json: how SoCo learned, in its three stages, and the share kept of every matrix.

    python bench/plot.py out/FOLDER/metrics.json PICTURE.png
"""
import json
import math
import sys

from matplotlib import pyplot


def learning(curve, share, divergence):
    """The kept share of each step, above KL; stages in other greys."""
    steps, stages = range(1, len(curve["KL"]) + 1), curve["stage"]
    share.plot(steps, curve["kept"], color="#0072b2")
    share.set(ylabel="share kept", ylim=(0, 1.05))
    divergence.semilogy(steps, curve["KL"], color="#d55e00", linewidth=0.8)
    divergence.set(ylabel="KL, nats a token", xlabel="step")
    for stage, grey in zip(dict.fromkeys(stages), ("1.0", "0.85", "0.93")):
        first, last = stages.index(stage), len(stages) - stages[::-1].index(stage)
        for axes in (share, divergence):
            axes.axvspan(first + 0.5, last + 0.5, color=grey, zorder=0)
        share.text((first + last) / 2, 1.0, stage, ha="center", va="top", fontsize=8,
                   rotation=90 if last - first < len(stages) / 5 else 0)
    share.tick_params(labelbottom=False)


def allocation(layers, axes):
    """The share kept of every matrix, block by block, from white to black."""
    rows = {}
    for layer in layers:
        kind = ".".join(layer["name"].split(".")[-2:])
        rows.setdefault(kind, []).append(layer["kept"] / math.prod(layer["shape"]))
    image = axes.imshow(list(rows.values()), aspect="auto", cmap="Greys", vmin=0, vmax=1)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="block", title="share kept of each matrix")
    axes.figure.colorbar(image, ax=axes, pad=0.02)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with open(sys.argv[1]) as file:
        report = json.load(file)
    if "curve" in report:
        figure = pyplot.figure(figsize=(11, 3.8), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.2))
        learning(report["curve"], *left.subplots(2, 1))
        allocation(report["layers"], right.subplots())
    else:
        allocation(report["layers"], pyplot.figure(figsize=(7, 3), layout="constrained").subplots())
    pyplot.savefig(sys.argv[2], dpi=110)


if __name__ == "__main__":
    main()
