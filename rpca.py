"""CAP: split every weight matrix by robust PCA into low-rank plus sparse, then choose globally what is kept
(arXiv 2505.03801).

    python rpca.py                                  # a bundled 1.6M-parameter GPT-2, offline, on a laptop
    python rpca.py --model gpt2 --ratio 0.5         # GPT-2 on WikiText-2; a GPU is used if there is one

The method, on one screen. *Stage 1*: every block weight W [m, n], scaled so that the square of an entry is the loss
it costs (R^(1/2) W D, common.py), is split by principal component pursuit,

    min |L|_* + lam |S|_1   with  L + S = W:     L = U diag(sigma) V low-rank,  S sparse.

*Stage 2*: every direction of every L and every entry of every S has a probability p of being kept, under one budget
for the whole model,

    sum p_sigma (m + n) + sum p_S  <=  (1 - ratio) * numbers in the block weights,

The paper learns them by policy gradient from the loss on calibration text (`--estimator policy`). The default drives p to
0 or 1 by what the metric predicts, in rounds, for the entries; L then has a fixed small share of each matrix's numbers.
*Then* what is kept has its values refitted on that structure, and each layer is stored as U sqrt(sigma), sqrt(sigma) V and a bitmask with the values of S.
(S is the sparse part here; in soco.py it is the score.)
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# load and save stand here for whoever imports this module
from common import (UserError, bar, block_layers, collect_metric, dense_like, input_device, load, mark_compressed, matrix,
                    register, save, swap, swapped)

# ---- stage 1: principal component pursuit --------------------------------------------------------


class RPCA(NamedTuple):
    U: torch.Tensor          # [..., m, k] orthonormal columns
    sigma: torch.Tensor      # [..., k] singular values of L, falling; a batch is padded with zeros
    V: torch.Tensor          # [..., k, n] orthonormal rows: L = U diag(sigma) V
    S: torch.Tensor          # [..., m, n] the sparse part
    residuals: list          # |W - L - S|_F / |W|_F after each iteration, the largest of a batch


def rpca(W, lam=None, penalty=None, tol=1e-6, max_iter=500):
    """Principal component pursuit, min |L|_* + lam |S|_1 with L + S = W, by ADMM (Candes et al. 2011, arXiv 0912.3599,
    algorithm 1; CAP, stage 1).

    W [..., m, n]: float32 or float64, any device. lam: 1 / sqrt(max(m, n)). penalty: m n / (4 |W|_1), as there.
    Stops at a relative residual below tol or after max_iter iterations, which is where its residuals end.
    """
    m, n = W.shape[-2:]
    lam = lam or max(m, n) ** -0.5
    mu = penalty or 1 / (4 * W.abs().mean((-2, -1), keepdim=True)).clamp_min(1e-20)
    norm = torch.linalg.matrix_norm(W).clamp_min(torch.finfo(W.dtype).tiny)
    S, Y, residuals = torch.zeros_like(W), torch.zeros_like(W), []
    while not residuals or (residuals[-1] > tol and len(residuals) < max_iter):
        U, sigma, V = singular_value_threshold(W - S + Y / mu, 1 / mu)
        L = (U * sigma[..., None, :]) @ V
        S = soft_threshold(W - L + Y / mu, lam / mu)
        gap = W - L - S
        Y = Y + mu * gap
        residuals.append((torch.linalg.matrix_norm(gap) / norm).max().item())
    return RPCA(U, sigma, V, S, residuals)


def soft_threshold(A, tau):
    """argmin over S of tau |S|_1 + |S - A|_F^2 / 2: entries shrunk towards zero by tau."""
    return A.sign() * (A.abs() - tau).clamp_min(0)


def singular_value_threshold(A, tau):
    """argmin over L of tau |L|_* + |L - A|_F^2 / 2, as U, sigma, V: singular values shrunk by tau, those at zero left out.

    From the eigenvectors Q of the smaller Gram matrix: with A [m, n], m <= n, L = Q diag(shrunk / sigma) Q^T A.
    """
    if A.shape[-2] > A.shape[-1]:
        U, sigma, V = singular_value_threshold(A.mT, tau)
        return V.mT, sigma, U.mT
    squares, Q = torch.linalg.eigh(A @ A.mT)
    sigma = squares.clamp_min(0).sqrt()
    shrunk = (sigma - tau.squeeze(-1) if torch.is_tensor(tau) else sigma - tau).clamp_min(0)
    k = max(int((shrunk > 0).sum(-1).max()), 1)                       # eigenvalues rise: the last k
    U, sigma, shrunk = Q[..., -k:].flip(-1), sigma[..., -k:].flip(-1), shrunk[..., -k:].flip(-1)
    V = U.mT @ A / sigma.clamp_min(torch.finfo(A.dtype).tiny)[..., None]
    return U, shrunk, V


# ---- stage 2: one probabilistic mask over the whole model ----------------------------------------
#
# An item is a direction of some L, which costs m + n numbers, or an entry of some S, which costs 1.
# `p` and `masks` are lists of tensors, one number an item; `cost` is a list of numbers, the cost of an item of each tensor.

def expected_cost(p, cost):
    return sum(c * q.sum(dtype=torch.float64).item() for q, c in zip(p, cost))


def project(p, cost, budget):
    """The nearest probabilities with expected cost at most `budget`: clamp(p - tau cost, 0, 1), tau by bisection."""
    def moved(tau):
        return [(q - tau * c).clamp(0, 1) for q, c in zip(p, cost)]

    low, high = 0.0, 1 + max(q.max().item() / c for q, c in zip(p, cost))
    if expected_cost(moved(low), cost) <= budget:
        return moved(low)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_cost(moved(middle), cost) > budget else (low, middle)
    return moved(high)


def score_function(mask, p):
    """d log P(mask) / dp of independent Bernoulli masks: (mask - p) / (p (1 - p)) (CAP, stage 2)."""
    return (mask - p) / (p * (1 - p))


def policy_gradient(loss_of, p, cost, budget, steps, lr=0.05, window=5, edge=0.01, generator=None, progress=False):
    """Learn probabilities from forward passes alone (REINFORCE, as the paper has it); returns p and the losses.

    loss_of(masks, step) -> loss of one draw. Each step draws masks ~ Bernoulli(p) and moves p by
    -lr (loss - baseline) score_function, the baseline being the mean of the last `window` losses; then p is projected.
    p is held `edge` away from 0 and 1 where the score function is evaluated, so that no single draw moves it without bound.
    """
    losses = []
    for step in bar(range(steps), progress, desc="policy", unit="draw"):
        masks = [torch.bernoulli(q, generator=generator) for q in p]
        loss = loss_of(masks, step)
        baseline = sum(losses[-window:]) / len(losses[-window:]) if losses else loss
        losses.append(loss)
        p = [q - lr * (loss - baseline) * score_function(m, q.clamp(edge, 1 - edge)) for q, m in zip(p, masks)]
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

def refit(T, S, mask, G, iterations=12, damping=1e-3):
    """Values of S on `mask` that bring S x closest to T x: min tr((T - S) G (T - S)^T), all rows at once.

    T, S [m, n]: target and start; G [n, n]: Gram matrix of the inputs. Conjugate gradients on the masked entries,
    preconditioned by diag(G); the error falls with every iteration. Each row of mask is its own least-squares problem,
    too many to factorise; SparseGPT (arXiv 2301.00774) solves them column by column, approximately.
    """
    G = G + damping * G.diagonal().mean() * torch.eye(len(G), dtype=G.dtype, device=G.device)
    tiny = torch.finfo(G.dtype).tiny
    scale = G.diagonal().clamp_min(tiny)
    S = S * mask
    residual = ((T - S) @ G) * mask
    direction = step = residual / scale
    square = (residual * step).sum(1, keepdim=True)
    for _ in range(iterations):
        image = (direction @ G) * mask
        length = square / (direction * image).sum(1, keepdim=True).clamp_min(tiny)
        S, residual = S + length * direction, residual - length * image
        step = residual / scale
        square, before = (residual * step).sum(1, keepdim=True), square
        direction = step + square / before.clamp_min(tiny) * direction
    return S


def alternate(Q, V, numbers, rounds=3):
    """Rank-k L = (L_U, V) [m, k], [k, n] for Q = L + S with `numbers` in all, from a start V [k, n] of its row space.

    S takes the largest entries of Q - L that the budget leaves, L the best rank k of Q - S, in turn; the rank-k
    approximation is one step of subspace iteration a round.
    """
    m, n, k = *Q.shape, len(V)
    entries = max(int(numbers) - k * (m + n), 1)
    U = Q @ V.mT
    for _ in range(rounds):
        left = Q - U @ V
        cut = left.abs().flatten().kthvalue(left.numel() - entries + 1).values if entries < left.numel() else 0.0
        left = Q - left * (left.abs() >= cut)
        basis = torch.linalg.qr(left @ V.mT)[0]
        V, small = (part.mT for part in torch.linalg.qr(left.mT @ basis))
        U = basis @ small
    return U, V


def threshold(worths, count):
    """The number t such that at most `count` entries exceed it, and more would exceed any smaller one.

    worths(): iterates over non-negative float32 tensors, made anew on both passes so that one is in memory at a time.
    Such floats are ordered as their bit patterns are: a radix select, by the high 16 bits and then by the low.
    """
    bucket, above = None, 0
    for shift in (16, 0):
        histogram = 0
        for worth in worths():
            bits = worth.contiguous().view(torch.int32).flatten()
            if shift == 0:
                bits = bits[bits >> 16 == bucket]
            histogram = histogram + torch.bincount(bits >> shift & 0xffff, minlength=1 << 16).cpu()
        at_least = histogram.flip(0).cumsum(0).flip(0) + above        # entries in this bucket or a higher one
        last = int((at_least > count).nonzero().max()) if (at_least > count).any() else None
        if last is None:
            return -1.0
        bucket, above = (last if shift else bucket << 16 | last), above + int(histogram[last + 1:].sum())
    return torch.tensor([bucket], dtype=torch.int32).view(torch.float32).item()


# ---- the layer ------------------------------------------------------------------------------------

class LowRankPlusSparse(nn.Module):
    """y = up(down(x)) + S x + b: rank k (two nn.Linear, none for k = 0) plus a sparse matrix, for a dense [m, n] layer.

    S is stored as a bitmask, 1 bit an entry, and its nonzero values; the dense S that multiplies is unpacked on
    first use. `weight` is a marker of one number where the dense weight stood, as in soco.LowRankLinear.
    """

    def __init__(self, n, m, k, nonzeros, bias=True, **where):
        super().__init__()
        self.shape = (m, n)
        self.down = nn.Linear(n, k, bias=False, **where) if k else None
        self.up = nn.Linear(k, m, bias=False, **where) if k else None
        self.values = nn.Parameter(torch.empty(nonzeros, **where))
        self.bias = nn.Parameter(torch.empty(m, **where)) if bias else None
        self.register_buffer("mask", torch.empty(-(-m * n // 8), dtype=torch.uint8, device=where.get("device")))
        self.register_buffer("weight", torch.zeros(1, **where))
        self.unpacked = None

    @classmethod
    def of(cls, U, V, S, bias, like):
        """From U [m, k], V [k, n], S [m, n] and a bias [m] or None, in the dtype and on the device of `like`."""
        S = S.to(like)
        mask = S != 0
        new = cls(V.shape[1], *U.shape, int(mask.sum()), bias is not None, device=like.device, dtype=like.dtype)
        state = {"values": S[mask], "mask": pack_bits(mask), "weight": new.weight}
        state |= {"up.weight": U, "down.weight": V} if new.up else {}
        state |= {} if bias is None else {"bias": bias}
        new.load_state_dict(state)
        return new.requires_grad_(like.requires_grad)

    def _apply(self, *args, **options):
        self.unpacked = None
        return super()._apply(*args, **options)

    def sparse(self):
        """The dense form of S [m, n]."""
        mask = unpack_bits(self.mask, self.shape)
        return torch.zeros(self.shape, dtype=self.values.dtype, device=mask.device).masked_scatter(mask, self.values)

    def forward(self, x):
        if self.training or torch.is_grad_enabled():
            S = self.sparse()
        else:
            key = (self.values._version, self.values.data_ptr(), self.values.dtype)
            if self.unpacked is None or self.unpacked[0] != key:
                self.unpacked = (key, self.sparse())
            S = self.unpacked[1]
        y = F.linear(x, S, self.bias)
        return y if self.up is None else y + self.up(self.down(x))


def pack_bits(mask):
    """A boolean tensor as bytes [ceil(numel / 8)], the first entry in the lowest bit."""
    flat = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed, shape):
    """The boolean tensor of a shape that `pack_bits` packed."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[:math.prod(shape)].view(shape).bool()


