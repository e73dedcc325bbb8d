"""What the routes of the API share."""

from dataclasses import dataclass

from finetune.replies.text_stream import TokenBytes
from finetune.serve.api.metrics import Metrics
from finetune.serve.api.settings import ApiSettings
from finetune.serve.replier import Replier
from finetune.serve.served_names import BetweenSteps, ServedNames


@dataclass
class Api:
    """A model that is served.

    Attributes:
        replier: replies to requests.
        names: what is served, by name.
        settings: what is taken, and from whom.
        metrics: are counted.
        token_bytes: of the model's tokenizer.
        between_steps: runs what changes the model, see `ServedNames.load`; None where nothing can.
        arriving: requests that are being read and written as prompts: they are bounded as those that wait.
    """

    replier: Replier
    names: ServedNames
    settings: ApiSettings
    metrics: Metrics
    token_bytes: TokenBytes
    between_steps: BetweenSteps | None = None
    arriving: int = 0
