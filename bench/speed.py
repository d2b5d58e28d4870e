"""How fast: dense beside compressed models, and the methods' own work, as ratios of one run on one device.

    python bench/speed.py                                              # the bundled model
    python bench/speed.py --model FOLDER --compressed out/FOLDER       # what soco.py or rpca.py wrote
    python bench/speed.py --shape llama-7b --blocks 8 --seqlen 2048    # random weights

Prefill is a forward pass of a batch. Decoding is generate of transformers with a static cache, batch 1, from
one token, and the same as CUDA graphs. Low rank: random factors of the rank that the ratio leaves a matrix.
"""
import collections
import math
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch.utils.benchmark import Timer, timer
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rpca
import soco
from eval_ppl import Parser, load_model

SHAPES = {"llama-7b": (4096, 11008, 32, 32), "llama-13b": (5120, 13824, 40, 40),
          "llama-70b": (8192, 28672, 80, 8)}  # width, width in the MLP, blocks, key heads


def build(shape, dtype, device, blocks=None):
    """A LLaMA of random weights, of a name in SHAPES."""
    width, middle, depth, heads = SHAPES[shape]
    config = AutoConfig.for_model(
        "llama", hidden_size=width, intermediate_size=middle, num_hidden_layers=blocks or depth,
        num_attention_heads=width // 128, num_key_value_heads=heads, max_position_embeddings=2 ** 17)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def seconds(call):
    """Median time of a call, after one that does not count."""
    times = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return times.blocked_autorange(min_run_time=0.5).median


@torch.no_grad()
def speeds(model, ids, tokens=64):
    """Seconds of a prefill, of a decoded token, of one by CUDA graphs (NaN without CUDA); resident bytes."""
    def decoding(**how):
        torch.compiler.reset()
        return seconds(lambda: model.generate(
            ids[:1, :1], attention_mask=torch.ones_like(ids[:1, :1]), max_new_tokens=tokens, pad_token_id=0,
            min_new_tokens=tokens, do_sample=False, cache_implementation="static", **how)) / tokens

    times = seconds(lambda: model(ids, use_cache=False)), decoding(disable_compile=True)
    resident = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return *times, decoding() if ids.is_cuda else math.nan, resident


def random_low_rank(layer, ratio):
    m, n = soco.matrix(layer).shape
    rank = max(int((1 - ratio) * m * n / (m + n)) // 8 * 8, 8)
    return soco.LowRankLinear(n, m, rank, bias=layer.bias is not None).to(layer.weight)


def parts(model, ids, steps=20):
    """Seconds of the parts of soco.compress, for one batch and one step; it compresses the model."""
    found = collections.Counter()

    def clocked(function):
        def call(*args, **settings):
            start = timer()  # waits for the device
            result = function(*args, **settings)
            found[function.__name__] += timer() - start
            return result
        return call

    names = ("collect_metric", "factor", "set_fisher", "learn")
    with mock.patch.multiple(soco, **{name: clocked(getattr(soco, name)) for name in names}):
        soco.compress(model, [ids], 0.5, steps)
    return found | {"learn": found["learn"] / steps}


def dense_step(model, ids):
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--shape", choices=SHAPES, help="random weights, in place of --model")
    add("--blocks", type=int, help="of the shape (default: all)")
    add("--compressed", nargs="+", default=[], help="folders that soco.py or rpca.py wrote")
    add("--ratio", type=float, default=0.5, help="removed, of the low-rank model")
    add("--batch-size", type=int, default=4, help="of a prefill and of a step of learning")
    add("--seqlen", type=int, default=256, help="likewise")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and args.device == "auto" else args.device
    dtype = getattr(torch, args.dtype, torch.bfloat16 if device == "cuda" else torch.float32)
    load = partial(load_model, device=args.device, dtype=args.dtype, device_map=args.device_map)
    device = "cpu" if device == "auto" else device
    model = build(args.shape, dtype, device, args.blocks) if args.shape else load(args.model)[0]
    layers, words = soco.block_layers(model), model.get_input_embeddings().num_embeddings
    ids = torch.randint(words, (args.batch_size, args.seqlen), device=model.device)
    print(vars(args), torch.cuda.get_device_name(device) if ids.is_cuda else "CPU")
    print("(times dense speed)        prefill, ms       a token, ms   CUDA graph, ms tokens/s       MB")
    rows = {"dense": speeds(model, ids)} | {name: speeds(load(name)[0], ids) for name in args.compressed}
    with soco.swapped(model, {name: random_low_rank(layer, args.ratio) for name, layer in layers.items()}):
        rows["low rank"] = speeds(model, ids)
    for label, found in rows.items():
        cells = " ".join(f"{1e3 * t:8.2f} ({dense / t:6.2f})" for t, dense in zip(found[:3], rows["dense"]))
        print(f"{label:20} {cells} {1 / min(found[1:3]):8.1f} {found[3] / 1e6:8.1f}")
    W = max(map(soco.matrix, layers.values()), key=torch.numel)[:2048, :2048].float()
    pca = seconds(lambda: rpca.rpca(W, tol=0, max_iter=10))
    unit = seconds(partial(dense_step, model, ids))
    print(f"ten iterations of rpca, {tuple(W.shape)}: {pca:.3f} s, {pca / unit:.2f} passes")
    found = ", ".join(f"{part} {time / unit:.2f}" for part, time in parts(model, ids).items())
    print(f"in forward and backward passes of {unit:.3f} s, for one batch or step: {found}")


if __name__ == "__main__":
    main()
