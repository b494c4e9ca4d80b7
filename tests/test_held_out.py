"""Rows held out of a training split share no phrase with what is trained on."""

from hypothesis import given
from hypothesis import strategies as st

from lmcompress.tasks.held_out import HoldOut


def test_a_phrase_of_a_held_out_sentence_is_not_trained_on():
    whole = "one long sentence of exactly ten words to hold out"
    texts = [
        whole,
        "sentence of exactly ten",
        "of exactly ten",
        "another row that shares nothing",
        whole.upper(),
    ]
    held_out, training = HoldOut(1, least_words=10).split(texts)
    assert held_out == [0]
    assert training == [2, 3]  # three words in common are no phrase; a copy in capitals is the row itself


def test_what_is_part_of_another_row_is_not_held_out():
    texts = ["a b c d e", "x a b c d e y", "q r s t u", "short", "shorter", "shortest"]
    assert HoldOut(5, least_words=5).split(texts)[0] == [1, 2]


def test_of_few_rows_at_most_a_third_is_held_out():
    texts = [f"row {i} of these" for i in range(9)]
    held_out, training = HoldOut(2000, least_words=2).split(texts)
    assert len(held_out) == 3 and len(training) == 6


@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=8), min_size=1, max_size=12))
def test_no_phrase_is_shared_and_no_row_is_on_both_sides(rows):
    held_out, training = HoldOut(2, least_words=3, phrase=2).split([" ".join(row) for row in rows])
    pairs = lambda i: set(zip(rows[i], rows[i][1:]))  # noqa: E731
    assert not set(held_out) & set(training)
    assert all(not pairs(i) & pairs(j) for i in held_out for j in training)
