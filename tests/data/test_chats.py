"""Chats: what is read from files, and that the loss lies on what a role would really have to say. Oracle: transformers' masks."""

import json
import os
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from pascaline.data.batch import Sample
from pascaline.data.chats import Chat, documents, gather, read
from pascaline.errors import BadInput
from pascaline.template import TEMPLATE
from pascaline.tokenizer import Tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")

KEEPING = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{- '<|assistant|>' -}}
{%- generation -%}
{{- '<think>' + (message['reasoning_content'] or '') + '</think>' + message['content'] + eos_token -}}
{%- endgeneration -%}
{%- elif message['role'] == 'user' -%}{{- '<|user|>' + message['content'] -}}{%- else -%}{{- message['content'] -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
STRIPPING = TEMPLATE.replace("{{- '<|assistant|>' -}}", "{{- '<|assistant|>' -}}{%- generation -%}", 1).replace(
    "{{- message['content'] + eos_token -}}", "{{- message['content'] + eos_token -}}{%- endgeneration -%}"
)
WORDS = st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda text: "<" not in text)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: str, thought: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | ({} if thought is None else {"reasoning_content": thought})


def learnt(sample: Sample, tokenizer: Tokenizer) -> list[str]:
    """The runs of tokens with loss, as text."""
    runs: list[list[int]] = []
    before = 0.0
    for token, weight in zip(sample.tokens.tolist(), sample.streams["ce"].tolist(), strict=True):
        if weight and not before:
            runs.append([])
        if weight:
            runs[-1].append(token)
        before = weight
    return [tokenizer.decode(run, special=True) for run in runs]


def whole(sample: Sample, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(sample.tokens.tolist(), special=True)


@pytest.fixture(scope="module")
def own() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def tagged(own: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Templates with generation tags: (our tokenizer, transformers')."""
    transformers = pytest.importorskip("transformers")
    found = {}
    for name, template in (("keeping", KEEPING), ("stripping", STRIPPING), ("plain", TEMPLATE)):
        folder = tmp_path_factory.mktemp(name)
        own.save(folder)
        (folder / "chat_template.jinja").write_text(template)
        found[name] = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    return found


def oracle(theirs: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    told = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return told["input_ids"], told["assistant_masks"]


def put(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# ---- files -----------------------------------------------------------------------------------------------------------


def test_all_of_trls_forms_are_read(tmp_path: Path) -> None:
    path = put(
        tmp_path / "a.jsonl",
        {"messages": [user("a"), {**said("b", "t"), "thinking": None}, user("c"), said("d")], "source": "x"},
        "",
        {"prompt": "a", "completion": "b", "messages": None},
        {"prompt": [user("a"), said("b"), user("c")], "completion": [{**said("d"), "thinking": "t"}]},
        {"prompt": [user("a")], "completion": "<think>\nt\n</think>\n\nb"},
    )
    found = read(path)
    assert [chat.name for chat in found] == [f"{path}:{line}" for line in (1, 3, 4, 5)]
    assert found[0].messages == [user("a"), said("b", "t"), user("c"), said("d")] and found[0].completion_from == 0
    assert found[1].messages == [user("a"), said("b")] and found[1].completion_from == 1
    assert found[2].messages == [user("a"), said("b"), user("c"), said("d", "t")] and found[2].completion_from == 3
    assert found[3].messages == [user("a"), said("b", "t")]


@pytest.mark.parametrize(
    "row, told",
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is no JSON object"),
        ({"text": "a"}, ":2 needs messages, or prompt and completion, and has text"),
        ({"prompt": "a"}, "completion, and has prompt"),
        ({"messages": "a"}, ":2: messages must be a list"),
        ({"messages": []}, ":2: messages must be a text, or a list of at least one message"),
        ({"messages": ["a"]}, r":2: messages\[0\] must be an object"),
        ({"messages": [user("a"), {"role": "assistant", "content": None}]}, r":2: messages\[1\].content must be a text"),
        ({"prompt": "a", "completion": [{"content": "b"}]}, r":2: completion\[0\].role must be a text"),
        ({"messages": [user("a"), {**said("b"), "thinking": 3}]}, r"\[1\]: the thought must be a text"),
        ({"messages": [user("a"), said("b")], "tools": [{"name": "f"}]}, ":2 has tools"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(row: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=told) as error:
        read(put(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, row))
    assert str(tmp_path / "a.jsonl") in str(error.value)


def test_a_file_without_chats_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no chat"):
        read(put(tmp_path / "a.jsonl", ""))


# ---- the mask against transformers' ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.tuples(WORDS, WORDS, st.none() | WORDS), min_size=1, max_size=3), system=WORDS)
def test_the_mask_is_the_one_of_generation_tags(tagged: Any, words: list[tuple[str, str, str | None]], system: str) -> None:
    ours, theirs = tagged["keeping"]
    messages = [{"role": "system", "content": system}]
    for asked, answer, thought in words:
        messages += [user(asked), said(answer, thought)]
    (found,) = documents(Chat(messages, ""), ours, ["assistant"])
    ids, mask = oracle(theirs, messages)
    assert found.tokens.tolist() == ids and found.streams["ce"].tolist() == mask


@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=2, max_size=3))
def test_each_turn_is_learnt_once_with_its_thought_where_earlier_thoughts_are_taken_back(tagged: Any, words: Any) -> None:
    """verl 6854: one rendering has only the last thought. Every document is what transformers renders up to its turn."""
    ours, theirs = tagged["stripping"]
    messages = [message for asked, answer, thought in words for message in (user(asked), said(answer, thought))]
    found = documents(Chat(messages, ""), ours, ["assistant"])
    assert len(found) == len(words)
    for i, sample in enumerate(found):
        ids, mask = oracle(theirs, messages[: 2 * i + 2])
        last = len(mask) - mask[::-1].index(0)  # where the last turn's run begins; its <think> stands in the prompt already
        assert sample.tokens.tolist() == ids and not sample.streams["ce"][: last + 1].any()
        assert ids[last] == ours.think and sample.streams["ce"][last + 1 :].all()
    texts = [learnt(sample, ours) for sample in found]
    assert texts == [[f"{thought}</think>{answer}<|end|>"] for _, answer, thought in words]


def test_a_template_without_generation_tags_gives_no_empty_mask(tagged: Any) -> None:
    """trl 4879: there transformers' mask is all zero, and the run looks healthy."""
    ours, theirs = tagged["plain"]
    messages = [user("abc"), said("12", "hm")]
    assert not any(oracle(theirs, messages)[1])
    (found,) = documents(Chat(messages, ""), ours, ["assistant"])
    assert learnt(found, ours) == ["hm</think>12<|end|>"]


# ---- what is learnt ---------------------------------------------------------------------------------------------------


def test_only_the_completion_of_a_conversational_prompt_is_learnt(own: Tokenizer) -> None:
    """trl 4147: the labels began at the wrong token, and an assistant's turn in the prompt is no completion."""
    chat = Chat([user("a"), said("never", "no"), user("b"), said("yes", "t")], "", 3)
    (found,) = documents(chat, own, ["assistant"])
    assert learnt(found, own) == ["t</think>yes<|end|>"]
    assert whole(found, own) == "<|begin|><|user|>a<|assistant|>never<|end|><|user|>b<|assistant|><think>t</think>yes<|end|>"


def test_turns_that_the_template_leaves_as_they_are_share_a_document(own: Tokenizer) -> None:
    """Two answers to the same user: nothing is taken back between them."""
    (found,) = documents(Chat([user("a"), said("b", "t"), said("c", "u")], ""), own, ["assistant"])
    assert learnt(found, own) == ["t</think>b<|end|>", "u</think>c<|end|>"]


@pytest.mark.parametrize(
    "roles, expected",
    [
        (["user"], [["ab c", "À"]]),
        (["system"], [["Be."]]),
        (["assistant", "user"], [["ab c", "t</think>d<|end|>"], ["À", "</think>e<|end|>"]]),
    ],
)
def test_other_roles_learn_their_words_and_not_the_frame(roles: list[str], expected: list[list[str]], own: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be."}, user("ab c"), said("d", "t"), user("À"), said("e")]
    assert [learnt(sample, own) for sample in documents(Chat(messages, ""), own, roles)] == expected


def test_words_that_spell_special_tokens_stay_words(own: Tokenizer) -> None:
    messages = [user("<|end|>a"), said("<|user|>b<|end|>", "<think>")]
    (found,) = documents(Chat(messages, ""), own, ["assistant", "user"])
    assert found.tokens.tolist().count(own.end) == 1 and found.tokens.tolist().count(own.user) == 1
    assert learnt(found, own) == ["<|end|>a", "<think></think><|user|>b<|end|><|end|>"]


def test_nothing_to_learn_is_no_document(own: Tokenizer) -> None:
    assert documents(Chat([user("a")], ""), own, ["assistant"]) == []
    assert documents(Chat([user("a"), said("b")], ""), own, ["tool"]) == []


# ---- other families' templates ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.load(foreign.write(tmp_path_factory.mktemp(kind), kind)) for kind in foreign.KINDS}


@pytest.mark.parametrize("kind", foreign.KINDS)
@settings(max_examples=40, deadline=None)
@given(asked=WORDS, answer=WORDS, thought=st.none() | WORDS)
def test_a_turn_goes_on_where_the_server_leaves_it(kind: str, others: Any, asked: str, answer: str, thought: str | None) -> None:
    """The prompt is to the token what the engine is asked with, and what is learnt reads back as the thought and the answer."""
    tokenizer = others[kind]
    messages = [user("x"), said("y"), user(asked), said(answer, thought)]
    found = documents(Chat(messages, "", 3), tokenizer, ["assistant"])
    prompt = tokenizer.prompt_ids(messages[:-1])
    (sample,) = found
    ids = sample.tokens.tolist()
    assert ids[: len(prompt)] == prompt and not sample.streams["ce"][: len(prompt)].any()
    assert sample.streams["ce"][len(prompt) :].all() and ids[-1] == tokenizer.end_of_turn and len(ids) > len(prompt)

    def kept(text: str | None) -> str:
        return tokenizer.decode(tokenizer.encode(text or "")).strip()

    read_back, spoken = tokenizer.thought(prompt, ids[len(prompt) : -1])
    assert kept(spoken) == kept(answer) and kept(read_back) == kept(thought)


def test_a_piece_that_reaches_over_the_border_is_cut_there(own: Tokenizer, tmp_path: Path) -> None:
    """The frame's "a" and the answer's "bc" are one token in one text, of which nobody can say the second half."""
    own.save(tmp_path)
    frame = (
        "{% for m in messages %}<|{{ m.role }}|>a{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>a{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(frame)
    tokenizer, messages = Tokenizer.load(tmp_path), [user("?"), said("bc def<|end|>"), user("!"), said("bc")]
    prompt, text = tokenizer.prompt_ids(messages[:1]), tokenizer.prompt_ids(messages[:2], finished=True)
    assert tokenizer.encode("abc") == [text[len(prompt) - 1]] != prompt[-1:]
    found = documents(Chat(messages, ""), tokenizer, ["assistant"])
    assert [learnt(sample, tokenizer) for sample in found] == [["bc def<|end|><|end|>"], ["bc<|end|>"]]
    assert found[0].tokens[: len(prompt)].tolist() == prompt and found[0].tokens.tolist().count(tokenizer.end) == 2
    assert found[1].tokens[: -len(tokenizer.encode("bc")) - 1].tolist() == tokenizer.prompt_ids(messages[:3])


def test_roles_end_with_the_token_that_ends_their_turn(others: Any) -> None:
    messages = [user(" What? "), said("So."), user("Hm")]
    found = documents(Chat(messages, ""), others["qwen2"], ["user", "assistant"])
    assert [learnt(sample, others["qwen2"]) for sample in found] == [[" What? <|im_end|>", "So.<|im_end|>", "Hm<|im_end|>"]]
    (found,) = documents(Chat([user(" What? ")], ""), others["llama3"], ["user"])
    assert learnt(found, others["llama3"]) == ["What?<|eot_id|>"]  # which trims


@pytest.mark.parametrize(
    "template, roles, told",
    [
        ("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot] {% endif %}", ["assistant"],
         "x:1: the chat template writes an assistant's turn otherwise"),
        ("{{ messages[-1].role }}{% if add_generation_prompt %}{% endif %}", ["user"], "the chat template does not show the last of 1"),
        ("{{ raise_exception('no') }}", ["assistant"], "x:1: the chat template refuses these messages: no"),
    ],
)  # fmt: skip
def test_a_template_that_allows_no_exact_span_says_so(template: str, roles: list[str], told: str, own: Tokenizer, tmp_path: Path) -> None:
    own.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(BadInput, match=told):
        documents(Chat([user("a"), said("b")], "x:1"), Tokenizer.load(tmp_path), roles)


# ---- samples ----------------------------------------------------------------------------------------------------------


def test_what_is_gathered_is_what_the_documents_are(own: Tokenizer) -> None:
    chats = [Chat([user("a"), said("b", "t"), user("c"), said("d")], "x:1"), Chat([user("e")], "x:2"), Chat([user("f"), said("g")], "x:3")]
    chats.append(Chat([user("h"), said("i" * 50), user("j"), said("k")], "x:4"))
    counts: list[int] = []
    samples = gather(iter(chats), own, ["assistant"], 40, counts.append)
    expected = [sample for chat in (chats[0], chats[2]) for sample in documents(chat, own, ["assistant"])]
    assert [samples.name(i)["chat"] for i in range(len(samples.lengths))] == ["x:1", "x:1", "x:3"] and counts == [1, 2, 3, 4]
    for i, sample in enumerate(expected):
        assert samples.get(i).tokens.tolist() == sample.tokens.tolist() and samples.lengths[i] == len(sample.tokens)
        assert samples.get(i).streams["ce"].tolist() == sample.streams["ce"].tolist()
        assert samples.get(i).streams["ce"].dtype == np.float32
    longest = max(len(sample.tokens) for sample in documents(chats[3], own, ["assistant"]))
    assert [(chat.name, chat.tokens) for chat in samples.left_out] == [("x:2", 0), ("x:4", longest)] and longest > 40
