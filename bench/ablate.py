"""What each part of a method is worth, and all methods at all ratios: one model, one metric, gaps in one table.

    python bench/ablate.py soco --model FOLDER --calib FILE --eval FILE --eval-blocks 20
    python bench/ablate.py cap --model FOLDER --calib FILE --eval FILE --eval-blocks 20 --metric-batches 32
    python bench/ablate.py frontier --ratio 0.1 0.2 0.3 0.4 0.5 0.6 0.7

Results go to bench/results/TABLE-MODEL-RATIO-SEED.json; a variant that is there already is not run again.
"""
import copy
import json
import re
import sys
import time
from functools import cache, partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rpca
import soco
from bench.baselines import magnitude, oats, prune_all, sparsegpt, wanda
from eval_ppl import Parser, UserError, between, perplexity, run, whole


class Bench:
    """A model with its texts, metric and decompositions, each made once, and the results of its variants."""

    def __init__(self, args, path):
        self.args, self.path = args, path
        self.model, _, self.calibration, self.evaluation = soco.read_inputs(args, *soco.check_run(args))
        self.layers = soco.block_layers(self.model)
        self.batches = soco.sample_batches(self.calibration, args, max(args.steps, args.metric_batches))
        calib = self.batches[:args.metric_batches]
        self.metrics = cache(lambda: list(soco.measured(self.model, self.layers, calib, progress=True)))
        self.drafts = cache(lambda: rpca.drafted(self.model, self.layers, calib, progress=True))
        settings = {key: value for key, value in vars(args).items() if key not in ("table", "only")}
        settings |= {key: Path(settings[key]).name for key in ("model", "calib", "eval")}
        self.results = json.loads(path.read_text()) if path.exists() else {"settings": settings, "variants": {}}
        if self.results["settings"] != settings:
            raise UserError(f"{path} holds a run with other settings: move it away")

    @cache
    def decomposed(self, basis):
        scored = {}
        for _, layer, metric in self.metrics():
            W = soco.matrix(layer).float()
            output_rms = ((W @ metric.G) * W).sum(1).mean().sqrt().item()
            scored[layer] = soco.ScoredLinear(layer, *soco.decompose(layer, metric, basis), output_rms)
            scored[layer].sigma_squared = scored[layer].price.clone()
        soco.set_prices(self.model, scored, self.batches[:self.args.metric_batches], progress=True)
        return scored

    def score(self, variant, make, reference="dense"):
        """Perplexity with the layers make() {layer: another}; prints its gap, also over that of `reference`."""
        args, variants = self.args, self.results["variants"]
        if variant in variants or args.only not in variant and variant != "dense":
            return
        torch.manual_seed(args.seed)
        start = time.perf_counter()
        new = make()
        seconds = round(time.perf_counter() - start, 1)
        with soco.swapped(self.model, new):
            ppl, nll, _ = perplexity(self.model, self.evaluation, args.eval_seqlen, args.eval_stride, args.eval_blocks)
            calib = perplexity(self.model, self.calibration, args.eval_seqlen, blocks=10)
        variants[variant] = {"ppl": ppl, "nll": nll, "calib_nll": calib.nll, "seconds": seconds}
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.results, indent=1) + "\n")
        gap = nll - variants["dense"]["nll"]
        unit = variants.get(reference, variants["dense"])["nll"] - variants["dense"]["nll"] or 1
        print(f"{variant:50} ppl {ppl:10.2f} gap {gap:.4f}, / {reference} {gap / unit:.3f}", flush=True)


def same_share(basis, bench, ratio):
    """The first components of every matrix, as many as `ratio` leaves of it."""
    return {layer: soco.truncated(layer, student.U, torch.ones_like(student.price), student.V, ratio)
            for layer, student in bench.decomposed(basis).items()}


def learned(bench, ratio, steps=None, basis="two-sided", fisher=True, group=8, deviation=True, stages=soco.STAGES,
            reset=False):
    """What soco.compress does. fisher: else prices are sigma^2, K-FAC's. reset: scores go back to 1 at the end."""
    scored = copy.deepcopy(bench.decomposed(basis), {id(layer): layer for layer in bench.layers.values()})
    for student in scored.values():
        student.price = student.price if fisher else student.sigma_squared
    steps = bench.args.steps if steps is None else steps
    spectrum = soco.Spectrum(list(scored.values()), group)
    budget = soco.budget_for(bench.layers, ratio, steps and deviation)
    soco.learn(bench.model, scored, spectrum, bench.batches, budget, steps, bench.args.lr, deviation, stages,
               progress=True)
    if reset:
        spectrum.S.detach().fill_(1)
    return soco.finished(scored)


