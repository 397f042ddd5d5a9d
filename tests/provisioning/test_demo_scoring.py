"""The evaluation's rules, on pictures whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from provisioning.demo import evaluation, scoring, sheets
from provisioning.demo.captions import Facts
from provisioning.demo.evaluation_prompts import EvaluationPrompt
from provisioning.demo.vocabulary import GROUNDS, Subject


def picture(ground: tuple[int, int, int], subject: tuple[int, int, int], left: int = 50) -> NDArray[np.uint8]:
    made = np.empty((192, 192, 3), np.uint8)
    made[:] = ground
    made[60:140, left : left + 80] = subject
    return made


@pytest.mark.parametrize("word", GROUNDS)
def test_each_ground_is_read_by_its_word(word: str) -> None:
    assert scoring.ground_word(picture(GROUNDS[word], (255, 255, 255))) == word


@pytest.mark.parametrize(
    ("rgb", "word"),
    [((220, 40, 40), "red"), ((40, 90, 220), "blue"), ((250, 220, 60), "yellow"), ((20, 20, 20), "black"), ((60, 170, 80), "green")],
)
def test_a_subject_is_read_by_its_colour_whatever_the_ground(rgb: tuple[int, int, int], word: str) -> None:
    for ground in ((255, 255, 255), GROUNDS["purple"]):
        assert scoring.subject_word(picture(ground, rgb)) == word


def test_the_ground_is_no_part_of_the_subject() -> None:
    assert scoring.subject_mask(picture((255, 255, 255), (220, 40, 40))).sum() == 80 * 80


def test_lab_of_the_primaries_is_that_of_the_standard() -> None:
    # CIELAB under D65 of sRGB white, red and blue, as any table gives it.
    expected = np.array([[100, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]])
    rgb = np.array([[255, 255, 255], [255, 0, 0], [0, 0, 255]], np.uint8)
    assert np.allclose(scoring.to_lab(rgb), expected, atol=0.05)


def test_a_changed_tint_shows_in_the_difference_and_not_in_the_shape() -> None:
    one, other = picture((255, 255, 255), (220, 40, 40)), picture((230, 240, 255), (220, 40, 40))
    moved = picture((255, 255, 255), (220, 40, 40), left=90)
    assert scoring.difference(one, other) > 5
    assert scoring.overlap(one, other) == 1
    assert scoring.overlap(one, moved) == pytest.approx(40 / 120)


def test_the_nearest_picture_is_found() -> None:
    shelf = np.stack([picture((255, 255, 255), (220, 40, 40), left) for left in (10, 50, 100)])
    found, distance = scoring.nearest(picture((255, 255, 255), (215, 45, 40), 52), scoring.thumbnail(shelf))
    assert found == 1
    assert distance < 30


def test_marks_count_names_colours_and_grounds_and_the_sheets_are_written(tmp_path: Path) -> None:
    subjects = (Subject("box", ("box",)), Subject("disc", ("disc",)))
    prompts = (
        EvaluationPrompt("a box", "box", "plain", "", "", (1, 2)),
        EvaluationPrompt("a red disc on a blue background", "disc", "colour and ground", "red", "blue", (1, 2)),
    )
    white, red = (255, 255, 255), (220, 40, 40)
    made = np.stack([picture(white, red), picture(white, red, 90), picture(GROUNDS["blue"], red), picture(GROUNDS["green"], red)])
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.1, 0.9], [0.4, 0.6]], np.float32)
    answers = evaluation.mark(prompts, made, probabilities, subjects)
    marks = evaluation.figures(answers, made, 2, len(subjects))
    assert marks["named right"] == 0.75
    assert marks["named right, by kind"] == {"plain": 0.5, "colour and ground": 1.0}
    assert marks["subject colours right"] == 1.0
    assert marks["ground colours right"] == 0.5
    assert marks["colour words right"] == 0.75
    assert marks["chance"] == 0.5
    sheet = sheets.contact(made, [a.named == a.subject for a in answers], [a.prompt for a in answers], 2)
    sheets.save(sheet, tmp_path / "sheet.jpg")
    assert 0 < (tmp_path / "sheet.jpg").stat().st_size <= 600_000


def test_everything_is_handed_in(tmp_path: Path) -> None:
    subjects = (Subject("box", ("box",)),)
    prompts = tuple(EvaluationPrompt(f"box {n}", "box", "plain", "", "", (1, 2)) for n in range(12))
    made = np.stack([picture((255, 255, 255), (220, 40, 40), 20 + n) for n in range(24)])
    answers = evaluation.mark(prompts, made, np.ones((24, 1), np.float32), subjects)
    facts = [Facts(0, ("box",), False, "", "", "")] * 24
    evaluation.hand_in(answers, made, training=made, facts=facts, subjects=subjects, judge={"chance": 1.0}, folder=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"sheet.jpg", "nearest.jpg", "evaluation.json"}
    written = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert len(written["answers"]) == 24
    assert len(written["nearest training pictures"]) == 12
