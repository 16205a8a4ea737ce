"""Whatever a result says, it stays text: it opens no tag, ends no attribute, and is read as it was written."""

import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from cupaged.bench import html
from tests.kit.experiments import functions

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "' onmouseover='alert(1)",
    'x" onmouseover="alert(1)',
    "</td></tr></table></section></style><b>",
    "&lt;b&gt; &amp; & &#60;",
    "<!-- --> <![CDATA[ ]]> <? ?>",
]
CLAIM = {
    "statement": "s", "origin": "o", "verdict": "holds", "measured": "m", "reason": "r", "published": "p",
    "source": "q", "command": "c", "device": "d", "commit": "e", "date": "f",
}  # fmt: skip


class Markup(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(attrs)))

    def handle_endtag(self, tag):
        self.tags.append((f"/{tag}", ()))

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    unknown_decl = handle_pi = handle_comment

    def names(self):
        """Return the tags, each with the names of its attributes."""
        return [(tag, [name for name, _ in attributes]) for tag, attributes in self.tags]


def card(**fields):
    return html.verdict_cards([{**CLAIM, **fields}])


def image(folder, text):
    path = folder / "a.png"
    path.write_bytes(b"\x89PNG")
    return html.picture(path, text)


FIELDS = {
    "title of the page": lambda text, _: html.page(text, ["<p>x</p>"]),
    "name of a section": lambda text, _: html.section(text, "x", []),
    "title of a section": lambda text, _: html.section("x", text, []),
    "name in the contents": lambda text, _: html.contents([(text, "x")]),
    "what is said in the contents": lambda text, _: html.contents([("x", text)]),
    "paragraph": lambda text, _: html.paragraph(text),
    "faint paragraph": lambda text, _: html.paragraph(text, faint=True),
    "description of a picture": lambda text, folder: image(folder, text),
    "title of a table": lambda text, _: html.table([{"a": 1}], text),
    "column": lambda text, _: html.table([{text: 1.5}], "x"),
    "cell": lambda text, _: html.table([{"a": text}], "x"),
    "cell of a list": lambda text, _: html.table([{"a": [text]}], "x"),
    **{f"{field} of a claim": lambda text, _, field=field: card(**{field: text}) for field in CLAIM},
    "reason alone": lambda text, _: card(measured=None, reason=text),
}


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("field", FIELDS)
def test_text_never_becomes_markup(field, hostile, tmp_path):
    plain, found = (Markup(FIELDS[field](text, tmp_path)) for text in ("harmless", hostile))
    assert found.names() == plain.names()
    shown = found.text + " ".join(str(value) for _, attributes in found.tags for _, value in attributes)
    assert hostile.replace("_", " ") in shown or repr([hostile])[1:-1] in shown


def test_only_a_known_verdict_gives_a_card_its_colour():
    colours = {"holds": "holds", "holds partly": "holds-partly", "does not hold": "does-not-hold"}
    for verdict, colour in colours.items():
        assert Markup(card(verdict=verdict)).tags[0] == ("div", (("class", f"card {colour}"),))
        assert f".{colour} " in html.STYLE
    for verdict in (*HOSTILE, None, 3):
        ((name, value),) = Markup(card(verdict=verdict)).tags[0][1]
        assert name == "class" and set(value) <= set("abcdefghijklmnopqrstuvwxyz -")


@pytest.mark.parametrize("value", [None, 3, 0.5, float("nan"), True, ["a"], {"a": 1}])
def test_values_that_are_no_text_are_shown(value):
    """A result that somebody edited, or that an older version wrote, does not stop the report."""
    for field in CLAIM:
        assert Markup(card(**{field: value})).names()[0] == ("div", ["class"])
    assert html.table([{"a": value}], value).count("<td") == 1
    html.page(value, [html.section(value, value, [html.paragraph(value)]), html.contents([(value, value)])])


def test_a_name_that_is_no_unicode_can_be_written():
    page = html.page("caf\udce9", [html.paragraph("caf\udce9")])
    assert page.encode("utf-8").count(rb"caf\udce9") == 3
    page = html.page("x", [html.contents([("caf\udce9", "caf\udce9")])])
    assert page.encode("utf-8").count(rb"caf\udce9") == 2


def test_links_lead_to_their_sections():
    for name in (
        "layouts",
        "two words",
        "50 % é",
        'a"b',
        "a/b",
        "\x00",
        "caf\udce9",
        "\ud800",
        "\ud83d\ude00",
        3,
        None,
    ):
        page = Markup(html.page("x", [html.contents([(name, "x")]), html.section(name, "x", [])]))
        (link,) = (dict(attributes)["href"] for tag, attributes in page.tags if tag == "a")
        (section,) = (dict(attributes)["id"] for tag, attributes in page.tags if tag == "section")
        assert unquote(link) == f"#{section}"


@pytest.mark.parametrize("hostile", [*HOSTILE, "a | b", "two\nlines", "caf\udce9"])
def test_text_stays_in_its_cell_of_the_ledger(hostile):
    as_markdown = functions("claims")["as_markdown"]
    row = {**CLAIM, "measured": hostile, "reason": hostile, "device": hostile}
    lines = as_markdown([row], [hostile]).split("\n")
    as_markdown([row], [hostile]).encode("utf-8")
    (cells,) = (line for line in lines if line.startswith("| s |"))
    assert cells.replace(r"\|", "").count("|") == 9
    assert not any(re.search(r"<\S", line) for line in lines)
    assert as_markdown([{**row, "measured": "1 < 2 & 3 %"}], []).count("1 < 2 & 3 %") == 1
