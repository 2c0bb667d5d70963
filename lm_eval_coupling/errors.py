"""The one exception that is shown to users as a sentence."""


class CouplingError(ValueError):
    """A request that cannot be served as asked; the message says what was got, what was expected and what to do."""
