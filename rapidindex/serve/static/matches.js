// The list of matches: cards, heat-maps as they come, what each did to the answer.
import {$, make, shade} from "./dom.js";
import {facets, fits, grouped} from "./sift.js";

export const marked = new Map();
const heats = new Map(), moved = new Map();  // of the direction shown, by the match's name
let view = null, common = new Set(), root = $("list"), lit = () => {}, changed = () => {}, unfolded = () => {}, picked = () => {};

export function onLight(listener) { lit = listener; }
export function onMark(listener) { changed = listener; }
// Called when the matches within chance are unfolded and have no heat-maps yet.
export function onUnfold(listener) { unfolded = listener; }
// Called with a match, the word of its response that was chosen, the word's tokens and the match's influence; with null
// when the word is let go.
export function onPick(listener) { picked = listener; }

export function clear() {
  pick(null);
  view = null;
  heats.clear();
  moved.clear();
  root.replaceChildren();
  $("facets").replaceChildren();
  $("tools").hidden = $("marked").hidden = $("verdict").hidden = true;
  $("explain").textContent = "";
}

export function show(ranking, shared = new Set()) {
  view = ranking;
  common = shared;
  heats.clear();
  moved.clear();
  $("tools").hidden = $("marked").hidden = false;
  const said = [ranking.unfinished, ranking.standing].filter(Boolean).join(" ");
  $("verdict").hidden = !said;
  $("verdict").textContent = said;
  const made = ranking.direction === "proponents" ? "likelier" : "less likely";
  $("explain").textContent = `${ranking.checkpoint ? `At ${ranking.checkpoint}, training` : "Training"} on these is estimated to make the chosen words ${made}. `
    + `${ranking.search[0].toUpperCase()}${ranking.search.slice(1)} over ${ranking.n.toLocaleString("en")} ${ranking.unit}.`;
  draw();
}

export function draw() {
  if (!view) return;
  pick(null);
  drawFacets();
  const shown = view.matches.filter((match) => fits(match, $("filter").value));
  const beyond = shown.filter((match) => match.beyond), chance = shown.filter((match) => !match.beyond);
  root.replaceChildren(...cards(beyond));
  if (chance.length) {
    const inside = make("details", {}, make("summary", {text: view.folded}), ...cards(chance));
    inside.addEventListener("toggle", () => { if (inside.open && chance.some((match) => !moved.has(match.name))) unfolded(); });
    root.append(inside);
  }
  if (!shown.length) root.append(make("p", {class: "note", text: "No match fits the filter."}));
  paint();
}

function cards(matches) {
  const heads = $("group").checked ? grouped(matches) : matches.map((match) => ({match, same: []}));
  return heads.map(({match, same}) => card(match, same));
}

function drawFacets() {
  $("facets").replaceChildren(...facets(view.matches).map(([column, value, count]) => make("button", {
    type: "button", text: `${count} of the first ${view.matches.length} are ${column}=${value}`,
    "aria-pressed": String($("filter").value === `${column}=${value}`),
    onclick() { $("filter").value = $("filter").value === `${column}=${value}` ? "" : `${column}=${value}`; draw(); },
  })));
}

function card(match, same) {
  const name = view.direction === "proponents" ? "Proponent" : "Opponent";
  const box = make("input", {type: "checkbox", "aria-label": `Mark ${name.toLowerCase()} ${match.rank}`, onchange() { mark(match, box.checked); }});
  box.checked = marked.has(match.id);
  const meta = Object.entries(match.meta).map(([key, value]) => make("span", {text: `${key} ${value}`}));
  const article = make("article", {class: "match", "data-name": match.name},
    make("div", {class: "head"}, make("h3", {class: "rank", text: `${name} ${match.rank}`}), make("span", {class: "score", text: match.score}), make("span", {text: match.distance}),
      ...(common.has(match.id) ? [make("span", {class: "common", text: "in both columns"})] : []),
      ...(match.token ? [make("span", {text: match.token})] : []), ...meta, ...(match.place ? [make("span", {text: match.place})] : []), make("span", {text: match.id}), make("label", {class: "inline"}, box, "mark")),
    make("div", {class: "prompt", dir: "auto", text: match.prompt}),
    make("div", {class: "heat", dir: "auto", role: "group", tabindex: "0", "aria-label": `Response of ${name.toLowerCase()} ${match.rank}`, "aria-describedby": "reading", text: match.response}),
    make("div", {class: "waiting"}));
  if (match.hidden) article.append(make("p", {class: "note", text: `… ${match.hidden.toLocaleString("en")} more characters are not shown.`}));
  if (same.length) {
    article.append(make("details", {class: "same"}, make("summary", {text: `${same.length} more with nearly the same words`}), ...same.map((one) => card(one, []))));
  }
  article.addEventListener("pointerenter", () => light(article, match));
  article.addEventListener("focusin", () => light(article, match));
  article.addEventListener("pointerleave", () => { article.classList.remove("lit"); lit(null); });
  return article;
}

