// Ask, choose words, and follow the answer as it comes. The newest question wins.
import {$, download, lines, make, percent, post, shade, stored} from "./dom.js";
import * as list from "./matches.js";

let asked = null;        // {prompt, answer} whose words are shown
let words = [], from = 0, to = 0, key = null, direction = "proponents", rankings = {};
let running = null;      // the AbortController of the question under way
let word = null, pushed = null;  // that of the training word under way; what it does to the answer's words
let ready = false, before = null, triage = [], dragging = false;

function state(text, busy = false) {
  $("state").textContent = text;
  $("state").classList.toggle("busy", busy);
}
function banner(text, action = null) {
  $("banner").hidden = !text;
  $("banner").replaceChildren(text ?? "", ...(action ? [" ", action] : []));
}

// Runs one question; an older one is cancelled, and what it still says is not shown.
async function run(work) {
  running?.abort();
  const own = running = new AbortController();
  banner(null);
  try {
    await work(own.signal, () => running === own);
  } catch (error) {
    if (running !== own) return;
    if (own.signal.aborted) state("Cancelled.");
    else { state("That did not work."); banner(error instanceof TypeError ? "The server does not answer. Start `rapidindex serve` again, and open its new address." : error.message); }
  } finally {
    if (running === own) { running = null; $("stop").hidden = !word; }
  }
}

async function look() {
  let said;
  try {
    said = await (await fetch("/api/state")).json();
  } catch {
    state("The server does not answer.");
    setTimeout(look, 3000);
    return;
  }
  document.title = `${said.folder} · rapidindex`;
  const trained = said.checkpoints.join(" and ") || said.adapter;
  $("about").textContent = `${said.examples.toLocaleString("en")} training examples of ${[trained, said.adapter || !trained ? said.model : ""].filter(Boolean).join(" on ")}`;
  offer(said.checkpoints);
  if (said.failed) banner(said.failed);
  else if (said.changed) banner("The index has changed on disk.", make("button", {type: "button", text: "Reload it", async onclick() { await post("reload", {}); banner(null); list.clear(); state("Reloaded."); }}));
  if (said.loaded && !ready) { ready = true; if (!running) state("Ready."); }
  if (!said.loaded && !said.failed) state("Loading the model …", true);
  setTimeout(look, said.loaded ? 5000 : 500);
}

// The checkpoints of an index of several, as on the command line; hidden where there is one.
function offer(names) {
  const all = names.length ? [...names, "sum", "best"] : [], box = $("checkpoint"), kept = box.value;
  if ([...box.options].map(({value}) => value).join("\n") === all.join("\n")) return;
  const meaning = {sum: "sum of all, weighed", best: "best: where matches stand out most"};
  box.replaceChildren(...all.map((name) => make("option", {value: name, text: meaning[name] ?? name, selected: name === kept})));
  $("checkpoints").hidden = !names.length;
  ended();
}
const checkpoint = () => $("checkpoint").value || null;
$("checkpoint").addEventListener("change", () => { if (words.some(chosen)) ask(); });
function waiting({checkpoints}) { state(`Loading the model ${checkpoints[0] ? `of ${checkpoints.join(" and ")} ` : ""}…`, true); }

