"""Text <-> token ids, through the checkpoint's own tokenizer."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxscape.errors import InputError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # GGUF token types
_BLANK = "▁"  # SentencePiece's blank; byte-level BPE's is "Ġ"

# How the published tokenizer.json of these families cuts a text into words, one pattern a family of pre-tokenizers.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# tokenizer.ggml.pre -> patterns, each cutting the pieces of the one before; llama.cpp's llama-vocab.cpp has the list.
_PRE_TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "olmo": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
}
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")  # words that are tokens are not merged up to; start tokens
_QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen")
_SENTENCEPIECE = ("llama", "phi3")  # general.architecture; Gemma's merges follow another order than its scores
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


class PromptTokenizer:
    """Encodes prompts as they are: no chat template; a start token only where the checkpoint's tokenizer adds one.

    Attributes:
    """

    def __init__(
        self,
        encode_batch: Callable[[list[str]], list[list[int]]],
        decode: Callable[[list[int]], str] | None = None,
        token_id: Callable[[str], int | None] | None = None,
    ):
        self._encode_batch, self._decode, self._token_id = encode_batch, decode, token_id

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        return self._encode_batch(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens show."""
        return self._decode([int(i) for i in ids])

    def answer_ids(self, letters: str = "ABCD") -> list[int]:
        """The single token that continues "Answer:" with each letter (" A" where the tokenizer has it).

        Raises:
          InputError: a letter is not one token.
        """
        bare = self.encode(["Answer:"])[0]
        ids = []
        for letter in letters:
            whole = self.encode([f"Answer: {letter}"])[0]
            if whole[:-1] != bare:
                raise InputError(f"the tokenizer has no single token for ' {letter}' after 'Answer:'")
            ids.append(whole[-1])
        return ids

    def letter_ids(self, letters: str = "ABCD") -> list[list[int]]:
        """Every token that is a letter, with the leading blank and without, as far as the vocabulary has them.

        Returns:
          For each letter one or two ids: first that of ``answer_ids``, then the other one, if there is one.

        Raises:
          InputError: a letter is not one token after "Answer:".
        """
        spellings = ("{}", "Ġ{}", _BLANK + "{}")
        found = []
        for letter, first in zip(letters, self.answer_ids(letters), strict=True):
            others = (self._token_id(spelling.format(letter)) for spelling in spellings)
            found.append(list(dict.fromkeys([first, *(other for other in others if other is not None)])))
        return found


def unreadable(error: InputError) -> PromptTokenizer:
    """A tokenizer that raises ``error`` as soon as it is asked for anything."""

    def fail(*_arguments):
        raise error

    return PromptTokenizer(fail, fail, fail)


def _from_tokenizers(tokenizer, bos: int | None = None) -> PromptTokenizer:
    start = [] if bos is None else [bos]

    def encode_batch(texts):
        return [start + encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=False)

    return PromptTokenizer(encode_batch, decode, tokenizer.token_to_id)


def from_gguf(file) -> PromptTokenizer:
    """The tokenizer of a ``GgufFile``; errors are those of ``rebuild``."""
    return _from_tokenizers(*rebuild(file))


def rebuild(file):
    """Rebuilds the tokenizer of a ``GgufFile`` from its metadata: byte-level BPE, or SentencePiece's BPE.

    Returns:
      (``tokenizers.Tokenizer``, id of the start token or None).

    Raises:
      InputError: the tokenizer model or pre-tokenizer is not implemented, or a part is missing.
    """
    model, pre = file.field("tokenizer.ggml.model"), file.field("tokenizer.ggml.pre")
    arch = file.field("general.architecture")
    if model == "gpt2" and pre in _PRE_TOKENIZERS:
        build, needed, adds_bos = _byte_level, ("tokens", "merges", "token_type"), pre in _LLAMA3_NAMES
    elif model == "llama" and arch in _SENTENCEPIECE:
        build, needed, adds_bos = _sentencepiece, ("tokens", "scores", "token_type"), True
    else:
        raise InputError(
            f"{file.where}: tokenizer.ggml.model {model!r} with tokenizer.ggml.pre {pre!r} is not implemented for "
            f"{arch!r}; implemented: 'gpt2' with {', '.join(map(repr, _PRE_TOKENIZERS))}, "
            f"and 'llama' for {', '.join(map(repr, _SENTENCEPIECE))}"
        )
    if file.field("tokenizer.ggml.add_eos_token", False):
        raise InputError(f"{file.where}: tokenizer.ggml.add_eos_token is not implemented")
    parts = {name: file.field(f"tokenizer.ggml.{name}") for name in needed}
    if missing := [f"tokenizer.ggml.{name}" for name, value in parts.items() if value is None]:
        raise InputError(f"{file.where}: {', '.join(missing)} missing; the file needs its tokenizer")
    bos = file.field("tokenizer.ggml.bos_token_id")
    adds_bos = file.field("tokenizer.ggml.add_bos_token", adds_bos)
    if adds_bos and bos is None:
        raise InputError(f"{file.where}: tokenizer.ggml.bos_token_id missing; the tokenizer adds a start token")
    return build(file, *parts.values()), bos if adds_bos else None


def _byte_level(file, tokens: list[str], merges: list[str], types: list[int]):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = file.field("tokenizer.ggml.pre")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre in _LLAMA3_NAMES))
    if pre in _QWEN2_NAMES:
        tokenizer.normalizer = normalizers.NFC()  # as its tokenizer.json has it
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _PRE_TOKENIZERS[pre]]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added(tokenizer, tokens, types)


def _sentencepiece(file, tokens: list[str], scores: list[float], types: list[int]):
    """SentencePiece's BPE joins whichever two neighbours make the token of the best score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    joinable = {token: i for token, i in vocabulary.items() if types[i] in (_NORMAL, _USER_DEFINED, _UNUSED)}
    merges = [
        (-scores[i], vocabulary[token[:cut]], vocabulary[token[cut:]], (token[:cut], token[cut:]))
        for token, i in joinable.items() for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]  # fmt: skip
    unknown = file.field("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(vocab=vocabulary, merges=[merge for *_, merge in sorted(merges)], unk_token=tokens[unknown],
                       fuse_unk=True, byte_fallback=True)  # fmt: skip
    tokenizer = Tokenizer(model)
    spaces = [normalizers.Replace(" ", _BLANK)]
    if file.field("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(_BLANK))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_added(tokenizer, tokens, types)


def _with_added(tokenizer, tokens: list[str], types: list[int]):
    """The tokenizer with what must not be cut: control tokens and those that users defined."""
    from tokenizers import AddedToken

    special = [t for t, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def from_folder(folder: Path) -> PromptTokenizer:
    """Loads a hub-format folder's tokenizer through transformers.

    Raises:
      InputError: transformers cannot read it.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):  # transformers would make up an empty one
        raise InputError(f"{folder}: no readable tokenizer (none of {', '.join(_TOKENIZER_FILES)}); "
                         "it needs tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever the broken file leads it into
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder}: no readable tokenizer ({first}); it needs tokenizer.json") from None

    def encode_batch(texts):
        return tokenizer(texts)["input_ids"]

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def token_id(token):
        found = tokenizer.convert_tokens_to_ids(token)  # of the unknown token where there is no such one
        return found if found is not None and tokenizer.convert_ids_to_tokens(found) == token else None

    return PromptTokenizer(encode_batch, decode, token_id)
