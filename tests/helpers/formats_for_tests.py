"""Rows read by a format, and what is expected of them, in short."""

from finetune.data.formats.row_format import RowFormat


def conversations(name, row, size=(640, 480), **settings):
    return RowFormat(name, **settings).conversations(row, lambda source: size)


def one(name, row, **settings):
    (conversation,) = conversations(name, row, **settings)
    return conversation


def asked(image, question, answer, **flag):
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content, **flag}, {"role": "assistant", "content": answer, **flag}]


USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
