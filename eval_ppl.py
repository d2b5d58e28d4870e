"""Perplexity of any causal language model, dense or compressed, by a stated protocol.

    python eval_ppl.py                                     # the bundled model, offline, on a laptop
    python eval_ppl.py --model gpt2 --eval-seqlen 1024     # GPT-2 on WikiText-2
    python eval_ppl.py --model out/FOLDER --eval text.txt  # what soco.py or rpca.py wrote

Protocol. The text is tokenised in one piece and cut into blocks of `seqlen` tokens; the tail is
dropped; each block is scored alone, its first token not scored; one sum of nats over one count of
tokens. With a stride smaller than `seqlen`, windows overlap and every token is scored once. With
--bos the tokenizer's <bos> takes the place of every block's first token, for models that have
always seen it, such as Gemma. Perplexities of different protocols do not compare.
"""
import argparse
import importlib
import json
import math
import resource
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

BUNDLED = str(Path(__file__).resolve().parent / "demo")      # a small GPT-2, and text for it


@torch.no_grad()
def perplexity(model, ids, seqlen, stride=None, blocks=None, bos=None, progress=False):
    """(perplexity, nats a token, tokens scored) of `ids` [tokens], in windows of `seqlen` tokens.

    stride: tokens from one window to the next (default seqlen). blocks: score only so many windows.
    bos: a token in place of the first of every window. Raises ValueError without a whole window,
    FloatingPointError for a result that is not finite.
    """
    stride = stride or seqlen
    starts = range(0, len(ids) - seqlen + 1, stride)[:blocks]
    if not starts or not 1 <= stride <= seqlen or seqlen < 2:
        raise ValueError(f"{len(ids)} tokens, seqlen {seqlen}, stride {stride}: no window to score")
    device = model.get_input_embeddings().weight.device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    nats, tokens, at_once = 0.0, 0, max(1024 // seqlen, 1)         # windows in one forward pass
    for first in tqdm(range(0, len(starts), at_once), desc="perplexity", leave=False,
                      disable=None if progress else True):         # None: shown on a terminal
        windows = [ids[start:start + seqlen] for start in starts[first:first + at_once]]
        windows = torch.stack(windows).to(device)
        if bos is not None:
            windows[:, 0] = bos
        logits = model(input_ids=windows, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        targets = windows[:, 1:].clone()
        targets[0 if first else 1:, :max(seqlen - stride - 1, 0)] = -100  # scored a window ago
        nats += F.cross_entropy(logits, targets.flatten().to(logits.device), reduction="sum").item()
        tokens += int((targets >= 0).sum())
    for module, training in modes.items():
        module.training = training
    if not math.isfinite(nats):
        raise FloatingPointError(f"perplexity is {nats} in {model.dtype}: try --dtype float32")
    return math.exp(min(nats / tokens, 700)), nats / tokens, tokens


# ---- texts and models ----

def wikitext2(split):
    """WikiText-2 raw (Merity et al. 2016) from the hub: `split` is train or test."""
    from huggingface_hub import hf_hub_download
    path = hf_hub_download("ggml-org/ci", "wikitext-2-raw-v1.zip", repo_type="dataset")
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith(f"wiki.{split}.raw"))
        lines = archive.read(name).decode("utf-8").splitlines(keepends=True)
    return "\n\n".join(line if line.strip() else "" for line in lines)


def load_tokens(tokenizer, name, split, seqlen):
    """Token ids [tokens], at least `seqlen`, of a file, or of "wikitext2" in its train or test
    split. In text to learn from, WikiText's mark of a rare word, <unk>, is left out: it is no text.
    """
    try:
        text = wikitext2(split) if name == "wikitext2" else Path(name).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read text {name} ({type(error).__name__}): give a UTF-8 file, or "
                         "wikitext2, which needs the hub") from error
    text = text.replace(" <unk>", "") if split == "train" else text
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0].long()
    if len(ids) < seqlen:
        raise ValueError(f"text {name} has {len(ids)} tokens: give one of at least {seqlen}")
    return ids


