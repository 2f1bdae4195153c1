"""The report: what it shows, that text in it stays text, and that it is the same page for the same study."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.common.errors import InputError
from tasks.common.files import read_json, write_json
from tasks.reporting.figures import purity_png
from tasks.reporting.paper import TABLE_4
from tasks.reporting.report import Facts, write_report
from tasks.reporting.results import gain_share, gather
from tasks.reporting.run import report_run
from tasks.reporting.table import WIDTH, results_markdown, results_table
from tasks.selection.ledger import open_ledger, write_ledger
from tests.unit.test_ledger import build_study

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&]]> $x_1$ {{ 7 * 6 }}"
FACTS = Facts(
    title="A study", date="2026-11-21", command="rise run demo.yaml", commit="abc", hardware={"cores": 2},
    versions={"torch": "2.13.0"}, digests={"pool": "d" * 64}, notes=["50 of 50 prompts were cut"],
    sources={"wikipedia": {"licence": "CC BY-SA", "what": "a slice"}},
)  # fmt: skip


class Page(HTMLParser):
    """Elements, attributes and text as a browser sees them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_ledger(folder / "study.duckdb", **build_study(folder / "files"))
    return folder / "study.duckdb"


@pytest.fixture(scope="module")
def page(ledger: Path) -> Page:
    out = ledger.parent / "report.html"
    write_report(ledger, {"name": "demo"}, FACTS, out, results_out=ledger.parent / "results.json", excerpts=True)
    return Page(out)


def test_shows_every_part(page: Page) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", page.source)
    assert headings == ["Results", "Selection", "Scores", "Training", "Data", "Excerpts", "Time", "The run"]
    assert [tag for tag, _ in page.elements].count("svg") == 4
    for words in ("55.10", "51.79 – 58.68", "paper 389.74", "in the paper only", "83 %", "longest first", "CC BY-SA",
                  "50 of 50 prompts were cut", "rise run demo.yaml", "2.13.0", "name: demo", "1 min 28 s"):  # fmt: skip
        assert words in page.text, words


def test_is_self_contained_and_runs_nothing(page: Page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
    policy = [attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert len(policy) == 1
    assert str(policy[0]).startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    for _, attrs in page.elements:
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "xlink:href"):
            assert (attrs.get(name) or "#").startswith("#")
    assert "@import" not in page.source
    assert not re.search(r"url\((?!#)", page.source)


def test_ids_are_unique_and_links_lead_somewhere(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids)) > 20
    targets = [attrs.get("href") or attrs.get("xlink:href") for _, attrs in page.elements]
    targets += [f"#{target}" for target in re.findall(r"url\(#([^)]+)\)", page.source)]
    assert {target[1:] for target in targets if target} <= set(ids)


def test_text_of_the_pool_stays_text(tmp_path: Path) -> None:
    write_ledger(tmp_path / "study.duckdb", **build_study(tmp_path / "files", hostile=HOSTILE))
    facts = Facts(title=HOSTILE, notes=[HOSTILE], command=HOSTILE, versions={HOSTILE: HOSTILE},
                  sources={HOSTILE: {"licence": HOSTILE, "what": HOSTILE}})  # fmt: skip
    out = tmp_path / "report.html"
    write_report(tmp_path / "study.duckdb", {HOSTILE: HOSTILE}, facts, out, excerpts=True)
    page = Page(out)
    assert not {tag for tag, _ in page.elements} & {"script", "img"}
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert "<script" not in page.source.lower()
    shown = " ".join(page.words)
    assert shown.count(HOSTILE) >= 8, "it is shown as it is: heading, note, command, source, licence, arm, excerpt"
    figures = re.sub("\u2060", "", " ".join(re.findall(r"<text.*?</text>", page.source)))
    assert figures.count("rise&lt;script&gt;alert(1)&lt;/s…") == 4, "the figures name the arm, cut short"
    markdown = results_markdown(tmp_path / "study.duckdb")
    assert "<" not in markdown
    assert all(line.count("|") == 8 for line in markdown.splitlines())


