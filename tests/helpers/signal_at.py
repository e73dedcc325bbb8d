"""`finetune` in this process, with a signal to itself at the nth call of a function:
`signal_at.py RANK KIND CALL ARGUMENT...`, where KIND is batch, loss, token or image."""

import os
import signal
import sys

from finetune.cli import main
from finetune.replies.growing_replies import GrowingReplies
from finetune.training.step_in_packs import StepInPacks
from finetune.training.trainer import QwenVLTrainer
from finetune.vision_cache.encoding import _Encoding

OWNERS = {
    "batch": (StepInPacks, "run"),
    "loss": (QwenVLTrainer, "_loss_of_pack"),
    "token": (GrowingReplies, "next"),
    "image": (_Encoding, "_features"),
}


def signal_at(kind: str, call: int) -> None:
    """Send this process SIGTERM at the nth call in training; of images, which come before it, at any."""
    calls = dict.fromkeys(OWNERS, 0)

    def watch(name: str) -> None:
        owner, method = OWNERS[name]
        original = getattr(owner, method)

        def watched(self, *args, **kwargs):
            if name in ("batch", "image") or calls["batch"]:
                calls[name] += 1
                if name == kind and calls[name] == call:
                    os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *args, **kwargs)

        setattr(owner, method, watched)

    for name in OWNERS:
        watch(name)


if __name__ == "__main__":
    rank, kind, call, *arguments = sys.argv[1:]
    if os.environ.get("RANK", "0") in rank.split(","):
        signal_at(kind, int(call))
    sys.exit(main(arguments))
