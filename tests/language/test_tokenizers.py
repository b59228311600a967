"""Tokenizers: round trips, hand-made vocabularies with known answers, real files, malformed ones."""

import base64
import json
import struct

import bundle
import numpy as np
import pytest

from jrl.language import bpe, tokenizer_files, tokenizers
from jrl.language.tokenizers import BPE, Byte, Char, Word

GREEDY = [
    403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338, 401, 396, 267, 337, 410, 408, 419,
    292, 411, 322, 265, 282, 295, 433, 426, 385, 328, 432, 358, 394, 261, 370, 432, 352, 266, 268, 388, 426, 338, 391,
    266, 267, 337, 335, 312, 432, 398, 312, 286, 267, 414, 270, 333, 415, 426, 13, 438, 310, 439, 419, 357, 336, 432,
    313, 438, 310, 432, 278, 316, 439, 419, 298, 414, 267, 265, 282, 295, 433, 426, 436, 317, 286, 296, 418, 269, 279,
    292, 416, 439, 413, 409, 416, 327, 263, 415, 294, 267, 400, 426, 338, 336, 432, 313, 442, 391, 267, 337, 335, 364,
    420, 268,
]  # fmt: skip
TEXTS = ["", "the cat", "  the  cats,\n\tthe hat 12345", "Thé 你好 🙂 don't", "\u2581x <s> </s>", "é" * 40]
LETTERS = {byte: letter for letter, byte in bpe.byte_letters().items()}


def shown(data):
    return "".join(LETTERS[byte] for byte in data)


def gpt2_files(folder):
    """A vocabulary of the bytes and a few joined pieces, as GPT-2's two files."""
    pieces = [bytes([b]) for b in range(256)]
    merges = [
        (b"t", b"h"),
        (b"th", b"e"),
        (b" ", b"the"),
        (b"a", b"t"),
        (b"c", b"at"),
        (b" ", b"c"),
        (b"1", b"2"),
    ]
    vocab = {shown(p): i for i, p in enumerate([*pieces, *(a + b for a, b in merges)])}
    vocab["<|endoftext|>"] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{shown(a)} {shown(b)}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return vocab, [f"{shown(a)} {shown(b)}" for a, b in merges]


@pytest.fixture
def gpt2(tmp_path):
    gpt2_files(tmp_path)
    return tokenizers.read(tmp_path)


def test_pairs_are_joined_in_the_order_of_the_merges(gpt2):
    the, blank_the, at, cat, blank_c, twelve = (256 + i for i in (1, 2, 3, 4, 5, 6))
    assert gpt2.encode("the cat") == [the, ord(" "), cat]  # "c at" comes before " c"
    assert gpt2.encode("  the at") == [ord(" "), blank_the, ord(" "), at]
    assert gpt2.encode(" cup123") == [blank_c, ord("u"), ord("p"), twelve, ord("3")]
    assert gpt2.end_token == 263
    assert gpt2.decode([the, 263, cat]) == "thecat"
    assert 263 not in gpt2.encode("<|endoftext|>"), "a text must not be able to end itself"


