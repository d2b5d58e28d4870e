"""How fast: dense beside compressed models, and the methods' own work, as ratios of one run on one device.

    python bench/speed.py                                              # the bundled model
    python bench/speed.py --model FOLDER --compressed out/FOLDER       # what soco.py or rpca.py wrote
    python bench/speed.py --shape llama-7b --blocks 8 --seqlen 2048    # random weights

Prefill is a forward pass of a batch. Decoding is generate of transformers with a static cache, batch 1, from one
token; compiled, it runs CUDA graphs. Without --compressed, every matrix gets random factors of the rank, a multiple
of 8, that the ratio leaves it.
"""
import math
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer, timer
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rpca
import soco
from eval_ppl import Parser, add_model_flags, between, load_model, perplexity, pick_device, pick_dtype, run, whole

SHAPES = {"llama-7b": (4096, 11008, 32, 32), "llama-13b": (5120, 13824, 40, 40), "llama-70b": (8192, 28672, 80, 8)}
LLAMA = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads")


def build(name, dtype, device, blocks=None):
    """A model of random weights, of a name in SHAPES or of the config of a folder or hub id."""
    if name in SHAPES:
        heads = SHAPES[name][0] // 128
        config = AutoConfig.for_model("llama", **dict(zip(LLAMA, SHAPES[name])), num_attention_heads=heads)
    else:
        config = AutoConfig.from_pretrained(name)
    config.num_hidden_layers = blocks or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:config.num_hidden_layers]
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def seconds(call, repeats=2):
    """Mean time of a call, after two that do not count."""
    return Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()).timeit(repeats).mean


@torch.no_grad()
def speeds(model, ids, tokens=64):
    """Seconds of a prefill, of a decoded token, of a compiled one (NaN without CUDA), and resident bytes."""
    def decoding(**how):
        torch.compiler.reset()
        return seconds(lambda: model.generate(
            ids[:1, :1], attention_mask=torch.ones_like(ids[:1, :1]), min_new_tokens=tokens, max_new_tokens=tokens,
            do_sample=False, cache_implementation="static", pad_token_id=0, **how)) / tokens

    resident = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    prefill, compiled = seconds(lambda: model(ids, use_cache=False)), decoding() if ids.is_cuda else math.nan
    return prefill, decoding(disable_compile=True), compiled, resident


def low_rank(layer, ratio):
    m, n = soco.matrix(layer).shape
    rank = max(int((1 - ratio) * m * n / (m + n)) // 8 * 8, 8)
    return soco.LowRankLinear(n, m, rank, device=layer.weight.device, dtype=layer.weight.dtype)


def parts(model, ids, ratio=0.5, steps=20):
    """Seconds of the parts of a run of soco.py, of steps and batches of `ids`, and of a dense step."""
    layers, scored = soco.block_layers(model), {}

    def dense_step():
        logits = model(ids, use_cache=False).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        model.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        calls = {"dense forward and backward": dense_step,
                 "save": lambda: model.save_pretrained(folder),
                 "load": lambda: type(model).from_pretrained(folder, dtype=model.dtype).to(model.device),
                 "perplexity of a batch": lambda: perplexity(model, ids.flatten(), ids.shape[1]),
                 "another pass of the metric": lambda: soco.observe(model, layers, [ids], lambda *_: None),
                 "metric of a batch": lambda: sum(1 for _ in soco.measured(model, layers, [ids]))}
        found = {part: seconds(call) for part, call in calls.items()} | {"decompositions": 0.0}
    for _, layer, metric in soco.measured(model, layers, [ids]):
        start = timer()                                               # waits for the device
        scored[layer] = soco.ScoredLinear(layer, *soco.decompose(layer, metric, "two-sided"))
        found["decompositions"] += timer() - start
    found["prices of a batch"] = seconds(lambda: soco.set_prices(model, scored, [ids]))
    spectrum, budget = soco.Spectrum(list(scored.values()), 8), soco.budget_for(layers, ratio, True)
    start = timer()
    soco.learn(model, scored, spectrum, [ids], budget, steps)
    return found | {"step of learning": (timer() - start) / steps}


def full_svd(A, tau, nearby=None):
    U, sigma, V = torch.linalg.svd(A, full_matrices=False)
    return U, (sigma - tau.squeeze(-1)).clamp_min(0), V


def solver(W):
    """Seconds of ten iterations of `rpca`, and of the textbook's: a held penalty and a full decomposition each."""
    held = (W.numel() / (4 * W.abs().sum())).item()
    ours = seconds(lambda: rpca.rpca(W, tol=0, max_iter=10))
    with mock.patch.object(rpca, "singular_value_threshold", full_svd):
        return ours, seconds(lambda: rpca.rpca(W, penalty=held, tol=0, max_iter=10))


def main():
    parser = Parser(__doc__)
    add_model_flags(parser)
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), help="random weights, in place of --model")
    add("--blocks", type=whole(1), help="of the shape (default: all)")
    add("--compressed", nargs="+", default=[], help="folders that soco.py or rpca.py wrote")
    add("--ratio", type=between(0, 1), default=0.5, help="removed")
    add("--batch-size", type=whole(1), default=4, help="of a prefill and of a step of learning")
    add("--seqlen", type=whole(2), default=256, help="likewise")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    load = lambda folder: load_model(folder, device, dtype)[0]
    model = build(args.shape, dtype, device, args.blocks) if args.shape else load(args.model)
    vocabulary, layers = model.get_input_embeddings().num_embeddings, soco.block_layers(model)
    ids = torch.randint(vocabulary, (args.batch_size, args.seqlen), device=device)
    print(f"{args.shape or args.model}, {len(layers)} matrices, {dtype}, batch {args.batch_size} x {args.seqlen}, "
          f"{torch.cuda.get_device_name(device) if ids.is_cuda else 'CPU'}; in brackets: times dense speed")
    print(f"{'':20} {'prefill, ms':>17} {'a token, ms':>17} {'compiled, ms':>17} {'tokens/s':>8} {'MB':>8}")
    rows = {"dense": speeds(model, ids)} | {folder: speeds(load(folder), ids) for folder in args.compressed}
    if not args.compressed:
        with soco.swapped(model, {layer: low_rank(layer, args.ratio) for layer in layers.values()}):
            rows["low rank"] = speeds(model, ids)
    for label, found in rows.items():
        cells = [f"{1e3 * t:8.2f} ({dense / t:6.2f})" for t, dense in zip(found[:3], rows["dense"])]
        print(f"{label:20} {' '.join(cells)} {1 / min(found[1:3]):8.1f} {found[3] / 1e6:8.1f}")
    found = parts(model, ids, args.ratio)
    for part, time in found.items():
        print(f"{part:28} {time:9.3f} s, {time / found['dense forward and backward']:7.2f} of the first of these")
    W = max((soco.matrix(layer) for layer in layers.values()), key=torch.numel)[:2048, :2048].float()
    ours, textbook = solver(W)
    print(f"ten iterations of rpca, {tuple(W.shape)}: {ours:.3f} s, {textbook / ours:.1f} times textbook speed")


if __name__ == "__main__":
    run(main, soco.CannotCompress)
