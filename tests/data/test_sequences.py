"""Records as sequences, by what the tokens decode to."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from being_vl import VisualBPE
from being_vl.data.options import LossOptions
from being_vl.data.records import Record, Turn
from being_vl.data.sequences import DROPPED_RECORD, TRUNCATED_RECORD, Fault, SequenceBuilder, TokenSequence
from being_vl.errors import ModelError, QuantizerError, RecordError
from being_vl.layout import VocabularyLayout
from being_vl.shards.grids import GridStore
from helpers import tiny

KEYS = ["a.png", "b.png", "c.png"]
TEXT_SIZE = 410
TEMPLATES = {
    "default": None,
    "llama3": tiny.LLAMA3,
    "llama2": tiny.LLAMA2,
    "chatml": tiny.CHATML,
    "qwen3": tiny.QWEN3,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> GridStore:
    folder = tmp_path_factory.mktemp("data")
    tiny_quantizer = tiny.quantizer(folder / "quantizer")
    return tiny.grids(
        folder / "grids", KEYS, tiny_quantizer, failures={"broken.png": "broken.png: cannot be decoded"}
    )


@pytest.fixture(scope="module")
def bpe(store: GridStore) -> VisualBPE:
    return VisualBPE.train(
        list(store.values()),
        base_vocab_size=16,
        num_merges=5,
        quantizer_name="tiny",
        quantizer_fingerprint=store.quantizer_fingerprint,
    )


@pytest.fixture(scope="module")
def layout(store: GridStore, bpe: VisualBPE) -> VocabularyLayout:
    return VocabularyLayout(TEXT_SIZE, 16, bpe.num_merges, "tiny", store.quantizer_fingerprint)


def record(*texts: str, images: tuple[str, ...] = (), index: int = 0) -> Record:
    roles: tuple[Literal["user", "assistant"], ...] = ("user", "assistant")
    turns = tuple(Turn(roles[n % 2], text) for n, text in enumerate(texts))
    return Record(f"r{index}", images, turns, "perception", Path("data.json"), index)


def record_number(location: str) -> int:
    return int(location.partition(": record ")[2].split()[0])


def builder(template: str = "default", bos: bool = True, **parts: Any) -> SequenceBuilder:
    return SequenceBuilder(tiny.tokenizer(bos, TEMPLATES[template]), **parts)


def decode(build: SequenceBuilder, ids: Any) -> str:
    """Decoded text, with each image as {its BPE ids}."""
    text, layout = "", build.layout
    run: list[int] = []

    def flush() -> None:
        nonlocal text, run
        text, run = text + build.tokenizer.decode(run), []

    for token in map(int, ids):
        if layout is None or token < layout.text_size:
            run.append(token)
            continue
        flush()
        if token in (layout.boi, layout.eoi):
            text += "{" if token == layout.boi else "}"
        else:
            text += f"{layout.to_visual(token)} "
    flush()
    return text


def decode_labels(build: SequenceBuilder, sequence: TokenSequence) -> list[str]:
    """The runs of labels, decoded; checks that each label is the id itself."""
    has_label = sequence.labels != -100
    assert (sequence.labels[has_label] == sequence.ids[has_label]).all()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], has_label, [0]]).astype(int)))
    return [build.tokenizer.decode(sequence.ids[a:b]) for a, b in edges.reshape(-1, 2)]


TEXTS = {
    "default": (
        "<|begin_of_text|>{IMG}USER: What?\nASSISTANT: Red.<|end_of_text|>\n"
        "USER: And?\nASSISTANT: Blue.<|end_of_text|>",
        [" Red.<|end_of_text|>", " Blue.<|end_of_text|>"],
    ),
    "llama3": (
        "<|begin_of_text|>{IMG}<|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nRed.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nBlue.<|eot_id|>",
        ["Red.<|eot_id|>", "Blue.<|eot_id|>"],
    ),
    "llama2": (
        "<|begin_of_text|>{IMG}[INST] What? [/INST] Red. <|end_of_text|>"
        "<|begin_of_text|>[INST] And? [/INST] Blue. <|end_of_text|>",
        [" Red. <|end_of_text|>", " Blue. <|end_of_text|>"],
    ),
    "chatml": (
        "{IMG}<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nRed.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>",
        ["Red.<|im_end|>", "Blue.<|im_end|>"],
    ),
    "qwen3": (
        "{IMG}<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nRed.<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nBlue.<|im_end|>",
        ["Red.<|im_end|>", "Blue.<|im_end|>"],
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_dialogue_about_an_image_by_each_template(
    template: str, store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    """What is learned are the answers with their end of turn, to the token; and asking repeats training to the id."""
    bos = template not in ("chatml", "qwen3")
    build = builder(template, bos, layout=layout, bpe=bpe, grids=store)
    dialogue = record("<image>\nWhat?", "Red.", "And?", "Blue.", images=("a.png",))
    (sequence,) = build.build([dialogue])
    tokens = bpe.encode(store["a.png"])
    text, answers = TEXTS[template]
    assert decode(build, sequence.ids) == text.replace("IMG", "".join(f"{token} " for token in tokens))
    assert decode_labels(build, sequence) == answers
    assert sequence.ids.dtype == sequence.labels.dtype == np.int32
    assert sequence.category == "perception"
    assert sequence.location == dialogue.location

    prompt_ids = build.prompt(dialogue.turns[:3], [tokens])
    assert prompt_ids.dtype == np.int64
    start = np.flatnonzero((sequence.labels[1:] != -100) & (sequence.labels[:-1] == -100))[-1] + 1
    np.testing.assert_array_equal(prompt_ids, sequence.ids[:start])


@pytest.mark.parametrize(
    ("question", "images", "expected"),
    [
        ("Compare.", 2, "{a}{b}USER: Compare.\n"),
        ("<image><image> Compare.", 2, "{a}{b}USER: Compare.\n"),
        ("<image>\n<image>\nCompare.", 2, "{a}{b}USER: Compare.\n"),
        ("Compare.\n<image>\n<image>", 2, "{a}{b}USER: Compare.\n"),
        ("Is <image> like <image>?", 2, "USER: Is {a} like {b}?\n"),
        ("<image> Is it like <image>?", 2, "{a}USER: Is it like {b}?\n"),
        ("What is <image>", 1, "USER: What is {a}\n"),
        ("Is <image> like\n<image>", 2, "USER: Is {a} like\n{b}\n"),
        ("<image>", 1, "{a}USER: \n"),
        ("Hello.", 0, "USER: Hello.\n"),
    ],
)
def test_where_images_go(
    question: str, images: int, expected: str, store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    build = builder(layout=layout, bpe=bpe, grids=store)
    (sequence,) = build.build([record(question, "Yes.", images=tuple(KEYS[:images]))])
    for name in "ab":
        tokens = "".join(f"{token} " for token in bpe.encode(store[f"{name}.png"]))
        expected = expected.replace(f"{{{name}}}", f"{{{tokens}}}")
    assert decode(build, sequence.ids) == f"<|begin_of_text|>{expected}ASSISTANT: Yes.<|end_of_text|>"


def test_an_image_of_a_later_question_stays_there(
    store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    build = builder(layout=layout, bpe=bpe, grids=store)
    texts = ("<image>\nWhat?", "Red.", "<image>\nAnd this?", "Blue.")
    (sequence,) = build.build([record(*texts, images=("a.png", "a.png"))])
    image = "{" + "".join(f"{token} " for token in bpe.encode(store["a.png"])) + "}"
    assert decode(build, sequence.ids) == (
        f"<|begin_of_text|>{image}USER: What?\nASSISTANT: Red.<|end_of_text|>\n"
        f"USER: {image}\nAnd this?\nASSISTANT: Blue.<|end_of_text|>"
    )


def test_text_alone_trains_a_model_that_is_not_expanded() -> None:
    build = builder()
    question = "Is <image> a word?"
    (sequence,) = build.build([record(question, "No.")])
    assert decode(build, sequence.ids) == f"<|begin_of_text|>USER: {question}\nASSISTANT: No.<|end_of_text|>"
    assert decode_labels(build, sequence) == [" No.<|end_of_text|>"]
    with pytest.raises(RecordError, match=r"record 3 .*has the image 'a.png', but the model is not expanded"):
        build.build([record("What?", "Red.", images=("a.png",), index=3)])
    with pytest.raises(ModelError, match="not expanded"):
        build.prompt([Turn("user", "What?")], [[1, 2]])


def test_records_without_grids_are_named_with_the_reason(
    store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    keys = ["a.png", "gone.png", "broken.png", "gone.png", *(f"{n}.png" for n in range(9))]
    records = [record("What?", "Red.", images=(key,), index=n) for n, key in enumerate(keys)]
    with pytest.raises(RecordError) as error:
        builder(layout=layout, bpe=bpe, grids=store).build(records)
    gone = f"the image 'gone.png' is not among those of {store.folder} (from {store.root})"
    remedy = "quantize it too, and give both folders of grids"
    broken = f"the image 'broken.png' could not be read when {store.folder} was made (broken.png: cannot be decoded)"
    assert str(error.value) == (
        f"12 faults in records: data.json: record 1 (id 'r1'): {gone}; {remedy}; "
        f"data.json: record 2 (id 'r2'): {broken}; data.json: record 3 (id 'r3'): {gone}; {remedy}; and 9 more"
    )
    faults: list[Fault] = []
    records_of_both = [record("<image><image>", "Red.", images=("gone.png", "broken.png"))]
    assert builder(layout=layout, bpe=bpe, grids=store).build(records_of_both, faults) == []
    assert [fault.kind for fault in faults] == ["missing image"]
    with pytest.raises(RecordError, match=r"record 0 .*no grids were given"):
        builder(layout=layout, bpe=bpe).build(records)


def test_ids_outside_the_codebook_are_named(tmp_path: Path, store: GridStore) -> None:
    small_bpe = VisualBPE.train([np.zeros((4, 4), int)], base_vocab_size=4, num_merges=0)
    layout = VocabularyLayout(TEXT_SIZE, 4, 0, "tiny", store.quantizer_fingerprint)
    build = builder(layout=layout, bpe=small_bpe, grids=store)
    with pytest.raises(
        RecordError,
        match=r"data.json: record 0 .*: the grid of 'a.png' holds the id .* outside the codebook of 4",
    ):
        build.build([record("What?", "Red.", images=("a.png",))])


def test_parts_of_different_quantizers_are_refused_naming_both(
    tmp_path: Path, store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    other_quantizer = tiny.quantizer(tmp_path / "quantizer", name="other", seed=1)
    grids = tiny.grids(tmp_path / "grids", KEYS, other_quantizer)
    with pytest.raises(QuantizerError, match=f"'other' .{other_quantizer.fingerprint[:12]}.*'tiny'"):
        builder(layout=layout, bpe=bpe, grids=grids)
    changes = {"quantizer_name": "other", "quantizer_fingerprint": other_quantizer.fingerprint}
    with pytest.raises(
        QuantizerError, match=r"the vocabulary: is of quantizer 'tiny' .*the model is of 'other'"
    ):
        builder(layout=dataclasses.replace(layout, **changes), bpe=bpe)
    with pytest.raises(QuantizerError, match="codebook of 16 and 5 merges, the model 16 and 6"):
        builder(layout=dataclasses.replace(layout, num_merges=6), bpe=bpe)
    with pytest.raises(ModelError, match=r"tokenizer has 4\d\d ids, the model 100 rows"):
        builder(layout=dataclasses.replace(layout, text_size=100), bpe=bpe)


def test_records_that_are_too_long_are_an_error_or_left_out(
    store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    records = [record("What?", "Red. " * (30 if n % 2 else 1), images=("b.png",), index=n) for n in range(10)]
    limits = {"layout": layout, "bpe": bpe, "grids": store, "max_length": 60}
    with pytest.raises(RecordError) as error:
        builder(**limits).build(records)
    assert str(error.value).startswith("5 faults in records: data.json: record 1 (id 'r1'): ")
    assert str(error.value).endswith(" tokens, max_length is 60; and 2 more")

    faults: list[Fault] = []
    sequences = builder(**limits, too_long="drop").build(records, faults)
    assert [record_number(sequence.location) for sequence in sequences] == [0, 2, 4, 6, 8]
    assert [(fault.kind, record_number(fault.text)) for fault in faults] == [
        (DROPPED_RECORD, n) for n in (1, 3, 5, 7, 9)
    ]
    assert builder(**limits, too_long="drop").build(records)[0].location == sequences[0].location


@pytest.mark.parametrize("template", TEMPLATES)
def test_strings_of_special_tokens_in_a_text_are_text(template: str) -> None:
    build = builder(template)
    special_tokens = build.chat.special_tokens
    plain = build.build([record("What?", "Red.")])[0]
    for name in special_tokens:
        hostile_record = record(f"Say {name}{name}", f"{name}, I say {name}")
        sequence = build.build([hostile_record])[0]
        ids = set(build.tokenizer.convert_tokens_to_ids(list(special_tokens)))
        special_ids = [token for token in sequence.ids if token in ids]
        assert special_ids == [token for token in plain.ids if token in ids]
        assert build.tokenizer.decode(sequence.ids).count(name) == 4 + build.tokenizer.decode(
            plain.ids
        ).count(name)
        prompt = build.prompt(hostile_record.turns[:1])
        assert sequence.ids[: len(prompt)].tolist() == prompt.tolist()


def test_bad_records_are_left_out_and_listed_if_asked(
    store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    records = [
        record("What?", "Red.", images=("a.png",), index=0),
        record("What?", "Red.", images=("a.png", "gone.png"), index=1),
        record("What?", "Red.", images=("broken.png",), index=2),
        record("What?", index=3),
        record("What?", "Red. " * 500, index=4),
        record("Hi", "Ho", index=5),
    ]
    faults: list[Fault] = []
    build = builder(layout=layout, bpe=bpe, grids=store, max_length=300)
    assert [record_number(sequence.location) for sequence in build.build(records, faults)] == [0, 5]
    by_record = {record_number(fault.text): fault for fault in faults}
    assert {n: fault.kind for n, fault in by_record.items()} == {
        1: "missing image",
        2: "missing image",
        3: "no label",
        4: "too long",
    }
    assert by_record[1].text.startswith(
        f"data.json: record 1 (id 'r1'): the image 'gone.png' is not among those of {store.folder}"
    )
    assert by_record[3].text == "data.json: record 3 (id 'r3'): no answer to learn from"
    assert by_record[4].text.endswith(" tokens, max_length is 300")
    faults = []
    narrow_bpe = VisualBPE.train([np.zeros((2, 2), np.int32)], base_vocab_size=2, num_merges=1)
    small_layout = VocabularyLayout(TEXT_SIZE, 2, narrow_bpe.num_merges, "tiny", store.quantizer_fingerprint)
    assert (
        len(
            builder(layout=small_layout, bpe=narrow_bpe, grids=store).build(records[:1] + records[5:], faults)
        )
        == 1
    )
    assert faults[0].kind == "id outside codebook"
    assert "record 0 (id 'r0'): the grid of 'a.png' holds the id" in faults[0].text


def test_records_without_any_answer_are_an_error() -> None:
    with pytest.raises(RecordError, match=r"1 faults in records: data.json: record 4 .*: no answer"):
        builder().build([record("What?", "Red."), record("What?", index=4)])


def test_prompts_that_do_not_end_with_a_question_or_lack_images_are_refused(
    store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    build = builder(layout=layout, bpe=bpe)
    for turns in ([], [Turn("assistant", "a")], [Turn("user", "a"), Turn("assistant", "b")]):
        with pytest.raises(RecordError, match="must alternate"):
            build.prompt(turns)
    with pytest.raises(RecordError, match="2 <image> for 1 image"):
        build.prompt([Turn("user", "<image> or <image>?")], [[1]])
    with pytest.raises(ModelError, match=r"visual BPE id 21 at index 1 is outside 0\.\.20"):
        build.prompt([Turn("user", "What?")], [[1, 21]])


def test_a_template_that_cannot_be_used_is_refused() -> None:
    tokenizer = tiny.tokenizer()
    for template, message in [
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
            "no special token behind an",
        ),
        ("{{ messages[0]['content'] }}{{ eos_token }}", "does not write each turn's text once"),
        ("{{ raise_exception('only tools') }}", "fails on plain turns: only tools"),
    ]:
        tokenizer.chat_template = template
        with pytest.raises(ModelError, match=message):
            SequenceBuilder(tokenizer)


def test_the_date_in_a_template_does_not_change_with_the_day() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y %f') %}{% endif %}"
        "{{ date_string }}" + tiny.CHATML
    )
    turns = [Turn("user", "What day is it?")]
    assert "26 Jul 2024" in tokenizer.decode(SequenceBuilder(tokenizer).prompt(turns))


SYSTEM = {
    "default": "Be brief.\nUSER: What?\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n",
    "qwen3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n",
}


def add_system_turn(dialogue: Record) -> Record:
    return dataclasses.replace(dialogue, turns=(Turn("system", "Be brief."), *dialogue.turns))


@pytest.mark.parametrize("template", SYSTEM)
def test_a_system_turn_comes_behind_leading_images_as_the_template_writes_it(
    template: str, store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    build = builder(template, template in ("default", "llama3"), layout=layout, bpe=bpe, grids=store)
    plain = record("<image>\nWhat?", "Red.", images=("a.png",))
    system_record = add_system_turn(plain)
    (sequence,), (plain_sequence,) = build.build([system_record]), build.build([plain])
    text = decode(build, sequence.ids)
    assert text.partition("}")[2].startswith(SYSTEM[template])
    assert decode_labels(build, sequence) == decode_labels(build, plain_sequence)
    prompt_ids = build.prompt(system_record.turns[:2], [bpe.encode(store["a.png"])])
    np.testing.assert_array_equal(prompt_ids, sequence.ids[: len(prompt_ids)])


def test_a_system_turn_that_the_template_does_not_write_is_a_fault() -> None:
    build = builder("llama2")
    faults: list[Fault] = []
    sequences = build.build(
        [record("What?", "Red."), add_system_turn(record("What?", "Red.", index=1))], faults
    )
    assert len(sequences) == 1
    assert [fault.kind for fault in faults] == ["system turn"]
    assert "data.json: record 1 (id 'r1'): has a system turn" in faults[0].text
    with pytest.raises(ModelError, match="chat template"):
        build.prompt(add_system_turn(record("What?", "Red.")).turns[:2])


def test_a_caption_follows_its_images_without_a_template(
    store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    build = builder("llama3", layout=layout, bpe=bpe, grids=store, loss=LossOptions(captions=0.5))
    caption = Record(
        "c", ("a.png", "b.png"), (Turn("assistant", "Two <|eot_id|>s."),), "foundation", Path("c.tar"), 0
    )
    (sequence,) = build.build([caption])
    images = "".join(
        "{" + "".join(f"{token} " for token in bpe.encode(store[key])) + "}" for key in caption.images
    )
    assert decode(build, sequence.ids) == f"<|begin_of_text|>{images}Two <|eot_id|>s.<|eot_id|>"
    assert decode_labels(build, sequence) == ["Two <|eot_id|>s.<|eot_id|>"]
    assert set(sequence.weights) == {np.float32(0), np.float32(0.5)}
    assert [span.key for span in sequence.images] == ["a.png", "b.png"]


def test_weights_of_the_loss(store: GridStore, bpe: VisualBPE, layout: VocabularyLayout) -> None:
    """Each token is of an answer, an image, or a question; what opens a sequence is predicted by nothing."""
    dialogue = record("<image>\nWhat?", "Red.", "And <image>?", "Blue.", images=("a.png", "b.png"))
    for bos, template in ((True, "default"), (False, "chatml")):
        build = builder(template, bos, layout=layout, bpe=bpe, grids=store)
        (default,) = build.build([dialogue])
        build.loss = LossOptions(answers=3, questions=0.25, images=0.5)
        (sequence,) = build.build([dialogue])
        is_visual = sequence.ids >= TEXT_SIZE
        expected = np.where(default.weights > 0, 3, np.where(is_visual, 0.5, 0.25))
        expected[0] = 0
        assert sequence.weights.dtype == np.float32
        np.testing.assert_array_equal(sequence.weights, expected)
        for span in sequence.images:
            tokens = layout.to_model(bpe.encode(store[span.key]))
            np.testing.assert_array_equal(sequence.ids[span.start : span.stop], tokens)
            assert (sequence.ids[span.start - 1], sequence.ids[span.stop]) == (layout.boi, layout.eoi)
            assert span.cells == 16
        build.loss = LossOptions(1, 1, 1, 1)
        assert (build.build([dialogue])[0].weights[1:] == 1).all()


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 2)), min_size=1, max_size=5),
    limit=st.integers(5, 120),
    template=st.sampled_from(["default", "llama3", "qwen3"]),
)
def test_truncation_cuts_whole_turns_never_an_image_and_leaves_labels(
    store: GridStore,
    bpe: VisualBPE,
    layout: VocabularyLayout,
    lengths: list[tuple[int, int]],
    limit: int,
    template: str,
) -> None:
    """What is left is what the record with fewer turns gives; one turn more would be too long."""
    texts, images = [], []
    for words, marks in lengths:
        texts += ["See" + " <image>?" * marks, "Red. " * words]
        images += ["a.png", "b.png"][:marks]
    long_record = record(*texts, images=tuple(images))
    parts = {"layout": layout, "bpe": bpe, "grids": store}
    faults: list[Fault] = []
    sequences = builder(template, **parts, max_length=limit, too_long="truncate").build([long_record], faults)
    builder_without_limit = builder(template, **parts, max_length=10**6)
    marks = [marks for _, marks in lengths]
    shorter_sequences = [
        builder_without_limit.build([record(*texts[: 2 * n], images=tuple(images[: sum(marks[:n])]))])[0]
        for n in range(1, len(lengths) + 1)
    ]
    fitting_sequences = [sequence for sequence in shorter_sequences if len(sequence.ids) <= limit]
    if not fitting_sequences:
        assert sequences == []
        assert [fault.kind for fault in faults] == [DROPPED_RECORD]
        return
    (sequence,) = sequences
    np.testing.assert_array_equal(sequence.ids, fitting_sequences[-1].ids)
    np.testing.assert_array_equal(sequence.weights, fitting_sequences[-1].weights)
    assert sequence.weights.any()
    assert sequence.images == fitting_sequences[-1].images
    assert [fault.kind for fault in faults] == (
        [TRUNCATED_RECORD] if len(fitting_sequences) < len(lengths) else []
    )


def test_dropout_encodes_the_images_of_an_example_anew(
    store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    build = builder(layout=layout, bpe=bpe, grids=store, loss=LossOptions(images=0.5))
    (sequence,) = build.build([record("<image> or <image>?", "Red.", images=("a.png", "b.png"))])
    sequence_without_dropout = build.reencode(sequence, 0.0, seed=3)
    np.testing.assert_array_equal(sequence_without_dropout.ids, sequence.ids)
    assert sequence_without_dropout.images == sequence.images
    sequence_with_dropout = build.reencode(sequence, 0.5, seed=3)
    assert len(sequence_with_dropout.ids) > len(sequence.ids)
    repetition = build.reencode(sequence, 0.5, seed=3)
    np.testing.assert_array_equal(sequence_with_dropout.ids, repetition.ids)
    assert (build.reencode(sequence, 0.5, seed=4).ids.tolist()) != sequence_with_dropout.ids.tolist()
    for number, span in enumerate(sequence_with_dropout.images):
        tokens = layout.to_visual(sequence_with_dropout.ids[span.start : span.stop])
        assert tokens.tolist() == bpe.encode(store[span.key], dropout=0.5, seed=3 + number).tolist()
    text = sequence_with_dropout.ids < layout.first_visual
    np.testing.assert_array_equal(
        sequence_with_dropout.ids[text], sequence.ids[sequence.ids < layout.first_visual]
    )
    np.testing.assert_array_equal(
        sequence_with_dropout.weights[text], sequence.weights[sequence.ids < layout.first_visual]
    )
    assert (sequence_with_dropout.weights[~text] == 0.5).all()
    sequence_within_limit = build.reencode(
        sequence, 0.5, seed=3, max_length=len(sequence_with_dropout.ids) - 1
    )
    np.testing.assert_array_equal(sequence_within_limit.ids, sequence.ids)
