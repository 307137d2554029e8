"use strict";
const images = JSON.parse(document.getElementById("images").textContent);
const data = JSON.parse(document.getElementById("data").textContent);
const sections = [...document.querySelectorAll("section.table")];
const rows = [...document.querySelectorAll("tr.row")];
const chips = [...document.querySelectorAll(".chip")], selects = [...document.querySelectorAll("select[data-setting]")];
const MOST = 8;  // questions that a comparison lists each way

// What the reader has chosen. It is written into the address behind #, and read from there.
let state;

function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1)), list = name => (words.get(name) ?? "").split(",").filter(Boolean);
  state = {open: new Set(list("open")), compare: list("compare").slice(0, 2), strategies: new Set(), settings: new Map(), sort: words.get("sort")};
  for (const strategy of words.getAll("strategy")) state.strategies.add(strategy);
  for (const [name, value] of words) if (name.startsWith("set.")) state.settings.set(name.slice(4), value);
}

function writeAddress() {
  const words = new URLSearchParams();
  if (state.open.size) words.set("open", [...state.open].join());
  if (state.compare.length) words.set("compare", state.compare.join());
  for (const strategy of state.strategies) words.append("strategy", strategy);
  for (const [name, value] of state.settings) words.set(`set.${name}`, value);
  if (state.sort) words.set("sort", state.sort);
  history.replaceState(null, "", `#${words}`);
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function show() {
  for (const row of rows) {
    const open = state.open.has(row.id), detail = document.getElementById(`${row.id}-detail`);
    row.hidden = !isWanted(row);
    row.classList.toggle("opened", open);
    row.querySelector("button.open").setAttribute("aria-expanded", open);
    row.querySelector("input").checked = state.compare.includes(row.id);
    detail.hidden = row.hidden || !open;
    if (open) for (const image of detail.querySelectorAll("img[data-image]")) image.src = images[image.dataset.image];
  }
  for (const chip of chips) {
    const name = chip.dataset.strategy;
    chip.setAttribute("aria-pressed", name ? state.strategies.has(name) : !state.strategies.size);
  }
  for (const select of selects) select.value = state.settings.get(select.dataset.setting) ?? "";
  const count = document.querySelector(".count");
  if (count) count.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} rows`;
  sections.forEach((section, number) => { sort(section, number); compare(section, number); });
}

function isWanted(row) {
  if (state.strategies.size && !state.strategies.has(row.dataset.strategy)) return false;
  const own = data.rows[row.id].settings;
  return [...state.settings].every(([name, value]) => `=${own[name]}` === value);
}

// ------------------------------------------------------------------------------------------- sorting

function sort(section, number) {
  const heads = [...section.querySelector(".scroll > table > thead").rows].at(-1).cells;
  const [place, column, order] = (state.sort ?? "").split(".");
  const head = +place === number ? heads[column] : undefined;
  for (const other of heads) other.removeAttribute("aria-sort");
  if (head) head.setAttribute("aria-sort", order);
  const body = section.querySelector(".scroll > table").tBodies[0];
  const value = row => head ? row.cells[column].dataset.value : row.dataset.place;
  const sign = head && order === "descending" ? -1 : 1;
  const before = (a, b) => {
    const x = value(a), y = value(b);
    if (x === "" || y === "") return (x === "") - (y === "");  // what is unknown comes last
    return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
  };
  const ours = rows.filter(row => section.contains(row)), sorted = [...ours].sort(before);
  const now = [...body.querySelectorAll(":scope > tr.row")];
  if (sorted.some((row, i) => row !== now[i])) for (const row of sorted) body.append(row, document.getElementById(`${row.id}-detail`));
}

function nextOrder(number, head) {
  const order = {descending: "ascending", ascending: undefined}[head.getAttribute("aria-sort")];
  const wanted = head.hasAttribute("aria-sort") ? order : "descending";
  state.sort = wanted && `${number}.${head.cellIndex}.${wanted}`;
}

// ----------------------------------------------------------------------------------------- comparing

function compare(section, number) {
  const panel = section.querySelector(".compare"), ids = state.compare.filter(id => section.querySelector(`#${CSS.escape(id)}`));
  const wanted = ids.join();
  if (panel.dataset.shown === wanted) return;
  panel.dataset.shown = wanted;
  panel.hidden = ids.length === 0;
  panel.replaceChildren();
  if (ids.length === 1) panel.append(element("p", {textContent: `${data.rows[ids[0]].name} is ticked: tick another row of this table to compare the two.`}));
  if (ids.length < 2) return;
  const [a, b] = ids.map(id => data.rows[id]);
  panel.append(
    element("h3", {textContent: `A: ${a.name}, B: ${b.name}`}),
    element("p", {}, element("button", {type: "button", textContent: "End the comparison", onclick: endComparison})),
    ...(a.seeds > 1 || b.seeds > 1 ? [element("p", {textContent: "Of several seeds, the first is compared."})] : []),
    element("h4", {textContent: "Layers"}), ...layers(a, b),
    element("h4", {textContent: "Settings that differ"}), settings(a, b),
    ...answers(data.sections[number], ids),
  );
}

