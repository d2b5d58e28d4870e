"""CAP: robust PCA of every weight matrix, one mask over the whole model (arXiv 2505.03801).

    python rpca.py                                  # a bundled 1.9M-parameter GPT-2, on a laptop
    python rpca.py --model gpt2 --ratio 0.5         # GPT-2 on WikiText-2; a GPU is used if present

The method, on one screen. *Stage 1*: every block weight W [m, n], scaled so that the square of an
entry is twice the loss it is predicted to cost, is split by principal component pursuit,

    min |L|_* + lam |S|_1   with  L + S = W:     L = U diag(sigma) V low-rank,  S sparse.

*Stage 2*: every direction of every L and every entry of every S has a probability p of being kept,
under one budget for the whole model,

    sum p_sigma (m + n) + sum p_S  <=  (1 - ratio) * parameters in the block weights.

The paper learns the p by policy gradient from the loss on calibration text (`--estimator policy`).
The default drives the p of entries to 0 or 1 by the loss that dropping them is predicted to cost,
R_i S_ij^2 D_j^2, where D_j^2 = E[x_j^2] of the inputs and, with g the loss's gradients at the
outputs, R_i makes a row of W sum to its Fisher information, E[g_i^2 sum_j W_ij^2 x_j^2]. These
are tempered (`Draft.temper`). Entries go in rounds, and what is kept is refitted to the dense
layer's outputs; a small L, from robust PCA's row space, is taken where it lowers the loss. Gains
of every matrix, y = a * (L + S)(c * x), are learned as in soco.py and folded in: they cost nothing.
"""
import inspect
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from soco import (KINDS, LR, METRIC_BATCHES, SOURCES, add_row, bar, block_layers, budget_for,
                  collect_metric, filled, finished, frozen, install, load, matrix, save, swapped,
                  train, write)  # load and save: for who imports this module

RANK_SHARE = 0.02         # of the parameters that a matrix may keep, for L
ROUNDS = 8                # of pruning and refitting; of the policy, over the batches, too
STEPS = 160               # of learning the gains, times the ratio
FALLING = 0.6             # the last part of these steps, over which the rate falls to zero
RPCA_ITERATIONS = 10      # the paper finds perplexity settled after about as many


# ---- stage 1: principal component pursuit ----

@torch.no_grad()
def rpca(W, lam=None, tol=1e-6, max_iter=500):
    """Principal component pursuit, min |L|_* + lam |S|_1 with L + S = W [m, n], by ADMM (Candes et
    al. 2011, arXiv 0912.3599, algorithm 1; CAP, stage 1); in float32, or in W's wider type.

    Returns U [m, k], sigma [k], falling, and V [k, n], of which L = U diag(sigma) V; S [m, n]; and
    |W - L - S|_F / |W|_F after each iteration. lam: 1 / sqrt(max(m, n)). The penalty mu starts near
    1.25 / |W|_2, where L has few directions (Lin et al. 2010, arXiv 1009.5055), and grows by half
    after every iteration whose residual is larger than the change of S, both relative (Boyd et al.
    2011, section 3.4.1). Stops at a residual of at most tol, or after max_iter iterations.
    """
    size = W.double().norm().clamp_min(1e-37)  # of any scale: solved for W / |W|_F
    W = W.to(torch.promote_types(W.dtype, torch.float32)) / size
    lam = max(W.shape) ** -0.5 if lam is None else lam
    mu = 1.25 / (torch.linalg.matrix_norm(W, 2) + 1e-30)
    S, Z, residuals = torch.zeros_like(W), torch.zeros_like(W), []  # Z = Y / mu, Y the multiplier
    while not residuals or (residuals[-1] > tol and len(residuals) < max_iter):
        U, sigma, V = singular_value_threshold(W - S + Z, 1 / mu)
        T = W + Z - (U * sigma) @ V
        S, before = soft_threshold(T, lam / mu), S
        residual = (T - S - Z).norm()  # of W - L - S
        residuals.append(residual.item())
        Z = T - S  # Y + mu (W - L - S), divided by mu
        if residual > tol and residual > (S - before).norm() / (Z.norm() + 1e-30):
            mu, Z = 1.5 * mu, Z / 1.5
    return U, sigma * size, V, S * size, residuals


