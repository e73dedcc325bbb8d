"""How the page looks, in Gradio's own colours, and what its components lack for a keyboard and a screen reader."""

CSS = """
.gradio-container { max-width: 1500px !important; }
.title h1 { margin: 0; overflow-wrap: anywhere; }
.title p, .title li { overflow-wrap: anywhere; }
.title ul { margin: .3em 0 0; padding-left: 1.2em; }
.talk { border: 1px solid var(--border-color-primary); border-radius: var(--block-radius); padding: 12px;
  background: var(--background-fill-primary); height: 62vh; min-height: 320px; overflow-y: auto; gap: 0 !important;
  flex-wrap: nowrap !important; }
.talk .said { border-radius: 8px; padding: 8px 12px; margin: 0 0 10px; color: var(--body-text-color);
  border: 1px solid var(--border-color-primary); overflow-wrap: anywhere; }
.talk .by-visitor { background: var(--background-fill-secondary); margin-left: 8%; }
.talk .by-model { margin-right: 8%; }
.talk .who { font-weight: 600; font-size: .85em; margin: 0 0 2px; color: var(--body-text-color); }
.talk .text { white-space: pre-wrap; margin: 0; line-height: 1.5; }
.talk .note, .talk figcaption, .talk summary { color: var(--body-text-color); opacity: .85; font-size: .88em;
  margin: 4px 0 0; }
.talk .problem, .notice .problem { color: var(--error-text-color, #b42318); margin: 4px 0; }
.talk details { margin-top: 6px; }
.talk summary { cursor: pointer; }
.talk ul { margin: 4px 0; padding-left: 1.2em; }
.talk .pictures { display: flex; flex-wrap: wrap; gap: 8px; margin: 6px 0; }
.talk figure { margin: 0; max-width: 100%; }
.talk .pictures img { margin: 0 !important; max-height: 220px; max-width: 100%; border-radius: 4px; background: #fff;
  border: 1px solid var(--border-color-primary); display: block; }
.talk .drawn img { max-height: 420px; }
.talk .recorded { margin: 8px 0 0; border-top: 1px solid var(--border-color-primary); padding-top: 6px; }
.talk .recorded dt { font-size: .85em; font-weight: 600; }
.talk .recorded dd { margin: 0 0 4px; white-space: pre-wrap; }
.hidden-text { position: absolute !important; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
[data-testid="max-value"], [data-testid="min-value"] { color: var(--body-text-color) !important; }
.notice:empty { display: none; }
.choices-label { margin: 0 0 6px; font-size: .9em; color: var(--body-text-color); }
.choices { display: grid; grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)); gap: 8px; max-height: 300px;
  overflow-y: auto; padding: 3px; }
.choices button { display: flex; flex-direction: column; gap: 4px; padding: 5px; text-align: left; cursor: pointer;
  border: 2px solid var(--border-color-primary); border-radius: 6px; color: var(--body-text-color);
  background: var(--background-fill-secondary); font: inherit; font-size: .82em; line-height: 1.3; }
.choices button:hover { border-color: var(--body-text-color); }
.choices button:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 0; }
.choices button[aria-pressed="true"] { border-color: var(--color-accent); }
.choices button[aria-pressed="true"] span::before { content: "\\2713\\00a0"; font-weight: 700; }
.choices img { width: 100%; height: 90px; object-fit: contain; background: #fff; border-radius: 3px; }
.choices span { overflow-wrap: anywhere; display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical;
  overflow: hidden; }
@media (max-width: 640px) {
  .talk { height: 55vh; }
  .talk .by-visitor { margin-left: 0; }
  .talk .by-model { margin-right: 0; }
}
"""

JS = """
() => {
  // A conversation stays at its end while it grows, unless its reader has scrolled up; the keyboard can scroll it.
  for (const talk of document.querySelectorAll('.talk')) {
    talk.tabIndex = 0;
    talk.setAttribute('role', 'region');
    const title = talk.querySelector('[data-title]');
    talk.setAttribute('aria-label', title ? 'Conversation with ' + title.dataset.title : 'Conversation');
    let atEnd = true;
    talk.addEventListener('scroll', () => {
      atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
    });
    const follow = () => { if (atEnd) talk.scrollTop = talk.scrollHeight; };
    new MutationObserver(follow).observe(talk, {childList: true, subtree: true, characterData: true});
    talk.addEventListener('load', follow, true);  // of pictures
  }
}
"""
"""Run once when the page is there."""
