"""Options for how the next token is chosen and when the text ends: what `run` and `chat` share. Names are llama.cpp's.

Their defaults are those of engine/sampling/, repeated here because `--help` must not wait for NumPy; a test compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import options_in_order, read_text

if TYPE_CHECKING:
    from ..grammar import Grammar
    from ..sampling import Sampling

NUMBERS: tuple[tuple[str, str, float, str], ...] = (  # option, field of Sampling, default, help
    ("--temp", "temperature", 0.8, "0: always the most probable token."),
    ("--top-k", "top_k", 40, "Keep the k most probable tokens; 0: off."),
    ("--top-p", "top_p", 0.95, "Keep the fewest whose probabilities reach this sum; 1: off."),
    ("--min-p", "min_p", 0.05, "Keep those with this share of the greatest probability; 0: off."),
    ("--top-nsigma", "top_n_sigma", -1.0, "Keep logits within n standard deviations of the greatest; -1: off."),
    ("--typical", "typical_p", 1.0, "Keep those nearest to the expected surprise until this sum; 1: off."),
    ("--xtc-probability", "xtc_probability", 0.0, "How often the most probable are left out; 0: never."),
    ("--xtc-threshold", "xtc_threshold", 0.1, "Which are: all but the last with this probability."),
    ("--dynatemp-range", "dynatemp_range", 0.0, "Temperatures from temp - range to temp + range, by entropy; 0: off."),
    ("--dynatemp-exp", "dynatemp_exponent", 1.0, "Exponent of the entropy."),
    ("--repeat-penalty", "repeat_penalty", 1.0, "Divides the logits of recent tokens; 1: off."),
    ("--presence-penalty", "presence_penalty", 0.0, "Is taken from them; 0: off."),
    ("--frequency-penalty", "frequency_penalty", 0.0, "Is taken from them once for each occurrence; 0: off."),
    ("--repeat-last-n", "repeat_last_n", 64, "Tokens that these three look at; 0: none, -1: all."),
    ("--dry-multiplier", "dry_multiplier", 0.0, "Penalty of going on with a repetition (DRY); 0: off."),
    ("--dry-base", "dry_base", 1.75, "Times this for each token that it is longer."),
    ("--dry-allowed-length", "dry_allowed_length", 2, "Repetitions of so many tokens are free."),
    ("--dry-penalty-last-n", "dry_penalty_last_n", -1, "Tokens that DRY looks at; 0: none, -1: all."),
    ("--mirostat", "mirostat", 0, "2: keep the surprise even by Mirostat 2.0, without top-k and the rest; 0: off."),
    ("--mirostat-ent", "mirostat_tau", 5.0, "The surprise to keep to, in bits."),
    ("--mirostat-lr", "mirostat_eta", 0.1, "Its learning rate."),
)


def _number(option: str, field: str, default: float, text: str) -> Any:
    return click.option(option, field, default=default, help=text, show_default=True)


sampling_options = options_in_order(
    *(_number(*row) for row in NUMBERS),
    click.option(
        "--dry-sequence-breaker",
        "dry_breakers",
        multiple=True,
        metavar="TEXT",
        help="No repetition goes beyond it; instead of \\n : \" *; 'none': nothing stops one.",
    ),
    click.option(
        "-l",
        "--logit-bias",
        multiple=True,
        metavar="ID±BIAS",
        help="15043+1 or 15043-1.5, 15043-inf: never that token.",
    ),
    click.option("--ignore-eos", is_flag=True, help="Do not end where the model would."),
    click.option(
        "-s",
        "--seed",
        type=click.IntRange(-1),
        default=-1,
        help="Same seed, same text; -1: another each time.",
        show_default=True,
    ),
)

text_options = options_in_order(
    click.option(
        "-r", "--reverse-prompt", multiple=True, metavar="TEXT", help="Stop before this text; may be repeated."
    ),
    click.option("--json-schema", metavar="FILE|JSON", help="Keep to JSON of this schema."),
    click.option("--regex", metavar="PATTERN", help="Keep to a regular expression."),
    click.option(
        "--grammar-file", type=click.Path(dir_okay=False, path_type=Path), help="Keep to a Lark grammar in a file."
    ),
    click.option("--context-shift", is_flag=True, help="Forget the oldest half when the context is full, and go on."),
    click.option(
        "--keep", type=click.IntRange(-1), help="Tokens of the prompt that a shift keeps; -1: all. [default: BOS alone]"
    ),
    click.option("--draft-ngram", is_flag=True, help="Guess ahead from what was said before; the same text, faster."),
)


def sampling_of(options: dict[str, Any]) -> Sampling:
    """The Sampling of sampling_options."""
    fields = {field: options[field] for _, field, _, _ in NUMBERS}
    if options["dry_breakers"]:
        fields["dry_sequence_breakers"] = tuple(unescaped(text) for text in options["dry_breakers"] if text != "none")
    if options["logit_bias"]:
        fields["logit_bias"] = dict(map(_bias, options["logit_bias"]))
    import engine

    seed = None if options["seed"] == -1 else options["seed"]
    return engine.Sampling(**fields, ignore_eos=options["ignore_eos"], seed=seed)


def text_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """What generate() gets from text_options; of --keep -1 nothing: the caller knows how long the prompt is."""
    arguments: dict[str, Any] = {}
    if options["reverse_prompt"]:
        arguments["stop"] = [unescaped(text) for text in options["reverse_prompt"]]
    if (grammar := _grammar(options)) is not None:
        arguments["grammar"] = grammar
    if options["context_shift"]:
        arguments["context_shift"] = True
    if options["keep"] is not None and options["keep"] >= 0:
        arguments["n_keep"] = options["keep"]
    if options["draft_ngram"]:
        arguments["speculate"] = True
    return arguments


def _grammar(options: dict[str, Any]) -> Grammar | None:
    given = [name for name in ("json_schema", "regex", "grammar_file") if options[name] is not None]
    if not given:
        return None
    if len(given) > 1:
        names = " and ".join("--" + name.replace("_", "-") for name in given)
        raise click.UsageError(f"two grammars: {names}; give one")
    import engine

    if options["regex"] is not None:
        return engine.Grammar.regex(options["regex"])
    if options["grammar_file"] is not None:
        return engine.Grammar.lark(read_text(options["grammar_file"]))
    schema = options["json_schema"]
    return engine.Grammar.json_schema(schema if schema.lstrip().startswith("{") else read_text(Path(schema)))


def _bias(text: str) -> tuple[int, float]:
    """15043+1 -> (15043, 1.0)"""
    at = max(text.find("+"), text.find("-"))
    try:
        return int(text[:at]), float(text[at:])
    except ValueError:
        raise click.BadParameter(
            f"{text!r}, expected a token id and a bias like 15043-1.5", param_hint="'-l'"
        ) from None


def unescaped(text: str) -> str:
    r"""\n, \t, \\, \" and \' as llama.cpp reads them in options; a backslash before anything else stays."""
    out, rest = "", text
    while (at := rest.find("\\")) >= 0:
        found = _ESCAPES.get(rest[at + 1 : at + 2])
        out += rest[:at] + ("\\" + rest[at + 1 : at + 2] if found is None else found)
        rest = rest[at + 2 :]
    return out + rest


_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "'": "'"}
