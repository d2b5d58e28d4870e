"""Is the predicted loss right? Truncate and prune one matrix at a time, and measure the KL that it costs.

    python bench/prices.py --model FOLDER --matrices 40 --out prices.png

Predicted: half the sum of the prices of what is dropped, nats a token, by K-FAC (sigma^2 of a component, and
R_ii G_jj W_ij^2 of an entry) and by Fisher information (of an entry: its row's, shared out by G_jj W_ij^2).
Measured: KL(dense || changed) on held-out calibration text. --out is the picture. Of a run's other flags only
those of the model, the calibration text, its batches, --bos and --seed matter; --eval is loaded, not used.
"""
import sys
from pathlib import Path

import torch
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rpca
import soco
from eval_ppl import Parser, UserError, run, whole

HELD_OUT, PARTS = 2, (2, 4, 8)       # batches to measure on; one in so many components or entries is dropped


def changes(draft, student, sigma_squared, R):
    """Yield (kind, changed layer, [prediction of K-FAC, of Fisher information])."""
    layer, W = draft.layer, soco.matrix(draft.layer).float()
    by_row, kfac = draft.scaled(W).square(), (R.sqrt()[:, None] * W * draft.columns).square()
    for part in PARTS:
        last = len(student.kept) // part
        student.kept[:-last], student.kept[-last:] = 1, 0
        yield "components", student, [price[-last:].sum() / 2 for price in (sigma_squared, student.price)]
        drop = W.abs() <= W.abs().flatten().kthvalue(W.numel() // part).values
        pruned = soco.dense_like(layer, W.masked_fill(drop, 0), layer.bias)
        yield "entries", pruned, [(drop * price).sum() / 2 for price in (kfac, by_row)]


@torch.no_grad()
def main():
    parser = Parser(__doc__)
    soco.add_run_flags(parser)
    parser.add_argument("--matrices", type=whole(1), default=40, help="at most so many, evenly spread")
    parser.set_defaults(out="prices.png")
    args = parser.parse_args()
    if not Path(args.out).resolve().parent.is_dir():
        raise UserError(f"--out {args.out}: there is no such folder")
    model, _, calibration, _ = soco.read_inputs(args)
    layers, kfac = list(soco.block_layers(model).items()), {}
    batches = soco.sample_batches(calibration, args, HELD_OUT + args.metric_batches)
    held_out, batches = torch.cat(batches[:HELD_OUT]).to(model.device), batches[HELD_OUT:]

    layers = dict(layers[::-(-len(layers) // args.matrices)])

    def see(layer, metric, factors):
        kfac[layer] = factors[1].square(), metric.R.diagonal().clone()

    scored = soco.scored_layers(model, layers, batches, progress=True, visit=see)
    drafts = rpca.drafted(model, layers, batches, progress=True)
    dense, found = model(held_out, use_cache=False).logits, {"components": [], "entries": []}
    for draft in drafts:
        layer = draft.layer
        for kind, new, predicted in changes(draft, scored[layer], *kfac[layer]):
            with soco.swapped(model, {layer: new}):
                loss = soco.KLDivergence.apply(dense, model(held_out, use_cache=False).logits)
            found[kind].append([*map(float, predicted), float(loss)])

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4.5), sharex=True, sharey=True)
    for column, (axes, price) in enumerate(zip(panels, ("K-FAC", "Fisher information"))):
        for (kind, points), marker in zip(found.items(), "o+"):
            predicted, loss = torch.tensor(points).clamp_min(1e-9).T[[column, 2]]
            rank = torch.stack([predicted, loss]).argsort().argsort().double().corrcoef()[0, 1]
            spread = (loss / predicted).log10().std()
            print(f"{price}, {len(points)} {kind}: rank correlation {rank:.3f}, spread {spread:.3f} decades")
            axes.loglog(predicted, loss, marker, color="black", markersize=4, fillstyle="none", label=kind)
        axes.axline((1e-3, 1e-3), (1e-2, 1e-2), color="gray", linewidth=0.5)
        axes.set(xlabel=f"loss predicted by {price}, nats a token", ylabel="measured")
    axes.legend()
    figure.savefig(args.out, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    run(main, soco.CannotCompress)
