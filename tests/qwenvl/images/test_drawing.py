"""What is drawn, pixel by pixel: lines that show on any ground, labels inside the image, files that are whole."""

import io
import warnings

import pytest
from PIL import Image, ImageFont

from qwenvl.errors import InputError, MissingFileError
from qwenvl.images import drawing, label_fonts
from qwenvl.images.drawing import PALETTE, draw_regions, save_grounding
from qwenvl.text.grounding import parse_grounding


@pytest.fixture
def empty_system(monkeypatch):
    """A system without fonts, the same on every machine; no memory of warnings given before."""
    monkeypatch.setattr(label_fonts, "font_folders", tuple)
    label_fonts._warn_of_missing_glyphs.cache_clear()


@pytest.fixture
def plain_font():
    """The bytes of Pillow's own font: Latin letters, no Chinese ones."""
    return ImageFont.load_default(20).font_bytes


def regions(text):
    return parse_grounding(text).regions


def contrast(colour, other):
    bright, dark = sorted((drawing._luminance(colour), drawing._luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def changed(before, after):
    """Positions of all pixels that differ."""
    width, height = before.size
    old, new = before.load(), after.load()
    return {(x, y) for x in range(width) for y in range(height) if old[x, y] != new[x, y]}


def plates_of(monkeypatch, image, text, **kwargs):
    """The label plates draw_regions places, in order."""
    plates = []
    place = drawing._place

    def watch(candidates, taken):
        plates.append(place(candidates, taken))
        return plates[-1]

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "_place", watch)
        draw_regions(image, regions(text), **kwargs)
    return plates


@pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255), (128, 128, 128), *PALETTE])
@pytest.mark.parametrize(
    "shape", ["<box>(200,300),(800,700)</box>", "<quad>(200,300),(800,350),(750,700),(180,650)</quad>"]
)
def test_a_line_shows_on_any_ground(ground, shape):
    image = Image.new("RGB", (200, 100), ground)
    for index in range(3 * len(PALETTE)):
        colour = drawing._colour(index)
        canvas = image.copy()
        drawing._draw_outline(drawing.ImageDraw.Draw(canvas), regions(shape)[0], canvas.size, colour, 1)
        row = [canvas.getpixel((x, 50)) for x in range(100)]  # crosses the left side only
        assert max(contrast(pixel, ground) for pixel in row) > 2
        assert colour in row


def test_the_line_of_a_box_is_on_its_outermost_pixels():
    image = Image.new("RGB", (1000, 500), "white")
    drawn = draw_regions(image, regions("<box>(100,200),(300,600)</box>"), line_width=2)  # pixels 100..299, 100..299
    orange, black, white = PALETTE[0], (0, 0, 0), (255, 255, 255)
    expected = [white, black, orange, orange, black, white]
    assert [drawn.getpixel((x, 200)) for x in range(98, 104)] == expected
    assert [drawn.getpixel((x, 200)) for x in range(301, 295, -1)] == expected
    assert [drawn.getpixel((200, y)) for y in range(98, 104)] == expected
    assert [drawn.getpixel((200, y)) for y in range(301, 295, -1)] == expected


