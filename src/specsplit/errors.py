"""Errors that a user can mend."""


class UserError(Exception):
    """A mistake or a missing thing outside the program: the message names it and how to mend it.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """
