"""Scores of answers against what their papers print, values done by hand, and transcriptions of the official rules."""

import random
import re

import pytest

from pe_jax.evals import answers

# ---------------------------------------------------------------------------------------------------------- free text


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("x", "x", 0)],
)
def test_edit_distances_known_from_textbooks(a, b, distance):
    assert answers.edit_distance(a, b) == distance


def test_anls_is_one_less_the_relative_distance_to_the_nearest_answer():
    assert answers.anls("Sitting", ["mitten", "kitten"]) == pytest.approx(1 - 3 / 7)
    assert answers.anls("  NEW   york\n", ["new york"]) == 1
    assert answers.anls("abc", ["xyz"]) == 0


def test_anls_below_a_half_is_nothing_and_exactly_a_half_counts():
    assert answers.anls("abxx", ["abcd"]) == 0.5
    assert answers.anls("axxx", ["abcd"]) == 0
    assert answers.anls("", ["abcd"]) == 0


@pytest.mark.parametrize("wrong", ["one text", []])
def test_answers_that_are_no_list_are_refused(wrong):
    for score in (answers.anls, answers.exact, answers.vqa):
        with pytest.raises(ValueError, match="want"):
            score("one text", wrong)


def test_exact_ignores_case_and_spaces_alone():
    assert answers.exact(" Agatha  Christie", ["someone", "agatha christie"]) == 1
    assert answers.exact("agatha christie.", ["agatha christie"]) == 0


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("105", "100", 1), ("105.01", "100", 0), ("95", "100", 1), ("94.9", "100", 0), ("-10", "10", 0),
        ("14%", "0.14", 1), ("14", "14%", 0), ("0", "0", 1), ("0.0", "0", 0), ("Blue ", "blue", 1), ("blue", "red", 0),
        ("five", "5", 0), ("12 apples", "12", 0), ("-9.8", "-10", 1), ("2008", "2020", 1),
    ],
)  # fmt: skip
def test_a_number_may_be_five_percent_off(reply, answer, score):
    assert answers.relaxed(reply, answer) == score


# ---------------------------------------------------------------------------------------------------------------- VQA

# The table as the official code has it: missing apostrophe → word.
PAIRS = """aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've
    couldnt've:couldn't've didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've
    hasnt:hasn't havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's
    Id've:I'd've I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll let's:let's
    maam:ma'am mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't
    mustve:must've neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at
    'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't
    shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
    somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've
    someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd
    somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's thered:there'd
    thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
    they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've
    we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's
    whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's
    whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't
    wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've
    y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're
    youve:you've"""
OFFICIAL = dict(pair.split(":") for pair in PAIRS.split())


