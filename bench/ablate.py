"""What each part of a method is worth, and every method at every ratio: one model, one metric, gaps in one table.

    python bench/ablate.py soco --model FOLDER --calib FILE --eval FILE --eval-blocks 20
    python bench/ablate.py cap  --model FOLDER --calib FILE --eval FILE --eval-blocks 20 --metric-batches 32
    python bench/ablate.py frontier --model FOLDER --ratio 0.1 0.2 0.3 0.4 0.5 0.6 0.7 --steps 200

Takes the flags of soco.py and rpca.py. Results go to bench/results/TABLE-MODEL-RATIO-SEED.json after each variant, and
a variant that is there already is not run again. bench/plot.py draws the frontier.
"""
import copy
import functools
import json
import re
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rpca
import soco
from bench import baselines
from eval_ppl import Parser, UserError, between, perplexity, run, whole


class Bench:
    """A model, its texts and its metric; perplexities of its variants go to a JSON file, one after the other."""

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
        """Perplexity of the model with the layers make() {layer: another}, and its gap beside that of `reference`."""
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
        unit = variants.get(reference, variants["dense"])["nll"] - variants["dense"]["nll"]
        quotient = f"{gap / unit:.3f} of {reference}" if unit else ""
        print(f"{variant:44} ppl {ppl:10.2f}  gap {gap:.4f}  {seconds:5.0f} s  {quotient}", flush=True)

    def batches(self, count=None):
        return soco.sample_batches(self.calibration, self.args, count or self.args.metric_batches)

    @functools.cached_property
    def scored(self):
        """{basis: {layer: ScoredLinear}}, all from one metric; "K-FAC" is two-sided, with sigma^2 for its prices."""
        scored = {basis: {} for basis in soco.BASES}
        for _, layer, metric in soco.measured(self.model, self.layers, self.batches(), progress=True):
            for basis in soco.BASES:
                parts, scale = soco.decompose(layer, metric, basis), soco.output_rms(layer, metric.G)
                scored[basis][layer] = soco.ScoredLinear(layer, *parts, scale)
        scored["K-FAC"] = fresh(scored["two-sided"])
        for basis in soco.BASES:
            soco.set_prices(self.model, scored[basis], self.batches(), progress=True)
        return scored

    @functools.cached_property
    def drafts(self):
        return rpca.drafted(self.model, self.layers, self.batches(), progress=True)


def fresh(scored):
    """A copy of {layer: ScoredLinear} to learn on; the factors, which learning only ever replaces, are shared."""
    shared = [part for layer, student in scored.items() for part in (layer, student.U, student.V)]
    return copy.deepcopy(scored, {id(part): part for part in shared})


def same_share(bench, ratio, basis):
    """The first components of every matrix, as many as `ratio` leaves of it."""
    scored = fresh(bench.scored[basis])
    for layer, student in scored.items():
        m, n = soco.matrix(layer).shape
        student.kept[max(int((1 - ratio) * m * n / (m + n)), 1):] = 0
    return soco.finished(scored)


def learned(bench, ratio, basis="two-sided", steps=None, group=8, deviation=True, stages=soco.STAGES, reset=False):
    """What soco.compress does, from the bench's metric. reset: scores go back to 1 at the end."""
    scored, steps = fresh(bench.scored[basis]), bench.args.steps if steps is None else steps
    soco.check(bench.layers, [0], ratio, steps * deviation, "two-sided", stages, group)
    spectrum = soco.Spectrum(list(scored.values()), group)
    soco.learn(bench.model, scored, spectrum, bench.batches(max(steps, 1)), ratio, steps, bench.args.lr, deviation,
               stages, progress=True)
    if reset:
        spectrum.S.detach().fill_(1)
    return soco.finished(scored)


