"""SoCo: learn which singular components of every weight matrix to keep (arXiv 2502.15092).

    python soco.py                                  # a bundled 1.9M-parameter GPT-2, offline, on a laptop
    python soco.py --model gpt2 --ratio 0.5         # GPT-2 on WikiText-2; a GPU is used if there is one

The method, on one screen. Every block weight W [m, n] becomes W' = U diag(S * sigma) V + d, where U diag(sigma) V is
its singular value decomposition in the metric of common/metric.py, S (the *scores*; S is the sparse part in rpca.py) starts
at 1, and the *deviation* d, an offset of the outputs, at 0. Only S and d are trained, to keep KL(dense || compressed)
small, and the components that are kept are chosen again and again by what the *learned* spectrum says they are worth,

    (S_i sigma_i)^2 / (m + n),        loss per stored number, one threshold for the whole model,

in three stages of one run:  1 *descend*: the kept share falls from 1 to the target;  2 *swing*: it swings around the
target, and components dropped too early come back;  3 *polarise*: the choice is final, dropped scores are zero for
good, and the survivors' scores grow to make up for them.  Then each layer is stored as two thin products, or dense
where that costs less.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, bar
from common.folder import install, load, register, save    # load and save stand here for whoever imports this module
from common.layers import block_layers, dense_like, enable_checkpointing, frozen, input_device, matrix, swapped
from common.metric import collect_metric
from common.processes import average, shared_out


# ---- the mathematics ----------------------------------------------------------------------------

def factor(W, G=None, R=None, damping=1e-4):
    """Singular value decomposition in a metric: U [m, r], sigma [r] (falling), V [r, n] with W = U diag(sigma) V.

    G [n, n]: Gram matrix of the inputs = L L^T, R [m]: mean squared gradient of each output; None is the identity.
    It is the SVD of R^(1/2) W L (common/metric.py), taken back to W: dropping component i costs sigma_i^2.
    In float64, by an eigendecomposition of the smaller Gram matrix of R^(1/2) W L.
    """
    A = W.double()
    if G is not None:
        G = G.to(torch.float64, copy=True)
        G.diagonal().add_(damping * G.diagonal().mean().clamp_min(1e-30))
        L = torch.linalg.cholesky(G)
        A = A @ L
    if R is not None:
        rows = (R.double() + damping * R.double().mean().clamp_min(1e-30)).sqrt()[:, None]
        A = rows * A
    if wide := A.shape[0] <= A.shape[1]:
        A = A.T
    Q = torch.linalg.eigh(A.T @ A)[1].flip(1)                         # right singular vectors [*, r], falling sigma
    AQ = A @ Q                                                        # U diag(sigma): A = (A Q) Q^T exactly
    sigma = AQ.norm(dim=0)
    AQ = AQ / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
    U, V = (Q, AQ.T) if wide else (AQ, Q.T)
    U = U if R is None else U / rows
    V = V if G is None else torch.linalg.solve_triangular(L, V, upper=False, left=False)
    return U, sigma, V


def stored_numbers(k, m, n):
    """Numbers that rank k of an m x n matrix costs (tensors): k (m + n) as two factors, never more than m n, dense."""
    return torch.minimum(k * (m + n), m * n)


def choose(worth, m, n, budget):
    """Which components to keep within a budget of numbers: a list of boolean tensors [r].

    worth: list of N tensors [r], the loss of dropping each component; m, n [N]: the shapes. At a price per number,
    each matrix keeps what is worth more than it costs, or goes dense and keeps all. The price is found by bisection;
    what is then left of the budget, too little for the next step of the price, buys single components, best first.
    """
    value = nn.utils.rnn.pad_sequence(worth, batch_first=True, padding_value=-1.0).double()
    value, order = value.sort(dim=1, descending=True)
    full, per_rank = (value >= 0).sum(1), m + n
    dense = stored_numbers(full, m, n)
    total = F.pad(value.clamp_min(0).cumsum(1), (1, 0))               # [N, r + 1]: worth of the best k components

    def ranks_at(price):
        k = (value > price * per_rank[:, None]).sum(1).clamp_min(1)
        surplus = total.gather(1, k[:, None])[:, 0] - price * stored_numbers(k, m, n)
        return torch.where((total[:, -1] - price * dense >= surplus) | (k * per_rank >= dense), full, k)

    def spent(k):
        return stored_numbers(k, m, n).sum()

    low, high = -80.0, math.log(value.max().item() + 1e-30)           # of the logarithm of the price
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(ranks_at(math.exp(middle))) > budget else (low, middle)
    k = ranks_at(math.exp(high))
    while True:
        extra = stored_numbers(k + 1, m, n) - stored_numbers(k, m, n)
        gain = value.gather(1, k.clamp_max(value.shape[1] - 1)[:, None])[:, 0] / extra.clamp_min(1)
        gain[(k >= full) | (extra > budget - spent(k))] = -1
        if gain.max() < 0:
            break
        k[gain.argmax()] += 1
        k = torch.where(k * per_rank >= dense, full, k)
    keep = torch.zeros_like(value, dtype=torch.bool)
    keep.scatter_(1, order, torch.arange(value.shape[1], device=k.device) < k[:, None])
    return [row[:len(w)] for row, w in zip(keep, worth)]


class KLDivergence(torch.autograd.Function):
    """Mean over tokens of KL(teacher || student) in nats, from logits [batch, length, vocab]; float32, row by row.

    Its gradient with respect to the student's logits is softmax(student) - softmax(teacher), known with the value.
    """

    @staticmethod
    def forward(ctx, teacher, student):
        total, grad = 0.0, torch.empty_like(student)
        for i, (t, s) in enumerate(zip(teacher, student)):
            t, s = F.log_softmax(t, -1, dtype=torch.float32), F.log_softmax(s, -1, dtype=torch.float32)
            p = t.exp()
            total = total + torch.dot(p.flatten(), (t - s).flatten())
            grad[i] = s.exp_().sub_(p)
        ctx.tokens = student[..., 0].numel()
        ctx.save_for_backward(grad)
        return total / ctx.tokens

    @staticmethod
    def backward(ctx, upstream):
        return None, ctx.saved_tensors[0] * (upstream / ctx.tokens)


# ---- the layers ---------------------------------------------------------------------------------

class ScoredLinear(nn.Module):
    """A layer while it learns: y = U (S * sigma * kept) V x + d + b, all frozen but the scores S [r] and d [m].

    A component that is not kept adds nothing to y, yet its score receives the gradient it would have if it were
    (straight through), so that it can grow and come back. `drop` removes components for good.
    `layer` is the dense layer it stands for; with `teacher` set, that one answers.
    """

    def __init__(self, layer, U, sigma, V, offset_scale=1.0):
        super().__init__()
        self.layer, self.teacher, self.offset_scale = layer, False, offset_scale
        self.m, self.n = matrix(layer).shape
        half = sigma.sqrt()                                           # sigma is split between the two factors
        self.U, self.V = (U * half).to(layer.weight), (half[:, None] * V).to(layer.weight)
        self.sigma = sigma.to(layer.weight.device).float()
        self.S = nn.Parameter(torch.ones_like(self.sigma))
        self.d = nn.Parameter(torch.zeros(self.m, device=self.sigma.device))
        self.alive = torch.arange(len(sigma), device=self.sigma.device)   # components not dropped for good
        self.kept = torch.ones_like(self.sigma)                       # of those, 1 where the mask is on

    def forward(self, x):
        if self.teacher:
            return self.layer(x)
        S = self.S[self.alive]
        score = (S * self.kept).detach() + S - S.detach()             # value S * kept, gradient of S
        return F.linear(F.linear(x, self.V) * score.to(x.dtype), self.U, self.bias().to(x.dtype))

    def bias(self):
        d = self.d * self.offset_scale
        return d if self.layer.bias is None else d + self.layer.bias

    def worth(self):
        """Predicted loss of dropping each living component, (S sigma)^2 [alive]."""
        return (self.S * self.sigma)[self.alive].detach().double() ** 2

    def drop(self, keep):
        """Remove the living components where keep [alive] is false."""
        if keep.all():
            return
        self.U, self.V = self.U[:, keep].contiguous(), self.V[keep].contiguous()
        self.alive, self.kept = self.alive[keep], self.kept[keep]

    def finish(self):
        """The layer to store: LowRankLinear of the kept components, or a dense layer where that costs less."""
        self.drop(self.kept.bool())
        s, k = self.S.detach()[self.alive], len(self.alive)
        bias = None if self.layer.bias is None and not self.d.any() else self.bias().detach()
        if k * (self.m + self.n) >= self.m * self.n:
            return dense_like(self.layer, (self.U.float() * s) @ self.V.float(), bias)
        return LowRankLinear.of(self.U.float() * s, self.V, bias, like=self.layer.weight)


class LowRankLinear(nn.Module):
    """y = up(down(x)): rank k in place of a dense [m, n] layer, as two ordinary nn.Linear.

    `weight` is a marker of one number. It stands where the dense weight stood: code that asks a layer for
    weight.dtype or weight.device is answered, and a saved folder that is loaded without this module fails on its
    shape where it would otherwise come up with random weights.
    """

    def __init__(self, n, m, k, bias=True, **where):
        super().__init__()
        self.down = nn.Linear(n, k, bias=False, **where)
        self.up = nn.Linear(k, m, bias=bias, **where)
        self.register_buffer("weight", torch.zeros(1, **where))

    @classmethod
    def of(cls, U, V, bias, like):
        """From factors U [m, k] and V [k, n] and a bias [m] or None, in the dtype and on the device of `like`."""
        new = cls(V.shape[1], *U.shape, bias=bias is not None, device=like.device, dtype=like.dtype)
        state = {"up.weight": U, "down.weight": V, "weight": new.weight} | ({} if bias is None else {"up.bias": bias})
        new.load_state_dict(state)
        return new.requires_grad_(like.requires_grad)

    def forward(self, x):
        return self.up(self.down(x))


# ---- compressing a model ------------------------------------------------------------------------

BASES = ("plain", "whitened", "two-sided")
LR = 0.02        # of the scores; the random part of Adam's steps costs about lr^2 sum(sigma^2) nats each
SWING = 0.02     # stage 2: how far the kept share goes over and under the target, as a part of it
POOL = 1.3       # components that a budget this much larger would not keep are dropped for good in stages 1 and 2


def decompose(layer, metric, basis, device=None):
    """`factor` of a layer's weight in a basis: plain (no metric), whitened (inputs only) or two-sided."""
    W, G, R = (part.to(device or layer.weight.device) for part in (matrix(layer), metric.G, metric.R))
    return factor(W, None if basis == "plain" else G, R if basis == "two-sided" else None)


