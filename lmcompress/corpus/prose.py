"""Cleaning one docstring to readable English: sentences and parameter lists stay; code and markup go.

Plain regular expressions over lines. A change here changes the corpus: bump `pydocs.VERSION`.
"""

import re
import unicodedata
from collections.abc import Iterator
from inspect import cleandoc

_RULE = frozenset("=-~^*#\"'`+:._| ")  # what heading underlines and table borders are made of
_ADMONITION = re.compile(
    r"^(\s*)\.\. (note|warning|tip|important|caution|attention|hint|seealso|rubric|math)::\s*(.*)$"
)
_DIRECTIVE = re.compile(r"^(\s*)(\.\.(\s|$)|:(maxdepth|toctree|nosignatures|template):)")
_DOCTEST = re.compile(r"^\s*(>>>|In \[\d*\]:|\.\.\. )")
_PLACEHOLDER_LINE = re.compile(r"^\s*(%\([\w:. -]*\)s?|\{\w*\}|\[\[\w+\]\]|</?Tip[^>]*>)\s*$")
_SECTIONS = re.compile(
    r"^(Parameters|Params|Arg(ument)?s|Keyword Arg(ument)?s|Inputs?|Outputs?|Shape|Returns?|Yields?|Receives|"
    r"Other Parameters|Raises|Warns|Warnings?|See Also|Notes?|References?|Examples?|Example usage|Attributes|"
    r"Methods|Bibliography|Authors?|Credits|Licen[sc]e|Usage|Routine listings?|Citation)$",
    re.IGNORECASE,
)
_DROPPED_SECTION = re.compile(  # lists, and examples, whose sentences make no sense without their code
    r"^(references?|bibliography|authors?|credits|licen[sc]e|citation|methods|examples?( usage)?|usage)$",
    re.IGNORECASE,
)
_LEGAL = re.compile(
    r"copyright|licensed under|permission is hereby|all rights reserved|spdx-|public domain|\$id|"
    r"^:?(authors?|contact|maintainers?|organization) ?:|<[\w.+-]+@[\w.-]+>",
    re.IGNORECASE | re.MULTILINE,
)
_INLINE = (
    (re.compile(r":(?:[\w+-]+:)?[\w+-]+:`~(?:[\w.]*\.)?([^`<]+?)`"), r"`\1`"),
    (re.compile(r":(?:[\w+-]+:)?[\w+-]+:`!?([^`<]+?)(?:\s*<[^`>]*>)?`"), r"`\1`"),
    (re.compile(r"``([^`\n]+)``"), r"`\1`"),
    (re.compile(r"`~(?:[\w.]*\.)?(?=\w+`)"), "`"),
    (re.compile(r"`\.(?=[A-Za-z_])"), "`"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]+>`__?"), r"\1"),
    (re.compile(r"\[([^\]\n]+)\]\([^)\s]+\)"), r"\1"),
    (re.compile(r"\[(`[^`\n]+`)\]"), r"\1"),
    (re.compile(r"(?<=\w)\s*\[(?:\d+|[A-Z]\w*\d{2,4}\w?)\]_"), ""),
    (re.compile(r"`([\w .-]+)`__?(?!\w)"), r"\1"),
    (re.compile(r"%\((\w*)[^)\n]*\)s"), r"\1"),
    (re.compile(r" ?[<(]https?://[^\s>)]+[>)]"), ""),
    (re.compile(r"(?<=\S) {2,}"), " "),
    (re.compile(r" +$", re.MULTILINE), ""),
    (re.compile(r"\n{3,}"), "\n\n"),
)


def clean(doc: str) -> str:
    """Return prose of a docstring: no doctests, code, directives, reference lists, markup, legal notices."""
    text = unicodedata.normalize("NFC", cleandoc(doc)).encode("utf-8", "ignore").decode()
    text = re.sub(r"[^\S\n]", " ", re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text))
    text = "\n".join(_drop_sections(_drop_blocks(text.split("\n"))))
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    return "\n\n".join(p for p in text.split("\n\n") if not _LEGAL.search(p)).strip()


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _block_end(lines: list[str], start: int) -> int:
    """Return the first line from `start` on that is neither blank nor deeper than the one before `start`."""
    indent, end = _indent(lines[start - 1]), start
    while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > indent):
        end += 1
    return end