def load_model(name, device="auto", dtype="auto", device_map=None):
    """(model, tokenizer) of a folder, dense or compressed, or of a hub id; safetensors only.
    Raises ValueError, in one line, for what cannot be loaded whole."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if device.startswith("cuda") and dtype != "float32":  # TF32 holds 16-bit numbers exactly
        torch.set_float32_matmul_precision("high")
    try:
        torch.empty(0, device=device)
        config = Path(name, "config.json")
        compressed = json.loads(config.read_text()).get("compressed") if config.is_file() else None
        if compressed:  # the script that knows its layers
            importlib.import_module({"soco": "soco", "cap": "rpca"}[compressed["method"]])
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), device_map=device_map, use_safetensors=True,
            output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"tensor {min(info['missing_keys'])} is missing")
    except Exception as error:  # whatever the libraries raise
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"cannot load --model {name} on {device}: {why}; give a folder with "
                         "config.json, model.safetensors and a tokenizer, or a hub id") from error
    return model if device_map else model.to(device), tokenizer


def longest_window(model):
    """Tokens that a model reads at a time, or infinity."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_seq_length")
    return min((size for name in names if (size := getattr(config, name, None))), default=math.inf)


# ---- the command line, and what runs of soco.py and rpca.py share ----

class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, with the flags of a model and a text."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        add = self.add_argument
        add("--model", default=BUNDLED, help="folder or hub id (default: a small GPT-2 in demo/)")
        add("--device", default="auto", help="cpu, cuda, ...; auto: CUDA if there is one")
        add("--device-map", help="auto: over several GPUs, in place of --device; needs accelerate")
        add("--dtype", default="auto", help="of the weights (bfloat16 on CUDA, else float32)",
            choices=["auto", "float32", "bfloat16", "float16"])
        add("--eval", help="text to score: a file or wikitext2 (bundled model: demo/test.txt)")
        add("--eval-seqlen", type=int, help="tokens a window (the model's longest, to 2048)")
        add("--eval-stride", type=int, help="tokens from one window to the next (default: all)")
        add("--eval-blocks", type=int, help="score only the first so many windows (default: all)")
        add("--bos", action="store_true", help="the tokenizer's <bos> as each block's first token")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")


def run_parser(description, steps, lr, metric_batches):
    """The parser of soco.py and rpca.py, from their defaults."""
    parser = Parser(description)
    add = parser.add_argument
    add("--ratio", type=float, default=0.5, help="share of the block weights to remove (0.5)")
    add("--calib", help="text to learn from: a file or wikitext2 (default: as for --eval)")
    add("--seqlen", type=int, default=256, help="tokens a calibration block (256)")
    add("--batch-size", type=int, default=4, help="blocks a batch (4)")
    add("--metric-batches", type=int, default=metric_batches, help="to measure on (%(default)s)")
    add("--steps", type=int, help=f"of learning (default: {steps} * ratio)")
    add("--lr", type=float, default=lr, help="Adam's rate, times the ratio (%(default)s)")
    add("--no-baselines", action="store_true", help="leave them out: they need memory")
    add("--seed", type=int, default=0, help="of calibration blocks and of drawn labels (0)")
    add("--out", help="folder to write, new or empty (default: a fresh one under out/)")
    parser.steps = steps
    return parser


class Run:
    """What a command reads. Bad input ends it here, in one line."""

    def __init__(self, parser):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.parser, self.args = parser, parser.parse_args()
        try:
            self.read()
        except (OSError, ValueError) as error:
            parser.error(error)

    def read(self):
        args = self.args
        self.model, self.tokenizer = load_model(args.model, args.device, args.dtype,
                                                args.device_map)
        longest = longest_window(self.model)
        args.eval_seqlen = args.eval_seqlen or min(longest, 2048)
        if max(args.eval_seqlen, getattr(args, "seqlen", 0)) > longest:
            raise ValueError(f"--seqlen, --eval-seqlen: the model reads at most {longest} tokens")
        self.bos = self.tokenizer.bos_token_id if args.bos else None
        if args.bos and self.bos is None:
            raise ValueError("--bos: this tokenizer has no <bos>")
        args.eval = args.eval or self.default_text("test")
        self.ids = load_tokens(self.tokenizer, args.eval, "test", args.eval_seqlen)

    def default_text(self, split):
        bundled = Path(self.args.model).resolve() == Path(BUNDLED)
        return f"{BUNDLED}/{split}.txt" if bundled else "wikitext2"

    def score(self):
        return perplexity(self.model, self.ids, self.args.eval_seqlen, self.args.eval_stride,
                          self.args.eval_blocks, self.bos, progress=True)


