"""`konly chat`: a conversation with a model, in a terminal or over pipes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import note
from ..errors import EngineError
from .options import chosen_model, engine_options, model_options, open_engine, read_text
from .sampling import sampling_of, sampling_options

if TYPE_CHECKING:
    from ..chat import ChatTemplate
    from ..engine import Engine


@click.command(short_help="Talk with a model.")
@model_options
@click.option("-sys", "--system", "--system-prompt", metavar="TEXT", help="Instructions to the model.")
@click.option("--session", metavar="FILE", help="Go on with the conversation in this file, and keep it there.")
@click.option("--chat-template", metavar="FILE", help="A Jinja file instead of the model's own; 'plain': none at all.")
@click.option("--hide-thinking", is_flag=True, help="Show answers alone.")
@click.option(
    "-n",
    "--n-predict",
    type=click.IntRange(-1),
    default=-1,
    help="Most tokens of an answer; -1: to its end.",
    show_default=True,
)
@engine_options
@click.option("--draft-ngram", is_flag=True, help="Guess ahead from what was said before; the same text, faster.")
@sampling_options
def chat(
    system: str | None,
    session: str | None,
    chat_template: str | None,
    hide_thinking: bool,
    n_predict: int,
    draft_ngram: bool,
    **options: Any,
) -> None:
    """Talk with a model: `konly chat model.gguf --system "Answer briefly." --session talk.konly`

    Ctrl-C stops an answer; /help tells the commands. From a pipe each line is a message. Without MODEL the small
    default model goes on with the story that you begin.
    """
    from ..chat.conversation import Conversation
    from ..chat.repl import Repl, Screen
    from ..chat.repl_input import pipe, terminal

    sampling = sampling_of(options)
    if session and not os.access(folder := Path(session).absolute().parent, os.W_OK):
        raise EngineError(f"{session}: could not be kept: {folder} is missing, or no folder that you may write to")
    interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    with open_engine(options) as opened:
        conversation = Conversation(
            opened,
            _template(opened, chat_template),
            sampling,
            max_tokens=None if n_predict < 0 else n_predict,
            system=system,
            speculate=draft_ngram,
        )
        reader = terminal(lambda: repl.toolbar()) if interactive else pipe()
        repl = Repl(conversation, reader, Screen(hide_thinking=hide_thinking), interactive, session)
        if session and Path(session).exists():
            conversation.load(session)
            conversation.system = system or conversation.system
            repl.welcome_back()
        elif interactive:
            note(f"{Path(opened.path).name}, {opened.n_ctx:,} tokens of context; /help tells the commands")
            if chosen_model(options) is None:
                note("This model was taught to tell stories, not to talk: begin one, and it goes on")
        repl.run()


def _template(opened: Engine, given: str | None) -> ChatTemplate:
    from ..chat import BUILTIN, ChatTemplate

    if given is not None:
        source = BUILTIN[given] if given in BUILTIN else read_text(Path(given))
        return ChatTemplate(source, opened.tokenizer)
    if opened.model.template is None:
        raise EngineError(
            f"{opened.path}: has no chat template: it may be a base model, for `konly run`; "
            "else give its template by --chat-template FILE, or 'plain' to go on with what you type"
        )
    return opened.model.template
