"""The command lines of soco.py, rpca.py and eval_ppl.py: flags, bad input, loading a model, and the report of a run."""
import argparse
import contextlib
import errno
import importlib
import json
import math
import os
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from common import UserError, is_first, processes
from common.folder import SCRIPT_OF, load, save
from common.layers import block_layers, matrix, swapped, untouched
from common.metric import collect_metric

BUNDLED = str(Path(__file__).resolve().parents[1] / "demo")     # a small GPT-2 that needs no download


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults and turns a wrong flag into a UserError."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def add(self, flag, help, **options):
        shown = "" if options.get("default") is None else f" (default: {options['default']})"
        self.add_argument(flag, help=help + shown, **options)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def whole(low, high=2 ** 31):
    """argparse type: a whole number from `low` to `high`."""
    def parse(text):
        if not re.fullmatch(r"-?\d+", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {low} to {high}")
        return int(text)
    return parse


def between(low, high, or_low=False):
    """argparse type: a number between `low` and `high`, which are excluded, but `low` not with or_low."""
    def parse(text):
        try:
            if low < float(text) < high or (or_low and float(text) == low):
                return float(text)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text} is not a number between {low} and {high}{'' if or_low else ', both excluded'}")
    return parse


def run(main):
    """Call a script's main(); bad input ends it with one line and exit code 2, a defect keeps its traceback.

    Of several processes that torchrun started, the first alone prints.
    """
    from transformers.utils import logging
    logging.set_verbosity_error()
    if not is_first():
        sys.stdout = open(os.devnull, "w")

    def fail(message):
        if is_first():
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)

    try:
        main()
    except (UserError, FloatingPointError) as error:
        fail(error)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        fail(f"{str(error).splitlines()[0]}: give a smaller --batch-size or --seqlen, or see --help for --host-weights and others")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG):
            raise
        fail(f"{error.filename or ''} {error.strerror}: give another place")
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted, nothing half written is left", file=sys.stderr)
        sys.exit(130)
    finally:
        processes.leave()


def add_model_flags(parser):
    parser.add("--model", "folder or hub id of a causal language model, dense or compressed", default=BUNDLED)
    parser.add("--revision", "of a hub model: a branch, tag or commit")
    parser.add("--trust-remote-code", "run the Python code that a hub model brings along", action="store_true")
    parser.add("--device", "cpu, cuda, cuda:1; auto takes CUDA if there is one", default="auto")
    parser.add("--dtype", "of the weights; auto is bfloat16 on CUDA, else float32", default="auto",
               choices=["auto", "float32", "bfloat16", "float16"])


# ---- models -----------------------------------------------------------------------------------

