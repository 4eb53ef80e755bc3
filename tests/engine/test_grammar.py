"""Grammars on the default model, a teller of stories: what it writes under one must be what the grammar says.

The schemas are bounded, so that 400 tokens are enough for any text of theirs.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizer_files import bpe_file, spm_file, spm_vocab, trained_bpe

import engine.grammar
from engine import Engine, Grammar, GrammarError
from engine.grammar import Constraint
from engine.tokenizer import Tokenizer

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def model() -> Engine:
    return Engine(n_ctx=1024, n_threads=1)


def write(model: Engine, grammar: Grammar, seed: int, **arguments: Any) -> str:
    text = "".join(model.generate("Once upon a time", max_tokens=400, grammar=grammar, seed=seed, **arguments))
    assert model.stats.finish_reason == "stop", text
    return text


# ------------------------------------------------------------------------------------------------------- schemas


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """Bounded objects, arrays, numbers, strings and choices of them, at most `depth` deep."""
    leaves = [_integer, _number, _string, _pattern, _enum, _const, _boolean, _format]
    nests = [_object, _object, _array, _tuple, _any_of, _nullable]
    return rng.choice(leaves + (nests if depth else []))(rng, depth)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(
        ["name", "age", "eyes", "größe", "名前", "a b", 'q"uote', "🦊", "n\\l", "x"], rng.randrange(1, 4)
    )
    required = [name for name in names if rng.random() < 0.7]
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth - 1) for name in names},
        "required": required,
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randrange(0, 3)
    items = random_schema(rng, depth - 1)
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randrange(0, 3)}


def _tuple(rng: random.Random, depth: int) -> dict[str, Any]:
    parts = [random_schema(rng, depth - 1) for _ in range(rng.randrange(1, 4))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randrange(2, 4))]}


def _nullable(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"oneOf": [{"type": "null"}, {"type": "string", "maxLength": 6}, {"type": "boolean"}]}


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randrange(-2000, 2000)
    schema: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": low + rng.randrange(0, 5000)}
    return schema | ({"multipleOf": 7, "maximum": low + 5000} if rng.random() < 0.2 else {})


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randrange(-90, 90)
    return {"type": "number", "exclusiveMinimum": low, "maximum": low + 2, "multipleOf": 0.01}


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randrange(0, 4)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(0, 12)}


def _pattern(rng: random.Random, depth: int) -> dict[str, Any]:
    return {
        "type": "string",
        "pattern": rng.choice(["^[a-z]{2,8}$", "^(yes|no|vielleicht)$", "^[A-Z]{2}-[0-9]{3,5}$", "^[äöü]{1,3}!?$"]),
    }


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample(["cat", "dog", "søster", "猫", 1, 2.5, None, True, ["a", 1], {"k": "v"}], 3)}


def _const(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"const": rng.choice(["once upon a time", "<|endoftext|>", 17, None, {"a": [1, 2]}])}


def _boolean(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "boolean"}


def _format(rng: random.Random, depth: int) -> dict[str, Any]:
    """Not date and time: llguidance follows RFC 3339 to the letter, jsonschema knows neither year 0 nor a small z."""
    return {"type": "string", "format": rng.choice(["uuid", "ipv4"])}


@pytest.mark.parametrize("part", range(10))
def test_what_is_written_under_a_schema_validates(model: Engine, part: int) -> None:
    for seed in range(20 * part, 20 * part + 20):
        rng = random.Random(seed)
        schema = _object(rng, 2) if seed % 2 else random_schema(rng)
        text = write(model, Grammar.json_schema(schema), seed, temperature=rng.choice([0.0, 0.8, 1.5]))
        try:
            exact = json.loads(json.dumps(schema), parse_float=Decimal)  # in floats, -75.88 is no multiple of 0.01
            jsonschema.validate(json.loads(text, parse_float=Decimal), exact, format_checker=jsonschema.FormatChecker())
        except (ValueError, jsonschema.ValidationError) as error:
            pytest.fail(f"seed {seed}: {text} does not follow {schema}: {error}")


def test_schemas_of_text_and_of_dictionaries_are_the_same() -> None:
    schema = {"type": "object", "properties": {"ü": {"type": "integer"}}}
    assert Grammar.json_schema(schema) == Grammar.json_schema(json.dumps(schema))
    assert len({Grammar.json_schema(schema), Grammar.json_schema(json.dumps(schema)), Grammar.regex("a")}) == 2


def test_a_schema_may_refer_to_itself(model: Engine) -> None:
    schema = {
        "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/tree"}},
        "required": ["tree"],
        "additionalProperties": False,
    }
    jsonschema.validate(json.loads(write(model, Grammar.json_schema(schema), seed=3)), schema)


PARTS = [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {"type": "integer"}}}]


@pytest.mark.parametrize(
    ("text", "schema", "fits"),
    [
        ('{"a": 1}', PARTS[0], True),
        ('{"a": 1, "b": 2}', PARTS[0], False),
        ('{"a": 1, "b": 2}', PARTS[0] | {"additionalProperties": True}, True),
        ('{"b": 2}', {"type": "object"}, True),  # it names none
        ('[{"a": 1, "b": 2}]', {"items": PARTS[0]}, False),
        ('{"x": {"b": 2}}', {"properties": {"x": {"$ref": "#/$defs/x"}}, "$defs": {"x": PARTS[0]}}, False),
        ('{"x": {"b": 2}}', {"properties": {"x": {"allOf": [{"$ref": "#/$defs/x"}]}}, "$defs": {"x": PARTS[0]}}, False),
        ('{"b": 2}', {"anyOf": PARTS}, True),
        ('{"c": 2}', {"anyOf": PARTS}, False),
        ('{"a": 1, "b": 2}', {"allOf": PARTS}, True),  # put together of parts
        ('{"a": 1, "b": 2}', PARTS[0] | {"anyOf": [PARTS[1], {"required": ["c"]}]}, True),
        ('{"allOf": 1, "b": 2}', {"properties": {"allOf": {"type": "integer"}}}, False),  # a name, no keyword
    ],
)
def test_objects_have_no_properties_but_those_that_are_named(
    model: Engine, text: str, schema: dict[str, Any], fits: bool
) -> None:
    constraint = Grammar.json_schema(schema).constraint(model.tokenizer)

    def follow() -> None:
        for token in model.tokenizer.encode(text, add_special=False, parse_special=False):
            constraint.accept(token)

    if fits:
        follow()
        assert constraint.may_end
    else:
        with pytest.raises(GrammarError):
            follow()


# ------------------------------------------------------------------------------------------- regex, Lark, special


@pytest.mark.parametrize(
    "pattern", [r"[A-Z][a-z]{2,8} (loves|hates) [a-z]{3,9}\.", r"\d{4}-\d\d", "(ab){3}", "ü|é|日本"]
)
def test_a_regex_matches_the_whole_text(model: Engine, pattern: str) -> None:
    for seed in range(3):
        assert re.fullmatch(pattern, write(model, Grammar.regex(pattern), seed))


@pytest.mark.parametrize("bias", [0.0, 50.0])
def test_a_lark_grammar_is_followed(model: Engine, bias: float) -> None:
    """Bounded, so that every text ends, whatever is sampled; the bias opens a list wherever one may begin."""
    grammar = Grammar.lark(
        'start: "(" item ("," item){0,3} ")"\nitem: WORD | "(" WORD ("," WORD){0,3} ")"\nWORD: /[a-z]{1,4}/\n'
    )
    (opening,) = model.tokenizer.encode("(", add_special=False)
    words = "[a-z]{1,4}(,[a-z]{1,4}){0,3}"
    item = rf"(\({words}\)|[a-z]{{1,4}})"
    for seed in range(3):
        text = write(model, grammar, seed, logit_bias={opening: bias})
        assert re.fullmatch(rf"\({item}(,{item}){{0,3}}\)", text), text
        assert text.startswith("((") == (bias > 0), text


def masked(constraint: Constraint, n_vocab: int) -> set[int]:
    """Tokens that may come next."""
    logits = np.zeros(n_vocab, np.float32)
    constraint.mask(logits)
    assert set(np.unique(logits)) <= {0.0, -np.inf}
    return set(np.flatnonzero(logits == 0.0).tolist())


def test_a_rule_of_a_lark_grammar_may_contain_itself(model: Engine) -> None:
    tokenizer = model.tokenizer
    constraint = Grammar.lark('start: "(" item ("," item)* ")"\nitem: /[a-z]{1,4}/ | start\n').constraint(tokenizer)
    opening, a, comma, closing = (tokenizer.encode(c, add_special=False)[-1] for c in "(a,)")
    depth = 0
    for token in (opening, opening, opening, a, closing, comma, opening, a, comma, a, closing, closing, closing):
        assert token in masked(constraint, tokenizer.n_vocab) and not constraint.finished
        constraint.accept(token)
        depth += (token == opening) - (token == closing)
        assert constraint.may_end == (depth == 0)
        assert closing not in masked(constraint, tokenizer.n_vocab) or depth > 0
    assert constraint.finished


def test_the_end_is_allowed_exactly_where_the_text_may_end(model: Engine) -> None:
    tokenizer = model.tokenizer
    (a,) = tokenizer.encode("a", add_special=False)
    constraint = Grammar.regex("a{2,3}").constraint(tokenizer)
    seen = []
    for _ in range(3):
        seen.append((bool(masked(constraint, tokenizer.n_vocab) & tokenizer.eog_ids), constraint.may_end))
        assert not constraint.finished
        constraint.accept(a)
    assert seen == [(False, False), (False, False), (True, True)]
    assert constraint.finished
    assert masked(constraint, tokenizer.n_vocab) == tokenizer.eog_ids
    constraint.accept(tokenizer.eos_id)  # type: ignore[arg-type]
    assert constraint.finished


def test_control_tokens_are_no_text(model: Engine) -> None:
    tokenizer = model.tokenizer
    constraint = Grammar.regex(r"(?s:.*)").constraint(tokenizer)
    special = {i for i in range(tokenizer.n_vocab) if tokenizer.is_skipped(i)}
    assert masked(constraint, tokenizer.n_vocab) & special == tokenizer.eog_ids  # the empty text is one, too
    text = write(model, Grammar.regex(re.escape("<|endoftext|>")), seed=1)
    assert text == "<|endoftext|>"  # spelled, in ordinary tokens


def test_only_a_lark_grammar_may_name_a_control_token(model: Engine) -> None:
    tokenizer = model.tokenizer
    constraint = Grammar.lark('start: "a" <|bos|> "b"').constraint(tokenizer)
    (a,), (b,) = (tokenizer.encode(letter, add_special=False) for letter in "ab")
    constraint.accept(a)
    assert masked(constraint, tokenizer.n_vocab) == {tokenizer.bos_id}
    constraint.accept(tokenizer.bos_id)  # type: ignore[arg-type]
    assert masked(constraint, tokenizer.n_vocab) == {b}


def test_every_token_that_ends_a_text_and_every_spelling_of_a_byte_is_allowed(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(spm_file(tmp_path, *spm_vocab()))
    assert len(tokenizer.eog_ids) == 2
    constraint = Grammar.regex("b").constraint(tokenizer)
    spellings = {i for i in range(tokenizer.n_vocab) if tokenizer.token_bytes(i) == b"b"}
    assert len(spellings) == 2  # <0x62> and the letter
    assert masked(constraint, tokenizer.n_vocab) <= spellings
    constraint.accept(max(spellings))
    assert masked(constraint, tokenizer.n_vocab) == tokenizer.eog_ids


def test_a_token_against_the_grammar_is_an_error(model: Engine) -> None:
    constraint = Grammar.regex("abc").constraint(model.tokenizer)
    with pytest.raises(GrammarError, match="^the grammar cannot be followed any further: |^token .* does not continue"):
        constraint.accept(model.tokenizer.encode("x", add_special=False)[0])


def test_logits_beyond_the_tokens_are_excluded(model: Engine) -> None:
    tokenizer = model.tokenizer
    grammar = Grammar.regex("[a-z]+")
    n = tokenizer.n_vocab
    allowed = masked(grammar.constraint(tokenizer), n)
    assert masked(grammar.constraint(tokenizer, n + 100), n + 100) == allowed
    assert masked(grammar.constraint(tokenizer, n - 1000), n - 1000) == {i for i in allowed if i < n - 1000}


def test_states_of_one_grammar_are_independent(model: Engine) -> None:
    (a,), (b,) = (model.tokenizer.encode(letter, add_special=False) for letter in "ab")
    grammar = Grammar.regex("ab|b")
    first, second = (grammar.constraint(model.tokenizer) for _ in range(2))
    first.accept(a)
    assert a in masked(second, 4096)
    assert masked(first, 4096) == {b}


def test_every_byte_can_be_written_with_any_tokenizer(tmp_path: Path) -> None:
    tokens, merges = trained_bpe()
    pieces, scores, types = spm_vocab()
    bpe = Tokenizer.from_gguf(
        bpe_file(tmp_path, [*tokens, "<eos>"], merges, [1] * len(tokens) + [3], eos_token_id=len(tokens))
    )
    spm = Tokenizer.from_gguf(spm_file(tmp_path, pieces, scores, types))
    text = 'naïve "猫"\n\t🦊 x'
    for tokenizer in (bpe, spm):
        for pattern in (re.escape(text), r"(?s:.{0,40})"):  # the first is certain from the beginning
            constraint = Grammar.regex(pattern).constraint(tokenizer)
            written = b""
            while len(written) < len(text.encode()):
                rest = text.encode()[len(written) :]
                fits = [i for i in masked(constraint, tokenizer.n_vocab) if rest.startswith(tokenizer.token_bytes(i))]
                token = max((i for i in fits if tokenizer.token_bytes(i)), key=lambda i: len(tokenizer.token_bytes(i)))
                constraint.accept(token)
                written += tokenizer.token_bytes(token)
            assert constraint.may_end


# --------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "foo"}, "the JSON schema is no good: Invalid type: foo"),
        ({"not": {}}, "the JSON schema is no good: Unimplemented keys"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "the JSON schema is no good: Unsatisfiable schema"),
        ({"$ref": "http://example.com/x"}, "the JSON schema is no good: Resource .* is not present"),
        ({"$ref": "#"}, "the JSON schema is no good: no text fits it"),
        ({"multipleOf": 1_000_003}, "the JSON schema has a multipleOf of 1,000,003 units, expected at most 100,000"),
        ("{", "the JSON schema is not JSON: "),
        ("[]", "the JSON schema is of type list, expected an object"),
        ({"enum": [object()]}, "the JSON schema is not JSON: "),
        ({"enum": ["x" * 200_000]}, "the JSON schema has 200,.* bytes, expected at most 131,072"),
        ({"enum": ["\ud800"]}, "the JSON schema is not valid Unicode"),
        ('{"items":' * 300 + "{}" + "}" * 300, "the JSON schema is no good: recursion limit exceeded"),
        ('{"items":' * 9000 + "{}" + "}" * 9000, "the JSON schema (is not JSON|is no good): .*recursion"),
    ],
    ids=lambda value: str(value)[:40].split(" object at ")[0],  # no address: two processes must agree on names
)
def test_a_schema_that_is_no_good_is_refused_with_the_reason(model: Engine, schema: Any, message: str) -> None:
    with pytest.raises(GrammarError, match=f"^{message}") as raised:
        Grammar.json_schema(schema).constraint(model.tokenizer)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (lambda: Grammar.regex("(a"), "the regex is no good: .*unclosed group"),
        (lambda: Grammar.regex("a(?=b)"), "the regex is no good: .*look-around"),
        (lambda: Grammar.regex("(" * 500 + "a" + ")" * 500), "the regex is no good: .*nested parentheses"),
        (lambda: Grammar.regex(b"a"), "the regex is of type bytes, expected text"),  # type: ignore[arg-type]
        (lambda: Grammar.lark('start: "a" b'), 'the Lark grammar is no good: .*unknown name: "b"'),
        (lambda: Grammar.lark('foo: "a"'), "the Lark grammar is no good: no start rule found"),
        (lambda: Grammar.lark("start: start"), "the Lark grammar is no good: no text fits it"),
        (lambda: Grammar.lark(" "), "the Lark grammar is empty"),
        (lambda: Grammar.lark("start: " + "(" * 9999), "the Lark grammar is no good: "),
    ],
)
def test_a_grammar_that_is_no_good_is_refused_with_the_reason(model: Engine, grammar: Any, message: str) -> None:
    with pytest.raises(GrammarError, match=f"^{message}") as raised:
        grammar().constraint(model.tokenizer)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_chains_of_rules_do_not_overrun_the_stack(model: Engine) -> None:
    """On the usual stack of 8 MiB the process ends at 1,000 definitions or 3,000 rules."""
    definitions = {f"r{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/r{i + 1}"}}} for i in range(1200)}
    Grammar.json_schema({"$defs": definitions | {"r1200": {}}, "$ref": "#/$defs/r0"}).constraint(model.tokenizer)
    rules = "".join(f"r{i}: r{i + 1}\n" for i in range(9000))
    Grammar.lark(f'start: r0\n{rules}r9000: "a"\n').constraint(model.tokenizer)


def test_a_grammar_that_takes_too_long_is_left_behind(model: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.grammar, "MAX_SECONDS", 0.05)
    before = threading.stack_size()
    schema = {"type": "object", "properties": {f"x{i}": {"type": "integer"} for i in range(2000)}}
    start = time.perf_counter()
    with pytest.raises(GrammarError, match="too large: compiling it takes more than 0.05 seconds"):
        Grammar.json_schema(schema).constraint(model.tokenizer)
    assert time.perf_counter() - start < 2.0
    assert threading.stack_size() == before


def test_where_no_large_stack_is_granted_the_usual_one_does(model: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.grammar, "STACK_BYTES", 1)  # refused as too small
    assert not Grammar.regex("[a-z]{1,78}").constraint(model.tokenizer).finished


def test_a_compiled_grammar_is_kept(model: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = Grammar.regex("[a-z]{1,77}")
    grammar.constraint(model.tokenizer)
    monkeypatch.setattr(engine.grammar, "_compile", lambda *_: pytest.fail("compiled again"))
    Grammar.regex("[a-z]{1,77}").constraint(model.tokenizer)


def test_without_llguidance_the_message_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['llguidance'] = None\n"
        "from engine import Engine, EngineError, Grammar\n"
        "grammar = Grammar.json_schema({})\n"
        "try: Engine().generate('x', grammar=grammar)\n"
        "except EngineError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "grammars need llguidance, which is not installed; pip install 'konly[grammar]'"


def test_a_mask_of_a_large_vocabulary_takes_little_time(tmp_path: Path) -> None:
    rng = random.Random(1)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = {"".join(rng.choices(letters, range(26, 0, -1), k=rng.randrange(2, 9))) for _ in range(130_000)}
    tokens = [*trained_bpe()[0], *sorted(words - set(trained_bpe()[0]))][:100_000]
    f = bpe_file(tmp_path, [*tokens, "<eos>"], (), [1] * 100_000 + [3], eos_token_id=100_000)
    tokenizer = Tokenizer.from_gguf(f)
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name", "tags"],
        "additionalProperties": False,
    }
    constraint = Grammar.json_schema(schema).constraint(tokenizer)
    logits, times = np.zeros(100_001, np.float32), []
    for byte in b'{"name": "hello there my friend", "tags": ["one", "two and three"]}':
        token = next(i for i in range(len(tokens)) if tokenizer.token_bytes(i) == bytes([byte]))
        start = time.perf_counter()
        constraint.mask(logits)
        times.append(time.perf_counter() - start)
        constraint.accept(token)
    assert constraint.finished
    assert np.median(times) < 2e-3  # 0.07 ms on an idle core, up to 20 ms where the lexer meets a new state
