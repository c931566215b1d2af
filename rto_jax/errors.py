"""The one exception for a user's mistake; `experiments` prints it as one line and exits with status 2."""


class UserError(Exception):
    """Bad input, said in one sentence that names the file, the line or the flag."""