# ---- compressing a model ------------------------------------------------------------------------

ESTIMATORS = ("metric", "policy")
RPCA_ITERATIONS = 10      # the paper finds perplexity settled after about as many


class Draft(nn.Module):
    """A matrix while its structure is chosen: W [m, n] = L + S, L = U V of rank k, S on a mask, in the units of W.

    rows [m], columns [n]: R^(1/2) and D of the metric; an entry of R^(1/2) S D, squared, is its worth.
    """

    def __init__(self, layer, metric, scale=True):
        super().__init__()
        self.layer, self.G = layer, metric.G
        self.rows, self.columns = ((A + 1e-6 * A.mean()).clamp_min(1e-20).sqrt() if scale else torch.ones_like(A)
                                   for A in (metric.R, metric.G.diagonal()))
        self.m, self.n = matrix(layer).shape
        self.set_low_rank(self.rows.new_zeros(self.m, 0), self.rows.new_zeros(0, self.n))
        self.mask = torch.ones(self.m, self.n, dtype=torch.bool, device=self.rows.device)

    def scaled(self):
        return self.rows[:, None] * matrix(self.layer).float() * self.columns

    def set_low_rank(self, U, V):
        """L from factors [m, k], [k, n] in scaled units; S is what L leaves of W."""
        self.U, self.V = U / self.rows[:, None], V / self.columns
        self.S = self.target().to(self.layer.weight.dtype)

    def target(self):
        """W - L [m, n], what S is to stand for."""
        return matrix(self.layer).float() - self.U @ self.V

    def worth(self):
        """Predicted loss of dropping each entry of S [m, n] float32."""
        return (self.rows[:, None] * self.S.float() * self.columns).square() * self.mask

    def refit(self, iterations=12):
        self.S = refit(self.target(), self.S.float(), self.mask, self.G, iterations).to(self.S.dtype)

    def forward(self, x):
        W = (self.U @ self.V + self.S.float() * self.mask).to(x.dtype)
        return F.linear(x, W, self.layer.bias)

    def finish(self):
        half = (self.U.norm(dim=0) / self.V.norm(dim=1).clamp_min(1e-30)).sqrt().clamp_min(1e-15)
        return LowRankPlusSparse.of(self.U / half, half[:, None] * self.V, self.S * self.mask, self.layer.bias, self.layer.weight)