def pick_device(name):
    """torch.device for "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1", ...; under torchrun each process has its own."""
    if name in ("auto", "cuda"):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() or name == "cuda" else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such device; use cpu, cuda or auto") from error
    if device.type not in ("cpu", "cuda"):           # not mps: it has no float64
        raise UserError(f"--device {name}: nothing can be computed there; use cpu, cuda or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def pick_dtype(name, device):
    """torch.dtype for "auto" (bfloat16 on CUDA, else float32), "float32", "bfloat16", "float16"."""
    return getattr(torch, name) if name != "auto" else torch.bfloat16 if device.type == "cuda" else torch.float32


def load_model(name, device, dtype, **options):
    """(model, tokenizer) of a local folder, dense or compressed, or of a hub id; only safetensors is read.

    options: revision and trust_remote_code, as for from_pretrained.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer
    try:
        if Path(name).is_dir():
            config = json.loads((Path(name) / "config.json").read_text())
            method = (config.get("quantization_config") or {}).get("quant_method")
            if method in SCRIPT_OF:
                importlib.import_module(SCRIPT_OF[method])       # teaches transformers to load such a folder
        AutoConfig.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = load(name, dtype=dtype, **options).to(device)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        causes = [error]
        while causes[-1].__cause__ or causes[-1].__context__:
            causes.append(causes[-1].__cause__ or causes[-1].__context__)
        reason = " ".join(str(error).split())[:300]
        if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            reason = "it is neither a folder nor a model on the hub"
        elif any(isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)) for cause in causes):
            reason = "it is no folder, and the hub is out of reach"
        raise UserError(f"cannot load --model {name}: {reason}; give a folder that holds a transformers model "
                        f"(config.json, model.safetensors), or leave --model out for the bundled one") from error
    bad = next((key for key, value in model.state_dict().items() if not value.isfinite().all()), None)
    if bad:
        raise UserError(f"--model {name}: tensor {bad} holds NaN or infinity in {dtype}; mend the weights or use --dtype float32")
    return model, tokenizer


def longest_input(model):
    """Tokens that a model reads at a time, or None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_seqlen(flag, seqlen, model):
    longest = longest_input(model)
    if longest and seqlen > longest:
        raise UserError(f"{flag} {seqlen}: this model reads at most {longest} tokens at a time")


# ---- a run: from checked arguments to the saved folder and its report -----------------------------

def run_parser(description, metric_batches=16):
    """The flags that soco.py and rpca.py share."""
    parser = Parser(description)
    add_model_flags(parser)
    parser.add("--host-weights", "keep the model in main memory and work on one matrix at a time on --device", action="store_true")
    parser.add("--ratio", "share of the block weights' numbers to remove", type=between(0, 1), default=0.5)
    parser.add("--calib", "text to learn from, its train split: wikitext2, stdlib or a file (default: stdlib for the bundled model, else wikitext2)")
    parser.add("--eval", "text for perplexity, its test split; named like --calib, and not the same file")
    parser.add("--same-text", "allow --calib and --eval to be the same file", action="store_true")
    parser.add("--seqlen", "tokens a calibration block", type=whole(8), default=256)
    parser.add("--batch-size", "blocks a batch", type=whole(1), default=4)
    parser.add("--metric-batches", "batches that the metric is collected on", type=whole(1), default=metric_batches)
    parser.add("--eval-seqlen", "tokens a window of the perplexities (default: what the model reads, at most 2048)", type=whole(2))
    parser.add("--eval-stride", "tokens from one window to the next (default: --eval-seqlen)", type=whole(1))
    parser.add("--eval-blocks", "score only the first so many windows (default: all)", type=whole(1))
    parser.add("--seed", "of the choice and order of calibration blocks and of drawn labels", type=whole(0), default=0)
    parser.add("--out", "folder to write (default: a fresh one under out/)")
    parser.add("--overwrite", "replace the folder --out, if it holds a compressed model", action="store_true")
    return parser


def sample_blocks(ids, seqlen, count, seed):
    """`count` blocks of `seqlen` tokens [count, seqlen] of a text's ids [tokens], without overlap, in random order;
    the order repeats when the text has fewer."""
    blocks = ids[:len(ids) // seqlen * seqlen].view(-1, seqlen)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed), device="cpu")
    return blocks[order.repeat(count // len(blocks) + 1)[:count]]


class Job:
    """What soco.py and rpca.py do around their method: check and load, time the phases, score models, save, report."""

    def __init__(self, args, method):
        self.args, self.method, self.rows, self.seconds = args, method, {}, {}
        self.folder = check_out(args, method)
        self.device = pick_device(args.device)
        self.dtype = pick_dtype(args.dtype, self.device)
        processes.join(self.device.type)
        if args.batch_size % processes.world():
            raise UserError(f"--batch-size {args.batch_size} cannot be shared out among {processes.world()} processes: give a multiple")
        own = "stdlib" if args.model == BUNDLED else "wikitext2"
        args.calib, args.eval = args.calib or own, args.eval or own
        if Path(args.calib).is_file() and Path(args.eval).is_file() and Path(args.calib).samefile(args.eval) and not args.same_text:
            raise UserError(f"--calib and --eval are both {args.eval}: perplexity on the text that was learned from says "
                            f"little; give another file, or --same-text if you mean it")
        with self.clock("load"):
            self.load()

    def load(self):
        from eval_ppl import load_tokens
        args = self.args
        self.model, self.tokenizer = load_model(args.model, "cpu" if args.host_weights else self.device, self.dtype,
                                                revision=args.revision, trust_remote_code=args.trust_remote_code)
        try:
            layers = block_layers(self.model)
        except UserError as error:
            raise UserError(f"--model {args.model}: {error}") from error
        self.shapes = {name: (*matrix(layer).shape, layer.bias is not None) for name, layer in layers.items()}
        args.eval_seqlen = args.eval_seqlen or min(longest_input(self.model) or 2048, 2048)
        args.eval_stride = args.eval_stride or args.eval_seqlen
        if args.eval_stride > args.eval_seqlen:
            raise UserError(f"--eval-stride {args.eval_stride} is longer than --eval-seqlen {args.eval_seqlen}: it would skip text")
        check_seqlen("--seqlen", args.seqlen, self.model)
        check_seqlen("--eval-seqlen", args.eval_seqlen, self.model)
        self.eval_ids = load_tokens(self.tokenizer, args.eval, "test", args.eval_seqlen)
        self.calib_ids = load_tokens(self.tokenizer, args.calib, "train", args.seqlen)
        self.dense_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.untouched = untouched(self.model, layers)
        torch.manual_seed(args.seed)

    def batches(self, count):
        """`count` batches of calibration blocks, each [batch, seqlen]; the same first ones whatever the count.

        Of several processes, each gets its own rows of every batch.
        """
        blocks = sample_blocks(self.calib_ids, self.args.seqlen, count * self.args.batch_size, self.args.seed)
        return [batch[processes.rank()::processes.world()] for batch in blocks.split(self.args.batch_size)]

    def metrics(self):
        with self.clock("metric"):
            return collect_metric(self.model, block_layers(self.model), self.batches(self.args.metric_batches), progress=True)

    def baseline(self, key, label, make, pruned=False):
        """Score the model with the layers that make() gives, {dense layer: another}, for the length of the measurement."""
        with self.clock("baselines"):
            new = make()
        with swapped(self.model, new):
            self.score(key, label, pruned)

    @contextlib.contextmanager
    def clock(self, phase):
        """Add the time of a with block to seconds[phase]."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(self.seconds.get(phase, 0) + time.perf_counter() - start, 2)

    def score(self, key, label, pruned=False):
        """Perplexity of self.model as it is now: a row of the table, printed at once. pruned: as for `block_numbers`."""
        from eval_ppl import perplexity
        with self.clock("eval"):
            try:
                result = perplexity(self.model, self.eval_ids, self.args.eval_seqlen, self.args.eval_stride,
                                    self.args.eval_blocks, progress=True)
            except FloatingPointError as error:
                raise UserError(f"--model {self.args.model}, {label}: {error}") from error
        kept, size = block_numbers(self.model, self.shapes, self.dtype.itemsize, pruned)
        if not self.rows:
            self.print_settings(result.tokens)
        self.rows[key] = {"label": label, "ppl": result.ppl, "nll": result.nll, "kept": kept,
                          "gap": result.nll - next(iter(self.rows.values()))["nll"] if self.rows else 0.0}
        print(f"{label:34} {result.ppl:12.2f} {self.rows[key]['gap']:9.4f} {kept:14,} {size / 1e6:10.1f}", flush=True)

    def print_settings(self, tokens):
        args = self.args
        self.eval = {"data": args.eval, "split": "test", "seqlen": args.eval_seqlen, "stride": args.eval_stride,
                     "tokens": tokens, "dtype": str(self.dtype).removeprefix("torch.")}
        print("settings: " + ", ".join(f"{name} {value}" for name, value in vars(args).items()))
        print("perplexity: " + ", ".join(f"{name} {value}" for name, value in self.eval.items()) + f", device {self.device}")
        print(f"{'':34} {'perplexity':>12} {'gap':>9} {'block numbers':>14} {'MB':>10}")

    def finish(self, kept):
        """Save the compressed model with its tokenizer, metrics.json and model card; print where.

        kept: {name: {"rank": of the matrix or "dense", "nonzeros": of its sparse part, if it has one}}.
        """
        layers = [{"name": name, "shape": (m, n), **kept[name], "kept": block_numbers(self.model, {name: (m, n, bias)})[0]}
                  for name, (m, n, bias) in self.shapes.items()]
        compressible = sum(m * n for m, n, _ in self.shapes.values())
        print("kept share of each matrix, block by block, in tenths (D: all of it)\n" + allocation(layers))
        print("not touched: " + "; ".join(f"{name} {' x '.join(map(str, shape))} ({reason})" for name, shape, reason in self.untouched))
        if processes.rank():
            return

        def extra(folder):
            self.tokenizer.save_pretrained(folder)
            report = {
                "method": self.method, "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
                **vars(self.args), "compressible_params": compressible,
                "kept_params": self.rows["compressed"]["kept"], "dense_bytes": self.dense_bytes,
                "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
                "seconds": self.seconds, "peak_memory_bytes": peak_memory(self.device),
                "ppl": {key: row["ppl"] for key, row in self.rows.items()},
                "gap": {key: row["gap"] for key, row in self.rows.items()},
                "eval": self.eval, "versions": {"torch": torch.__version__}, "layers": layers}
            report["untouched"] = [{"name": name, "shape": shape, "reason": reason} for name, shape, reason in self.untouched]
            report["device"], report["dtype"], report["processes"] = str(self.device), self.eval["dtype"], processes.world()
            (folder / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
            (folder / "README.md").write_text(model_card(report, self.rows))
            self.report = report

        folder = self.folder or fresh_folder(self.args, self.method)
        save(self.model, folder, overwrite=self.args.overwrite, extra=extra)
        report = self.report
        print(f"kept {report['kept_params'] / compressible:.4f} of {compressible:,} block numbers; file "
              f"{report['file_bytes'] / 1e6:.1f} MB, dense {report['dense_bytes'] / 1e6:.1f} MB; peak memory "
              f"{report['peak_memory_bytes'] / 1e9:.2f} GB; seconds {self.seconds}")
        print(f"written to {folder}; score it again with: python eval_ppl.py --model {folder} --eval {self.args.eval} "
              f"--seqlen {self.args.eval_seqlen} --stride {self.args.eval_stride}")


def allocation(layers):
    """Lines of text: the kept share of each matrix, block by block, in tenths; D is all of it."""
    rows = {}
    for layer in layers:
        share = layer["kept"] / math.prod(layer["shape"])
        kind = ".".join("*" if part.isdigit() else part for part in layer["name"].split("."))
        rows[kind] = rows.get(kind, "") + ("D" if share >= 1 else str(int(10 * share)))
    return "\n".join(f"  {kind:34} {row}" for kind, row in rows.items())


def block_numbers(model, shapes, itemsize=1, pruned=False):
    """(numbers, bytes) stored now for the block weights of `shapes` {name: (m, n, whether it had a bias)}.

    Counted after the fact, from the modules; a bias that was there before compression does not count. pruned: the
    matrices are in dense form and count without their zeros, and with the bytes of a bitmask.
    """
    numbers = size = 0
    for name, (m, n, bias) in shapes.items():
        layer = model.get_submodule(name)
        zeros = (layer.weight == 0).sum().item() if pruned else 0
        count = sum(p.numel() for p in layer.parameters()) - zeros - m * bias
        numbers, size = numbers + count, size + count * itemsize + (m * n // 8 if pruned or hasattr(layer, "mask") else 0)
    return numbers, size


def peak_memory(device):
    """Bytes: most allocated on a CUDA device so far, else the most this process has had in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fresh_folder(args, method):
    """out/MODEL-METHOD-RATIO, with the first number behind it that makes it new."""
    model = re.sub(r"[^\w.-]+", "-", "demo" if args.model == BUNDLED else args.model.rstrip("/").split("/")[-1])
    stem = Path("out") / f"{model}-{method}-{args.ratio:g}"
    return next(path for i in range(1, 10 ** 6) if not (path := stem if i == 1 else Path(f"{stem}-{i}")).exists())


def check_out(args, method):
    """The folder to write, or None for a fresh one; a UserError if it is taken or can't be written."""
    folder = Path(args.out) if args.out else None
    if folder and folder.exists():
        if not args.overwrite:
            raise UserError(f"--out {folder} exists: give another folder, or --overwrite")
        config = folder / "config.json"
        known = config.is_file() and any(f'"quant_method": "{known}"' in config.read_text() for known in SCRIPT_OF)
        if not folder.is_dir() or (any(folder.iterdir()) and not known):
            raise UserError(f"--out {folder} holds something other than a compressed model, which --overwrite does not replace")
    parent = (folder or Path("out") / "x").absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryDirectory(dir=parent):
            return folder
    except OSError as error:
        raise UserError(f"--out {folder or 'out'}: cannot write in {parent} ({error.strerror}); give another folder") from error


def model_card(report, rows):
    """The README.md of a compressed folder."""
    script = SCRIPT_OF[report["method"]]
    lines = [f"| {row['label']} | {row['ppl']:.2f} | {row['gap']:.4f} | {row['kept']:,} |" for row in rows.values()]
    settings = ", ".join(f"{key} {value}" for key, value in report["eval"].items())
    return f"""---
library_name: transformers
tags: [{report['method']}, compressed]
---
# {Path(report['model']).name}, compressed by {report['method']} at ratio {report['ratio']}

{report['ratio']:.0%} of the numbers in the block weights are removed.

| | perplexity | gap (nats a token) | numbers in the block weights |
| --- | --- | --- | --- |
{chr(10).join(lines)}

Perplexity: {settings}.
File: {report['file_bytes']:,} bytes, dense {report['dense_bytes']:,}.

Made by `{report['command']}`; every setting is in metrics.json. To load it, with {script}.py and common/ at hand:

```python
import {script}                                    # without this import, loading stops with a shape error
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
```
"""
