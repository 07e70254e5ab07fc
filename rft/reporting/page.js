"use strict";
// The rollouts of a page: unpacked from its inert element, filtered, listed and shown.
// Model text gets into the document as text nodes only.

const ROW = 54; // height of a row of the list, px
const UNIT = 1e-5; // of gaps
const BINS = [1e-4, 1e-3, 1e-2, 0.1, 1]; // |gap| from which a colour begins
// Controls, marks of direction and other characters that nobody sees.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/;

const $ = (id) => document.getElementById(id);
const browser = $("browser"), filters = $("filters"), list = $("list"), detail = $("detail");
const rows = document.createElement("div"); // as high as the whole list; has the rows in sight
let data = null; // columns
let found = []; // numbers of the rollouts that pass the filters
let selected = 0; // place in `found`
let opened = -1; // place in `found`, -1: none
let token = -1; // of the opened rollout

function element(tag, name, ...children) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...children);
  return made;
}

// Text with what cannot be seen named.
function seen(text) {
  const made = document.createDocumentFragment();
  let from = 0;
  for (let i = 0; i < text.length; i++) {
    const newline = text[i] === "\n";
    if (!newline && !UNSEEN.test(text[i])) continue;
    made.append(text.slice(from, i));
    if (newline) made.append(element("span", "newline", "\n"));
    else {
      const code = text.charCodeAt(i).toString(16).toUpperCase().padStart(4, "0");
      made.append(element("span", "unseen", "U+" + code));
    }
    from = i + 1;
  }
  made.append(text.slice(from));
  return made;
}

const line = (text) => seen(text.slice(0, 160).replace(/\s+/g, " "));
const number = (value) => value.toLocaleString("en");
const reward = (value) => (value === null ? "–" : String(Math.round(value * 1e4) / 1e4));

function signed(gap) {
  if (gap === 0) return "0";
  const digits = Math.abs(gap) >= 0.1 ? 2 : Math.min(5, 1 - Math.floor(Math.log10(Math.abs(gap))));
  return (gap > 0 ? "+" : "−") + Math.abs(gap).toFixed(digits);
}

function colour(gap) {
  const bin = BINS.filter((from) => Math.abs(gap) >= from).length;
  return bin ? (gap > 0 ? "up" : "down") + bin : "";
}

function largest(i) {
  const gaps = data.gaps[i] || [];
  let most = -1;
  for (const gap of gaps) if (gap !== null && Math.abs(gap) > most) most = Math.abs(gap);
  return most < 0 ? null : most * UNIT;
}

// ---- filters

function options(select, values, texts) {
  values.forEach((value, k) => select.append(new Option(texts ? texts[k] : value, value)));
}

function filter() {
  const of = filters.elements;
  const low = (field) => field.value.trim().toLowerCase();
  const between = (value, from, to) =>
    (from.value === "" || value >= Number(from.value)) && (to.value === "" || value <= Number(to.value));
  const text = low(of.text), task = low(of.task);
  const run = of.run ? of.run.value : "", reason = of.reason.value;
  const tasks = data.tasks.map((name) => name.toLowerCase().includes(task));
  const prompts = data.prompts.map((prompt) => prompt.toLowerCase().includes(text));
  found = [];
  for (let i = 0; i < data.text.length; i++) {
    if (run !== "" && data.run[i] !== Number(run)) continue;
    if (reason !== "" && data.reason[i] !== Number(reason)) continue;
    if (!tasks[data.task[i]] || !between(data.step[i], of.step_from, of.step_to)) continue;
    if (!between(data.reward[i], of.reward_from, of.reward_to)) continue;
    if (text && !prompts[data.prompt[i]] && !data.text[i].toLowerCase().includes(text)
        && !data.detail[i].toLowerCase().includes(text)) continue;
    found.push(i);
  }
  if (of.order.value === "gap") {
    const gaps = new Map(found.map((i) => [i, largest(i) ?? -1]));
    found.sort((a, b) => gaps.get(b) - gaps.get(a) || a - b);
  }
  $("count").textContent = found.length === data.text.length
    ? number(found.length) + " rollouts"
    : number(found.length) + " of " + number(data.text.length) + " rollouts";
  if (opened >= 0) close();
  list.scrollTop = 0;
  select(0);
}

// ---- the list: only the rows in sight are in the document

