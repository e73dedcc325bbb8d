"""Events come from threads to a loop: all of them, in order, and the loop is woken once for many."""

import asyncio
import threading

from finetune.replies.running_batch import NewToken
from finetune.serve.api.mailbox import Mailbox
from finetune.serve.asked import ChoiceToken


def event(number):
    return ChoiceToken(0, NewToken(0, number, ""))


def test_many_events_wake_the_loop_once():
    async def take():
        loop = asyncio.get_running_loop()
        woken = []
        wake, loop.call_soon_threadsafe = loop.call_soon_threadsafe, lambda *a: (woken.append(a), wake(*a))
        one, other = Mailbox(), Mailbox()
        for number in range(100):
            (one if number % 2 else other).put(event(number))
        assert len(woken) == 1
        assert [(await other.get()).token.id for _ in range(50)] == list(range(0, 100, 2))
        assert [(await one.get()).token.id for _ in range(50)] == list(range(1, 100, 2))
        one.put(event(100))
        assert (await one.get()).token.id == 100

    asyncio.run(asyncio.wait_for(take(), 20))


def test_nothing_is_left_lying_while_threads_post():
    async def take():
        mailboxes = [Mailbox() for _ in range(4)]

        def post(mailbox):
            for number in range(1000):
                mailbox.put(event(number))

        threads = [threading.Thread(target=post, args=[mailbox]) for mailbox in mailboxes]
        for thread in threads:
            thread.start()
        for number in range(1000):
            for mailbox in mailboxes:
                assert (await mailbox.get()).token.id == number
        for thread in threads:
            thread.join()

    for _ in range(3):  # in loops of their own
        asyncio.run(asyncio.wait_for(take(), 20))
