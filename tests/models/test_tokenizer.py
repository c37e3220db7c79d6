import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import regex
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxscape.data.bank import load_bank
from jaxscape.data.prompts import build_prompts
from jaxscape.errors import InputError
from jaxscape.models.gguf import GgufFile
from jaxscape.models.sources import PACKAGED, cache_folder
from jaxscape.models.tokenizer import PromptTokenizer, from_folder, from_gguf, unreadable

ODD_TEXTS = [
    "", " ", "\n\n\n", "a\n\nb  \n c\t\td ", "In 1976 and 2024, 3,141.59 of 100%", "1234567890", "x1y22z333",
    "it's they'll I'VE o'clock ''s", "Brasília, Côte d'Ivoire, 東京, Ελλάδα, ﷽",
    "½ cup, m², Ⅷ, ١٢٣, ໑໒", "🦊🧑‍🚀 naïve",
    "e\u0301 combining, \u00a0hard\u2003wide blanks\u3000", "<|end|>", "a<|end|> b<|end|>", "<|end", "\x00\x7f\x80",
]  # fmt: skip


@pytest.fixture(scope="module")
def prompts():
    questions = load_bank()
    dev, asked = ([q for q in questions if q.split == s] for s in ("dev", "test"))
    return [p.text for p in build_prompts(asked[::5], dev, 0) + build_prompts(asked[::40], dev, 5)]


@pytest.fixture(scope="module")
def trained(prompts, tmp_path_factory):
    """A tokenizer trained so that it has merges of digits, behind SmolLM2's published pre-tokenizer, in a folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"],
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(prompts + ["in 1976 and 2024 1976 12 1212", "½½ ١٢٣ ١٢٣"] * 200, trainer)
    assert len(tokenizer.encode("1976 12").ids) < 7
    fields = json.loads(tokenizer.to_str())
    fields["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="module")
def rebuilt(trained, write_gguf):
    """The same one through a GGUF file."""
    return from_gguf(GgufFile(write_gguf(trained / "tiny.gguf", metadata=gguf_fields(trained))))


def gguf_fields(folder) -> dict:
    fields = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = fields["model"]["vocab"]
    special = {token["id"] for token in fields["added_tokens"]}
    return {
        "tokenizer.ggml.tokens": sorted(vocabulary, key=vocabulary.get),
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(len(vocabulary))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in fields["model"]["merges"]],
    }


def bytes_to_letters() -> dict[int, str]:
    """GPT-2's table: printable bytes stand for themselves, the others for letters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {b: chr(b) for b in printable}
    others = itertools.count(0x100)
    return {b: table.get(b) or chr(next(others)) for b in range(256)}


def encode_by_definition(text: str, fields: dict, special: str = "<|end|>") -> list[int]:
    """llama.cpp's "smollm": each numeral apart, then GPT-2's pattern, then the merges of lowest rank first."""
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(fields["tokenizer.ggml.merges"])}
    letters = bytes_to_letters()
    pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    ids = []
    for part in text.split(special):
        for piece in regex.findall(r"\p{N}|\P{N}+", part):
            for word in pattern.findall(piece):
                symbols = [letters[b] for b in word.encode()]
                while len(symbols) > 1:
                    best = min(zip(symbols, symbols[1:], strict=False), key=lambda pair: ranks.get(pair, 10**9))
                    if best not in ranks:
                        break
                    merged, i = [], 0
                    while i < len(symbols):
                        step = 2 if tuple(symbols[i : i + 2]) == best else 1
                        merged.append("".join(symbols[i : i + step]))
                        i += step
                    symbols = merged
                ids += [vocabulary[s] for s in symbols]
        ids.append(vocabulary[special])
    return ids[:-1]


