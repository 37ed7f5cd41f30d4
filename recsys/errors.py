"""The root of all errors that the user can put right."""


class UserError(ValueError):
    """Something that the user can put right; the message names the thing and the way out, and is all that is shown."""