def decompose_all(layers, metrics, basis, device=None, progress=False):
    """(name, layer, U, sigma, V) of `layers` {name: layer}, one after the other."""
    factors = shared_out(lambda name: decompose(layers[name], metrics[name], basis, device), list(layers))
    for (name, layer), part in zip(layers.items(), bar(factors, progress, total=len(layers), desc="decompose", unit="matrix")):
        yield name, layer, *part


def truncate(layers, metrics, basis, ratio, device=None, progress=False):
    """{layer: LowRankLinear} by truncated SVD at the same share of every matrix: the baseline without any choice."""
    new = {}
    for name, layer, U, sigma, V in decompose_all(layers, metrics, basis, device, progress):
        k = max(int((1 - ratio) * len(U) * V.shape[1] / (len(U) + V.shape[1])), 1)
        half = sigma[:k].sqrt()
        new[layer] = LowRankLinear.of(U[:, :k] * half, half[:, None] * V[:k], layer.bias, like=layer.weight)
    return new


def compress(model, batches, ratio=0.5, steps=200, metrics=None, progress=False, **settings):
    """Compress a causal language model in place, and return it, with `ratio` of its block weights' numbers removed.

    batches: token ids [batch, length], an iterable; it is repeated when `steps` need more.
    metrics: what collect_metric gave for block_layers(model), if the caller has it; else measured on `batches`.
    settings: of `compressed_layers`. Raises what it raises, and UserError for a model without a matching layer.
    """
    batches, layers = list(batches), block_layers(model)
    metrics = metrics or collect_metric(model, layers, batches, progress=progress)
    new = compressed_layers(model, layers, metrics, batches, ratio, steps, progress=progress, **settings)
    return install(model, "soco", layers, new)