def test_hostile_names_do_not_steer_the_terminal(tmp_path: Path) -> None:
    study = build_study(tmp_path / "files")
    study["arms"]["_\x1b[31m\nred\u202e and much too long for a column"] = study["arms"].pop("rise")
    write_ledger(tmp_path / "study.duckdb", **study)
    table = results_table(tmp_path / "study.duckdb")
    assert "\x1b" not in table
    assert "\u202e" not in table
    assert "_?[31m?red? and…" in table
    out = tmp_path / "report.html"
    write_report(tmp_path / "study.duckdb", {}, Facts(), out)
    assert "_?[31m?red?" in out.read_text().replace("\u2060", ""), "the figures name the arm"


def test_excerpts_can_be_left_out(ledger: Path, tmp_path: Path) -> None:
    write_report(ledger, {}, FACTS, tmp_path / "with.html", excerpts=True)
    write_report(ledger, {}, FACTS, tmp_path / "without.html", excerpts=False)
    with open_ledger(ledger) as con:
        texts = [text[:60] for (text,) in con.execute("SELECT text FROM documents").fetchall()]
    shown = Page(tmp_path / "with.html").text
    assert sum(text in shown for text in texts) > 20
    without = (tmp_path / "without.html").read_text()
    assert not any(text in without for text in texts)
    assert "<blockquote>" not in without


def test_the_same_study_gives_the_same_bytes(ledger: Path, page: Page, tmp_path: Path) -> None:
    write_report(ledger, {"name": "demo"}, FACTS, tmp_path / "again.html", results_out=tmp_path / "again.json",
                 excerpts=True)  # fmt: skip
    assert (tmp_path / "again.html").read_text() == page.source
    assert (tmp_path / "again.json").read_bytes() == (ledger.parent / "results.json").read_bytes()


def test_results_hold_what_the_ledger_holds(ledger: Path, page: Page) -> None:
    results = read_json(ledger.parent / "results.json")
    by_name = {arm["method"]: arm for arm in results["arms"]}
    assert list(by_name)[:8] == ["base", "random", "length", "perplexity", "bm25", "embedding", "rise", "oracle"]
    assert by_name["rise"]["metrics"]["perplexity_control"]["value"] == 49.0
    assert by_name["rise"]["share_of_oracle_gain"] == pytest.approx(0.8255, abs=1e-4)  # ln(55.1/49) / ln(55.1/47.8)
    assert by_name["rise"]["paper"] == {"purity": 87.6, "perplexity_control": 2.33, "perplexity_junk": 389.74,
                                        "ruler_cwe": 4.1, "arc_challenge_acc_norm": 26.62}  # fmt: skip
    assert by_name["base"]["share_of_oracle_gain"] is None
    assert by_name["trackstar"]["metrics"] == {}
    assert results["pool"] == {"documents": 120, "positives": 12, "selected": 12}
    assert len(results["ranking"]) > 40
    assert json.dumps(results).find("text") == -1


def test_the_share_of_the_gain() -> None:
    assert gain_share(55.1, 55.1, 47.8) == 0
    assert gain_share(47.8, 55.1, 47.8) == 1
    assert gain_share((55.1 * 47.8) ** 0.5, 55.1, 47.8) == pytest.approx(0.5)
    assert gain_share(60.0, 55.1, 47.8) == pytest.approx(-0.599, abs=1e-3)
    assert gain_share(50.0, 47.8, 55.1) is None


def test_the_papers_table() -> None:
    """The ratios that section 3.3 draws from Table 4."""
    rise, trackstar = TABLE_4["rise"][1], TABLE_4["trackstar"][1]
    assert trackstar[1] / rise[1] == pytest.approx(2.8, abs=0.05)
    assert rise[3] / trackstar[3] == pytest.approx(1.6, abs=0.05)
    assert len(TABLE_4) == 6


