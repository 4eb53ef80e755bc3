"""Makes tests/data/chat_templates/expected.json: what transformers' apply_chat_template gives for each template there.

    python -m venv V && V/bin/pip install transformers jinja2 && V/bin/python scripts/make_chat_expectations.py

transformers is no dependency of the suite: the texts are made once and kept. Tool calls have their arguments as an
object; a template that cannot do with that (DeepSeek's) gets them as JSON text, as its model's own code gives them.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "data" / "chat_templates"

SPECIALS = {"DeepSeek": ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>")}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a place \u2600 <now> & 'then'",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = {
    "id": "functions.weather:0",
    "type": "function",
    "function": {"name": "weather", "arguments": {"place": "Köln"}},
}

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one": {"messages": [{"role": "user", "content": "Hello, wörld"}]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    "turns": {
        "messages": [
            {"role": "user", "content": "  spaces around  "},
            {"role": "assistant", "content": "An answer\n\nin two parts "},
            {"role": "user", "content": "\n\nAnd?\n"},
        ]
    },
    "thinking": {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "<think>\nIt is 4.\n</think>\n\n4"},
            {"role": "user", "content": "Sure?"},
        ]
    },
    "no generation prompt": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "add_generation_prompt": False,
    },
    "tools": {"messages": [{"role": "user", "content": "Weather?"}], "tools": [WEATHER]},
    "tool call": {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": '{"sky": "grey"}', "tool_call_id": "functions.weather:0", "name": "weather"},
        ],
        "tools": [WEATHER],
    },
    "no thinking": {"messages": [{"role": "user", "content": "Quick!"}], "enable_thinking": False},
}


def main() -> None:
    expected: dict[str, Any] = {"conversations": CONVERSATIONS, "texts": {}}
    for path in sorted(FOLDER.glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        specials = next((pair for name, pair in SPECIALS.items() if path.name.startswith(name)), ("", ""))
        made = {name: _rendered(source, conversation, specials) for name, conversation in CONVERSATIONS.items()}
        expected["texts"][path.stem] = {"bos": specials[0], "eos": specials[1], "expected": made}
    (FOLDER / "expected.json").write_text(json.dumps(expected, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _rendered(source: str, conversation: dict[str, Any], specials: tuple[str, str]) -> str | None:
    """None: transformers cannot render it. Its release 5 leaves out keys that are None, which DeepSeek's templates ask
    for (`message['content'] is none`): what apply_chat_template cannot do is asked of the template as release 4 did.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.chat_template_utils import _compile_jinja_template

    names = {"bos_token": specials[0], "eos_token": specials[1]} if specials[0] else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=source, **names)
    for as_text in (False, True):
        options = copy.deepcopy(conversation)
        messages = options.pop("messages")
        for call in (call for m in messages for call in m.get("tool_calls", ()) if as_text):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        options = {"add_generation_prompt": True, "tools": None, **options}
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:
            print(f"{source[:40]!r}: {type(error).__name__}: {error}")
        try:
            return _compile_jinja_template(source).render(messages=messages, **names, **options)
        except Exception as error:
            print(f"{source[:40]!r}, release 4: {type(error).__name__}: {error}")
    return None


if __name__ == "__main__":
    main()
