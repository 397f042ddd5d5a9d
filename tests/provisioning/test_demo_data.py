"""The built-in model's data: words, captions, pictures, drawings, and the pairs that training never sees."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import BadRequest
from appliance.trust.description import Vocabulary
from appliance.web.care import knows_a_word
from provisioning.demo import captions, drawings, evaluation_prompts, knowledge, pictures, stand_ins, tokenizer, vocabulary

PROMPTS = evaluation_prompts.read()
SUBJECTS = vocabulary.subjects()


def test_at_least_three_hundred_subjects_each_with_a_name_of_its_own() -> None:
    first = [subject.names[0] for subject in SUBJECTS]
    assert len(SUBJECTS) >= 300
    assert len(set(first)) == len(first)
    assert len({subject.label for subject in SUBJECTS}) == len(SUBJECTS)


def test_the_evaluation_has_its_thirds_and_is_what_its_seed_draws() -> None:
    kinds = [prompt.kind for prompt in PROMPTS]
    assert {kind: kinds.count(kind) for kind in kinds} == {"plain": 32, "filler": 32, "colour and ground": 32}
    assert all(len(prompt.seeds) == 2 for prompt in PROMPTS)
    assert len({prompt.label for prompt in PROMPTS}) >= 64
    assert evaluation_prompts.choose() == PROMPTS


def test_half_of_the_filler_is_words_that_no_caption_has() -> None:
    new = {*evaluation_prompts.NEW_OPENINGS, *evaluation_prompts.NEW_ADJECTIVES, *evaluation_prompts.NEW_ENDINGS}
    filler = [prompt.prompt for prompt in PROMPTS if prompt.kind == "filler"]
    assert sum(any(text.startswith(opening) for opening in evaluation_prompts.NEW_OPENINGS) for text in filler) == 16
    assert not new & {*vocabulary.OPENINGS, *vocabulary.ADJECTIVES, *vocabulary.ENDINGS}


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(SUBJECTS), st.sampled_from(["", *vocabulary.PAINTS]), st.booleans(), st.integers(0, 2**32))
def test_no_picture_is_planned_of_a_pair_that_the_evaluation_asks_for(
    subject: vocabulary.Subject, own: str, flat: bool, seed: int
) -> None:
    held_out = evaluation_prompts.held_out(PROMPTS)
    for colour, ground in pictures.plan(subject, own, flat, held_out, random.Random(seed)):
        assert (subject.label, "colour", colour) not in held_out
        assert (subject.label, "ground", ground) not in held_out


@settings(deadline=None)
@given(st.sampled_from(SUBJECTS), st.integers(0, 2**32))
def test_a_caption_never_names_a_colour_or_a_ground_that_the_picture_does_not_have(subject: vocabulary.Subject, seed: int) -> None:
    facts = captions.Facts(0, subject.names, False, "purple", "yellow", "")
    text = captions.caption(facts, random.Random(seed))
    own = {word for name in subject.names for word in name.split()}
    said = {word for word in (*vocabulary.PAINTS, *vocabulary.GROUNDS) if word in text.replace(",", " ").replace(".", " ").split()}
    assert said - own <= {"purple", "yellow"}
    assert "purple" in text
    assert "yellow" in text


def test_captions_are_lower_case_and_differ_from_draw_to_draw() -> None:
    facts = captions.Facts(0, ("castle",), False, "", "", "gray")
    rng = random.Random(1)
    drawn = {captions.caption(facts, rng) for _ in range(100)}
    assert len(drawn) > 50
    assert all(text == text.lower() and "castle" in text for text in drawn)


def test_the_plain_pictures_of_a_subject_differ_so_that_a_seed_can_matter(tmp_path: Path) -> None:
    drawing = stand_ins.draw(tmp_path / "drawings")
    pictures.make(stand_ins.SUBJECTS, drawing, (), tmp_path)
    images, facts = np.load(tmp_path / "images.npy"), pictures.read_facts(tmp_path)
    assert images.shape == (len(facts), pictures.SIZE, pictures.SIZE, 3)
    of_first = [(image, fact) for image, fact in zip(images, facts, strict=True) if fact.subject == 0 and not fact.flat]
    plain = [image for image, fact in of_first if not (fact.colour or fact.ground)]
    assert len(plain) == 5
    assert min(np.abs(a.astype(int) - b).mean() for a in plain for b in plain if a is not b) > 3


def test_a_repainted_drawing_reads_as_its_colour_word(tmp_path: Path) -> None:
    rgba = pictures.load_drawing(stand_ins.draw(tmp_path)(stand_ins.SUBJECTS[1], False))
    assert rgba is not None
    for word in ("red", "orange", "yellow", "green", "blue", "purple", "pink"):
        painted = pictures.repaint(rgba, word)
        words, counts = np.unique(pictures.hue_word(painted[..., :3][painted[..., 3] > 0.5]), return_counts=True)
        assert words[counts.argmax()] == word


def test_the_tokenizer_reads_what_transformers_reads_from_the_same_files(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    facts = [captions.Facts(n, subject.names, False, "", "", "") for n, subject in enumerate(SUBJECTS[:20])]
    learned = tokenizer.learn(facts, SUBJECTS[:20], tmp_path / "t")
    again = CLIPTokenizer.from_pretrained(str(tmp_path / "t"))
    for text in ("a photo of a beautiful monkey", "DOG on a blue background!", "zweiundvierzig Äpfel, 3d", ""):
        ids = learned(text, padding="max_length", max_length=tokenizer.LENGTH, truncation=True).input_ids
        assert ids == again(text, padding="max_length", max_length=tokenizer.LENGTH, truncation=True).input_ids
        assert len(ids) == tokenizer.LENGTH
    assert learned.decode(learned("a photo of a monkey").input_ids, skip_special_tokens=True).strip() == "a photo of a monkey"
    assert len(learned("monkey").input_ids) == 3        # a name is one token, between the two marks


def test_every_example_and_every_name_holds_a_word_that_the_page_knows() -> None:
    about = knowledge.about(SUBJECTS)
    words = about["vocabulary"]["words"]
    known = Vocabulary(subjects=(), words=tuple(words), examples=())
    for text in [*about["vocabulary"]["examples"], *(name for subject in SUBJECTS for name in subject.names)]:
        assert knows_a_word(text, known), text
    assert not knows_a_word("a photo of the parliament with a fence in it", known)


def test_the_packages_are_pinned_by_sha512_and_no_address_is_written_down() -> None:
    lock = json.loads((vocabulary.HERE / "package-lock.json").read_text(encoding="utf-8"))
    wanted = json.loads((vocabulary.HERE / "package.json").read_text(encoding="utf-8"))["dependencies"]
    packages = {path.removeprefix("node_modules/"): entry for path, entry in lock["packages"].items() if path}
    assert all(entry["integrity"].startswith("sha512-") and "resolved" not in entry for entry in packages.values())
    assert {name: packages[name]["version"] for name in wanted} == wanted


def test_without_npm_the_refusal_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadRequest, match="npm is not installed") as refused:
        drawings.fetch(SUBJECTS, tmp_path / "drawings")
    assert "nodejs" in str(refused.value.hint)


@pytest.mark.skipif(shutil.which("npm") is None or shutil.which("node") is None, reason="needs node and npm")
def test_packages_that_the_lock_does_not_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("package.json", "render.js", "package-lock.json"):
        shutil.copyfile(vocabulary.HERE / name, source / name)
    wanted = (source / "package.json").read_text(encoding="utf-8")
    (source / "package.json").write_text(wanted.replace("17.0.0", "16.0.0"), encoding="utf-8")
    monkeypatch.setattr(drawings, "HERE", source)
    with pytest.raises(BadRequest, match="npm failed"):
        drawings.fetch(SUBJECTS[:2], tmp_path / "drawings")
    assert not (tmp_path / "drawings" / "drawn").exists()
