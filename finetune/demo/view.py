"""The conversation as HTML. What a visitor, a file or a model said is escaped: it is shown as text, never as markup.

Gradio's own chat component is not used: it shows text as HTML or Markdown, so that `<ref>` vanishes, and an address in
a reply would be loaded by the browser.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from finetune.demo.asked_model import AskedModel
from finetune.demo.talk import Reply, Turn
from finetune.report.page import show
from qwenvl.text.grounding import strip_markup

_SHARED = """\
{% macro picture(path, alt, caption) -%}
{% set place = address(path) %}
<figure><a href="{{ place }}" target="_blank" rel="noopener"><img src="{{ place }}" alt="{{ alt }}"></a>
<figcaption>{{ caption }}</figcaption></figure>
{%- endmacro %}
"""

_TURN = (
    _SHARED
    + """\
<article class="said by-visitor"><p class="who">You</p>
{% if turn.pictures %}<div class="pictures">
{% for one in turn.pictures %}{{ picture(one.shown, one.name, one.name) }}{% endfor %}</div>{% endif %}
<p class="text" dir="auto">{{ turn.text }}</p>
{% if reply.prompt != turn.text %}<details><summary>As the model was asked</summary>
<p class="text" dir="auto">{{ reply.prompt }}</p></details>{% endif %}
</article>
"""
)

_REPLY = (
    _SHARED
    + """\
<article class="said by-model"><p class="who">{{ title }}</p>
{% if reply.text.strip() %}<p class="text reply" dir="auto">{{ reply.text.strip() }}</p>{% endif %}
{% if reply.state == "waiting" %}<p class="note">Waiting for the model ...</p>
{% elif reply.state == "stopped" %}<p class="note">Stopped.</p>
{% elif reply.state == "cut" %}<p class="note">Cut at the most new tokens; the settings can allow more.</p>
{% elif reply.state == "ended" and not reply.text.strip() %}<p class="note">No reply: the message is forgotten.</p>
{% endif %}
{% if reply.problem %}<p class="problem">{{ reply.problem }}</p>{% endif %}
{% for note in (reply.note, reply.length_note) if note %}<p class="note">{{ note }}</p>{% endfor %}
{% if reply.drawn %}<div class="pictures drawn">
{{ picture(reply.drawn, "The picture with the boxes of the reply", "The boxes of the reply") }}</div>{% endif %}
{% if reply.boxes %}<details><summary>Boxes in pixels</summary><ul>
{% for line in reply.boxes %}<li>{{ line }}</li>{% endfor %}</ul></details>{% endif %}
{% if turn.example and not reply.is_running %}<dl class="recorded">
{% set answers = turn.example.answers | unique | join("; ") %}
{% if answers %}<dt>Right answer</dt><dd dir="auto">{{ answers }}</dd>{% endif %}
{% for when, text in turn.example.recorded if number == 0 %}<dt>Recorded {{ when }}</dt>
<dd dir="auto">{{ (text.strip() or "(no reply)") }}</dd>{% endfor %}
</dl>{% endif %}
</article>
"""
)


def address(path: Path) -> str:
    """Where the browser loads a file of the page's folder."""
    return f"gradio_api/file={path.as_posix()}"


def _shown(value: object) -> object:
    """A text as HTML, with control characters and overrides of the writing direction made visible."""
    return Markup(show(value)) if isinstance(value, str) and not isinstance(value, Markup) else value


_environment = Environment(autoescape=True, finalize=_shown, undefined=StrictUndefined, trim_blocks=True)
_environment.globals["address"] = address
_TITLE = _environment.from_string(
    '<h2 class="hidden-text" data-title="{{ title }}">Conversation with {{ title }}</h2>'
)
_turn, _reply = _environment.from_string(_TURN), _environment.from_string(_REPLY)


def past(turns: Sequence[Turn], number: int, title: str) -> str:
    """All of a conversation but the last reply.

    Args:
        number: of the model.
        title: its name.
    """
    parts = [_TITLE.render(title=title)]
    for turn in turns:
        parts.append(_turn.render(turn=turn, reply=turn.replies[number]))
        if turn is not turns[-1]:
            parts.append(_reply.render(turn=turn, number=number, reply=turn.replies[number], title=title))
    if not turns:
        parts.append('<p class="note">Nothing was asked yet.</p>')
    return "".join(parts)


def last_reply(turns: Sequence[Turn], number: int, title: str) -> str:
    """The last reply of a conversation, which may still be written; empty where there is none."""
    if not turns:
        return ""
    return _reply.render(turn=turns[-1], number=number, reply=turns[-1].replies[number], title=title)


def spoken(turn: Turn, titles: Sequence[str]) -> str:
    """The replies to a message in one text, for a screen reader."""
    return " ".join(f"{title}: {_plain(reply)}" for title, reply in zip(titles, turn.replies, strict=True))


def _plain(reply: Reply) -> str:
    return strip_markup(reply.text).strip() or reply.problem or "no reply"


_HEADING = _environment.from_string("""\
<h1>{{ title }}</h1>
{% for model in models %}
{% if models | length > 1 %}<p><strong>{{ model.title }}</strong></p>{% endif %}
<ul>{% for line in model.about %}<li>{{ line }}</li>{% endfor %}</ul>
{% endfor %}
""")


def heading(title: str, models: Sequence[AskedModel]) -> str:
    """The title of the page, and what its models are."""
    return _HEADING.render(title=title, models=models)


def notice(problems: Sequence[str]) -> str:
    """What was wrong, a line each; empty where nothing was."""
    lines = "".join(f'<p class="problem">{show(_sentence(problem))}</p>' for problem in problems)
    return f'<div role="alert">{lines}</div>' if lines else ""


def for_screen_readers(text: str) -> str:
    """A text that is read out when it changes, and not shown."""
    return f'<div role="status" aria-live="polite">{show(text)}</div>'


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


@dataclass(frozen=True)
class Choice:
    """A picture with a text, to be tapped.

    Attributes:
        picture: a small one, in the folder of the page's files.
        text: below it.
        chosen: whether it is; None where nothing stays chosen.
    """

    picture: Path
    text: str
    chosen: bool | None = None


_CHOICES = _environment.from_string("""\
{% if choices %}<p class="choices-label">{{ label }}</p>
<div class="choices" role="group" aria-label="{{ label }}">
{% for one in choices %}<button type="button" data-number="{{ loop.index0 }}"
{% if one.chosen is not none %} aria-pressed="{{ 'true' if one.chosen else 'false' }}"{% endif %}>
<img src="{{ address(one.picture) }}" alt=""><span dir="auto">{{ one.text }}</span></button>
{% endfor %}</div>{% endif %}
""")


def choices(label: str, offered: Sequence[Choice]) -> str:
    """Pictures to tap; empty where there are none."""
    return _CHOICES.render(label=label, choices=offered).strip()


CHOICES_JS = """\
let last = null;
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-number]');
  if (!button) return;
  last = button.dataset.number;
  trigger('select', {number: Number(last)});
});
watch('value', () => {
  // The keyboard stays where it was.
  const button = last === null ? null : element.querySelector(`button[data-number="${last}"]`);
  if (button && (document.activeElement === document.body || document.activeElement === null)) button.focus();
});
"""
"""Of the component that shows `choices`: a tap is its event `select`, with the number."""
