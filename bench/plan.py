"""What a run would need, without loading a weight: numbers, bytes, peak memory, and the time of the decompositions.

    python bench/plan.py --model FOLDER_OR_HUB_ID --ratio 0.5 --memory 24      # of a device, in GB (1e9 bytes)
    python bench/plan.py --table                                               # the README's table

The model is built from its config with tensors that have a shape and no data. Activations are counted by running the
learning step's forward pass on them and adding up what autograd saves. Peaks are of three phases, and the largest counts: the metric, the
decompositions (or CAP's drafts), and learning. The Gram matrices lie in main memory. `--check` loads the model, runs both methods on the CPU with two steps of
learning, and compares the peak of the bytes in living tensors with the plan. Not planned: perplexities, the policy
gradient, and what several processes send each other.
"""
import sys
import time
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rpca
import soco
from common import UserError
from common.cli import BUNDLED, Parser, between, load_model, run, whole
from common.layers import block_layers, frozen, matrix, swapped
from soco import ScoredLinear, factor

SHAPES = {      # for those who have no config at hand
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "llama-7b": ("llama", {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}),
    "llama-13b": ("llama", {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}),
    "llama-70b": ("llama", {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
                            "num_key_value_heads": 8}),
}


def build(name, dtype):
    """A model without data, of a name in SHAPES or of the config that from_pretrained would read."""
    from transformers import AutoConfig, AutoModelForCausalLM
    try:
        config = AutoConfig.for_model(SHAPES[name][0], **SHAPES[name][1]) if name in SHAPES else AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: no config found; give a folder, a hub id or one of {', '.join(SHAPES)}") from error
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def saved_by_autograd(model, ids):
    """Bytes that a forward pass keeps for its backward pass, without the model's own tensors; and unique inputs of layers."""
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    own |= {t.untyped_storage()._cdata for module in model.modules() if isinstance(module, ScoredLinear) for t in (module.U, module.V)}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor                # held, so that no storage is counted in another's place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=ids, use_cache=False).logits
    del output
    return sum(t.untyped_storage().nbytes() for cdata, t in kept.items() if cdata not in own)


def gram_bytes(model, layers, ids):
    """Bytes of the Gram matrices that collect_metric keeps: one for each tensor that some layer reads."""
    inputs = {}
    hooks = [layer.register_forward_pre_hook(lambda layer, args: inputs.update({id(args[0]): args[0]})) for layer in layers.values()]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return sum(4 * x.shape[-1] ** 2 for x in inputs.values())


def plan(model, dtype, ratio, batch, seqlen):
    """{what: bytes or numbers} of a run on one device; called under a FakeTensorMode."""
    layers, size = block_layers(model), dtype.itemsize
    ids = torch.zeros(batch, seqlen, dtype=torch.long)
    shapes = [tuple(matrix(layer).shape) for layer in layers.values()]
    numbers = sum(m * n for m, n in shapes)
    weights = size * sum(p.numel() for p in model.parameters())
    factors = sum(size * min(shape) * sum(shape) for shape in shapes)
    grams = gram_bytes(model, layers, ids)
    logits = batch * seqlen * model.get_output_embeddings().weight.shape[0]
    with frozen(model):
        hook = model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
        metric = saved_by_autograd(model, ids) + logits * (size + 2 * 4)        # logits; softmax and its sums in float32
        hook.remove()
        scored = {layer: ScoredLinear(layer, *(torch.empty(shape) for shape in ((a, min(a, b)), (min(a, b),), (min(a, b), b))))
                  for layer, (a, b) in zip(layers.values(), shapes)}
        with swapped(model, scored):
            # logits of teacher and student, their gradient; three float32 rows of the batch in KLDivergence
            learning = saved_by_autograd(model, ids) + 3 * size * logits + 3 * 4 * logits // batch
    # one matrix: for `factor`, G in both precisions, L; W, W L, its factors; eigenvectors and their workspace
    one = max(20 * n * n + 8 * (5 * m * n + 4 * min(m, n) ** 2) for m, n in shapes)
    one_sparse = max(8 * n * n + 36 * m * n for m, n in shapes)       # for `refit`: G twice; target, values, residual, direction, image, ...
    return {"numbers": numbers, "matrices": len(shapes), "weights": weights, "factors": factors, "grams": grams,
            "file": weights - size * int(ratio * numbers), "bitmask": numbers // 8,
            "SoCo": weights + max(metric, factors + one, factors + learning),
            "CAP": weights + max(metric, size * numbers + one_sparse), "shapes": shapes}


