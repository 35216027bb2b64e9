"""The one exception family for mistakes that the user can mend."""


class ElaraError(Exception):
    """Bad input or state: one sentence that says what was wrong and what to do next."""


class Interrupted(ElaraError):
    """The user or the system asked to stop and the state is safe; commands end with exit code 130 instead of 1."""
