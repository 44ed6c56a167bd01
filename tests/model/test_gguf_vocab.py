"""The tokenizer in a GGUF file: llama.cpp is the oracle for token ids and prompts."""

import inspect
from pathlib import Path

import pytest
import tokenizers
from tiny import randomize_
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from pascaline.model import gguf, hf
from pascaline.model.config import ModelConfig
from pascaline.model.gguf_vocab import PRE_TOKENIZERS, vocabulary
from pascaline.model.transformer import Model
from pascaline.tokenizer import Tokenizer

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")
from llamacpp import SPECIALS, strings, trained  # noqa: E402

MANY = 4000  # ids, so that many merges would cross a wrong cut


def worded(path: Path, words: Tokenizer) -> Path:
    """The file of a tokenizer: the smallest model round it."""
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32)
    model = Model(ModelConfig(model_type="llama", vocab_size=words.vocab_size, **sizes))
    randomize_(model, 0)
    model.save(path)
    words.save(path)
    gguf.export(path, path / "a.gguf", "bf16", quiet=True)
    return path / "a.gguf"


def test_ten_thousand_strings_have_the_same_ids(tmp_path, llama):
    here = trained(MANY)
    there = llama(worded(tmp_path, here))
    texts = strings(1, 10_000, SPECIALS)
    assert sum(special in text for text in texts for special in SPECIALS) > 1000
    for special in (False, True):
        wrong = [text for text in texts if there.tokenize(text, special) != here.encode(text, special)]
        assert not wrong, (special, len(wrong), wrong[:3])
    split = [text for text in texts if there.tokenize(text, True) != there.tokenize(text, False)]
    assert len(split) > 1000  # where special tokens are read, they make a difference


def test_think_tags_are_tokens_in_any_text_there(tmp_path, llama):
    """The one difference: llama.cpp prints a token only if it also reads it in plain text (user-defined, as in R1's own files)."""
    here = trained()
    there = llama(worded(tmp_path, here))
    text = "a<think>b</think>c"
    assert there.tokenize(text, True) == here.encode(text, special=True) == there.tokenize(text, False) != here.encode(text)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
REGEX = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


LLAMA3 = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
DEEPSEEK = (  # as in V3's and R1's tokenizer.json, with real line ends
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
SPLITS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), REGEX],
    "gpt-2": [REGEX],
    "llama-bpe": [split(LLAMA3), BYTES],
    "qwen2": [split(PRETOKENIZE_REGEX), BYTES],
    "deepseek-v3": [split(r"\p{N}{1,3}"), split("[一-龥\u3040-ゟ゠-ヿ]+"), split(DEEPSEEK), BYTES],
}


def other_tokenizer(name: str, size: int = MANY) -> Tokenizer:
    """Trained behind the pre-tokenizer of another family."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[name])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(strings(98, 3000, []), trainer)
    return Tokenizer(backend.to_str(), {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}, None)


@pytest.mark.parametrize("name", PRE_TOKENIZERS.values())
def test_other_pre_tokenizers_are_found_by_their_form(name, tmp_path, llama):
    own = other_tokenizer(name)
    there = llama(worded(tmp_path, own))
    assert vocabulary(tmp_path, hf.read_config(tmp_path))[0]["tokenizer.ggml.pre"] == name
    wrong = [text for text in strings(2, 3000, ["<s>", "</s>"]) if there.tokenize(text, True) != own.encode(text, special=True)]
    assert not wrong, (len(wrong), wrong[:3])


# ---- chats


CHATS = [
    [{"role": "user", "content": "Make 12 from 6, 6, 13."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi\n\n there "}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "because"},
        {"role": "user", "content": "c"},
    ],
]


def test_the_chat_template_in_the_file_makes_the_same_prompt(tmp_path, llama):
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    words = trained()
    there = llama(worded(tmp_path, words))
    template = llama_cpp.llama_model_chat_template(there.model, None).decode()
    begin, end = there.text(llama_cpp.llama_vocab_bos(there.vocab)), there.text(llama_cpp.llama_vocab_eos(there.vocab))
    render = Jinja2ChatFormatter(template, end, begin)
    for messages in CHATS:
        assert there.tokenize(render(messages=messages).prompt, special=True) == words.prompt_ids(messages), messages
    assert not llama_cpp.llama_vocab_get_add_bos(there.vocab)  # the template begins with it
    assert llama_cpp.llama_vocab_pad(there.vocab) == words.pad and llama_cpp.llama_vocab_is_eog(there.vocab, words.end)
