"use strict";
// A member's crop within its scan, in three planes and as a volume. NiiVue is loaded when first asked for.

let niivueLoading = null;
const loadNiivue = () =>
  (niivueLoading ??= new Promise((done, fail) => {
    const stop = () => {
      niivueLoading = null;
      fail(new Error("the server does not send the viewer"));
    };
    document.head.append(
      el("script", {
        src: "niivue.js",
        load: () => (window.niivue ? done(window.niivue) : stop()),
        error: stop,
      }),
    );
  }));

// What a view loads, the background first. Over its scan, the crop is coloured.
const scanVolume = ({ scan }) => ({
  url: `volume/scan-${scan}.nii`,
  name: "scan.nii",
  colormap: "gray",
});
const cropVolume = ({ split, row }, colormap) => ({
  url: `volume/${split}-${row}.nii`,
  name: "crop.nii",
  colormap,
});
const VIEWS_3D = {
  scan: [
    "In its scan",
    "The crop, coloured, within a coarse picture of the scan",
    (member) => [scanVolume(member), { ...cropVolume(member, "copper"), opacity: 0.8 }],
  ],
  crop: ["Crop alone", "The crop with all of its voxels", (member) => [cropVolume(member, "gray")]],
};

const CROSSHAIR_PIXELS = 2.5;

// The centre of a volume: mm to the right, front and head.
function centreOf({ hdr }) {
  const middle = [1, 2, 3].map((axis) => (hdr.dims[axis] - 1) / 2);
  return hdr.affine
    .slice(0, 3)
    .map((line) => line[3] + middle.reduce((sum, at, axis) => sum + at * line[axis], 0));
}

async function openViewer(label, member) {
  const canvas = el("canvas", { tabindex: 0, "aria-label": "Three planes and a volume" });
  const status = el("output", { class: "soft small" }, "Loading …");
  let viewer = null,
    view = recall("view-3d", "scan"),
    chosenWindow = shown.window || autoWindow(data.classes[label]);
  if (!VIEWS_3D[view]) view = "scan";

  function setWindow(chosen) {
    chosenWindow = Number(chosen);
    windows.choose(chosenWindow);
    const [, low, high] = WINDOWS[chosenWindow];
    for (const volume of viewer?.volumes ?? []) {
      volume.cal_min = low;
      volume.cal_max = high;
    }
    viewer?.updateGLVolume();
  }
  async function load() {
    status.value = "Loading …";
    delete canvas.dataset.drawn;
    await viewer.loadVolumes(VIEWS_3D[view][2](member));
    if (!viewer) return;
    viewer.scene.crosshairPos = viewer.mm2frac(centreOf(viewer.volumes.at(-1)));
    setWindow(chosenWindow);
    const {
      fovMM: [mm],
      leftTopWidthHeight: [, , pixels],
    } = viewer.screenSlices.find((slice) => slice.axCorSag === 0);
    viewer.setCrosshairWidth((CROSSHAIR_PIXELS * Math.abs(mm)) / pixels); // a thinner one would vanish in places
    viewer.createOnLocationChange();
    canvas.dataset.drawn = view;
  }
  function tell({ mm: [right, front, head], values }) {
    const hu = values.at(-1)?.value;
    status.value = `${number(-right, 1)} mm to the left, ${number(-front, 1)} mm to the back, ${number(head, 1)} mm to the head from the scan's first voxel${Number.isFinite(hu) ? `: ${Math.round(hu)} HU` : ""}`;
  }
  const numbered = WINDOWS.map(([name, low, high], i) => [
    i,
    name,
    `${low} to ${high} HU (key ${i})`,
  ]).slice(1); // without "Auto"
  const windows = choice("Window", numbered, chosenWindow, setWindow);
  const windowKeys = Object.fromEntries(
    numbered.map(([i, name]) => [i, [`Window: ${name}`, () => setWindow(i)]]),
  );
  const attempt = async (action) => {
    try {
      await action();
    } catch (error) {
      status.value = `Not shown: ${error.message}. The viewer needs WebGL 2.`;
    }
  };

  const box = openDialog(
    `Class ${label} in 3-D: scan ${data.scans[member.scan].id}`,
    [
      el(
        "div",
        { class: "row" },
        choice(
          "View",
          Object.entries(VIEWS_3D).map(([key, [text, hint]]) => [key, text, hint]),
          view,
          (chosen) => {
            view = chosen;
            remember("view-3d", view);
            attempt(load);
          },
        ),
        windows,
      ),
      el(
        "div",
        { style: "width: min(88vw, 1200px); height: min(70vh, 900px); background: #000" },
        canvas,
      ),
      status,
      el(
        "p",
        { class: "soft small" },
        "Drag: move the crosshair, turn the volume. Wheel: next slice. Drag with the right button: change the window. S and I: head and feet.",
      ),
    ],
    windowKeys,
    { id: "viewer" },
  );
  box.addEventListener("close", () => {
    viewer?.cleanup();
    viewer?.gl.getExtension("WEBGL_lose_context")?.loseContext(); // a page may have only a few
    viewer = null;
  });
  await attempt(async () => {
    const { Niivue, SHOW_RENDER } = await loadNiivue();
    if (!box.open) return;
    viewer = new Niivue({
      isRadiologicalConvention: true,
      sagittalNoseLeft: true,
      multiplanarShowRender: SHOW_RENDER.ALWAYS,
      show3Dcrosshair: true,
      showAllOrientationMarkers: true,
      fontColor: [0.15, 0.6, 1, 1],
      multiplanarPadPixels: 16,
      crosshairColor: [1, 0.75, 0.1, 1],
      crosshairWidthUnit: "mm",
      dragAndDropEnabled: false,
      loadingText: "",
      logLevel: "error",
    });
    viewer.onLocationChange = tell;
    await viewer.attachToCanvas(canvas);
    box.viewer = viewer;
    await load();
  });
}
