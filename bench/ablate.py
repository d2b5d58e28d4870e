"""What each part of a method is worth: one model, one metric, one variant after another, gaps in one table.

    python bench/ablate.py soco --model FOLDER --calib FILE --eval FILE --eval-blocks 20 --steps 60
    python bench/ablate.py cap  --model FOLDER --calib FILE --eval FILE --eval-blocks 20

Takes every flag of soco.py or rpca.py. Results go to bench/results/METHOD-MODEL-RATIO-SEED.json after each variant,
and a variant that is there already is not run again.
"""
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
from bench.baselines import magnitude, oats, prune_all, sparsegpt, wanda
from common.cli import Job, between, run, run_parser, whole
from common.layers import block_layers, swapped
from eval_ppl import perplexity

def same_share_of_matrices(drafts, count):
    share = count / sum(draft.m * draft.n for draft in drafts)
    for draft in drafts:
        rpca.keep_worthiest([draft], int(share * draft.m * draft.n))


def same_share_of_rows(drafts, count):
    share = count / sum(draft.m * draft.n for draft in drafts)
    for draft in drafts:
        top = draft.worth().topk(int(share * draft.n), dim=1).indices
        S = draft.S.to(draft.device)
        draft.set_sparse(torch.zeros_like(S).scatter(1, top, S.gather(1, top)))


SOCO = {                                             # name: settings of soco.compressed_layers
    "full method": {},
    "no learning": {"steps": 0},
    "basis plain": {"basis": "plain"},
    "basis whitened": {"basis": "whitened"},
    "no deviation": {"deviation": False},
    "no stage 2 (its steps to stage 3)": {"stages": (0.5, 0.0, 0.5)},
    "no stage 3 (its steps to stage 2)": {"stages": (0.5, 0.5, 0.0)},
    "learned ranks, scores set back to 1, no deviation": {"reset_scores": True},
}
CAP = {                                              # name: settings of rpca.compressed_layers
    "full method": {},
    "no low-rank part": {"rank_share": 0.0},
    "one round (the initial mask, refitted)": {"rounds": 1},
    "no scale": {"scale": False},
    "twice the low-rank part": {"rank_share": 2 * rpca.RANK_SHARE},
    "the same share of every matrix": {"keep": same_share_of_matrices},
    "the same share of every row": {"keep": same_share_of_rows},
    "no refit": {"refitted": False},
    "2:4 pattern": {"keep": rpca.keep_two_of_four},
    "policy gradient, the mask it starts from": {"estimator": "policy", "rounds": 0},
    "policy gradient, three rounds": {"estimator": "policy", "rounds": 3},
}


def soco_layers(job, layers, metrics, batches, reset_scores=False, **changes):
    settings = {"steps": job.args.steps, "lr": job.args.lr, **changes}
    if not reset_scores:
        return soco.compressed_layers(job.model, layers, metrics, batches, job.args.ratio, **settings)
    scored = soco.scored_layers(layers, metrics, "two-sided")
    students = list(scored.values())
    budget = (1 - job.args.ratio) * sum(student.m * student.n for student in students)
    with swapped(job.model, scored):
        soco.learn(job.model, students, batches, budget, settings["steps"], settings["lr"], False, (0.5, 0.1, 0.4), True)
    for student in students:
        torch.nn.init.ones_(student.S)
    return {layer: student.finish() for layer, student in scored.items()}


def cap_layers(job, layers, metrics, batches, **settings):
    return rpca.compressed_layers(job.model, layers, metrics, batches, job.args.ratio, seed=job.args.seed, **settings)


def main():
    method = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    parser = run_parser(__doc__)
    if method not in ("soco", "cap"):
        parser.error(f"the first word is soco or cap, not {method!r}")
    if method == "soco":
        parser.add("--steps", "of learning", type=whole(1), default=60)
        parser.add("--lr", "of the scores", type=between(0, 10), default=soco.LR)
    parser.add("--only", "run only variants whose name holds this", default="")
    args = parser.parse_args()
    job = Job(args, method)
    name = re.sub(r"\W+", "-", f"{method}-{Path(args.model).name}-{args.ratio:g}-{args.seed}")
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    settings = {key: Path(value).name if key in ("model", "calib", "eval") else value for key, value in vars(args).items() if key != "only"}
    results = json.loads(path.read_text()) if path.exists() else {"settings": settings, "variants": {}}
    if results["settings"] != settings:
        parser.error(f"{path} holds a run with other settings: move it away")

    def score(variant, make):
        if variant in results["variants"] or args.only not in variant and variant != "dense":
            return
        torch.manual_seed(args.seed)
        start = time.perf_counter()
        new = make()
        seconds = time.perf_counter() - start
        with swapped(job.model, new):
            ppl = perplexity(job.model, job.eval_ids, args.eval_seqlen, args.eval_stride, args.eval_blocks)
            calib = perplexity(job.model, job.calib_ids, args.eval_seqlen, blocks=10)
        results["variants"][variant] = {"ppl": ppl.ppl, "nll": ppl.nll, "calib_nll": calib.nll, "seconds": round(seconds, 1)}
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{variant:44} ppl {ppl.ppl:10.2f}  gap {ppl.nll - results['variants']['dense']['nll']:.4f}  {seconds:.0f} s", flush=True)

    score("dense", dict)
    metrics, layers = job.metrics(), block_layers(job.model)
    if method == "soco":
        score("whitened SVD, same share", lambda: soco.truncate(layers, metrics, "whitened", args.ratio))
        for variant, changes in SOCO.items():
            score(variant, lambda: soco_layers(job, layers, metrics, job.batches(args.steps), **changes))
    else:
        for name, prune in [("magnitude", magnitude), ("Wanda", wanda), ("SparseGPT", sparsegpt)]:
            score(name, lambda: prune_all(prune, layers, metrics, args.ratio))
        for variant, changes in CAP.items():
            score(variant, lambda: cap_layers(job, layers, metrics, job.batches(args.metric_batches), **changes))
        score("OATS, 20 rounds", lambda: prune_all(functools.partial(oats, rounds=20), layers, metrics, args.ratio))


if __name__ == "__main__":
    run(main)