def soft_threshold(A, tau):
    """argmin over S of tau |S|_1 + |S - A|_F^2 / 2: entries shrunk towards zero by tau."""
    return A - A.clamp(-tau, tau)


def singular_value_threshold(A, tau):
    """argmin over L of tau |L|_* + |L - A|_F^2 / 2, as U, sigma, V: singular values shrunk by tau,
    those at zero left out, but for one. By the smaller Gram matrix of A, in which float32 loses
    singular values under 1e-3 of the largest."""
    if A.shape[0] > A.shape[1]:
        U, sigma, V = singular_value_threshold(A.T, tau)
        return V.T, sigma, U.T
    squares, Q = torch.linalg.eigh(A @ A.T)  # eigenvalues rise
    sigma = squares.flip(0).clamp_min(0).sqrt()
    k = max(int((sigma > tau).sum()), 1)
    U = Q.flip(1)[:, :k]
    V = U.T @ A / sigma[:k, None].clamp_min(1e-30)
    return U, (sigma[:k] - tau).clamp_min(0), V


def alternate(Q, V, budget, rounds=3):
    """Factors U [m, k], V [k, n] of L in Q [m, n] = L + S of `budget` parameters, from a start V.

    In turn S takes the largest entries of Q - L that the budget leaves, and L the best rank k of
    Q - S, by one step of subspace iteration.
    """
    entries = max(budget - len(V) * sum(Q.shape), 1)
    U = Q @ V.T
    for _ in range(rounds):
        left = Q - U @ V
        cut = left.abs().flatten().kthvalue(max(left.numel() - entries, 0) + 1).values
        left = Q - left * (left.abs() >= cut)
        basis = torch.linalg.qr(left @ V.T)[0]
        V, small = (part.T for part in torch.linalg.qr(left.T @ basis))
        U = basis @ small
    return U, V


# ---- stage 2: one probabilistic mask over the whole model ----
#
# An item is a direction of some L, which costs m + n parameters, or an entry of some S, which costs
# 1. `p` and `masks` are lists of tensors, a number an item; `cost`: what an item of each costs.

def project(p, cost, budget):
    """Nearest probabilities of expected cost at most `budget`: clamp(p - tau cost, 0, 1)."""
    def moved(tau):
        return [(q - tau * c).clamp(0, 1) for q, c in zip(p, cost)]

    def too_dear(tau):
        return sum(c * q.sum(dtype=torch.float64) for q, c in zip(moved(tau), cost)) > budget

    low, high = 0.0, 1 + max(q.max().item() / c for q, c in zip(p, cost))
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if too_dear(middle) else (low, middle)
    return moved(high)


def policy_gradient(loss_of, p, cost, budget, steps, lr=0.05, window=5, generator=None):
    """Learn probabilities from forward passes alone (REINFORCE, as the paper has it): p, losses.

    loss_of(masks, step) -> loss of one draw. Each of `steps` draws masks ~ Bernoulli(p) and moves p
    by -lr (loss - baseline) d log P(masks) / dp, the baseline being the mean of the last `window`
    losses; then p is projected. d log P / dp = (mask - p) / (p (1 - p)), bounded near p = 0 and 1.
    """
    losses = []
    for step in steps:
        masks = [torch.bernoulli(q, generator=generator) for q in p]
        loss = loss_of(masks, step)
        baseline = sum(losses[-window:]) / len(losses[-window:]) if losses else loss
        losses.append(loss)
        p = [q - lr * (loss - baseline) * (mask - q) / (q * (1 - q)).clamp_min(0.01)
             for q, mask in zip(p, masks)]
        p = project(p, cost, budget)
    return p, losses


