/** The same request as text for a terminal, for Python and for JavaScript. */

import { format, key } from "./api.js";

export const LANGUAGES = /** @type {const} */ (["curl", "python", "javascript"]);
export const TITLES = { curl: "curl", python: "Python", javascript: "JavaScript" };

/**
 * @param {"curl"|"python"|"javascript"} language
 * @param {Record<string, any>} order Fields of POST /v1/videos.
 * @param {string} [picture] Name of the file that the video begins with.
 */
export function snippet(language, order, picture = "") {
  const origin = location.origin;
  return { curl, python, javascript }[language](origin, order, picture);
}

/** @param {string} origin @param {Record<string, any>} order @param {string} picture */
function curl(origin, order, picture) {
  const head = key() ? ` \\\n  -H "Authorization: Bearer $MEDSORA_API_KEY"` : "";
  if (picture) {
    const parts = Object.entries(order).map(([name, value]) => ` \\\n  -F ${shell(`${name}=${value}`)}`);
    return `curl ${origin}/v1/videos${head}${parts.join("")} \\\n  -F ${shell(`input_reference=@${picture}`)}\n`;
  }
  return `curl ${origin}/v1/videos${head} \\\n  -H "Content-Type: application/json" \\\n  -d ${shell(format(order))}\n` +
    `# then, with the id of the answer:\n` +
    `# curl ${origin}/v1/videos/ID            until its status is completed\n` +
    `# curl -O ${origin}/v1/videos/ID/content  the MP4; ?variant=lossless, dicom or preview\n`;
}

/** Quoted for a shell. @param {string} text */
export function shell(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** @param {string} origin @param {Record<string, any>} order @param {string} picture */
function python(origin, order, picture) {
  const { prompt, model, size, ...rest } = order;
  const known = Object.entries({ prompt, model, size }).filter(([, value]) => value !== undefined);
  const more = Object.entries(rest).map(([name, value]) => `        "${name}": ${name === "seed" ? value : JSON.stringify(value)},\n`);
  const apiKey = key() ? 'os.environ["MEDSORA_API_KEY"]' : '"any"';
  return `${key() ? "import os\n\n" : ""}import openai

client = openai.OpenAI(base_url="${origin}/v1", api_key=${apiKey})
video = client.videos.create_and_poll(
${known.map(([name, value]) => `    ${name}=${JSON.stringify(value)},\n`).join("")}${
  picture ? `    input_reference=open(${JSON.stringify(picture)}, "rb"),\n` : ""}    extra_body={
${more.join("")}    },
)
if video.status != "completed":
    raise SystemExit(video.error)
client.videos.download_content(video.id).write_to_file("synthetic.mp4")
`;
}

/** @param {string} origin @param {Record<string, any>} order @param {string} picture */
function javascript(origin, order, picture) {
  const auth = key() ? "\nconst headers = { authorization: `Bearer ${process.env.MEDSORA_API_KEY}` };" : "\nconst headers = {};";
  const body = picture
    ? `const form = new FormData();
for (const [name, value] of Object.entries(${JSON.stringify(order)})) form.append(name, value);
form.append("input_reference", picture); // a Blob: ${picture}
let video = await ask("", { method: "POST", body: form });`
    : `let video = await ask("", {
  method: "POST",
  headers: { "content-type": "application/json" },
  body: ${JSON.stringify(format(order))},
});`;
  return `const videos = "${origin}/v1/videos";${auth}

async function ask(path, options = {}) {
  const answer = await fetch(videos + path, { ...options, headers: { ...headers, ...options.headers } });
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

${body}
while (video.status === "queued" || video.status === "in_progress") {
  await new Promise((resolve) => setTimeout(resolve, 500));
  video = await ask(\`/\${video.id}\`);
}
if (video.status === "failed") throw new Error(video.error.message);
const file = await (await fetch(\`\${videos}/\${video.id}/content\`, { headers })).blob();
`;
}
