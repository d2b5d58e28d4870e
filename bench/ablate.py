"""What each part of a method is worth, or all methods at all ratios: one model, one metric, gaps in one table.

    python bench/ablate.py soco --model FOLDER --calib FILE --eval FILE --eval-blocks 20
    python bench/ablate.py cap --model FOLDER --calib FILE --eval FILE --eval-blocks 20 --metric-batches 32
    python bench/ablate.py frontier --ratio 0.1 0.2 0.3 0.4 0.5 0.6 0.7

Variants are runs of `compress` itself. Results go to bench/results/TABLE-MODEL-RATIO-SEED.json after each, and a
variant that is there already is not run again.
"""
import copy
import json
import re
import sys
import time
from functools import cache, lru_cache, partial
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rpca
import soco
from bench.baselines import magnitude, oats, prune_all, sparsegpt, wanda
from eval_ppl import Parser, UserError, between, perplexity, run, whole


class Bench:
    """A model and its texts. Here `compress` measures and decomposes once, and returns {layer: new one}."""

    def __init__(self, args):
        self.args = args
        self.model, _, self.calibration, self.evaluation = soco.read_inputs(args, *soco.check_run(args))
        layers = soco.block_layers(self.model)
        self.batches = soco.sample_batches(self.calibration, args, max(args.steps, args.metric_batches))
        self.measured_on = self.batches[:args.metric_batches]
        self.metrics = cache(partial(list, soco.measured(self.model, layers, self.measured_on, progress=True)))
        self.drafts = cache(partial(rpca.drafted, self.model, layers, self.measured_on, progress=True))
        soco.measured = lambda *args: self.metrics()
        soco.decompose = lru_cache(2 * len(layers))(soco.decompose)            # remembers two bases
        rpca.drafted = self.drafted
        soco.install = rpca.install = lambda model, method, layers, new: new

    def drafted(self, model, layers, batches, scale, progress):
        drafts = [copy.copy(draft) for draft in self.drafts()]
        for draft in drafts if not scale else ():
            draft.rows, draft.columns, draft.price = map(torch.ones_like, (draft.rows, draft.columns, draft.price))
        return drafts

    def soco(self, ratio, **settings):
        defaults = {"steps": self.args.steps, "lr": self.args.lr, "metric_batches": self.args.metric_batches}
        return soco.compress(self.model, self.batches, ratio, progress=True, **defaults | settings)

    def soco_with(self, ratio, function, replaced, **settings):
        with mock.patch.object(soco, function, replaced):
            return self.soco(ratio, **settings)

    def cap(self, ratio, **settings):
        return rpca.compress(self.model, self.measured_on, ratio, seed=self.args.seed, progress=True, **settings)

    def pruned(self, ratio, prune):
        return prune_all(prune, self.drafts(), ratio)

    def svd(self, ratio, basis):
        """The first components of every matrix, as many as `ratio` leaves of it."""
        return {layer: soco.truncated(layer, *soco.decompose(layer, metric, basis), ratio)
                for _, layer, metric in self.metrics()}

    def perplexities(self, new):
        args = self.args
        with soco.swapped(self.model, new):
            test = perplexity(self.model, self.evaluation, args.eval_seqlen, args.eval_stride, args.eval_blocks)
            calib = perplexity(self.model, self.calibration, args.eval_seqlen, blocks=10)
        return {"ppl": test.ppl, "nll": test.nll, "calib_nll": calib.nll}


def finished_at_1(scored):
    for student in scored.values():
        student.S.detach().fill_(1)
    return {layer: student.finish() for layer, student in scored.items()}


