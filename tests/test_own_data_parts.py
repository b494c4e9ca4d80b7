"""A task of one file split into training text, examples to choose on and examples to report."""

import pytest

from lmcompress.errors import BadData, BadSetting, NoSuchSplit
from lmcompress.tasks import calibration_source, load_task
from tests.synthetic_mirror import byte_tokenizer

THIRDS = {"train": 0.3, "selection": 0.3, "report": 0.4}


def csv(path, rows, header="text,label"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.fixture
def reviews(tmp_path):
    rows = [f"review number {i // 2},{'ab'[i % 2]}" for i in range(200)]  # each text twice
    return csv(tmp_path / "reviews.csv", rows)


def texts(task):
    return [example["text"] for example in task.examples]


def test_equal_texts_are_in_one_part_and_every_example_in_one(reviews):
    task = load_task(reviews)
    parts = task.parts(THIRDS)
    train = parts["report"].training_examples()
    sets = {name: set(texts(part)) for name, part in parts.items()} | {"train": {e["text"] for e in train}}
    assert list(parts) == ["selection", "report"] and sum(map(len, sets.values())) == 100
    assert set.union(*sets.values()) == set(texts(task))
    assert [len(parts[name].examples) for name in parts] == [60, 80] and len(train) == 60
    assert calibration_source(parts["report"]) == "reviews.csv train"
    assert len({task.data_hash, *(part.data_hash for part in parts.values())}) == 3
    with pytest.raises(NoSuchSplit, match="not on 'validation'"):
        parts["report"].training_examples(split="validation")


def test_parts_depend_on_texts_and_seed_not_on_order_case_or_blanks(reviews, tmp_path):
    rows = reviews.read_text().splitlines()[1:]
    other = csv(tmp_path / "other.csv", [row.upper().replace(" ", "  ") for row in reversed(rows)])
    chosen = {text.upper().replace(" ", "  ") for text in texts(load_task(reviews).parts(THIRDS)["report"])}
    assert set(texts(load_task(other).parts(THIRDS)["report"])) == chosen
    assert set(texts(load_task(reviews).parts(THIRDS, seed=1)["report"])) != {t.lower() for t in chosen}


def test_a_metric_by_path_and_training_text_of_its_own_stay(reviews, tmp_path):
    more = csv(tmp_path / "train.csv", [f"another review {i},a" for i in range(9)])
    task = load_task(reviews, train_path=more, metric="matthews")
    part = task.parts({"selection": 0.5, "report": 0.5})["selection"]
    assert part.metric == "matthews" and len(part.training_examples()) == 9
    assert part.training_hash == task.training_hash != task.parts(THIRDS)["report"].training_hash


def test_a_text_is_split_into_stretches_and_documents_stay_whole(tmp_path):
    paragraphs = [f"Paragraph {i} says nothing that another says." * 5 for i in range(60)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    parts = load_task(tmp_path / "a.txt").parts(THIRDS)
    scored = {name: set(texts(part)) for name, part in parts.items()}
    train = {example["text"] for example in parts["report"].training_examples()}
    assert not scored["report"] & scored["selection"] and not train & (scored["report"] | scored["selection"])
    assert len(train) + sum(map(len, scored.values())) == 60
    documents = {example["document"] for example in parts["report"].examples}
    assert 1 < len(documents) < len(parts["report"].examples)
    assert len(parts["report"].training_features(byte_tokenizer(), limit=3)) == 3


def test_parts_that_cannot_be_are_refused(tmp_path):
    task = load_task(csv(tmp_path / "few.csv", ["same text,a", "Same  text,b", "other,a"]))
    pytest.raises(BadData, task.parts, THIRDS).match("2 different texts.*would be empty")
    for shares in ({"train": 0.5, "report": 0.6}, {"train": 0.0, "report": 1.0}):
        pytest.raises(BadSetting, task.parts, shares).match("each is a share above 0")