def test_the_same_vocabulary_as_tokenizer_json_and_as_ranks(tmp_path, gpt2):
    vocab, merges = gpt2_files(tmp_path)
    record = {
        "added_tokens": [{"id": 263, "content": "<|endoftext|>", "special": True}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    from_json = tokenizers.read(tmp_path / "tokenizer.json")
    ranks = [bytes([b]) for b in range(256)] + [gpt2.pieces[i] for i in range(256, 263)]
    lines = [f"{base64.b64encode(piece).decode()} {i}" for i, piece in enumerate(ranks)]
    (tmp_path / "x.tiktoken").write_text("\n".join(lines))
    from_ranks = tokenizer_files.read_tiktoken(tmp_path / "x.tiktoken", pattern=bpe.GPT2_PATTERN)
    for text in TEXTS:
        assert from_json.encode(text) == from_ranks.encode(text) == gpt2.encode(text)
    assert from_json.encode("e\u0301") == gpt2.encode("\u00e9")  # NFC


def test_byte_fallback_as_llama_has_it(tmp_path):
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "\u2581",
        "t",
        "h",
        "e",
        "\u2581t",
        "he",
    ]
    record = {
        "added_tokens": [{"id": i, "content": names[i]} for i in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [["\u2581", "t"], ["h", "e"]],
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    tokenizer = tokenizers.read(tmp_path)
    assert tokenizer.encode("the x") == [263, 264, 259, 3 + ord("x")]
    assert tokenizer.encode("é") == [259, 3 + 0xC3, 3 + 0xA9]
    assert (tokenizer.start_token, tokenizer.end_token) == (1, 2)
    assert [tokenizer.decode([1, *tokenizer.encode(text), 2]) for text in TEXTS] == TEXTS


def byte_level(folder, **changes):
    """The vocabulary of :func:`gpt2_files` as ``tokenizer.json``, with another pre_tokenizer."""
    vocab, merges = gpt2_files(folder)
    record = {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, **changes}
    (folder / "tokenizer.json").write_text(json.dumps(record))
    return folder / "tokenizer.json"


def test_what_a_pattern_does_not_match_is_a_part_of_its_own(tmp_path):
    split = {"type": "Split", "pattern": {"Regex": "12|c"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    path = byte_level(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]})
    tokenizer = tokenizers.read(path)
    assert tokenizer.encode("cat12 the") == [ord("c"), 259, 262, 258]  # neither "cat" nor " c" across parts
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS
    for wrong, name in (
        ({"behavior": "MergedWithNext"}, "behavior='MergedWithNext'"),
        ({"invert": True}, "behavior='Isolated' and invert=True"),
    ):
        steps = [split | wrong, level]
        byte_level(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
        with pytest.raises(ValueError, match=f"a Split with {name}.*: only"):
            tokenizers.read(path)
    steps = [split | {"pattern": {"Regex": "\\d+|\\D+"}, "behavior": "Removed", "invert": True}, level]
    byte_level(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    assert tokenizers.read(path).encode("12 the") == [262, 258]


def test_a_text_that_begins_with_the_prefix_gets_no_second_one(tmp_path):
    path = byte_level(tmp_path, pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True})
    once = tokenizers.read(path)
    assert once.encode("the") == once.encode(" the") == [258]
    assert once.encode("  the") == [ord(" "), 258]
    assert once.encode(" ") == [ord(" ")]
    assert [once.decode(once.encode(text)) for text in ("the", "  the", " ", "", *TEXTS)] == [
        "the",
        "  the",
        " ",
        "",
        *TEXTS,
    ]
    assert tokenizers.continuation(once, once.encode("the"), once.encode(" at")) == " at"
    tokenizers.write(once, tmp_path)
    assert tokenizers.read(tmp_path).encode(" the") == [258]
    record = {name: value for name, value in tokenizers.to_json(llama()).items() if name != "prefix_once"}
    assert tokenizers.from_json(record).encode(" a") == [259, 262], "a record of before: the prefix always"
    assert llama(prefix_once=True).encode(" a") == [262]


def metaspace(pieces, merges, **choices):
    """Of a tokenizer.json with 259 names for bytes and specials, and then these pieces."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    record = {
        "added_tokens": [{"id": i, "content": names[i]} for i in range(3)],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", **choices},
        "model": {
            "byte_fallback": True,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": merges,
        },
    }
    return tokenizer_files.hugging_face(record)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_puts_a_blank_only_where_there_is_none(scheme):
    pieces = ["\u2581", "a", "b", "\u2581\u2581", "\u2581a"]
    tokenizer = metaspace(pieces, [["\u2581", "a"]], prepend_scheme=scheme)
    assert tokenizer.encode(" a") == [263]
    assert tokenizer.encode("a") == ([260] if scheme == "never" else [263])


@pytest.mark.parametrize("split", [{}, {"split": True}, {"split": False}])
def test_metaspace_begins_a_part_at_each_blank_unless_told_not_to(split):
    merges = [["\u2581", "\u2581"], ["a", "\u2581"]]
    tokenizer = metaspace(["\u2581", "a", *map("".join, merges)], merges, prepend_scheme="never", **split)
    blank, a, blanks, a_blank = range(259, 263)
    apart = split.get("split", True)
    assert tokenizer.encode("  ") == ([blank, blank] if apart else [blanks])
    assert tokenizer.encode("a a") == ([a, blank, a] if apart else [a_blank, a])
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS


@pytest.mark.parametrize("kind", ["char", "byte", "word", "gpt2"])
def test_round_trips_of_texts_and_of_the_tokenizer(kind, gpt2, tmp_path):
    text = "".join(TEXTS)
    tokenizer = {
        "char": Char.of(text, specials=("<end>",)),
        "byte": Byte(),
        "word": Word.of("the cat sat on the mat", specials=("<start>", "<end>")),
        "gpt2": gpt2,
    }[kind]
    tokenizers.write(tokenizer, tmp_path)
    again = tokenizers.read(tmp_path)
    for sample in TEXTS:
        tokens = tokenizer.encode(sample)
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)
        assert again.encode(sample) == tokens
        if kind != "word":
            assert again.decode(tokens) == sample
    assert (again.vocab_size, again.end_token) == (tokenizer.vocab_size, tokenizer.end_token)
    assert tokenizer.end_token == tokenizer.vocab_size - 1
    if kind == "word":
        assert tokenizer.encode("the dog sat.") == [1, 0, 3, 0]
        assert tokenizer.decode([1, 0, 3, 7]) == "the <unk> sat"
        assert tokenizer.start_token == tokenizer.vocab_size - 2


def llama(**changes):
    """A vocabulary of characters and bytes, as SentencePiece's: each text begins with a blank that is taken off."""
    pieces = [b"<unk>", b"<s>", b"</s>", *(bytes([b]) for b in range(256)), b" ", b"a", b"b", b" a"]
    given = {"prefix": " ", "specials": {"<unk>": 0, "<s>": 1, "</s>": 2}, "start_token": 1, **changes}
    return BPE(tuple(pieces), {(b" ", b"a"): 0}, None, True, tuple(range(3, 259)), **given)


def test_a_continuation_keeps_the_blank_before_its_first_word(gpt2):
    words = Word.of("once upon a time")
    assert tokenizers.continuation(words, words.encode("once upon"), words.encode("a time")) == " a time"
    assert tokenizers.continuation(words, [], words.encode("a time")) == "a time"
    tokenizer = llama()
    tokens = tokenizer.encode("b a")
    assert tokenizers.continuation(tokenizer, [1, *tokens[:2]], [*tokens[2:], 2]) == " a"
    assert tokenizers.continuation(tokenizer, [1], tokens) == "b a"
    for tokenizer in (llama(), gpt2, words, Byte()):
        for text in TEXTS:
            tokens = tokenizer.encode(text)
            for cut in range(len(tokens) + 1):
                before = tokenizer.decode(tokens[:cut])
                after = tokenizers.continuation(tokenizer, tokens[:cut], tokens[cut:])
                # A cut within a character: it belongs to what completes it.
                assert before.rstrip("\ufffd") + after == tokenizer.decode(tokens)


def test_the_model_s_own_text_is_its_own_tokens():
    tokenizer = tokenizers.read(bundle.path("stories260K/tok512.bin"))
    text = bundle.path("stories260K/expected_greedy.txt").read_text(encoding="utf-8").removesuffix("\n")
    assert tokenizer.encode(text) == GREEDY
    assert tokenizer.decode([1, *GREEDY]) == text
    assert tokenizer.encode("Once upon a time") == [403, 407, 261, 378]
    assert tokenizer.encode("é") == [410, 485]
    assert tokenizer.encode("你") == [410, 231, 192, 163]
    assert (tokenizer.vocab_size, tokenizer.start_token, tokenizer.end_token) == (512, 1, 2)


def test_a_long_text_without_parts_takes_no_quadratic_time():
    tokenizer = tokenizers.read(bundle.path("stories260K/tok512.bin"))
    text = bundle.path("shakespeare/input.txt").read_text(encoding="utf-8")[:100_000]
    tokens = tokenizer.encode(
        text
    )  # the plain loop needs 5·10⁹ looks at a pair: beyond the suite's time limit
    assert tokenizer.decode(tokens) == text


def test_what_no_token_stands_for_is_refused():
    with pytest.raises(ValueError, match="the character 'x' is not in the alphabet"):
        Char("abc").encode("abx")
    with pytest.raises(ValueError, match="token 3 is outside the vocabulary of 3 tokens"):
        Char("abc").decode([0, 3])
    with pytest.raises(ValueError, match="token -1 is outside the vocabulary"):
        Byte().decode([-1])
    with pytest.raises(ValueError, match="needs a text of one character or more, each once"):
        Char("aba")
    with pytest.raises(ValueError, match=r"alphabet=\['ab', 'c'\]: needs a text of one character or more"):
        tokenizers.from_json({"kind": "Char", "alphabet": ["ab", "c"]})


def test_folders_without_a_tokenizer_and_unknown_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer: expected jrl_tokenizer\.json"):
        tokenizers.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}))
    with pytest.raises(ValueError, match="a model of type 'Unigram': only BPE is read"):
        tokenizers.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    with pytest.raises(ValueError, match="only byte-level BPE is read"):
        tokenizers.read(tmp_path)
    for mark in ("continuing_subword_prefix", "end_of_word_suffix"):
        model = {"vocab": {}, "merges": [], mark: "</w>"}
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
        with pytest.raises(ValueError, match=f"a model with {mark}='</w>': only pieces without such marks"):
            tokenizers.read(tmp_path)


def test_the_file_that_is_missing_is_the_one_named(tmp_path):
    gpt2_files(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"merges\.txt cannot be read: No such file"):
        tokenizers.read(tmp_path)


def test_damaged_files_are_errors_and_nothing_else(tmp_path):
    """Seeded damage to each kind of file: it is read, or refused with ValueError."""
    gpt2_files(tmp_path)
    tokenizers.write(tokenizers.read(tmp_path), tmp_path)
    llama2c = struct.pack("<i", 6)
    for name in [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % b for b in range(256)), b"a", b"b", b"ab"]:
        llama2c += struct.pack("<fi", -1.0, len(name)) + name
    (tmp_path / "x.bin").write_bytes(llama2c)
    (tmp_path / "x.tiktoken").write_text(
        "\n".join(f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256))
    )
    rng = np.random.default_rng(0)
    refused = 0
    names = ("jrl_tokenizer.json", "vocab.json", "merges.txt", "x.bin", "x.tiktoken")
    intact = {name: (tmp_path / name).read_bytes() for name in names}
    assert isinstance(tokenizers.read(tmp_path / "x.bin"), BPE)
    for i in range(250):
        name = names[i % len(names)]
        data = bytearray(intact[name])
        if rng.random() < 0.3:
            data = data[: rng.integers(len(data))]
        for _ in range(rng.integers(1, 4)):
            if data:
                data[rng.integers(len(data))] = rng.choice([0, 34, 44, 45, 57, 91, 93, 123, 125, 255])
        (tmp_path / name).write_bytes(data)
        try:
            tokenizer = tokenizers.read(tmp_path / ("vocab.json" if name == "merges.txt" else name))
            tokenizer.decode(tokenizer.encode("the cat 12"))
        except ValueError:
            refused += 1
        (tmp_path / name).write_bytes(intact[name])
    assert refused > 100, "the damage was hardly noticed: the test does not test"


def test_equals_the_tokenizers_package(tmp_path):
    package = pytest.importorskip("tokenizers")
    gpt2_files(tmp_path)
    theirs = package.Tokenizer(
        package.models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    )
    theirs.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.save(str(tmp_path / "tokenizer.json"))
    for ours in (tokenizers.read(tmp_path / "vocab.json"), tokenizers.read(tmp_path / "tokenizer.json")):
        for text in TEXTS:
            assert ours.encode(text) == theirs.encode(text).ids