def compressed_layers(model, layers, metrics, batches, ratio, steps, lr=LR, basis="two-sided", deviation=True,
                      stages=(0.5, 0.1, 0.4), device=None, progress=False):
    """{layer: its replacement} for `layers` {name: layer} of a model, which is left as it was.

    stages: the parts of the run that descend, swing and polarise. steps=0 chooses without learning.
    device: where matrices are decomposed, one at a time (default: where each lies). Raises UserError for a ratio that
    leaves too little, FloatingPointError when the loss is not finite.
    """
    deviation = deviation and steps > 0
    budget = budget_for(layers, ratio, deviation)
    scored = scored_layers(layers, metrics, basis, device, progress)
    students = list(scored.values())
    keep_best(students, budget)
    if steps:
        with swapped(model, scored):
            learn(model, students, batches, budget, steps, lr, deviation, stages, progress)
    return {layer: student.finish() for layer, student in scored.items()}


def budget_for(layers, ratio, deviation):
    """Numbers that the factors of `layers` {name: layer} may take: what `ratio` leaves, less the deviations' new biases."""
    if not 0 < ratio < 1:
        raise UserError(f"ratio {ratio} is not between 0 and 1")
    numbers = sum(matrix(layer).numel() for layer in layers.values())
    budget = (1 - ratio) * numbers - sum(len(matrix(layer)) for layer in layers.values() if deviation and layer.bias is None)
    if budget < (least := sum(sum(matrix(layer).shape) for layer in layers.values())):
        raise UserError(f"ratio {ratio} leaves {budget:.0f} numbers, and one component of every matrix takes {least}: give a smaller ratio")
    return budget


