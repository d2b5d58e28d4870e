"""What things cost, as ratios in one run.

    python bench/cost.py                                            # the bundled model
    python bench/cost.py --model FOLDER --dtype bfloat16            # any other

Prints: a learning step of SoCo (averaged over a whole run) against a forward and backward pass of the dense model on
the same tokens; the two stages of CAP against one forward pass over its calibration tokens; prefill of the compressed
models against dense; bytes of the block weights; `rpca` against the textbook ADMM with torch.linalg.svd at the same
number of iterations, on the model's largest matrix, on planted low-rank plus sparse matrices and on random ones.
"""
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rpca
import soco
from common.cli import Job, run, run_parser, whole
from common.layers import block_layers, matrix, swapped


def seconds(call, repeats=5):
    """Median time of a call, after one call that does not count, and what it gave."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), result


def textbook_rpca(W, iterations, held):
    """ADMM for principal component pursuit with a full singular value decomposition an iteration. held: the penalty is
    that of Candes et al. all along; else it grows by the rule of `rpca.rpca`, whose iterates these then are."""
    m, n = W.shape
    norm, lam = torch.linalg.matrix_norm, max(m, n) ** -0.5
    mu = m * n / (4 * W.abs().sum()) if held else 1.25 / norm(rpca.leading_range(W).mT @ W, 2)
    S, Y = torch.zeros_like(W), torch.zeros_like(W)
    for _ in range(iterations):
        U, sigma, V = torch.linalg.svd(W - S + Y / mu, full_matrices=False)
        L = (U * (sigma - 1 / mu).clamp_min(0)) @ V
        S, before = rpca.soft_threshold(W - L + Y / mu, lam / mu), S
        Y = Y + mu * (W - L - S)
        if not held and norm(W - L - S) / norm(W) > norm(S - before) / norm(Y / mu):
            mu = 1.5 * mu
    return L, S


def objective(L, S, lam):
    return torch.linalg.matrix_norm(L.double(), "nuc").item() + lam * S.double().abs().sum().item()


def solver(job):
    """`rpca` against the textbook at the same number of iterations."""
    def random(*shape, seed):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    largest = max(block_layers(job.model).values(), key=lambda layer: layer.weight.numel())
    cases, iterations = {"largest matrix": matrix(largest).float().cpu()}, rpca.RPCA_ITERATIONS
    for m, n in [(576, 1536), (2048, 2048)]:
        k, size = m // 20, random(m, n, seed=0)
        spikes = 10 * k ** 0.5 * size.sign() * (size.abs() > 1.96)    # one entry in twenty
        cases |= {f"planted {m}": random(m, k, seed=1) @ random(k, n, seed=2) + spikes, f"random {m}": size}
    for kind, W in cases.items():
        ours, found = seconds(lambda: rpca.rpca(W, tol=0, max_iter=iterations), 2)
        for held in (False, True):
            textbook, other = seconds(lambda: textbook_rpca(W, iterations, held), 1)
            values = [objective(*split, max(W.shape) ** -0.5) for split in [((found.U * found.sigma) @ found.V, found.S), other]]
            print(f"rpca, {kind}, {'x'.join(map(str, W.shape))}: {textbook / ours:.1f} times as fast as the textbook's {iterations} iterations "
                  f"with {'a held' if held else 'the same'} penalty ({ours:.2f} s, {textbook:.2f} s), objective / its {values[0] / values[1]:.6f}", flush=True)


def methods(job):
    """A learning step, prefill and bytes of both methods, against the dense model."""
    args, model, ids = job.args, job.model, job.batches(1)[0].to(job.device)
    layers = block_layers(model)

    def dense_step():
        model.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()

    @torch.no_grad()
    def prefill():
        model(input_ids=ids, use_cache=False)

    (dense, _), (dense_prefill, _) = seconds(dense_step), seconds(prefill)
    model.zero_grad()
    metrics = job.metrics()
    start = time.perf_counter()
    soco.compressed_layers(model, layers, metrics, job.batches(args.steps), args.ratio, 0)
    decomposed = time.perf_counter() - start
    start = time.perf_counter()
    low_rank = soco.compressed_layers(model, layers, metrics, job.batches(args.steps), args.ratio, args.steps)
    step = (time.perf_counter() - start - decomposed) / args.steps

    @torch.no_grad()
    def calibration_pass():
        for batch in job.batches(args.metric_batches):
            model(input_ids=batch.to(job.device), use_cache=False)

    one_pass, times, sparse = seconds(calibration_pass, 1)[0], {}, {}
    for share in (rpca.RANK_SHARE, 0.0):
        start = time.perf_counter()
        sparse[share] = rpca.compressed_layers(model, layers, metrics, [], args.ratio, rank_share=share)
        times[share] = time.perf_counter() - start
    stage1 = times[rpca.RANK_SHARE] - times[0.0]
    print(f"CAP / one forward pass over {args.metric_batches} batches ({one_pass:.1f} s): stage 1 {stage1 / one_pass:.2f}, "
          f"stage 2 with its refits {times[0.0] / one_pass:.2f}", flush=True)
    print(f"a learning step of SoCo / forward and backward of the dense model: {step / dense:.2f} ({step:.3f} s, {dense:.3f} s)")
    dense_bytes = stored_bytes(layers.values())
    for name, new in [("SoCo", low_rank), ("CAP", sparse[rpca.RANK_SHARE])]:
        with swapped(model, new):
            print(f"{name}: prefill {dense_prefill / seconds(prefill)[0]:.2f} times as fast as dense, "
                  f"block bytes / dense {stored_bytes(new.values()) / dense_bytes:.3f}", flush=True)


def stored_bytes(layers):
    return sum(t.numel() * t.element_size() for layer in layers for t in layer.state_dict().values())


def main():
    parser = run_parser(__doc__)
    parser.add("--steps", "of SoCo's run", type=whole(1), default=20)
    parser.add("--only-solver", "only `rpca` against the textbook", action="store_true")
    job = Job(parser.parse_args(), "soco")
    if not job.args.only_solver:
        methods(job)
    solver(job)


if __name__ == "__main__":
    run(main)
