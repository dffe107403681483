"use strict";
// What every page needs: elements, numbers, settings that stay, keys, dialogs, short messages.

const main = document.getElementById("main");
const readData = (name) => JSON.parse(document.getElementById(name).textContent);

const SVG = new Set([
  "svg",
  "g",
  "path",
  "circle",
  "rect",
  "line",
  "polyline",
  "polygon",
  "text",
  "title",
]);
// An element with attributes, properties (named .value), listeners (functions) and children; text is never parsed as HTML.
function el(name, attributes = {}, ...children) {
  const node = SVG.has(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  node.append(
    ...children
      .flat(Infinity)
      .filter((child) => child !== null && child !== undefined && child !== false),
  );
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (key.startsWith(".")) node[key.slice(1)] = value;
    else if (value !== null && value !== undefined && value !== false)
      node.setAttribute(key, value === true ? "" : value);
  }
  return node;
}
const show = (...parts) => main.replaceChildren(...parts.flat(Infinity).filter((part) => part));

// Numbers as people read them; never "-0.00".
function number(value, digits = 2) {
  if (value === null || value === undefined || Number.isNaN(value)) return "-";
  const text = value.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text;
}
const percent = (share) => `${Math.round(100 * share)} %`;
const count = (value) => value.toLocaleString("en");
const plural = (value, word, words = `${word}s`) => `${count(value)} ${value === 1 ? word : words}`;
const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b),
    half = sorted.length >> 1;
  return sorted.length
    ? sorted.length % 2
      ? sorted[half]
      : (sorted[half - 1] + sorted[half]) / 2
    : null;
};

// A word with its meaning, shown when pointed at or focused.
const term = (word, meaning) => el("abbr", { title: meaning, tabindex: 0 }, word);
function table(head, rows, numbers = []) {
  const cell = (kind, value, i) =>
    el(
      kind,
      { class: numbers.includes(i) ? "number" : null },
      value instanceof Node ? value : String(value),
    );
  return el(
    "div",
    { class: "scroll" },
    el(
      "table",
      {},
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          head.map((h, i) => cell("th", h, i)),
        ),
      ),
      el(
        "tbody",
        {},
        rows.map((row) =>
          el(
            "tr",
            {},
            row.map((value, i) => cell("td", value, i)),
          ),
        ),
      ),
    ),
  );
}
const facts = (pairs) =>
  el(
    "dl",
    { class: "facts" },
    pairs.filter(Boolean).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]),
  );
// Buttons of which one is chosen. `options`: [value, text, hint].
function choice(label, options, chosen, change) {
  const group = el(
    "span",
    { class: "choice", role: "radiogroup", "aria-label": label },
    options.map(([value, text, hint]) =>
      el(
        "button",
        {
          type: "button",
          role: "radio",
          title: hint,
          "data-value": value,
          "aria-checked": String(value === chosen),
          click: () => {
            group.choose(value);
            change(value);
          },
        },
        text,
      ),
    ),
  );
  group.choose = (value) => {
    for (const button of group.children)
      button.setAttribute("aria-checked", String(button.dataset.value === String(value)));
  };
  return group;
}
function select(label, options, chosen, change, attributes = {}) {
  const node = el(
    "select",
    { ...attributes, change: () => change(node.value) },
    Object.entries(options).map(([value, text]) => el("option", { value }, text)),
  );
  node.value = chosen;
  return el("label", {}, `${label} `, node);
}

// What a reader chose, kept until the next visit where the browser allows it.
function remember(key, value) {
  try {
    localStorage.setItem(`semgen.${key}`, JSON.stringify(value));
  } catch {
    /* private window */
  }
}
function recall(key, fallback) {
  try {
    return JSON.parse(localStorage.getItem(`semgen.${key}`)) ?? fallback;
  } catch {
    return fallback;
  }
}