def test_gguf_tokenizer_is_the_hubs_on_real_prompts(prompts, trained, rebuilt):
    assert len(prompts) > 100
    assert rebuilt.encode(prompts) == from_folder(trained).encode(prompts)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_gguf_tokenizer_is_the_hubs_on_odd_texts(text, trained, rebuilt):
    assert rebuilt.encode([text]) == from_folder(trained).encode([text])


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_gguf_tokenizer_follows_llama_cpps_definition(text, trained, rebuilt):
    assert rebuilt.encode([text])[0] == encode_by_definition(text, gguf_fields(trained))


def test_gguf_tokenizer_follows_llama_cpps_definition_on_real_prompts(prompts, trained, rebuilt):
    some, fields = prompts[::25], gguf_fields(trained)
    assert rebuilt.encode(some) == [encode_by_definition(text, fields) for text in some]


def test_numerals_are_tokens_of_their_own_though_merges_join_them(rebuilt):
    assert len(rebuilt.encode(["1976"])[0]) == 4


def test_golden_tokens_are_those_of_the_folder(tiny_llama, golden):
    assert from_folder(tiny_llama).encode([g.text for g in golden]) == [g.tokens for g in golden]


def test_tokens_of_a_text_do_not_depend_on_its_batch(prompts, rebuilt, tiny_llama):
    for tokenizer in (rebuilt, from_folder(tiny_llama)):
        together = tokenizer.encode(prompts[:4])
        assert together == [tokenizer.encode([text])[0] for text in prompts[:4]]
        assert len({len(ids) for ids in together}) > 1  # not padded


def test_answer_ids_are_the_tokens_after_answer(tiny_llama):
    tokenizer = from_folder(tiny_llama)
    ids = tokenizer.answer_ids()
    vocabulary = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    assert [vocabulary.decode([i]) for i in ids] == [" A", " B", " C", " D"]
    bare = tokenizer.encode(["Question\nAnswer:"])[0]
    assert tokenizer.encode(["Question\nAnswer: C"])[0] == [*bare, ids[2]]


def test_letters_have_the_blank_and_go_without(tiny_llama):
    tokenizer = from_folder(tiny_llama)
    vocabulary = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    ids = tokenizer.letter_ids("ABCD")
    assert [[vocabulary.id_to_token(i) for i in pair] for pair in ids] == [[f"Ġ{x}", x] for x in "ABCD"]
    assert [pair[0] for pair in ids] == tokenizer.answer_ids("ABCD")


def test_decoding_undoes_encoding(tiny_llama, rebuilt, prompts):
    for tokenizer in (rebuilt, from_folder(tiny_llama)):
        for text in [*prompts[:2], "a <|end|> b", "naïve 東京 , ."]:
            assert tokenizer.decode(tokenizer.encode([text])[0]) == text


def test_unreadable_tokenizer_says_so_when_it_is_asked(raises_input_error):
    tokenizer = unreadable(InputError("no tokenizer here"))
    for use in (lambda: tokenizer.encode(["a"]), lambda: tokenizer.decode([1]), tokenizer.letter_ids):
        with raises_input_error("no tokenizer here"):
            use()


# Other tokenizers of GGUF files, against the ones that transformers builds of the same parts


def in_transformers(arch, fields):
    """The tokenizer that transformers makes of a GGUF file's keys."""
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    names = mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
    parts = {names[key.removeprefix("tokenizer.")]: value for key, value in fields.items()
             if key.removeprefix("tokenizer.") in names}  # fmt: skip
    return mapping.convert_gguf_tokenizer(arch, parts)[0]


