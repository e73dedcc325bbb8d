"""Requests are written as a model was trained: with the ids of `qwenvl.text.chat`, or an error with its place."""

import socket
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from encoded_images import encode
from files_of_pages import pdf
from PIL import Image
from recipes_for_tests import IMAGES, TINY
from requests_for_tests import data_uri, image_part, text_part, user

from finetune.batches.image_request import image_key, read_pixels
from finetune.serve.request_error import RequestError
from finetune.serve.served_name import ServedName
from qwenvl import ImageAccess, QwenVLTokenizer, load_processor
from qwenvl.checkpoint.record import ModelRecord
from qwenvl.text.chat import render_chat, render_prompt
from qwenvl.views import PagePart, Views

TEMPLATE = "{question} Answer in one word."


@pytest.fixture(scope="module")
def tokenizer():
    return QwenVLTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def chat(tokenizer):
    return ServedName(
        name="tiny",
        adapter=None,
        record=ModelRecord(chat_format="chatml"),
        style="chat",
        template=None,
        system=None,
        stop_ids=(1,),
        tokenizer=tokenizer,
        n_queries=4,
        takes_images=True,
        folder="tiny",
    )


def image(text=None):
    return [{"type": "image"}, *([{"type": "text", "text": text}] if text is not None else [])]


def test_a_conversation_is_the_one_of_training(chat, tokenizer):
    """Images at their places, several turns, and markup as tokens."""
    where = "Where is <ref>the dog</ref>?"
    box = "<ref>the dog</ref><box>(1,2),(3,4)</box>"
    prompt = chat.render(
        [
            {"role": "developer", "content": "Be brief."},
            user(text_part("What is"), image_part(IMAGES[0]), text_part("this?"), image_part(IMAGES[1])),
            {"role": "assistant", "content": [text_part("A dog.")], "refusal": None, "tool_calls": []},
            user(where),
            {"role": "assistant", "content": box},
            user(image_part(IMAGES[0]), text_part("Again?")),
        ]
    )
    content = [{"type": "text", "text": "What is"}, *image("this?"), *image()]
    expected = render_chat(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": content},
            {"role": "assistant", "content": "A dog."},
            {"role": "user", "content": where, "grounding": True},
            {"role": "assistant", "content": box, "grounding": True},
            {"role": "user", "content": image("Again?")},
        ],
        tokenizer,
        add_generation_prompt=True,
        n_queries=4,
    )
    assert prompt.ids == expected.ids and tokenizer.control_tokens["<box>"] in prompt.ids
    assert [request.source for request in prompt.images] == [IMAGES[n].read_bytes() for n in (0, 1, 0)]
    keys = [image_key(request.source, request.access) for request in prompt.images]
    assert keys[0] == keys[2] != keys[1]
    assert prompt.images[1].name == "messages[1].content[3]"
    text = replace(chat, record=ModelRecord(labels="assistant")).render([user(where)])
    assert text.ids == render_chat([user(where)], tokenizer, add_generation_prompt=True).ids != prompt.ids


def test_the_system_message_is_the_trained_one_unless_the_request_has_its_own(chat, tokenizer):
    trained = replace(chat, system="Read the receipt.")
    for messages, system in (
        ([], "Read the receipt."),
        ([{"role": "system", "content": "Be brief."}], "Be brief."),
    ):
        expected = render_chat(
            [{"role": "system", "content": system}, user("Total?")], tokenizer, add_generation_prompt=True
        )
        assert trained.render([*messages, user("Total?")]).ids == expected.ids
    assert (
        chat.render([user("Total?")]).ids == render_chat([user("Total?")], tokenizer, add_generation_prompt=True).ids
    )


def test_every_message_of_the_user_is_put_into_the_prompt_behind_its_images(chat, tokenizer):
    trained = replace(chat, template=TEMPLATE)
    prompt = trained.render(
        [
            user(text_part("Total?"), image_part(IMAGES[0])),
            {"role": "assistant", "content": "12"},
            user("Date?"),
        ]
    )
    expected = render_chat(
        [
            {"role": "user", "content": image("Total? Answer in one word.")},
            {"role": "assistant", "content": "12"},
            {"role": "user", "content": "Date? Answer in one word."},
        ],
        tokenizer,
        add_generation_prompt=True,
        n_queries=4,
    )
    assert prompt.ids == expected.ids
    with pytest.raises(RequestError, match=r"messages\[0\].content: the message has 2 text parts, and the prompt '"):
        trained.render([user(text_part("Total"), text_part("and date?"))])


