"""CAP: robust PCA of every weight matrix into low-rank plus sparse, one global choice (arXiv 2505.03801).

    python rpca.py                                  # a bundled 1.9M-parameter GPT-2, offline, on a laptop
    python rpca.py --model gpt2 --ratio 0.5         # GPT-2 on WikiText-2; a GPU is used if there is one

The method, on one screen. *Stage 1*: every block weight W [m, n], scaled to R^(1/2) W D (below) so that the
square of an entry is twice the loss it is predicted to cost (the 2 is left out from here on), is split by
principal component pursuit,

    min |L|_* + lam |S|_1   with  L + S = W:     L = U diag(sigma) V low-rank,  S sparse.

*Stage 2*: every direction of every L and every entry of every S has a probability p of being kept, under one
budget for the whole model,

    sum p_sigma (m + n) + sum p_S  <=  (1 - ratio) * parameters in the block weights.

The paper learns the p by policy gradient from the loss on calibration text (`--estimator policy`). The
default drives the p of entries to 0 or 1 by the loss that dropping them is predicted to cost, R_i S_ij^2
D_j^2, where D_j^2 = E[x_j^2] of the inputs and, with g the loss's gradients at the outputs, R_i makes a row
of W sum to its Fisher information, E[g_i^2 sum_j W_ij^2 x_j^2]. Predictions are tempered (`Draft.temper`),
entries go in rounds, and L, fitted from robust PCA's row space (`alternate`), gets a share of what a matrix
may keep where that lowers its loss. *Then* the kept values are refitted to the dense layer's outputs, and
gains of every matrix, y = a * (L + S)(c * x), are learned as in soco.py and folded in: they cost nothing.
Each layer is stored as two factors of L (U sqrt(sigma), sqrt(sigma) V, times the gains), a bitmask and the
values of S (the sparse part; in soco.py S is the score).
"""
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # Ctrl-C while torch is imported: no traceback

import contextlib
import functools
import inspect
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# load and save stand here for whoever imports this module
from soco import (KINDS, LR, METRIC_BATCHES, PACKERS, SOURCES, CannotCompress, Run, add_run_flags,
                  as_the_first, average, bar, block_layers, budget_for, check_inputs, dense_like, free_memory,
                  frozen, install, load, matrix, measured, sample_batches, save, swapped, train)


# ---- stage 1: principal component pursuit --------------------------------------------------------

class RPCA(NamedTuple):
    U: torch.Tensor          # [..., m, k] orthonormal columns: L = U diag(sigma) V
    sigma: torch.Tensor      # [..., k] singular values of L, falling; a batch is padded with zeros
    V: torch.Tensor          # [..., k, n] orthonormal rows; zero where padded (if m > n, U's columns are)
    S: torch.Tensor          # [..., m, n] the sparse part
    residuals: list          # |W - L - S|_F / |W|_F after each iteration, the largest of a batch


@torch.no_grad()
def rpca(W, lam=None, penalty=None, tol=1e-6, max_iter=500):
    """Principal component pursuit, min |L|_* + lam |S|_1 with L + S = W, by ADMM (Candes et al. 2011, arXiv
    0912.3599, algorithm 1; CAP, stage 1).

    W [..., m, n]: float32 or float64, any device. lam: 1 / sqrt(max(m, n)). penalty mu: a number is held; by
    default mu starts near 1.25 / |W|_2, where L has few directions (Lin et al. 2010, arXiv 1009.5055), and
    grows by half after every iteration whose residual is larger than the change of S, both relative (Boyd et
    al. 2011, section 3.4.1). Stops at a relative residual of at most tol, or after max_iter iterations.
    """
    norm = functools.partial(torch.linalg.matrix_norm, keepdim=True)
    lam = max(W.shape[-2:]) ** -0.5 if lam is None else lam
    U, residuals = leading_range(W), []
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
            slow = (residual > tol) & (residual > norm(S - before) / (norm(Z) + 1e-30))
            growth = torch.where(slow, 1.5, 1.0).to(W)
            mu, Z = mu * growth, Z / growth
    return RPCA(U, sigma, V, S, residuals)