function light(article, match) {
  root.querySelectorAll(".lit").forEach((one) => one.classList.remove("lit"));
  article.classList.add("lit");
  lit(moved.get(match.name) ?? null);
}

function mark(match, on) {
  if (on) marked.set(match.id, match);
  else marked.delete(match.id);
  changed();
}

export function scored(piece) {
  if (!view || piece.direction !== view.direction) return;
  if (piece.heat) heats.set(piece.name, piece);
  if (piece.answer) moved.set(piece.name, piece.answer);
  paint();
}

function paint() {
  let full = 0;
  for (const {heat} of heats.values()) for (const one of heat) full = Math.max(full, Math.abs(one[4] ?? 0));
  for (const article of root.querySelectorAll(".match")) {
    const piece = heats.get(article.dataset.name), heat = article.querySelector(":scope > .heat");
    article.querySelector(":scope > .waiting").textContent = piece ? "" : "The heat-map comes next …";
    if (!piece) continue;
    if (heat.dataset.filled !== String(piece.rank)) fill(heat, piece);
    heat.querySelectorAll(".c").forEach((span) => shade(span, Number(span.dataset.share), full));
  }
}

function fill(heat, piece) {
  heat.replaceChildren();
  for (const one of piece.heat) {
    if (one.length === 1) { heat.append(one[0]); continue; }
    const [before, text, after, positions, share, percent] = one;
    const where = positions.length > 1 ? `tokens ${positions.join(", ")}` : `token ${positions[0]}`;
    const span = make("span", {class: "c", text, "data-share": share, "data-tokens": JSON.stringify(positions), "data-label": `“${text}” ${percent}, ${where}`});
    heat.append(before, span, after);
  }
  heat.dataset.filled = piece.rank;
}

const tip = $("tip");
export function tell(text) { tip.textContent = $("spoken").textContent = text; tip.hidden = !text; }
const say = (span) => tell(span.dataset.label);

// A word of a response is chosen: what it does to the answer is asked for. Chosen again, it is let go.
function pick(span) {
  const before = root.querySelector(".picked");
  before?.classList.remove("picked");
  if (span && span !== before) {
    span.classList.add("picked");
    const name = span.closest(".match").dataset.name;
    picked(view.matches.find((match) => match.name === name), span.textContent, JSON.parse(span.dataset.tokens), heats.get(name).whole);
  } else if (before) picked(null);
}
root.addEventListener("click", (event) => {
  const span = event.target.closest(".heat .c");
  if (span && getSelection().isCollapsed) pick(span);
});
document.addEventListener("pointerover", (event) => {
  const span = event.target.closest(".heat .c");
  if (span) say(span);
  else tip.hidden = true;
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") { tip.hidden = true; pick(null); } });
root.addEventListener("keydown", (event) => {
  if (!event.target.classList.contains("heat")) return;
  const spans = [...event.target.querySelectorAll(".c")], at = spans.findIndex((one) => one.classList.contains("now"));
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); if (spans[at]) pick(spans[at]); return; }
  const rtl = getComputedStyle(event.target).direction === "rtl";
  const to = {[rtl ? "ArrowLeft" : "ArrowRight"]: at + 1, [rtl ? "ArrowRight" : "ArrowLeft"]: at - 1, Home: 0, End: spans.length - 1}[event.key];
  if (to === undefined || !spans.length) return;
  event.preventDefault();
  spans[at]?.classList.remove("now");
  const span = spans[Math.max(0, Math.min(spans.length - 1, to))];
  span.classList.add("now");
  span.scrollIntoView({block: "nearest"});
  say(span);
});
root.addEventListener("focusout", (event) => { event.target.querySelectorAll?.(".now").forEach((one) => one.classList.remove("now")); tip.hidden = true; });