def scored_layers(layers, metrics, basis, device=None, progress=False):
    """{layer: ScoredLinear}, all components kept and all scores 1, for `layers` {name: layer}."""
    scored = {}
    for name, layer, U, sigma, V in decompose_all(layers, metrics, basis, device, progress):
        W = matrix(layer).float()
        output_rms = ((W @ metrics[name].G.to(W)) * W).sum(1).mean().sqrt().item()
        scored[layer] = ScoredLinear(layer, U, sigma, V, offset_scale=output_rms)
    return scored


def keep_best(layers, budget):
    """Turn each layer's mask on for what `choose` keeps of all of them within the budget; returns the numbers kept."""
    device = layers[0].sigma.device
    m, n = (torch.tensor([getattr(layer, side) for layer in layers], device=device) for side in "mn")
    chosen = choose([layer.worth().to(device) for layer in layers], m, n, budget)
    for layer, kept in zip(layers, chosen):
        layer.kept = kept.to(layer.kept)
    return stored_numbers(torch.stack([kept.sum() for kept in chosen]), m, n).sum().item()


def stage_and_target(step, steps, stages, budget, numbers):
    """The stage a step belongs to, and the budget of numbers that its mask is chosen for."""
    done, (descend, swing, _) = (step + 1) / steps, stages
    if done <= descend:
        return "descend", budget + (numbers - budget) * (1 - done / descend) ** 3
    if done <= descend + swing:
        return "swing", budget * (1 + SWING * (-1) ** step)
    return "polarise", budget


