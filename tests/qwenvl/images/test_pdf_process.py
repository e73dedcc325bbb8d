"""PDFs in a process of their own: what takes too much ends that process only, and the next PDF is read as ever."""

import json
import multiprocessing
import signal
import threading

import pytest
from files_of_pages import BLUE, COLOURS, GREEN, pdf, pdf_of_calls

from qwenvl import ImageAccess, ImageError, load_image
from qwenvl.images import pdf_process
from qwenvl.images.pdf_process import count_pdf_pages, render_pdf_page
from qwenvl.images.unusable_image import UnusableImage


def the_process():
    assert load_image(pdf([GREEN])).getpixel((0, 0)) == GREEN
    return pdf_process._asked.process._process


def test_a_page_that_takes_too_much_memory_is_refused(monkeypatch):
    monkeypatch.setattr(pdf_process, "MEMORY", 200_000_000)
    before = the_process()
    # 2 kB that are parsed into 10 ** 8 drawing steps.
    for _ in range(2):
        with pytest.raises(ImageError, match=r"drawing page 1 takes more than 25 s or 0.2 GB of memory, or crashes"):
            load_image(pdf_of_calls(9, 10))
    assert the_process() is not before and before.poll() is not None
    assert count_pdf_pages(pdf()) == 3


def test_the_pixels_of_a_page_are_no_part_of_that_memory(monkeypatch):
    monkeypatch.setattr(pdf_process, "MEMORY", 200_000_000)
    large = pdf([BLUE], size=(2400, 2400))
    assert load_image(large, access=ImageAccess(dpi=150)).size == (5000, 5000)
    assert the_process() is the_process()


def test_a_page_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(pdf_process, "_MORE_SECONDS", 0.2)
    with pytest.raises(UnusableImage, match=r"takes more than 0.2 s"):
        render_pdf_page(pdf_of_calls(9, 10), 1, max_pixels=10**6, seconds=0)
    monkeypatch.undo()
    the_process()


def test_a_process_that_was_killed_is_replaced():
    before = the_process()
    before.kill()
    before.wait()
    assert the_process() is not before


def test_forked_processes_have_their_own():
    ours = the_process()
    context = multiprocessing.get_context("fork")
    found = context.Queue()

    def draw(page):
        found.put((page, load_image(pdf(), page=page).getpixel((0, 0)), pdf_process._asked.process._process.pid))

    # Forked while another thread draws: neither its lock nor its request is theirs.
    is_over = threading.Event()

    def draw_here():
        while not is_over.is_set():
            assert load_image(pdf(), page=1).getpixel((0, 0)) == COLOURS[0]

    here = threading.Thread(target=draw_here)
    here.start()
    children = [context.Process(target=draw, args=(page,)) for page in (1, 2, 3)]
    for child in children:
        child.start()
    drawn = sorted(found.get(timeout=60) for _ in children)
    for child in children:
        child.join()
    is_over.set()
    here.join()
    assert [colour for _, colour, _ in drawn] == COLOURS
    assert len({ours.pid, *(pid for _, _, pid in drawn)}) == 4
    assert the_process() is ours


def test_threads_share_it():
    drawn = {}

    def draw(page):
        drawn[page] = load_image(pdf(), page=page).getpixel((0, 0))

    threads = [threading.Thread(target=draw, args=(page,)) for page in (1, 2, 3) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [drawn[page] for page in (1, 2, 3)] == COLOURS


def test_one_whose_asker_is_gone_ends_by_itself():
    data = pdf_of_calls(9, 10)
    request = {"page": 1, "dpi": 150, "max_pixels": 10**6, "seconds": 20, "memory": 8 << 30, "ends_in": 0.5}
    alone = pdf_process._PdfProcess()
    alone._requests.write(json.dumps({**request, "bytes": len(data)}).encode() + b"\n" + data)
    alone._requests.flush()
    assert alone._process.wait(timeout=60) == -signal.SIGALRM
    alone.close()