// Theme: that of the system, or the chosen one.
const root = document.documentElement;
function setTheme(theme) {
  if (theme === "auto") delete root.dataset.theme;
  else root.dataset.theme = theme;
  remember("theme", theme);
  dispatchEvent(new Event("themechange"));
}
setTheme(recall("theme", "auto"));
const isDark = () =>
  root.dataset.theme === "dark" ||
  (root.dataset.theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
const themeButton = () =>
  el(
    "button",
    {
      type: "button",
      title: "Light or dark",
      "aria-label": "Light or dark",
      click: () => setTheme(isDark() ? "light" : "dark"),
    },
    "◐",
  );

// Keys of the present view: {key: [what it does, function]}; `shared` ones hold in every view and in dialogs.
// A key is as in KeyboardEvent.key, with "Ctrl+" or "Shift+" before it where needed.
const keys = { shared: {}, view: {} };
const typing = (node) =>
  node.matches?.("textarea, select, input:not([type=checkbox], [type=range], [type=radio])");
addEventListener("keydown", (event) => {
  if (event.altKey) return;
  const key = `${event.ctrlKey || event.metaKey ? "Ctrl+" : ""}${event.shiftKey && event.key.length > 1 ? "Shift+" : ""}${event.key}`;
  if (typing(event.target)) {
    if (event.key === "Escape" || (event.key === "Enter" && event.target.matches("input"))) {
      event.target.blur();
      main.focus({ preventScroll: true });
      event.preventDefault();
    }
    return;
  }
  if (
    (event.key === "Enter" || event.key === " ") &&
    event.target.matches("button, a, summary, input")
  )
    return;
  const dialog = [...document.querySelectorAll("dialog[open]")].at(-1);
  const own = dialog ? (dialog.keys ?? {}) : keys.view;
  const found = own[key] ?? keys.shared[key];
  if (!found) return;
  event.preventDefault();
  found[1](event);
});
// A dialog over the page; Escape closes it and nothing else.
function openDialog(title, content, ownKeys = {}, attributes = {}) {
  const box = el(
    "dialog",
    {
      "aria-label": title,
      close: () => box.remove(),
      click: (event) => {
        if (event.target === box) box.close();
      },
      ...attributes,
    },
    el(
      "header",
      {},
      el("h2", {}, title),
      el("button", { type: "button", "data-close": true, click: () => box.close() }, "Close"),
    ),
    content,
  );
  box.keys = { ...ownKeys, Escape: ["Close", () => box.close()] };
  document.body.append(box);
  box.showModal();
  return box;
}
const NAMES = {
  ArrowLeft: "←",
  ArrowRight: "→",
  ArrowUp: "↑",
  ArrowDown: "↓",
  " ": "Space",
  Escape: "Esc",
};
const keyName = (key) =>
  key
    .split("+")
    .map((part) => NAMES[part] ?? part)
    .join(" + ") || key;
function openKeys(more = []) {
  const list = (named) =>
    Object.entries(named)
      .filter(([, [text]]) => text)
      .flatMap(([key, [text]]) => [el("dt", {}, el("kbd", {}, keyName(key))), el("dd", {}, text)]);
  openDialog("Keys", [el("dl", { class: "keys" }, list(keys.view), list(keys.shared)), more]);
}
keys.shared["?"] = ["Show the keys", () => openKeys()];

// A short message; an error stays until it is closed.
function toast(text, { error = false, action = null } = {}) {
  const box = el(
    "div",
    { class: `toast${error ? " error" : ""}` },
    text,
    action &&
      el(
        "button",
        {
          type: "button",
          click: () => {
            box.remove();
            action[1]();
          },
        },
        action[0],
      ),
    error && el("button", { type: "button", click: () => box.remove() }, "Close"),
  );
  const boxes = document.getElementById("toasts");
  while (boxes.children.length > 2) boxes.firstChild.remove();
  boxes.append(box);
  if (!error) setTimeout(() => box.remove(), 5000);
}