def chosen(bench, ratio, estimator="metric", rank_share=rpca.RANK_SHARE, rounds=5, scale=True, refitted=True,
           keep=rpca.keep_worthiest):
    """What rpca.compress does, from the bench's metric."""
    drafts = [copy.copy(draft) for draft in bench.drafts]
    for draft in drafts if not scale else ():
        draft.rows, draft.columns = torch.ones_like(draft.rows), torch.ones_like(draft.columns)
        draft.price = torch.ones_like(draft.price)
    if estimator == "policy":
        rpca.choose_by_policy(bench.model, drafts, bench.batches(), ratio, rounds, bench.args.seed, refitted, True)
    else:
        rpca.set_ranks(drafts, ratio, rank_share, True)
        rpca.choose_by_metric(drafts, ratio, rounds, keep, refitted, True)
    return {draft.layer: draft.finish() for draft in drafts}


def same_share_of_matrices(drafts, count):
    share = count / sum(draft.S.numel() for draft in drafts)
    for draft in drafts:
        rpca.keep_worthiest([draft], int(share * draft.S.numel()))


def same_share_of_rows(drafts, count):
    share = count / sum(draft.S.numel() for draft in drafts)
    for draft in drafts:
        top = draft.worth().topk(int(share * draft.n), dim=1).indices
        draft.S = torch.zeros_like(draft.S).scatter(1, top, draft.S.gather(1, top))


def pruned(bench, ratio, prune):
    return baselines.prune_all(prune, bench.drafts, ratio)


SVD = {"whitened SVD, same share": functools.partial(same_share, basis="whitened")}
PRUNED = {name: functools.partial(pruned, prune=prune) for name, prune in [
    ("Wanda", baselines.wanda), ("magnitude", baselines.magnitude), ("SparseGPT", baselines.sparsegpt)]}
SOCO = {
    "full method": {},
    "no learning": {"steps": 0},
    "price sigma^2 (K-FAC)": {"basis": "K-FAC"},
    "rank multiple 1": {"group": 1},
    "basis plain": {"basis": "plain"},
    "basis whitened": {"basis": "whitened"},
    "no deviation": {"deviation": False},
    "no stage 2 (its steps to stage 3)": {"stages": (0.5, 0.0, 0.5)},
    "no stage 3 (its steps to stage 2)": {"stages": (0.5, 0.5, 0.0)},
    "learned ranks, scores set back to 1, no deviation": {"reset": True, "deviation": False},
}
CAP = {
    "full method": {},
    "no low-rank part": {"rank_share": 0.0},
    "twice the low-rank part": {"rank_share": 2 * rpca.RANK_SHARE},
    "one round (the initial mask, refitted)": {"rounds": 1},
    "no scale": {"scale": False},
    "the same share of every matrix": {"keep": same_share_of_matrices},
    "the same share of every row": {"keep": same_share_of_rows},
    "no refit": {"refitted": False},
    "policy gradient, the mask it starts from": {"estimator": "policy", "rounds": 0},
    "policy gradient, three rounds": {"estimator": "policy", "rounds": 3},
}
TABLES = {        # {variant: what makes its layers}; gaps are shown beside the first one's
    "soco": SVD | {name: functools.partial(learned, **settings) for name, settings in SOCO.items()},
    "cap": PRUNED | {name: functools.partial(chosen, **settings) for name, settings in CAP.items()}
                  | {"OATS, 20 rounds": functools.partial(pruned, prune=functools.partial(baselines.oats, rounds=20))},
    "frontier": SVD | {"KFAC-SVD, same share": functools.partial(same_share, basis="two-sided"),
                       "global choice, no learning": functools.partial(learned, steps=0),
                       "SoCo": learned, "CAP": chosen} | PRUNED,
}


def main():
    parser = Parser(__doc__)
    parser.add_argument("table", choices=list(TABLES))
    soco.add_run_flags(parser, metric_batches=16)
    parser.add_argument("--steps", type=whole(1), default=60, help="of SoCo's learning")
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
            bench.score(variant + at, functools.partial(make, bench, ratio), next(iter(table)) + at)


if __name__ == "__main__":
    run(main, soco.CannotCompress)