def same_share_of_matrices(drafts, count):
    for draft in drafts:
        rpca.keep_worthiest([draft], count * draft.S.numel() // sum(other.S.numel() for other in drafts))


def same_share_of_rows(drafts, count):
    for draft in drafts:
        each = count * draft.n // sum(other.S.numel() for other in drafts)
        top = draft.worth().topk(each, dim=1).indices
        draft.S = torch.zeros_like(draft.S).scatter(1, top, draft.S.gather(1, top))


SVD = {"whitened SVD, same share": partial(Bench.svd, basis="whitened")}
PRUNED = {"Wanda": partial(Bench.pruned, prune=wanda), "magnitude": partial(Bench.pruned, prune=magnitude),
          "SparseGPT": partial(Bench.pruned, prune=sparsegpt)}
TABLES = {        # {variant: what makes its layers}; gaps are shown over that of the first too
    "soco": SVD | {
        "full method": Bench.soco,
        "no learning": partial(Bench.soco, steps=0),
        "price sigma^2 (K-FAC)": partial(Bench.soco_with, function="set_prices", replaced=lambda *args: None),
        "rank multiple 1": partial(Bench.soco, group=1),
        "no deviation": partial(Bench.soco, deviation=False),
        "no stage 2 (its steps to stage 3)": partial(Bench.soco, stages=(0.5, 0.0, 0.5)),
        "no stage 3 (its steps to stage 2)": partial(Bench.soco, stages=(0.5, 0.5, 0.0)),
        "learned ranks, scores set back to 1, no deviation": partial(
            Bench.soco_with, function="finished", replaced=finished_at_1, deviation=False),
        "basis whitened": partial(Bench.soco, basis="whitened"),
        "basis plain": partial(Bench.soco, basis="plain")},
    "cap": PRUNED | {
        "OATS, 20 rounds": partial(Bench.pruned, prune=partial(oats, rounds=20)),
        "full method": Bench.cap,
        "no low-rank part": partial(Bench.cap, rank_share=0.0),
        "twice the low-rank part": partial(Bench.cap, rank_share=2 * rpca.RANK_SHARE),
        "one round (the initial mask, refitted)": partial(Bench.cap, rounds=1),
        "no scale": partial(Bench.cap, scale=False),
        "the same share of every matrix": partial(Bench.cap, keep=same_share_of_matrices),
        "the same share of every row": partial(Bench.cap, keep=same_share_of_rows),
        "no refit": partial(Bench.cap, refitted=False),
        "policy gradient, the mask it starts from": partial(Bench.cap, estimator="policy", rounds=0),
        "policy gradient, three rounds": partial(Bench.cap, estimator="policy", rounds=3)},
    "frontier": SVD | {
        "KFAC-SVD, same share": partial(Bench.svd, basis="two-sided"),
        "SoCo, no learning": partial(Bench.soco, steps=0), "SoCo": Bench.soco, "CAP": Bench.cap} | PRUNED}


def main():
    parser = Parser(__doc__)
    parser.add_argument("table", choices=list(TABLES))
    soco.add_run_flags(parser, metric_batches=16)
    parser.add_argument("--steps", type=whole(1), default=200, help="of SoCo's learning")
    parser.add_argument("--lr", type=between(0, 10), default=soco.LR, help="of the scores")
    parser.add_argument("--only", default="", help="run only variants whose name holds this")
    args = parser.parse_args()
    bench, table = Bench(args), TABLES[args.table]
    settings = {key: value for key, value in vars(args).items() if key not in ("table", "only")}
    settings |= {key: Path(settings[key]).name for key in ("model", "calib", "eval")}
    ratios = "-to-".join(f"{ratio:g}" for ratio in sorted({args.ratio[0], args.ratio[-1]}))
    name = re.sub(r"\W+", "-", f"{args.table}-{settings['model']}-{ratios}-{args.seed}")
    path = Path(__file__).parent / "results" / f"{name}.json"
    results = json.loads(path.read_text()) if path.exists() else {"settings": settings, "variants": {}}
    if results["settings"] != settings:
        raise UserError(f"{path} holds a run with other settings: move it away")

    def score(variant, make, reference):
        variants = results["variants"]
        if variant in variants or args.only not in variant and variant != "dense":
            return
        torch.manual_seed(args.seed)
        start = time.perf_counter()
        new = make()
        seconds = round(time.perf_counter() - start, 1)
        variants[variant] = bench.perplexities(new) | {"seconds": seconds}
        path.write_text(json.dumps(results, indent=1) + "\n")
        gaps = {key: row["nll"] - variants["dense"]["nll"] for key, row in variants.items()}
        quotient = f"{gaps[variant] / gaps[reference]:.3f} of {reference}" if gaps.get(reference) else ""
        print(f"{variant:50} ppl {variants[variant]['ppl']:10.2f} gap {gaps[variant]:7.4f} {quotient}", flush=True)

    score("dense", dict, "dense")
    for ratio in args.ratio:
        at = f" at {ratio:g}" if len(args.ratio) > 1 else ""
        for variant, make in table.items():
            score(variant + at, partial(make, bench, ratio), next(iter(table)) + at)


if __name__ == "__main__":
    run(main, soco.CannotCompress)
