"""What a run would need: memory by arithmetic, without loading a weight; time from parts timed on this device.

    python bench/plan.py --model FOLDER_OR_SHAPE --memory 24       # GB (1e9 bytes) of one device
    python bench/plan.py --model llama-7b --time 4                 # 1 and 4 random blocks, scaled up to all
    python bench/plan.py --table                                   # known shapes on 24 and 80 GB

Memory: weights, factors or drafts, the metric's sums over a group of blocks, and what a forward pass keeps for its
backward pass. Not planned: the policy gradient, and what several processes send each other.
"""
import sys
import tempfile
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import soco
from bench.speed import SHAPES, build, parts, seconds
from eval_ppl import Parser, add_model_flags, between, perplexity, pick_device, pick_dtype, run, whole

SCORED = 2 * 341_000       # tokens: WikiText-2's test split in LLaMA's, by the dense and by the compressed model


def kept(model, ids):
    """Bytes that a forward pass keeps for its backward pass, beside the model's own tensors."""
    own, found = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}, {}

    def keep(tensor):
        found[tensor.untyped_storage()._cdata] = tensor               # held: no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in found.items() if key not in own)


def memory(name, dtype, args, device):
    """{what: bytes} of a run on one device of `device` bytes."""
    with FakeTensorMode():
        model, size = build(name, dtype, "cpu"), dtype.itemsize
        layers, ids = soco.block_layers(model), torch.zeros(args.batch_size, args.seqlen, dtype=torch.long)
        shapes, blocks = [soco.matrix(layer).shape for layer in layers.values()], model.config.num_hidden_layers
        logits = ids.numel() * model.get_output_embeddings().weight.shape[0]
        scored = {layer: soco.ScoredLinear(layer, W[:, :min(W.shape)], W[:, 0].new_zeros(min(W.shape)), W[:min(W.shape)])
                  for layer, W in zip(layers.values(), map(soco.matrix, layers.values()))}
        with soco.frozen(model), soco.swapped(model, scored):        # logits, gradient; rows of KLDivergence
            step = kept(model, ids) + 3 * size * logits + 3 * 4 * logits // len(ids)
        with soco.frozen(model):                                      # inputs of layers; probabilities, their sums
            model.get_input_embeddings().weight.requires_grad_()
            metric = kept(model, ids) + size * ids.numel() * sum(n for _, n in shapes) + logits * (size + 2 * 4)
    weights, entries = size * sum(p.numel() for p in model.parameters()), sum(m * n for m, n in shapes)
    factors = size * sum(min(m, n) * (m + n) for m, n in shapes)
    inputs, outputs = (4 * sum(sides) for sides in zip(*((n * n, m * m) for m, n in shapes)))
    firsts = range(0, blocks, max(int((device - weights) / 3 / (inputs + outputs) * blocks), 1))        # of groups
    drafts = 2 * size * entries + min(inputs, max(device - weights, 0) / 2)

    def measuring(after, during):
        return max(first * after + min(firsts.step, blocks - first) * during for first in firsts) / blocks

    factor = max(8 * (2 * m * m + 2 * n * n + 6 * m * n + 5 * min(m, n) ** 2) for m, n in shapes)
    refit = max(8 * n * n + 36 * m * n for m, n in shapes)
    return {"weights": weights, "file": weights - size * args.ratio * entries, "passes": len(firsts),
            "SoCo, metric": weights + measuring(factors, inputs + outputs) + max(metric, factor),
            "SoCo, learning": weights + factors + max(step, metric),
            "CAP, metric": weights + measuring(drafts, inputs + outputs + 4 * entries) + metric,
            "CAP, choice": weights + drafts + refit}


def timed(args, dtype, device, blocks):
    """Seconds of the parts of a run of soco.py for one batch and for one step, on `blocks` blocks."""
    model = build(args.model, dtype, device, blocks)
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (args.batch_size, args.seqlen), device=device)
    with tempfile.TemporaryDirectory() as folder:
        calls = {"save": lambda: model.save_pretrained(folder),
                 "load": lambda: type(model).from_pretrained(folder, dtype=dtype).to(device),
                 "perplexity": lambda: perplexity(model, ids.flatten(), args.seqlen)}
        found = {part: seconds(call) for part, call in calls.items()}
    return found | parts(model, ids)


def account(args, dtype, device, passes):
    """Print the seconds of soco.py --no-baselines with its defaults, linear in the number of blocks."""
    few, more = (timed(args, dtype, device, blocks) for blocks in (1, args.time))
    blocks = build(args.model, dtype, "meta").config.num_hidden_layers
    count = {"load": 1, "collect_metric": 16, "set_prices": 16 * passes, "decompose": 1, "learn": 200,
             "perplexity": SCORED / args.batch_size / args.seqlen, "save": 1}
    total = 0
    for part, times in count.items():
        each = few[part] + (more[part] - few[part]) * (blocks - 1) / (args.time - 1)
        total += times * each
        print(f"  {part:16} {times:8.0f} x {each:8.4f} s = {times * each:8.1f} s")
    print(f"  {'in all':38} {total:8.1f} s, from 1 and {args.time} of {blocks} blocks on {device}")


def main():
    parser = Parser(__doc__)
    add_model_flags(parser)
    add = parser.add_argument
    add("--ratio", type=between(0, 1), default=0.5, help="removed")
    add("--batch-size", type=whole(1), default=4, help="blocks a batch")
    add("--seqlen", type=whole(8), default=256, help="tokens a block")
    add("--memory", type=between(0, 1e6), default=24.0, help="of the device, GB")
    add("--time", type=whole(2), help="blocks to time parts on")
    add("--table", action="store_true", help="known shapes on 24 and 80 GB")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = torch.bfloat16 if args.dtype == "auto" else pick_dtype(args.dtype, device)
    keys = ("weights", "file", "SoCo, metric", "SoCo, learning", "CAP, metric", "CAP, choice")
    print(f"| {dtype}, GB | device | " + " | ".join(keys) + " | fits |\n" + "| --- " * (len(keys) + 3) + "|")
    for name in SHAPES if args.table else [args.model]:
        for size in (24, 80) if args.table else [args.memory]:
            found = memory(name, dtype, args, 1e9 * size)
            fits = [method for method in ("SoCo", "CAP") if max(found[key] for key in keys if method in key) < 1e9 * size]
            cells = " | ".join(f"{found[key] / 1e9:.1f}" for key in keys)
            print(f"| {name} | {size:g} | {cells} | {' and '.join(fits) or 'neither'} |")
    if args.time:
        account(args, dtype, device, found["passes"])


if __name__ == "__main__":
    run(main, soco.CannotCompress)
