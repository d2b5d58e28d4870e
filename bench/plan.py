"""What a run would need: memory by arithmetic, without loading a weight; time from parts timed on this device.

    python bench/plan.py --model FOLDER_OR_SHAPE --memory 24       # GB (1e9 bytes) of one device
    python bench/plan.py --model llama-7b --time 4                 # random weights: 1 and 4 blocks, scaled up to all
    python bench/plan.py --table                                   # known shapes on 24 and 80 GB

Memory: weights, factors or drafts, the metric's sums over a group of blocks, and what a forward pass keeps for its
backward pass. Not planned: perplexities, the policy gradient, what several processes send each other.
"""
import sys
import tempfile
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import soco
from bench.speed import SHAPES, build, learning, seconds
from eval_ppl import Parser, add_model_flags, between, perplexity, pick_device, pick_dtype, run, whole

METRIC_BATCHES, STEPS, TOKENS = 16, 200, 2 * 341_000        # of a run; WikiText-2's test split, scored twice


def kept(model, layers, ids):
    """Bytes kept for the backward pass, by autograd and by the metric's hooks on `layers`, beside the model's own."""
    own, found = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}, {}

    def keep(tensor):
        found[tensor.untyped_storage()._cdata] = tensor               # held: no other storage takes its place
        return tensor

    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: (keep(inputs[0]),)) for layer in layers]
    hooks.append(model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_()))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return sum(t.untyped_storage().nbytes() for key, t in found.items() if key not in own)


def memory(args, name, dtype, device):
    """{what: bytes} of a run on one device of `device` bytes, and the number of groups of the metric."""
    with FakeTensorMode():
        model, size = build(name, dtype, "cpu"), dtype.itemsize
        layers, ids = soco.block_layers(model), torch.zeros(args.batch_size, args.seqlen, dtype=torch.long)
        shapes, blocks = [soco.matrix(layer).shape for layer in layers.values()], model.config.num_hidden_layers
        factors = [[torch.empty(side) for side in ((m, min(m, n)), min(m, n), (min(m, n), n))] for m, n in shapes]
        scored = {layer: soco.ScoredLinear(layer, *parts) for layer, parts in zip(layers.values(), factors)}
        logits = ids.numel() * model.get_output_embeddings().weight.shape[0]
        with soco.frozen(model):
            metric = kept(model, layers.values(), ids) + logits * (size + 2 * 4)     # probabilities and their sums
            with soco.swapped(model, scored):   # logits twice, their gradient; three float32 rows of KLDivergence
                step = kept(model, [], ids) + 3 * size * logits + 3 * 4 * logits // len(ids)
    weights, entries = size * sum(p.numel() for p in model.parameters()), sum(m * n for m, n in shapes)
    sums, inputs = 4 * sum(m * m + n * n for m, n in shapes), 4 * sum(n * n for _, n in shapes)
    free = max(device - weights, 0)
    factors, drafts = size * sum(min(m, n) * (m + n) for m, n in shapes), 2 * size * entries + min(inputs, free / 2)
    firsts = range(0, blocks, max(int(free / 3 / sums * blocks), 1))  # first blocks of the metric's groups

    def measuring(after, during):
        return max(first * after + min(firsts.step, blocks - first) * during for first in firsts) / blocks

    one = max(8 * (2 * m * m + 2 * n * n + 6 * m * n + 5 * min(m, n) ** 2) for m, n in shapes)     # of `factor`
    refit = max(8 * n * n + 36 * m * n for m, n in shapes)
    return {"weights": weights, "file": weights - size * args.ratio * entries,
            "SoCo, metric": weights + measuring(factors, sums) + max(metric, one),
            "SoCo, learning": weights + factors + max(step, metric),
            "CAP, metric": weights + measuring(drafts, sums + 4 * entries) + metric,
            "CAP, choice": weights + drafts + refit}, len(firsts)


def timed(args, dtype, device, blocks):
    """Seconds of the parts of a run on a model of so many blocks."""
    model = build(args.model, dtype, device, blocks)
    layers = soco.block_layers(model)
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (args.batch_size, args.seqlen), device=device)
    metrics = soco.collect_metric(model, layers, [ids])
    with tempfile.TemporaryDirectory() as folder:
        parts = {"save": lambda: model.save_pretrained(folder),
                 "load": lambda: type(model).from_pretrained(folder, dtype=dtype).to(device),
                 "pass": lambda: soco.observe(model, layers, [ids], lambda *_: None),
                 "metric": lambda: soco.collect_metric(model, layers, [ids]),
                 "decompositions": lambda: [soco.decompose(layers[name], metrics[name], "two-sided") for name in layers],
                 "perplexity": lambda: perplexity(model, ids.flatten(), args.seqlen)}
        return {part: seconds(call, 1) for part, call in parts.items()} | {"learning": learning(model, layers, ids)}


def account(args, dtype, device, groups):
    """Print the seconds of a run of soco.py --no-baselines, from 1 and args.time blocks, linear in their number."""
    blocks, few, more = ..., timed(args, dtype, device, 1), timed(args, dtype, device, args.time)
    each = {part: few[part] + (more[part] - few[part]) * (blocks - 1) / (args.time - 1) for part in few}
    tokens = args.batch_size * args.seqlen
    each["a pass for a further group"] ...
    counts = {"load": 1, "pass": METRIC_BATCHES * (groups - 1), "metric": 2 * METRIC_BATCHES, "decompositions": 1, "learning": STEPS, "perplexity": TOKENS / tokens, "save": 1 - args.ratio}
    for part, count in counts.items():
        print(f"{part:16} {each[part]:10.3f} s x {count:8.1f} = {count * each[part]:8.1f} s")
    print total


def main():
    parser = Parser(__doc__)
    add_model_flags(parser)
    parser.add_argument("--ratio", type=between(0, 1), default=0.5, help="removed")
    parser.add_argument("--batch-size", type=whole(1), default=4, help="blocks a batch")
    parser.add_argument("--seqlen", type=whole(8), default=256, help="tokens a block")
    parser.add_argument("--memory", type=between(0, 1e6), default=24.0, help="of the device, GB")
    parser.add_argument("--time", type=whole(2), help="blocks to time")
    parser.add_argument("--table", action="store_true", help="memory of known shapes, as Markdown")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(...)
    names = SHAPES if args.table else [args.model]
    print header
    for name in SHAPES if args.table else [args.model]:
        for gigabytes in (24, 80) if args.table else [args.memory]:
            found, groups = memory(args, name, dtype, 1e9 * gigabytes)
            peaks = {method: max(found[key] for key in found if key.startswith(method)) for method in ("SoCo", "CAP")}
            fits = " and ".join(method for ... if peaks < 1e9 * gigabytes) or "neither"
            print("| name | GB | " + " | ".join(f"{v/1e9:.1f}") + fits)
    if args.time:
        account(...)
