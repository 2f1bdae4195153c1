"""ARC-Challenge and RULER-CWE by lm-eval's own tasks, on the prepared files and a model that is already loaded.

The stock task definitions are read from the installed lm-eval and keep their prompt, metric and stopping rule; only
where the documents come from is changed: from memory, so that nothing reaches for the network and no task file holds
a path of this machine. Decoding is greedy.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.errors import InputError
from tasks.common.progress import Progress, Report
from tasks.evaluation.perplexity import context_length

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_arc(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Path,
    *,
    batch_size: int,
    report: Report | None = None,
) -> pa.Table:
    """ARC-Challenge, zero-shot.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        questions: JSONL with the fields of allenai/ai2_arc.
        batch_size: prompts in a forward pass.
        report: told the share done.

    Returns:
        A row a question: ``doc_id``, ``doc_hash`` and ``prompt_hash`` (lm-eval's), ``acc`` and ``acc_norm`` (0 or 1).

    Raises:
        InputError: a question does not fit the model's context.
    """
    import pyarrow as pa

    task = _stock("arc/arc_challenge.yaml", questions)
    samples = _run(
        model, tokenizer, task, questions, batch_size=batch_size, label="ARC-Challenge", truncate=False, report=report
    )
    schema = pa.schema([*_ids(), ("acc", pa.float64()), ("acc_norm", pa.float64())])
    return pa.Table.from_pylist([{**sample, "doc_id": sample["doc"]["id"]} for sample in samples], schema)


def evaluate_cwe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Path,
    *,
    batch_size: int,
    truncate: bool,
    report: Report | None = None,
) -> pa.Table:
    """RULER's common-word extraction.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: JSONL that :func:`tasks.evaluation.cwe.generate` made.
        batch_size: prompts generated from at a time.
        truncate: cut a prompt that does not fit from the left, and do not refuse it.
        report: told the share done.

    Returns:
        A row a prompt: ``doc_id``, ``doc_hash`` and ``prompt_hash`` (lm-eval's), ``prompt_tokens``, ``kept_tokens``
        (fewer where the prompt was cut), ``answer``, ``score`` (share of the ten words named, 0 to 1).

    Raises:
        InputError: a prompt with its answer does not fit the model's context and ``truncate`` is false.
    """
    import pyarrow as pa
    from lm_eval.tasks.ruler.common_utils import process_results

    task = _stock("ruler/cwe.yaml", prompts)
    # Named by its length, as in RULER; the stock list of lengths starts at 4096 and knows no other.
    length = str(_read(prompts)[0]["max_length"])
    task["metric_list"] = [{"metric": length, "aggregation": "mean", "higher_is_better": True}]
    task["process_results"] = process_results
    samples = _run(
        model, tokenizer, task, prompts, batch_size=batch_size, label="RULER-CWE", truncate=truncate, report=report
    )
    rows = [
        {
            **sample,
            "doc_id": str(sample["doc"]["index"]),
            "answer": sample["filtered_resps"][0],
            "score": sample[length],
        }
        for sample in samples
    ]
    schema = pa.schema(
        [
            *_ids(), ("prompt_tokens", pa.int64()), ("kept_tokens", pa.int64()),
            ("answer", pa.string()), ("score", pa.float64()),
        ]
    )  # fmt: skip
    return pa.Table.from_pylist(rows, schema)


def _ids() -> list[tuple[str, pa.DataType]]:
    import pyarrow as pa

    return [(name, pa.string()) for name in ("doc_id", "doc_hash", "prompt_hash")]


def _stock(name: str, documents: Path) -> dict[str, Any]:
    """lm-eval's task definition ``name``, zero-shot, over ``documents`` as its test split."""
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.tasks._yaml_loader import load_yaml

    rows = _read(documents)
    # Functions stay unresolved: resolving those of RULER imports a module that downloads NLTK data.
    task: dict[str, Any] = load_yaml(Path(lm_eval.tasks.__file__).parent / name, resolve_func=False)
    return {
        **task,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "training_split": None,
        "validation_split": None,
        "num_fewshot": 0,
    }


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    definition: dict[str, Any],
    file: Path,
    *,
    batch_size: int,
    label: str,
    truncate: bool,
    report: Report | None,
) -> list[dict[str, Any]]:
    """lm-eval's samples in the order of ``file``, with ``prompt_tokens`` and ``kept_tokens`` of each.

    ``evaluate`` and not ``simple_evaluate``: the latter also asks the hub for the model's revision and collects the
    machine's environment, which takes longer than a small evaluation.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    context = context_length(model)
    with _quiet():
        loaded = TaskManager(include_defaults=False).load([definition])
        (name, task), = loaded["tasks"].items()
        task.build_all_requests(rank=0, world_size=1)
        with Progress(label, len(task.instances), "prompts", report=report) as progress:
            lm = _language_model(model, tokenizer, context, batch_size, progress)
            sizes = _sizes(lm, task.instances, context, file, refuse=not truncate)
            samples: list[dict[str, Any]] = evaluate(lm, loaded, bootstrap_iters=0, log_samples=True)["samples"][name]
    return [
        {**sample, "prompt_tokens": prompt, "kept_tokens": kept}
        for sample, (prompt, kept) in zip(samples, sizes, strict=True)
    ]


def _sizes(lm: Any, instances: list[Any], context: int, file: Path, *, refuse: bool) -> list[tuple[int, int]]:
    """(tokens, tokens kept) of each document's longest prompt.

    Raises:
        InputError: ``refuse``, and a prompt with its answer is longer than the model's context.
    """
    sizes: dict[int, tuple[int, int]] = {}
    for instance in instances:
        prompt, answer = instance.args  # the answer is a text to be scored, or how to generate one
        tokens = len(lm.tok_encode(prompt))
        room = len(lm.tok_encode(answer)) if isinstance(answer, str) else int(answer["max_gen_toks"])
        if refuse and tokens + room > context:
            raise InputError(
                f"the prompt has {tokens} tokens and the answer up to {room}, the model's context is {context}; "
                "make shorter ones (ruler_cwe.length), or ask for the cut from the left (ruler_cwe.truncate: true)",
                file=file, row=instance.doc_id + 1,
            )  # fmt: skip
        sizes[instance.doc_id] = max(sizes.get(instance.doc_id, (0, 0)), (tokens, min(tokens, context - room)))
    return [sizes[i] for i in sorted(sizes)]


def _language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int, batch_size: int, progress: Progress
) -> Any:
    """lm-eval's view of a loaded model, with our progress bar in place of its own."""
    from lm_eval.models.huggingface import HFLM

    class Counted(HFLM):  # type: ignore[misc]
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

        def _model_call(self, inps: torch.Tensor, **arguments: Any) -> Any:
            logits = super()._model_call(inps, **arguments)
            progress.add(len(inps))
            return logits

        def _model_generate(self, context: torch.Tensor, *arguments: Any, **named: Any) -> Any:
            tokens = super()._model_generate(context, *arguments, **named)
            progress.add(len(context))
            return tokens

    return Counted(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=context)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its advice on how to be called and its bar for building prompts, which takes no time."""
    import lm_eval.api.task
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = tqdm
        logger.setLevel(level)
