"""CAP: robust PCA of every weight matrix into low-rank plus sparse, then one global choice (arXiv 2505.03801).

    python rpca.py                                  # a bundled 1.9M-parameter GPT-2, offline, on a laptop
    python rpca.py --model gpt2 --ratio 0.5         # GPT-2 on WikiText-2; a GPU is used if there is one

The method, on one screen. *Stage 1*: every block weight W [m, n], scaled so that the square of an entry is the loss
it costs (R^(1/2) W D, common/metric.py), is split by principal component pursuit,

    min |L|_* + lam |S|_1   with  L + S = W:     L = U diag(sigma) V low-rank,  S sparse.

*Stage 2*: every direction of every L and every entry of every S has a probability p of being kept, under one budget
for the whole model,

    sum p_sigma (m + n) + sum p_S  <=  (1 - ratio) * numbers in the block weights.

The paper learns them by policy gradient from the loss on calibration text (`--estimator policy`). The default drives the
p of entries to 0 or 1 by what the metric predicts, in rounds, and gives L a small share of what each matrix may keep.
*Then* the kept values are refitted, and each layer is stored as U sqrt(sigma), sqrt(sigma) V, a bitmask and the values
of S (common/sparse.py). (S is the sparse part here; in soco.py it is the score.)
"""
import functools
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, bar
from common.folder import install, load, register, save    # load and save stand here for whoever imports this module
from common.layers import block_layers, frozen, input_device, matrix, swapped
from common.metric import collect_metric, threshold
from common.processes import average, shared_out
from common.sparse import LowRankPlusSparse


# ---- stage 1: principal component pursuit --------------------------------------------------------

class RPCA(NamedTuple):
    U: torch.Tensor          # [..., m, k] orthonormal columns
    sigma: torch.Tensor      # [..., k] singular values of L, falling; a batch is padded with zeros
    V: torch.Tensor          # [..., k, n] orthonormal rows, zeros where padded: L = U diag(sigma) V
    S: torch.Tensor          # [..., m, n] the sparse part
    residuals: list          # |W - L - S|_F / |W|_F after each iteration, the largest of a batch


@torch.no_grad()
def rpca(W, lam=None, penalty=None, tol=1e-6, max_iter=500):
    """Principal component pursuit, min |L|_* + lam |S|_1 with L + S = W, by ADMM (Candes et al. 2011, arXiv 0912.3599,
    algorithm 1; CAP, stage 1).

    W [..., m, n]: float32 or float64, any device. lam: 1 / sqrt(max(m, n)). penalty mu: a number is held; by default mu
    starts near 1.25 / |W|_2, where L has few directions (Lin et al. 2010, arXiv 1009.5055), and grows by half after every
    iteration whose residual is larger than the change of S, both relative (Boyd et al. 2011, section 3.4.1).
    Stops at a relative residual of at most tol, or after max_iter iterations.
    """
    norm = functools.partial(torch.linalg.matrix_norm, keepdim=True)
    U, lam, residuals = leading_range(W), lam or max(W.shape[-2:]) ** -0.5, []
    mu = torch.full_like(W[..., :1, :1], penalty) if penalty else 1.25 / (norm(U.mT @ W, 2) + 1e-30)
    S, Z = torch.zeros_like(W), torch.zeros_like(W)                   # Z = Y / mu, Y the multiplier
    while not residuals or (residuals[-1] > tol and len(residuals) < max_iter):
        U, sigma, V = singular_value_threshold(W - S + Z, 1 / mu, nearby=U)
        T = W + Z - (U * sigma[..., None, :]) @ V
        S, before = soft_threshold(T, lam / mu), S
        residual = norm(T - S - Z) / (norm(W) + 1e-30)                # of W - L - S
        residuals.append(residual.max().item())
        Z = T - S                                                     # Y + mu (W - L - S), divided by mu
        if not penalty:
            growth = torch.where(residual > norm(S - before) / (norm(Z) + 1e-30), 1.5, 1.0)
            mu, Z = mu * growth, Z / growth
    return RPCA(U, sigma, V, S, residuals)


