"""How long the sentences of the documentation are: `python tests/docs/test_prose.py` prints a table of all pages."""

import re
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parents[2]
MAX_WORDS = 45
MEAN_WORDS = 21
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    if page != ROOT / "docs/lab.md"
)


def paragraphs(text: str) -> list[str]:
    """Paragraphs and list items of a page, without code, tables, headings, comments and directives."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^( *)(```|~~~).*?^\1\2 *$", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks: list[str] = []
    in_paragraph = in_directive = False
    for line in text.splitlines():
        content = line.strip()
        if line.startswith(":::"):
            in_directive = True
        in_directive = in_directive and bool(content)
        indented_code = line.startswith("    ") and not in_paragraph and not re.match(r"[-*\d]", content)
        if not content or in_directive or content[0] in "#|!" or indented_code:
            in_paragraph = False
        elif re.match(r"([-*]|\d+\.) ", content):
            blocks.append(re.sub(r"^([-*]|\d+\.) ", "", content))
            in_paragraph = True
        elif in_paragraph:
            blocks[-1] += " " + content
        else:
            blocks.append(content)
            in_paragraph = True
    return blocks


def sentences(text: str) -> list[str]:
    """All sentences of a page; inline code, like the text of a link, counts as it is read."""
    all_sentences = []
    for block in paragraphs(text):
        block = re.sub(r"`[^`]*`", "code", block)
        block = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", block)
        block = re.sub(r"\b(e\.g|i\.e|etc|vs|cf)\.", r"\1", block)
        all_sentences += [
            part for part in re.split(r"(?<=[.?!])[\"')*_]*\s+", block) if re.search(r"\w", part)
        ]
    return all_sentences


def word_count(sentence: str) -> int:
    """Words of a sentence: what stands between spaces and has a letter or a digit."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short(page: Path) -> None:
    counts = {sentence: word_count(sentence) for sentence in sentences(page.read_text(encoding="utf-8"))}
    long_sentences = {sentence: count for sentence, count in counts.items() if count > MAX_WORDS}
    assert not long_sentences
    if len(counts) > 5:
        assert mean(counts.values()) <= MEAN_WORDS


def test_long_sentences_are_noticed() -> None:
    text = "# A heading\n\nOne, two. Three `four five` [six](seven.md).\n\n    code here\n\n- an item\n  of two lines\n"
    assert [word_count(sentence) for sentence in sentences(text)] == [2, 3, 5]


if __name__ == "__main__":
    for path in PAGES:
        lengths = [word_count(sentence) for sentence in sentences(path.read_text(encoding="utf-8"))] or [0]
        print(f"{mean(lengths):5.1f} {max(lengths):4d} {len(lengths):4d}  {path.relative_to(ROOT)}")