def compress(model, batches, ratio=0.5, metrics=None, progress=False, **settings):
    """Compress a causal language model in place, and return it, with `ratio` of its block weights' numbers removed.

    batches: token ids [batch, length], an iterable. metrics: what collect_metric gave for block_layers(model), if the
    caller has it; else measured on `batches`. settings: of `compressed_layers`.
    """
    batches, layers = list(batches), block_layers(model)
    metrics = metrics or collect_metric(model, layers, batches, progress=progress)
    new = compressed_layers(model, layers, metrics, batches, ratio, progress=progress, **settings)
    swap(model, new)
    mark_compressed(model, "cap", {name: {"k": len(new[layer].down.weight) if new[layer].down else 0,
                                          "nonzeros": len(new[layer].values), "bias": layer.bias is not None}
                                   for name, layer in layers.items()})
    return model


def compressed_layers(model, layers, metrics, batches, ratio, estimator="metric", rank_share=0.04, rounds=5, scale=True,
                      uniform=False, refitted=True, seed=0, progress=False):
    """{layer: LowRankPlusSparse} for `layers` {name: layer} of a model, which is left as it was.

    estimator: "metric" or "policy" (the paper's). rank_share: of each matrix's numbers, for its L. rounds: of pruning and
    refitting. uniform: the same share of every matrix, for comparison. Raises UserError for an impossible ratio.
    """
    if not 0 < ratio < 1:
        raise UserError(f"ratio {ratio} is not between 0 and 1")
    drafts = [Draft(layer, metrics[name], scale) for name, layer in layers.items()]
    budget = int((1 - ratio) * sum(draft.m * draft.n for draft in drafts))
    if estimator == "policy":
        choose_by_policy(model, drafts, batches, budget, seed, progress)
        if refitted:
            for draft in drafts:
                draft.refit()
    else:
        set_ranks(drafts, budget, rank_share, uniform, progress)
        choose_by_metric(drafts, budget, rounds, uniform, refitted, progress)
    return {draft.layer: draft.finish() for draft in drafts}