function endComparison() {
  const first = document.getElementById(state.compare[0]);
  state.compare = [];
  update();
  first?.querySelector("input").focus();
}

function layers(a, b) {
  const strips = [["A", a], ["B", b]].flatMap(([name, row]) => {
    const strip = element("ol", {className: "plan flat"}), step = Math.max(1, Math.ceil(row.fates.length / 16));
    strip.style.gridTemplateColumns = `repeat(${row.fates.length}, minmax(0, 1fr))`;
    for (let i = 0; i < row.fates.length; i++) {
      const [fate, word] = row.fates[i];
      strip.append(element("li", {className: fate, title: `layer ${i}: ${word}`},
        element("i"), element("b"), ...(i % step ? [] : [element("small", {textContent: i})])));
    }
    return [element("p", {className: "name", textContent: `${name}: ${row.name}`}), strip];
  });
  const only = (x, y) => x.removed.filter(i => !y.removed.includes(i)).join(", ") || "none";
  const both = a.removed.filter(i => b.removed.includes(i)).join(", ") || "none";
  const text = `Removed by A only: ${only(a, b)}; by B only: ${only(b, a)}; by both: ${both}.`;
  return [...strips, element("p", {textContent: text})];
}

function settings(a, b) {
  const names = [...new Set([...Object.keys(a.settings), ...Object.keys(b.settings)])];
  const lines = names.filter(name => a.settings[name] !== b.settings[name]).map(name => [name, a.settings[name] ?? "–", b.settings[name] ?? "–"]);
  return lines.length ? table(["setting", "A", "B"], lines, "settings that differ") : element("p", {textContent: "None."});
}

function table(head, lines, name) {
  const made = element("table", {className: "small"});
  const line = (cells, tag) => element("tr", {}, ...cells.map(text => Object.assign(element(tag, {textContent: text}), tag === "th" ? {scope: "col"} : {})));
  made.append(element("thead", {}, line(head, "th")), element("tbody", {}, ...lines.map(cells => line(cells, "td"))));
  const region = element("div", {className: "scroll", tabIndex: 0}, made);
  region.setAttribute("role", "region");
  region.setAttribute("aria-label", name);
  return region;
}

function answers(tasks, ids) {
  const found = tasks.filter(task => ids.every(id => task.rows[id]));
  if (!found.length) return [element("p", {textContent: "Their answers to the same questions are not stored."})];
  const lines = found.map(task => {
    const [a, b] = ids.map(id => task.rows[id]), test = pairedTest(task, a, b);
    const share = row => `${(100 * [...row.right].filter(c => c === "1").length / row.right.length).toFixed(1)} %`;
    return [task.name, share(a), share(b), flips(a, b).length, flips(b, a).length, `${test.better} / ${test.worse}`, test.p.toPrecision(2)];
  });
  const heads = ["benchmark", "A right", "B right", "only A right", "only B right", "units better in A / B", "p (McNemar)"];
  return [element("h4", {textContent: "Paired test"}), table(heads, lines, "paired test"),
    ...found.flatMap(task => [["A", ...ids], ["B", ids[1], ids[0]]].flatMap(([name, one, other]) => cards(task, name, one, other)))];
}

function flips(one, other) {
  return [...one.right].map((c, i) => c === "1" && other.right[i] === "0" ? i : -1).filter(i => i >= 0);
}

