"""The same text scored twice, by the EleutherAI harness (`pip install lm_eval`) and by eval_ppl.py.

    python bench/harness.py --model out/FOLDER                                   # compressed or dense
    python bench/harness.py --model out/FOLDER --tasks arc_easy hellaswag piqa   # accuracies; needs the hub

The harness scores every token once, in windows of L tokens after one token of context: eval_ppl.py's sliding
window of L + 1 tokens with stride L, over the text after the harness's prefix token.
"""
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_ppl

LENGTH = 128


def main():
    parser = eval_ppl.Parser(__doc__)
    eval_ppl.add_model_flags(parser)
    parser.add_argument("--eval", help="text, its test split (default: what the folder was scored on)")
    parser.add_argument("--tasks", nargs="+", help="tasks of the harness, in place of a text")
    args = parser.parse_args()
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    device, metrics = eval_ppl.pick_device(args.device), Path(args.model, "metrics.json")
    model, tokenizer = eval_ppl.load_model(
        args.model, device, eval_ppl.pick_dtype(args.dtype, device), args.device_map, revision=args.revision,
        trust_remote_code=args.trust_remote_code)
    if args.tasks:
        found = simple_evaluate(HFLM(model, tokenizer=tokenizer), tasks=args.tasks)["results"]
        return print(json.dumps(found, indent=1))
    data = args.eval or eval_ppl.default_text(args.model)
    if metrics.is_file() and not args.eval:
        data = json.loads(metrics.read_text())["eval"]["data"]
    words = eval_ppl.load_text(data, "test").split(" ")[:2000]
    while len(ids := eval_ppl.encode(tokenizer, " ".join(words))) % LENGTH:      # until it is whole windows
        words.pop()
    text = Instance("loglikelihood_rolling", {}, (" ".join(words),), 0)
    harness = HFLM(model, tokenizer=tokenizer, max_length=LENGTH)
    theirs = -harness.loglikelihood_rolling([text], disable_tqdm=True)[0] / len(ids)
    ids = torch.cat([torch.tensor([harness.prefix_token_id]), ids])
    ours = eval_ppl.perplexity(model, ids, LENGTH + 1, LENGTH).nll
    print(f"{data}, {len(ids) - 1} tokens: perplexity {math.exp(theirs):.5f} by the harness, "
          f"{math.exp(ours):.5f} by eval_ppl.py; relative difference of nats {abs(theirs / ours - 1):.1e}")


if __name__ == "__main__":
    eval_ppl.run(main, ImportError)
