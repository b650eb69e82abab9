"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const tip = document.getElementById("tip");

// A token's title becomes the tip, which the keyboard and a screen reader reach too.
function show(segment) {
  tip.textContent = segment.dataset.label;
  tip.hidden = false;
  const box = segment.getClientRects()[0], own = tip.getBoundingClientRect();
  const top = box.top - own.height - 6;
  tip.style.left = Math.max(4, Math.min(box.left, innerWidth - own.width - 4)) + "px";
  tip.style.top = (top < 4 ? box.bottom + 6 : top) + "px";
}
const hide = () => { tip.hidden = true; };

function move(heat, segments, to) {
  segments.forEach((segment) => segment.classList.remove("now"));
  heat.at = Math.max(0, Math.min(segments.length - 1, to));
  const segment = segments[heat.at];
  segment.classList.add("now");
  segment.scrollIntoView({block: "nearest"});
  show(segment);
}

all(".heat").forEach((heat) => {
  const segments = all(".c", heat);
  segments.forEach((segment) => { segment.dataset.label = segment.title; segment.removeAttribute("title"); });
  heat.at = -1;
  heat.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const ahead = getComputedStyle(heat).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
    const back = ahead === "ArrowLeft" ? "ArrowRight" : "ArrowLeft";
    const to = {[ahead]: heat.at + 1, [back]: heat.at - 1, Home: 0, End: segments.length - 1}[event.key];
    if (to === undefined || !segments.length) return;
    event.preventDefault();
    move(heat, segments, to);
  });
  heat.addEventListener("blur", () => { segments.forEach((segment) => segment.classList.remove("now")); hide(); });
});

document.addEventListener("pointerover", (event) => {
  const segment = event.target.closest(".heat .c");
  if (segment) show(segment);
  else if (!event.target.closest("#tip")) hide();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
document.addEventListener("scroll", (event) => { if (!document.querySelector(".now")) hide(); }, true);

const tabs = all("[role=tab]"), panels = tabs.map((tab) => document.getElementById(tab.getAttribute("aria-controls")));
function choose(number) {
  tabs.forEach((tab, i) => {
    tab.setAttribute("aria-selected", i === number);
    tab.tabIndex = i === number ? 0 : -1;
    panels[i].classList.toggle("off", i !== number);
  });
  hide();
  sift();
}

// Matches are sifted by text, or by the value of a column as `column=value`; what is marked or shown can be copied.
const filter = document.getElementById("filter"), command = document.getElementById("command"), marked = new Set();
const lower = (element) => element.textContent.trim().toLowerCase();
const matches = all(".match").map((match) => {
  const columns = all(":scope > .facts > div", match).map((pair) => [...pair.children].map(lower));
  const texts = all(":scope > .text, :scope > .heat", match).map(lower);
  return {match, columns, id: match.querySelector(".id").textContent, text: [...texts, ...columns.map(([, value]) => value)].join("\n")};
});
const here = () => matches.filter(({match}) => !match.closest(".off"));
const chosen = () => [...new Set(marked.size ? marked : here().filter(({match}) => match.checkVisibility()).map(({id}) => id))];

function sift() {
  const wanted = filter.value.trim().toLowerCase();
  let [, column, value] = wanted.match(/^([^=\s]+)=(.*)$/) ?? [];
  if (!matches.some(({columns}) => columns.some(([name]) => name === column))) column = null;
  const fits = ({columns, text}) => column ? columns.some((pair) => pair[0] === column && pair[1] === value.trim()) : text.includes(wanted);
  matches.forEach((one) => { one.match.hidden = !fits(one); });
  all(".folded").forEach((folded) => {
    folded.hidden = !all(".match", folded).some((match) => !match.hidden);
    if (wanted) folded.open = true;
  });
  const left = here().filter(({match}) => !match.hidden).length;
  document.getElementById("fits").textContent = wanted ? `${left} of ${here().length} matches fit “${filter.value.trim()}”.` : "";
  count();
}
function count() {
  const ids = chosen();
  command.textContent = `Copy remove command: ${ids.length} ${marked.size ? "marked" : "shown"}`;
  command.disabled = !ids.length;
}
async function copy(text, note) {
  const said = document.getElementById("said");
  try {
    await navigator.clipboard.writeText(text);
    said.textContent = note;
  } catch {  // the browser does not let a page of a file copy: the reader can
    said.textContent = text;
    getSelection().selectAllChildren(said);
  }
}
function action(text, hidden, click) {
  const made = document.createElement("button"), rest = document.createElement("span");
  made.type = "button";
  rest.className = "hidden";
  rest.textContent = hidden;
  made.append(text, rest);
  made.addEventListener("click", click);
  return made;
}
matches.forEach(({match, id}) => {
  const name = " " + lower(match.querySelector(".rank")), tools = document.createElement("p");
  const mark = action("Mark", name, () => {
    if (!marked.delete(id)) marked.add(id);
    mark.setAttribute("aria-pressed", marked.has(id));
    count();
  });
  mark.setAttribute("aria-pressed", false);
  tools.className = "tools";
  tools.append(mark, action("Copy id", " of" + name, () => copy(id, `Copied ${id}.`)));
  match.querySelector(":scope > .facts").after(tools);
});
filter.addEventListener("input", sift);
command.addEventListener("click", () => copy(`rapidindex remove INDEX ${chosen().map((id) => `--ids ${id}`).join(" ")}`, "Copied: put the index’s folder in the place of INDEX."));
all(".folded").forEach((folded) => folded.addEventListener("toggle", count));
document.getElementById("tools").hidden = false;
sift();

if (tabs.length) {
  document.getElementById("tabs").hidden = false;
  panels.forEach((panel, i) => { panel.setAttribute("role", "tabpanel"); panel.setAttribute("aria-labelledby", tabs[i].id); });
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => choose(i));
    tab.addEventListener("keydown", (event) => {
      const steps = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (!steps) return;
      event.preventDefault();
      const to = (i + steps + tabs.length) % tabs.length;
      choose(to);
      tabs[to].focus();
    });
  });
  choose(0);
}

// A link to a match opens its direction and whatever folds it away.
function reveal() {
  const match = location.hash && document.getElementById(location.hash.slice(1));
  if (!match || !match.matches(".match")) return;
  if (tabs.length) choose(panels.indexOf(match.closest(".panel")));
  if (match.hidden) { filter.value = ""; sift(); }
  const closed = match.closest("details");
  if (closed) closed.open = true;
  match.scrollIntoView();
}
addEventListener("hashchange", reveal);
reveal();

const button = document.getElementById("theme"), system = matchMedia("(prefers-color-scheme: dark)");
const dark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
const name = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; };
button.hidden = false;
button.addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; name(); });
system.addEventListener("change", name);
name();
