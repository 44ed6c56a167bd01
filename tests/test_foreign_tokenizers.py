"""Folders of other families: their ids, texts and prompts are what transformers makes of them, and thoughts are found."""

import os

import foreign
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascaline.errors import BadInput
from pascaline.tokenizer import Tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
KINDS = tuple(foreign.KINDS)
TAGS = ("<think>", "</think>")
TEXT = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=40), st.sampled_from(foreign.TEXTS), st.just("e\u0301 don't  I'LL\r\n\n 12345")
)
PLAIN = TEXT.filter(lambda text: "<" not in text)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    found = {}
    for kind in KINDS:
        folder = foreign.write(tmp_path_factory.mktemp(kind), kind)
        found[kind] = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    return found


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=PLAIN)
def test_ids_and_texts_are_theirs(both, kind, text):
    ours, theirs = both[kind]
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(first=PLAIN, answer=PLAIN, last=PLAIN)
def test_prompts_are_theirs(both, kind, first, answer, last):
    ours, theirs = both[kind]
    chat = [{"role": "user", "content": first}, {"role": "assistant", "content": answer}, {"role": "user", "content": last}]
    assert ours.render(chat, add_generation_prompt=True) == theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert ours.prompt_ids(chat) == theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(thought=PLAIN, answer=PLAIN)
def test_what_is_learnt_is_what_is_read_back(both, kind, thought, answer):
    ours, _ = both[kind]
    prompt, completion = ours.chat_ids("How many?", thought, answer)
    assert prompt == ours.prompt_ids("How many?") and completion[-1] == ours.end_of_turn
    read, said = ours.thought(prompt, completion[:-1])

    def kept(text):  # the tokenizer may normalise, and lines around a thought are the template's
        return ours.decode(ours.encode(text)).strip("\n")

    assert read is not None and said is not None
    assert read.strip() == kept(thought).strip() and said.strip() == kept(answer).strip()
    for cut in range(len(completion) - 1):  # at no point does a beginning claim more than there is
        read, said = ours.thought(prompt, completion[:cut])
        assert said is None or not any(tag in said for tag in TAGS)


@settings(max_examples=50, deadline=None)
@given(thought=PLAIN, answer=PLAIN)
def test_a_template_with_a_place_for_thoughts_puts_them_where_we_do(both, thought, answer):
    ours, theirs = both["qwen3"]
    thought = thought.strip("\n")
    prompt, completion = ours.chat_ids("How many?", thought, answer)
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": answer, "reasoning_content": thought}]
    if answer.startswith("\n"):
        return  # "\n\n" and the answer's own are one piece there
    assert [*prompt, *completion, *ours.encode("\n")] == theirs.apply_chat_template(chat, return_dict=False)


@pytest.mark.parametrize(
    "kind, ends, prefix, pad",
    [
        ("llama3", "<|eot_id|>", ["<|begin_of_text|>"], "<|end_of_text|>"),
        ("qwen3", "<|im_end|>", [], "<|endoftext|>"),
        ("opened", "</s>", ["<s>"], "</s>"),
    ],
)
def test_turns_documents_and_rows_have_their_tokens(both, kind, ends, prefix, pad):
    ours, _ = both[kind]
    assert ours.end_of_turn == ours.id(ends) and ours.prefix == [ours.id(token) for token in prefix] and ours.pad == ours.id(pad)


def test_a_closed_thought_is_no_thought(both):
    ours, _ = both["qwen3"]
    prompt = ours.prompt_ids("?", thinking=False)
    assert ours.decode(prompt, special=True).endswith("<think>\n\n</think>\n\n")
    assert ours.thought(prompt, ours.encode("4")) == (None, "4")
    open_prompt = ours.prompt_ids("?")
    assert ours.thought(open_prompt, ours.encode("4")) == (None, "4")
    assert ours.thought(open_prompt, [ours.id("<think>"), *ours.encode("\n2+2")]) == ("2+2", None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_cannot_forge_a_turn(both, kind):
    ours, _ = both[kind]
    ends = ours.decode([ours.end_of_turn], special=True)
    prompt = ours.prompt_ids(f"a{ends}b")
    assert prompt.count(ours.end_of_turn) == ours.prompt_ids("ab").count(ours.end_of_turn)


def test_saving_keeps_ids_and_template(both, tmp_path):
    for kind, (ours, _) in both.items():
        ours.save(tmp_path / kind)
        again = Tokenizer.load(tmp_path / kind)
        assert again.prompt_ids("x 12") == ours.prompt_ids("x 12") and again.template == ours.template
        assert (tmp_path / kind / "chat_template.jinja").exists()


def test_a_base_model_without_a_template_says_what_to_add(tmp_path):
    folder = foreign.write(tmp_path, "qwen2")
    text = (folder / "tokenizer_config.json").read_text().replace('"chat_template"', '"other"')
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(BadInput, match=r"chat_template\.jinja"):
        Tokenizer.load(folder).prompt_ids("x")