def test_line_and_letters_grow_with_the_image(monkeypatch, empty_system):
    heights, widths = [], []
    for side in (400, 1600):
        image = Image.new("RGB", (side, side))
        (plate,) = plates_of(monkeypatch, image, "<ref>dog</ref><box>(300,300),(700,700)</box>")
        heights.append(plate.bottom - plate.top)
        drawn = draw_regions(image, regions("<box>(300,300),(700,700)</box>"))
        widths.append(sum(drawn.getpixel((x, side // 2)) == PALETTE[0] for x in range(side // 2)))
    assert widths == [2, 6]
    assert 3 < heights[1] / heights[0] < 5


def test_the_callers_image_is_untouched_and_the_copy_is_rgb():
    image = Image.effect_noise((120, 90), 60)
    before = image.tobytes()
    drawn = draw_regions(image, regions("<ref>dog</ref><box>(100,100),(900,900)</box>"))
    assert (image.mode, image.tobytes()) == ("L", before)
    assert (drawn.mode, drawn.size) == ("RGB", image.size)
    assert changed(image.convert("RGB"), drawn)
    assert not changed(image.convert("RGB"), draw_regions(image, []))


@pytest.mark.parametrize("box", ["(0,0),(999,999)", "(900,0),(999,50)", "(0,950),(40,999)", "(960,960),(999,999)"])
@pytest.mark.parametrize("size", [(32, 32), (640, 480), (50, 400), (400, 20)])
@pytest.mark.parametrize("label", ["ox", "a phrase that is far too long for an image of this size " * 4])
def test_a_label_is_inside_the_image(monkeypatch, empty_system, box, size, label):
    image = Image.new("RGB", size, "grey")
    (plate,) = plates_of(monkeypatch, image, f"<ref>{label}</ref><box>{box}</box>")
    assert 0 <= plate.left < plate.right <= size[0]
    assert 0 <= plate.top < plate.bottom <= size[1]


@pytest.mark.parametrize("width", range(40, 60))
def test_a_label_too_wide_for_the_image_ends_in_dots(empty_system, width):
    font, _ = label_fonts.font_for("a long label", 10, None)
    shown = drawing._shorten("a long label", font, width)
    left, right = drawing._extent(shown, font)
    assert right - left <= width
    assert shown == "a long label" or (shown.endswith("...") and "a long label".startswith(shown[:-3]))
    assert drawing._shorten("a long label", font, 3) == ""


def test_a_label_is_a_plate_of_the_lines_colour_with_letters_that_contrast(monkeypatch, empty_system):
    image = Image.new("RGB", (1200, 900), "white")
    text = "".join(f"<ref>dog {i}</ref><box>(300,{90 * i + 100}),(600,{90 * i + 180})</box>" for i in range(8))
    plates = plates_of(monkeypatch, image, text)
    drawn = draw_regions(image, regions(text))
    for index, plate in enumerate(plates):
        colours = {colour: count for count, colour in drawn.crop(plate).getcolors(maxcolors=100_000)}
        plate_colour, letter_colour = drawing._colour(index), drawing._rim(drawing._colour(index))
        assert colours[plate_colour] > 100
        assert colours[letter_colour] > 2 * (plate.right - plate.left) + 2 * (plate.bottom - plate.top) - 4  # the rim
        assert contrast(plate_colour, letter_colour) > 4.5


def test_labels_on_one_spot_move_apart(monkeypatch, empty_system):
    text = "".join(f"<ref>cat {i}</ref><box>(400,400),(600,600)</box>" for i in range(10))
    plates = plates_of(monkeypatch, Image.new("RGB", (640, 480)), text)
    assert len(plates) == 10
    assert not any(a.overlap(b) for a in plates for b in plates if a is not b)


def test_labels_without_room_overlap_rather_than_vanish(monkeypatch, empty_system):
    text = "".join(f"<ref>cat {i}</ref><box>(0,0),(999,999)</box>" for i in range(12))
    assert len(plates_of(monkeypatch, Image.new("RGB", (60, 40)), text)) == 12


def test_one_colour_a_label():
    text = "".join(
        f"<ref>{label}</ref><box>({x},100),({x + 60},900)</box>"
        for label, x in zip("abca", (0, 200, 400, 600), strict=True)
    )
    drawn = draw_regions(Image.new("RGB", (1000, 400), "white"), regions(text), line_width=1)
    colours = [drawn.getpixel((x, 200)) for x in (0, 200, 400, 600)]
    assert colours == [PALETTE[0], PALETTE[1], PALETTE[2], PALETTE[0]]
    assert len({drawing._colour(index) for index in range(3 * len(PALETTE))}) == 3 * len(PALETTE)


def test_regions_without_area_and_broken_quads_still_show():
    image = Image.new("RGB", (32, 32), "white")
    for text in (
        "<box>(500,500),(500,500)</box>",
        "<box>(0,0),(0,999)</box>",
        "<box>(999,999),(999,999)</box>",
        "<quad>(500,500),(500,500),(500,500),(500,500)</quad>",
        "<quad>(100,100),(900,900),(900,100),(100,900)</quad>",
    ):
        assert changed(image, draw_regions(image, regions(text))), text


def test_a_rotated_photo_is_drawn_upright():
    upright = Image.new("RGB", (80, 40), "white")
    stored, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to see me"
    stored_file = io.BytesIO()
    stored.save(stored_file, "PNG", exif=exif)
    with Image.open(stored_file) as image:
        drawn = draw_regions(image, regions("<box>(500,0),(999,999)</box>"))
    assert drawn.size == (80, 40)
    assert min(x for x, _ in changed(upright, drawn)) == 39  # the rim, one pixel left of the middle


@pytest.mark.parametrize(
    ("mode", "value", "seen"),
    [("RGBA", (9, 9, 9, 0), (255, 255, 255)), ("RGBA", (9, 9, 9, 255), (9, 9, 9)), ("LA", (7, 0), (255, 255, 255))]
    + [("CMYK", (0, 0, 0, 0), (255, 255, 255)), ("1", 1, (255, 255, 255)), ("P", 0, (0, 0, 0))],
)
def test_every_mode_is_shown_as_it_looks(mode, value, seen):
    assert draw_regions(Image.new(mode, (9, 9), value), []).getpixel((4, 4)) == seen


def test_sizes_below_one_pixel_are_refused():
    with pytest.raises(InputError, match="line_width"):
        draw_regions(Image.new("RGB", (9, 9)), [], line_width=0)
    with pytest.raises(InputError, match="font_size"):
        draw_regions(Image.new("RGB", (9, 9)), [], font_size=-3)


# --- fonts -----------------------------------------------------------------------------------------------------------


def test_missing_glyphs_are_told_from_drawn_ones(empty_system):
    assert all(label_fonts.has_glyph(None, character) for character in "dog? .")
    assert not any(label_fonts.has_glyph(None, character) for character in "狗の개")


def test_without_a_font_for_it_a_label_is_question_marks_and_said_once(empty_system):
    image = Image.new("RGB", (300, 200), "white")
    with pytest.warns(UserWarning, match="fonts-noto-cjk") as said:
        drawn = draw_regions(image, regions("<ref>红 dog</ref><box>(200,300),(800,900)</box>"))
        draw_regions(image, regions("<ref>猫</ref><box>(200,300),(800,900)</box><ref>犬</ref><box>(1,1),(2,2)</box>"))
    assert len(said) == 1
    assert said[0].filename == __file__
    question = draw_regions(image, regions("<ref>? dog</ref><box>(200,300),(800,900)</box>"))
    assert drawn.tobytes() == question.tobytes()


def test_the_first_font_with_all_characters_is_taken(monkeypatch, tmp_path, plain_font):
    # Two copies of one font, of which we say that the second alone has Chinese: no such font need be installed.
    (tmp_path / "deep" / "er").mkdir(parents=True)
    latin, chinese = tmp_path / "DejaVuSans.ttf", tmp_path / "deep" / "er" / "wqy-zenhei.ttc"
    for file in (latin, chinese, tmp_path / "AAA.otf"):
        file.write_bytes(plain_font)
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    (tmp_path / "readme.txt").write_bytes(b"")
    folders = (tmp_path, tmp_path / "absent")
    names = [file.name for file in label_fonts.font_files(folders)]
    assert names == ["DejaVuSans.ttf", "wqy-zenhei.ttc", "AAA.otf", "broken.ttf"]
    assert not label_fonts.has_glyph(tmp_path / "broken.ttf", "d")

    monkeypatch.setattr(label_fonts, "has_glyph", lambda file, character: character.isascii() or file == chinese)
    monkeypatch.setattr(label_fonts, "font_folders", lambda: folders)
    assert label_fonts.font_for("dog", 12, None)[0].path == latin
    assert label_fonts.font_for("红dog", 12, None)[0].path == chinese
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_regions(Image.new("RGB", (300, 200)), regions("<ref>红dog</ref><box>(200,300),(800,900)</box>"))


def test_the_font_that_lacks_fewest_characters_is_taken_where_none_has_all(monkeypatch, tmp_path, plain_font):
    for name in ("a.ttf", "b.ttf"):
        (tmp_path / name).write_bytes(plain_font)
    monkeypatch.setattr(label_fonts, "font_folders", lambda: (tmp_path,))
    monkeypatch.setattr(
        label_fonts,
        "has_glyph",
        lambda file, character: character != "猫" and (character.isascii() or file is not None),
    )
    label_fonts._warn_of_missing_glyphs.cache_clear()
    with pytest.warns(UserWarning, match=r"drawn as '\?'"):
        font, shown = label_fonts.font_for("кот 猫", 12, None)
    assert (font.path, shown) == (tmp_path / "a.ttf", "кот ?")


def test_a_font_of_the_callers_choice(monkeypatch, tmp_path, plain_font):
    image, found = Image.new("RGB", (300, 200)), regions("<ref>dog</ref><box>(200,300),(800,900)</box>")
    (tmp_path / "fonts").mkdir()
    own = tmp_path / "fonts" / "own.ttf"
    own.write_bytes(plain_font)
    chosen = draw_regions(image, found, font=str(own))
    monkeypatch.setattr(label_fonts, "font_folders", lambda: (tmp_path / "fonts",))
    assert chosen.tobytes() == draw_regions(image, found).tobytes()
    with pytest.warns(UserWarning, match=r"own\.ttf.*does not have"):
        draw_regions(image, regions("<ref>猫</ref><box>(200,300),(800,900)</box>"), font=own)
    for file in ("absent.ttf", "broken.ttf"):
        (tmp_path / "broken.ttf").write_bytes(b"not a font")
        with pytest.raises(InputError, match="not a font file"):
            draw_regions(image, found, font=tmp_path / file)


def test_a_damaged_font_is_never_chosen(monkeypatch, tmp_path):
    """Not even for a label of which no font has a character."""
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    monkeypatch.setattr(label_fonts, "font_folders", lambda: (tmp_path,))
    label_fonts._warn_of_missing_glyphs.cache_clear()
    with pytest.warns(UserWarning, match="no font found"):
        font, shown = label_fonts.font_for("猫", 12, None)
    assert (font.getname(), shown) == (ImageFont.load_default(12).getname(), "?")


def test_chinese_with_this_systems_fonts():
    label_fonts._warn_of_missing_glyphs.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        font, shown = label_fonts.font_for("红色汽车", 20, None)
    if said:
        assert shown == "????"  # no font here has them, and we were told
    else:
        assert shown == "红色汽车"
        assert len({bytes(font.getmask(character)) for character in shown}) == 4  # four glyphs, not four empty squares


def test_labels_of_odd_text(empty_system):
    image = Image.new("RGB", (200, 100), "white")
    for label in ("a\nb\tc", "\x00", "\u200b", "\ud800", "x" * 100_000, "\u202eabc", "é́́́", "()"):
        label_fonts._warn_of_missing_glyphs.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            draw_regions(image, regions(f"<ref>{label}</ref><box>(200,300),(800,900)</box>"))
    broken = draw_regions(image, regions("<ref>a\n b</ref><box>(200,300),(800,900)</box>"))
    assert broken.tobytes() == draw_regions(image, regions("<ref>a b</ref><box>(200,300),(800,900)</box>")).tobytes()


def test_an_image_too_small_for_letters_is_drawn_without_and_says_so(empty_system):
    with pytest.warns(UserWarning, match="too small for labels") as said:
        draw_regions(Image.new("RGB", (6, 6)), regions("<ref>dog</ref><box>(200,300),(800,900)</box>"))
    assert said[0].filename == __file__


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "image_format"), [("a.png", "PNG"), ("b.JPG", "JPEG"), ("c.webp", "WEBP")])
def test_save_grounding_reads_draws_and_saves(tmp_path, name, image_format):
    image = Image.new("RGBA", (120, 80), (10, 20, 30, 255))
    found = save_grounding(image, "A <ref>dog</ref><box>(100,200),(900,1000)</box> <box>", tmp_path / name)
    assert [region.points for region in found.regions] == [((100, 200), (900, 999))]
    assert [problem.repaired for problem in found.problems] == [True, False]
    with Image.open(tmp_path / name) as saved:
        assert (saved.format, saved.size) == (image_format, (120, 80))
        assert changed(image.convert("RGB"), saved.convert("RGB"))
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_save_grounding_passes_the_drawing_on_and_overwrites(tmp_path):
    image, reply = Image.new("RGB", (120, 80)), "<ref>dog</ref><box>(100,200),(900,900)</box>"
    found = save_grounding(image, reply, str(tmp_path / "a.png"))
    found = save_grounding(image, reply, str(tmp_path / "a.png"), line_width=5, font_size=20)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.tobytes() == draw_regions(image, found.regions, line_width=5, font_size=20).tobytes()


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"the old picture")

    def fail(self, file, **kwargs):
        file.write(b"half a pict")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(InputError, match=r"a\.png' cannot be written \(No space"):
        save_grounding(Image.new("RGB", (9, 9)), "", tmp_path / "a.png")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"the old picture"


def test_a_place_that_cannot_be_saved_to_is_named(tmp_path):
    image = Image.new("RGB", (9, 9))
    for name in ("picture", "picture.txt", "picture.psd"):  # Pillow reads .psd and does not write it
        with pytest.raises(InputError, match=f"'{name}'"):
            save_grounding(image, "", tmp_path / name)
    with pytest.raises(MissingFileError, match="absent"):
        save_grounding(image, "", tmp_path / "absent" / "a.png")
    assert not list(tmp_path.iterdir())
