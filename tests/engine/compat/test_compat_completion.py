"""create_completion: OpenAI's objects and chunks, and the text that konly itself would give."""

from __future__ import annotations

import json
import math
import threading
from typing import Any

import numpy as np
import pytest

from engine.compat import Llama, LlamaGrammar, LogitsProcessorList, StoppingCriteriaList

PROMPT = "Once upon a time"


def text_of(completion: dict[str, Any]) -> str:
    return completion["choices"][0]["text"]


def greedy(llama: Llama, prompt: Any = PROMPT, **arguments: Any) -> dict[str, Any]:
    return llama(prompt, temperature=0.0, **{"max_tokens": 12} | arguments)


def test_a_completion_is_openais_object_with_konlys_text(llama: Llama) -> None:
    found = greedy(llama)
    ids = llama.tokenize(PROMPT.encode())
    assert text_of(found) == "".join(llama.engine.generate(PROMPT, max_tokens=12, temperature=0))
    assert found["id"].startswith("cmpl-")
    assert found["object"] == "text_completion"
    assert found["model"] == llama.model_path
    assert found["choices"][0] | {"text": ""} == {"text": "", "index": 0, "logprobs": None, "finish_reason": "length"}
    assert found["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 12, "total_tokens": len(ids) + 12}
    json.dumps(found)


def test_ids_are_as_good_a_prompt_as_text(llama: Llama) -> None:
    assert text_of(greedy(llama, llama.tokenize(PROMPT.encode()))) == text_of(greedy(llama))


def test_chunks_make_up_the_text_and_the_last_says_why_it_ends(llama: Llama) -> None:
    chunks = list(greedy(llama, stream=True))
    assert "".join(map(text_of, chunks)) == text_of(greedy(llama))
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk and chunk["object"] == "text_completion" for chunk in chunks)


def test_stop_strings_end_the_text_and_never_show(llama: Llama) -> None:
    whole = text_of(greedy(llama, max_tokens=20))
    stop = whole[10:14]
    for found in (greedy(llama, max_tokens=20, stop=[stop]), greedy(llama, max_tokens=20, stop=stop)):
        assert text_of(found) == whole[: whole.index(stop)]
        assert found["choices"][0]["finish_reason"] == "stop"
    pieces = [text_of(chunk) for chunk in greedy(llama, max_tokens=20, stop=[stop], stream=True)]
    assert "".join(pieces) == whole[: whole.index(stop)]


@pytest.mark.parametrize("max_tokens", [None, 0, -1, 1000])
def test_without_max_tokens_the_context_is_filled(llama: Llama, max_tokens: int | None) -> None:
    found = greedy(llama, max_tokens=max_tokens, logit_bias={llama.token_eos(): -math.inf})
    assert found["usage"]["total_tokens"] == llama.n_ctx()
    assert found["choices"][0]["finish_reason"] == "length"


def test_the_model_ends_its_text_with_stop(llama: Llama) -> None:
    found = greedy(llama, logit_bias={str(llama.token_eos()): 100.0})  # OpenAI's clients send ids as text
    assert text_of(found) == ""
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == 0


def test_a_prompt_without_room_is_refused_in_llama_cpp_pythons_words(llama: Llama) -> None:
    for stream in (False, True):
        with pytest.raises(ValueError, match=r"^Requested tokens \(256\) exceed context window of 256$"):
            llama([5] * 256, stream=stream)
    assert greedy(llama, [5] * 255)["usage"]["completion_tokens"] == 1


def test_control_tokens_in_a_prompt_count_and_bos_is_not_doubled(llama: Llama) -> None:
    bos = llama.detokenize([llama.token_bos()], special=True).decode()
    assert greedy(llama, bos + PROMPT)["usage"] == greedy(llama)["usage"]


def test_an_empty_prompt_is_bos(llama: Llama) -> None:
    assert greedy(llama, "")["usage"]["prompt_tokens"] == 1
    with pytest.raises(ValueError, match="the prompt is empty"):
        llama([])


def test_suffix_and_echo_surround_the_text(llama: Llama) -> None:
    whole = text_of(greedy(llama))
    assert text_of(greedy(llama, suffix=" END", echo=True)) == PROMPT + whole + " END"
    chunks = greedy(llama, suffix=" END", echo=True, stream=True)
    assert "".join(map(text_of, chunks)) == PROMPT + whole + " END"


