"use strict";
// The header, and which view is shown: #/, #/class/3, #/compare/3/7, #/scans.

const VIEWS = [
  ["#/", "Classes", ["", "class", "compare"]],
  ["#/scans", "Scans", ["scans"]],
];
document.getElementById("top").append(
  el("h1", {}, el("a", { href: "#/" }, "Discovered classes")),
  el(
    "nav",
    { "aria-label": "Views" },
    VIEWS.map(([href, text]) => el("a", { href }, text)),
  ),
  el(
    "span",
    { class: "spacer row" },
    el(
      "span",
      { class: "soft small wide-only" },
      "Radiological view: the patient's left is on the right",
    ),
    windowChoice,
    el(
      "button",
      {
        type: "button",
        title: "Keys and terms (key ?)",
        "aria-label": "Keys and terms",
        click: () => openHelp(),
      },
      "?",
    ),
    themeButton(),
  ),
);
const openHelp = () =>
  openKeys([
    el("h3", {}, "Terms"),
    facts(Object.entries(TERMS)),
    el("h3", {}, "Letters on the pictures"),
    el(
      "p",
      {},
      "R and L: the patient's right and left; A and P: front and back; H and F: head and feet.",
    ),
  ]);
keys.shared["?"] = ["Show keys and terms", openHelp];

let lastWall = 0;
function route() {
  if (typing(document.activeElement)) document.activeElement.blur(); // saves what was typed
  const [, page = "", first, second] = location.hash.split("/");
  for (const dialog of document.querySelectorAll("dialog")) dialog.close();
  VIEWS.forEach(([, , pages], i) => {
    const link = document.querySelectorAll("#top nav a")[i];
    if (pages.includes(page)) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  });
  sheetsShown = [];
  main.dataset.page = page || "wall";
  if (page === "class") showClass(Number(first));
  else if (page === "compare") compare(Number(first), Number(second));
  else if (page === "scans") scans();
  else wall();
}
addEventListener("hashchange", ({ oldURL, newURL }) => {
  const onWall = (url) => ["", "#/"].includes(new URL(url).hash);
  if (onWall(oldURL)) lastWall = scrollY;
  route();
  if (onWall(newURL)) {
    scrollTo(0, lastWall);
    if (current !== null) focusCard(current);
  } else {
    scrollTo(0, 0);
    main.focus({ preventScroll: true });
  }
});
let resizing = 0,
  wide = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === wide || document.querySelector("dialog[open]")) return;
  wide = innerWidth;
  clearTimeout(resizing);
  resizing = setTimeout(route, 200);
});
addEventListener("beforeprint", () => {
  for (const canvas of document.querySelectorAll("canvas")) if (canvas.stale) draw(canvas);
});
route();