$("form").addEventListener("submit", (event) => { event.preventDefault(); generate(); });
$("prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("form").requestSubmit(); } });
$("stop").addEventListener("click", () => { running?.abort(); word?.abort(); });

function generate() {
  const prompt = $("prompt").value;
  if (!prompt.trim()) return;
  const seed = $("draw").checked ? Number($("seed").value) : null;
  empty();
  run(async (signal, newest) => {
    state("Answering …", true);
    $("stop").hidden = false;
    $("words").hidden = false;
    for await (const piece of lines("answer", {prompt, seed, checkpoint: checkpoint()}, signal)) {
      if (!newest()) return;
      if (piece.kind === "loading") waiting(piece);
      else if (piece.kind === "text") { state("Answering …", true); $("words").textContent = piece.text; }
      else if (piece.kind === "words") pose({prompt, answer: asked.answer}, piece.words);
      else if (piece.kind === "answered") {
        asked = {prompt, answer: piece.text};
        if (piece.checkpoint) $("answer-head").textContent = `Answer of ${piece.checkpoint}`;
      }
    }
    state(words.length ? "Choose a word." : "The model’s answer is empty: type one.");
  });
}

$("use").addEventListener("click", () => use({prompt: $("prompt").value, answer: $("answer").value}));
function use(question, then = null) {
  empty();
  run(async (signal, newest) => {
    const piece = await (await post("words", question, signal)).json();
    if (!newest()) return;
    pose(question, piece.words);
    state("Choose a word.");
    if (then) then();
  });
}

function empty() {
  asked = null;
  words = [];
  key = null;
  rankings = {};
  list.clear();
  $("words").replaceChildren();
  $("answer-head").textContent = "Answer";
  $("chosen").textContent = "";
  $("whole-row").hidden = true;
}

function pose(question, pieces) {
  asked = question;
  $("prompt").value = question.prompt;
  $("answer").value = question.answer;
  $("hint").textContent = "Click a word, or drag over several. By keyboard: arrows, Shift for several, Enter.";
  const box = $("words");
  box.replaceChildren();
  words = [];
  for (const one of pieces) {
    if (one.length === 1) { box.append(one[0]); continue; }
    const [lead, text, after, positions] = one;
    const number = words.length;
    const option = make("span", {role: "option", "aria-selected": "false", tabindex: number ? "-1" : "0", text, "data-number": number});
    words.push({option, positions});
    box.append(lead, option, after);
  }
  box.hidden = false;
  $("whole-row").hidden = false;
  from = to = 0;
  remember(question);
}

function choose(a, b) {
  from = a;
  to = b;
  const [low, high] = [Math.min(a, b), Math.max(a, b)];
  words.forEach(({option}, i) => {
    option.setAttribute("aria-selected", String(i >= low && i <= high));
    option.tabIndex = i === b ? 0 : -1;
  });
}
function at(event) {
  const option = document.elementFromPoint(event.clientX, event.clientY)?.closest("#words [role=option]");
  return option ? Number(option.dataset.number) : null;
}
$("words").addEventListener("pointerdown", (event) => {
  const number = at(event);
  if (number === null || event.button) return;
  event.preventDefault();
  dragging = true;
  choose(event.shiftKey ? from : number, number);
  words[number].option.focus({preventScroll: true});
});
document.addEventListener("pointermove", (event) => { const number = dragging ? at(event) : null; if (number !== null) choose(from, number); });
document.addEventListener("pointerup", () => { if (dragging) { dragging = false; ask(); } });
document.addEventListener("pointercancel", () => { dragging = false; });
$("words").addEventListener("keydown", (event) => {
  if (!words.length || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); if (!words.some(chosen)) choose(to, to); ask(); return; }
  const rtl = getComputedStyle($("words")).direction === "rtl";
  const next = {ArrowRight: to + (rtl ? -1 : 1), ArrowLeft: to + (rtl ? 1 : -1), ArrowDown: to + 1, ArrowUp: to - 1, Home: 0, End: words.length - 1}[event.key];
  if (next === undefined) return;
  event.preventDefault();
  const number = Math.max(0, Math.min(words.length - 1, next));
  choose(event.shiftKey ? from : number, number);
  words[number].option.focus();
});
$("whole").addEventListener("click", () => { choose(0, words.length - 1); ask(); });

function span() {
  const positions = words.slice(Math.min(from, to), Math.max(from, to) + 1).flatMap((word) => word.positions);
  return `${Math.min(...positions)}:${Math.max(...positions)}`;
}

// With `all` the question's list stays, and the heat-maps of the matches within chance come, too.
function ask(all = false) {
  if (!asked || !words.length) return;
  const question = {...asked, span: span(), direction, all, checkpoint: checkpoint()};
  const text = words.slice(Math.min(from, to), Math.max(from, to) + 1).map(({option}) => option.textContent).join(" ");
  $("chosen").textContent = `The question is about “${text}”.`;
  run(async (signal, newest) => {
    state("Searching …", true);
    $("stop").hidden = false;
    if (!all) { list.clear(); light(null); }
    for await (const piece of lines("ask", question, signal)) {
      if (!newest()) return;
      if (piece.kind === "loading") waiting(piece);
      else if (piece.kind === "posed") { key = piece.key; state("Searching …", true); }
      else if (piece.kind === "ranked") { if (!all || piece.final) ranked(piece); }
      else if (piece.kind === "scored") {
        list.scored(piece);
        state(`${piece.answer ? "What each did to the answer" : "Heat-maps"}: step ${piece.done} of ${piece.total}`, true);
      } else if (piece.kind === "done") finished(question, text);
    }
  });
}