def soft_threshold(A, tau):
    """argmin over S of tau |S|_1 + |S - A|_F^2 / 2: entries shrunk towards zero by tau."""
    return A - A.clamp(-tau, tau)


def leading_range(A, start=None, steps=2):
    """Orthonormal basis [..., m, k] near the leading left singular vectors of A [..., m, n]: subspace iteration from `start`
    and ten random directions (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4)."""
    basis = torch.randn(*A.shape[:-1], 10, generator=torch.Generator(A.device).manual_seed(0), dtype=A.dtype, device=A.device)
    basis = basis if start is None else torch.cat([start, basis], -1)
    for _ in range(steps):
        basis = torch.linalg.qr(A @ (A.mT @ basis))[0]
    return basis


def singular_value_threshold(A, tau, nearby=None):
    """argmin over L of tau |L|_* + |L - A|_F^2 / 2, as U, sigma, V: singular values shrunk by tau, those at zero left out.
    tau: a number, or one a matrix [..., 1, 1].

    From the eigenvectors Q of the smaller Gram matrix: with A [..., m, n], m <= n, L = Q diag(shrunk / sigma) Q^T A.
    In float32, singular values under 1e-3 of the largest are lost in rounding. nearby [..., m, k]: U of a matrix near A; if
    it has few columns, A is first projected on their span, widened. A singular value that has just risen above tau can so
    be missed for a call or two.
    """
    projected = nearby is not None and 4 * (nearby.shape[-1] + 10) < min(A.shape[-2:])
    if A.shape[-2] > A.shape[-1]:
        V, sigma, U = singular_value_threshold(A.mT, tau, A.mT @ nearby if projected else None)
        return U.mT, sigma, V.mT
    basis = leading_range(A, nearby) if projected else None
    B = basis.mT @ A if projected else A
    squares, Q = torch.linalg.eigh(B @ B.mT)                          # eigenvalues rise: the last k are wanted
    sigma = squares.clamp_min(0).sqrt()
    shrunk = (sigma - (tau.squeeze(-1) if torch.is_tensor(tau) else tau)).clamp_min(0)
    if projected and shrunk[..., 0].any():                            # the span is too small
        return singular_value_threshold(A, tau)
    k = max(int((shrunk > 0).sum(-1).max()), 1)
    U, sigma, shrunk = Q[..., -k:].flip(-1), sigma[..., -k:].flip(-1), shrunk[..., -k:].flip(-1)
    V = torch.where(shrunk[..., None] > 0, U.mT @ B / sigma[..., None], 0.0)
    return basis @ U if projected else U, shrunk, V


# ---- stage 2: one probabilistic mask over the whole model ----------------------------------------
#
# An item is a direction of some L, which costs m + n numbers, or an entry of some S, which costs 1.
# `p` and `masks` are lists of tensors, one number an item; `cost` is a list of numbers, the cost of an item of each tensor.

