"""What each part of a method is worth, or all methods at all ratios: one model, one metric, one table.

    python bench/ablate.py soco --model FOLDER --calib FILE --eval FILE --eval-blocks 20
    python bench/ablate.py cap --model FOLDER --calib FILE --eval FILE --eval-blocks 20
    python bench/ablate.py frontier --ratio 0.1 0.2 0.3 0.4 0.5 0.6 0.7

Variants of SoCo and CAP are runs of `compress` itself; the frontier's are one run each, down through the
ratios. --steps and --lr are SoCo's; CAP has its defaults. --out and --no-baselines do nothing.
Results go to bench/results/TABLE-MODEL-SEED.json after each; what is there already is shown and not scored
again, so that a run goes on where it was stopped, and ratios before the last can be added later.
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
from bench.baselines import oats, sparsegpt
from eval_ppl import Parser, UserError, run, say, score
from rpca import keep_worthiest


class Bench:
    """A model and its texts. Here `compress` measures and decomposes once, and returns {layer: new one}."""

    def __init__(self, args):
        self.args, self.steps = args, round(soco.STEPS * args.ratio[-1]) if args.steps is None else args.steps
        self.model, _, calibration, self.evaluation = soco.read_inputs(args)
        self.batches = soco.sample_batches(calibration, args, max(self.steps, args.metric_batches))
        self.measured_on = self.batches[:args.metric_batches]
        self.inputs = self.model, soco.block_layers(self.model), self.measured_on
        measure, score_all = soco.measured, soco.scored_layers
        self.metrics = cache(lambda by_row: list(measure(*self.inputs, progress=True, by_row=by_row)))
        self.scored = lru_cache(2)(lambda basis, set_prices: score_all(*self.inputs, basis, progress=True))
        self.runs = {"SoCo": self.run_of_soco(), "CAP": self.run_of_cap()}
        soco.measured = rpca.measured = lambda *_, by_row=False: self.metrics(by_row)
        soco.scored_layers = self.fresh_scored
        soco.decompose = lru_cache(2 * len(self.inputs[1]))(soco.decompose)    # remembers two bases
        soco.install = rpca.install = lambda model, method, layers, new: new

    def fresh_scored(self, model, layers, batches, basis="two-sided", progress=True):
        scored = self.scored(basis, soco.set_prices)                  # which a variant may have replaced
        return {layer: copy.deepcopy(student, {id(part): part for part in (layer, student.U, student.V)})
                for layer, student in scored.items()}

    def soco(self, ratio, replace={}, **settings):
        """replace: {name: another function} of soco.py."""
        defaults = {"steps": self.args.steps, "lr": self.args.lr, "metric_batches": self.args.metric_batches}
        with mock.patch.multiple(soco, **{"finished": soco.finished} | replace):
            return soco.compress(self.model, self.batches, ratio, progress=True, **defaults | settings)

    def cap(self, ratio, keep=keep_worthiest, **settings):
        with mock.patch.object(rpca, "keep_worthiest", keep):
            return rpca.compress(self.model, self.batches, ratio, metric_batches=self.args.metric_batches,
                                 progress=True, **settings)

    def run_of_soco(self):
        """Yield (ratio, (steps, {layer: new one})) of one run down through the ratios."""
        scored = self.fresh_scored(*self.inputs)
        spectrum = soco.Spectrum(list(scored.values()), group=8)
        run = soco.learn_down(self.model, scored, spectrum, self.batches, self.args.ratio, self.steps,
                              self.args.lr, progress=True)
        yield from zip(self.args.ratio, run)

    def run_of_cap(self):
        drafts = rpca.drafted(*self.inputs)
        rpca.set_ranks(drafts, self.args.ratio[-1], rpca.RANK_SHARE, progress=True)
        steps = round(rpca.STEPS * self.args.ratio[-1])
        run = rpca.prune_down(self.model, drafts, self.measured_on, self.args.ratio, steps, progress=True)
        yield from zip(self.args.ratio, run)

    def down(self, ratio, method):
        return next(new for at, (_, new) in self.runs[method] if at == ratio)

    def pruned(self, ratio, prune):
        return rpca.pruned(rpca.drafted(*self.inputs), prune, ratio)

    def svd(self, ratio, basis):
        """The first components of every matrix, as many as `ratio` leaves of it."""
        return {layer: soco.truncated(layer, *soco.decompose(layer, metric, basis), ratio)
                for _, layer, metric in self.metrics(False)}

    def perplexity(self, new):
        with soco.swapped(self.model, new):
            found, _ = score(self.model, self.evaluation, self.args)
        return {"ppl": found.ppl, "nll": found.nll}


def finished_at_1(scored):
    for student in scored.values():
        student.S.detach().fill_(1)
    return {layer: student.finish() for layer, student in scored.items()}


def same_share_of_matrices(drafts, count):
    for draft in drafts:
        keep_worthiest([draft], count * draft.S.numel() // sum(other.S.numel() for other in drafts))


def one_threshold(drafts, count):
    for draft in drafts:
        draft.level = torch.ones_like(draft.level)
    keep_worthiest(drafts, count)


def same_share_of_rows(drafts, count):
    dropped = 1 - count / sum(draft.S.numel() for draft in drafts)
    for draft in drafts:
        draft.S = rpca.keep_largest(draft.S, draft.worth(), dropped)


SVD = {"whitened SVD, same share": ("svd", {"basis": "whitened"})}
PRUNED = {name: ("pruned", {"prune": prune})
          for name, prune in [("Wanda", rpca.wanda), ("magnitude", rpca.magnitude), ("SparseGPT", sparsegpt)]}
SOCO = {
    "full method": {}, "no learning": {"steps": 0}, "rank multiple 1": {"group": 1},
    "price sigma^2 (K-FAC)": {"replace": {"set_prices": lambda *_: None}},
    "S and d learned": {"learned": "Sd"}, "S alone learned": {"learned": "S"},
    "no stage 2 (its steps to stage 3)": {"stages": (0.5, 0.0, 0.5)},
    "no stage 3 (its steps to stage 2)": {"stages": (0.5, 0.5, 0.0)},
    "S alone learned, and set back to 1": {"replace": {"finished": finished_at_1}, "learned": "S"},
    "basis whitened": {"basis": "whitened"}, "basis plain": {"basis": "plain"}}
CAP = {
    "full method": {}, "no gains learned": {"steps": 0}, "no low-rank part": {"rank_share": 0.0},
    "twice the low-rank part": {"rank_share": 2 * rpca.RANK_SHARE},
    "one round (the initial mask, refitted)": {"rounds": 1}, "no scale": {"scale": False},
    "not tempered": {"keep": one_threshold},
    "the same share of every matrix": {"keep": same_share_of_matrices},
    "the same share of every row": {"keep": same_share_of_rows}, "no refit": {"refitted": False},
    "policy gradient, the mask it starts from": {"estimator": "policy", "rounds": 0, "steps": 0},
    "policy gradient, three rounds": {"estimator": "policy", "rounds": 3, "steps": 0}}
TABLES = {        # {variant: (method of Bench, settings)}; gaps are shown over that of the first too
    "soco": SVD | {variant: ("soco", settings) for variant, settings in SOCO.items()},
    "cap": PRUNED | {"OATS, 20 rounds": ("pruned", {"prune": partial(oats, rounds=20)})}
                  | {variant: ("cap", settings) for variant, settings in CAP.items()},
    "frontier": SVD | {"KFAC-SVD, same share": ("svd", {"basis": "two-sided"}),
                       "global choice, no learning": ("soco", {"steps": 0}),
                       "SoCo": ("down", {"method": "SoCo"}), "CAP": ("down", {"method": "CAP"}),
                       "Wanda": PRUNED["Wanda"], "SparseGPT": PRUNED["SparseGPT"]}}


def main():
    parser = Parser(__doc__)
    parser.add_argument("table", choices=list(TABLES))
    soco.add_run_flags(parser)
    parser.add_argument("--only", nargs="+", default=[""], help="run only variants whose name holds one of"
                        " these (default: all)")
    args = parser.parse_args()
    bench = Bench(args)
    left_out = ("table", "only", "ratio", "out", "no_baselines")
    settings = {key: value for key, value in vars(args).items() if key not in left_out}
    settings |= {key: Path(settings[key]).name for key in ("model", "calib", "eval")}
    settings["last_ratio"] = args.ratio[-1]
    settings["steps"] = f"{soco.STEPS} times the ratio" if args.steps is None else args.steps
    name = re.sub(r"\W+", "-", f"{args.table}-{settings['model']}-{args.seed}")
    path = Path(__file__).parent / "results" / f"{name}.json"
    results = json.loads(path.read_text()) if path.exists() else {"settings": settings, "variants": {}}
    if results["settings"] != settings:
        raise UserError(f"{path} holds a run with other settings: move it away")

    variants, dense = results["variants"], bench.perplexity({})
    if abs(variants.setdefault("dense", dense)["nll"] - dense["nll"]) > 0.002:
        raise UserError(f"{path} holds a run of another model, or another machine: move it away")

    say(f"{'dense':50} ppl {dense['ppl']:9.2f}")

    def score_once(variant, make, reference):
        if variant not in variants:
            torch.manual_seed(args.seed)
            start = time.perf_counter()
            new = make()
            seconds = round(time.perf_counter() - start, 1)
            variants[variant] = bench.perplexity(new) | {"seconds": seconds}
            path.write_text(json.dumps(results, indent=1) + "\n")
        gaps = {key: row["nll"] - variants["dense"]["nll"] for key, row in variants.items()}
        quotient = f", {gaps[variant] / gaps[reference]:.3f} of {reference}" if reference in gaps else ""
        say(f"{variant:50} ppl {variants[variant]['ppl']:9.2f} gap {gaps[variant]:7.4f}{quotient}")

    for ratio in args.ratio:
        first, at = next(iter(TABLES[args.table])), f" at {ratio:g}"
        for variant, (method, changes) in TABLES[args.table].items():
            if any(part in variant + at for part in args.only):
                score_once(variant + at, partial(getattr(bench, method), ratio, **changes), first + at)


if __name__ == "__main__":
    run(main, soco.CannotCompress)
