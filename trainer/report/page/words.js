"use strict";
// Names and numbers of runs, and the parts that every page of runs has.

const data = readData("data");
const METRICS = {
  loss: ["Loss", "The weighted sum that is trained; its parts follow"],
  restoration: [
    "Restoration",
    "Mean squared error of restored crops; dashed: the perturbed crop itself as the answer",
  ],
  inpainting: [
    "Inpainting",
    "Mean squared error of restored crops; dashed: the perturbed crop itself as the answer",
  ],
  shuffling: [
    "Shuffling",
    "Mean squared error of restored crops; dashed: the perturbed crop itself as the answer",
  ],
  mae: [
    "Masked autoencoding",
    "Mean squared error of hidden voxels; dashed: the mean of the visible ones as the answer",
  ],
  rotation: ["Rotation", "Cross-entropy of the rotation"],
  rubik: ["Rubik's cube", "Loss of order and rotations of sub-cubes"],
  classification: ["Classification", "Cross-entropy of the class, unweighted"],
  accuracy: ["Accuracy", "Share of crops whose class is named right"],
  rotation_accuracy: ["Accuracy of rotation"],
  order_accuracy: ["Accuracy of the order"],
  rotated_accuracy: ["Accuracy of rotated sub-cubes"],
  dice: ["Dice", "Of validation patches, mean over classes"],
  iou: ["IoU", "Intersection over union of validation patches"],
  auc: ["AUC", "Area under the ROC curve"],
  learning_rate: ["Learning rate"],
};
const SHARES = new Set([
  "accuracy",
  "rotation_accuracy",
  "order_accuracy",
  "rotated_accuracy",
  "dice",
  "iou",
  "auc",
]);
const settings = (text) => text.replaceAll("_", " ");
function duration(seconds) {
  if (seconds === null || seconds === undefined) return "-";
  const s = Math.round(seconds),
    m = Math.round(s / 60);
  return s < 60
    ? `${s} s`
    : s < 3600
      ? `${Math.floor(s / 60)} min ${s % 60} s`
      : `${Math.floor(m / 60)} h ${m % 60} min`;
}
const value = (one) =>
  one === null || one === undefined
    ? "default"
    : one === true
      ? "yes"
      : one === false
        ? "no"
        : Array.isArray(one)
          ? one.join(", ") || "none"
          : String(one);

function header(title, sections) {
  const links = sections.map(([id, text]) => el("a", { href: `#${id}` }, text));
  document
    .getElementById("top")
    .replaceChildren(
      el("h1", {}, title),
      el("nav", { "aria-label": "Sections" }, links),
      el("span", { class: "spacer" }),
      el(
        "button",
        { type: "button", title: "Keys", "aria-label": "Keys", click: () => openKeys() },
        "?",
      ),
      themeButton(),
    );
}
const section = (id, title, ...parts) =>
  el(
    "section",
    { id, class: "stack", "aria-label": title },
    el("h2", {}, title),
    parts.flat(Infinity),
  );
