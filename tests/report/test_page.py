import base64
import re
from html.parser import HTMLParser

import pytest

from jaxscape.report import figures, page, style

ACCURACY = [
    {"condition": "<b>&", "n_questions": 40, "accuracy_micro": 0.5, "accuracy_macro": None,
     "free_accuracy_micro": 0.25, "free_accuracy_macro": None},
    {"condition": "sft", "n_questions": 40, "accuracy_micro": 0.625, "accuracy_macro": 0.61,
     "free_accuracy_micro": 0.333, "free_accuracy_macro": 0.32},
]
LAYERS = [
    {"condition": c, "layer": i + 1, "ari_subject": s, "ari_answer": a}
    for c, subject, answer in (
        ("<b>&", (0.1, 0.7, 0.7, float("nan")), (None, None, None, None)),
        ("sft", (0.3, 0.2, 0.1, 0.0), (-0.2, -0.1, -0.3, None)),
    )
    for i, (s, a) in enumerate(zip(subject, answer, strict=True))
]
VOID = {"meta", "img", "link", "br", "hr"}


class Checker(HTMLParser):
    """Reads a page: fails on tags that do not nest, keeps attributes, ids, table cells and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data.replace("\xa0", " ")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    fig = figures.curve([{"condition": "a", "layer": i, "n_peaks": i} for i in (1, 2)], "n_peaks")
    png, svg = style.save(fig, tmp_path_factory.mktemp("figures"), "f")
    return png.read_bytes(), svg.read_text()


def make(saved, **changes):
    png, svg = saved
    arguments = {
        "title": "A <script>alert(1)</script> & more",
        "intro_facts": {"Model <i>": '"quoted" & <b>', "Questions": 40},
        "accuracy_rows": ACCURACY,
        "figures": [page.Picture(svg, "Look <here> & there.", 'Alt "text" <b>'), (png, "As PNG")],
        "layer_rows": LAYERS,
        "notes": ["One <b>note</b> & {braces}."],
        "provenance": {"hash": "ab" * 32, "seconds": 1.5},
        "subject_rows": [
            {"condition": "sft", "subject": "moral_<b>&", "n_questions": 4, "accuracy": 0.25},
            {"condition": "0shot", "subject": "law", "n_questions": 5, "accuracy": None},
        ],
        "training_rows": [{"condition": "sft@<2>", "step": 2, "accuracy_micro": 0.25, "late_ari_answer": None}],
    }
    return page.render(**(arguments | changes))


def test_page_nests_and_fetches_nothing(saved):
    text = make(saved)
    checker = Checker(text)
    assert text.startswith("<!DOCTYPE html>")
    for tag, attributes in checker.tags:
        assert tag not in {"script", "link", "iframe", "object", "i", "here"}
        assert not {"href", "srcset", "data", "style", "onclick"} & set(attributes)
        assert attributes.get("src", "data:").startswith("data:")
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    policy = next(a["content"] for tag, a in checker.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    ids = [a["id"] for _, a in checker.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in checker.tags if "aria-labelledby" in a} == set(ids)


def test_everything_is_escaped(saved):
    text = make(saved)
    seen = "".join(Checker(text).text)
    for shown in ("A <script>alert(1)</script> & more", 'Model <i>"quoted" & <b>', "Look <here> & there.",
                  "One <b>note</b> & {braces}.", "moral <b>&"):  # fmt: skip
        assert shown in seen
    assert text.count("<b>") == 2  # "Figure 1.", "Figure 2.": ours


def test_images_are_the_files_with_their_alt_and_size(saved):
    images = [a for tag, a in Checker(make(saved)).tags if tag == "img"]
    png, svg = saved
    for image, kind, data in ((images[0], "svg+xml", svg.encode()), (images[1], "png", png)):
        head, _, body = image["src"].partition(",")
        assert head == f"data:image/{kind};base64" and base64.b64decode(body, validate=True) == data
        assert abs(int(image["width"]) - 6.4 * 96) <= 1 and abs(int(image["height"]) - 3.7 * 96) <= 1
    assert [image["alt"] for image in images] == ['Alt "text" <b>', "As PNG"]
    with pytest.raises(ValueError, match="figure 1 must be SVG text or PNG bytes, got bytes b'GIF8"):
        make(saved, figures=[(b"GIF89a", "no")])


def test_tables_say_what_the_rows_say(saved):
    rows = Checker(make(saved)).rows
    assert ["<b>&", "40", "50.0 %", "–", "25.0 %", "–"] in rows
    assert ["sft", "40", "62.5 %", "61.0 %", "33.3 %", "32.0 %"] in rows
    # Best layers: ties to the lower layer, NaN and None skipped, a negative maximum is one.
    assert ["<b>&", "0.700", "2 / 4", "–", "–"] in rows
    assert ["sft", "0.300", "1 / 4", "-0.100", "2 / 4"] in rows
    assert ["Checkpoint", "Step", "Accuracy", "late"] in rows and ["sft@<2>", "2", "0.250", "-"] in rows
    assert ["Subject", "Questions", "sft", "0shot"] in rows
    assert ["moral <b>&", "4", "25.0 %", "–"] in rows and ["law", "5", "–", "–"] in rows
    assert rows[-2:] == [["hash", "ab" * 32], ["seconds", "1.5"]]


def test_empty_sections_are_left_out():
    text = page.render("t", {}, [], [], [], "one note")
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", text) == ["Notes"]
    assert Checker(text).text.count("one note") == 1


def test_missing_column_is_named(saved):
    with pytest.raises(ValueError, match="accuracy_rows lack column 'accuracy_micro'"):
        make(saved, accuracy_rows=[{"condition": "a", "n_questions": 1}])


def test_write_is_the_text_in_utf8(saved, tmp_path):
    text = make(saved)
    path = page.write(text, tmp_path / "report" / "index.html")
    assert path.read_bytes() == text.encode() == make(saved).encode()
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]
