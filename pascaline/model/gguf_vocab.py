"""A byte-level BPE and its chat template as the keys of a GGUF file ("gpt2" model), so that llama.cpp gives the same ids."""

import json
from pathlib import Path
from typing import Any

from pascaline.errors import BadInput
from pascaline.model.config import ModelConfig
from pascaline.tokenizer import Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types of the format

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
).replace(r"\"", '"')
# llama.cpp has its pre-tokenizers built in, by name. What text is cut by, step for step -> the name of the same.
PRE_TOKENIZERS = {
    ("digits", "gpt-2", "bytes"): "smollm",  # what pascaline.tokenizer.train makes
    ("gpt-2", "bytes"): "gpt-2",
    (_CONTRACTIONS + _WORDS % r"\p{N}{1,3}", "bytes"): "llama-bpe",
    (_CONTRACTIONS + _WORDS % r"\p{N}", "bytes"): "qwen2",
    (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK, "bytes"): "deepseek-v3",
}


def vocabulary(folder: str | Path, config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """The `tokenizer.` keys of a model folder's tokenizer (values: str, bool, int, lists), and what llama.cpp will do otherwise, in
    sentences. BadInput for a tokenizer that it cannot take, rather than one that is nearly the same."""
    tokenizer, where = Tokenizer.load(folder), Path(folder) / "tokenizer.json"
    definition = json.loads(where.read_text(encoding="utf-8"))
    model, added = definition["model"], definition.get("added_tokens") or []
    pre = _pre_tokenizer(definition, where)
    notes = _check(model, added, definition.get("normalizer"), pre, where)
    tokens, types = _tokens(model["vocab"], added, config.vocab_size, where)
    keys: dict[str, Any] = {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
    }
    ids = {name: tokenizer.id(text) for name in ("bos", "eos", "pad") if (text := tokenizer._token_text(f"{name}_token"))}
    keys |= {f"ggml.{'padding' if name == 'pad' else name}_token_id": number for name, number in ids.items()}
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    others = [end for end in ends if end is not None and end != ids.get("eos")]
    if others:
        keys["ggml.eot_token_id" if "eos" in ids else "ggml.eos_token_id"] = others[0]
    added_bos = tokenizer.config.get("add_bos_token")
    if added_bos is None:  # then the post-processor says it
        added_bos = tokenizer._parsing.encode("").ids[:1] == [ids.get("bos")]
    keys["ggml.add_bos_token"] = bool(added_bos)
    if tokenizer.template is not None:
        keys["chat_template"] = tokenizer.template
    return {f"tokenizer.{name}": value for name, value in keys.items()}, notes


def _pre_tokenizer(definition: dict[str, Any], where: Path) -> str:
    steps = tuple(_steps(definition.get("pre_tokenizer") or {}))
    if steps not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS.values())
        raise BadInput(f"{where}: its pre-tokenizer is none of those that can be named to llama.cpp here ({known}).")
    return PRE_TOKENIZERS[steps]


def _steps(pre: dict[str, Any]) -> list[str]:
    """What text is cut by, in order; a step that is not known stands as itself."""
    if pre.get("type") == "Sequence":
        return [step for one in pre.get("pretokenizers") or [] for step in _steps(one)]
    if pre.get("type") == "Digits" and pre.get("individual_digits"):
        return ["digits"]
    if pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space"):
        return ["gpt-2", "bytes"] if pre.get("use_regex", True) else ["bytes"]
    pattern = pre.get("pattern") or {}
    if pre.get("type") == "Split" and "Regex" in pattern and pre.get("behavior") == "Isolated" and not pre.get("invert"):
        return [pattern["Regex"].replace("\r", r"\r").replace("\n", r"\n")]
    return [json.dumps(pre, sort_keys=True)]


def _check(model: dict[str, Any], added: list[dict[str, Any]], normalizer: Any, pre: str, where: Path) -> list[str]:
    """Refuse what llama.cpp's byte-level BPE does not have."""
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise BadInput(f"{where}: only a byte-level BPE can be written, not {model.get('type')!r}.")
    for name in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise BadInput(f"{where}: {name} = {model[name]!r} is not supported by llama.cpp's byte-level BPE.")
    if bool(model.get("ignore_merges")) != (pre == "llama-bpe"):
        raise BadInput(f"{where}: ignore_merges = {model.get('ignore_merges')!r} does not go with its pre-tokenizer in llama.cpp ({pre}).")
    for token in added:
        odd = next((name for name in ("single_word", "lstrip", "rstrip") if token.get(name)), None)
        if odd:
            raise BadInput(f"{where}: the token {token['content']!r} has {odd}, which llama.cpp does not know.")
    if normalizer and normalizer.get("type") == "NFC":
        return ["llama.cpp does not normalise text to NFC as this tokenizer does: give it text that is."]
    if normalizer and normalizer != {"type": "Sequence", "normalizers": []}:
        raise BadInput(f"{where}: its normalizer ({normalizer.get('type')}) is not supported by llama.cpp's byte-level BPE.")
    return []


def _tokens(vocab: dict[str, int], added: list[dict[str, Any]], size: int, where: Path) -> tuple[list[str], list[int]]:
    """Texts and types of all ids. An added token that is not special (<think>) is USER_DEFINED: llama.cpp prints it, and reads it in
    any text; a special one is CONTROL: not printed, and read only where special tokens are asked for. Ids without a token are UNUSED."""
    kinds = {id: (text, NORMAL) for text, id in vocab.items()}
    kinds |= {token["id"]: (token["content"], CONTROL if token.get("special") else USER_DEFINED) for token in added}
    if kinds and max(kinds) >= size:
        raise BadInput(f"{where} has token ids up to {max(kinds)}, but the model's vocabulary has {size}.")
    rows = [kinds.get(id, (f"[PAD{id}]", UNUSED)) for id in range(size)]
    return [text for text, _ in rows], [kind for _, kind in rows]
