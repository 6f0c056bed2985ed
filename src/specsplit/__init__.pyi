"""The types of the Python interface."""

from specsplit.api.generated import GeneratedStream as GeneratedStream
from specsplit.api.generated import GeneratedText as GeneratedText
from specsplit.api.named_models import Model as Model
from specsplit.api.pair import Pair as Pair
from specsplit.api.pair import connect as connect
from specsplit.api.pair import load as load
from specsplit.errors import ModelError as ModelError
from specsplit.errors import OptionError as OptionError
from specsplit.errors import PromptError as PromptError
from specsplit.errors import UserError as UserError
from specsplit.errors import WorkerError as WorkerError

__version__: str
__all__: list[str]
