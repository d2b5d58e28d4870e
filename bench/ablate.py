"""What each part of a method is worth, and all methods at all ratios: one model, one metric, gaps in one table.

    python bench/ablate.py soco --model FOLDER --calib FILE --eval FILE --eval-blocks 20
    python bench/ablate.py cap --model FOLDER --calib FILE --eval FILE --eval-blocks 20 --metric-batches 32
    python bench/ablate.py frontier --ratio 0.1 0.2 0.3 0.4 0.5 0.6 0.7

Takes the flags of soco.py and rpca.py. Results go to bench/results/TABLE-MODEL-RATIO-SEED.json after each variant,
and a variant that is there already is not run again.
"""
import copy
import json
import re
import sys
import time
from functools import cache, cached_property, partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rpca
import soco
from bench.baselines import magnitude, oats, prune_all, sparsegpt, wanda
from eval_ppl import Parser, UserError, between, perplexity, run, whole


class Bench:
    """A model, its texts, its metric and decompositions, each made once, and the perplexities of its variants."""

    def __init__(self, args, path):
        self.args, self.path = args, path
        self.model, _, self.calibration, self.evaluation = soco.read_inputs(args, *soco.check_run(args))
        self.layers = soco.block_layers(self.model)
        settings = {key: value for key, value in vars(args).items() if key not in ("table", "only")}
        settings |= {key: Path(settings[key]).name for key in ("model", "calib", "eval")}
        self.results = json.loads(path.read_text()) if path.exists() else {"settings": settings, "variants": {}}
        if self.results["settings"] != settings:
            raise UserError(f"{path} holds a run with other settings: move it away")

    def score(self, variant, make, reference="dense"):
        """Perplexity of the model with the layers make() {layer: another}; its gap, and the reference's gap."""
        args, variants = self.args, self.results["variants"]
        if variant in variants or args.only not in variant and variant != "dense":
            return
        torch.manual_seed(args.seed)
        start = time.perf_counter()
        new = make()
        seconds = round(time.perf_counter() - start, 1)
        with soco.swapped(self.model, new):
            test = perplexity(self.model, self.evaluation, args.eval_seqlen, args.eval_stride, args.eval_blocks)
            calib = perplexity(self.model, self.calibration, args.eval_seqlen, blocks=10)
        variants[variant] = {"ppl": test.ppl, "nll": test.nll, "calib_nll": calib.nll, "seconds": seconds}
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.results, indent=1) + "\n")
        dense = variants["dense"]["nll"]
        quotient = (test.nll - dense) / (variants.get(reference, test._asdict())["nll"] - dense or 1)
        print(f"{variant:48} ppl {test.ppl:10.2f} gap {test.nll - dense:.4f}, {quotient:.3f} of {reference}", flush=True)

    def batches(self, count=None):
        return soco.sample_batches(self.calibration, self.args, count or self.args.metric_batches)

    @cached_property
    def metrics(self):
        return list(soco.measured(self.model, self.layers, self.batches(), progress=True))

    @cached_property
    def drafts(self):
        return rpca.drafted(self.model, self.layers, self.batches(), progress=True)

    @cache
    def decomposed(self, basis):
        scored = {}
        for _, layer, metric in self.metrics:
            W = soco.matrix(layer).float()
            output_rms = ((W @ metric.G) * W).sum(1).mean().sqrt().item()
            scored[layer] = soco.ScoredLinear(layer, *soco.decompose(layer, metric, basis), output_rms)
            scored[layer].sigma_squared = scored[layer].price.clone()
        soco.set_prices(self.model, scored, self.batches(), progress=True)
        return scored

    def scored(self, basis):
        """{layer: ScoredLinear} in a basis, new ones, at Fisher prices."""
        return copy.deepcopy(self.decomposed(basis), {id(layer): layer for layer in self.layers.values()})


def same_share(bench, ratio, basis):
    """The first components of every matrix, as many as `ratio` leaves of it."""
    scored = bench.scored(basis)
    for layer, student in scored.items():
        student.kept[max(int((1 - ratio) * layer.weight.numel() / sum(layer.weight.shape)), 1):] = 0
    return soco.finished(scored)


def learned(bench, ratio, steps=None, basis="two-sided", fisher=True, group=8, deviation=True, stages=soco.STAGES,
            reset=False):
    """What soco.compress does. fisher: else the prices are K-FAC's, sigma^2. reset: scores go back to 1."""
    scored, args = bench.scored(basis), bench.args
    steps = args.steps if steps is None else steps
    for student in scored.values() if not fisher else ():
        student.price = student.sigma_squared
    spectrum, budget = soco.Spectrum(list(scored.values()), group), soco.budget_for(bench.layers, ratio, steps and deviation)
    soco.learn(bench.model, scored, spectrum, bench.batches(max(steps, 1)), budget, steps, args.lr, deviation, stages,
               progress=True)
    if reset:
        spectrum.S.detach().fill_(1)
    return soco.finished(scored)


def chosen(bench, ratio, estimator="metric", rank_share=rpca.RANK_SHARE, rounds=5, scale=True, refitted=True,
           keep=rpca.keep_worthiest):
    """What rpca.compress does."""
    drafts = [copy.copy(draft) for draft in bench.drafts]
    for draft in drafts if not scale else ():
        draft.rows, draft.columns, draft.price = map(torch.ones_like, (draft.rows, draft.columns, draft.price))
    if estimator == "policy":
        rpca.choose_by_policy(bench.model, drafts, bench.batches(), ratio, rounds, bench.args.seed, refitted, True)
    else:
        rpca.set_ranks(drafts, ratio, rank_share, True)
        rpca.choose_by_metric(drafts, ratio, rounds, keep, refitted, True)
    return {draft.layer: draft.finish() for draft in drafts}


def same_share_of_matrices(drafts, count):
    for draft in drafts:
        rpca.keep_worthiest([draft], count * draft.S.numel() // sum(other.S.numel() for other in drafts))


def same_share_of_rows(drafts, count):
    for draft in drafts:
        top = draft.worth().topk(count * draft.n // sum(other.S.numel() for other in drafts), dim=1).indices
        draft.S = torch.zeros_like(draft.S).scatter(1, top, draft.S.gather(1, top))


def pruned(bench, ratio, prune):
    return prune_all(prune, bench.drafts, ratio)


SVD = {"whitened SVD, same share": partial(same_share, basis="whitened")}
PRUNED = {"Wanda": partial(pruned, prune=wanda), "magnitude": partial(pruned, prune=magnitude),
          "SparseGPT": partial(pruned, prune=sparsegpt)}
TABLES = {        # {variant: what makes its layers}; gaps are divided by that of the first
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
        "OATS, 20 rounds": partial(pruned, prune=partial(oats, rounds=20)),
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
        "KFAC-SVD, same share": partial(same_share, basis="two-sided"),
        "global choice, no learning": partial(learned, steps=0), "SoCo": learned, "CAP": chosen} | PRUNED}


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
    bench = Bench(args, Path(__file__).parent / "results" / f"{name}.json")
    bench.score("dense", dict)
    for ratio in args.ratio:
        at = f" at {ratio:g}" if len(args.ratio) > 1 else ""
        for variant, make in TABLES[args.table].items():
            bench.score(variant + at, partial(make, bench, ratio), next(iter(TABLES[args.table])) + at)


if __name__ == "__main__":
    run(main, soco.CannotCompress)
