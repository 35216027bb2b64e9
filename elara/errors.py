"""The one exception family for mistakes that the user can mend."""


class ElaraError(Exception):
    """Bad input or state: one sentence that says what was wrong and what to do next."""