def soft_threshold(A, tau):
    """argmin over S of tau |S|_1 + |S - A|_F^2 / 2: entries shrunk towards zero by tau."""
    return A - A.clamp(-tau, tau)


def leading_range(A, start=None, steps=2):
    """Orthonormal basis [..., m, k] near the leading left singular vectors of A [..., m, n]: subspace
    iteration from `start` and ten random directions (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4), the
    same ones on any device."""
    drawn = torch.Generator().manual_seed(0)
    basis = torch.randn(A.shape[-2], 10, generator=drawn, dtype=A.dtype, device="cpu")
    basis = basis.to(A.device).expand(*A.shape[:-1], 10)
    basis = basis if start is None else torch.cat([start, basis], -1)
    for _ in range(steps):
        basis = torch.linalg.qr(A @ (A.mT @ basis))[0]
    return basis


def singular_value_threshold(A, tau, nearby=None):
    """argmin over L of tau |L|_* + |L - A|_F^2 / 2, as U, sigma, V: singular values shrunk by tau, those at
    zero left out. tau: a number, or one a matrix [..., 1, 1].

    From the eigenvectors Q of the smaller Gram matrix: with A [..., m, n], m <= n, L = Q diag(shrunk / sigma)
    Q^T A. In float32, singular values under 1e-3 of the largest are lost in rounding. nearby [..., m, k]: U
    of a matrix near A; if it has few columns, A is first projected on their span, widened by ten. Where many
    singular values rise above tau at once, some can thus be missed for a few calls.
    """
    projected = nearby is not None and 4 * (nearby.shape[-1] + 10) < min(A.shape[-2:])
    if A.shape[-2] > A.shape[-1]:
        V, sigma, U = singular_value_threshold(A.mT, tau, A.mT @ nearby if projected else None)
        return U.mT, sigma, V.mT
    basis = leading_range(A, nearby) if projected else None
    B = basis.mT @ A if projected else A
    squares, Q = torch.linalg.eigh(B @ B.mT)  # eigenvalues rise: the last k are wanted
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
# An item is a direction of some L, which costs m + n parameters, or an entry of some S, which costs 1.
# `p` and `masks` are lists of tensors, one number an item; `cost` lists what an item of each tensor costs.

def project(p, cost, budget):
    """Nearest probabilities of expected cost at most `budget`: clamp(p - tau cost, 0, 1), by bisection."""
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
    """d log P(mask) / dp of independent Bernoulli masks, (mask - p) / (p (1 - p)) (CAP, stage 2); edge > 0
    bounds it near p = 0 and 1, and makes it 0 there, where the mask never varies."""
    return (mask - p) / (p * (1 - p)).clamp_min(edge * (1 - edge))


def policy_gradient(loss_of, p, cost, budget, steps, lr=0.05, window=5, generator=None):
    """Learn probabilities from forward passes alone (REINFORCE, as the paper has it): p, and the losses.

    loss_of(masks, step) -> loss of one draw. Each of `steps`, an iterable, draws masks ~ Bernoulli(p) and
    moves p by -lr (loss - baseline) score_function, the baseline being the mean of the last `window` losses;
    then p is projected. p, cost, budget: as for `project`. Raises FloatingPointError for a loss not finite.
    """
    losses = []
    for step in steps:
        masks = [torch.bernoulli(q, generator=generator) for q in p]
        loss = loss_of(masks, step)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of draw {step + 1} is {loss}: use --dtype float32")
        baseline = sum(losses[-window:]) / len(losses[-window:]) if losses else loss
        losses.append(loss)
        p = [q - lr * (loss - baseline) * score_function(m, q, edge=0.01) for q, m in zip(p, masks)]
        p = project(p, cost, budget)
    return p, losses