def test_an_image_is_the_pictures_of_training(chat, tokenizer):
    views = Views(page=True, grid=(1, 2), overlap=0.0)
    trained = replace(chat, record=ModelRecord(views=views))
    prompt = trained.render([user(image_part(IMAGES[0]), text_part("Total?"))], boxes=True)
    expected = render_chat(
        [{"role": "user", "content": image("Total?")}], tokenizer, add_generation_prompt=True, views=views, n_queries=4
    )
    assert prompt.ids == expected.ids and len(prompt.images) == 3
    data = IMAGES[0].read_bytes()
    assert prompt.images[0].source == data
    assert [request.source for request in prompt.images[1:]] == [PagePart(data, views, 1), PagePart(data, views, 2)]
    assert len({image_key(request.source, request.access) for request in prompt.images}) == 3
    processor = load_processor(TINY).image_processor
    for request, source in zip(prompt.images, views.pictures(IMAGES[0]), strict=True):
        pixels = processor(source, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        assert read_pixels(request, processor).equal(pixels)
    assert prompt.sizes == (Image.open(IMAGES[0]).size,)


def test_a_base_model_continues_one_message_with_its_images_first(chat, tokenizer):
    base = replace(chat, style="base", template="{question} Answer:")
    prompt = base.render([user(text_part("Total?"), image_part(IMAGES[0]))])
    assert prompt.ids == render_prompt(image("Total? Answer:"), tokenizer, n_queries=4).ids
    plain = replace(base, template=None)
    where = "<ref>the dog</ref><box>"
    prompt = plain.render([user(image_part(Image.new("RGB", (200, 100))), text_part(where))], boxes=True)
    expected = render_prompt(image(where), tokenizer, grounding=True, n_queries=4).ids
    assert prompt.ids == expected and expected[-1] == tokenizer.control_tokens["<box>"]
    (found,) = prompt.boxes("(100,200),(300,400)</box>")
    assert (found.label, found.box) == ("the dog", (20.0, 20.0, 60.0, 40.0))
    for messages in (
        [{"role": "system", "content": "Be brief."}, user("Total?")],
        [user("Total?"), {"role": "assistant", "content": "12"}, user("Date?")],
        (user("Total?"), user("Date?")),
    ):
        with pytest.raises(RequestError, match=r"messages: tiny is a base model, .* has no turns: send one message"):
            base.render(messages)
    with pytest.raises(RequestError, match=r"content: the message has 0 text parts, and a base model continues one"):
        plain.render([user(image_part(IMAGES[0]))])
    for empty in ("", [text_part("")]):
        with pytest.raises(RequestError, match=r"messages\[0\].content: is empty: tiny is a base model"):
            plain.render([{"role": "user", "content": empty}])


def test_boxes_are_pixels_of_the_upright_image(chat):
    turned = Image.new("RGB", (300, 200))
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn to the right
    prompt = chat.render(
        [
            user(
                image_part(IMAGES[0]), image_part(encode(turned, "JPEG", exif=exif), "image/jpeg"), text_part("Where?")
            )
        ],
        boxes=True,
    )
    reply = (
        "<ref>a dog</ref><box>(100,200),(500,999)</box><box>(0,0),(0,0)</box> and "
        "<quad>(0,10),(500,0),(510,100),(10,110)</quad> not <box>(1,2)</box> but "
        "<ref>it</ref><box>(900,900),(800,1000)"
    )
    found = [(one.label, one.box, one.quad, one.image) for one in prompt.boxes(reply)]
    quad = ((0.0, 3.0), (100.0, 0.0), (102.0, 30.0), (2.0, 33.0))
    assert found == [
        ("a dog", (20.0, 60.0, 100.0, 299.7), None, 1),
        ("a dog", (0.0, 0.0, 0.0, 0.0), None, 1),
        (None, (0.0, 0.0, 102.0, 33.0), quad, 1),
        ("it", (160.0, 270.0, 180.0, 299.7), None, 1),
    ]
    with pytest.raises(RequestError, match="boxes: there is no image that boxes could be of"):
        chat.render([user("Where?")], boxes=True)
    parts_alone = replace(chat, record=ModelRecord(views=Views(page=False)))
    with pytest.raises(RequestError, match="boxes: tiny is not shown images as a whole"):
        parts_alone.render([user(image_part(IMAGES[0]), text_part("Where?"))], boxes=True)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("Hello", "messages: must be a list"),
        ([], "messages: must be a list"),
        (["Hello"], r"messages\[0\]: must be an object with role and content, not str"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\].role: must be one of system, .* not 'tool'"),
        ([{"role": [], "content": "x"}], r"messages\[0\].role: must be one of system"),
        (
            [user("x"), {"role": "system", "content": "y"}],
            r"\[1\].role: a system message can only be the first",
        ),
        ([{**user("x"), "name": "Ann"}], r"messages\[0\].name: is not supported"),
        ([{"role": "user"}], r"messages\[0\].content: must be a text, or a list of parts"),
        ([{"role": "user", "content": []}], r"messages\[0\].content: must be a text, or a list of parts"),
        ([user("x"), {"role": "assistant", "content": "y"}], r"messages\[1\]: the last message must be the user's"),
        ([user("x", "y")], r"messages\[0\].content\[0\]: must be a part of type text or image_url, not 'x'"),
        ([user({"type": "input_audio"})], r"content\[0\]: must be a part .* not 'input_audio'"),
        ([user({"type": ["text"]})], r"content\[0\]: must be a part of type text or image_url"),
        ([user({"type": "text", "text": 1})], r"content\[0\].text: must be a text"),
        ([user({"type": "text", "text": "x", "image": "/etc/passwd"})], r"content\[0\].image: is not supported"),
        ([user({"type": "image_url", "image_url": "data:..."})], r"content\[0\].image_url: must be an object"),
        ([user({"type": "image_url", "image_url": {"url": "x", "file": "y"}})], r"image_url.file: is not supported"),
        ([user({"type": "image_url", "image_url": {"detail": "most"}})], r"image_url.detail: must be auto"),
        ([user({"type": "image_url", "image_url": {"detail": []}})], r"image_url.detail: must be auto"),
        ([user({"type": "image_url", "image_url": {}})], r"content\[0\]: the url of an image must be a text"),
        (
            [{"role": "assistant", "content": [image_part(IMAGES[0])]}, user("x")],
            r"messages\[0\].content\[0\]: an image can only be in a user's message, and this is the assistant's",
        ),
    ],
)
def test_a_message_that_is_not_understood_is_refused_at_its_place(chat, messages, said):
    with pytest.raises(RequestError, match=said):
        chat.render(messages)