def official(text):
    """The normalisation of the VQA evaluation, step by step as it is described and done there."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in [
        ";",
        "/",
        "[",
        "]",
        '"',
        "{",
        "}",
        "(",
        ")",
        "=",
        "+",
        "\\",
        "_",
        "-",
        ">",
        "<",
        "@",
        "`",
        ",",
        "?",
        "!",
    ]:
        if (mark + " " in text or " " + mark in text) or re.search(r"(\d)(\,)(\d)", text) is not None:
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    out = re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", out)
    names = ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    numbers = dict(zip(names, ["0", *map(str, range(11))], strict=True))
    kept = [
        word for word in (numbers.get(word, word) for word in out.lower().split()) if word not in ("a", "an", "the")
    ]
    return " ".join(OFFICIAL.get(word, word) for word in kept)


def test_normalisation_is_the_official_one():
    words = [
        *OFFICIAL,
        *OFFICIAL.values(),
        "a",
        "The",
        "none",
        "Ten",
        "two",
        "1,000",
        "3.5",
        "dog",
        "U.S.",
        "black/white",
    ]
    marks = ["", "", "", ".", "?", "!", ",", " ,", "-", "/", ";", ":", '"', "\t", "\n", "(", ")", "_"]
    draw = random.Random(0)
    for word in words:
        assert answers.normalized(word) == official(word), word
    for _ in range(5000):
        text = "".join(
            draw.choice(words) + draw.choice(marks) + draw.choice(["", " "]) for _ in range(draw.randint(1, 5))
        )
        assert answers.normalized(text) == official(text), text


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The dogs.", "dogs"), ("TWO", "2"), ("dont know", "don't know"), ("red,white", "red white"), ("1,000", "1000"),
     ("3.5 m.", "3.5 m"), ("yes!", "yes"), ("t-shirt", "t shirt"), ("", "")],
)  # fmt: skip
def test_answers_are_compared_in_their_plainest_form(text, normal):
    assert answers.normalized(text) == normal


def leaving_out(reply, given):
    """Of the definition: for each person the share of three among the others, averaged."""
    reply, given = official(reply), [official(answer) for answer in given]
    scores = []
    for person in range(len(given)):
        others = given[:person] + given[person + 1 :]
        scores.append(min(1, others.count(reply) / 3))
    return sum(scores) / len(scores)


def test_vqa_accuracy_is_the_mean_over_leaving_each_person_out():
    draw = random.Random(1)
    for _ in range(500):
        given = draw.choices(["Yes", "no", "a dog", "dog", "2", "two."], k=draw.randint(4, 12))
        for reply in ("yes", "Dog", "two", "cat"):
            assert answers.vqa(reply, given) == pytest.approx(leaving_out(reply, given))


@pytest.mark.parametrize(("same", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_of_ten_people_is_as_the_benchmark_lists_it(same, score):
    given = ["Cat."] * same + [f"other {i}" for i in range(10 - same)]
    assert answers.vqa("a cat", given) == pytest.approx(score)


def test_a_capital_does_not_matter_where_all_people_agree():
    assert answers.vqa("Yes.", ["yes"] * 10) == 1


def test_too_few_people_are_refused():
    with pytest.raises(ValueError, match="at least 4"):
        answers.vqa("yes", ["yes"] * 3)


# ------------------------------------------------------------------------------------------------------------ choices

OPTIONS = ["A dog", "a hot dog", "the moon", "none"]


@pytest.mark.parametrize(
    ("reply", "place"),
    [
        ("B", 1), ("b", 1), ("(C)", 2), ("C.", 2), ("D) none", 3), ("A. a dog", 0), ("[B] because", 1), ("B: hot", 1),
        ("The answer is C.", 2), ("I think the correct option is (D)", 3), ("Answer: B", 1), ("the moon", 2),
        ("The Moon.", 2), ("a dog", 0), ("It shows a hot dog on a plate", 1), ("We see the moon!", 2),
        ("A dog or the moon", None), ("A cat", None), ("", None), ("E", None), ("nonesuch", None),
        ("The answer is unclear", None),
    ],
)  # fmt: skip
def test_the_option_that_a_reply_names(reply, place):
    assert answers.choice(reply, OPTIONS) == place


def test_options_of_the_same_text_are_told_apart_by_letter_alone():
    assert answers.choice("B", ["red", "red"]) == 1
    assert answers.choice("red", ["red", "red"]) is None


@pytest.mark.parametrize("count", [0, 27])
def test_no_or_too_many_options_are_refused(count):
    with pytest.raises(ValueError, match=f"there are {count} options"):
        answers.choice("A", ["x"] * count)


# ------------------------------------------------------------------------------------------------------ yes, no; boxes


@pytest.mark.parametrize(
    ("reply", "yes"),
    [("Yes", True), ("No", False), ("no, there is none.", False), ("Yes. There is no cat beside it.", True),
     ("There is not a cat", False), ("There is a notebook", True), ("NO!", True), ("I see nothing", True)],
)  # fmt: skip
def test_yes_is_what_has_no_no_in_its_first_sentence(reply, yes):
    assert answers.says_yes(reply) is yes


def test_figures_of_yes_and_no_done_by_hand():
    said = [True, True, True, False, False, True]
    right = [True, True, False, True, False, True]
    figures = answers.yes_no(said, right)
    assert figures == pytest.approx({"accuracy": 4 / 6, "precision": 3 / 4, "recall": 3 / 4, "f1": 0.75, "yes": 4 / 6})
    never = answers.yes_no([False, False], [True, False])
    assert never == {"accuracy": 0.5, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes": 0.0}
    with pytest.raises(ValueError, match="no answer"):
        answers.yes_no([], [])


def test_overlaps_of_boxes_done_by_hand():
    assert answers.iou((0, 0, 2, 3), (0, 0, 2, 3)) == 1
    assert answers.iou((0, 0, 2, 2), (1, 1, 3, 5)) == pytest.approx(1 / (4 + 8 - 1))
    assert answers.iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0
    assert answers.iou((0, 0, 1, 1), (5, 5, 6, 6)) == 0
    assert answers.iou((2, 2, 1, 1), (0, 0, 4, 4)) == 0  # left and right swapped: no box
    assert answers.iou((0.2, 0, 0.2, 1), (0, 0, 1, 1)) == 0
