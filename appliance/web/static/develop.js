// The Develop page, made live. Every state is the server's and every sentence too; this shows them as they change.
// Without this file the same forms work by themselves. It stores nothing, and puts no word in an address.

const at = (id) => document.getElementById(id);
const easel = at("easel"), shown = at("shown"), order = at("order"), prompt = at("prompt"), strip = at("strip");
const POLL = 1500;          // milliseconds between questions where there is no stream
const STOPPING = "Stopping after this step …";
const PAUSE = 400;          // milliseconds without a key before the draft is kept

let watched = easel.dataset.job || null;     // the job that is followed
let source = null, poll = 0, quarter = -1, stopping = null;

// ── Asking ──────────────────────────────────────────────────────────────────

async function ask(url, form, extra = {}) {
  const body = form && new URLSearchParams(new FormData(form));
  const answer = await fetch(url, { method: body ? "POST" : "GET", body, headers: { Accept: "application/json" }, ...extra });
  const said = await answer.json();
  if (said?.csrf) for (const field of document.querySelectorAll("input[name=csrf]")) field.value = said.csrf;
  if (!answer.ok) throw Object.assign(new Error(said.error), { said, status: answer.status });
  return said;
}

function sentence(text) {
  return text ? text[0].toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? "" : ".") : "";
}

function complain(error) {
  const said = error.said ?? {
    message: "Darkroom does not answer",
    hint: "It may have been closed, and then its pictures are gone. What you wrote is still here: try again in a moment",
  };
  at("problem-what").textContent = sentence(said.message);
  at("problem-next").textContent = sentence(said.hint);
  at("problem").hidden = false;
  const field = order.elements[said.error] ?? (said.error?.startsWith("prompt") ? prompt : null);
  if (field instanceof HTMLElement) {
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-errormessage", "problem-what");
    if (at("more").contains(field)) at("more").open = true;
    field.focus();
  }
  at("problem").scrollIntoView({ block: "nearest" });
}