def keep_most_probable(p, cost, budget):
    """Boolean masks of the items taken greedily: most probable first, every one that still fits."""
    flat = torch.cat([q.flatten().float() for q in p])
    each = torch.cat([torch.full((q.numel(),), c, device=q.device) for q, c in zip(p, cost)])
    order = flat.argsort(descending=True, stable=True)
    keep, left = torch.zeros(len(flat), dtype=torch.bool, device=flat.device), int(budget)
    while len(order):
        count = int((each[order].cumsum(0) <= left).sum())            # the longest prefix that fits ...
        keep[order[:count]] = True
        left -= int(each[order[:count]].sum())
        order = order[count:]
        order = order[each[order] <= left]  # ... then what is too dear is passed over
    return [part.view_as(q) for part, q in zip(keep.split([q.numel() for q in p]), p)]


@torch.no_grad()
def refit(T, S, mask, G, iterations=8, damping=1e-2):
    """Values of S on `mask` that bring S x closest to T x: min tr((T - S) G (T - S)^T), all rows at once.

    T, S [m, n]: target and start; G [n, n]: Gram matrix of the inputs, to whose diagonal damping * its mean
    is added. Conjugate gradients on the masked entries, preconditioned by diag(G); the (damped) error falls
    with every iteration. Each row of mask is its own least-squares problem, too many to factorise; SparseGPT
    (arXiv 2301.00774) solves them column by column, approximately.
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


def alternate(Q, V, budget, rounds=3):
    """Factors U [m, k] and V [k, n] of L = U V in Q [m, n] = L + S, which has `budget` parameters, from a
    start V of its row space.

    S takes the largest entries of Q - L that the budget leaves, L the best rank k of Q - S, in turn; the
    rank-k approximation is one step of subspace iteration a round.
    """
    m, n, k = *Q.shape, len(V)
    entries = max(budget - k * (m + n), 1)
    U = Q @ V.mT
    for _ in range(rounds):
        left = Q - U @ V
        dropped = max(left.numel() - entries, 0)
        cut = left.abs().flatten().kthvalue(dropped + 1).values
        left = Q - left * (left.abs() >= cut)
        basis = torch.linalg.qr(left @ V.mT)[0]
        V, small = (part.mT for part in torch.linalg.qr(left.mT @ basis))
        U = basis @ small
    return U, V


# ---- the layer ----------------------------------------------------------------------------------

class LowRankPlusSparse(nn.Module):
    """y = up(down(x)) + S x + b, S [m, n] sparse, up and down absent at rank 0: in place of a dense layer."""

    def __init__(self, n, m, rank, nonzeros, bias=True, **where):
        super().__init__()
        self.shape, self.S = (m, n), None                             # S: once it is unpacked, dense
        self.down = nn.Linear(n, rank, bias=False, **where) if rank else None
        self.up = nn.Linear(rank, m, bias=False, **where) if rank else None
        self.bias = nn.Parameter(torch.empty(m, **where)) if bias else None
        self.values = nn.Parameter(torch.empty(nonzeros, **where))    # of S, in a file, and a bit an entry:
        self.register_buffer("mask", torch.empty(-(-m * n // 8), device=where.get("device")).to(torch.uint8))
        self.register_buffer("weight", torch.zeros(1, **where))       # a marker, as in LowRankLinear

    def unpack(self, values, mask):
        bits = mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
        mask = bits.flatten()[:self.shape[0] * self.shape[1]].view(self.shape).bool()
        if mask.sum() != len(values):
            raise ValueError(f"a sparse matrix has {len(values)} values, {mask.sum()} bits in its mask")
        return nn.Parameter(values.new_zeros(self.shape).masked_scatter(mask, values.detach()))

    def _load_from_state_dict(self, state, prefix, *rest):
        if self.S is not None and prefix + "mask" in state:           # of a file, as where Trainer reads one
            state[prefix + "S"] = self.unpack(state.pop(prefix + "values"), state.pop(prefix + "mask"))
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, x):
        trains = self.S.requires_grad and torch.is_grad_enabled()   # zeros get no gradient, and stay zero
        y = F.linear(x, self.S * (self.S != 0) if trains else self.S, self.bias)
        return y if self.up is None else y + self.up(self.down(x))


def pack(S):
    """The stored form of S: its nonzero values, and 8 entries a byte of mask, the first in the lowest bit."""
    bits = F.pad((S != 0).flatten().to(torch.uint8), (0, -S.numel() % 8)).view(-1, 8)
    mask = (bits << torch.arange(8, dtype=torch.uint8, device=S.device)).sum(1, dtype=torch.uint8)
    return {"values": S[S != 0], "mask": mask}


KINDS["LowRankPlusSparse"], PACKERS["LowRankPlusSparse"] = LowRankPlusSparse, pack
SOURCES["LowRankPlusSparse"] = inspect.getsource(LowRankPlusSparse)


def low_rank_plus_sparse(U, V, S, bias, like):
    """LowRankPlusSparse of U [m, k], V [k, n], S [m, n], a bias [m] or None; dtype and device of `like`.

    In memory S is dense, as large and as fast as the dense weight; a file holds what `pack` makes of it.
    """
    where, spec = {"device": like.device, "dtype": like.dtype}, {"rank": len(V), "bias": bias is not None}
    new = LowRankPlusSparse(V.shape[1], len(U), nonzeros=int((S != 0).sum()), **spec, **where)
    new.spec = {"kind": "LowRankPlusSparse", "nonzeros": len(new.values), **spec}
    new.S, new.values, new.mask = nn.Parameter(S.to(like)), None, None
    state = {"S": new.S, "weight": new.weight} | ({"up.weight": U, "down.weight": V} if new.up else {})
    new.load_state_dict(state | ({} if bias is None else {"bias": bias}))
    return new.requires_grad_(like.requires_grad)


# ---- compressing a model ------------------------------------------------------------------------

ESTIMATORS = {"metric": 1, "policy": 0}       # and the least rounds of each
RANK_SHARE = 0.02         # of the parameters that a matrix may keep, for L; more is worse on SmolLM2
ROUNDS = 8                # of pruning and refitting; of the policy, over the batches, too
STEPS = 160               # of learning the gains, times the ratio
FALLING = 0.6             # the last part of these steps, over which the rate falls to zero
RPCA_ITERATIONS = 10      # the paper finds perplexity settled after about as many
RPCA_BATCH = 2 ** 26      # entries of the matrices of one shape that are split at once


class Draft(nn.Module):
    """A matrix while its structure is chosen: W [m, n] = L + S, L = U V of rank k, S zero where it is
    dropped, in the units of W.

    rows [m], columns [n]: the roots of R (soco.Metric, by row) and of G's diagonal. In their scale the square
    of an entry is the predicted loss of dropping it: entries of one row are compared by |W| D, as in Wanda,
    rows by Fisher information. G [n, n]: E[x x^T], on the layer's device or in main memory.
    level [m, 1]: what the worths of a row are divided by. a [m], c [n]: gains of outputs and inputs, folded
    in at the end.
    """

    def __init__(self, layer, G, R, scale=True):
        super().__init__()
        self.layer, self.G, self.S = layer, G, matrix(layer).clone()
        moments = [R, G.diagonal().to(R)]
        self.rows, self.columns = (
            (A + 1e-6 * A.mean()).clamp_min(1e-20).sqrt() if scale else torch.ones_like(A) for A in moments)
        self.m, self.n = self.S.shape
        self.U, self.V = self.rows.new_zeros(self.m, 0), self.rows.new_zeros(0, self.n)
        self.level = self.rows.new_ones(self.m, 1)
        self.a, self.c = (nn.Parameter(torch.ones_like(A), requires_grad=False) for A in moments)

    def temper(self, ratio):
        """Set `level` to the root of what each row's own cut would be, if every row lost `ratio`.

        One threshold for all worths is then midway, as geometric means go, between one for the whole model
        and one a row. What pruning one matrix costs is predicted well, but such losses do not add up when all
        are pruned: the first alone strips some matrices of all they need.
        """
        worth = self.scaled(matrix(self.layer)).square()
        cut = worth.kthvalue(max(int(ratio * self.n), 1), dim=1, keepdim=True).values
        self.level = cut.clamp_min(1e-30).sqrt()

    def scaled(self, A):
        return self.rows[:, None] * A.to(self.rows) * self.columns

    def set_low_rank(self, U, V):
        """L from factors [m, k], [k, n] in scaled units, as two of equal norms."""
        U, V = U / self.rows[:, None], V / self.columns
        half = (U.norm(dim=0) / V.norm(dim=1).clamp_min(1e-30)).sqrt().clamp_min(1e-15)
        self.U, self.V = U / half, half[:, None] * V

    def target(self):
        """W - L [m, n]: what S starts from, and is to stand for."""
        return matrix(self.layer).to(self.rows) - self.U @ self.V

    def worth(self):
        """Predicted loss, at gains of 1, of dropping each entry of S [m, n] float32, over its row's level."""
        return self.scaled(self.S).square() / self.level

    def loss_with(self, U, V, budget, G):
        """Set L to U V, and return the predicted loss, tr(R (W - W') G (W - W')^T), of `budget` parameters,
        those of L among them, the entries refitted."""
        self.set_low_rank(U, V)
        T = self.target()
        worth = self.scaled(T).square().flatten()
        entries = budget - U.shape[1] * (self.m + self.n)
        cut = worth.kthvalue(worth.numel() - entries).values if entries < worth.numel() else -1.0
        E = self.rows[:, None] * (T - refit(T, T, (worth > cut).view_as(T), G, iterations=6))
        return ((E @ G) * E).sum()

    def forward(self, x):
        """y = a * (L + S)(c * x) + b, where gains, and the sums that are their gradients, are in float32."""
        x = (x * self.c).to(x.dtype)
        y = F.linear(x, self.S)
        y = y + F.linear(F.linear(x, self.V.to(x)), self.U.to(x)) if len(self.V) else y
        y = (y * self.a).to(y.dtype)
        return y if self.layer.bias is None else y + self.layer.bias

    def finish(self):
        a, c = self.a[:, None], self.c
        return low_rank_plus_sparse(a * self.U, self.V * c, a * self.S * c, self.layer.bias,
                                    like=self.layer.weight)