def test_seeds_repeat_and_the_llamas_seed_decides_on_those_not_given(llama: Llama) -> None:
    one, two = (text_of(llama(PROMPT, max_tokens=20, seed=5)) for _ in range(2))
    assert one == two
    llama.set_seed(3)
    first = [text_of(llama(PROMPT, max_tokens=20)) for _ in range(3)]
    llama.set_seed(3)
    assert [text_of(llama(PROMPT, max_tokens=20)) for _ in range(3)] == first
    assert len(set(first)) > 1
    assert len({text_of(llama(PROMPT, max_tokens=20, seed=-1)) for _ in range(5)}) > 1


def test_sampling_fields_reach_the_sampler(llama: Llama) -> None:
    assert text_of(llama(PROMPT, max_tokens=12, top_k=1)) == text_of(greedy(llama))
    assert text_of(llama(PROMPT, max_tokens=12, top_k=-1, top_p=0.0)) == text_of(greedy(llama))
    assert text_of(llama(PROMPT, max_tokens=12, temperature=-1.0, top_k=1, seed=4)) != text_of(greedy(llama))
    assert text_of(greedy(llama, max_tokens=60, repeat_penalty=1.5)) != text_of(greedy(llama, max_tokens=60))
    assert text_of(llama(PROMPT, max_tokens=12, mirostat_mode=2, seed=1))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mirostat_mode": 1}, "mirostat is 1"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"logit_bias": {"x": 1}}, "logit_bias is"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"grammar": 3}, "grammar is of type int"),
    ],
)
def test_wrong_arguments_are_value_errors(llama: Llama, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        llama(PROMPT, **arguments)


def test_an_unknown_argument_is_a_type_error(llama: Llama) -> None:
    with pytest.raises(TypeError, match="temprature"):
        llama(PROMPT, temprature=1.0)


def test_arguments_may_be_given_by_position(llama: Llama) -> None:
    assert text_of(llama.create_completion(PROMPT, None, 12, 0.0)) == text_of(greedy(llama))


# ------------------------------------------------------------------------------------------------------- logprobs


def test_logprobs_are_those_of_the_model_and_offsets_point_into_the_text(llama: Llama) -> None:
    found = greedy(llama, logprobs=3)
    logprobs, text = found["choices"][0]["logprobs"], PROMPT + text_of(found)
    ids = llama.tokenize(PROMPT.encode())
    rows = llama.engine.stream().step(ids, "all")
    expected = rows[-1] - rows[-1].max()
    expected -= np.log(np.exp(expected).sum())
    assert logprobs["token_logprobs"][0] == pytest.approx(expected.max(), abs=1e-3)
    assert len(logprobs["tokens"]) == 12
    for token, offset, logprob, top in zip(*(logprobs[name] for name in logprobs)):
        token, offset = (token, offset) if isinstance(token, str) else (offset, token)
        assert text[offset:].startswith(token)
        assert top[token] == logprob == max(top.values()) <= 0  # greedy
        assert len(top) == 3


def test_a_stop_string_takes_its_tokens_with_it(llama: Llama) -> None:
    whole = greedy(llama, logprobs=0)
    tokens = whole["choices"][0]["logprobs"]["tokens"]
    found = greedy(llama, logprobs=0, stop=[tokens[6]])
    assert found["choices"][0]["logprobs"]["tokens"] == tokens[:6]
    chunks = list(greedy(llama, logprobs=0, stop=[tokens[6]], stream=True))
    assert [t for chunk in chunks if (lp := chunk["choices"][0]["logprobs"]) for t in lp["tokens"]] == tokens[:6]


def test_echoed_logprobs_are_those_of_the_prompt(llama: Llama) -> None:
    both = greedy(llama, logprobs=1, echo=True)["choices"][0]
    answer = greedy(llama, logprobs=1)["choices"][0]["logprobs"]
    logprobs = both["logprobs"]
    n = len(logprobs["tokens"]) - 12
    assert "".join(logprobs["tokens"][:n]) == PROMPT
    assert logprobs["text_offset"][:n] == [0, 4, 9, 11]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(logprob < 0 for logprob in logprobs["token_logprobs"][1:])
    assert logprobs["tokens"][n:] == answer["tokens"]
    assert logprobs["token_logprobs"][n:] == pytest.approx(answer["token_logprobs"], abs=0.01)  # another kernel's sums


# ------------------------------------------------------------------------- processors, criteria, grammars, threads


def test_logits_processors_get_the_ids_and_return_logits(llama: Llama) -> None:
    seen: list[list[int]] = []

    def only_five(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        assert input_ids.dtype == np.intc
        seen.append(input_ids.tolist())
        out = np.full_like(scores, -np.inf)
        out[5] = 0
        return out

    found = greedy(llama, max_tokens=3, logits_processor=LogitsProcessorList([only_five]))
    ids = llama.tokenize(PROMPT.encode())
    assert seen == [ids, [*ids, 5], [*ids, 5, 5]]
    assert text_of(found) == llama.detokenize([5, 5, 5], []).decode()


def test_stopping_criteria_end_the_text_before_the_next_token(llama: Llama) -> None:
    n_prompt = len(llama.tokenize(PROMPT.encode()))
    criteria = StoppingCriteriaList([lambda ids, logits: len(ids) >= n_prompt + 4])
    four = text_of(greedy(llama, max_tokens=4))
    found = greedy(llama, stopping_criteria=criteria)
    assert text_of(found) == four
    assert found["choices"][0]["finish_reason"] == "stop"
    held = four[-1] + "that does not come"  # its first letter is held back until the text ends
    assert text_of(greedy(llama, stopping_criteria=criteria, stop=[held])) == four


@pytest.mark.parametrize("as_text", [False, True])
def test_a_gbnf_grammar_is_kept_to(llama: Llama, as_text: bool) -> None:
    gbnf = 'root ::= ("yes" | "no") " " [0-9]+ end\nend ::= "."'
    found = greedy(llama, grammar=gbnf if as_text else LlamaGrammar.from_string(gbnf), max_tokens=60, top_k=5)
    assert text_of(found)[:3] in ("yes", "no ")


def test_a_json_schema_is_kept_to(llama: Llama) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]}
    found = greedy(llama, grammar=LlamaGrammar.from_json_schema(json.dumps(schema)), max_tokens=60)
    assert list(json.loads(text_of(found))) == ["a"]
    assert found["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("gbnf", ["root ::= (", "", "root ::= missing", "::="])
def test_a_bad_grammar_is_a_value_error(llama: Llama, gbnf: str) -> None:
    with pytest.raises(ValueError, match="grammar"):
        greedy(llama, grammar=LlamaGrammar.from_string(gbnf))


def test_calls_from_several_threads_give_what_they_give_alone(llama: Llama) -> None:
    prompts = ["Once upon a time", "The dog", "A cat", "She said"] * 2
    alone = [text_of(greedy(llama, prompt)) for prompt in prompts]
    found: dict[int, str] = {}

    def call(i: int) -> None:
        stream = bool(i % 2)
        result = greedy(llama, prompts[i], stream=stream)
        found[i] = "".join(map(text_of, result)) if stream else text_of(result)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(prompts))] == alone


def test_an_iterator_that_is_left_does_not_block_the_next_call(llama: Llama) -> None:
    left = greedy(llama, stream=True)
    next(left)
    assert text_of(greedy(llama, "The dog")) == text_of(greedy(llama, "The dog"))
    assert "".join(map(text_of, left))
    left = greedy(llama, stream=True)
    next(left)
    left.close()
    assert not llama._busy.locked()


def test_llama_indexs_calls_work(llama: Llama) -> None:
    assert llama.context_params.n_ctx == 256
    settings = {"temperature": 0.1, "max_tokens": 8}
    assert text_of(llama(prompt=PROMPT, **settings, stream=False))
    assert "".join(map(text_of, llama(prompt=PROMPT, **settings, stream=True)))


def test_a_draft_model_leaves_the_text_as_it_is(llama: Llama) -> None:
    fast = Llama(llama.model_path, n_ctx=256, draft_model=object(), verbose=False)
    assert text_of(greedy(fast, max_tokens=40)) == text_of(greedy(llama, max_tokens=40))
    fast.close()
