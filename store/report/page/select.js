"use strict";
// Cards: which one has the keyboard, and which are selected: by key, click, range and lasso.

// Selected classes, by number.
const selected = new Set();
let anchor = null;

// The card that has the keyboard.
let current = null;
const cardOf = (label) => main.querySelector(`.card[data-label="${label}"]`);
function focusCard(label) {
  const card = cardOf(label);
  if (!card) return;
  main.querySelector(".card[tabindex='0']")?.setAttribute("tabindex", "-1");
  card.setAttribute("tabindex", "0");
  current = label;
  card.focus({ preventScroll: true });
  card.scrollIntoView({ block: "nearest" });
}
function pick(label, range = false) {
  const order = chosen().map((c) => c.label);
  if (range && anchor !== null && order.includes(anchor)) {
    const [from, to] = [order.indexOf(anchor), order.indexOf(label)].sort((a, b) => a - b);
    for (const one of order.slice(from, to + 1)) selected.add(one);
  } else {
    if (selected.has(label)) selected.delete(label);
    else selected.add(label);
    anchor = label;
  }
  showSelection();
}
function selectOnly(labels) {
  selected.clear();
  for (const label of labels) selected.add(label);
  showSelection();
}
function showSelection() {
  for (const card of main.querySelectorAll(".card")) {
    const on = selected.has(Number(card.dataset.label));
    card.setAttribute("aria-selected", String(on));
    card.querySelector(".pick").checked = on;
  }
  const bar = document.getElementById("selection");
  if (!bar) return;
  bar.hidden = !selected.size;
  if (!selected.size) return;
  const labels = [...selected];
  bar.replaceChildren(
    el("b", {}, `${selected.size} selected`),
    ...(data.live ? batchButtons(labels) : []),
    el(
      "button",
      {
        type: "button",
        disabled: labels.length !== 2,
        title: "Two classes side by side (key c)",
        click: compareSelected,
      },
      "Compare",
    ),
    el("button", { type: "button", click: () => selectOnly([]) }, "Clear"),
  );
}
function compareSelected() {
  if (selected.size === 2) location.hash = `#/compare/${[...selected].join("/")}`;
  else toast("Select two classes to compare them.");
}

// Move the keyboard on the grid of cards; with `extend`, select what is passed.
function step(across, down, extend) {
  const cards = [...main.querySelectorAll(".card")],
    at = cards.findIndex((card) => Number(card.dataset.label) === current);
  if (!cards.length) return;
  const columns = cards.filter((card) => card.offsetTop === cards[0].offsetTop).length;
  const next = at < 0 ? 0 : Math.max(0, Math.min(cards.length - 1, at + across + down * columns)),
    label = Number(cards[next].dataset.label);
  if (extend) {
    if (current !== null && !selected.has(current)) pick(current);
    for (let i = Math.min(at, next); i <= Math.max(at, next); i++)
      selected.add(Number(cards[i].dataset.label));
    showSelection();
  }
  focusCard(label);
}

// Drag over the space between cards to select several.
function lassoCards(list) {
  let start = null,
    box = null;
  list.addEventListener("pointerdown", (event) => {
    if (event.button || event.target !== list) return;
    start = [event.pageX, event.pageY];
    box = el("div", { class: "lasso" });
    document.body.append(box);
    list.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  list.addEventListener("pointermove", (event) => {
    if (!box) return;
    const [left, right] = [start[0], event.pageX].sort((a, b) => a - b),
      [top, bottom] = [start[1], event.pageY].sort((a, b) => a - b);
    Object.assign(box.style, {
      left: `${left}px`,
      top: `${top}px`,
      width: `${right - left}px`,
      height: `${bottom - top}px`,
    });
    box.area = { left, right, top, bottom };
  });
  list.addEventListener("pointerup", (event) => {
    if (!box) return;
    const { left, right, top, bottom } = box.area ?? { left: 0, right: -1, top: 0, bottom: -1 };
    box.remove();
    box = null;
    const hit = [...list.children]
      .filter((card) => {
        const r = card.getBoundingClientRect();
        return (
          r.left + scrollX < right &&
          r.right + scrollX > left &&
          r.top + scrollY < bottom &&
          r.bottom + scrollY > top
        );
      })
      .map((card) => Number(card.dataset.label));
    selectOnly(event.shiftKey ? [...selected, ...hit] : hit);
  });
}