function pairedTest(task, a, b) {
  const changes = new Map(), value = (row, i) => row.parts ? row.parts[i] : +row.right[i];
  for (let i = 0; i < a.right.length; i++) {
    const unit = task.units ? task.units[i] : i;
    changes.set(unit, (changes.get(unit) ?? 0) + value(a, i) - value(b, i));
  }
  let better = 0, worse = 0;
  for (const change of changes.values()) if (Math.abs(change) > 1e-12) change > 0 ? better++ : worse++;
  return {better, worse, p: mcnemar(better, worse)};
}

function mcnemar(better, worse) {  // two-sided exact: throws of a fair coin
  const n = better + worse, least = Math.min(better, worse);
  let term = -n * Math.LN2, sum = Math.exp(term);
  for (let i = 1; i <= least; i++) { term += Math.log((n - i + 1) / i); sum += Math.exp(term); }
  return n ? Math.min(1, 2 * sum) : 1;
}

function cards(task, name, one, other) {
  const places = flips(task.rows[one], task.rows[other]), list = element("ul", {className: "cards"});
  if (!places.length) return [];
  const [a, b] = name === "A" ? [one, other] : [other, one];
  for (const i of places.slice(0, MOST)) {
    const asked = task.questions[i], said = (who, text) => element("p", {}, element("span", {textContent: who}), ` ${text}`);
    const card = element("li", {className: name === "A" ? "gained" : "lost"});
    if (asked.image) card.append(element("img", {src: images[asked.image], alt: `image of question ${asked.number}`}));
    card.append(element("p", {textContent: asked.question}), said("expected", asked.expected),
      said("A", task.rows[a].answers[i]), said("B", task.rows[b].answers[i]));
    list.append(card);
  }
  const more = places.length > MOST ? ` The first ${MOST} of ${places.length}.` : "";
  return [element("p", {className: "way", textContent: `${task.name}: only ${name} is right.${more}`}), list];
}

// --------------------------------------------------------------------------------------------- events

function update() {
  writeAddress();
  show();
}

function toggle(id) {
  if (!state.open.delete(id)) state.open.add(id);
  update();
}

function tick(row) {
  const section = row.closest("section");
  const ticked = state.compare.filter(id => id !== row.id && section.querySelector(`#${CSS.escape(id)}`));
  state.compare = row.querySelector("input").checked ? [...ticked, row.id].slice(-2) : ticked;
  update();
  if (state.compare.length === 2) section.querySelector(".compare").scrollIntoView({block: "nearest"});
}

function download(button) {
  const text = button.dataset.text, image = button.closest("figure")?.querySelector("img");
  const href = text === undefined ? image.src : `data:text/plain;charset=utf-8,${encodeURIComponent(text)}`;
  element("a", {href, download: button.dataset.file}).click();
}

rows.forEach((row, place) => {
  row.dataset.place = place;
  row.addEventListener("click", event => { if (event.target.tagName !== "INPUT") toggle(row.id); });
  row.querySelector("input").addEventListener("change", () => tick(row));
});
sections.forEach((section, number) => {
  for (const head of [...section.querySelector(".scroll > table > thead").rows].at(-1).cells)
    head.querySelector("button").addEventListener("click", () => { nextOrder(number, head); update(); });
});
for (const chip of chips) chip.addEventListener("click", () => {
  const name = chip.dataset.strategy;
  if (!name) state.strategies.clear();
  else if (!state.strategies.delete(name)) state.strategies.add(name);
  update();
});
for (const select of selects) select.addEventListener("change", () => {
  if (select.value) state.settings.set(select.dataset.setting, select.value);
  else state.settings.delete(select.dataset.setting);
  update();
});
for (const button of document.querySelectorAll("button[data-file]")) button.addEventListener("click", () => download(button));
document.addEventListener("keydown", event => { if (event.key === "Escape" && state.compare.length) endComparison(); });

function arrive() {
  readAddress();
  show();
  const id = [...state.open][0];
  if (id) document.getElementById(id)?.scrollIntoView({block: "start"});
}
window.addEventListener("hashchange", arrive);
arrive();
const refresh = Number(document.documentElement.dataset.refresh ?? 0);  // seconds; a sweep is running
if (refresh) setTimeout(() => location.reload(), 1000 * refresh);