function ranked(ranking) {
  rankings[ranking.direction] = ranking;
  if (ranking.direction !== direction) return;
  list.show(ranking, inBoth(ranking));
  drawFirst(ranking);
}
// The matches of the first answer beside those of the second.
function drawFirst(ranking) {
  $("first").hidden = !before;
  $("both").classList.toggle("two", Boolean(before));
  if (!before) return;
  const there = new Set(ranking.matches.map((match) => match.id));
  $("first-head").textContent = `${before.direction} of “${before.answer}”, ${before.words}${before.checkpoint ? `, at ${before.checkpoint}` : ""}`;
  $("first-list").replaceChildren(...before.matches.map((match) => make("li", {class: "match"},
    make("div", {class: "head"}, make("span", {class: "score", text: `${match.rank}  ${match.score}`}), make("span", {text: match.place || match.id}),
      ...(there.has(match.id) ? [make("span", {class: "common", text: "in both columns"})] : [])),
    make("div", {class: "first-text", dir: "auto", text: match.response.slice(0, 400)}))));
}
function inBoth(ranking) {
  const there = new Set(before?.matches.map((match) => match.id));
  return new Set(ranking.matches.map((match) => match.id).filter((id) => there.has(id)));
}

function finished(question, text) {
  const {matches} = rankings[direction];
  const both = before ? ` ${inBoth(rankings[direction]).size} of ${matches.length} matches are in both columns.` : "";
  state(`${matches.length} ${direction}, complete.${both}`);
  const entry = triage.find((one) => one.prompt === question.prompt && one.answer === question.answer);
  if (!entry) return;
  entry.found = {words: text, direction, checkpoint: rankings[direction].checkpoint ?? undefined, matches: matches.map(({id, score, beyond}) => ({id, score: Number(score), beyond_chance: beyond}))};
  drawTriage();
}

function light(scores) {
  const full = scores ? Math.max(...scores.map(Math.abs)) : 0;
  words.forEach(({option, positions}) => {
    option.classList.toggle("c", Boolean(scores));
    shade(option, scores ? positions.reduce((sum, one) => sum + scores[one], 0) : 0, full);
  });
}
list.onLight((scores) => light(scores ?? pushed));

// What one training word does to the answer. It waits for the model between two heat-maps; the newest word wins.
list.onPick(async (match, text, tokens, total) => {
  word?.abort();
  const own = word = match ? new AbortController() : null;
  light(pushed = null);
  $("pushed").textContent = "";
  if (!match) { $("stop").hidden = !running; return; }
  const about = `“${text}” of ${direction.slice(0, -1)} ${match.rank}`;
  list.tell(`What ${about} does to the answer comes next …`);
  $("stop").hidden = false;
  try {
    for await (const piece of lines("word", {key, match: match.name, tokens}, own.signal)) {
      if (word !== own || piece.kind !== "pushed") continue;
      light(pushed = piece.answer);
      list.tell($("pushed").textContent = `${about} pushes ${strongest(pushed, total)}.`);
    }
  } catch (error) {
    if (word === own) list.tell(own.signal.aborted ? "Cancelled." : error.message);
  } finally {
    if (word === own) { word = null; $("stop").hidden = !running; }
  }
});
function chosen({option}) { return option.ariaSelected === "true"; }
// The chosen words of the answer, and those that scores move most, three in all, in percent of the match's influence on the chosen words.
function strongest(scores, total) {
  const each = words.map((word) => [word.option.textContent, word.positions.reduce((sum, one) => sum + scores[one], 0), chosen(word)]);
  return each.sort((a, b) => b[2] - a[2] || Math.abs(b[1]) - Math.abs(a[1])).slice(0, 3)
    .map(([text, score]) => `“${text}” by ${percent(score, total)}`).join(", ");
}
list.onUnfold(() => ask(true));

const tabs = ["proponents", "opponents"];
function turn(name) {
  if (name === direction) return;
  direction = name;
  tabs.forEach((one) => { $("tab-" + one).setAttribute("aria-selected", String(one === name)); $("tab-" + one).tabIndex = one === name ? 0 : -1; });
  $("list").setAttribute("aria-labelledby", "tab-" + name);
  ask();
}
tabs.forEach((name, i) => {
  $("tab-" + name).addEventListener("click", () => turn(name));
  $("tab-" + name).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
    event.preventDefault();
    turn(tabs[1 - i]);
    $("tab-" + tabs[1 - i]).focus();
  });
});
$("filter").addEventListener("input", list.draw);
$("group").addEventListener("change", list.draw);

