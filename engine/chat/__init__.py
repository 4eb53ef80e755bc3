"""Chat: messages on one side, tokens on the other, and a person at a terminal.

template.py ─ messages.py           a conversation as the tokens that the model was trained to see
   └ sandbox.py ─ filters.py, budget.py     the file's template is somebody's program: it is bound in all it may do
conversation.py                     a template and a stream that holds the tokens; undo, sessions
repl.py ─ repl_input.py             `konly chat`
"""

from .template import BUILTIN as BUILTIN
from .template import ChatTemplate as ChatTemplate