def project(p, cost, budget):
    """The nearest probabilities with expected cost at most `budget`: clamp(p - tau cost, 0, 1), tau by bisection."""
    def moved(tau):
        return [(q - tau * c).clamp(0, 1) for q, c in zip(p, cost)]

    def too_dear(tau):
        return sum(c * q.sum(dtype=torch.float64).item() for q, c in zip(moved(tau), cost)) > budget

    low, high = 0.0, 1 + max(q.max().item() / c for q, c in zip(p, cost)) if too_dear(0.0) else 0.0
    for _ in range(40 if high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if too_dear(middle) else (low, middle)
    return moved(high)


def score_function(mask, p, edge=0.0):
    """d log P(mask) / dp of independent Bernoulli masks, (mask - p) / (p (1 - p)) (CAP, stage 2); edge > 0 bounds it
    near p = 0 and 1, and makes it 0 there, where the mask never varies."""
    return (mask - p) / (p * (1 - p)).clamp_min(edge * (1 - edge))


def policy_gradient(loss_of, p, cost, budget, steps, lr=0.05, window=5, generator=None, progress=False):
    """Learn probabilities from forward passes alone (REINFORCE, as the paper has it); returns p and the losses.

    loss_of(masks, step) -> loss of one draw. Each step draws masks ~ Bernoulli(p) and moves p by
    -lr (loss - baseline) score_function, the baseline being the mean of the last `window` losses; then p is projected.
    """
    losses = []
    for step in bar(range(steps), progress, desc="policy", unit="draw"):
        masks = [torch.bernoulli(q, generator=generator) for q in p]
        loss = loss_of(masks, step)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of draw {step + 1} of {steps} is {loss}: use --dtype float32 or bfloat16")
        baseline = sum(losses[-window:]) / len(losses[-window:]) if losses else loss
        losses.append(loss)
        p = [q - lr * (loss - baseline) * score_function(m, q, edge=0.01) for q, m in zip(p, masks)]
        p = project(p, cost, budget)
    return p, losses


def keep_most_probable(p, cost, budget):
    """Boolean masks of the items taken greedily: most probable first, every one that still fits in the budget."""
    flat = torch.cat([q.flatten().float() for q in p])
    each = torch.cat([torch.full((q.numel(),), c, dtype=torch.int64, device=q.device) for q, c in zip(p, cost)])
    order = flat.argsort(descending=True, stable=True)
    keep, left = torch.zeros(len(flat), dtype=torch.bool, device=flat.device), int(budget)
    while len(order):
        fits = each[order].cumsum(0) <= left                          # the longest prefix that fits ...
        count = int(fits.sum())
        keep[order[:count]] = True
        left -= int(each[order[:count]].sum())
        order = order[count:]
        order = order[each[order] <= left]                            # ... then what is too dear is passed over
    return [part.view_as(q) for part, q in zip(keep.split([q.numel() for q in p]), p)]


# ---- values on a chosen structure -----------------------------------------------------------------

@torch.no_grad()
def refit(T, S, mask, G, iterations=12, damping=1e-2):
    """Values of S on `mask` that bring S x closest to T x: min tr((T - S) G (T - S)^T), all rows at once.

    T, S [m, n]: target and start; G [n, n]: Gram matrix of the inputs, to whose diagonal damping * its mean is added.
    Conjugate gradients on the masked entries, preconditioned by diag(G); the (damped) error falls with every iteration.
    Each row of mask is its own least-squares problem, too many to factorise; SparseGPT (arXiv 2301.00774) solves them
    column by column, approximately.
    """
    G = G.clone()
    G.diagonal().add_(damping * G.diagonal().mean())
    tiny = torch.finfo(G.dtype).tiny
    scale = G.diagonal().clamp_min(tiny)
    S = S * mask
    residual = ((T - S) @ G) * mask
    direction = step = residual / scale
    square = (residual * step).sum(1, keepdim=True)
    for _ in range(iterations):
        image = (direction @ G) * mask
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where(curvature > 0, square / curvature, 0.0)
        S, residual = S + length * direction, residual - length * image
        step = residual / scale
        square, before = (residual * step).sum(1, keepdim=True), square
        direction = step + square / before.clamp_min(tiny) * direction
    return S


def alternate(Q, V, kept, rounds=3):
    """Rank-k L = (L_U, V) [m, k], [k, n] for Q = L + S with `kept` numbers in all, from a start V [k, n] of its row space.

    S takes the largest entries of Q - L that the budget leaves, L the best rank k of Q - S, in turn; the rank-k
    approximation is one step of subspace iteration a round.
    """
    m, n, k = *Q.shape, len(V)
    entries = max(kept - k * (m + n), 1)
    U = Q @ V.mT
    for _ in range(rounds):
        left = Q - U @ V
        cut = left.abs().flatten().kthvalue(left.numel() - entries + 1).values if entries < left.numel() else 0.0
        left = Q - left * (left.abs() >= cut)
        basis = torch.linalg.qr(left @ V.mT)[0]
        V, small = (part.mT for part in torch.linalg.qr(left.mT @ basis))
        U = basis @ small
    return U, V


# ---- compressing a model ------------------------------------------------------------------------

ESTIMATORS = ("metric", "policy")
RANK_SHARE = 0.02         # of the numbers that a matrix may keep, for L; more is worse on SmolLM2 (README)
RPCA_ITERATIONS = 10      # the paper finds perplexity settled after about as many


class Draft(nn.Module):
    """A matrix while its structure is chosen: W [m, n] = L + S, L = U V of rank k, S zero where it is dropped, in the units of W.

    rows [m], columns [n]: R^(1/2) and D of the metric; an entry of R^(1/2) S D, squared, is its worth. All work on
    the matrix is done on `device`; S stays where the layer is, in its dtype.
    """

    def __init__(self, layer, metric, scale=True, device=None):
        super().__init__()
        self.layer, self.G, self.device = layer, metric.G, device or layer.weight.device
        self.rows, self.columns = ((A + 1e-6 * A.mean()).clamp_min(1e-20).sqrt() if scale else torch.ones_like(A)
                                   for A in (metric.R.to(self.device), metric.G.diagonal().to(self.device)))
        self.m, self.n = matrix(layer).shape
        self.U = self.V = self.S = None                               # until set_low_rank and set_sparse

    def scaled(self):
        return self.rows[:, None] * matrix(self.layer).to(self.rows) * self.columns

    def set_low_rank(self, U, V):
        """L from factors [m, k], [k, n] in scaled units."""
        self.U, self.V = U.to(self.rows) / self.rows[:, None], V.to(self.rows) / self.columns

    def set_sparse(self, S):
        self.S = S.to(self.layer.weight)

    def target(self):
        """W - L [m, n]: what S starts from, and is to stand for."""
        return matrix(self.layer).to(self.rows) - self.U @ self.V

    def worth(self):
        """Predicted loss of dropping each entry of S [m, n] float32."""
        return (self.rows[:, None] * self.S.to(self.rows) * self.columns).square()

    def refitted(self):
        S = self.S.to(self.rows)
        return (refit(self.target(), S, S != 0, self.G.to(self.device)).to(self.S.dtype),)

    def forward(self, x):
        return F.linear(x, (self.U @ self.V + self.S.to(self.rows)).to(x), self.layer.bias)

    def finish(self):
        half = (self.U.norm(dim=0) / self.V.norm(dim=1).clamp_min(1e-30)).sqrt().clamp_min(1e-15)
        S, self.S = self.S, None                                      # let go of it
        return LowRankPlusSparse.of(self.U / half, half[:, None] * self.V, S, self.layer.bias, self.layer.weight)


def compress(model, batches, ratio=0.5, metrics=None, progress=False, **settings):
    """Compress a causal language model in place, and return it, with `ratio` of its block weights' numbers removed.

    batches: token ids [batch, length], an iterable. metrics: what collect_metric gave for block_layers(model), if the
    caller has it; else measured on `batches`. settings: of `compressed_layers`.
    """
    layers = block_layers(model)
    new = compressed_layers(model, layers, metrics, list(batches), ratio, progress=progress, **settings)
    return install(model, "cap", layers, new)


def compressed_layers(model, layers, metrics, batches, ratio, estimator="metric", rank_share=RANK_SHARE, rounds=5, scale=True,
                      keep=None, refitted=True, seed=0, device=None, progress=False):
    """{layer: LowRankPlusSparse} for `layers` {name: layer} of a model, which is left as it was.

    estimator: "metric" or "policy" (the paper's). rank_share: of the numbers that each matrix may keep, for its L ("metric").
    rounds: of pruning and refitting, or of the policy over the batches (the paper: 3). keep: what prunes S under "metric", a
    value of `PATTERNS`. device: where matrices are worked on, one at a time (default: where each lies); the policy holds all
    probabilities there. Raises UserError for settings that cannot be met.
    """
    check(layers, ratio, estimator, rank_share, rounds, keep)
    metrics = metrics or collect_metric(model, layers, batches, progress=progress)
    drafts = [Draft(layer, metrics[name], scale, device) for name, layer in layers.items()]
    budget = int((1 - ratio) * sum(draft.m * draft.n for draft in drafts))
    if estimator == "policy":
        choose_by_policy(model, drafts, batches, budget, rounds, seed, progress)
        if refitted:
            refit_all(drafts)
    else:
        set_ranks(drafts, ratio, rank_share, progress)
        choose_by_metric(drafts, budget, rounds, keep or keep_worthiest, refitted, progress)
    return {draft.layer: draft.finish() for draft in drafts}


def check(layers, ratio, estimator, rank_share, rounds, keep):
    """Refuse what `compressed_layers` cannot do."""
    if not 0 < ratio < 1:
        raise UserError(f"ratio {ratio} is not between 0 and 1")
    if estimator not in ESTIMATORS:
        raise UserError(f"estimator {estimator} is none of {', '.join(ESTIMATORS)}")
    if not 0 <= rank_share < 1:
        raise UserError(f"rank_share {rank_share} is not in [0, 1)")
    if rounds < (estimator == "metric"):
        raise UserError(f"rounds {rounds} is less than 1")
    if keep is keep_two_of_four and (estimator == "policy" or any(matrix(layer).shape[1] % 4 for layer in layers.values())):
        raise UserError("--pattern 2:4 needs --estimator metric, and matrices whose inputs are a multiple of 4")


def set_ranks(drafts, ratio, rank_share, progress):
    """Stage 1 for every matrix: its L from robust PCA, at the rank that `rank_share` of the numbers it may keep pays for."""
    def split(draft):
        Q, kept = draft.scaled(), int((1 - ratio) * draft.m * draft.n)
        k = int(rank_share * kept / (draft.m + draft.n))
        return alternate(Q, rpca(Q, max_iter=RPCA_ITERATIONS).V[:k], kept) if k else (Q[:, :0], Q[:0])

    found = bar(shared_out(split, drafts), progress, total=len(drafts), desc="robust PCA", unit="matrix")
    for draft, factors in zip(drafts, found):
        draft.set_low_rank(*factors)
        draft.set_sparse(draft.target())


def keep_worthiest(drafts, count):
    """Set every S to zero but for the `count` worthiest entries of them all; of entries that tie at the cut, none stays."""
    cut = threshold(lambda: (draft.worth() for draft in drafts), count)
    for draft in drafts:
        draft.set_sparse(draft.S.to(draft.device) * (draft.worth() > cut))


def keep_two_of_four(drafts, count):
    """`keep_worthiest` after all but the two worthiest of every four neighbours in a row have gone: the 2:4 pattern of GPUs."""
    for draft in drafts:
        groups = draft.worth().unflatten(1, (-1, 4))
        top = torch.zeros_like(groups, dtype=torch.bool).scatter(2, groups.topk(2).indices, True)
        draft.set_sparse(draft.S.to(draft.device) * top.flatten(1))
    keep_worthiest(drafts, count)


PATTERNS = {"any": keep_worthiest, "2:4": keep_two_of_four}


def refit_all(drafts):
    for draft, refitted in zip(drafts, shared_out(Draft.refitted, drafts)):
        draft.set_sparse(*refitted)


def choose_by_metric(drafts, budget, rounds, keep, refitted, progress):
    """Stage 2 by the metric: drop the entries of least predicted loss in the whole model, refit, and again.

    The expected loss of independent Bernoulli masks grows by worth (1 - p) for every entry, so its gradient drives p to 1
    above one price for the whole model and to 0 below. The worth changes as the survivors make up for what is gone:
    hence in rounds, each dropping less than the one before.
    """
    entries = budget - sum(draft.U.shape[1] * (draft.m + draft.n) for draft in drafts)
    numbers = sum(draft.m * draft.n for draft in drafts)
    for done in bar(range(1, rounds + 1), progress, desc="choose and refit", unit="round"):
        keep(drafts, entries + int((numbers - entries) * (1 - done / rounds) ** 2))
        if refitted:
            refit_all(drafts)


def choose_by_policy(model, drafts, batches, budget, rounds, seed, progress):
    """Stage 2 as the paper has it: fixed L and S of robust PCA, probabilities learned by policy gradient, from a start at
    worth / (worth + cost * mean worth), projected on the budget: what the metric would say."""
    found = shared_out(lambda draft: rpca(draft.scaled(), max_iter=RPCA_ITERATIONS)[:4], drafts)
    device, splits, worths, cost = drafts[0].device, [], [], []
    for draft, (U, sigma, V, S) in zip(drafts, bar(found, progress, total=len(drafts), desc="robust PCA", unit="matrix")):
        worths += [sigma.square().to(device), S.square().to(device)]
        cost += [draft.m + draft.n, 1]
        S = S.to(draft.rows) / draft.rows[:, None] / draft.columns
        splits.append([part.to(draft.layer.weight) for part in (U * sigma, V, S)])

    def set_masks(masks):
        for draft, (U, V, S), directions, entries in zip(drafts, splits, masks[::2], masks[1::2]):
            kept = directions.to(U.device).bool()
            draft.set_low_rank(U[:, kept], V[kept])
            draft.set_sparse(S * entries.to(S))

    def loss_of(masks, step):
        set_masks(masks)
        ids = batches[step % len(batches)].to(input_device(model))
        with frozen(model), torch.no_grad(), swapped(model, {draft.layer: draft for draft in drafts}):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten().to(logits.device))
        average([loss])
        return loss.item()

    mean = sum(worth.sum() for worth in worths) / sum(worth.numel() for worth in worths)
    p = project([worth / (worth + c * mean) for worth, c in zip(worths, cost)], cost, budget)
    generator = torch.Generator(device=p[0].device).manual_seed(seed)
    p, _ = policy_gradient(loss_of, p, cost, budget, rounds * len(batches), generator=generator, progress=progress)
    set_masks(keep_most_probable([q * (worth > 0) for q, worth in zip(p, worths)], cost, budget))


