#!/usr/bin/env python3
"""tools/docs_text.py on small pages: what is kept, what is left out, how texts are split."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(os.environ.get("RABIT_SOURCE_DIR", Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(ROOT / "tools"))
sys.dont_write_bytecode = True

import docs_text  # noqa: E402

ANY = docs_text.Source("test", "", ("body", None, None), frozenset({"nav", "#banner"}))


def text_of(body, source=ANY):
    return docs_text.read_page(f"<html><body>{body}</body></html>", source).text()


class PageTest(unittest.TestCase):
    def test_a_paragraph_is_one_line(self):
        html = "<p>Hard\n   wrapped &amp;\n\tplain&nbsp;text, <b>bold</b><i>er</i>.</p><p>Next</p>"
        self.assertEqual(text_of(html), "Hard wrapped & plain text, bolder.\n\nNext")

    def test_code_keeps_its_lines(self):
        html = "<p>See:</p><pre>\nif x:\n    <b>y</b> &lt; 1  \n\nz</pre><p>after</p>"
        self.assertEqual(text_of(html), "See:\n\nif x:\n    y < 1\n\nz\n\nafter")

    def test_navigation_scripts_and_named_parts_are_left_out(self):
        html = (
            "<div class='x nav'><div>bar</div>bar</div><script>var a = '<p>';</script>"
            "<div id='banner'>get it</div><style>p {}</style><nav>up</nav>"
            "<div role='navigation'>next</div><p>kept</p>"
        )
        self.assertEqual(text_of(html), "kept")

    def test_only_the_content_element_counts(self):
        source = docs_text.Source("test", "", ("div", "role", "main"))
        html = "<div>before</div><div role='main'><div><p>a</p></div>b</div><div>after</div>"
        self.assertEqual(text_of(html, source), "a\n\nb")

    def test_content_goes_on_after_a_part_of_the_same_name_was_left_out(self):
        source = docs_text.Source("test", "", ("div", "role", "main"), frozenset({"nav"}))
        html = "<div role='main'>a<div class='nav'>x<div>y</div></div><p>b</p></div><p>c</p>"
        self.assertEqual(text_of(html, source), "a\n\nb")

    def test_lists(self):
        html = "<ol><li>one</li><li><p>two</p><p>more</p><ul><li>deep</li></ul></li></ol><p>x</p>"
        self.assertEqual(text_of(html), "1. one\n2. two\n\nmore\n\n  - deep\n\nx")

    def test_definitions(self):
        html = "<dl><dt>term</dt><dd><p>what it is</p><p>more</p></dd><dt>a</dt><dt>b</dt></dl>"
        self.assertEqual(text_of(html), "term\nwhat it is\n\nmore\n\na\nb")

    def test_tables(self):
        html = (
            "<table><tr><th>a</th><th>b</th></tr><tr><td><p>1</p></td><td>2\n3</td></tr>"
            "<tr><td><p>alone</p><p>again</p></td></tr></table>end"
        )
        self.assertEqual(text_of(html), "a | b\n1 | 2 3\n\nalone\n\nagain\n\nend")

    def test_line_breaks_stay(self):
        self.assertEqual(text_of("<p>one<br>two<br/>\nthree</p>"), "one\ntwo\nthree")

    def test_tags_that_do_not_balance(self):
        self.assertEqual(text_of("<p>a<p>b</b></div></p><ul><li>c<li>d"), "a\n\nb\n\n- c\n- d")
        self.assertEqual(text_of("<p>a</p></i></table></tr><td>x</td>"), "a\n\nx")

    def test_link_share(self):
        page = docs_text.read_page("<body><a href='x'>four</a> <a id='y'>five</a></body>", ANY)
        self.assertAlmostEqual(page.link_share(), 0.5)


class SplitTest(unittest.TestCase):
    documents = {f"p/{i}.html": f"Title {i}\n\n" + f"word{i} " * 200 for i in range(400)}

    def test_no_document_is_in_both_and_none_is_lost(self):
        train, held_out, counts = docs_text.split(self.documents, 0, 0)
        for name, text in self.documents.items():
            self.assertEqual(text.strip() in held_out, docs_text.is_held_out(name))
            self.assertEqual(text.strip() in train, not docs_text.is_held_out(name))
        self.assertEqual(counts["train_documents"] + counts["heldout_documents"], 400)
        self.assertTrue(8 <= counts["heldout_documents"] <= 36, counts)
        self.assertEqual(train.count("\n<|endoftext|>\n"), counts["train_documents"] - 1)
        self.assertNotIn("<|endoftext|>", held_out)

    def test_order_does_not_depend_on_the_input(self):
        turned = dict(reversed(self.documents.items()))
        self.assertEqual(docs_text.split(turned, 0, 0), docs_text.split(self.documents, 0, 0))

    def test_paragraphs_of_the_held_out_text_are_not_trained_on(self):
        phrase = "This standing phrase is found in many of the documents of this kind, " * 2
        documents = {name: text + "\n\n" + phrase for name, text in self.documents.items()}
        train, held_out, _ = docs_text.split(documents, 0, 0)
        self.assertIn(phrase, held_out)
        self.assertNotIn(phrase, train)

    def test_long_documents_are_cut_between_paragraphs(self):
        self.assertEqual(docs_text.shorten("aa\n\nbb\n\ncc", 7), "aa\n\nbb")
        self.assertEqual(docs_text.shorten("aaaaaaaa\n\nbb", 3), "aaaaaaaa")
        self.assertEqual(docs_text.shorten("aaaaaaaa", 3), "aaaaaaaa")
        self.assertEqual(docs_text.shorten("aa\n\nbb", 0), "aa\n\nbb")


class ProgramTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def unpack(self):
        """A cache as if every package had been downloaded, with 30 pages each."""
        for source in docs_text.SOURCES:
            pages = self.folder / "cache" / source.package / source.folder
            pages.mkdir(parents=True)
            (self.folder / "cache" / source.package / "PACKAGE").write_text("test_1_all.deb\n")
            tag, key, value = source.content
            opening = f"<{tag} {key}='{value}'>" if key else f"<{tag}>"
            for i in range(30):
                body = f"<h1>{source.package} {i}</h1>" + f"<p>Some prose, number {i}.</p>" * 30
                html = f"<html>{opening}{body}</{tag}></html>"
                (pages / f"page{i}.html").write_text(html, encoding="utf-8")
            (pages / "index.html").write_text(f"{opening}{'<p>left out</p>' * 99}</{tag}>")

    def run_tool(self, out):
        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(io.StringIO()):
            docs_text.main(["--out", str(out), "--cache", str(self.folder / "cache")])
        return json.loads(told.getvalue())

    def test_two_runs_give_the_same_bytes(self):
        self.unpack()
        first = self.run_tool(self.folder / "a")
        self.assertEqual(first, self.run_tool(self.folder / "b"))
        self.assertEqual(first["train_documents"] + first["heldout_documents"], 120)
        for name in ("docs.train.txt", "docs.heldout.txt"):
            one = (self.folder / "a" / name).read_bytes()
            self.assertEqual(one, (self.folder / "b" / name).read_bytes())
            self.assertEqual(first[name]["bytes"], len(one))
            self.assertNotIn("left out", one.decode("utf-8"))

    def test_an_output_that_cannot_be_written_is_one_line(self):
        self.unpack()
        (self.folder / "file").write_text("x")
        with self.assertRaises(SystemExit) as caught:
            self.run_tool(self.folder / "file" / "below")
        self.assertRegex(str(caught.exception), r"^docs_text: cannot make [^\n]*$")

    def test_help(self):
        tool = [sys.executable, str(ROOT / "tools" / "docs_text.py"), "--help"]
        done = subprocess.run(tool, capture_output=True, text=True, check=True)
        self.assertIn("--out DIR", done.stdout)


if __name__ == "__main__":
    unittest.main(argv=sys.argv, verbosity=1)