function draw() {
  rows.style.height = found.length * ROW + "px";
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
  const last = Math.min(found.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 5);
  const made = [];
  for (let place = first; place < last; place++) made.push(option(place));
  rows.replaceChildren(...made);
  if (selected >= first && selected < last) list.setAttribute("aria-activedescendant", "row" + selected);
  else list.removeAttribute("aria-activedescendant");
}

function option(place) {
  const i = found[place];
  const head = element("span", "head",
    element("span", "where", "step " + data.step[i]),
    element("span", "task", line(data.tasks[data.task[i]])),
    tag(i), element("span", "reward", reward(data.reward[i])));
  if (data.names.length > 1) head.prepend(element("span", "run", line(data.names[data.run[i]])));
  const made = element("div", "row", head, element("span", "text", line(data.text[i])));
  made.id = "row" + place;
  made.style.top = place * ROW + "px";
  made.setAttribute("role", "option");
  made.setAttribute("aria-selected", String(place === selected));
  made.setAttribute("aria-posinset", String(place + 1));
  made.setAttribute("aria-setsize", String(found.length));
  made.addEventListener("click", () => { select(place); open(); });
  return made;
}

function tag(i) {
  const reason = data.reasons[data.reason[i]];
  const known = ["correct", "wrong", "error"].includes(reason) ? " " + reason : "";
  return element("span", "tag" + known, line(reason));
}

function select(place) {
  selected = Math.max(0, Math.min(place, found.length - 1));
  const top = selected * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  draw();
}

function move(by) {
  select(selected + by);
  if (opened >= 0 && opened !== selected) show();
}

// ---- one rollout

function open() {
  if (!found.length) return;
  show();
  draw(); // the list is narrower now
  const tokens = detail.querySelector(".tokens");
  tokens.focus({ preventScroll: true });
}

function close() {
  opened = -1;
  browser.classList.remove("open");
  detail.hidden = true;
  detail.replaceChildren();
  list.focus({ preventScroll: true });
  draw();
}

function show() {
  const focused = detail.contains(document.activeElement);
  opened = selected;
  token = -1;
  const i = found[opened];
  const title = element("h3", "", "Step " + data.step[i] + " · ", element("bdi", "", seen(data.tasks[data.task[i]])));
  title.append(" · no. " + data.index[i]);
  const buttons = element("div", "buttons",
    button("‹", "previous rollout", () => move(-1)), button("›", "next rollout", () => move(1)),
    button("×", "close", close));
  const tokens = completion(i);
  const readout = element("div", "readout");
  readout.id = "readout";
  readout.setAttribute("aria-live", "polite");
  detail.replaceChildren(
    element("header", "", title, buttons), facts(i),
    element("h4", "", "Prompt"), element("pre", "prompt", seen(data.prompts[data.prompt[i]])),
    element("h4", "", "Completion"), tokens, readout);
  if (data.gaps[i] && data.pieces[i]) detail.append($("legend").content.cloneNode(true));
  detail.hidden = false;
  detail.scrollTop = 0;
  browser.classList.add("open");
  tell(-1);
  if (focused) tokens.focus({ preventScroll: true });
}

function button(text, label, action) {
  const made = element("button", "", text);
  made.type = "button";
  made.setAttribute("aria-label", label);
  made.addEventListener("click", action);
  return made;
}

function facts(i) {
  const made = element("dl", "facts");
  const add = (name, value) => made.append(element("dt", "", name), element("dd", "", value));
  const versions = data.versions[i], gap = largest(i);
  if (data.names.length > 1) add("run", seen(data.names[data.run[i]]));
  add("reward", reward(data.reward[i]) + (data.shaped[i] === null ? "" : ", shaped " + reward(data.shaped[i])));
  add("reason", tag(i));
  if (data.detail[i]) add("detail", seen(data.detail[i]));
  add("tokens", number(data.tokens[i] ?? 0) + (data.finish[i] === "length" ? ", cut off at the limit" : ""));
  add("version", versions ? Math.min(...versions) + " to " + Math.max(...versions) : String(data.version[i]));
  add("largest gap", gap !== null ? signed(gap).slice(gap ? 1 : 0) : "not computed: no gradient came from this rollout");
  return made;
}

