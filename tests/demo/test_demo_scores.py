"""The demo's scores and the controls beside them."""

import pytest

from being_vl.demo.exam import ExamAnswer, score, table
from being_vl.demo.scoring import exact_match, majority_share, set_f1
from being_vl.demo.shapesworld import Scene, Thing

RED = Thing("circle", "red", "small", "plain", 0, 0)
BLUE = Thing("square", "blue", "large", "plain", 4, 4)
SCENES = {"one.png": Scene("dark", (RED,)), "two.png": Scene("light", (RED, BLUE))}


def test_exact_match_ignores_case_spaces_and_the_last_full_stop() -> None:
    assert exact_match("Red , blue .", "red, blue")
    assert not exact_match("red", "red, blue")
    assert not exact_match("", "red")


def test_f1_of_sets() -> None:
    assert set_f1({"a", "b"}, {"b", "c"}) == pytest.approx(0.5)
    assert set_f1(set(), {"a"}) == 0
    assert set_f1([], []) == 1


def test_majority() -> None:
    assert majority_share(["Red", "red.", "blue"]) == pytest.approx(2 / 3)


def exam_answer(
    category: str, kind: str, image: str, reference: str, right_answer: str, swapped: str
) -> ExamAnswer:
    return ExamAnswer(category, kind, image, "?", reference, right_answer, swapped)


def test_rows_stand_beside_their_controls() -> None:
    rows = score(
        [
            exam_answer(
                "foundation", "caption", "two.png", "a red circle, a blue square.", "a red circle.", "a cat."
            ),
            exam_answer("perception", "colour", "one.png", "red", "red", "blue"),
            exam_answer("perception", "colour", "two.png", "red", "blue", "red"),
            exam_answer("perception", "colour", "two.png", "blue", "blue", "red"),
            exam_answer("perception", "background", "two.png", "light", "light", "dark"),
            exam_answer("perception", "texture", "two.png", "plain", "plain", "plain"),
        ],
        SCENES,
    )
    rows_of_kinds = {(row.category, row.kind): row for row in rows}
    caption = rows_of_kinds["foundation", "caption"]
    assert (caption.right, caption.swapped, caption.majority) == (pytest.approx(2 / 3), 0, None)
    several_objects = rows_of_kinds["perception", "colour, several objects"]
    assert (several_objects.questions, several_objects.right, several_objects.swapped) == (2, 0.5, 0.5)
    assert (several_objects.majority, several_objects.random_object) == (0.5, 0.5)
    assert rows_of_kinds["perception", "colour, one object"].random_object == 1
    assert rows_of_kinds["perception", "texture"].random_object == 1
    assert rows_of_kinds["perception", "background"].random_object is None
    average = rows_of_kinds["perception", "all"]
    assert (average.questions, average.right, average.swapped) == (5, pytest.approx(0.8), pytest.approx(0.4))
    assert average.majority == pytest.approx((2 * 0.5 + 3) / 5)
    lines = table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + len(rows)
