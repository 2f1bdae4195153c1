"""Untrusted text: what stands in documents, ids, labels, models and archives is shown and stored, and never obeyed."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
import yaml
from markdown_it import MarkdownIt

from flows import curation as flow
from tasks.common import wheels
from tasks.common.config import Config
from tasks.common.errors import InputError, one_line
from tasks.common.files import read_json, sha256_file
from tasks.common.hardware import shape_of
from tasks.common.models import load_causal_lm, load_tokenizer, locate, torch_dtype
from tasks.pool import archives
from tasks.reporting.report import Facts, write_report
from tasks.reporting.study import report_study, study_table
from tasks.reporting.table import results_markdown, results_table
from tasks.scoring.rivals.gradients import skeleton
from tasks.selection.ledger import write_ledger
from tests.faults.inputs import SKETCH, rise
from tests.flow.conftest import REPOSITORY
from tests.tiny import tiny_encoder, tiny_llama
from tests.unit.test_curation import conf, curate, jsonl, models  # noqa: F401  (fixtures)
from tests.unit.test_ledger import build_study
from tests.unit.test_reporting import write_run
from tests.unit.test_retrieval import build as build_retrieval

_RUN = "document.title='ran'"
_SHOW = flow._show  # the fixture of the curation's tests leaves it out
HOSTILE = (
    f"</title></style></textarea></pre></script><script>{_RUN}</script><img src=x onerror=\"{_RUN}\">"
    f"<svg onload=\"{_RUN}\"><iframe srcdoc=\"<script>parent.{_RUN}</script>\"></iframe>"
    f"<a href=\"javascript:{_RUN}\" autofocus onfocus=\"{_RUN}\">a</a>'\" onmouseover=\"{_RUN}\" x=' "
    f"[a](javascript:{_RUN}) ![i](x\" onerror=\"{_RUN}) <javascript:{_RUN}>"
    " `</code> | \\| {{ 7*7 }}\n\n```\n</code>\n"
    "# h\n---\n\x1b]0;title\x07\x1b[31mred\x1b[0m\x9b31m \u202edlrow\u202c \u2066x\u2069 ../../../escaped \r over"
)  # fmt: skip
"""What would run, close something, colour a terminal, turn text around or leave a directory, if anything obeyed it."""
STEERING = "\x1b]0;title\x07\x1b[31mred\x9b31m\u202ex"
_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Page(HTMLParser):
    """Elements and attributes that a browser would make."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.harm: list[tuple[str, str, str | None]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.harm += [(tag, name, value) for name, value in attrs
                      if name.startswith("on") or (value or "").strip().lower().startswith("javascript:")
                      or name == "srcdoc" or (name == "src" and not (value or "").startswith("data:image/png;base64,"))]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Reports of a closed loop and of a study whose texts, ids, labels, sources and titles are hostile."""
    loop = tmp_path_factory.mktemp("loop")
    write_ledger(loop / "study.duckdb", **build_study(loop / "files", hostile=HOSTILE))
    facts = Facts(title=HOSTILE, notes=[HOSTILE], command=HOSTILE, versions={HOSTILE: HOSTILE}, date=HOSTILE,
                  sources={HOSTILE: {"licence": HOSTILE, "what": HOSTILE}})  # fmt: skip
    with duckdb.connect(loop / "study.duckdb") as con:
        for table, column in (("documents", "label"), ("purity", "label")):
            con.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = 'control'", [HOSTILE])
    write_report(loop / "study.duckdb", {HOSTILE: [HOSTILE]}, facts, loop / "report.html", excerpts=True)

    study = tmp_path_factory.mktemp("study")
    write_run(study)
    (study / "study.duckdb").unlink()
    build_retrieval(study)
    with duckdb.connect(study / "study.duckdb") as con:
        con.execute("UPDATE pools SET task = ?, label = ?", [HOSTILE, HOSTILE])
    (study / "config.yaml").write_text(yaml.safe_dump({"title": HOSTILE, "default": "rise", "rule": None,
                                                       HOSTILE: HOSTILE}))
    card = {"sources": {HOSTILE: {"what": HOSTILE, "licence": HOSTILE}}}
    (study / "pool" / "first").mkdir()
    (study / "pool" / "first" / "card.json").write_text(json.dumps(card))
    report_study(study)
    for shown in (results_table(loop / "study.duckdb"), study_table(study / "study.duckdb")):
        assert not _STEERS.search(shown), "the terminal's tables"
    return {"closed loop": (loop / "report.html").read_text(), "study": (study / "report.html").read_text(),
            "artifact": MarkdownIt("commonmark").enable("table").render(results_markdown(loop / "study.duckdb")),
            "study's artifact": MarkdownIt("commonmark").render(f"```\n{study_table(study / 'study.duckdb')}\n```")}


@pytest.fixture
def curated(
    conf: Path, curate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
) -> tuple[Path, dict[str, str]]:  # fmt: skip
    """A curation of hostile documents: its directory, and its card and artifacts as HTML."""
    shown: dict[str, str] = {}
    monkeypatch.setattr(flow, "_show", _SHOW)
    for name in ("create_markdown_artifact", "create_table_artifact"):
        monkeypatch.setattr(flow, name, lambda content, *, key, description: shown.update({key: content}))
    rows = [{"id": f"{HOSTILE}/{n}", "text": f"{HOSTILE} {n} {'word ' * n}", "label": HOSTILE,
             "source": f"{HOSTILE}{n % 2}"}
            for n in range(6)]  # fmt: skip
    jsonl(conf.parent / "inbox" / "a<b>'\x1b[31m.jsonl", [*rows, {"id": "../../../escaped",
                                                                  "text": "another text entirely"}])
    jsonl(conf.parent / "queries.jsonl", [{"id": f"../{HOSTILE}", "text": HOSTILE}])
    out = tmp_path / "deep" / "down" / "out"
    settings = (f"title={json.dumps(HOSTILE)}", f"positive={json.dumps(HOSTILE)}", "intake.near_duplicate=1.0",
                "budget.documents=40")
    curate(out, *settings)
    card = (out / "selections" / "0001" / "card.md").read_text()
    assert not _STEERS.search(card)
    markdown = MarkdownIt("commonmark").enable("table")
    return out, {"card": markdown.render(card), "artifact": markdown.render(shown["cur-selection"])}


def test_a_hostile_pool_is_shown_and_stored_and_not_obeyed(
    pages: dict[str, str], curated: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    out, cards = curated
    paths_lead_nowhere(out, tmp_path)
    for name, source in {**pages, **cards}.items():
        page = Page(source)
        assert not page.harm, name
        assert not page.tags & {"script", "iframe", "object", "embed", "form", "base", "link", "textarea"}, name
        assert HOSTILE[:16] not in source, name
    for name in ("closed loop", "study"):
        assert "Content-Security-Policy" in pages[name]
        assert "{{ 7*7 }}" in pages[name], "shown as it is, and not computed"
    if shutil.which("chromium"):
        nothing_runs([*pages.values(), *cards.values()], tmp_path)


def paths_lead_nowhere(out: Path, above: Path) -> None:
    """A curation's files have plain names and stand in its directory, whatever its documents are called."""
    assert {path.relative_to(above).parts[0] for path in above.rglob("*")} <= {"inbox", "queries.jsonl", "cur.yaml",
                                                                               "deep"}
    names = [path.relative_to(out).as_posix() for path in out.rglob("*")]
    assert all(re.fullmatch(r"[A-Za-z0-9._/-]+", name) for name in names), names
    assert not [name for name in names if "escaped" in name]
    ids = pq.read_table(out / "selections" / "0001" / "selected.parquet")["doc_id"].to_pylist()
    assert {"../../../escaped", f"{HOSTILE}/3"} <= set(ids), "they are ids like any others"


