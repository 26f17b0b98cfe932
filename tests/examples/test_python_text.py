"""The examples' data: real, the same every time, and nothing held out is trained on."""

import pytest
import python_text


@pytest.fixture(scope="module")
def docstrings():
    return python_text.docstring_examples()


@pytest.fixture(scope="module")
def reference():
    return python_text.language_reference()


def test_there_is_enough_of_every_package(docstrings):
    train, held_out = docstrings
    for label, package in enumerate(python_text.PACKAGES):
        assert sum(example.label == label for example in train) >= 30, package
        assert any(example.label == label for example in held_out), package


def test_no_docstring_is_on_both_sides_or_under_two_labels(docstrings):
    train, held_out = docstrings
    texts = [example.text for example in train + held_out]
    assert len(set(texts)) == len(texts)


def test_docstrings_come_from_the_running_python(docstrings):
    import asyncio
    import inspect

    texts = {example.text for examples in docstrings for example in examples}
    assert inspect.getdoc(asyncio.sleep) in texts


def test_lengths_vary(docstrings):
    words = sorted(len(example.text.split()) for example in docstrings[0])
    assert words[len(words) // 10] * 5 < words[9 * len(words) // 10]


def test_the_split_is_the_same_every_time(docstrings, reference):
    assert python_text.docstring_examples() == docstrings
    assert python_text.language_reference() == reference


def test_the_split_of_an_example_does_not_depend_on_the_others(docstrings):
    held_out = {example.text for example in docstrings[1]}
    _, fewer = python_text.docstring_examples(python_text.PACKAGES[:1])
    assert {example.text for example in fewer if example.text in held_out} == {
        e.text for e in docstrings[1] if e.label == 0
    }


def test_reference_shares_no_paragraph(reference):
    train, held_out = (
        {" ".join(paragraph.split()) for text in texts for paragraph in text.split("\n\n")} - {""}
        for texts in reference
    )
    assert train.isdisjoint(held_out)
    assert sum(map(len, train)) > 7 * sum(map(len, held_out)) > 100_000