@pytest.mark.parametrize(
    "url",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "photo.png",
        "../x.png",
        "ftp://host/x.png",
        "//host/x",
        "",
        "FILE:x",
        "\\\\h\\x",
    ],
)
def test_nothing_of_this_machine_is_ever_read(chat, url):
    for access in (ImageAccess(), ImageAccess(allow_urls=True)):
        with pytest.raises(RequestError, match=r"messages\[0\].content\[0\]: images are read from data URIs .* never"):
            chat.render([user({"type": "image_url", "image_url": {"url": url}}, text_part("?"))], access=access)


def ask(chat, url, **options):
    return chat.render([user({"type": "image_url", "image_url": {"url": url}}, text_part("?"))], **options)


@pytest.mark.parametrize(
    ("url", "limits", "said"),
    [
        ("data:image/png;base64,!!!!", {}, "base64 is malformed"),
        ("data:text/html;base64,AAAA", {}, "it is no base64 image"),
        ("data:image/png;base64,", {}, "it is empty"),
        (data_uri(b"<svg xmlns='x'></svg>", "image/svg+xml"), {}, "not an image this project reads but SVG"),
        (data_uri(Image.new("RGB", (64, 64))), {"max_bytes": 50}, "longer than the 50 bytes allowed"),
        (data_uri(Image.new("RGB", (64, 64))) + "#0", {}, "page 0 is asked for"),
        ("http://example.com/x.png", {}, "this server fetches no URLs: send the image itself"),
        ("HTTPS://example.com/x.png", {}, "this server fetches no URLs"),
        ("http://169.254.169.254/latest", {"allow_urls": True}, "cannot be fetched: .*is not a public address"),
        ("http://127.0.0.1/x.png#2", {"allow_urls": True}, "cannot be fetched: .*is not a public address"),
        ("http://user:pw@example.com/x.png", {"allow_urls": True}, r"fetched: http://\*\*\*@.*it carries credentials"),
    ],
)
def test_images_that_cannot_be_had_are_refused(chat, url, limits, said):
    with pytest.raises(RequestError, match=rf"messages\[0\].content\[0\]: .*{said}"):
        ask(chat, url, access=ImageAccess(**limits))


