"""What each part of a method is worth: the paper's method as rebuilt, then one row an addition.

    python bench/ablate.py soco                      # the bundled model
    python bench/ablate.py cap --model FOLDER --calib FILE --eval FILE --eval-blocks 20

Every row is a run of `compress`; metrics are measured once. Results go to
bench/results/METHOD-MODEL-SEED.json after each row, and rows that are there are not run again.
"""
import contextlib
import functools
import json
import sys
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rpca
import soco
from eval_ppl import CompressionRun, run_parser


def share_alike(students, budget):
    """In place of soco.keep_best: the leading components, the same share of every matrix."""
    share = budget / soco.budget_for(students, 0)
    for student in students:
        m, n = len(student.a), len(student.c)
        k = int(share * m * n / (m + n) + 1e-6)
        student.kept = torch.arange(min(m, n), device=student.S.device) < max(k, 1)


WANDA, MAGNITUDE = (functools.partial(rpca.pruned, rpca.BASELINES[key]) for key in ("wanda", "magnitude"))
nothing = mock.Mock()
PAPER, POLICY = {"basis": "plain", "learned": ("S", "d")}, {"estimator": "policy", "rounds": 3, "steps": 0}
SOCO = {  # settings of compress; with a dot: names in soco.py that are replaced
    "whitened SVD, same share": {"basis": "whitened", "steps": 0, ".keep_best": share_alike},
    "the paper's method, as rebuilt": PAPER,
    "+ metric of inputs": PAPER | {"basis": "whitened"},
    "+ metric of both sides": PAPER | {"basis": "two-sided"},
    "+ gains: SoCo": {},
    "worth sigma^2, not Fisher information": {".set_fisher": nothing},
    "S alone learned": {"learned": ("S",)},
    "no learning": {"steps": 0},
    "no stage 2, its steps to stage 3": {".CHOICE": 0.5},
    "no stage 3, its steps to stage 2": {".CHOICE": 1 - 1e-9}}
CAP = {  # likewise of rpca.py; or a function that prunes a matrix
    "Wanda": WANDA, "magnitude": MAGNITUDE,
    "the paper's method, as rebuilt": POLICY | {".refit_all": nothing},
    "+ refits": POLICY,
    "the metric in place of policy, one round": {"rounds": 1, "steps": 0, ".Draft.temper": nothing},
    "+ tempering": {"rounds": 1, "steps": 0},
    "+ eight rounds": {"steps": 0},
    "+ gains: CAP": {},
    "without L": {".RANK_SHARE": 0.0}}


def measure_once(run):
    """Make `compress` use one measurement of each metric, and of Fisher information in each basis."""
    collect, set_fisher, batches = soco.collect_metric, soco.set_fisher, run.batches[:run.args.metric_batches]
    metric = functools.cache(lambda by_row: collect(run.model, run.layers, batches, by_row))
    soco.measured = lambda *_: metric(False)
    rpca.collect_metric = lambda *_, by_row: metric(True)
    found = {}

    def set_fisher_once(model, scored, batches):
        basis = next(iter(scored.values())).fisher[0].item()      # sigma^2, another one in every basis
        if basis not in found:
            set_fisher(model, scored, batches)
            found[basis] = {name: student.fisher for name, student in scored.items()}
        for name, student in scored.items():
            student.fisher = found[basis][name]

    soco.set_fisher = set_fisher_once


def compressed(run, script, variant):
    """{name: layer} of one row."""
    args = run.args
    if callable(variant):
        drafts = rpca.drafted(run.model, run.layers, None)
        return {name: variant(draft, ratio=args.ratio) for name, draft in drafts.items()}
    settings = {"steps": args.steps, "lr": args.lr, "metric_batches": args.metric_batches} | variant
    with contextlib.ExitStack() as replaced:
        replaced.enter_context(mock.patch.object(script, "install", lambda model, method, new: new))
        for name in [name for name in settings if name.startswith(".")]:
            replaced.enter_context(mock.patch(script.__name__ + name, settings.pop(name)))
        return script.compress(run.model, run.batches, args.ratio, **settings)


def main():
    method = sys.argv.pop(1) if len(sys.argv) > 1 else "soco"
    script, variants = {"soco": (soco, SOCO), "cap": (rpca, CAP)}[method]
    parser = run_parser(__doc__, script.STEPS, soco.LR, soco.METRIC_BATCHES)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name holds one of these")
    run = CompressionRun(parser, method, soco.block_layers)
    path = Path(__file__).parent / f"results/{method}-{Path(run.args.model).resolve().name}-{run.args.seed}.json"
    path.parent.mkdir(exist_ok=True)
    rows = json.loads(path.read_text()) if path.exists() else {}
    measure_once(run)
    wanted = [name for name in variants if any(part in name for part in run.args.only)]
    for name, variant in [("dense", None), *((name, variants[name]) for name in wanted)]:
        if name not in rows:
            torch.manual_seed(run.args.seed)
            start = time.time()
            with soco.swapped(run.model, compressed(run, script, variant) if variant is not None else {}):
                rows[name] = {"nll": run.score()[1], "seconds": round(time.time() - start)}
            path.write_text(json.dumps(rows, indent=1))
        print(f"{name:44} gap {rows[name]['nll'] - rows['dense']['nll']:8.4f}", flush=True)


if __name__ == "__main__":
    main()