def compress(model, batches, ratio=0.5, steps=None, *, estimator="metric", rank_share=RANK_SHARE,
             rounds=ROUNDS, scale=True, refitted=True, lr=LR, metric_batches=METRIC_BATCHES, progress=False):
    """Compress a causal language model in place: `ratio` of its block weights' parameters go. Returns it.

    batches: token ids [batch, length], an iterable, of which the first `metric_batches` are used, and
    repeated when `steps` need more. steps: of learning the gains, by default STEPS * ratio; lr: their rate,
    times the ratio. estimator: of the masks, "metric" or "policy" (the paper's). rank_share: of the
    parameters that each matrix may keep, for its L ("metric"). rounds: of pruning and refitting, or of the
    policy over the batches (the paper: 3). scale: whether the metric decides. refitted: whether kept values
    are refitted. Raises CannotCompress before any work for settings that cannot be met, FloatingPointError
    for sums, a loss or a gradient not finite.
    """
    layers, batches = block_layers(model), list(batches)[:metric_batches]
    check_inputs(batches, ratio, steps, lr)
    if rounds < ESTIMATORS.get(estimator, math.inf) or not 0 <= rank_share < 1:
        raise CannotCompress(f"estimator {estimator!r}, rank_share {rank_share} or rounds {rounds} cannot "
                             f"be: give {' or '.join(ESTIMATORS)}, a share from 0 to below 1, at least one "
                             f"round (policy: 0)")
    drafts = drafted(model, layers, batches, scale, progress)
    if estimator == "metric":
        set_ranks(drafts, ratio, rank_share, progress)
    steps = round(STEPS * ratio) if steps is None else steps
    down = prune_down(model, drafts, batches, [ratio], steps, estimator, rounds, refitted, lr, progress)
    _, new = next(down)
    return install(model, "cap", layers, new)


