"""Draw what a run kept of every matrix, block by block, from its metrics.json.

    python bench/plot.py out/FOLDER/metrics.json bench/allocation.png
"""
import argparse
import json
import math

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics")
    parser.add_argument("picture")
    args = parser.parse_args()
    with open(args.metrics) as file:
        report = json.load(file)
    rows = {}
    for layer in report["layers"]:
        kind = ".".join(part for part in layer["name"].split(".")[-2:])
        rows.setdefault(kind, []).append(layer["kept"] / math.prod(layer["shape"]))
    shares = np.array(list(rows.values()))
    figure, axes = plt.subplots(figsize=(9, 0.35 * len(rows) + 1.3))
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("block")
    axes.set_title(f"share of each matrix kept, {report['method']} at ratio {report['ratio']:g}", fontsize=10)
    figure.colorbar(image, ax=axes, pad=0.02)
    figure.savefig(args.picture, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
