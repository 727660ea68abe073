"""One HTML page about what a text reads from memory banks: the text coloured by chapter, and pictures, all inside."""

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
#text { font: 16px/2 ui-monospace, monospace; white-space: pre-wrap; border: 1px solid #ccc; padding: .8rem; }
#text span { border-radius: 3px; cursor: default; }
#about { min-height: 4.5em; font-family: ui-monospace, monospace; white-space: pre; }
img { max-width: 100%; }
"""
SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const choice = document.getElementById("layer"), text = document.getElementById("text");
const about = document.getElementById("about");
data.layers.forEach((layer, i) => choice.add(new Option(layer.name, i)));
const colour = (c, share) => `hsl(${(c * 137.5) % 360} 70% ${92 - 37 * share}%)`;
function show() {
  const layer = data.layers[choice.value];
  text.replaceChildren(...data.tokens.map((token, t) => {
    const span = document.createElement("span"), [best] = layer.parts[t];
    span.textContent = token;
    if (best) span.style.background = colour(best[0], best[1]);
    span.onmouseenter = () => about.textContent = `${JSON.stringify(token)} reads\\n` + layer.parts[t]
      .map(([part, share]) => `${layer.what} ${part}: ${(100 * share).toFixed(1)} %`).join("\\n");
    return span;
  }));
}
choice.onchange = show;
show();
"""
NAMED = 4  # parts listed for a token


def write_page(found: Sequence[Any], labels: list[str], pictures: Iterable[Path], path: Path) -> None:
    """`found` are the `Reading`s of `bank_pictures.py`, `labels` the tokens as text, pictures PNG files."""
    data = {"tokens": labels, "layers": [_layer(reading) for reading in found]}
    script = json.dumps(data).replace("<", "\\u003c")  # no token closes the script
    figures = "".join(
        f'<h2>{html.escape(file.stem.replace("_", " "))}</h2>\n<img alt="{html.escape(file.stem)}" '
        f'src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">\n'
        for file in pictures
    )
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Memory bank</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>What each token reads</h1>\n"
        f'<p><label>Of <select id="layer"></select></label> Colour: what the token reads most of; strength: '
        f"its share. Point at a token for more.</p>\n"
        f'<div id="text"></div>\n<p id="about"></p>\n{figures}'
        f'<script id="data" type="application/json">{script}</script>\n<script>{SCRIPT}</script>\n</body></html>\n',
        encoding="utf-8",
    )


def _layer(reading: Any) -> dict[str, Any]:
    """Name, and of every token its largest parts and their shares: chapters, or memory tokens where there are none."""
    by_chapter = reading.num_chapters > 1
    weights = reading.load if by_chapter else reading.attention
    shares, parts = weights.topk(min(NAMED, weights.shape[1]))
    rows = zip(parts.tolist(), shares.tolist())
    return {
        "name": reading.name,
        "what": "chapter" if by_chapter else "memory token",
        "parts": [[[p, round(s, 4)] for p, s in zip(ps, ss) if s > 0] for ps, ss in rows],
    }