def seconds_of_decompositions(shapes):
    """Time of `factor` on every matrix here, from one timed matrix of at most 2,048 inputs: the work grows with min^2 max + n^3."""
    def work(m, n):
        return min(m, n) ** 2 * max(m, n) + n ** 3

    m, n = (min(side, 2048) for side in max(shapes, key=lambda shape: work(*shape)))
    W, X = torch.randn(m, n), torch.randn(n, n)
    for _ in range(2):                                                # the first call warms up
        start = time.perf_counter()
        factor(W, X @ X.T / n, torch.ones(m))
    return (time.perf_counter() - start) / work(m, n) * sum(work(*shape) for shape in shapes)


class PeakBytes(TorchDispatchMode):
    """Inside a with block, `peak` is the largest sum of the bytes of all tensors alive at once, on any device."""

    def __init__(self, model):
        super().__init__()
        self.alive, self.total, self.peak = {}, 0, 0
        self.watch([*model.parameters(), *model.buffers()])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.watch([t for t in tree_leaves(result) if torch.is_tensor(t)])
        return result

    def watch(self, tensors):
        for storage in (tensor.untyped_storage() for tensor in tensors):
            known = self.alive.get(storage._cdata)
            if known is None or known[0].expired():
                self.total += storage.nbytes() - (known[1] if known else 0)
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self.total > self.peak:                                    # perhaps: take out what has been freed
            self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
            self.total = sum(size for _, size in self.alive.values())
            self.peak = max(self.peak, self.total)


def check(name, dtype, ratio, batch, seqlen):
    """{method: peak of the bytes in living tensors} of real runs on the CPU."""
    peaks = {}
    for method, script in [("SoCo", soco), ("CAP", rpca)]:
        if name in SHAPES:
            raise UserError(f"--check needs weights, and {name} is only a shape: give a folder or a hub id")
        model = load_model(name, torch.device("cpu"), dtype)[0]
        ids = torch.randint(model.get_input_embeddings().num_embeddings, (batch, seqlen))
        with PeakBytes(model) as bytes:
            script.compress(model, [ids], ratio, **{soco: {"steps": 2}, rpca: {}}[script])
        peaks[method] = bytes.peak
    return peaks


def main():
    parser = Parser(__doc__)
    parser.add("--model", f"folder, hub id, or a shape: {', '.join(SHAPES)}", default=BUNDLED)
    parser.add("--ratio", "share of the block weights' numbers to remove", type=between(0, 1), default=0.5)
    parser.add("--dtype", "of the weights", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add("--batch-size", "blocks a batch", type=whole(1), default=4)
    parser.add("--seqlen", "tokens a block", type=whole(8), default=256)
    parser.add("--memory", "of the device, GB", type=between(0, 1e6), default=24.0)
    parser.add("--check", "run it on the CPU and compare", action="store_true")
    parser.add("--table", "plans for known shapes on 24 and 80 GB, as Markdown", action="store_true")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.table:
        print("| model | block numbers | matrices | weights, GB | Gram matrices, GB | file at 0.5, GB | SoCo peak, GB | CAP peak, GB | 24 GB | 80 GB |")
        print("| --- " * 10 + "|")
        for name in SHAPES:
            with FakeTensorMode():
                found = plan(build(name, dtype), dtype, args.ratio, args.batch_size, args.seqlen)
            fits = [" and ".join(method for method in ("SoCo", "CAP") if found[method] < 1e9 * memory) or "neither" for memory in (24, 80)]
            print(f"| {name} | {found['numbers']:,} | {found['matrices']} | " + " | ".join(
                f"{found[key] / 1e9:.1f}" for key in ("weights", "grams", "file", "SoCo", "CAP")) + f" | {fits[0]} | {fits[1]} |")
        return
    with FakeTensorMode():
        found = plan(build(args.model, dtype), dtype, args.ratio, args.batch_size, args.seqlen)
    print(f"{args.model}: {found['numbers']:,} compressible numbers in {found['matrices']} matrices")
    for what, key in [("weights", "weights"), ("factors at full rank", "factors"), ("Gram matrices", "grams"), (f"file at ratio {args.ratio:g}", "file"), ("CAP's bitmask, more", "bitmask")]:
        print(f"  {what:24} {found[key] / 1e9:10.3f} GB")
    print(f"  decompositions           {seconds_of_decompositions(found['shapes']):10.0f} s on this machine's CPU, from one timed matrix")
    measured = check(args.model, dtype, args.ratio, args.batch_size, args.seqlen) if args.check else {}
    for method in ("SoCo", "CAP"):
        print(f"  {method + ', peak memory':24} {found[method] / 1e9:10.3f} GB: "
              f"{'fits' if found[method] < 1e9 * args.memory else 'does not fit'} in {args.memory:g} GB")
        if measured:                                                  # on the CPU, where the Gram matrices count too
            planned = found[method] + found["grams"]
            print(f"  {'with Gram matrices':24} {planned / 1e9:10.3f} GB, measured {measured[method] / 1e9:.3f} GB: {planned / measured[method]:.2f}")


if __name__ == "__main__":
    run(main)
