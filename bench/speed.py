"""How fast: dense beside compressed models, and the methods' own work, as ratios of one run on one device.

    python bench/speed.py                                              # the bundled model
    python bench/speed.py --model FOLDER --compressed out/FOLDER       # what soco.py or rpca.py wrote
    python bench/speed.py --shape llama-7b --blocks 8 --seqlen 2048    # random weights; without --blocks all 32

Prefill is a forward pass of a batch; decoding is generate of transformers with a static cache, batch 1, from one
token, also compiled into CUDA graphs where there is CUDA. Without --compressed, every matrix gets random factors of
the rank, a multiple of 8, that the ratio leaves it.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer, timer
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rpca
import soco
from eval_ppl import Parser, add_model_flags, between, load_model, pick_device, pick_dtype, run, whole

SHAPES = {name: {"hidden_size": hidden, "intermediate_size": middle, "num_hidden_layers": blocks,
                 "num_attention_heads": hidden // 128, "num_key_value_heads": heads} for name, hidden, middle, blocks, heads in
          [("llama-7b", 4096, 11008, 32, 32), ("llama-13b", 5120, 13824, 40, 40), ("llama-70b", 8192, 28672, 80, 8)]}


def build(name, dtype, device, blocks=None):
    """A model of random weights, of a name in SHAPES or of the config of a folder or hub id."""
    config = AutoConfig.for_model("llama", **SHAPES[name]) if name in SHAPES else AutoConfig.from_pretrained(name)
    config.num_hidden_layers = blocks or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:config.num_hidden_layers]
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def seconds(call, repeats=5):
    """Mean time of a call, after two that do not count."""
    return Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()).timeit(repeats).mean


@torch.no_grad()
def speeds(model, ids, tokens=64):
    """Seconds of a prefill, of a decoded token, of one compiled (NaN without CUDA), and resident bytes."""
    def decoding(eager):
        torch.compiler.reset()
        return seconds(lambda: model.generate(
            ids[:1, :1], attention_mask=torch.ones_like(ids[:1, :1]), min_new_tokens=tokens, do_sample=False,
            max_new_tokens=tokens, cache_implementation="static", pad_token_id=0, disable_compile=eager), 2) / tokens

    prefill = seconds(lambda: model(input_ids=ids, use_cache=False))
    resident = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return prefill, decoding(True), decoding(False) if ids.is_cuda else math.nan, resident


def low_rank(layer, ratio):
    m, n = soco.matrix(layer).shape
    rank = max(int((1 - ratio) * m * n / (m + n)) // 8 * 8, 8)
    return soco.LowRankLinear(n, m, rank, device=layer.weight.device, dtype=layer.weight.dtype)


def learning(model, layers, ids, ratio=0.5, steps=20):
    """Seconds of a step of soco.learn, over a whole run."""
    scored = soco.scored_layers(model, layers, [ids], "plain")
    spectrum, budget = soco.Spectrum(list(scored.values()), 8), soco.budget_for(layers, ratio, True)
    start = timer()                                                   # waits for the device
    soco.learn(model, scored, spectrum, [ids], budget, steps)
    return (timer() - start) / steps


def textbook_rpca(W, iterations):
    """ADMM as Candes et al. have it: a held penalty, a full singular value decomposition an iteration."""
    mu, S, Y = W.numel() / (4 * W.abs().sum()), torch.zeros_like(W), torch.zeros_like(W)
    for _ in range(iterations):
        U, sigma, V = torch.linalg.svd(W - S + Y / mu, full_matrices=False)
        L = (U * (sigma - 1 / mu).clamp_min(0)) @ V
        S = rpca.soft_threshold(W - L + Y / mu, max(W.shape) ** -0.5 / mu)
        Y = Y + mu * (W - L - S)


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
    shape = args.shape and build(args.shape, dtype, device, args.blocks)
    model = shape or load_model(args.model, device, dtype)[0]
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (args.batch_size, args.seqlen), device=device)
    layers, name = soco.block_layers(model), torch.cuda.get_device_name(device) if ids.is_cuda else "CPU"
    print(f"{args.shape or args.model}, {len(layers)} matrices, {dtype}, {name}; in brackets: times dense speed")
    print(f"{'':20} {'prefill, ms':>17} {'a token, ms':>17} {'compiled, ms':>17} {'tokens/s':>8} {'MB':>8}")
    dense = speeds(model, ids)

    def row(label, found):
        cells = [f"{1e3 * t:8.2f} ({unit / t:6.2f})" for t, unit in zip(found[:3], dense)]
        print(f"{label:20} {' '.join(cells)} {1 / min(found[1:3]):8.1f} {found[3] / 1e6:8.1f}", flush=True)

    def dense_step():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        model.zero_grad()

    row("dense", dense)
    for folder in args.compressed:
        row(Path(folder).name, speeds(load_model(folder, device, dtype)[0], ids))
    with soco.swapped(model, {layer: low_rank(layer, args.ratio) for layer in layers.values() if not args.compressed}):
        row(f"low rank, {args.ratio:g}", speeds(model, ids))
    both, metric = seconds(dense_step), seconds(lambda: sum(1 for _ in soco.measured(model, layers, [ids])))
    step = learning(model, layers, ids, args.ratio)
    print(f"forward and backward {1e3 * both:.1f} ms; in its units: a step of learning {step / both:.2f}, a batch of the metric {metric/both:.2f}")
    W = soco.matrix(max(layers.values(), key=lambda layer: layer.weight.numel()))[:2048, :2048].float()
    ours, book = seconds(lambda: rpca.rpca(W, tol=0, max_iter=10), 1), seconds(lambda: textbook_rpca(W, 10), 1)
    print(f"ten iterations of rpca, {tuple(W.shape)}: {1e3 * ours:.0f} ms, {book / ours:.1f} times as fast as the textbook")


if __name__ == "__main__":
    run(main, soco.CannotCompress)