def test_a_host_that_is_at_a_private_address_is_not_reached(chat, monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.7", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: found)
    with pytest.raises(RequestError, match=r"pictures.example is at 10.0.0.7, which is not a public address"):
        ask(chat, "http://pictures.example/x.png", access=ImageAccess(allow_urls=True))


class Pictures(BaseHTTPRequestHandler):
    """Another picture each time."""

    given: ClassVar[list[bytes]] = []

    def do_GET(self):
        self.given.append(encode(Image.new("RGB", (3, 2), (len(self.given), 0, 0))))
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.given[-1])))
        self.end_headers()
        self.wfile.write(self.given[-1])

    def log_message(self, *arguments):
        pass


def test_what_a_url_leads_to_is_known_by_its_content(chat):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        access = ImageAccess(allow_urls=True, address_allowed=lambda address: address.is_loopback)
        url = f"http://127.0.0.1:{server.server_port}/x.png"
        first, second = (ask(chat, url, access=access).images[0] for _ in range(2))
    finally:
        server.shutdown()
        server.server_close()
    assert [first.source, second.source] == Pictures.given
    sent = ask(chat, data_uri(Pictures.given[0])).images[0]
    assert image_key(first.source, access) == image_key(sent.source, sent.access)
    assert image_key(first.source, access) != image_key(second.source, access)


def test_an_image_with_more_pixels_than_allowed_is_not_decoded(chat):
    large = data_uri(Image.new("1", (3000, 2000)))
    request = ask(chat, large, access=ImageAccess(max_pixels=1_000_000)).images[0]
    with pytest.raises(ValueError, match="3000 x 2000 pixels, more than 1000000"):
        read_pixels(request, load_processor(TINY).image_processor)
    with pytest.raises(RequestError, match=r"messages\[0\].content\[0\]: .*3000 x 2000 pixels, more than 1000000"):
        ask(chat, large, access=ImageAccess(max_pixels=1_000_000), boxes=True)


def test_a_page_is_named_behind_the_uri(chat):
    document = data_uri(pdf(size=(36, 72)), "application/pdf")
    prompt = ask(chat, document + "#2", boxes=True)
    assert prompt.sizes[0][0] < prompt.sizes[0][1]
    first = ask(chat, document + "#1")
    keys = {image_key(request.source, request.access) for request in (*prompt.images, *first.images)}
    assert len(keys) == 2
    with pytest.raises(RequestError, match=r"it has \d+ pages and one must be named"):
        ask(chat, document, boxes=True)
    with pytest.raises(RequestError, match=r"page 99 is asked for, and it has \d+ pages"):
        ask(chat, document + "#99", boxes=True)


def test_images_are_bounded_in_number_before_any_is_read(chat):
    part = {"type": "image_url", "image_url": {"url": "http://host.example/x.png"}}
    with pytest.raises(RequestError, match=r"messages\[2\]: the request has 3 images, and this server takes 2"):
        chat.render(
            [user(image_part(IMAGES[0]), image_part(IMAGES[1])), {"role": "assistant", "content": "x"}, user(part)],
            most_images=2,
            access=ImageAccess(allow_urls=True),
        )
    with pytest.raises(RequestError, match="this server takes 0"):
        replace(chat, takes_images=False).render([user(image_part(IMAGES[0]))])
