"""Small files of several pages: PDFs written by hand, TIFFs and animations, each page a plain colour."""

import io
import struct

from PIL import Image

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
COLOURS = [RED, GREEN, BLUE]


def pdf(colours=COLOURS, size=(72, 36), contents=None, extra="", trailer="") -> bytes:
    """A PDF whose pages are filled with these colours; `contents` replaces what is drawn on each.

    Args:
        size: width and height in points.
        extra: more keys of each page's dictionary.
        trailer: more keys of the trailer.
    """
    width, height = size
    if contents is None:
        contents = [
            f"{r / 255:g} {g / 255:g} {b / 255:g} rg 0 0 {width} {height} re f".encode() for r, g, b in colours
        ]
    kids = " ".join(f"{3 + 2 * number} 0 R" for number in range(len(contents)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(contents)} >>".encode(),
    ]
    for number, content in enumerate(contents):
        box = f"/MediaBox [0 0 {width} {height}]"
        objects.append(f"<< /Type /Page /Parent 2 0 R {box} /Contents {4 + 2 * number} 0 R {extra} >>".encode())
        objects.append(b"<< /Length %d >>\nstream\n" % len(content) + content + b"\nendstream")
    data, places = b"%PDF-1.7\n", []
    for number, one in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n" % number + one + b"\nendobj\n"
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    count = len(objects) + 1
    end = f"trailer << /Size {count} /Root 1 0 R {trailer} >>\nstartxref\n{len(data)}\n%%EOF\n".encode()
    return data + b"xref\n0 %d\n0000000000 65535 f \n" % count + table + end


def encrypted_pdf() -> bytes:
    secret = "00" * 32
    lock = f"/Filter /Standard /V 1 /R 2 /P -4 /O <{secret}> /U <{secret}>"
    return pdf(trailer=f"/Encrypt << {lock} >> /ID [<{'00' * 16}> <{'00' * 16}>]")


def frames(file_format="TIFF", colours=COLOURS, size=(20, 10), **options) -> bytes:
    """A TIFF of several pages or an animation."""
    images = [Image.new("RGB", size, colour) for colour in colours]
    file = io.BytesIO()
    lossless = {"lossless": True} if file_format == "WEBP" else {}
    images[0].save(file, file_format, save_all=True, append_images=images[1:], **lossless, **options)
    return file.getvalue()


def pdf_of_calls(depth: int, calls: int) -> bytes:
    """A PDF whose drawing steps call each other: `calls` times at each of `depth` levels."""
    levels = [b"/F Do " * calls] * (depth - 1) + [b"0 0 9 9 re f "]
    page = b"/MediaBox [0 0 72 72] /Contents 4 0 R /Resources << /XObject << /F 5 0 R >> >>"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R " + page + b" >>",
        b"<< /Length 6 >>\nstream\n/F Do \nendstream",
    ]
    for number, level in enumerate(levels, start=6):
        keys = b"/Type /XObject /Subtype /Form /BBox [0 0 72 72] /Resources << /XObject << /F %d 0 R >> >>" % number
        objects.append(b"<< " + keys + b" /Length %d >>\nstream\n" % len(level) + level + b"\nendstream")
    body = b"".join(b"%d 0 obj\n" % number + one + b"\nendobj\n" for number, one in enumerate(objects, start=1))
    return b"%PDF-1.7\n" + body + b"trailer << /Root 1 0 R /Size %d >>\n" % (len(objects) + 1)


def gif_of_frames(count: int) -> bytes:
    """An animation of that many equal frames of one pixel."""
    data = frames("GIF", [RED], (1, 1))
    start = data.index(b",", 13)
    return data[:-1] + data[start:-1] * (count - 1) + b";"


def webp_of_frames(count: int) -> bytes:
    data = frames("WEBP", [RED, GREEN], (1, 1))
    start = data.index(b"ANMF")
    length = int.from_bytes(data[start + 4 : start + 8], "little")
    body = data[12:start] + data[start : start + 8 + length + length % 2] * count
    return b"RIFF" + (4 + len(body)).to_bytes(4, "little") + b"WEBP" + body


def tiff_of_directories(count: int, tags: list[tuple[int, int, int, int]], loop: bool = False) -> bytes:
    """A TIFF of that many equal directories with these tags (number, kind, values, place); `loop` leads back to the
    first."""
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    data = bytearray(b"II*\0" + struct.pack("<I", 8))
    for number in range(count):
        last = 8 if loop else 0
        after = len(data) + len(directory) + 4
        data += directory + struct.pack("<I", last if number == count - 1 else after)
    return bytes(data)
