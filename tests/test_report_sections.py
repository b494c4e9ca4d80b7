"""Every section holds with any part of its rows, in any order, and draws each figure whose rows there are."""

import copy
from itertools import islice, permutations

import pytest
from matplotlib import pyplot as plt

from helpers.report import build
from tests import synthetic_rows, test_report_low_rank, test_report_other_text, test_report_quantization

MAKERS = {
    "02_pruning": synthetic_rows.pruning_rows,
    "03_structured_pruning": synthetic_rows.structured_rows,
    "04_distillation": synthetic_rows.distillation_rows,
    "05_quantization": test_report_quantization.rows_of,
    "06_low_rank_and_sharing": test_report_low_rank.low_rank_rows,
    "07_moefication": synthetic_rows.moefication_rows,
    "08_architecture_training": synthetic_rows.architecture_rows,
    "09_sheared_llama": synthetic_rows.sheared_rows,
    "12_other_text": test_report_other_text.other_text_rows,
}
SECTIONS = {section.notebook: section for section in build.sections()}


@pytest.mark.parametrize("notebook", MAKERS)
def test_a_section_holds_with_any_part_of_its_rows(notebook):
    section, rows = SECTIONS[notebook], MAKERS[notebook]()
    begun = (rows[:count] for count in range(1, len(rows) + 1))
    without = ([row for row in rows if row is not missing] for missing in rows)
    for some in (*begun, *without, *map(list, islice(permutations(rows, 2), 60))):
        sentences = [*section.findings(some), *section.summary(some)]
        assert all(isinstance(sentence, str) and "nan" not in sentence.split() for sentence in sentences)
        assert all(card.verdict for card in section.cards(some))
    assert section.findings(rows) and section.summary(rows)


@pytest.mark.parametrize("notebook", MAKERS)
def test_every_figure_is_drawn_from_the_rows_there_are(notebook):
    section, rows = SECTIONS[notebook], MAKERS[notebook]()
    shown = {drawing.name for drawing in build.drawable(section, rows)}
    assert shown
    for missing in (None, *{row["technique"] for row in rows} - {"dense"}):
        some = [row for row in rows if row["technique"] != missing]
        drawable = build.drawable(section, some)
        assert {drawing.name for drawing in drawable} <= shown
        for drawing in drawable:
            figure = drawing.draw(some)
            assert any(axis.lines or axis.containers or axis.collections for axis in figure.axes)
            plt.close(figure)


@pytest.mark.parametrize("notebook", MAKERS)
def test_too_few_examples_for_an_interval_are_drawn_and_reported(notebook):
    section, rows = SECTIONS[notebook], copy.deepcopy(MAKERS[notebook]())
    for row in rows:
        if row["quality"]:
            row["quality"] |= {"low": None, "high": None, "difference": None}
    assert isinstance(section.findings(rows) + section.summary(rows), list)
    for drawing in build.drawable(section, rows):
        plt.close(drawing.draw(rows))
