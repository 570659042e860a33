// The page: a client of the server's API. It keeps its settings in the address, and its pictures in the browser.

const $ = (id) => document.getElementById(id);
const KEPT = 60;  // pictures of the history
const fields = ["layout", "prompt", "negative", "guidance", "scale", "sampler", "steps", "size", "seed", "count"];
let base, models = [], problems = [], expected = {}, drawing = null;

// ---- The API ---------------------------------------------------------------------------------------------------

// Seeds have up to 63 bits, more than a number of JavaScript: here they are texts, and in requests numbers.
const asJson = (value) => JSON.stringify(value).replace(/"seed":"(\d+)"/g, '"seed":$1');
const fromJson = (text) => JSON.parse(text.replace(/"seed": ?(\d+)/g, '"seed":"$1"'));

async function ask(path, options = {}) {
  const token = localStorage.getItem("token");
  const headers = { ...(options.body && { "Content-Type": "application/json" }), ...(token && { Authorization: `Bearer ${token}` }) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  if (answer.status === 401) { await login(); return ask(path, options); }
  const { error } = await answer.json().catch(() => ({ error: { message: `the server answers ${answer.status}` } }));
  throw new Error(error.message);
}

function login() {
  return new Promise((done) => {
    $("login").addEventListener("close", () => { localStorage.setItem("token", $("token").value); done(); }, { once: true });
    $("login").showModal();
  });
}

// ---- Adapters and classes --------------------------------------------------------------------------------------

async function list() {
  const listing = await (await ask("v1/models")).json();
  [base, ...models] = listing.data;
  problems = listing.problems;
  $("base").textContent = base.id;
  const row = (...cells) => {
    const line = document.createElement("tr");
    line.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text ?? "" })));
    return line;
  };
  const draws = (model) => model.prompt ?? model.trigger ?? model.classes?.join(", ").slice(0, 200) ?? "what the base draws";
  $("listing").replaceChildren(
    ...models.map((m) => row(m.id, m.method, m.dataset, draws(m), m.num_params.toLocaleString("en"), "fits")),
    ...problems.map((p) => row(p.id, "", "", "", "", p.problem)));
  for (const select of document.querySelectorAll("#adapters select")) fill(select, models.map((m) => m.id), select.value);
}

function fill(select, names, chosen, values = names) {
  select.replaceChildren(...names.map((name, index) => new Option(name, values[index])));
  if (chosen != null) select.value = chosen;
  if (select.selectedIndex < 0) select.selectedIndex = 0;
}

function addAdapter(name = models.find((m) => !(m.id in weights()))?.id, weight = 1) {
  const item = document.createElement("li");
  item.innerHTML = `<label>Adapter <select></select></label>
    <label>Weight <input type="number" min="-10" max="10" step="any" required></label>
    <button type="button" aria-label="Remove this adapter">×</button>
    <input type="range" min="-2" max="2" step="0.05" aria-label="Weight">`;
  const [select, number, remove, range] = item.querySelectorAll("select, input, button");
  fill(select, [...new Set([...models.map((m) => m.id), ...(name ? [name] : [])])], name);
  number.value = range.value = weight;
  range.addEventListener("input", () => { number.value = range.value; });
  number.addEventListener("input", () => { range.value = number.value; });
  remove.addEventListener("click", () => { item.remove(); changed(); });
  $("adapters").append(item);
}

function weights() {
  const found = {};
  for (const item of document.querySelectorAll("#adapters li")) {
    const name = item.querySelector("select").value;
    if (name) found[name] = (found[name] ?? 0) + Number(item.querySelector("input[type=number]").value);
  }
  return found;
}

// The classes that a mixture draws: those of its last adapter that brought some, or the base's.
function classesOf(mixture) {
  const own = Object.keys(mixture).reverse().map((name) => mixture[name] !== 0 && models.find((m) => m.id === name)?.classes);
  return own.find(Boolean) ?? base.classes;
}