def chosen(bench, ratio, estimator="metric", rank_share=rpca.RANK_SHARE, rounds=5, scale=True, refitted=True,
           keep=rpca.keep_worthiest):
    """What rpca.compress does."""
    drafts, args = [copy.copy(draft) for draft in bench.drafts()], bench.args
    for draft in drafts if not scale else ():
        draft.rows, draft.columns, draft.price = map(torch.ones_like, (draft.rows, draft.columns, draft.price))
    if estimator == "policy":
        batches = bench.batches[:args.metric_batches]
        rpca.choose_by_policy(bench.model, drafts, batches, ratio, rounds, args.seed, refitted, progress=True)
    else:
        rpca.set_ranks(drafts, ratio, rank_share, progress=True)
        rpca.choose_by_metric(drafts, ratio, rounds, keep, refitted, progress=True)
    return {draft.layer: draft.finish() for draft in drafts}


def same_share_of_matrices(drafts, count):
    for draft in drafts:
        rpca.keep_worthiest([draft], count * draft.S.numel() // sum(other.S.numel() for other in drafts))


def same_share_of_rows(drafts, count):
    for draft in drafts:
        top = draft.worth().topk(count * draft.n // sum(other.S.numel() for other in drafts), dim=1).indices
        draft.S = torch.zeros_like(draft.S).scatter(1, top, draft.S.gather(1, top))


SVD = {"whitened SVD, same share": partial(same_share, "whitened")}
PRUNED = {"Wanda": partial(prune_all, wanda), "magnitude": partial(prune_all, magnitude),
          "SparseGPT": partial(prune_all, sparsegpt)}
TABLES = {        # {variant: what makes its layers}; gaps are also shown over that of the first
    "soco": SVD | {
        "full method": learned,
        "no learning": partial(learned, steps=0),
        "price sigma^2 (K-FAC)": partial(learned, fisher=False),
        "rank multiple 1": partial(learned, group=1),
        "basis plain": partial(learned, basis="plain"),
        "basis whitened": partial(learned, basis="whitened"),
        "no deviation": partial(learned, deviation=False),
        "no stage 2 (its steps to stage 3)": partial(learned, stages=(0.5, 0.0, 0.5)),
        "no stage 3 (its steps to stage 2)": partial(learned, stages=(0.5, 0.5, 0.0)),
        "learned ranks, scores set back to 1, no deviation": partial(learned, deviation=False, reset=True)},
    "cap": PRUNED | {
        "OATS, 20 rounds": partial(prune_all, partial(oats, rounds=20)),
        "full method": chosen,
        "no low-rank part": partial(chosen, rank_share=0.0),
        "twice the low-rank part": partial(chosen, rank_share=2 * rpca.RANK_SHARE),
        "one round (the initial mask, refitted)": partial(chosen, rounds=1),
        "no scale": partial(chosen, scale=False),
        "the same share of every matrix": partial(chosen, keep=same_share_of_matrices),
        "the same share of every row": partial(chosen, keep=same_share_of_rows),
        "no refit": partial(chosen, refitted=False),
        "policy gradient, the mask it starts from": partial(chosen, estimator="policy", rounds=0),
        "policy gradient, three rounds": partial(chosen, estimator="policy", rounds=3)},
    "frontier": SVD | {
        "KFAC-SVD, same share": partial(same_share, "two-sided"), "SoCo, no learning": partial(learned, steps=0),
        "SoCo": learned, "CAP": chosen} | PRUNED}


def main():
    parser = Parser(__doc__)
    parser.add_argument("table", choices=list(TABLES))
    soco.add_run_flags(parser, metric_batches=16)
    parser.add_argument("--steps", type=whole(1), default=200, help="of SoCo's learning")
    parser.add_argument("--lr", type=between(0, 10), default=soco.LR, help="of the scores")
    parser.add_argument("--only", default="", help="run only variants whose name holds this")
    args = parser.parse_args()
    ratios = "-to-".join(f"{ratio:g}" for ratio in sorted({args.ratio[0], args.ratio[-1]}))
    name = re.sub(r"\W+", "-", f"{args.table}-{Path(args.model).name}-{ratios}-{args.seed}")
    bench, table = Bench(args, Path(__file__).parent / "results" / f"{name}.json"), TABLES[args.table]
    bench.score("dense", dict)
    for ratio in args.ratio:
        at = f" at {ratio:g}" if len(args.ratio) > 1 else ""
        for variant, make in table.items():
            bench.score(variant + at, partial(make, bench, ratio), next(iter(table)) + at)


if __name__ == "__main__":
    run(main, soco.CannotCompress)
