#!/usr/bin/env python3
"""Makes training text and a held-out text from the HTML of Debian documentation packages.

What holds of the output: UTF-8; a paragraph is one line, code blocks keep their lines; no
navigation, indices, scripts or markup; the same packages give the same bytes. Documents (one HTML
page each) come in the order of a hash of their names, so that any prefix is a mixture of all
packages. Whole documents whose hash falls into the held-out share go to the held-out text and to
nothing else. Only Python's standard library is used.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

SEPARATOR = "<|endoftext|>"
HELD_OUT_ONE_IN = 20
MIN_CHARACTERS = 400  # shorter pages are headings and lists of links
MIN_SHARED = 80  # characters from which on a paragraph in both texts counts as shared
MAX_LINK_SHARE = 0.6  # pages with more of their text inside links are tables of contents


@dataclass(frozen=True)
class Source:
    """One package: where its pages are, which element holds a page's text, what to leave out."""

    package: str
    folder: str  # below the root of the unpacked package, or / when installed
    content: tuple  # (tag, attribute, value) of the element that holds the text
    skip: frozenset = frozenset()  # classes, and "#" + ids, of elements to leave out
    skip_pages: str = r"(?!)"  # regular expression on the path below `folder`


SOURCES = (
    Source(
        "debian-handbook",
        "usr/share/doc/debian-handbook/html/en-US",
        ("body", None, None),
        frozenset({"docnav", "toc", "indexterm", "index", "footnote", "#banner", "#title"}),
        r"index\.html|ix\d+\.html|.*copyright.*",
    ),
    Source(
        "python3.11-doc",
        "usr/share/doc/python3.11/html",
        ("div", "role", "main"),
        frozenset({"headerlink", "toctree-wrapper", "contents", "linenos", "footnote-reference"}),
        # The change log is megabytes of one-line entries, the indices are lists of links.
        r"genindex.*|py-modindex.*|search\.html|index\.html|contents\.html|download\.html"
        r"|_static/.*|_sources/.*|whatsnew/(changelog|index)\.html|(license|copyright)\.html",
    ),
    Source(
        "postgresql-doc-15",
        "usr/share/doc/postgresql-doc-15/html",
        ("body", None, None),
        frozenset({"navheader", "navfooter", "toc", "indexterm", "footnote", "list-of-tables",
                   "list-of-figures", "list-of-examples"}),
        r"index\.html|bookindex\.html|biblio\.html|.*(legalnotice|contrib-appendix).*"
        r"|sql-keywords-appendix\.html|errcodes-appendix\.html|acronyms\.html|features-.*",
    ),
    Source(
        "anarchism",
        "usr/share/doc/anarchism/html",
        ("div", "class", "content"),
        frozenset({"book-navigation", "links"}),
        r"(index|links|translations|new|oldnew|contact|pdf|book|biblio|supplementary)\.html"
        r"|changelog.*|sec.con\.html",
    ),
)

VOID = frozenset("area base br col embed hr img input link meta param source track wbr".split())
SKIP_TAGS = frozenset("head script style svg nav form noscript template".split())
HEADINGS = frozenset("h1 h2 h3 h4 h5 h6".split())
BLOCKS = HEADINGS | frozenset(
    "address article aside blockquote body caption center dd details div dl dt figcaption figure "
    "footer header hr li main ol p pre section summary table tbody td tfoot th thead tr ul".split()
)
LINE_BREAK = "\x0b"
SPACES = re.compile(r"[^\S\x0b]+")


@dataclass
class Page:
    """Text of one page as blocks of (kind, text), and how much of it is inside links."""

    blocks: list = field(default_factory=list)
    characters: int = 0
    link_characters: int = 0

    def text(self):
        out = []
        before = None
        for kind, text in self.blocks:
            if before is not None:
                tight = before == kind and kind in ("item", "row") or (before, kind) in (
                    ("term", "definition"),
                    ("term", "term"),
                )
                out.append("\n" if tight else "\n\n")
            out.append(text)
            before = kind
        return "".join(out)

    def link_share(self):
        return self.link_characters / max(1, self.characters)