// The strength of guidance that all adapters of a mixture were trained for, or the base's.
function scaleOf(mixture) {
  const own = Object.keys(mixture).filter((name) => mixture[name] !== 0).map((name) => models.find((m) => m.id === name)?.guidance_scale);
  return own.length && own.every(Boolean) ? own[0] : base.guidance_scale;
}

// Shows the mixture's scale of guidance, lists its classes and chooses one: that of the label, or else that of the name
// that was chosen before.
function listClasses(label = null) {
  $("scale").placeholder = scaleOf(weights());
  if (base.condition !== "class") return;
  const before = $("class").selectedOptions[0]?.textContent, classes = classesOf(weights());
  fill($("class"), classes, label ?? Math.max(0, classes.indexOf(before)), classes.map((_, index) => index));
}

// ---- Settings: in the address, and those of a picture -----------------------------------------------------------

function changed() {
  listClasses();
  const query = new URLSearchParams(fields.map((id) => [id, $(id).value]));
  if (base.condition === "class") query.set("class", $("class").value);
  if ($("lock").checked) query.set("lock", "1");
  for (const [name, weight] of Object.entries(weights())) query.append("adapter", `${weight}:${name}`);
  history.replaceState(null, "", `#${query}`);
}

function fromAddress() {
  const query = new URLSearchParams(location.hash.slice(1));
  for (const id of fields) if (query.get(id) != null) $(id).value = query.get(id);
  $("lock").checked = query.has("lock");
  $("adapters").replaceChildren();
  const chosen = query.getAll("adapter").map((text) => [text.slice(text.indexOf(":") + 1), parseFloat(text)]);
  for (const [name, weight] of chosen) addAdapter(name, weight);
  if (!query.size && models.length) addAdapter();
  listClasses(query.get("class"));
}

function use({ base: drawnBy, digests, request }) {
  if (drawnBy !== base.id) return tell(`the picture is of the base ${drawnBy}, and this is ${base.id}`, true);
  expected = digests ?? {};
  $("adapters").replaceChildren();
  for (const [name, weight] of Object.entries(request.adapters)) addAdapter(name, weight);
  const values = { layout: "one", count: 1, seed: request.seed, guidance: request.guidance, scale: request.guidance_scale,
    sampler: request.sampler ?? "", steps: request.num_inference_steps, size: request.size ?? base.size,
    negative: request.negative_prompt ?? "" };
  if (base.condition === "prompt") values.prompt = request.subject;
  for (const [id, value] of Object.entries(values)) $(id).value = value;
  $("lock").checked = true;
  listClasses(request.subject);
  changed();
  tell("the settings are those of the picture");
  $("ask").scrollIntoView();
}

// The text chunk of a PNG, which is Latin-1: a length, a name, the content and a checksum for each chunk.
async function restore(file) {
  const bytes = new DataView(await file.arrayBuffer()), text = new TextDecoder("latin1");
  const part = (at, length) => text.decode(new Uint8Array(bytes.buffer, at, length));
  try {
    for (let at = 8; part(0, 8).slice(1, 4) === "PNG"; at += bytes.getUint32(at) + 12)
      if (part(at + 4, 4) === "tEXt" && part(at + 8, 8) === "onelora\0")
        return use(fromJson(part(at + 16, bytes.getUint32(at) - 8)));
  } catch { /* it ends without settings */ }
  tell(`${file.name} has no settings of a picture in it: give a PNG that was saved here, as it was saved`, true);
}

// ---- Drawing ---------------------------------------------------------------------------------------------------