def set_ranks(drafts, budget, rank_share, uniform, progress):
    """Stage 1 for every matrix: its L from robust PCA, at the rank that `rank_share` of its own numbers pays for."""
    mask_largest(drafts, budget, uniform)
    for draft in bar(drafts, progress, desc="robust PCA", unit="matrix"):
        numbers = draft.mask.sum().item()
        k = int(rank_share * numbers / (draft.m + draft.n))
        if k:
            Q = draft.scaled()
            draft.set_low_rank(*alternate(Q, rpca(Q, max_iter=RPCA_ITERATIONS).V[:k], numbers))
        draft.mask.fill_(True)


def mask_largest(drafts, count, uniform=False):
    """Put the masks on the `count` worthiest entries of all matrices, or on the same share of each."""
    numbers = sum(draft.m * draft.n for draft in drafts)
    for group in [[draft] for draft in drafts] if uniform else [drafts]:
        share = sum(draft.m * draft.n for draft in group) / numbers
        cut = threshold(lambda: (draft.worth() for draft in group), int(count * share))
        for draft in group:
            draft.mask = draft.worth() > cut


def choose_by_metric(drafts, budget, rounds, uniform, refitted, progress):
    """Stage 2 by the metric: drop the entries of least predicted loss in the whole model, refit, and again.

    The expected loss of independent Bernoulli masks grows by worth (1 - p) for every entry, so its gradient drives p to 1
    above one price for the whole model and to 0 below. The worth changes as the survivors make up for what is gone:
    hence in rounds, each dropping an equal part.
    """
    entries = budget - sum(draft.U.shape[1] * (draft.m + draft.n) for draft in drafts)
    numbers = sum(draft.m * draft.n for draft in drafts)
    for done in bar(range(1, rounds + 1), progress, desc="choose and refit", unit="round"):
        mask_largest(drafts, numbers - (numbers - entries) * done // rounds, uniform)
        for draft in drafts:
            if refitted:
                draft.refit()


def choose_by_policy(model, drafts, batches, budget, seed, progress, rounds=3):
    """Stage 2 as the paper has it: fixed L and S of robust PCA, probabilities learned by policy gradient.

    The probabilities start at worth / (worth + cost * mean worth), projected on the budget: what the metric would say.
    """
    splits = [rpca(draft.scaled(), max_iter=RPCA_ITERATIONS) for draft in bar(drafts, progress, desc="robust PCA", unit="matrix")]
    worths = [worth for split in splits for worth in (split.sigma.square(), split.S.square())]
    cost = [each for draft in drafts for each in (draft.m + draft.n, 1)]

    def set_masks(masks):
        for draft, split, directions, entries in zip(drafts, splits, masks[::2], masks[1::2]):
            kept = directions.bool()
            draft.set_low_rank(split.U[:, kept] * split.sigma[kept], split.V[kept])
            draft.S = (split.S / draft.rows[:, None] / draft.columns).to(draft.S.dtype)
            draft.mask = entries.bool() & (split.S != 0)

    def loss_of(masks, step):
        set_masks(masks)
        ids = batches[step % len(batches)].to(input_device(model))
        with torch.no_grad(), swapped(model, {draft.layer: draft for draft in drafts}):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).item()

    mean = sum(worth.sum() for worth in worths) / sum(worth.numel() for worth in worths)
    p = project([worth / (worth + c * mean) for worth, c in zip(worths, cost)], cost, budget)
    generator = torch.Generator(device=p[0].device).manual_seed(seed)
    p, _ = policy_gradient(loss_of, p, cost, budget, rounds * len(batches), generator=generator, progress=progress)
    set_masks(keep_most_probable([q * (worth > 0) for q, worth in zip(p, worths)], cost, budget))