function settle() {
  at("problem").hidden = true;
  for (const field of order.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

// ── Showing ─────────────────────────────────────────────────────────────────

// The new image is decoded before it takes the old one's place, so that the frame never blinks.
let newest = 0;
async function put(address, alt) {
  const turn = ++newest, image = new Image();
  image.src = address;
  try { await image.decode(); } catch { return; }
  if (turn !== newest) return;
  shown.src = address;
  shown.alt = alt;
  shown.hidden = false;
}

function clear() {
  newest++;
  shown.hidden = true;
  shown.removeAttribute("src");
}

function announce(text) {
  if (at("announce").textContent !== text) at("announce").textContent = text;
}

function mark(id) {
  easel.dataset.picture = id ?? "";
  for (const link of strip.querySelectorAll("a")) {
    if (link.dataset.picture === id) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

function show(picture, words) {
  easel.dataset.state = "done";
  put(`/pictures/${picture.id}/png`, `Picture with seed ${picture.seed}`);
  at("status").textContent = words ?? `Seed ${picture.seed}`;
  at("save").href = `/pictures/${picture.id}/png`;
  at("save").download = `darkroom-${picture.seed}.png`;
  at("keep-seed").href = `/pictures/${picture.id}/seed`;
  at("again").action = `/pictures/${picture.id}/again`;
  at("forget-one").action = `/pictures/${picture.id}/forget`;
  mark(picture.id);
}

function hang(picture) {
  if (strip.querySelector(`a[data-picture="${picture.id}"]`)) return;
  const item = document.createElement("li"), link = document.createElement("a"), image = document.createElement("img");
  link.href = `/pictures/${picture.id}`;
  Object.assign(link.dataset, { picture: picture.id, seed: picture.seed });
  Object.assign(image, { src: `/pictures/${picture.id}/png`, alt: `Picture with seed ${picture.seed}`, width: 76, height: 76 });
  link.append(image);
  item.append(link);
  strip.prepend(item);
}

function paint(job) {
  const going = job.state === "waiting" || job.state === "running";
  document.title = job.title;
  job.pictures.forEach(hang);
  if (going) {
    if (easel.dataset.state !== "waiting" && easel.dataset.state !== "running") { clear(); mark(null); quarter = -1; }
    easel.dataset.state = job.state;
    at("status").textContent = job.id === stopping ? STOPPING : job.status;
    at("cancel").action = `/jobs/${job.id}/cancel`;
    at("progress").max = job.total;
    at("progress").value = job.done;
    if (job.preview && !easel.dataset.picture) put(`/api/jobs/${job.id}/preview/${job.revision}`, "A preview of the picture");
    const now = Math.floor((4 * job.done) / job.total);     // a screen reader is told four times, not at every step
    if (now !== quarter) { quarter = now; announce(job.status); }
    return;
  }
  stop();
  announce(job.state === "failed" ? `${job.message} ${job.hint ?? ""}` : job.status);
  if (job.pictures.length) {
    show(job.pictures.at(-1), job.state === "done" ? undefined : job.status);
  } else {
    clear();
    easel.dataset.state = job.state === "done" ? "empty" : job.state;
    at("status").textContent = job.status;
    at("what").textContent = job.message ?? "";
    at("next").textContent = `${job.hint ?? ""} What you wrote is still in the form.`;
  }
  keepNow();      // the times are known better now
  next();
}

// ── Following a job ─────────────────────────────────────────────────────────

function stop() {
  source?.close();
  clearTimeout(poll);
  source = watched = null;
}

function follow(job) {
  stop();
  watched = job.id;
  paint(job);
  if (watched) listen(job.id);
}

function listen(id) {
  source = new EventSource(`/api/jobs/${id}/events`);
  source.onmessage = (event) => { if (watched === id) paint(JSON.parse(event.data)); };
  source.addEventListener("gone", () => lost());
  source.onerror = () => {
    // The browser takes up a stream that broke by itself; one that was refused is asked for piece by piece.
    if (source?.readyState === EventSource.CLOSED) { source = null; poll = setTimeout(look, 0, id); }
  };
}

async function look(id) {
  if (watched !== id) return;
  try {
    paint(await ask(`/api/jobs/${id}`));
    if (watched === id) poll = setTimeout(look, POLL, id);
  } catch (error) {
    if (error.status === 404) lost();
    else if (watched === id) { at("status").textContent = "Darkroom does not answer. Asking again …"; poll = setTimeout(look, 2 * POLL, id); }
  }
}

function lost() {
  stop();
  clear();
  easel.dataset.state = "empty";
  document.title = "Darkroom";
  at("status").textContent = "The session has ended, and its pictures are gone.";
  strip.replaceChildren();
  announce(at("status").textContent);
}

async function next() {
  const now = await ask("/api/current").catch(() => null);
  now?.pictures.forEach(hang);      // also those of jobs that ended while none was followed
  const job = now?.job;
  if (job && !watched && (job.state === "waiting" || job.state === "running")) follow(job);
}

// ── What can be pressed ─────────────────────────────────────────────────────

async function begin(form) {
  settle();
  try {
    const job = await ask(form.action, form);
    if (job.id === watched) paint(job);     // another one is waiting behind it
    else follow(job);
    if (form === order) easel.scrollIntoView({ block: "nearest" });
  } catch (error) {
    complain(error);
  }
}

order.addEventListener("submit", (event) => {
  event.preventDefault();
  const example = event.submitter?.name === "example";
  if (!example) return begin(order);
  prompt.value = event.submitter.textContent;
  prompt.focus();
  keep();
});

at("again").addEventListener("submit", (event) => {
  event.preventDefault();
  begin(at("again"));
});

at("cancel").addEventListener("submit", async (event) => {
  event.preventDefault();
  stopping = watched;
  at("status").textContent = STOPPING;
  try {
    const job = await ask(at("cancel").action, at("cancel"));
    if (watched === job.id) paint(job);     // the stream may have told of the end already, and this answer is older
  } catch (error) { complain(error); }
});

at("forget-one").addEventListener("submit", async (event) => {
  event.preventDefault();
  const gone = easel.dataset.picture;
  try { await ask(at("forget-one").action, at("forget-one")); } catch (error) { return complain(error); }
  strip.querySelector(`a[data-picture="${gone}"]`)?.parentElement.remove();
  clear();
  mark(null);
  easel.dataset.state = "empty";
  at("status").textContent = "Forgotten. Nothing of that picture is kept.";
  announce(at("status").textContent);
  (strip.querySelector("a") ?? prompt).focus();
});

at("keep-seed").addEventListener("click", (event) => {
  event.preventDefault();
  const link = strip.querySelector(`a[data-picture="${easel.dataset.picture}"]`);
  if (!link) return;
  order.elements.seed.value = link.dataset.seed;
  at("more").open = true;
  announce(`Seed ${link.dataset.seed} is kept for the next picture.`);
  at("status").textContent = `Seed ${link.dataset.seed}, kept`;
  prompt.focus();
  keep();
});

strip.addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const { picture: id, seed } = link.dataset;
  if (!watched) return show({ id, seed });
  // While another picture develops this one is only looked at; a second press goes back to the preview.
  if (easel.dataset.picture === id) return mark(null);
  mark(id);
  put(`/pictures/${id}/png`, `Picture with seed ${seed}`);
});

addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    begin(order);
  } else if (event.key === "Escape" && watched && !event.isComposing) {
    at("cancel").requestSubmit();
  }
});

// ── What is being written ───────────────────────────────────────────────────

let resting = 0, unkept = false;

async function keepNow(extra) {
  clearTimeout(resting);
  unkept = false;
  const said = await ask("/api/draft", order, extra).catch(() => null);
  if (!said) return;
  at("notices").replaceChildren(...said.notices.map((notice) => {
    const line = document.createElement("li");
    line.dataset.kind = notice.kind;
    line.textContent = notice.text;
    return line;
  }));
  for (const cost of order.querySelectorAll(".cost")) cost.textContent = said.times[cost.dataset.care] ?? cost.textContent;
}

function keep() {
  unkept = true;
  clearTimeout(resting);
  resting = setTimeout(keepNow, PAUSE);
}

order.addEventListener("input", () => { settle(); keep(); });
addEventListener("beforeunload", () => { if (unkept) keepNow({ keepalive: true }); });
addEventListener("visibilitychange", () => { if (document.hidden && unkept) keepNow({ keepalive: true }); });

if (watched) listen(watched);