// [caption, adapters, seed] of each picture that is asked for.
function wanted() {
  const mixture = weights(), names = Object.keys(mixture), seed = BigInt($("seed").value);
  const alone = (name) => ({ [name]: mixture[name] });
  if ($("layout").value === "beside")
    return [["base", {}, seed], ...names.map((name) => [name, alone(name), seed]), ...(names.length > 1 ? [["all", mixture, seed]] : [])];
  if ($("layout").value === "grid") return models.slice(0, 64).map((m) => [m.id, { [m.id]: 1 }, seed]);
  const count = Number($("count").value);
  if ($("layout").value === "one")
    return Array.from({ length: count }, (_, index) => [`seed ${seed + BigInt(index)}`, mixture, seed + BigInt(index)]);
  if (names.length !== 2) throw new Error("a strip leads from one adapter to another: choose two");
  const last = (count > 1 ? count : 5) - 1;
  return Array.from({ length: last + 1 }, (_, index) => index / last).map((share) =>
    [`${names[1]} ${share.toFixed(2)}`, { [names[0]]: 1 - share, [names[1]]: share }, seed]);
}

// The class of the chosen name, or of the chosen number where these adapters have none of that name.
function subjectOf(mixture) {
  if (base.condition !== "class") return [$("prompt").value, ""];
  const classes = classesOf(mixture), name = $("class").selectedOptions[0].textContent;
  const label = classes.indexOf(name) >= 0 ? classes.indexOf(name) : Number($("class").value) % classes.length;
  return [label, classes[label] === name ? "" : `: ${classes[label]}`];
}

async function draw() {
  if (!$("lock").checked) $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  changed();
  const began = performance.now(), warnings = new Set();
  drawing = new AbortController();
  busy(true);
  try {
    const shown = wanted().map(([caption, adapters, seed]) => {
      const [subject, name] = subjectOf(adapters);
      const request = { subject, adapters, seed: String(seed), guidance: Object.keys(adapters).length ? $("guidance").value : "cfg",
        guidance_scale: Number($("scale").value || scaleOf(adapters)), num_inference_steps: Number($("steps").value), size: Number($("size").value),
        ...($("sampler").value && { sampler: $("sampler").value }), ...($("negative").value && { negative_prompt: $("negative").value }) };
      return { caption: caption + name, request };
    });
    const body = asJson({ pictures: shown.map((one) => one.request), digests: expected });
    const answer = await ask("v1/pictures", { method: "POST", body, signal: drawing.signal });
    const figures = shown.map(() => document.createElement("figure"));
    $("results").replaceChildren(...figures);
    $("results").classList.toggle("single", figures.length === 1);
    for await (const event of lines(answer.body)) {
      if (event.error && event.index == null) throw new Error(event.error.message);
      for (const text of event.error ? [event.error.message] : event.warnings ?? []) warnings.add(text);
      if (event.error) figures[event.index].textContent = "not drawn";
      else if (event.b64_json) {
        const picture = { time: Date.now(), caption: shown[event.index].caption, settings: event.settings, png: blobOf(event.b64_json) };
        show(figures[event.index], picture);
        await keep(picture);
      } else {
        $("progress").value = event.progress;
        tell(event.place ? `place ${event.place} in the queue` : `drawing: ${Math.round(100 * event.progress)}%`);
      }
    }
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    tell([`${shown.length} drawn in ${seconds} s`, ...warnings].join("; "), warnings.size > 0);
  } catch (error) {
    drawing.abort();
    tell(error.name === "AbortError" ? "cancelled" : error.message, error.name !== "AbortError");
  }
  drawing = null;
  busy(false);
  await showHistory();
}

async function* lines(stream) {
  let rest = "";
  for (const reader = stream.pipeThrough(new TextDecoderStream()).getReader(); ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const line of parts) yield fromJson(line);
  }
}

const blobOf = (text) => new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], { type: "image/png" });

function busy(is) {
  $("draw").disabled = is;
  $("cancel").disabled = $("progress").hidden = !is;
  $("progress").value = 0;
  if (is) tell("asking");
}

function tell(text, isWrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", isWrong);
}