@pytest.fixture
def from_keys(write_gguf, tmp_path):
    """``from_keys(fields)`` -> the tokenizer of a GGUF file with these keys."""
    return lambda fields: from_gguf(GgufFile(write_gguf(tmp_path / "x.gguf", metadata=fields)))


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "dbrx", "qwen2"])
def test_byte_level_tokenizers_are_those_of_transformers(pre, trained, prompts, from_keys):
    fields = gguf_fields(trained) | {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    texts = prompts[::10] + [text for text in ODD_TEXTS if pre != "qwen2" or "\u0301" not in text]
    theirs = in_transformers("llama", fields)
    if pre == "llama-bpe":  # it leaves Llama 3's ignore_merges out
        parts = json.loads(theirs.to_str())
        parts["model"]["ignore_merges"] = True
        theirs = Tokenizer.from_str(json.dumps(parts))
    expected = [theirs.encode(text, add_special_tokens=False).ids for text in texts]
    assert from_keys(fields).encode(texts) == expected


def test_pre_tokenizers_differ(trained, prompts, from_keys):
    found = {}
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        fields = gguf_fields(trained) | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
        found[pre] = str(from_keys(fields).encode([*prompts[:50], *ODD_TEXTS, "in 1976!\n\n HE'LL"]))
    assert len(set(found.values())) == 4


def test_qwen_composes_letters_with_their_accents(trained, from_keys):
    tokenizer = from_keys(gguf_fields(trained) | {"tokenizer.ggml.pre": "qwen2"})
    assert tokenizer.encode(["e\u0301"]) == tokenizer.encode(["\u00e9"])


def test_llama_3_adds_its_start_token_unless_told_not_to(trained, from_keys):
    fields = gguf_fields(trained) | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 7}
    with_bos, without = from_keys(fields), from_keys(fields | {"tokenizer.ggml.add_bos_token": False})
    assert with_bos.encode(["Answer:"])[0] == [7, *without.encode(["Answer:"])[0]]
    assert with_bos.letter_ids() == without.letter_ids()


def test_start_token_that_is_not_named_is_refused(trained, from_keys, raises_input_error):
    with raises_input_error("tokenizer.ggml.bos_token_id", "missing"):
        from_keys(gguf_fields(trained) | {"tokenizer.ggml.add_bos_token": True})


