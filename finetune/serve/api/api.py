"""What the routes of the API share."""

import asyncio
from dataclasses import dataclass, field

from finetune.replies.text_stream import TokenBytes
from finetune.serve.api.metrics import Metrics
from finetune.serve.api.settings import ApiSettings
from finetune.serve.replier import Replier
from finetune.serve.served_names import BetweenSteps, ServedNames

MOST_ARRIVING = 64


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
        arriving: how many more requests may be read and written as prompts now; others wait, unread.
    """

    replier: Replier
    names: ServedNames
    settings: ApiSettings
    metrics: Metrics
    token_bytes: TokenBytes
    between_steps: BetweenSteps | None = None
    arriving: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_ARRIVING))
