"""What a run would need: memory by arithmetic, no weight loaded; time from parts timed on this device.

    python bench/plan.py --model FOLDER_OR_SHAPE --memory 24       # GB (1e9 bytes) of one device
    python bench/plan.py --model llama-7b --time 4                 # 1 and 4 random blocks, scaled up to all
    python bench/plan.py --table                                   # known shapes on 24 and 80 GB

Memory: weights, factors (soco.py) or drafts (rpca.py), the metric's sums over a group of blocks, what a
forward pass keeps for the backward pass. Not planned: the baselines of soco.py, which wait in memory to be
scored, the policy gradient, and what several processes send each other.
"""
import sys
import tempfile
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import soco
from bench.speed import SHAPES, build, parts, seconds
from eval_ppl import BUNDLED, Parser, between, perplexity, pick_device, run, whole, window

SCORED = 2 * 341_000       # tokens of WikiText-2's test split, for the dense and for the compressed model


def kept(model, ids):
    """Bytes that a forward pass keeps for its backward pass, beside the model's own tensors."""
    own, found = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}, {}

    def keep(tensor):
        found[tensor.untyped_storage()._cdata] = tensor               # held: no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in found.items() if key not in own)


def memory(name, dtype, args, capacity):
    """{phase: bytes} of a run on one device of `capacity` bytes, and the metric's passes over a batch."""
    with FakeTensorMode():
        model, size = build(name, dtype, "cpu"), dtype.itemsize
        layers, seqlen = soco.block_layers(model), window(model, "--seqlen", args.seqlen)
        ids = torch.zeros(args.batch_size, seqlen, dtype=torch.long)
        shapes = [soco.matrix(layer).shape for layer in layers.values()]
        decomposed = {layer: torch.linalg.svd(soco.matrix(layer).float(), False) for layer in layers.values()}
        scored = {layer: soco.ScoredLinear(layer, *factors) for layer, factors in decomposed.items()}
        logits = ids.numel() * model.get_output_embeddings().weight.shape[0]
        with soco.frozen(model), soco.swapped(model, scored):         # logits, gradient; rows of KLDivergence
            step = kept(model, ids) + 3 * size * logits + 3 * 4 * logits // len(ids)
        with soco.frozen(model):                                      # inputs of layers, probabilities
            model.get_input_embeddings().weight.requires_grad_()
            read = size * ids.numel() * sum(n for _, n in shapes)
            metric = kept(model, ids) + read + (size + 8) * logits
    weights, entries = size * sum(p.numel() for p in model.parameters()), sum(m * n for m, n in shapes)
    inputs, outputs = 4 * sum(n * n for _, n in shapes), 4 * sum(m * m for m, _ in shapes)
    blocks, free = model.config.num_hidden_layers, max(capacity - weights, 0)
    factors = size * sum(min(m, n) * (m + n) for m, n in shapes)
    factor = max(8 * (2 * m * m + 2 * n * n + 6 * m * n + 5 * min(m, n) ** 2) for m, n in shapes)
    drafts = size * entries + min(inputs, free / 2)

    def measuring(after, sums):       # the peak, and the passes; a group is sized when it begins
        first, peak, passes, group = 0, 0, 0, sums / blocks
        while first < blocks:
            step = max(int((free - first * after / blocks) / 3 / group), 1)
            peak = max(peak, first * after / blocks + min(step, blocks - first) * group)
            first, passes = first + step, passes + 1
        return peak, passes

    metrics, passes = measuring(factors, inputs + outputs + 4 * entries)
    phases = {"weights": 0, "SoCo, learning": factors + step,
              "SoCo, metric": max(metrics + max(metric, factor), factors + metric),
              "CAP": max(metric + measuring(drafts, inputs)[0], drafts + max(metric, step, size * entries))}
    return {phase: weights + more for phase, more in phases.items()}, passes


def timed(args, dtype, device, blocks):
    """Seconds of the parts of a run of soco.py, for one batch and one step, on so many blocks."""
    model = build(args.model, dtype, device, blocks)
    known = model.get_input_embeddings().num_embeddings
    ids = torch.randint(known, (args.batch_size, args.seqlen), device=device)
    with tempfile.TemporaryDirectory() as folder:
        save = seconds(lambda: model.save_pretrained(folder))
        load = seconds(lambda: type(model).from_pretrained(folder, dtype=dtype).to(device))
    score = seconds(lambda: perplexity(model, ids.flatten(), args.seqlen))
    return {"load": load, "save": save, "perplexity": score} | parts(model, ids)


def account(args, dtype, device, passes):
    """Print the seconds of soco.py --no-baselines with its defaults, linear in the number of blocks."""
    few, more = timed(args, dtype, device, 1), timed(args, dtype, device, args.time)
    blocks, total = build(args.model, dtype, "meta").config.num_hidden_layers, 0
    batches = SCORED / args.batch_size / args.seqlen
    for part, times in [("load", 1), ("decompose", 1), ("collect_metric", soco.METRIC_BATCHES),
                        ("set_prices", soco.METRIC_BATCHES * passes), ("learn", soco.STEPS // 2),
                        ("perplexity", batches), ("save", 1)]:
        each = few[part] + (more[part] - few[part]) * (blocks - 1) / (args.time - 1)
        total += times * each
        print(f"{part:16} {times:6.0f} x {each:9.4f} s = {times * each:8.1f} s")
    print(f"in all {total:.1f} s, from 1 and {args.time} of {blocks} blocks on {device}, {dtype}")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default=BUNDLED, help=f"folder, hub id, or {', '.join(SHAPES)}")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="of the weights")
    add("--batch-size", type=whole(1), default=4, help="blocks a batch")
    add("--seqlen", type=whole(8), default=256, help="tokens a block")
    add("--memory", type=between(0, 1e6), default=24.0, help="of the device, GB")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--time", type=whole(2), help="blocks to time parts on, on CUDA if there is one")
    one("--table", action="store_true", help="known shapes on 24 and 80 GB")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    print("| GB | device | weights | SoCo, learning | SoCo, metric | CAP | fits |\n" + "| --- " * 7 + "|")
    for name in SHAPES if args.table else [args.model]:
        for size in (24, 80) if args.table else [args.memory]:
            found, passes = memory(name, dtype, args, 1e9 * size)
            need = {"SoCo": max(found["SoCo, metric"], found["SoCo, learning"]), "CAP": found["CAP"]}
            fits = " and ".join(method for method in need if need[method] < 1e9 * size) or "neither"
            cells = " | ".join(f"{part / 1e9:.1f}" for part in found.values())
            print(f"| {name} | {size:g} | {cells} | {fits} |")
    if args.time:
        account(args, dtype, pick_device("auto"), passes)


if __name__ == "__main__":
    run(main, soco.CannotCompress, OSError)