def test_the_terminal_shows_the_same_table(ledger: Path) -> None:
    table = results_table(ledger)
    lines = table.splitlines()
    assert max(map(len, lines)) <= WIDTH
    rise = next(line for line in lines if line.startswith("rise"))
    assert "49.00 ±3.06" in rise
    assert rise.endswith(" 83 %")
    assert any(re.fullmatch(r"RISE +87\.6 +2\.33 +389\.74 +4\.10 +26\.62", line) for line in lines)
    assert lines[0].split("  ")[0] == "method"
    markdown = results_markdown(ledger)
    assert "| rise | " in markdown
    assert "49.00 (46.06 – 52.18)" in markdown


def test_a_study_without_random_and_oracle_says_why_there_is_no_gain(tmp_path: Path) -> None:
    study = build_study(tmp_path / "files")
    study["arms"] = {"rise": study["arms"]["rise"]}
    write_ledger(tmp_path / "study.duckdb", **study)
    write_report(tmp_path / "study.duckdb", {}, Facts(), tmp_path / "report.html")
    assert "no random arm, no oracle" in Page(tmp_path / "report.html").text
    with open_ledger(tmp_path / "study.duckdb") as con:
        assert all(arm.gain is None for arm in gather(con).arms)


def test_a_study_of_the_untrained_model_alone_has_a_report(tmp_path: Path) -> None:
    study = build_study(tmp_path / "files")
    study["arms"] = {"base": study["arms"]["base"]}
    write_ledger(tmp_path / "study.duckdb", **study)
    write_report(tmp_path / "study.duckdb", {}, Facts(), tmp_path / "report.html")
    assert "68.30" in Page(tmp_path / "report.html").text
    assert "68.30" in results_table(tmp_path / "study.duckdb")


def test_the_image_artifact_is_a_png_and_the_same_every_time(ledger: Path) -> None:
    image = purity_png(ledger)
    assert image.startswith(b"\x89PNG")
    assert image == purity_png(ledger)


def write_run(directory: Path) -> dict[str, Any]:
    """The files of a finished run beside its ledger."""
    write_ledger(directory / "study.duckdb", **build_study(directory / "files"))
    (directory / "config.yaml").write_text(yaml.safe_dump({"name": "demo", "title": "Brain Rot in small", "arms": {}}))
    note = {"metric": "ruler_cwe", "note": "50 of 50 prompts were cut"}
    for arm in ("base", "rise"):
        write_json(directory / "evaluation" / arm / "notes.json", [note])
    write_json(directory / "selection" / "oracle" / "notes.json", ["The oracle trains on 5 documents"])
    write_json(directory / "pool" / "card.json", {"sources": {"wikipedia": {"licence": "CC BY-SA", "what": None}}})
    manifest = {
        "digest": "r" * 64, "ledger": "l" * 64,
        "surroundings": {
            "command": "/somewhere/bin/rise run demo.yaml", "date": "2026-11-21", "commit": None, "python": "3.11.9",
            "versions": {"torch": "2.13.0"},
            "machine": {"processor": "x", "cores": 2, "gpus": [], "memory_gib": 24.0},
        },
    }  # fmt: skip
    write_json(directory / "manifest.json", manifest)
    return manifest


def test_the_report_of_a_runs_directory(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert report_run(tmp_path) == tmp_path / "report.html"
    page = Page(tmp_path / "report.html")
    assert "Brain Rot in small" in page.text
    assert page.text.count("ruler_cwe: 50 of 50 prompts were cut") == 1
    assert "The oracle trains on 5 documents" in page.text
    assert "/somewhere" not in page.source
    assert str(tmp_path) not in page.source
    assert "CC BY-SA" in page.text
    assert (tmp_path / "results.json").is_file()
    assert report_run(tmp_path, excerpts=False, out=tmp_path / "copy" / "r.html") == tmp_path / "copy" / "r.html"
    assert [file.name for file in (tmp_path / "copy").iterdir()] == ["r.html"]
    with pytest.raises(InputError, match="holds no finished run"):
        report_run(tmp_path / "files")
