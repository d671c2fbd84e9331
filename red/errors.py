"""The one error that `red` raises on bad input: what was wrong, what was expected, what to do."""


class REDError(ValueError):
    """Bad input, refused before any training. The message names the value, the reason and the remedy."""