function titleOf({ request }) {
  const names = Object.entries(request.adapters).map(([name, weight]) => (weight === 1 ? name : `${name} ${+weight.toFixed(3)}`));
  const subject = typeof request.subject === "number" ? classesOf(request.adapters)[request.subject] ?? request.subject : request.subject;
  return { subject: String(subject), by: names.join(" + ") || "the base", seed: String(request.seed) };
}

function show(figure, picture) {
  const { subject, by, seed } = titleOf(picture.settings), url = URL.createObjectURL(picture.png);
  const image = Object.assign(new Image(), { src: url, alt: `${subject}, drawn by ${by} with seed ${seed}` });
  const file = [subject, by, seed].map((part) => part.replace(/[^\p{L}\p{N}.+-]+/gu, "-").slice(0, 60)).join("_");
  const save = Object.assign(document.createElement("a"), { href: url, download: `${file}.png`, textContent: "Save" });
  const again = Object.assign(document.createElement("button"), { type: "button", textContent: "Use its settings" });
  again.addEventListener("click", () => use(picture.settings));
  const caption = document.createElement("figcaption"), name = document.createElement("div");
  name.textContent = picture.caption;
  name.title = image.alt;
  caption.append(name, save, " ", again);
  figure.classList.toggle("small", picture.settings.request.size < 128);
  figure.replaceChildren(image, caption);
  return figure;
}

// ---- History, in the browser's database ------------------------------------------------------------------------

function stored(mode, work) {
  return new Promise((done, failed) => {
    const opening = indexedDB.open("onelora", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("pictures", { autoIncrement: true });
    opening.onerror = () => failed(opening.error);
    opening.onsuccess = () => {
      const transaction = opening.result.transaction("pictures", mode);
      const result = work(transaction.objectStore("pictures"));
      transaction.oncomplete = () => { opening.result.close(); done(result?.result); };
      transaction.onerror = () => failed(transaction.error);
    };
  });
}

async function keep(picture) {
  await stored("readwrite", (store) => {
    store.add(picture);
    const keys = store.getAllKeys();
    keys.onsuccess = () => keys.result.slice(0, -KEPT).forEach((key) => store.delete(key));
  }).catch(() => {});  // a private window may keep nothing
}

async function showHistory() {
  const pictures = await stored("readonly", (store) => store.getAll()).catch(() => []);
  $("history").replaceChildren(...pictures.reverse().map((picture) => show(document.createElement("figure"), picture)));
}

// ---- Start -----------------------------------------------------------------------------------------------------

async function start() {
  await list();
  const isClass = base.condition === "class";
  $("class-label").hidden = !isClass;
  $("prompt-label").hidden = isClass;
  $("prompt").required = !isClass;
  $("negative-label").hidden = !base.takes_negative_prompts;
  fill($("sampler"), base.samplers.length ? base.samplers : ["the pipeline's own"], null, base.samplers.length ? base.samplers : [""]);
  $("sampler-label").hidden = base.samplers.length < 2;
  Object.assign($("steps"), { max: base.max_steps, value: Math.min(25, base.max_steps) });
  Object.assign($("size"), { max: base.size, value: base.size });
  $("seed").value = 0;
  fromAddress();
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!drawing) draw();
  });
  $("cancel").addEventListener("click", () => drawing?.abort());
  $("add").addEventListener("click", () => { addAdapter(); changed(); });
  $("refresh").addEventListener("click", () => list().then(changed).catch((error) => tell(error.message, true)));
  $("forget").addEventListener("click", () => stored("readwrite", (store) => store.clear()).then(showHistory));
  $("restore").addEventListener("change", (event) => { restore(event.target.files[0]); event.target.value = ""; });
  $("form").addEventListener("input", changed);
  addEventListener("hashchange", fromAddress);
  addEventListener("keydown", (event) => { if (event.key === "Escape") drawing?.abort(); });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => { event.preventDefault(); if (event.dataTransfer.files[0]) restore(event.dataTransfer.files[0]); });
  await showHistory();
}

start().catch((error) => tell(error.message, true));