def learn(model, layers, batches, budget, steps, lr, deviation, stages, progress):
    """Train S and d of the ScoredLinear `layers` of a model, and leave their masks on what the budget keeps."""
    numbers, stage = sum(layer.m * layer.n for layer in layers), None
    scores, deviations = [layer.S for layer in layers], [layer.d for layer in layers] if deviation else []
    optimizer = torch.optim.Adam([{"params": scores, "lr": lr}, {"params": deviations, "lr": lr / 2}], betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(                     # the rates fall to zero over stage 3
        optimizer, lambda step: min((step + 1) / 5, 1.0, (1 - step / steps) / max(stages[2], 1e-9)))
    with frozen(model, checkpointing=True):
        for p in scores + deviations:
            p.requires_grad_(True).grad = torch.zeros_like(p)
        steps_bar = bar(range(steps), progress, desc="learn", unit="step")
        for step in steps_bar:
            before, (stage, target) = stage, stage_and_target(step, steps, stages, budget, numbers)
            if stage != "polarise" or before != stage:
                keep_best(layers, target if stage == "polarise" else min(POOL * target, numbers))
                for layer in layers:
                    layer.drop(layer.kept.bool())                     # what is outside the pool cannot come back
                kept = keep_best(layers, target)
            ids = batches[step % len(batches)].to(input_device(model))
            loss = KLDivergence.apply(teacher(model, layers, ids), model(input_ids=ids, use_cache=False).logits)
            optimizer.zero_grad(set_to_none=False)
            (loss * ids.numel()).backward()                           # Adam does not see the factor; float16 needs it
            average([loss.detach(), *(p.grad for p in scores + deviations)])
            if not torch.stack([loss.detach(), *(S.grad.sum().to(loss.device) for S in scores)]).isfinite().all():
                raise FloatingPointError(f"the loss or its gradient is not finite at step {step + 1} of {steps} "
                                         f"(loss {loss.item()}): lower the learning rate, --lr, now {lr}")
            optimizer.step()
            schedule.step()
            steps_bar.set_postfix(stage=stage, kept=f"{kept / numbers:.4f}", loss=f"{loss.item():.4f}")
    if stage != "polarise":
        keep_best(layers, budget)


@torch.no_grad()
def teacher(model, layers, ids):
    """Logits of the dense layers: the compressed model is its own teacher, and shares everything else with it."""
    for layer in layers:
        layer.teacher = True
    logits = model(input_ids=ids, use_cache=False).logits
    for layer in layers:
        layer.teacher = False
    return logits


# ---- load, command -------------------------------------------------------------------------------

def build_empty(layer, shapes):
    """What `finish` made of a layer, its weights still to be loaded, from the shapes of its tensors."""
    m, n = matrix(layer).shape
    if "down.weight" not in shapes:
        return dense_like(layer, torch.empty(m, n), torch.empty(m) if "bias" in shapes else None)
    return LowRankLinear(n, m, shapes["down.weight"][0], bias="up.bias" in shapes, dtype=layer.weight.dtype)


register("soco", build_empty)


def main():
    parser = run_parser(__doc__)
    parser.add("--basis", "of the decomposition", choices=BASES, default="two-sided")
    parser.add("--steps", "of learning, over all three stages", type=whole(0), default=200)
    parser.add("--lr", "Adam's learning rate for the scores", type=between(0, 10), default=LR)
    parser.add("--no-deviation", "do not learn the output offsets d", action="store_true")
    parser.add("--gradient-checkpointing", "recompute activations when learning: less memory, more time", action="store_true")
    args = parser.parse_args()
    job = Job(args, "soco")
    model, device = job.model, job.device
    if args.gradient_checkpointing:
        enable_checkpointing(model)
    budget_for(block_layers(model), args.ratio, not args.no_deviation)        # refuses an impossible ratio before any work
    job.score("dense", "dense")
    metrics = job.metrics()
    for key, label, basis in [("svd", "plain SVD, same share", "plain"), ("svd_whitened", "whitened SVD, same share", "whitened")]:
        job.baseline(key, label, lambda: truncate(block_layers(model), metrics, basis, args.ratio, device, progress=True))
    job.baseline("svd_global", f"{args.basis} SVD, global choice", lambda: compressed_layers(
        model, block_layers(model), metrics, [], args.ratio, steps=0, basis=args.basis, device=device, progress=True))
    with job.clock("learn"):
        compress(model, job.batches(max(args.steps, 1)), args.ratio, args.steps, metrics, progress=True,
                 lr=args.lr, basis=args.basis, deviation=not args.no_deviation, device=device)
    job.score("compressed", f"SoCo, {args.steps} steps")
    job.finish({name: {"rank": shapes.get("down.weight", ["dense"])[0]}
                for name, shapes in model.config.quantization_config["layers"].items()})


if __name__ == "__main__":
    from common.cli import Job, between, run, run_parser, whole
    run(main)
