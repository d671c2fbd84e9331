"""The errors of `red`: what was wrong, what was expected, what to do."""


class REDError(ValueError):
    """Bad input, refused before any training, or a training that cannot go on. The message names the value, the reason and the remedy."""


class Terminated(SystemExit):
    """Training ended by SIGTERM, after its checkpoint was saved. Not an error: a script that does not catch it exits with 143, as a shell expects."""

    def __init__(self, message: str):
        super().__init__(143)
        self.message = message

    def __str__(self) -> str:
        return self.message