def _drop_blocks(lines: list[str]) -> Iterator[str]:
    """Leave out doctests, fenced and literal code, directives and their content, lone placeholders."""
    i = 0
    while i < len(lines):
        line, i = lines[i], i + 1
        stripped = line.strip()
        if stripped.startswith(("```", "~~~")) and not stripped.strip("`~ ").count("`"):
            while i < len(lines) and not lines[i].strip().startswith(stripped[:3]):
                i += 1
            i += 1
        elif _DOCTEST.match(line):
            while i < len(lines) and lines[i].strip():
                i += 1
        elif admonition := _ADMONITION.match(line):
            if admonition[3]:
                yield admonition[1] + admonition[3]
        elif (is_directive := _DIRECTIVE.match(line)) or stripped.endswith("::"):
            i = _block_end(lines, i)
            if not is_directive and len(stripped.split()) > 3:
                yield line.rstrip()[:-1]
            yield ""
        elif not _PLACEHOLDER_LINE.match(line):
            yield line


def _is_rule(line: str) -> bool:
    return len(line.strip()) >= 3 and _RULE.issuperset(line)


def _drop_sections(lines: Iterator[str]) -> Iterator[str]:
    """Turn underlined headings into `Heading:` lines; leave out reference lists and empty sections."""
    sections, lines = [("", [])], list(lines)
    for line, after in zip(lines, [*lines[1:], ""]):
        if _is_rule(line):
            continue
        name = line.strip().rstrip(":")
        is_titled = _is_rule(after) and not line.startswith("  ")
        is_labelled = line == name + ":" and _SECTIONS.match(name)
        if name and (is_titled or is_labelled):
            sections.append((name + ":" * bool(_SECTIONS.match(name)), []))
        else:
            sections[-1][1].append(line)
    for name, content in sections:
        empty = not any(line.strip() for line in content)
        if _DROPPED_SECTION.match(name.rstrip(":")) or (empty and name.endswith(":")):
            continue
        if name:
            yield from ("", name)
        yield from content


_SENTENCE_END = re.compile(
    r"(?<![.\s][A-Za-z])(?<!e\.g)(?<!i\.e)(?<!vs)(?<!etc)(?<!cf)[.!?][)`'\"]?(?=\s+[A-Z`\"'(])"
)
_NOT_PROSE = re.compile(r"^( {4}|[:@]\w|[-*+•|] |\d+[.)] |[A-Z]\w*( \w+)?:$|\w+ ?(: |\(`))")


def split_summary(text: str) -> tuple[str, str]:
    """Return the first sentence as one line, empty if the text opens with a list, and all after it."""
    head, _, body = text.partition("\n\n")
    lines = head.split("\n")
    end = next((i for i in range(len(lines)) if _ends_before(lines, i)), len(lines))
    opening, more = "\n".join(lines[:end]), "\n".join(lines[end:])
    if sentence := _SENTENCE_END.search(opening):
        more = f"{opening[sentence.end() :].strip()}\n{more}".strip("\n")
        opening = opening[: sentence.end()]
    return " ".join(opening.split()), "\n\n".join(filter(None, (more, body.strip("\n"))))


def _ends_before(lines: list[str], i: int) -> bool:
    """Tell whether line `i` of the first paragraph no longer belongs to its first sentence."""
    before = lines[i - 1]
    is_new_line = i > 0 and len(before) < 50 and lines[i][:1].isupper() and before[-1:] not in ",;"
    return bool(_NOT_PROSE.match(lines[i]) or _SECTIONS.match(lines[i].rstrip(":"))) or is_new_line


def words(text: str) -> list[str]:
    """Return lower-case words: what two texts are compared by."""
    return re.findall(r"\w+", text.lower())