def nothing_runs(sources: list[str], folder: Path) -> None:
    """All pages in one in Chromium, without the policy that would stop a script; a script of our own does run."""
    together = "\n".join(re.sub(r"<meta http-equiv[^>]*>", "", source) for source in sources)
    page = folder / "page.html"
    page.write_text(f"{together}<script>document.documentElement.dataset.alive = document.title</script>")
    dumped = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu",
                             f"--user-data-dir={folder}/profile",
                             "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=300,
                             check=True).stdout
    alive = re.search(r'<html[^>]*data-alive="([^"]*)"', dumped)
    assert alive is not None, "scripts run in this browser"
    assert alive[1].removeprefix("&lt;").removeprefix("<").startswith("/title"), "the title is the text that was given"
    assert "<title>ran" not in dumped


def test_no_document_steers_the_terminal(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    rows = [{"id": f"{STEERING}{n}", "text": f"{STEERING} {n}", "label": STEERING} for n in range(3)]
    jsonl(tmp_path / "pool\x1b[31m.jsonl", [*rows, {"id": f"\x1b{STEERING}", "text": " "}])
    pool, index = str(tmp_path / "pool\x1b[31m.jsonl"), str(tmp_path / "index")
    built = rise(["index", "build", "--model", str(tmp_path / "model"), "--data", pool, "--out", index, *SKETCH,
                  "--on-bad-row", "skip", "--max-length", "64"], tmp_path)  # fmt: skip
    assert built[0] == 0, built[1]
    jsonl(tmp_path / "good.jsonl", rows)
    found = rise(["attribute", "--index", index, "--text", HOSTILE, "--data", str(tmp_path / "good.jsonl"), "--tokens",
                  "2"],
                 tmp_path)  # fmt: skip
    assert found[0] == 0
    assert found[2].count("\\x1b") >= 6, "it is spelled out"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: a\n")
    (tmp_path / "run" / "scoring" / "\x1b[31m\u202e.partial").mkdir(parents=True)
    jsonl(tmp_path / "twice.jsonl", [rows[0], rows[0]])
    said = [built, found, *(rise(arguments, tmp_path) for arguments in (
        ["index", "info", index], ["status", str(tmp_path / "run")], ["status", str(tmp_path / "run" / "\x1b[2J")],
        ["index", "append", index, "--data", str(tmp_path / "good.jsonl")], ["index", "append", index, "--data", pool],
        ["index", "append", index, "--data", str(tmp_path / "twice.jsonl")], ["run", str(tmp_path / "\x1b[2J.yaml")],
        ["score", "--nonsense\x1b[2J"], ["\x1b[2J"], ["plan", "--gpu", "\x1b[2J"], ["run", "x", "--refresh", "\x1b[2J"],
    ))]  # fmt: skip
    assert [status for status, _, _ in said] == [0, 0, 0, 0] + [2] * 9
    for status, errors, printed in said:
        errors = re.sub(r"[^\n]*\r", "", errors)  # the progress bars
        assert not _STEERS.search(errors + printed), (status, errors, printed)
    assert one_line("a\x1b[2J\u202e\n\tb" + "c" * 5_000) == r"a\x1b[2J\u202e b" + "c" * (500 - 16) + " … " + "c" * 500


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts an archive into the cache as a wheel; returns its requirement."""
    monkeypatch.setenv("RISE_CACHE", str(tmp_path / "cache"))

    def kept(file: Path) -> str:
        digest = sha256_file(file)
        (tmp_path / "cache" / "wheels" / digest).mkdir(parents=True)
        file.rename(tmp_path / "cache" / "wheels" / digest / "small-1-py3-none-any.whl")
        return f"small==1#sha256={digest}"

    return kept


def test_an_archive_unpacks_to_no_more_than_its_limit(wheel: Any, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "MAX_READ", 1_000)
    monkeypatch.setattr(wheels, "MAX_UNPACKED", 5_000)
    monkeypatch.setattr(archives, "MAX_UNPACKED", 1_000)
    with zipfile.ZipFile(tmp_path / "bomb.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/small", "x" * 1_000)
        for part in range(9):
            archive.writestr(f"m/part{part}", bytes(999))
        archive.writestr("m/large", bytes(50_000))
        archive.writestr("../../escaped", "x")
    raw = (tmp_path / "bomb.whl").read_bytes()
    bomb = wheel(tmp_path / "bomb.whl")
    assert len(wheels.read_member(bomb, "m/small")) == 1_000
    for call in (lambda: wheels.read_member(bomb, "m/large"), lambda: wheels.unpack(bomb, "m"),
                 lambda: wheels.unpack(bomb, "m/large"),
                 lambda: archives.unpack_zip(raw, "bomb", "m/large")):  # fmt: skip
        with pytest.raises(InputError, match=r"unpacks to 5[0-9],?[0-9]{3} bytes, more than"):
            call()
    with pytest.raises(InputError, match="points outside"):
        wheels.unpack(bomb, "../../escaped")
    assert not [path for path in tmp_path.rglob("*") if path.name in ("escaped", "large")]

    lying = raw.replace((50_000).to_bytes(4, "little"), (900).to_bytes(4, "little"))
    (tmp_path / "lying.whl").write_bytes(lying)
    with pytest.raises(InputError, match="no wheel that can be read"):
        wheels.read_member(wheel(tmp_path / "lying.whl"), "m/large")
    (tmp_path / "none.whl").write_bytes(b"no zip")
    with pytest.raises(InputError, match="no wheel that can be read"):
        wheels.unpack(wheel(tmp_path / "none.whl"), "m")
    for name in ("small==1\n--index-url=http://127.0.0.1/", "small", "../x==1", "small==1#sha256=../../x",
                 "small==1#sha256="):
        with pytest.raises(InputError, match="a wheel is named"):
            wheels.fetch_wheel(name)


def test_no_model_brings_code(tmp_path: Path) -> None:
    """A model that asks for its own code is refused, and the code does not run."""
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()\n"
    model, encoder = tiny_llama(tmp_path / "model"), tiny_encoder(tmp_path / "encoder")
    for place in (model, encoder):
        (place / "evil.py").write_text(code)
        for name, mapped in (("config.json", {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M",
                                              "AutoModel": "evil.M"}),
                             ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]})):  # fmt: skip
            values = {**read_json(place / name), "auto_map": mapped, "tokenizer_class": "EvilTokenizer"}
            if name == "config.json":
                values["model_type"] = "evil"
            (place / name).write_text(json.dumps(values))
    modules = read_json(encoder / "modules.json")
    modules[0]["type"] = "evil.Transformer"
    (encoder / "modules.json").write_text(json.dumps(modules))
    located = locate(str(model))
    jsonl(tmp_path / "pool.jsonl", [{"text": "a text of some length"}])
    pool = str(tmp_path / "pool.jsonl")
    score = ["score", "--pool", pool, "--queries", pool, "--out", str(tmp_path / "out.parquet")]
    for call in (lambda: load_causal_lm(located, dtype=torch_dtype("float32")), lambda: load_tokenizer(located),
                 lambda: shape_of(str(model)), lambda: skeleton(located)):  # fmt: skip
        with pytest.raises(InputError):
            call()
    for arguments in ([*score, "--model", str(model)], [*score, "--method", "embedding", "--option",
                                                        f"model={encoder}"]):
        status, errors, _ = rise(arguments, tmp_path)
        assert (status, errors.count("\n")) == (2, 1), errors
    assert not mark.exists()
    assert not (tmp_path / "out.parquet").exists()


def test_every_loader_says_that_no_code_is_trusted() -> None:
    """Every from_pretrained, from_config and SentenceTransformer of the source has trust_remote_code=False."""
    calls = 0
    for file in [*(REPOSITORY / "tasks").rglob("*.py"), *(REPOSITORY / "flows").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name.rpartition(".")[2] in ("from_pretrained", "from_config", "SentenceTransformer"):
                calls += 1
                assert "trust_remote_code=False" in ast.unparse(node), f"{file.name}:{node.lineno}"
            assert name not in ("torch.load", "pickle.load", "pickle.loads", "eval", "exec"), f"{file.name}: {name}"
    assert calls >= 9
    assert Config.model_config["extra"] == "forbid"