$("compare").addEventListener("click", () => {
  if (before) {
    ended();
    if (key) ask();
    return;
  }
  if (!key || !rankings[direction]) { state("Choose a word first."); return; }
  before = {...rankings[direction], answer: asked.answer, words: $("chosen").textContent.match(/“.*”/s)?.[0] ?? ""};
  $("compare").textContent = "End the comparison";
  if (checkpoint()) $("checkpoint").focus();
  else { $("own").open = true; $("answer").focus(); }
  state(`${checkpoint() ? "Choose another checkpoint; or change" : "Change"} the answer, use it, and choose the word again: matches in common are marked.`);
});
function ended() {
  before = null;
  drawFirst();
  $("compare").textContent = `Compare with another ${checkpoint() ? "checkpoint or answer" : "answer"}`;
}

function count() {
  const n = list.marked.size;
  $("count").textContent = n ? `${n} marked` : "Mark examples to remove them or to keep their ids.";
  $("copy").disabled = $("ids").disabled = !n;
}
list.onMark(count);
count();
const ids = () => [...list.marked.keys()];
$("copy").addEventListener("click", async () => {
  const text = `rapidindex remove INDEX ${ids().map((id) => `--ids ${id}`).join(" ")}`;
  try { await navigator.clipboard.writeText(text); state("Copied: put the index’s folder in the place of INDEX."); }
  catch { banner(text); }
});
$("ids").addEventListener("click", () => download("ids.txt", ids().join("\n") + "\n", "text/plain"));
for (const [name, file, type] of [["json", "result.json", "application/json"], ["report", "report.html", "text/html"]]) {
  $(name).addEventListener("click", async () => {
    try { download(file, await (await post(name, {key, direction})).text(), type); }
    catch (error) { banner(error.message); }
  });
}

$("verify").addEventListener("click", () => {
  if (!key) return;
  run(async (signal, newest) => {
    state("Verifying: steps on the matches and on others, some minutes …", true);
    const said = await (await post("verify", {key}, signal)).json();
    if (!newest()) return;
    banner(said.verdict);
    state("Verified.");
  });
});

function remember({prompt, answer}) {
  const kept = stored.get("recent", []).filter((one) => one.prompt !== prompt || one.answer !== answer);
  stored.set("recent", [{prompt, answer}, ...kept].slice(0, 20));
  drawRecent();
}
const entry = (question, extra = "") => make("li", {}, make("button", {type: "button", text: `${question.prompt.slice(0, 60)} → ${question.answer.slice(0, 60)}${extra}`, onclick: () => use(question)}));
function drawRecent() { $("recent").replaceChildren(...stored.get("recent", []).map((one) => entry(one))); }
$("forget").addEventListener("click", () => { stored.set("recent", []); drawRecent(); });

function drawTriage() {
  $("triage").replaceChildren(...triage.map((one) => entry(one, one.found ? " ✓" : "")));
  $("export").hidden = !triage.some((one) => one.found);
}
async function readTriage(file) {
  const read = (await file.text()).split("\n").filter((one) => one.trim());
  try {
    triage = read.map((one, i) => {
      const value = JSON.parse(one);
      if (typeof value.prompt !== "string" || typeof value.answer !== "string") throw new Error(`Line ${i + 1} has no prompt and answer.`);
      return value;
    });
    banner(null);
  } catch (error) { banner(`${file.name} cannot be read: ${error.message}`); }
  $("lists").open = true;
  drawTriage();
}
$("file").addEventListener("change", () => { if ($("file").files[0]) readTriage($("file").files[0]); });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => { event.preventDefault(); if (event.dataTransfer.files[0]) readTriage(event.dataTransfer.files[0]); });
$("export").addEventListener("click", () => download("triage.jsonl", triage.map((one) => JSON.stringify(one)).join("\n") + "\n", "application/jsonl"));

const system = matchMedia("(prefers-color-scheme: dark)");
const dark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
function theme(name) { if (name) document.documentElement.dataset.theme = name; $("theme").textContent = dark() ? "Light theme" : "Dark theme"; }
$("theme").addEventListener("click", () => { theme(dark() ? "light" : "dark"); stored.set("theme", document.documentElement.dataset.theme); });
theme(stored.get("theme", null));

if (location.search) history.replaceState(null, "", "/");
drawRecent();
look();
