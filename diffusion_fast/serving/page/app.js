"use strict";
// One list item for each request, with a preview while it runs. Everything is plain fetch().
const $ = (id) => document.getElementById(id);
const running = []; // requests that are not done, the newest first

async function call(path, body) {
  const headers = {};
  const token = sessionStorage.getItem("token");
  if (token) headers.authorization = `Bearer ${token}`;
  if (body) headers["content-type"] = "application/json";
  const answer = await fetch(path, body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers });
  const data = await answer.json();
  if (answer.ok) return data;
  if (answer.status === 401) $("tokens").hidden = false;
  const detail = data.detail;
  throw new Error(Array.isArray(detail) ? `${detail[0].loc.at(-1)}: ${detail[0].msg}` : detail);
}

function option(select, value, text) {
  select.append(new Option(text ?? value, value));
}

let filled = false;
async function fill() {
  const queue = await call("queue");
  $("model").textContent = queue.model;
  $("queue").textContent = `${queue.occupied} of ${queue.slots} slots, ${queue.waiting} waiting`;
  if (filled) return;
  for (const name of ["width", "height", "steps", "guidance"]) $(name).value = queue[name];
  option($("sampler"), "", `the model's (${queue.sampler ?? "none: choose one"})`);
  for (const one of await call("sdapi/v1/samplers")) option($("sampler"), one.name);
  for (const one of await call("sdapi/v1/schedulers")) option($("scheduler"), one.name, one.label);
  filled = true;
}

function item(text) {
  const li = document.createElement("li");
  const prompt = document.createElement("p");
  prompt.textContent = text || "(empty prompt)";
  const bar = document.createElement("progress");
  bar.max = 1;
  bar.value = 0;
  bar.setAttribute("aria-label", `Progress of ${text || "the request"}`);
  const pictures = document.createElement("div");
  pictures.className = "pictures";
  const row = document.createElement("div");
  row.className = "row";
  const stop = document.createElement("button");
  stop.type = "button";
  stop.textContent = "Stop";
  const state = document.createElement("small");
  state.setAttribute("role", "status");
  state.textContent = "waiting";
  row.append(stop, state);
  li.append(prompt, bar, pictures, row);
  $("requests").prepend(li);
  return { li, bar, pictures, stop, state };
}

function show(one, sources, alt) {
  one.pictures.replaceChildren(...sources.map((source) => {
    const image = new Image();
    image.src = `data:image/png;base64,${source}`;
    image.alt = alt;
    return image;
  }));
}

async function draw(event) {
  event?.preventDefault();
  if (!$("form").reportValidity()) return;
  $("error").textContent = "";
  if ($("token").value) sessionStorage.setItem("token", $("token").value);
  const form = new FormData($("form"));
  const id = Array.from(crypto.getRandomValues(new Uint8Array(12)), (n) => n.toString(16).padStart(2, "0")).join("");
  const body = { force_task_id: id, prompt: form.get("prompt"), negative_prompt: form.get("negative_prompt") };
  for (const name of ["steps", "cfg_scale", "width", "height", "seed", "batch_size"]) body[name] = Number(form.get(name));
  if (form.get("sampler_name")) {
    body.sampler_name = form.get("sampler_name");
    body.scheduler = form.get("scheduler");
  }
  const one = item(body.prompt);
  const query = `?force_task_id=${id}`;
  let stopping = false; // told again and again, as the server may not know the request yet
  const task = {
    stop: () => {
      stopping = true;
      call(`sdapi/v1/interrupt${query}`, {}).catch(() => {});
    },
  };
  running.unshift(task);
  one.stop.addEventListener("click", task.stop);
  let done = false;
  const watch = async () => {
    while (!done) {
      try {
        const now = await call(`sdapi/v1/progress${query}`);
        if (done) return;
        if (stopping) task.stop();
        one.bar.value = now.progress;
        const { sampling_step: step, sampling_steps: steps } = now.state;
        if (steps) one.state.textContent = `step ${step} of ${steps}`;
        if (now.current_image) show(one, [now.current_image], `Preview of ${body.prompt}`);
      } catch { /* the request itself tells */ }
      await new Promise((wake) => setTimeout(wake, 250));
    }
  };
  watch();
  try {
    const made = await call("sdapi/v1/txt2img", body);
    const info = JSON.parse(made.info);
    done = true;
    one.bar.value = 1;
    if (made.images.length) show(one, made.images, body.prompt);
    one.state.textContent = made.images.length ? `seed ${info.all_seeds.join(", ")}` : "stopped";
  } catch (error) {
    done = true;
    one.li.remove();
    $("error").textContent = error.message;
    if (!$("tokens").hidden) $("token").focus();
  } finally {
    running.splice(running.indexOf(task), 1);
    one.stop.remove();
    one.bar.hidden = true;
  }
}

async function refresh() {
  try {
    await fill();
  } catch (error) {
    $("queue").textContent = $("tokens").hidden ? "not reachable" : "a token is needed";
  }
  setTimeout(refresh, 1000);
}

$("form").addEventListener("submit", draw);
$("token").addEventListener("change", () => sessionStorage.setItem("token", $("token").value));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) draw(event);
  if (event.key === "Escape") running[0]?.stop();
});
refresh();
