"""What a client's request can get wrong."""

from qwenvl.errors import InputError


class RequestError(InputError):
    """A request that cannot be answered as it is; the client can mend it.

    Attributes:
        place: of the fault in the request, such as `messages[2].content[0]`.
        reason: what is wrong and what to do, without the place.
    """

    def __init__(self, place: str, reason: str):
        super().__init__(place, reason)
        self.place, self.reason = place, reason

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"
