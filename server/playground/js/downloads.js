/** Files of a video, onto the disk of whoever looks. */

import { ask } from "./api.js";
import { button, el, problemText, tell } from "./dom.js";

const FORMS = [
  { variant: "video", title: "MP4", about: "H.264, for viewing" },
  { variant: "lossless", title: "Lossless", about: "FFV1 in Matroska, exact to the bit" },
  { variant: "dicom", title: "DICOM", about: "Multi-frame, exact to the bit, Synthetic Data YES" },
  { variant: "preview", title: "WebP", about: "Animated picture that loops" },
];

/** A button for each form of a completed video. @param {string} videoId */
export function downloadButtons(videoId) {
  return el("div", { class: "row", role: "group", "aria-label": "Download" }, ...FORMS.map(({ variant, title, about }) => {
    const one = button(title, async () => {
      one.disabled = true;
      await save(`/v1/videos/${videoId}/content?variant=${variant}`);
      one.disabled = false;
    }, { title: about, "aria-label": `Download ${title}: ${about}`, dataset: { variant } });
    return one;
  }));
}

/** Fetch a file, with the key where there is one, and hand it to the browser as a download. @param {string} path */
export async function save(path) {
  try {
    const answer = await ask(path);
    const name = /filename="([^"]+)"/.exec(answer.headers.get("content-disposition") ?? "")?.[1] ?? "synthetic";
    const url = URL.createObjectURL(await answer.blob());
    el("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  } catch (error) {
    tell(problemText(error), "wrong");
  }
}