class CompressionRun(Run):
    """What soco.py or rpca.py reads, the table it prints, and what it adds to the saved folder."""

    def __init__(self, parser, method, find_layers):
        self.method, self.find_layers, self.rows = method, find_layers, {}
        super().__init__(parser)
        self.start = self.last = time.time()

    def read(self):
        args = self.args
        if not 0 < args.ratio < 1:
            raise ValueError(f"--ratio {args.ratio} is not between 0 and 1")
        if args.out and Path(args.out).exists() and any(Path(args.out).iterdir()):
            raise ValueError(f"--out {args.out} exists: give a new or an empty folder")
        name = f"{Path(args.model).resolve().name}-{self.method}-{args.ratio:g}"
        args.out = args.out or f"out/{name}"  # or the next free name
        args.steps = round(self.parser.steps * args.ratio) if args.steps is None else args.steps
        super().read()
        args.calib = args.calib or self.default_text("train")
        self.layers, self.batches = self.find_layers(self.model), self.calibration()
        self.dense_bytes = sum(p.nbytes for p in self.model.parameters())

    def calibration(self):
        """Batches [batch, seqlen] of a text's blocks in random order; a short text is repeated."""
        args = self.args
        torch.manual_seed(args.seed)
        ids = load_tokens(self.tokenizer, args.calib, "train", args.seqlen)
        blocks = ids[:len(ids) // args.seqlen * args.seqlen].view(-1, args.seqlen)
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(args.seed))
        wanted = args.batch_size * max(args.steps, args.metric_batches)
        blocks = blocks[order.repeat(wanted // len(blocks) + 1)[:wanted]]
        if self.bos is not None:
            blocks[:, 0] = self.bos
        return blocks.split(args.batch_size)

    def row(self, key, label, kept):
        """Score the model, whose block weights have `kept` parameters, and print a row."""
        seconds = time.time() - self.last  # from the row before to this one
        ppl, nll, tokens = self.score()
        if not self.rows:
            print(f"settings: {vars(self.args)}\n{tokens} tokens, {self.model.dtype}\n\n"
                  f"{'':32} {'perplexity':>12} {'gap':>9} {'parameters':>14} {'seconds':>9}")
        gap = nll - self.rows["dense"]["nll"] if self.rows else 0.0
        self.rows[key] = {"ppl": ppl, "nll": nll, "gap": gap, "kept": kept, "seconds": seconds}
        print(f"{label:32} {ppl:12.2f} {gap:9.4f} {kept:14,} {seconds:9.1f}", flush=True)
        self.last = time.time()

    def add_files(self, folder, layers, **more):
        """Add the tokenizer, metrics.json and a card to the compressed model's folder."""
        self.tokenizer.save_pretrained(folder)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if torch.cuda.is_available():
            peak = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
        metrics = vars(self.args) | more | {
            "method": self.method, "ppl": {key: row["ppl"] for key, row in self.rows.items()},
            "compressible_params": sum(math.prod(layer["shape"]) for layer in layers),
            "kept_params": sum(layer["kept"] for layer in layers),
            "dense_bytes": self.dense_bytes, "peak_memory_bytes": peak,
            "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            "seconds": time.time() - self.start, "rows": self.rows, "layers": layers}
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
        (folder / "README.md").write_text(
            f"# {self.args.model}, compressed by {self.method} at ratio {self.args.ratio}\n\n"
            "Settings and perplexities: metrics.json. To load it, which runs compressed.py:\n\n"
            "    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)\n")


def main():
    run = Run(Parser(__doc__))
    ppl, nll, tokens = run.score()
    print(f"perplexity {ppl:.4f} ({nll:.5f} nats a token; {tokens} tokens of {run.args.eval}, "
          f"seqlen {run.args.eval_seqlen}, {str(run.model.dtype)[6:]}, {run.model.device})")


if __name__ == "__main__":
    main()
