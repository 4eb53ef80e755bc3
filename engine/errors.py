"""Everything the engine raises on purpose.

EngineError                  catch this one: each message says where, what was found, what was expected
 ├─ ModelFormatError         the file is missing, unreadable, damaged or hostile
 ├─ UnsupportedModelError    a sound file of an architecture, tensor type or feature that konly does not run
 ├─ ContextFullError         the tokens do not fit n_ctx
 ├─ BackendError             the device or its kernels cannot do what was asked
 ├─ SessionError             a saved session does not belong to this model, or is damaged
 ├─ GrammarError             a grammar or JSON schema is wrong, unsupported or too large
 └─ Cancelled                the caller asked to stop
"""


class EngineError(Exception):
    """Base of all errors of the engine; `konly` prints it as one `Error: …` line."""


class ModelFormatError(EngineError):
    """The model file is missing, unreadable, damaged or hostile."""


class UnsupportedModelError(EngineError):
    """The file is sound, but konly does not run this architecture, tensor type or feature."""


class ContextFullError(EngineError):
    """The tokens do not fit n_ctx."""


class BackendError(EngineError):
    """The device, or its kernels, cannot do what was asked."""


class SessionError(EngineError):
    """A saved session is damaged, or belongs to another model."""


class GrammarError(EngineError):
    """A grammar, or JSON schema, is wrong, not supported or too large; or the text does not follow it."""


class Cancelled(EngineError):
    """The caller asked to stop; what was appended to the cache so far stays valid."""
