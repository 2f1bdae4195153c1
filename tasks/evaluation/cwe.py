"""RULER-CWE prompts from lm-eval's own generator, in a process of their own.

The generator draws from random states that live in its module, so a second call in one process makes other prompts,
and arms evaluated in one process could not be compared. :func:`generate` therefore starts a fresh interpreter that runs
this module, with fixed seeds. Importing the generator alone, and not the stock task, keeps NLTK's download at import
out: common-word extraction does not use it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tasks.common.errors import InputError
from tasks.evaluation.config import CweConfig

COMMON_WORDS = 10
"""Words to be named in a prompt, by RULER's definition."""
FEWEST_WORDS = 20
"""Distinct words of the shortest prompt that means anything. The generator counts words by tens and goes down to ten
(all equally common) or none (an empty prompt) without a word when the length is too short."""
ANSWER_TOKENS = 120
"""Tokens that RULER keeps free for the answer."""


def generate(config: CweConfig, tokenizer: Path) -> list[dict[str, Any]]:
    """The prompts, each with ``input``, ``gen_prefix``, ``outputs`` (the ten words) and ``max_length``.

    Args:
        config: length, number and seed.
        tokenizer: directory of the tokenizer that measures the length.

    Raises:
        InputError: the length is too short for this tokenizer, or the generator failed.
    """
    arguments = [str(tokenizer), str(config.length), str(config.samples), str(config.seed)]
    source = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tasks.evaluation.cwe", *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise InputError(f"lm-eval's RULER-CWE generator failed: {reason}", file=tokenizer)
    answer = json.loads(done.stdout)
    if "needed" in answer:
        raise InputError(
            f"{config.length} tokens are too few for a RULER-CWE prompt with this tokenizer: its shortest takes about "
            f"{answer['needed']}, the answer and lm-eval's uncounted example included",
            field="ruler_cwe.length",
        )
    documents: list[dict[str, Any]] = answer["documents"]
    return documents


def _main(tokenizer_path: str, length: int, samples: int, seed: int) -> dict[str, Any]:
    """Runs in the fresh process: ``{"documents": [...]}``, or ``{"needed": tokens}`` for a length that is too short."""
    import random

    from lm_eval.tasks.ruler import cwe_utils
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=False)
    drawn = cwe_utils.RNG.getstate()
    random.seed(seed)
    example, prompt, words = cwe_utils.generate_input_output(FEWEST_WORDS, length, num_cw=COMMON_WORDS)
    numbered = " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))
    counted = f"{example}\n{prompt} {numbered}"
    sent, needed = (len(tokenizer(text).input_ids) + ANSWER_TOKENS for text in (prompt, counted))
    if sent > length:  # the generator would try for ever
        return {"needed": needed}
    cwe_utils.RNG.setstate(drawn)
    random.seed(seed)
    made = cwe_utils.sys_word_pair_random(samples, length, tokenizer=tokenizer, tokens_to_generate=ANSWER_TOKENS)
    if any(_distinct_words(document["input"]) < FEWEST_WORDS for document in made):
        return {"needed": needed}
    kept = ("index", "input", "gen_prefix", "outputs", "length", "max_length")
    return {"documents": [{key: document[key] for key in kept} for document in made]}


def _distinct_words(prompt: str) -> int:
    """Distinct words of a prompt's list, which stands on its second line as ``1. word 2. word …``."""
    return len(set(prompt.split("\n")[1].split()[1::2]))


if __name__ == "__main__":
    path, *numbers = sys.argv[1:]
    print(json.dumps(_main(path, *map(int, numbers))))
