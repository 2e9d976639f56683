"""Taking code out of answers: every piece is accounted for, and clean code is left alone."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastdistill.data.parse_python import LONGEST, clean_python

CODE = "def f(x):\n    return x * 2"

ANSWERS = [
    CODE,
    f"\n\n{CODE}\n\n",
    f"```python\n{CODE}\n```",
    f"```\n{CODE}\n```",
    f"```py\n{CODE}",
    f"```python\n{CODE}\n\nThis function doubles its argument.",
    f"```python\n{CODE}\n\nExplanation: it doubles x.\n```\nThat is all.",
    f"```python\nHere is it:\n{CODE}\n```",
    f"```\n<think>Doubling?</think>\n{CODE}\n```",
    f"Sure! Here is the solution:\n\n```python\n{CODE}\n```\n\nIt doubles x.",
    f"First install it:\n```bash\npip install nothing\n```\nThen:\n```python\n{CODE}\n```\nUse:\n```python\nf(2)\n```",
    f"<think>Doubling? ```python\nno\n``` no.</think>\n{CODE}",
    f"so I double it\n</think>\n\n```python\n{CODE}\n```",
    f"Here is it:\n{CODE}",
    f"Sure!\n\n{CODE}\n\nThis function doubles its argument.",
    f"{CODE}\n\n**Note** that this works for text too.",
    f"{CODE}\n\nExplanation: it doubles x.",
    f"{CODE}\n```",
    f"[BEGIN]\n{CODE}\n[DONE]",
    f"~~~python\n{CODE}\n~~~",
    f"Answer: ```python\n{CODE}\n```",
    f"**Code:** ```python title='a.py'\n{CODE}\n```",
]

CLEAN = [
    CODE,
    "    return x * 2",
    "def f():\n    '''\nThis is no prose\nNeither is this:\n'''\n    return 1",
    "a, b = 1, 2\nx: int = 3\nnot a\nlambda q: q\nfor i in range(3): pass\nmatch a:\n    case 1: pass",
    "print 'Python 2 stays'",
    "I can't help with that.",
    "fn f(x: i64) -> i64 { x * 2 }",
    "",
    "x = 1\n" * LONGEST,
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_code_is_found_in_what_is_around_it(answer: str) -> None:
    assert clean_python(answer)[0] == CODE


@pytest.mark.parametrize("answer", CLEAN)
def test_what_needs_no_cleaning_is_left_alone(answer: str) -> None:
    assert clean_python(answer) == (answer, ())


def test_the_indentation_of_a_continued_prompt_is_kept_and_that_of_a_list_is_not() -> None:
    assert clean_python("```python\n\n    y = 1\n    return y\n```")[0] == "    y = 1\n    return y"
    indented = CODE.replace("\n", "\n   ")
    assert clean_python(f"1. Double it:\n\n   ```python\n   {indented}\n   ```\n2. Done")[0] == CODE
    assert clean_python(f"  ```python\n{CODE}\n  ```")[0] == CODE


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_cuts_account_for_all_that_is_gone(answer: str) -> None:
    code, cuts = clean_python(answer)
    rest = answer
    for cut in cuts:
        assert cut.text in rest
        rest = rest.replace(cut.text, "", 1)
    assert rest.strip() == code


PIECES = st.sampled_from(
    ["```", "python", "\n", "<think>", "</think>", "def f():", " return 1", "It is so.", "'", '"', "#"]
)


@given(st.lists(PIECES).map("".join) | st.text())
def test_the_code_is_one_piece_of_the_answer(answer: str) -> None:
    assert clean_python(answer)[0] in answer


@given(st.lists(PIECES).map("".join) | st.text())
@example("```python\n# It is so.\nNobody knows\n```")
@example("```\n</think>")
def test_cleaning_what_is_clean_changes_nothing(answer: str) -> None:
    """With `until` a step sees candidates again whose verdicts are given."""
    code, _ = clean_python(answer)
    assert clean_python(code) == (code, ())


@pytest.mark.parametrize(
    "piece", ["'", "'''", "a ", '"\\', "```\n", "``` \n", "<think>", "def ", "a\n", "\n", "x!", "`"]
)
def test_hostile_answers_take_no_time(piece: str) -> None:
    clean_python(piece * (LONGEST // len(piece)))


@pytest.mark.parametrize("piece", ["</think>\n", "<think></think>\n", "x: ```\n", "<think></think>```\ndef f():\n"])
def test_fences_and_thinking_without_end_are_left_alone(piece: str) -> None:
    """A model that repeats itself: to take each off in turn would hold up all others for seconds."""
    answer = piece * 1000
    assert clean_python(answer) == (answer, ())


def test_code_may_speak_of_the_end_of_thinking() -> None:
    for line in ("return text.split('</think>')[-1]", r"return re.sub(r'<think>.*?</think>\s*', '', text)"):
        code = f"def answer(text):\n    {line}"
        for said in (f"```python\n{code}\n```", f"I split it\n</think>\n\n```python\n{code}\n```", code):
            assert clean_python(said)[0] == code