class PageReader(HTMLParser):
    """Reads one page. It goes by start and end tags alone and asks for no well-formed tree: an
    element that is left out, or holds the content, ends where tags of its own name balance."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.source = source
        self.page = Page()
        self.inline = []
        self.content_depth = 0  # open tags of the content element's name
        self.skip_tag, self.skip_depth = None, 0
        self.pre_depth = 0
        self.link_depth = 0
        self.lists = []  # per open list: the next number, or None for bullets
        self.rows = []  # per open table row: its cells, each a list of blocks
        self.kind, self.prefix = "paragraph", ""

    # --- tags ---

    def is_content(self, tag, attributes):
        wanted, key, value = self.source.content
        return tag == wanted and (key is None or value in attributes.get(key, "").split())

    def is_skipped(self, tag, attributes):
        names = attributes.get("class", "").split() + ["#" + attributes.get("id", "")]
        return (
            tag in SKIP_TAGS
            or not self.source.skip.isdisjoint(names)
            or attributes.get("role") == "navigation"
        )

    def handle_starttag(self, tag, attrs):
        attributes = {key: value or "" for key, value in attrs}
        if self.skip_tag:
            self.skip_depth += tag == self.skip_tag
            return
        if not self.content_depth:
            self.content_depth = int(self.is_content(tag, attributes))
            return
        if tag == self.source.content[0]:
            self.content_depth += 1
        if self.is_skipped(tag, attributes):
            if tag not in VOID:
                self.skip_tag, self.skip_depth = tag, 1
                self.content_depth -= tag == self.source.content[0]
            return
        if tag == "br":
            self.inline.append("\n" if self.pre_depth else LINE_BREAK)
        elif tag == "a":
            self.link_depth += "href" in attributes
            self.link_depth = min(self.link_depth, 1)
        elif tag in BLOCKS:
            self.open_block(tag)

    def open_block(self, tag):
        self.flush()
        if tag == "pre":
            self.pre_depth += 1
        elif tag in ("ul", "ol"):
            self.lists.append(1 if tag == "ol" else None)
        elif tag == "li":
            self.start_item()
        elif tag in HEADINGS:
            self.kind, self.prefix = "heading", ""
        elif tag == "dt":
            self.kind, self.prefix = "term", ""
        elif tag == "dd":
            self.kind, self.prefix = "definition", ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append([])

    def start_item(self):
        self.kind = "item"
        number = self.lists[-1] if self.lists else None
        self.prefix = "  " * max(0, len(self.lists) - 1)
        if number is None:
            self.prefix += "- "
        else:
            self.prefix += f"{number}. "
            self.lists[-1] = number + 1

    def handle_endtag(self, tag):
        if self.skip_tag:
            self.skip_depth -= tag == self.skip_tag
            if not self.skip_depth:
                self.skip_tag = None
            return
        if not self.content_depth:
            return
        if tag == "a":
            self.link_depth = 0
        elif tag in BLOCKS and tag not in VOID:
            self.flush()
            self.close_block(tag)
        if tag == self.source.content[0]:
            self.content_depth -= 1

    def close_block(self, tag):
        if tag == "pre":
            self.pre_depth = max(0, self.pre_depth - 1)
        elif tag in ("ul", "ol") and self.lists:
            self.lists.pop()
        elif tag == "tr" and self.rows:
            self.end_row(self.rows.pop())
        if tag in HEADINGS or tag in ("li", "dt", "dd"):
            self.kind, self.prefix = "paragraph", ""

    def end_row(self, cells):
        cells = [cell for cell in cells if cell]
        if len(cells) == 1:  # a layout table, or an entry made of paragraphs
            for kind, text in cells[0]:
                self.emit(kind, text)
        elif cells:
            flat = (" ".join(" ".join(text.split()) for _, text in cell) for cell in cells)
            self.emit("row", " | ".join(flat))

    # --- text ---

    def handle_data(self, data):
        if self.content_depth and not self.skip_tag:
            self.inline.append(data)
            size = len(data.strip())
            self.page.characters += size
            self.page.link_characters += size * self.link_depth

    def emit(self, kind, text):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1].append((kind, text))
        else:
            self.page.blocks.append((kind, text))

    def flush(self):
        raw = "".join(self.inline).replace("\u00a0", " ").replace("\u200b", "")
        raw = raw.replace("\u00ad", "").replace("\r\n", "\n")
        self.inline = []
        if self.pre_depth:
            lines = [line.rstrip() for line in raw.split("\n")]
            text = "\n".join(lines).strip("\n")
            if text.strip():
                self.emit("code", text)
            return
        lines = (SPACES.sub(" ", line).strip() for line in raw.split(LINE_BREAK))
        text = "\n".join(line for line in lines if line)
        if text:
            self.emit(self.kind, self.prefix + text)
            # Only the first paragraph of a list item carries its mark.
            if self.kind in ("item", "definition"):
                self.kind, self.prefix = "paragraph", ""

    def close(self):
        super().close()
        self.flush()
        while self.rows:
            self.end_row(self.rows.pop())


def read_page(html, source):
    """Page of the HTML text."""
    reader = PageReader(source)
    reader.feed(html)
    reader.close()
    return reader.page


# --- packages ---


def run(command, cwd=None):
    """(exit code, what it said) of a command."""
    done = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout.strip()


def fetch(package, cache):
    """Downloads and unpacks a package below `cache`; a complaint, or None when it worked."""
    cache.mkdir(parents=True, exist_ok=True)
    for stale in cache.glob(f"{package}_*.deb"):
        stale.unlink()
    command = ["apt-get", "-q", "download", package]
    if os.geteuid() == 0:
        command[1:1] = ["-o", "APT::Sandbox::User=root"]
    code, said = run(command, cache)
    if code and os.geteuid() == 0:  # the package lists may be missing or out of date
        run(["apt-get", "-q", "update"])
        code, said = run(command, cache)
    debs = sorted(cache.glob(f"{package}_*.deb"))
    if code or not debs:
        return said.splitlines()[-1] if said else "apt-get download failed"
    unpacking = cache / (package + ".partial")
    shutil.rmtree(unpacking, ignore_errors=True)
    shutil.rmtree(cache / package, ignore_errors=True)
    code, said = run(["dpkg", "-x", str(debs[0]), str(unpacking)])
    if code:
        return said.splitlines()[-1] if said else "dpkg -x failed"
    (unpacking / "PACKAGE").write_text(debs[0].name + "\n", encoding="utf-8")
    unpacking.rename(cache / package)
    debs[0].unlink()
    return None


def locate(source, cache):
    """(folder of the pages, package file name or where it came from)."""
    unpacked = cache / source.package
    complaint = None
    if not (unpacked / "PACKAGE").is_file():
        try:
            complaint = fetch(source.package, cache)
        except OSError as error:
            complaint = str(error)
    if complaint is None:
        name = (unpacked / "PACKAGE").read_text(encoding="utf-8").strip()
        return unpacked / source.folder, name
    installed = Path("/") / source.folder
    if installed.is_dir():
        return installed, "installed"
    raise SystemExit(f"docs_text: cannot get package {source.package}: {complaint}")


# --- documents ---


def page_text(path, source):
    """Text of one page, or None if it is not worth keeping."""
    page = read_page(path.read_bytes().decode("utf-8", errors="replace"), source)
    text = page.text().replace("\ufffd", "").replace(SEPARATOR, "")
    if len(text) < MIN_CHARACTERS or page.link_share() > MAX_LINK_SHARE:
        return None
    return text


def pages_of(source, folder, pool):
    """{name: text} of every page of a package that is worth keeping."""
    if not folder.is_dir():
        raise SystemExit(f"docs_text: {folder} is not there: the package has changed its layout")
    skip = re.compile(source.skip_pages)
    paths = {}
    for path in sorted(folder.rglob("*.html")):
        name = path.relative_to(folder).as_posix()
        if not skip.fullmatch(name) and not path.is_symlink():
            paths[f"{source.package}/{name}"] = path
    texts = pool.map(partial(page_text, source=source), paths.values(), chunksize=8)
    return {name: text for name, text in zip(paths, texts) if text is not None}


def name_hash(name):
    return hashlib.sha256(name.encode()).hexdigest()


def is_held_out(name):
    """True for about one name in HELD_OUT_ONE_IN; depends on the name alone."""
    return int(name_hash(name)[:8], 16) % HELD_OUT_ONE_IN == 0


def shorten(text, limit):
    """The first blocks of the text that fit into `limit` characters (at least one)."""
    if limit <= 0 or len(text) <= limit:
        return text
    cut = text.rfind("\n\n", 0, limit + 1)
    if cut <= 0:
        cut = text.find("\n\n")
    return text[:cut] if cut > 0 else text


def without_blocks(text, blocks):
    """The text less those of its blocks that are among `blocks`."""
    return "\n\n".join(block for block in text.split("\n\n") if block not in blocks)


def split(documents, train_limit, held_out_limit):
    """(training text, held-out text, statistics) of {name: text}."""
    order = sorted(documents, key=name_hash)
    held_out = [shorten(documents[name], held_out_limit) for name in order if is_held_out(name)]
    # Standing phrases ("This module does not work on ...") occur in many pages: what the held-out
    # text has of them must not have been trained on.
    seen = {block for text in held_out for block in text.split("\n\n")}
    seen = {block for block in seen if len(block) >= MIN_SHARED}
    train = [shorten(documents[name], train_limit) for name in order if not is_held_out(name)]
    train = [without_blocks(text, seen) for text in train]
    train_text = f"\n{SEPARATOR}\n".join(train) + "\n" if train else ""
    held_out_text = "\n\n".join(held_out) + "\n" if held_out else ""
    counts = {"train_documents": len(train), "heldout_documents": len(held_out)}
    return train_text, held_out_text, counts


def write_atomically(path, text):
    unfinished = path.with_name(path.name + ".partial")
    try:
        unfinished.write_bytes(text.encode("utf-8"))
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise SystemExit(f"docs_text: cannot write {path}: {error.strerror}") from error


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description="Make DIR/docs.train.txt and DIR/docs.heldout.txt from the Debian packages "
        + ", ".join(source.package for source in SOURCES)
        + ". Packages are downloaded with apt-get and unpacked, not installed.",
        epilog="Example: tools/docs_text.py --out out",
    )
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--out", type=Path, default=root / "out", metavar="DIR",
                        help="where the texts go (default: out in the checkout)")
    parser.add_argument("--cache", type=Path, default=root / ".cache" / "docs", metavar="DIR",
                        help="where packages are unpacked (default: .cache/docs in the checkout)")
    parser.add_argument("--train-limit", type=int, default=48000, metavar="CHARS",
                        help="most characters of one training document; 0: no limit "
                        "(default: %(default)s)")
    parser.add_argument("--heldout-limit", type=int, default=8000, metavar="CHARS",
                        help="most characters of one held-out document, so that a few long ones do "
                        "not make up the text; 0: no limit (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv):
    arguments = parse_arguments(argv)
    documents, packages = {}, {}
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        for source in SOURCES:
            folder, origin = locate(source, arguments.cache)
            found = pages_of(source, folder, pool)
            if not found:
                raise SystemExit(f"docs_text: no pages found in {folder}")
            documents.update(found)
            packages[source.package] = {
                "from": origin,
                "documents": len(found),
                "bytes": sum(len(text.encode()) for text in found.values()),
            }
            print(f"docs_text: {source.package}: {len(found)} documents", file=sys.stderr)
    train, held_out, counts = split(documents, arguments.train_limit, arguments.heldout_limit)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"docs_text: cannot make {arguments.out}: {error.strerror}") from error
    summary = {"packages": packages, **counts}
    for name, text in (("docs.train.txt", train), ("docs.heldout.txt", held_out)):
        write_atomically(arguments.out / name, text)
        data = text.encode()
        summary[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("docs_text: interrupted", file=sys.stderr)
        sys.exit(130)