def drafted(model, layers, batches, scale=True, progress=False):
    """A Draft of each of `layers` {name: layer}. Of the Gram matrices, up to half of what is free stay on the
    devices, and the others go to main memory."""
    room = min(free_memory(layer.weight.device) for layer in layers.values()) // 2
    drafts, latest = [], (None, None)
    for _, layer, metric in measured(model, layers, batches, progress, by_row=True):
        if metric.G is not latest[0]:                                 # q, k and v share one
            room -= metric.G.nbytes
            latest = metric.G, metric.G if room > 0 else metric.G.cpu()
        drafts.append(Draft(layer, latest[1], metric.R, scale))
    return drafts


def set_ranks(drafts, ratio, rank_share, progress):
    """Stage 1: L of every matrix from robust PCA, at the rank that `rank_share` of the parameters it may keep
    pays for, where that lowers its predicted loss; matrices of one shape are split as a batch."""
    shapes = {}
    for draft in drafts:
        shapes.setdefault((draft.m, draft.n, draft.rows.device), []).append(draft)
    batches = []
    for (m, n, _), some in shapes.items():
        at_once = max(RPCA_BATCH // (m * n), 1)
        batches += [some[first:first + at_once] for first in range(0, len(some), at_once)]
    for some in bar(batches, progress, desc="robust PCA", unit="batch"):
        (m, n), budget = some[0].S.shape, int((1 - ratio) * some[0].S.numel())
        if k := int(rank_share * budget / (m + n)):
            Q = torch.stack([draft.scaled(matrix(draft.layer)) for draft in some])
            for draft, q, V in zip(some, Q, rpca(Q, max_iter=RPCA_ITERATIONS).V[:, :k]):
                G, L = draft.G.to(draft.rows.device), as_the_first(alternate(q, V, budget))
                L = min(L, (draft.U, draft.V), key=lambda factors: draft.loss_with(*factors, budget, G))
                draft.set_low_rank(*L)
                draft.S = draft.target().to(draft.S)


def prune_down(model, drafts, batches, ratios, steps, estimator="metric", rounds=ROUNDS, refitted=True,
               lr=LR, progress=False):
    """Go down through rising `ratios` in one run, `steps` to the last and its share of them to each before:
    stage 2, then the gains; at each, yield (steps so far, {dense layer: layer to store})."""
    done = 0
    for ratio in ratios:
        if estimator == "policy":
            choose_by_policy(model, drafts, batches, ratio, rounds, refitted, progress)
        else:
            choose_by_metric(drafts, ratio, rounds, refitted, progress)
        until = round(steps * ratio / ratios[-1])
        learn_gains(model, drafts, batches, ratio, done, until, lr, progress)
        yield until, {draft.layer: draft.finish() for draft in drafts}
        done = until


def threshold(worths, count):
    """The number t such that at most `count` entries exceed it, and more would exceed any smaller one.

    worths(): iterates over non-negative float32 tensors, made anew on both passes so that one is in memory at
    a time. Such floats are ordered as their bit patterns are: a radix select, by the high 16 bits and then by
    the low.
    """
    bucket, above = 0, 0
    for shift in (16, 0):
        histogram = 0
        for worth in worths():
            bits = worth.contiguous().view(torch.int32).flatten()
            bits = bits[bits >> 16 == bucket] if shift == 0 else bits
            histogram = histogram + torch.bincount(bits >> shift & 0xffff, minlength=1 << 16).cpu()
        at_least = histogram.flip(0).cumsum(0).flip(0) + above        # entries in this bucket or a higher one
        last = int((at_least > count).sum()) - 1
        if last < 0:
            return -1.0
        bucket, above = bucket << 16 | last, above + int(histogram[last + 1:].sum())
    return torch.tensor([bucket], dtype=torch.int32, device="cpu").view(torch.float32).item()


def keep_worthiest(drafts, count):
    """Drop all but the `count` worthiest entries of them all; of entries that tie at the cut, none stays."""
    cut = threshold(lambda: (draft.worth() for draft in drafts), count)
    for draft in drafts:
        draft.S = draft.S * (draft.worth() > cut)


def refit_all(drafts):
    """`refit` of every S on its entries; a G in main memory moves once for all that share it."""
    moved = functools.lru_cache(1)(lambda G, device: G.to(device))
    for draft in drafts:
        S, G = draft.S.float(), moved(draft.G, draft.rows.device)
        draft.S, = as_the_first([refit(draft.target(), S, S != 0, G).to(draft.S).contiguous()])


def choose_by_metric(drafts, ratio, rounds, refitted, progress):
    """Stage 2 by the metric: drop the entries of least predicted loss in the whole model, refit, and again.

    The expected loss of independent Bernoulli masks grows by worth (1 - p) for every entry, so its gradient
    drives p to 1 above one tempered price for the whole model and to 0 below. The worth changes as the
    survivors make up for what is gone: hence in rounds, each dropping less than the one before.
    """
    for draft in drafts:
        draft.temper(ratio)
    start = sum((draft.S != 0).sum().item() for draft in drafts)
    budget = budget_for([draft.layer for draft in drafts], ratio)
    entries = budget - sum(draft.U.shape[1] * (draft.m + draft.n) for draft in drafts)
    for done in bar(range(1, rounds + 1), progress, desc="choose and refit", unit="round"):
        keep_worthiest(drafts, entries + int((start - entries) * (1 - done / rounds) ** 2))
        if refitted:
            refit_all(drafts)


def choose_by_policy(model, drafts, batches, ratio, rounds, refitted, progress):
    """Stage 2 as the paper has it: fixed L and S of robust PCA, probabilities learned by policy gradient,
    from a start at worth / (worth + cost * mean worth), projected on the budget."""
    budget = budget_for([draft.layer for draft in drafts], ratio)
    device, splits, worths, cost = drafts[0].rows.device, [], [], []
    for draft in bar(drafts, progress, desc="robust PCA", unit="matrix"):
        split = rpca(draft.scaled(matrix(draft.layer)), max_iter=RPCA_ITERATIONS)[:4]
        U, sigma, V, S = as_the_first([part.contiguous() for part in split])
        worths += [sigma.square().to(device), S.square().to(device)]
        cost += [draft.m + draft.n, 1]
        S = S / draft.rows[:, None] / draft.columns
        splits.append([part.to(draft.layer.weight) for part in (U * sigma, V, S)])

    def set_masks(masks):
        for draft, (U, V, S), directions, entries in zip(drafts, splits, masks[::2], masks[1::2]):
            on = directions.to(U.device).bool()
            draft.set_low_rank(U[:, on].to(draft.rows), V[on].to(draft.rows))
            draft.S = S * entries.to(S)

    def loss_of(masks, step):
        set_masks(masks)
        ids = batches[step % len(batches)].to(model.device)
        with frozen(model), torch.no_grad(), swapped(model, {draft.layer: draft for draft in drafts}):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten().to(logits.device))
        average(loss)
        return loss.item()

    mean = sum(worth.sum() for worth in worths) / sum(worth.numel() for worth in worths)
    p = project([worth / (worth + c * mean) for worth, c in zip(worths, cost)], cost, budget)
    generator = torch.Generator(device=device).manual_seed(torch.initial_seed())
    draws = bar(range(rounds * len(batches)), progress, desc="policy", unit="draw")
    p, _ = policy_gradient(loss_of, p, cost, budget, draws, generator=generator)
    set_masks(keep_most_probable([q * (worth > 0) for q, worth in zip(p, worths)], cost, budget))
    if refitted:
        refit_all(drafts)


