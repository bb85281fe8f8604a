"""The errors that the library raises on purpose. Each message names the value, what was expected, and what to do."""


class LanceError(Exception):
    """Base of every error that the library raises on purpose."""


class TaxonomyError(LanceError):
    """A taxonomy file or a key in it is invalid."""


class DataError(LanceError):
    """Rows or files of prompts are invalid."""


class ModelError(LanceError):
    """A model folder or weight file is missing, damaged or does not fit."""


class ChatError(LanceError):
    """A chat model could not be loaded or reached, or replied with something unusable."""
