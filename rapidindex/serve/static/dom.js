// Elements, colours and requests. Text enters the page by textContent alone.
export const $ = (id) => document.getElementById(id);

export function make(name, given = {}, ...inside) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(given)) {
    if (key === "text") element.textContent = value;
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null) element.setAttribute(key, value);
  }
  element.append(...inside);
  return element;
}

const STEPS = 20, FLOOR = 0.1;
// As rapidindex/views/heatmap.py: a colour step grows with the share's root.
export function shade(element, score, full) {
  element.className = element.className.replace(/ ?\b[pn]\d+\b/g, "");
  const step = full && Math.abs(score) >= FLOOR * full && Math.round(STEPS * Math.sqrt(Math.min(1, Math.abs(score) / full)));
  if (step) element.classList.add((score > 0 ? "p" : "n") + step);
}

// As wording.percent: in percent of an influence, or as a number where that is 0.
export function percent(share, total) {
  const size = Math.abs(share), number = size === 0 || size >= 0.1 ? size.toFixed(4) : Number(size.toPrecision(3));
  return (share < 0 ? "−" : "+") + (total ? `${Math.round(100 * size / Math.abs(total))} %` : number);
}

export async function post(path, body, signal) {
  const answer = await fetch("/api/" + path, {
    method: "POST", signal, headers: {"content-type": "application/json"}, body: JSON.stringify(body),
  });
  if (!answer.ok) {
    const text = await answer.text();
    let said;
    try { said = JSON.parse(text); } catch { said = {message: text, hint: ""}; }
    throw new Error(`${said.message} ${said.hint ?? ""}`.trim());
  }
  return answer;
}

// The lines of JSON of a stream, one after the other.
export async function* lines(path, body, signal) {
  const reader = (await post(path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) {
      const piece = JSON.parse(part);
      if (piece.kind === "error") throw new Error(`${piece.message} ${piece.hint}`.trim());
      yield piece;
    }
  }
}

export function download(name, text, type) {
  const link = make("a", {href: URL.createObjectURL(new Blob([text], {type})), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

export const stored = {
  get(key, otherwise) { try { return JSON.parse(localStorage.getItem("rapidindex." + key)) ?? otherwise; } catch { return otherwise; } },
  set(key, value) { try { localStorage.setItem("rapidindex." + key, JSON.stringify(value)); } catch { /* full, or refused */ } },
};
