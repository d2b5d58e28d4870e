"""What a run would need: memory by arithmetic, without loading a weight; time from parts timed on this device.

    python bench/plan.py --model FOLDER_OR_SHAPE --memory 24       # GB (1e9 bytes) of one device
    python bench/plan.py --model llama-7b --time 4                 # random weights: 1 and 4 blocks, scaled up to all
    python bench/plan.py --table                                   # known shapes on 24 and 80 GB

Memory: weights, factors or drafts, the metric's sums over a group of blocks, and what a forward pass keeps for its
backward pass. Not planned: perplexities, the policy gradient, what several processes send each other.
"""
import collections
import sys
import tempfile
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import soco
from bench.speed import SHAPES, build, learning, seconds
from eval_ppl import Parser, add_model_flags, between, perplexity, pick_device, pick_dtype, run, whole


def kept(model, layers, ids):
    """Bytes kept for the backward pass, by autograd and by the metric's hooks on `layers`, beside the model's own."""
    own, found = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}, {}

    def keep(tensor):
        found[tensor.untyped_storage()._cdata] = tensor               # held: no other storage takes its place
        return tensor

    hooks = [layer.register_forward_hook(lambda layer, inputs, y: [keep(inputs[0]), y][1]) for layer in layers]
    hooks.append(model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_()))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return sum(t.untyped_storage().nbytes() for key, t in found.items() if key not in own)


def memory(name, dtype, args, device):
    """{what: bytes} of a run on one device of `device` bytes."""
    with FakeTensorMode():
        model, size = build(name, dtype, "cpu"), dtype.itemsize
        layers, ids = soco.block_layers(model), torch.zeros(args.batch_size, args.seqlen, dtype=torch.long)
        shapes, blocks = [soco.matrix(layer).shape for layer in layers.values()], model.config.num_hidden_layers
        factors = [[torch.empty(side) for side in ((m, min(m, n)), min(m, n), (min(m, n), n))] for m, n in shapes]
        scored = {layer: soco.ScoredLinear(layer, *parts) for layer, parts in zip(layers.values(), factors)}
        logits = ids.numel() * model.get_output_embeddings().weight.shape[0]
        with soco.frozen(model):
            metric = kept(model, layers.values(), ids) + logits * (size + 2 * 4)        # probabilities and their sums
            with soco.swapped(model, scored):      # logits twice, their gradient; three float32 rows of KLDivergence
                step = kept(model, [], ids) + 3 * size * logits + 3 * 4 * logits // len(ids)
    weights, entries = size * sum(p.numel() for p in model.parameters()), sum(m * n for m, n in shapes)
    sums, inputs = 4 * sum(m * m + n * n for m, n in shapes), 4 * sum(n * n for _, n in shapes)
    group, free = min(max(int((device - weights) / 3 / sums * blocks), 1), blocks), max(device - weights, 0)
    factors, drafts = size * sum(min(m, n) * (m + n) for m, n in shapes), 2 * size * entries + min(inputs, free / 2)

    def measuring(after, during):                  # bytes over all blocks; a group of them at a time
        return max(first * after + min(group, blocks - first) * during for first in range(0, blocks, group)) / blocks

    one = max(8 * (2 * m * m + 2 * n * n + 6 * m * n + 5 * min(m, n) ** 2) for m, n in shapes)        # of `factor`
    phases = {"SoCo, metric": measuring(factors, sums) + max(metric, one), "SoCo, learning": factors + max(step, metric),
              "CAP, metric": measuring(drafts, sums + 4 * entries) + metric,
              "CAP, choice": drafts + max(8 * n * n + 36 * m * n for m, n in shapes)}
    return {"weights": weights, "file": weights - size * args.ratio * entries} | {
        phase: weights + more for phase, more in phases.items()}


def timed(model, layers, ids):
    """Seconds of the parts of a run whose time grows with the blocks."""
    text = ids.flatten()[:2048]
    with tempfile.TemporaryDirectory() as folder:
        save = seconds(lambda: model.save_pretrained(folder), 1)
        load = seconds(lambda: type(model).from_pretrained(folder, dtype=model.dtype).to(model.device), 1)
    return {"load": load, "pass": seconds(lambda: soco.observe(model, layers, [ids], lambda *_: None)),
            "metric": seconds(lambda: soco.collect_metric(model, layers, [ids])),
            "learning": learning(model, layers, ids), "save": save,
            "perplexity": seconds(lambda: perplexity(model, text, min(len(text), ids.shape[1]))) / len(text)}


def decomposing(layers):
    """Seconds of the decompositions of all of `layers`, from one of each shape."""
    shapes, total = collections.Counter(soco.matrix(layer).shape for layer in layers), 0
    for layer in layers:
        if count := shapes.pop(soco.matrix(layer).shape, 0):
            grams = [X @ X.T for X in (torch.randn(side, side, device=layer.weight.device) for side in shape[::-1])]
            total += count * seconds(lambda: soco.decompose(layer, soco.Metric(*grams), "two-sided"), 1)
    return total


def account(args, dtype, device):
    """Seconds of a run of soco.py without baselines, scaled up linearly from 1 and args.time blocks."""
    found = []
    for blocks in (1, args.time):
        model = build(args.model, dtype, device, blocks)
        layers = soco.block_layers(model)
        ids = torch.randint(model.get_input_embeddings().num_embeddings, (args.batch_size, args.seqlen), device=device)
        found.append({"decompositions": decomposing(layers.values()), **timed(model, layers, ids)})
    ...
