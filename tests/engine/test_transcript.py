"""Thought and text piece by piece: any split of any ids gives the same whole, and it is Tokenizer.thought's."""

from itertools import pairwise

import foreign
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pascaline.engine.transcript import Transcript
from pascaline.tokenizer import Tokenizer, train

KINDS = ("own", *foreign.KINDS)
PIECES = ["<think>", "</think>", "<thi", "</thi", "<", "\n", "\n\n", " ", "é", "日本", "a", "STOP", "ST", "OP", "b c", "\u00a0"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    found = {kind: Tokenizer.load(foreign.write(tmp_path_factory.mktemp(kind), kind)) for kind in foreign.KINDS}
    return found | {"own": train(["abc STOP the end 日本 é"] * 3, 300)}


def read(transcript, ids, cuts=()):
    """All pieces, joined, of the ids cut there."""
    borders = [0, *sorted(min(c, len(ids)) for c in cuts), len(ids)]
    pieces = [transcript.feed(ids[a:b]) for a, b in pairwise(borders)] + [transcript.finish()]
    return "".join(p[0] for p in pieces), "".join(p[1] for p in pieces)


def prompts(own):
    return [own.prompt_ids("q"), own.prompt_ids("q", thinking=False), own.encode("q")]


def tagged(own, text):
    """The ids of a text in which tags are tokens if they can be."""
    return own.encode(text, special=True)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_split_of_any_ids_is_the_whole_and_the_tokenizers(tokenizers, kind, data):
    """serving.md C 3 and 16: streamed and not streamed are the same message, for every split, with characters split over tokens."""
    own = tokenizers[kind]
    prompt = data.draw(st.sampled_from(prompts(own)))
    if data.draw(st.booleans()):
        ids = data.draw(st.lists(st.integers(0, own.vocab_size - 1), max_size=30))
    else:
        ids = tagged(own, data.draw(TEXT))[: data.draw(st.integers(0, 60))]
    thought, text = own.thought(prompt, ids)
    if kind == "opened":  # tokenizers counts the broken bytes of such a vocabulary in its own way
        assume("\ufffd" not in (thought or "") + (text or ""))
    transcript = Transcript(own, prompt)
    said = read(transcript, ids, data.draw(st.lists(st.integers(0, 30), max_size=6)))
    assert said == ((thought or ""), (text or "")) == (transcript.reasoning or "", transcript.text)
    assert (transcript.reasoning is None) == (thought is None)
    whole = Transcript(own, prompt)
    assert read(whole, ids) == said and whole.reasoning_tokens == transcript.reasoning_tokens <= len(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(text=TEXT, stops=st.lists(st.sampled_from(["STOP", "ST", "OPa", "\n\n", "é", "</think>", "a日", "本"]), max_size=3), data=st.data())
def test_stop_strings_cut_the_text_at_the_first_that_is_complete(tokenizers, kind, text, stops, data):
    """serving.md C 4: they never fire in the thought; they are no part of the text; no piece shows a character that is cut later."""
    own = tokenizers[kind]
    prompt = data.draw(st.sampled_from(prompts(own)))
    ids = tagged(own, text)
    plain = Transcript(own, prompt)
    reasoning, whole = read(plain, ids)
    ends = [(whole.find(s) + len(s), -len(s), s) for s in stops if s in whole]
    found = min(ends, default=(len(whole), 0, None))
    transcript = Transcript(own, prompt, stops)
    said = read(transcript, ids, data.draw(st.lists(st.integers(0, 60), max_size=8)))
    assert said == (reasoning, whole[: found[0] + found[1]]) and transcript.stopped == found[2]


def test_what_is_sure_is_given_out_at_once(tokenizers):
    own = tokenizers["own"]
    transcript = Transcript(own, own.prompt_ids("q", thinking=False), ["STOP", "é!"])
    given_out = [transcript.feed(own.encode(c))[1] for c in "ab SxSTéab"]
    assert given_out == ["a", "b", " ", "", "Sx", "", "", "ST", "éa", "b"]
    assert transcript.feed([]) == ("", "") and transcript.stopped is None
    assert [transcript.feed([i]) for i in own.encode("日")] == [*[("", "")] * (len(own.encode("日")) - 1), ("", "日")]


def test_bytes_that_are_no_character_never_stall(tokenizers):
    """serving.md C 16: holding back whatever ends in U+FFFD would stall for ever on them; at most 3 bytes are held."""
    own = tokenizers["own"]
    byte = {own.piece(i): i for i in range(own.vocab_size) if len(own.piece(i)) == 1}
    for bad in (b"\x80", b"\xff", b"\xf0", b"\xe6\x97", b"\xf0\x9f\x98"):
        transcript = Transcript(own, own.prompt_ids("q", thinking=False))
        said = ""
        for n in range(1, 40):
            said += transcript.feed([byte[bytes([b])] for b in bad])[1]
            whole = (bad * n).decode("utf-8", "replace")
            assert len(said) >= len(whole) - 1 and whole.startswith(said)
        assert said + transcript.finish()[1] == (bad * 39).decode("utf-8", "replace")


def test_an_unclosed_thought_is_all_reasoning(tokenizers):
    """serving.md C 1 and 2: cut off before </think> there is no text, also where a stop string stands in the thought."""
    for kind in ("own", "qwen3", "qwen2", "opened"):
        own = tokenizers[kind]
        prompt = own.prompt_ids("q")
        ids = tagged(own, "<think>\nno STOP here </thi" if kind != "own" else "no STOP here </thi")
        transcript = Transcript(own, prompt, ["STOP"])
        reasoning, text = read(transcript, ids, range(99))
        assert reasoning.strip() == "no STOP here </thi" and text == "" and transcript.stopped is None and transcript.thinking is False


def test_thinking_tells_where_it_is(tokenizers):
    for kind in ("own", "qwen3", "qwen2", "opened"):
        own = tokenizers[kind]
        transcript = Transcript(own, own.prompt_ids("q"))
        opening = [] if own.tags(own.prompt_ids("q"))[0] else tagged(own, "<think>")
        inside, close, after = tagged(own, "ab"), tagged(own, "</think>"), tagged(own, "cd")
        transcript.feed(opening + inside)
        assert transcript.thinking
        transcript.feed(close)
        assert not transcript.thinking and transcript.reasoning_tokens == len(opening + inside + close)
        transcript.feed(after)
        assert transcript.reasoning_tokens == len(opening + inside + close)
        transcript.finish()
        assert (transcript.reasoning.strip(), transcript.text.strip()) == ("ab", "cd")


def test_a_tag_quoted_in_the_answer_stays_there(tokenizers):
    """serving.md C 3: written out in the answer, after a thought or without one, it is text."""
    for kind in KINDS:
        own = tokenizers[kind]
        for thinking in (True, False):
            prompt = own.prompt_ids("q", thinking=thinking)
            closed = own.tags(prompt)[0] != "" or kind == "qwen2"
            ids = (tagged(own, "<think>x</think>") if closed and own.tags(prompt)[0] != "</think>" else []) + own.encode("say </think> now")
            for cuts in ((), range(99)):
                assert read(Transcript(own, prompt), ids, cuts)[1].strip() == "say </think> now", kind
            assert own.thought(prompt, ids)[1].strip() == "say </think> now"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "opened"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_without_thoughts_all_is_text(tokenizers, kind, data):
    """For plain completions: tags are written out, stop strings fire anywhere, other special tokens are left out as ever."""
    own = tokenizers[kind]
    prompt = data.draw(st.sampled_from(prompts(own)))
    ids = data.draw(st.one_of(st.lists(st.integers(0, own.vocab_size - 1), max_size=20), TEXT.map(lambda text: tagged(own, text))))
    tags = own.tags(prompt)[2:]
    whole = b"".join(own.piece(i) for i in ids if i in tags or not own.is_special(i)).decode("utf-8", "replace")
    transcript = Transcript(own, prompt, thoughts=False)
    assert read(transcript, ids, data.draw(st.lists(st.integers(0, 30), max_size=5))) == ("", whole)
    assert transcript.reasoning is None and not transcript.thinking and transcript.reasoning_tokens == 0
    assert read(Transcript(own, prompt, ["a"], thoughts=False), ids)[1] == whole.partition("a")[0]


def test_ends_are_no_text(tokenizers):
    own = tokenizers["own"]
    letters = own.encode("xy")
    transcript = Transcript(own, own.prompt_ids("q", thinking=False), ends={letters[-1], own.end})
    assert read(transcript, [*letters, own.end]) == ("", "x")


@pytest.mark.parametrize("end", ["", "\n", " ", "</thi", "ST"])
@pytest.mark.parametrize("start", ["", "<think>", "<think>a</think>"])
def test_every_token_is_decoded_once(tokenizers, monkeypatch, start, end):
    """Amortised linear: nothing is decoded from the start again, and what is held does not grow."""
    own = tokenizers["qwen2"]
    ids = own.encode(start + (end or "a b") * 2000)
    decoded = 0
    decode, piece = own.decode, own.piece

    def counted(ids, special=False):
        nonlocal decoded
        decoded += len(ids)
        return decode(ids, special)

    def counted_piece(token, first=False):
        nonlocal decoded
        decoded += 1
        return piece(token, first)

    prompt = own.prompt_ids("q")
    monkeypatch.setattr(own, "decode", counted)
    monkeypatch.setattr(own, "piece", counted_piece)
    transcript = Transcript(own, prompt, ["STOP", "\n\nx"])
    for i in ids:
        transcript.feed([i])
        assert len(transcript._held) < 32
    transcript.finish()
    assert decoded <= len(ids) + 8  # and the end of the prompt