def learn_gains(model, drafts, batches, ratio, first, until, lr=LR, progress=False):
    """Train the gains a, c of every draft, from where they are, to keep KL(dense || compressed) small: the
    steps `first` to `until` of a run, at Adam's rate lr * ratio. What is kept stays, and so does its cost."""
    gains = [gain for draft in drafts for gain in (draft.a, draft.c)]
    for gain in gains:
        gain.grad = torch.zeros_like(gain)
    students, groups = {draft.layer: draft for draft in drafts}, [{"params": gains, "lr": lr * ratio}]
    train(model, students, "ac", groups, batches, range(first, until), FALLING, progress=progress)


# ---- the baselines, and the command ----------------------------------------------------------------

def keep_largest(A, worth, ratio):
    """A [m, n], but zero where `worth` [m, n] is not among the largest (1 - ratio) of its row."""
    top = worth.topk(int((1 - ratio) * A.shape[1] + 1e-6), dim=1).indices  # 1 - 0.9 is a little less than 0.1
    return torch.zeros_like(A).scatter(1, top, A.gather(1, top))


def magnitude(W, G, ratio):
    """W [m, n], but zero where an entry is not among the largest (1 - ratio) of all; G is not used."""
    flat = W.reshape(1, -1)
    return keep_largest(flat, flat.abs(), ratio).view_as(W)