@pytest.fixture(scope="module")
def sentencepiece(prompts):
    """Keys of a tokenizer laid out as Llama's: three special tokens, the bytes, pieces by score, characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False)
    tokenizer.train_from_iterator(prompts, trainer)
    merged = ["".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    characters = sorted(token for token in tokenizer.get_vocab() if len(token) == 1)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *characters]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.merges": None,
    }


def by_best_score(text, fields):
    """SentencePiece by its definition: of all neighbours that make a token, those of the best score join first."""
    tokens = fields["tokenizer.ggml.tokens"]
    score = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    pieces = list("▁" + text.replace(" ", "▁")) if text else []
    while joins := [(-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in score]:
        _, i = min(joins)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    number = {token: i for i, token in enumerate(tokens)}
    in_bytes = [[p] if p in number else [f"<0x{byte:02X}>" for byte in p.encode()] for p in pieces]
    return [number[piece] for pieces in in_bytes for piece in pieces]


def test_sentencepiece_joins_by_score_and_falls_back_to_bytes(sentencepiece, prompts, from_keys):
    texts = prompts[::20] + [text for text in ODD_TEXTS if "<|" not in text] + ["  two blanks", "x" * 30]
    assert [ids[0] for ids in from_keys(sentencepiece).encode(texts)] == [1] * len(texts)
    found = from_keys(sentencepiece | {"tokenizer.ggml.add_bos_token": False})
    assert found.encode(texts) == [by_best_score(text, sentencepiece) for text in texts]


def test_sentencepiece_is_that_of_transformers(sentencepiece, prompts, from_keys):
    fields = {key: value for key, value in sentencepiece.items() if value is not None}
    theirs = in_transformers("phi3", fields)
    texts = prompts[::5] + [text for text in ODD_TEXTS if "<|" not in text]
    expected = [theirs.encode(text, add_special_tokens=False).ids for text in texts]
    assert from_keys(sentencepiece | {"tokenizer.ggml.add_bos_token": False}).encode(texts) == expected


def test_sentencepiece_decodes_and_has_both_kinds_of_letters(sentencepiece, from_keys):
    tokenizer, tokens = from_keys(sentencepiece), sentencepiece["tokenizer.ggml.tokens"]
    ids = tokenizer.encode(["naïve 🦊 Answer: A"])[0]
    assert tokenizer.decode(ids[1:]) == "naïve 🦊 Answer: A"
    assert [[tokens[i] for i in pair] for pair in tokenizer.letter_ids()] == [[f"▁{x}", x] for x in "ABCD"]


def test_sentencepiece_of_other_architectures_is_refused(sentencepiece, tmp_path, raises_input_error):
    from tests import gguf_writer

    folder = Path(__file__).parents[1] / "fixtures" / "families" / "gemma2"
    config = json.loads((folder / "config.json").read_text())
    with raises_input_error("tokenizer.ggml.model 'llama'", "'gemma2'", "not implemented"):
        from_gguf(GgufFile(gguf_writer.write(tmp_path / "x.gguf", config, {}, sentencepiece)))


# What is refused


def test_letter_of_several_tokens_is_refused(tiny_llama, raises_input_error):
    with raises_input_error("no single token", "' ß'"):
        from_folder(tiny_llama).answer_ids("Aß")


def test_blank_that_joins_the_question_is_refused(raises_input_error):
    def by_word(texts):  # "Answer:" is not how "Answer: A" begins
        return [[len(text)] for text in texts]

    with raises_input_error("no single token"):
        PromptTokenizer(by_word).answer_ids()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.ggml.pre", "default"),
        ("tokenizer.ggml.pre", None),
        ("tokenizer.ggml.model", "bert"),
        ("tokenizer.ggml.add_eos_token", True),
    ],
)
def test_gguf_tokenizer_of_another_kind_is_refused(key, value, write_gguf, tmp_path, raises_input_error):
    path = write_gguf(tmp_path / "tiny.gguf", metadata={key: value})
    with raises_input_error("tiny.gguf", key, "not implemented"):
        from_gguf(GgufFile(path))


@pytest.mark.parametrize("key", ["tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"])
def test_gguf_without_a_part_of_its_tokenizer_is_refused(key, write_gguf, tmp_path, raises_input_error):
    path = write_gguf(tmp_path / "tiny.gguf", metadata={key: None})
    with raises_input_error("tiny.gguf", key, "missing"):
        from_gguf(GgufFile(path))


@pytest.mark.parametrize("text", [None, "", "{", "{}", '{"version": "1.0", "model": {}, "added_tokens": []}'])
def test_unreadable_tokenizer_json_is_refused(text, tiny_llama, tmp_path, raises_input_error):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_llama, folder)
    (folder / "tokenizer.json").unlink()
    if text is not None:
        (folder / "tokenizer.json").write_text(text)
    with raises_input_error(str(folder), "it needs tokenizer.json"):
        from_folder(folder)


@pytest.fixture(scope="module")
def packaged_file():
    path = cache_folder() / "models" / os.path.basename(PACKAGED["smollm2-135m-instruct"].member)
    if not path.is_file():
        pytest.skip("the packaged model is not in the cache")
    return path


def test_packaged_tokenizer_is_the_one_transformers_reads(packaged_file, prompts):
    """On texts without numerals beyond ASCII: transformers' reader leaves tokenizer.ggml.pre out of account."""
    pytest.importorskip("torch")  # transformers' GGUF reader is behind it
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(packaged_file.parent, gguf_file=packaged_file.name)
    ours = from_gguf(GgufFile(packaged_file))
    texts = prompts + [text for text in ODD_TEXTS if "½" not in text] + ["<|im_start|>user\nhi<|im_end|>"]
    assert ours.encode(texts) == theirs(texts)["input_ids"]
    assert ours.answer_ids() == [theirs.encode(f" {letter}")[0] for letter in "ABCD"]