def keep_most_probable(p, cost, budget):
    """Boolean masks of the items taken greedily: most probable first, while the budget lasts."""
    flat = torch.cat([q.flatten() for q in p])
    each = torch.cat([torch.full((q.numel(),), c, device=q.device) for q, c in zip(p, cost)])
    order = flat.argsort(descending=True, stable=True)
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[order] = each[order].cumsum(0) <= budget
    return [part.view_as(q) for part, q in zip(keep.split([q.numel() for q in p]), p)]


@torch.no_grad()
def refit(T, S, mask, G, iterations=8, damping=1e-2):
    """Values of S on `mask` that bring S x closest to T x: min tr((T - S) G (T - S)^T).

    T, S [m, n]: target and start; G [n, n]: E[x x^T], to whose diagonal damping * its mean is
    added. Every row is a least-squares problem of its own: conjugate gradients solve them all at
    once, preconditioned by diag(G); SparseGPT (arXiv 2301.00774) does it column by column.
    """
    G = G + torch.diag(damping * G.diagonal().mean().expand(len(G)))
    scale = G.diagonal().clamp_min(1e-30)
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
        direction = step + square / before.clamp_min(1e-30) * direction
    return S


# ---- the layers ----

class LowRankPlusSparse(nn.Module):
    """y = up(down(x)) + S x + b, S [m, n] sparse, up and down absent at rank 0. In memory S is
    dense, zeros and all; a file holds its values and a bitmask."""

    def __init__(self, n, m, rank, bias, nonzeros):
        super().__init__()
        self.shape, self.S = (m, n), None  # S: once it is unpacked
        self.down = nn.Linear(n, rank, bias=False) if rank else None
        self.up = nn.Linear(rank, m, bias=False) if rank else None
        self.bias = nn.Parameter(torch.empty(m)) if bias else None
        self.values = nn.Parameter(torch.empty(nonzeros))
        self.register_buffer("mask", torch.empty(-(-m * n // 8)).to(torch.uint8))
        self.register_buffer("weight", torch.zeros(1))  # a marker, as in LowRankLinear

    def forward(self, x):
        S = self.S * (self.S != 0) if self.S.requires_grad else self.S  # zeros stay zero
        y = F.linear(x, S, self.bias)
        return y if self.up is None else y + self.up(self.down(x))

    def pack(self, S):
        """The nonzero values of S, and one bit an entry of S: where they are."""
        mask = np.packbits((S != 0).flatten().cpu().numpy())
        return {"values": S[S != 0], "mask": torch.from_numpy(mask)}

    def unpack(self):
        """S from values and mask, which then go."""
        mask = np.unpackbits(self.mask.cpu().numpy(), count=math.prod(self.shape)).astype(bool)
        mask = torch.from_numpy(mask).view(self.shape).to(self.values.device)
        S = self.values.new_zeros(self.shape).masked_scatter(mask, self.values.detach())
        self.S, self.values, self.mask = nn.Parameter(S), None, None


KINDS["LowRankPlusSparse"] = LowRankPlusSparse
SOURCES["imports"] = "import math\nimport numpy as np\nimport torch.nn.functional as F\n"
SOURCES["LowRankPlusSparse"] = inspect.getsource(LowRankPlusSparse)


def low_rank_plus_sparse(U, V, S, layer):
    """LowRankPlusSparse of U [m, k], V [k, n], S [m, n] and the bias of a dense `layer`."""
    m, n = S.shape
    sizes = {"n": n, "m": m, "rank": len(V), "bias": layer.bias is not None, "nonzeros": 0}
    state = {"down.weight": V, "up.weight": U} if len(V) else {}
    state |= {"bias": layer.bias, "weight": torch.zeros(1), "values": torch.zeros(0),
              "mask": torch.zeros(-(-m * n // 8))}
    new = filled(LowRankPlusSparse, sizes, state, layer)
    new.S, new.values, new.mask = nn.Parameter(S.to(layer.weight)), None, None
    return new


class Draft(nn.Module):
    """A matrix while its structure is chosen: W [m, n] = L + S, L = U V of rank k.

    rows [m], columns [n]: the roots of R (by row) and of the diagonal of G [n, n] = E[x x^T]. In
    their scale the square of an entry is twice the predicted loss of dropping it: in a row entries
    compare by |W| D, as in Wanda, rows by Fisher information. level [m, 1]: what a row's worths are
    divided by. a [m], c [n]: gains, learned.
    """

    def __init__(self, layer, G, R):
        super().__init__()
        self.layer, self.G, self.S = layer, G, matrix(layer).clone()
        self.rows, self.columns = ((A + 1e-6 * A.mean()).clamp_min(1e-20).sqrt()
                                   for A in (R, G.diagonal().to(R)))
        self.m, self.n = self.S.shape
        self.U, self.V = self.rows.new_zeros(self.m, 0), self.rows.new_zeros(0, self.n)
        self.level = self.rows.new_ones(self.m, 1)
        self.a, self.c = (nn.Parameter(torch.ones_like(A)) for A in (self.rows, self.columns))

    def scaled(self, A):
        return self.rows[:, None] * A.float() * self.columns

    def temper(self, ratio):
        """Set `level` to the root of what each row's own cut would be, if every row lost `ratio`.

        One threshold for all is then midway between one for the whole model and one a row. The loss
        of pruning one matrix is predicted well, but such losses do not add up when all are pruned.
        """
        worth = self.scaled(matrix(self.layer)).square()
        cut = worth.kthvalue(max(int(ratio * self.n), 1), dim=1, keepdim=True).values
        self.level = cut.clamp_min(1e-30).sqrt()

    def worth(self):
        """Predicted loss of dropping each entry of S [m, n] float32, over its row's level."""
        return self.scaled(self.S).square() / self.level

    def set_low_rank(self, U, V):
        """L from factors [m, k], [k, n] in scaled units, as two of equal norms."""
        U, V = U / self.rows[:, None], V / self.columns
        half = (U.norm(dim=0) / V.norm(dim=1).clamp_min(1e-30)).sqrt().clamp_min(1e-15)
        self.U, self.V = U / half, half[:, None] * V

    def target(self):
        """W - L [m, n]: what S starts from, and is to stand for."""
        return matrix(self.layer).float() - self.U @ self.V

    def loss_with(self, U, V, budget):
        """Set L to U V, and return the predicted loss, tr(R (W - W') G (W - W')^T), of `budget`
        parameters, those of L among them, the entries refitted."""
        self.set_low_rank(U, V)
        T = self.target()
        worth = self.scaled(T).square()
        drop = worth.numel() - (budget - U.shape[1] * (self.m + self.n))
        mask = worth > worth.flatten().kthvalue(drop).values
        E = self.rows[:, None] * (T - refit(T, T, mask, self.G, iterations=6))
        return ((E @ self.G) * E).sum()

    def forward(self, x):
        """y = a * (L + S)(c * x) + b; gains, and the sums that are their gradients, in float32."""
        x = (x * self.c).to(x.dtype)
        y = F.linear(x, self.S) + F.linear(F.linear(x, self.V.to(x)), self.U.to(x))
        y = (y * self.a).to(y.dtype)
        return y if self.layer.bias is None else y + self.layer.bias

    @torch.no_grad()
    def finish(self):
        a, c = self.a[:, None], self.c
        return low_rank_plus_sparse(a * self.U, self.V * c, a * self.S * c, self.layer)


# ---- compressing a model ----

def compress(model, batches, ratio=0.5, steps=None, *, estimator="metric", rounds=ROUNDS, lr=LR,
             metric_batches=METRIC_BATCHES):
    """Compress a causal language model in place: `ratio` of its block weights' parameters go.

    batches: token ids [batch, length], the first `metric_batches` to use. estimator: of masks; the
    paper's is "policy". rounds: of pruning and refitting, or of the policy over the batches. steps:
    of learning the gains, by default STEPS * ratio; lr: their rate, times the ratio.
    """
    batches = list(batches)[:metric_batches]
    steps = round(STEPS * ratio) if steps is None else steps
    with frozen(model):
        drafts = drafted(model, block_layers(model), batches)
        ESTIMATORS[estimator](model, drafts, batches, ratio, rounds)
        learn_gains(model, drafts, batches, steps, lr * ratio)
    return install(model, "cap", finished(drafts))


def drafted(model, layers, batches):
    """{name: Draft} of those of `layers` {name: layer} that tokens reach."""
    return {name: Draft(layer, G, R) for name, layer, G, R
            in collect_metric(model, layers, batches, by_row=True)}


def choose_by_metric(model, drafts, batches, ratio, rounds):
    """Stages 1 and 2 by the metric: drop what is worth least in the whole model, refit, and again.

    The expected loss of independent Bernoulli masks grows by worth (1 - p) for every entry, so its
    gradient drives p to 1 above one tempered price for the whole model and to 0 below. The worth
    changes as the survivors make up for what is gone: hence in rounds, each dropping less.
    """
    for draft in bar(drafts.values(), desc="robust PCA", unit="matrix"):
        set_rank(draft, ratio)
        draft.temper(ratio)
    start = sum(draft.S.numel() for draft in drafts.values())
    low_rank = sum(draft.U.shape[1] * (draft.m + draft.n) for draft in drafts.values())
    entries = budget_for(drafts.values(), ratio) - low_rank
    for done in bar(range(1, rounds + 1), desc="choose and refit", unit="round"):
        count = entries + int((start - entries) * (1 - done / rounds) ** 2)
        cut = threshold((draft.worth() for draft in drafts.values()), count)
        for draft in drafts.values():
            draft.S = draft.S * (draft.worth() >= cut)
        refit_all(drafts)


def set_rank(draft, ratio):
    """Stage 1: L from robust PCA, at the rank that RANK_SHARE of the parameters that a matrix may
    keep pays for, where that lowers its predicted loss."""
    budget = int((1 - ratio) * draft.S.numel())
    if k := int(RANK_SHARE * budget / (draft.m + draft.n)):
        Q = draft.scaled(matrix(draft.layer))
        L = alternate(Q, rpca(Q, max_iter=RPCA_ITERATIONS)[2][:k], budget)
        without = draft.loss_with(draft.U, draft.V, budget)
        if draft.loss_with(*L, budget) >= without:
            draft.U, draft.V = draft.U[:, :0], draft.V[:0]
        draft.S = draft.target().to(draft.S)


def threshold(worths, count):
    """A number t such that at most `count` entries of the float32 tensors are >= t, and nearly as
    many: floats >= 0 are ordered as their bits are, of which the first 20 are told apart."""
    histogram = sum(torch.bincount(worth.flatten().view(torch.int32) >> 12, minlength=1 << 19).cpu()
                    for worth in worths)
    at_least = histogram.flip(0).cumsum(0).flip(0)  # in this bucket or a higher one
    bucket = (at_least > count).sum().to(torch.int32)
    return (bucket << 12).view(torch.float32).item()


def refit_all(drafts):
    for draft in drafts.values():
        S = draft.S.float()
        draft.S = refit(draft.target(), S, S != 0, draft.G).to(draft.S)


def choose_by_policy(model, drafts, batches, ratio, rounds):
    """Stages 1 and 2 as the paper has them: L and S of robust PCA as they are, p by policy gradient
    from a start at worth / (worth + cost * mean worth), projected on the budget."""
    device, splits, worths, cost = model.device, [], [], []
    for draft in bar(drafts.values(), desc="robust PCA", unit="matrix"):
        U, sigma, V, S, _ = rpca(draft.scaled(matrix(draft.layer)), max_iter=RPCA_ITERATIONS)
        worths += [sigma.square().to(device), S.square().to(device)]
        cost += [draft.m + draft.n, 1]
        splits.append((U * sigma, V, (S / draft.rows[:, None] / draft.columns).to(draft.S)))

    def set_masks(masks):
        each = zip(drafts.values(), splits, masks[::2], masks[1::2])
        for draft, (U, V, S), directions, entries in each:
            on = directions.to(U.device).bool()
            draft.set_low_rank(U[:, on], V[on])
            draft.S = S * entries.to(S)

    @torch.no_grad()
    def loss_of(masks, step):
        set_masks(masks)
        ids = batches[step % len(batches)].to(model.device)
        with swapped(model, drafts):
            return model(input_ids=ids, labels=ids, use_cache=False).loss.item()

    budget = budget_for(drafts.values(), ratio)
    mean = sum(worth.sum() for worth in worths) / sum(worth.numel() for worth in worths)
    p = project([worth / (worth + c * mean) for worth, c in zip(worths, cost)], cost, budget)
    generator = torch.Generator(device).manual_seed(torch.initial_seed())
    draws = bar(range(rounds * len(batches)), desc="policy", unit="draw")
    p, _ = policy_gradient(loss_of, p, cost, budget, draws, generator=generator)
    set_masks(keep_most_probable([q * (worth > 0) for q, worth in zip(p, worths)], cost, budget))
    refit_all(drafts)


ESTIMATORS = {"metric": choose_by_metric, "policy": choose_by_policy}


def learn_gains(model, drafts, batches, steps, rate):
    groups = [{"params": [draft.a, draft.c], "lr": rate} for draft in drafts.values()]
    train(model, drafts, groups, batches, steps, FALLING, lambda *_: "gains")


# ---- the baselines, and the command ----

BASELINES = {"magnitude": lambda W, D: W.abs().reshape(1, -1),  # of a whole matrix
             "wanda": lambda W, D: W.abs() * D}  # of a row (Sun et al. 2024, arXiv 2306.11695)


def pruned(worth_of, draft, ratio):
    """The layer of W without what is not among the largest of worth_of(W, D), a row at a time."""
    W = draft.S.float()
    worth = worth_of(W, draft.columns)
    top = worth.topk(int((1 - ratio) * worth.shape[1] + 1e-6), dim=1).indices
    mask = torch.zeros_like(worth).scatter(1, top, 1.0).view_as(W)
    return low_rank_plus_sparse(draft.U, draft.V, W * mask, draft.layer)


def main():
    from eval_ppl import CompressionRun, run_parser
    bar.keywords["disable"] = None
    parser = run_parser(__doc__, STEPS, LR, METRIC_BATCHES)
    parser.add_argument("--estimator", choices=ESTIMATORS, default="metric", help="of the mask")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of either estimator (8)")
    run = CompressionRun(parser, "cap", block_layers)
    model, args, batches = run.model, run.args, run.batches[:run.args.metric_batches]
    add_row(run, "dense", "dense")
    with frozen(model):
        drafts = drafted(model, run.layers, batches)
        for key, worth_of in () if args.no_baselines else BASELINES.items():
            new = {name: pruned(worth_of, draft, args.ratio) for name, draft in drafts.items()}
            add_row(run, key, key, new)
        ESTIMATORS[args.estimator](model, drafts, batches, args.ratio, args.rounds)
        learn_gains(model, drafts, batches, args.steps, args.lr * args.ratio)
    new = finished(drafts)
    add_row(run, "compressed", f"CAP, {args.estimator}, {args.steps} steps", new)
    write(run, new)


if __name__ == "__main__":
    main()