def wanda(W, G, ratio):
    """Wanda (Sun et al. 2024, arXiv 2306.11695): in every row, the largest |W| D; D [n] is the inputs' root
    mean square."""
    return keep_largest(W, W.abs() * G.diagonal().sqrt(), ratio)


def pruned(drafts, prune, ratio):
    """{dense layer: another of the weight prune(W, G, ratio)} of every draft."""
    new = {}
    for draft in drafts:
        W = prune(matrix(draft.layer).float(), draft.G.to(draft.rows.device), ratio)
        new[draft.layer] = dense_like(draft.layer, W, draft.layer.bias)
    return new


def main():
    from eval_ppl import Parser, between, whole
    parser = Parser(__doc__)
    add_run_flags(parser, STEPS)
    add = parser.add_argument
    add("--estimator", choices=ESTIMATORS, default="metric", help="of the mask; policy is the paper's")
    add("--rank-share", type=between(0, 1, or_low=True), default=RANK_SHARE,
        help="of the parameters that each matrix may keep, for its low-rank part (metric only)")
    add("--rounds", type=whole(1, 10 ** 4), default=ROUNDS, help="of pruning and refitting, or of the policy")
    add("--no-scale", action="store_true", help="split and choose by W alone; the metric is for refits only")
    add("--no-refit", action="store_true", help="do not refit what is kept (gains: --steps 0)")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        run = Run("cap", args, STEPS, stack)
        batches = sample_batches(run.calibration, args, args.metric_batches)
        run.score("dense", "dense")
        with run.clock("metric"):
            drafts = drafted(run.model, run.layers, batches, not args.no_scale, progress=True)
        for ratio in () if args.no_baselines else args.ratio:
            for prune, label in ((magnitude, "magnitude"), (wanda, "Wanda, row-wise")):
                run.score(prune.__name__, label, ratio, pruned(drafts, prune, ratio), pruned=True)
        if args.estimator == "metric":
            with run.clock("stage 1"):
                set_ranks(drafts, args.ratio[-1], args.rank_share, progress=True)
        models = prune_down(run.model, drafts, batches, args.ratio, args.steps, args.estimator, args.rounds,
                            not args.no_refit, lr=args.lr, progress=True)
        run.write_each(models, f"CAP, {args.estimator}")


if __name__ == "__main__":
    from eval_ppl import run
    from rpca import main                            # as a module: the classes that a loaded folder knows
    run(main, CannotCompress)