# ---- load, command -------------------------------------------------------------------------------

def build_empty(layer, shapes):
    """What `Draft.finish` made of a layer, its weights still to be loaded, from the shapes of its tensors."""
    (m, n), k = matrix(layer).shape, shapes.get("down.weight", [0])[0]
    return LowRankPlusSparse(n, m, k, shapes["values"][0], bias="bias" in shapes, dtype=layer.weight.dtype)


register("cap", build_empty)


def main():
    parser = run_parser(__doc__, metric_batches=32)
    parser.add("--estimator", "of the mask: metric, or the paper's policy gradient", choices=ESTIMATORS, default="metric")
    parser.add("--rank-share", "of the numbers that each matrix may keep, for its low-rank part (metric only)",
               type=between(0, 1, or_low=True), default=RANK_SHARE)
    parser.add("--rounds", "of pruning and refitting, or of the policy over the batches", type=whole(1), default=5)
    parser.add("--pattern", "of S: any, or 2:4, at most two of every four in a row", choices=list(PATTERNS), default="any")
    parser.add("--no-scale", "split and choose in the units of W, without the metric", action="store_true")
    parser.add("--no-refit", "keep the values that stage 1 gave", action="store_true")
    args = parser.parse_args()
    job = Job(args, "cap")
    model = job.model
    check(block_layers(model), args.ratio, args.estimator, args.rank_share, args.rounds, PATTERNS[args.pattern])
    job.score("dense", "dense")
    metrics = job.metrics()
    for key, label, prune in [("magnitude", "magnitude", magnitude), ("wanda", "Wanda, row-wise", wanda)]:
        job.baseline(key, label, lambda: prune_all(prune, block_layers(model), metrics, args.ratio), pruned=True)
    with job.clock("compress"):
        compress(model, job.batches(args.metric_batches), args.ratio, metrics, progress=True, estimator=args.estimator,
                 rank_share=args.rank_share, rounds=args.rounds, scale=not args.no_scale, refitted=not args.no_refit,
                 keep=PATTERNS[args.pattern], seed=args.seed, device=job.device)
    job.score("compressed", "CAP")
    job.finish({name: {"rank": shapes.get("down.weight", [0])[0], "nonzeros": shapes["values"][0]}
                for name, shapes in model.config.quantization_config["layers"].items()})


if __name__ == "__main__":
    from bench.baselines import magnitude, prune_all, wanda
    from common.cli import Job, between, run, run_parser, whole
    run(main)