// The text in its tokens, coloured by gap; where it is not known what they are, as it is.
function completion(i) {
  const made = element("pre", "tokens");
  made.tabIndex = 0;
  made.setAttribute("role", "group");
  made.setAttribute("aria-label", "completion; left and right go from token to token");
  const text = Array.from(data.text[i]), cut = data.cut[i], pieces = data.pieces[i];
  const missing = () => made.append(element("span", "missing", " [" + number(cut[1]) + " characters left out] "));
  if (!pieces) {
    const at = cut ? cut[0] : text.length;
    made.append(seen(text.slice(0, at).join("")));
    if (cut) { missing(); made.append(seen(text.slice(at).join(""))); }
    return made;
  }
  const gaps = data.gaps[i], versions = data.versions[i];
  let from = 0;
  pieces.forEach((length, k) => {
    if (cut && k === cut[2]) missing();
    if (versions && versions[k] !== versions[k - 1]) made.append(element("sup", "version", "v" + versions[k]));
    if (length) {
      const piece = element("span", "token", seen(text.slice(from, from + length).join("")));
      if (gaps && gaps[k] !== null) piece.className += " " + colour(gaps[k] * UNIT);
      piece.dataset.k = k;
      made.append(piece);
    }
    from += length;
  });
  if (cut && cut[2] === pieces.length) missing();
  const under = (event) => event.target.closest(".token");
  made.addEventListener("mouseover", (event) => under(event) && tell(Number(under(event).dataset.k)));
  made.addEventListener("mouseleave", () => tell(token));
  made.addEventListener("click", (event) => under(event) && point(Number(under(event).dataset.k)));
  return made;
}

// Say below the text what is known of token k.
function tell(k) {
  const i = found[opened], cut = data.cut[i];
  if (k < 0) {
    $("readout").textContent = data.pieces[i]
      ? "Point at a token, or use ← and →, for its values." : "It is not known which part of the text each token is.";
    return;
  }
  const gap = data.gaps[i] ? data.gaps[i][k] : null;
  const place = k + 1 + (cut && k >= cut[2] ? cut[3] : 0);
  $("readout").textContent = "token " + number(place) + " of " + number(data.tokens[i])
    + " · gap " + (gap === null ? "not computed" : signed(gap * UNIT))
    + " · version " + (data.versions[i] ? data.versions[i][k] : data.version[i]);
}

function point(k) {
  const tokens = detail.querySelector(".tokens");
  tokens.querySelector(".at")?.classList.remove("at");
  token = k;
  const at = tokens.querySelector('[data-k="' + k + '"]');
  at.classList.add("at");
  at.scrollIntoView({ block: "nearest" });
  tell(k);
}

function step(by) {
  const all = [...detail.querySelectorAll(".token")];
  if (!all.length) return;
  const now = all.findIndex((piece) => Number(piece.dataset.k) === token);
  point(Number(all[Math.max(0, Math.min(now + by, all.length - 1))].dataset.k));
}

// ---- keys

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const at = document.activeElement, writing = filters.contains(at);
  const act = (action) => { event.preventDefault(); action(); };
  if (writing) {
    if (event.key === "Escape") act(() => list.focus());
    return;
  }
  if (event.key === "/") return act(() => filters.elements.text.focus());
  if (at !== document.body && !browser.contains(at)) return;
  if (event.key === "j") return act(() => move(1));
  if (event.key === "k") return act(() => move(-1));
  if (event.key === "Escape" && opened >= 0) return act(close);
  if (at === list) {
    const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 }[event.key];
    if (by) return act(() => move(by));
    if (event.key === "Enter") return act(open);
  }
  if (at.classList.contains("tokens")) {
    if (event.key === "ArrowRight") return act(() => step(1));
    if (event.key === "ArrowLeft") return act(() => step(-1));
  }
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

async function start() {
  data = await unpack($("rollouts").textContent);
  const of = filters.elements;
  options(of.reason, data.reasons.map((_, k) => k), data.reasons);
  if (of.run) options(of.run, data.names.map((_, k) => k), data.names);
  list.append(rows);
  list.addEventListener("scroll", draw);
  new ResizeObserver(draw).observe(list);
  let waiting = 0;
  // One at a time: a filter that came late would close what was opened since.
  const later = (delay) => { clearTimeout(waiting); waiting = setTimeout(filter, delay); };
  filters.addEventListener("input", () => later(120));
  filters.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(waiting);
    filter();
    list.focus();
  });
  filters.addEventListener("reset", () => later(0));
  document.addEventListener("keydown", key);
  browser.hidden = false;
  filter();
}

start().catch((error) => { $("count").textContent = "This browser cannot show the rollouts: " + error.message; browser.hidden = false; });
