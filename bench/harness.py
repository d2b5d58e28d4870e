"""The same text scored twice, by the EleutherAI evaluation harness (`pip install lm_eval`) and by eval_ppl.py.

    python bench/harness.py --model out/FOLDER                       # a compressed folder, or any other model
    python bench/harness.py --model out/FOLDER --tasks arc_easy hellaswag piqa       # from the hub: accuracies

The harness's rolling log-likelihood scores every token once, in windows of L tokens that begin with one token of
context: eval_ppl.py's sliding window of L + 1 tokens with stride L, over the text after the harness's prefix token.
"""
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_ppl


def text_of(args, tokenizer):
    """The beginning of a text, whole windows; by default of the text that the folder was scored on."""
    metrics = Path(args.model, "metrics.json")
    scored_on = json.loads(metrics.read_text())["eval"]["data"] if metrics.is_file() else None
    text = eval_ppl.load_text(args.eval or scored_on or eval_ppl.default_text(args.model), "test")
    words = text[:20 * args.seqlen * args.blocks].split(" ")
    while len(ids := eval_ppl.encode(tokenizer, " ".join(words))) > args.seqlen * args.blocks or len(ids) % args.seqlen:
        words = words[:-max((len(ids) - args.seqlen * args.blocks) // 3, 1)]
    return " ".join(words), ids


def main():
    parser = eval_ppl.Parser(__doc__)
    eval_ppl.add_model_flags(parser)
    parser.add_argument("--eval", help="text to score, its test split (default: what the folder was scored on)")
    parser.add_argument("--seqlen", type=eval_ppl.whole(8), default=128, help="tokens a window")
    parser.add_argument("--blocks", type=eval_ppl.whole(1), default=16, help="windows to score")
    parser.add_argument("--tasks", nargs="+", help="tasks of the harness, in place of the text")
    args = parser.parse_args()
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise eval_ppl.UserError(f"the harness is not installed ({error}): pip install lm_eval") from error
    device = eval_ppl.pick_device(args.device)
    model, tokenizer = eval_ppl.load_model(args.model, device, eval_ppl.pick_dtype(args.dtype, device), args.device_map,
                                           revision=args.revision, trust_remote_code=args.trust_remote_code)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=None if args.tasks else args.seqlen, batch_size=1)
    if args.tasks:
        print(json.dumps(simple_evaluate(harness, tasks=args.tasks)["results"], indent=1))
        return
    text, ids = text_of(args, tokenizer)
    instance = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    theirs = -harness.loglikelihood_rolling([instance], disable_tqdm=True)[0] / len(ids)
    ids = torch.cat([torch.tensor([harness.prefix_token_id]), ids])
    ours = eval_ppl.perplexity(model, ids, args.seqlen + 1, args.seqlen).nll
    print(f"{len(ids) - 1} tokens: harness {theirs:.6f} nats a token (perplexity {math.exp(theirs):.4f}), "
          f"eval_ppl.py {ours:.6f} ({math.exp(ours):.4f}), relative difference {abs(theirs / ours - 1):.1e}")


if __name__ == "__main__":
    eval_ppl.run(main)