# ---- baselines, load, command ---------------------------------------------------------------------

def magnitude(W, D, ratio):
    """The largest entries of a matrix W [m, n], (1 - ratio) of them."""
    count = int((1 - ratio) * W.numel())
    return torch.zeros_like(W).flatten().scatter(0, (top := W.abs().flatten().topk(count).indices), W.flatten()[top]).view_as(W)


def wanda(W, D, ratio):
    """Wanda (Sun et al. 2024, arXiv 2306.11695): in every row, the largest |W| D; D [n] is the inputs' root mean square."""
    top = (W.abs() * D).topk(int((1 - ratio) * W.shape[1]), dim=1).indices
    return torch.zeros_like(W).scatter(1, top, W.gather(1, top))


def build_empty(layer, k, nonzeros, bias):
    """A layer of the shape that `Draft.finish` gave it, its weights still to be loaded."""
    m, n = matrix(layer).shape
    return LowRankPlusSparse(n, m, k, nonzeros, bias=bias, dtype=layer.weight.dtype)


register("cap", build_empty)


def main():
    parser = run_parser(__doc__, metric_batches=32)
    parser.add("--estimator", "of the mask: metric, or the paper's policy gradient", choices=ESTIMATORS, default="metric")
    parser.add("--rank-share", "of each matrix's numbers, for its low-rank part", type=between(0, 1, or_low=True), default=0.04)
    parser.add("--rounds", "of pruning and refitting", type=whole(1), default=5)
    parser.add("--no-scale", "split and choose in the units of W, without the metric", action="store_true")
    parser.add("--no-refit", "keep the values that stage 1 gave", action="store_true")
    parser.add("--uniform", "the same share of every matrix", action="store_true")
    args = parser.parse_args()
    job = Job(args, "cap")
    model, layers = job.model, job.layers
    job.score("dense", "dense")
    with job.clock("metric"):
        metrics = collect_metric(model, layers, job.batches(args.metric_batches), progress=True)
    for key, label, prune in [("magnitude", "magnitude", magnitude), ("wanda", "Wanda, row-wise", wanda)]:
        with job.clock("baselines"):
            pruned = {layer: prune(matrix(layer).float(), metrics[name].G.diagonal().sqrt(), args.ratio) for name, layer in layers.items()}
            kept = sum(W.count_nonzero().item() for W in pruned.values())
            pruned = {layer: dense_like(layer, W, layer.bias) for layer, W in pruned.items()}
        with swapped(model, pruned):
            job.score(key, label, kept)
        del pruned
    with job.clock("compress"):
        compress(model, job.batches(args.metric_batches), args.ratio, metrics, progress=True, estimator=args.estimator,
                 rank_share=args.rank_share, rounds=args.rounds, scale=not args.no_scale, uniform=args.uniform,
                 refitted=not args.no_refit, seed=args.seed)
    job.score("compressed", "CAP")
    specs = model.config.quantization_config["layers"]
    job.finish([{"name": name, "shape": tuple(matrix(layer).shape), "rank": specs[name]["k"], "nonzeros": specs[name]["nonzeros"]}
                for name, layer in layers.items()])


if __name__ == "__main__":
    from cli import Job, between, run, run_parser, whole
    run(main)
