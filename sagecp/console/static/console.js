// The console's page: keeps a picture of the fleet and draws what changed of it.

import { clock, count, element, gibibytes, meter, percent, seconds, sparkline } from "./charts.js";

const GLYPHS = { READY: "", STARTING: "…", DRAINING: "↓", DRAINED: "–", UNHEALTHY: "!", LOST: "?" };
const PRIORITIES = ["CRITICAL", "HIGH", "NORMAL", "LOW", "BACKGROUND"];
const HISTORY_SECONDS = 5;
const HISTORY_COUNT = 360;
const DENSE_ABOVE = 60;
const SHOWN_EVENTS = 100;
const $ = (id) => document.getElementById(id);

const picture = {
  instances: new Map(),
  status: null,
  metrics: null,
  decisions: [],
  events: [],
  history: [],
  actions: false,
};
const view = { state: "", text: "", open: null };
const cells = new Map();

// -- what comes in ---------------------------------------------------------------------

function take(message) {
  if (message.kind === "hello") {
    picture.actions = message.actions;
    offerPolicies(message.policies);
    return;
  }
  if (message.kind === "whole") {
    picture.instances.clear();
    picture.events = [];
    picture.history = message.history;
  }
  for (const row of message.instances) picture.instances.set(row.id, row);
  for (const id of message.removed ?? []) picture.instances.delete(id);
  for (const name of ["status", "metrics", "decisions"]) {
    if (name in message) picture[name] = message[name];
  }
  const known = picture.events[0]?.sequence ?? 0;
  const events = message.events.filter((event) => event.sequence > known).sort((a, b) => b.sequence - a.sequence);
  picture.events = [...events, ...picture.events].slice(0, SHOWN_EVENTS);
  remember(message.time);
  draw(message);
}

function remember(time) {
  const last = picture.history.at(-1);
  if ((last && time - last.time < HISTORY_SECONDS) || !picture.metrics) return;
  const { metrics, status } = picture;
  picture.history.push({
    time,
    requests_per_second: metrics.requests_per_second,
    tokens_per_second: metrics.tokens_per_second,
    queued: status.queued,
    active: status.active,
    ttft_p50_s: metrics.ttft?.p50_s ?? null,
    ttft_p95_s: metrics.ttft?.p95_s ?? null,
    slo_compliance: metrics.slo_compliance,
  });
  picture.history = picture.history.slice(-HISTORY_COUNT);
}

// -- drawing -----------------------------------------------------------------------------

function draw(message) {
  drawHeader();
  drawTiles();
  drawFleet(message);
  drawQueue();
  if ("decisions" in message) drawDecisions();
  if (message.events.length || message.kind === "whole") drawEvents();
  if (view.open?.instance && message.instances.some((row) => row.id === view.open.instance)) {
    showInstance(view.open.instance);
  }
}

function drawHeader() {
  const { status } = picture;
  $("version").textContent = status.version;
  $("accepting").textContent = status.accepting ? "accepting" : "stopping";
  $("accepting").className = status.accepting ? "badge good" : "badge bad";
  const why = status.policy_reason ? ` (${status.policy_reason})` : "";
  const policy = status.policy === status.policy_in_force ? status.policy : `${status.policy} → ${status.policy_in_force}`;
  $("policy").textContent = `${policy} · ${status.routing} · ${status.balancer}${why}`;
  $("policy").title = $("policy").textContent;
  const choice = $("policy-choice").querySelector("select");
  if (document.activeElement !== choice) choice.value = status.policy;
}

function offerPolicies(names) {
  const label = $("policy-choice");
  const choice = label.querySelector("select");
  label.hidden = !picture.actions;
  choice.replaceChildren(...names.map((name) => new Option(name)));
  choice.onchange = async () => {
    const answer = await act("/api/policy", { scheduling_policy: choice.value });
    if (!answer.ok) open("The policy stays as it is", {}, element("p", "trouble", (await answer.json()).detail));
  };
}

function drawTiles() {
  const { metrics, status, history } = picture;
  const past = (name) => history.map((point) => point[name]);
  const compliance = metrics.slo_compliance;
  const tiles = [
    ["Requests per second", count(metrics.requests_per_second), `${count(metrics.completed)} completed, ${count(metrics.failed)} failed`, past("requests_per_second")],
    ["Tokens per second", count(metrics.tokens_per_second), metrics.tpot ? `TPOT p50 ${seconds(metrics.tpot.p50_s)}` : "", past("tokens_per_second")],
    ["Time to first token, p50", seconds(metrics.ttft?.p50_s), metrics.ttft ? `p95 ${seconds(metrics.ttft.p95_s)}` : "no request in the last minute", past("ttft_p50_s")],
    ["Waiting", count(status.queued), `${count(status.active)} on engines, room for ${count(status.queue_capacity)}`, past("queued")],
    ["Objectives met", percent(compliance, 1), compliance === null ? "no request had any" : `${count(metrics.slo_violations)} missed since the start`, past("slo_compliance"), compliance !== null && compliance < 0.9],
    ["GPU utilization", percent(metrics.gpu_utilization), metrics.gpu_utilization === null ? "no GPU reports" : "mean", []],
  ];
  $("tiles").replaceChildren(
    ...tiles.map(([name, value, more, values, alarm]) =>
      element("div", alarm ? "tile alarm" : "tile", "", element("div", "name", name), element("div", "value", value), element("div", "more", more), sparkline(values)),
    ),
  );
}

function visible(row) {
  if (view.state && row.state !== view.state) return false;
  const text = view.text.toLowerCase();
  return !text || `${row.id} ${row.model} ${row.host}`.toLowerCase().includes(text);
}

function drawFleet(message) {
  const rows = [...picture.instances.values()].filter(visible).sort((a, b) => a.id.localeCompare(b.id));
  drawStates();
  const dense = picture.instances.size > DENSE_ABOVE;
  $("map").className = dense ? "dense" : "";
  const changed = new Set(message.kind === "whole" ? picture.instances.keys() : message.instances.map((row) => row.id));
  for (const id of cells.keys()) if (!picture.instances.has(id)) cells.delete(id);
  for (const id of changed) cells.set(id, cell(picture.instances.get(id)));
  const hosts = new Map();
  for (const row of rows) {
    if (!hosts.has(row.host)) hosts.set(row.host, []);
    hosts.get(row.host).push(cells.get(row.id));
  }
  $("map").replaceChildren(
    ...[...hosts].map(([host, of]) => element("div", "host", "", element("div", "host-name", host), element("div", "cells", "", ...of))),
  );
  $("map-note").textContent = rows.length
    ? dense ? "Filled by load; ! unhealthy, ? lost, ↓ draining, – drained, … starting." : ""
    : picture.instances.size ? "No instance matches the filter." : "No instance is registered yet: start an agent, or run sagecp instances add.";
}

function drawStates() {
  const counts = {};
  for (const row of picture.instances.values()) counts[row.state] = (counts[row.state] ?? 0) + 1;
  $("states").replaceChildren(
    ...Object.keys(GLYPHS).filter((state) => counts[state]).map((state) => {
      const chip = element("button", "", `${counts[state]} ${state}`);
      chip.type = "button";
      chip.setAttribute("aria-pressed", String(view.state === state));
      chip.onclick = () => {
        view.state = view.state === state ? "" : state;
        drawFleet({ kind: "change", instances: [] });
      };
      return chip;
    }),
  );
}

function cell(row) {
  const load = row.limit ? row.in_flight / row.limit : 0;
  const made = element("button", `cell s-${row.state}`);
  made.type = "button";
  made.style.setProperty("--load", `${Math.min(1, load) * 100}%`);
  made.title = `${row.id}: ${row.state}, ${row.reason}`;
  made.setAttribute("aria-label", made.title);
  const hottest = Math.max(...row.gpus.map((gpu) => gpu.temperature_celsius ?? 0), 0);
  const busiest = row.gpus.map((gpu) => gpu.utilization).filter((value) => value !== null);
  const figures = [
    row.ttft_s === null ? "" : `TTFT ${seconds(row.ttft_s)}`,
    busiest.length ? `GPU ${percent(busiest.reduce((a, b) => a + b, 0) / busiest.length)}` : "",
    hottest ? `${Math.round(hottest)} °C` : "",
  ].filter(Boolean).join(" · ");
  made.append(
    element("span", "glyph", GLYPHS[row.state]),
    element("div", "id", row.id),
    element("div", "state", row.faults.length ? `${row.state}: ${row.faults[0]}` : row.state === "READY" ? "READY" : `${row.state}: ${row.reason}`),
    meter("load", load, `${row.in_flight}/${row.limit}`),
    meter("KV", row.kv_usage ?? 0, percent(row.kv_usage), 0.95),
    element("div", "figures", figures || row.model),
  );
  made.onclick = () => showInstance(row.id);
  return made;
}

function drawQueue() {
  const { status } = picture;
  $("queue-total").textContent = `${count(status.queued)} waiting`;
  bars($("queue-priority"), PRIORITIES.map((name) => [name, status.queued_by_priority[name] ?? 0]), true);
  const largest = (counts) => Object.entries(counts).sort((a, b) => b[1] - a[1]).slice(0, 8);
  bars($("queue-tenant"), largest(status.queued_by_tenant).map(([name, value]) => [name || "(none)", value]));
  bars($("queue-model"), largest(status.queued_by_model));
}

function bars(place, entries, keep = false) {
  const most = Math.max(1, ...entries.map(([, value]) => value));
  if (!keep && !entries.length) {
    place.replaceChildren(element("div", "none", "nothing waits"));
    return;
  }
  place.replaceChildren(
    ...entries.map(([name, value]) => {
      const level = element("div", "level");
      level.style.width = `${(value / most) * 100}%`;
      return element("div", "bar", "", element("span", "name", name), element("div", "track", "", level), element("span", "number", count(value)));
    }),
  );
}

function activate(row, action) {
  row.tabIndex = 0;
  row.onclick = action;
  row.onkeydown = (event) => {
    if (event.key === "Enter") action();
  };
  return row;
}

function drawDecisions() {
  $("decision-rows").replaceChildren(
    ...picture.decisions.map((decision) =>
      activate(
        element("tr", "", "", element("td", "", clock(decision.time)), element("td", "mono short", decision.request_id), element("td", "short", decision.instance_id), element("td", "number", seconds(decision.queue_wait_s)), element("td", "", decision.reason)),
        () => showReceipts(decision.request_id, [decision]),
      ),
    ),
  );
  if (!picture.decisions.length) $("decision-rows").replaceChildren(element("tr", "", "", element("td", "quiet", "No request was dispatched yet.")));
}

function drawEvents() {
  $("event-rows").replaceChildren(
    ...picture.events.map((event) =>
      element("li", "", "", element("span", "quiet", `${clock(event.time)} `), element("span", `severity ${event.severity}`, `${event.severity} `), document.createTextNode(event.instance_id ? `${event.instance_id}: ${event.message}` : event.message)),
    ),
  );
  if (!picture.events.length) $("event-rows").replaceChildren(element("li", "quiet", "Nothing happened yet."));
}

// -- the drawer --------------------------------------------------------------------------

function open(title, what, ...body) {
  view.open = what;
  $("drawer-title").textContent = title;
  $("drawer-body").replaceChildren(...body);
  if (!$("drawer").open) $("drawer").showModal();
}

function facts(pairs) {
  const list = element("dl");
  for (const [name, value] of pairs) {
    if (value !== "" && value !== null && value !== undefined) list.append(element("dt", "", name), element("dd", "", String(value)));
  }
  return list;
}

function showInstance(id) {
  const row = picture.instances.get(id);
  if (!row) return;
  const parts = [
    facts([
      ["State", row.state],
      ["Why", row.reason],
      ["Model", row.model],
      ["Engine", `${row.url} ${row.version}`],
      ["Host", row.host],
      ["On it", `${row.in_flight} of ${row.limit} requests`],
      ["In the engine", row.running === null ? "unknown" : `${row.running} running, ${row.waiting ?? "?"} waiting`],
      ["KV cache", percent(row.kv_usage, 1)],
      ["Time to first token", seconds(row.ttft_s)],
      ["Time per output token", seconds(row.tpot_s)],
      ["Against its kind", row.slowdown === null ? "" : `${row.slowdown} times as long`],
      ["Completed, lost", `${row.completed}, ${row.failed}`],
      ["Last heartbeat", row.heartbeat_time ? clock(row.heartbeat_time) : "no agent"],
      ["No GPU readings", row.gpu_absent_reason],
    ]),
  ];
  for (const fault of row.faults) parts.push(element("p", "trouble", fault));
  if (row.gpus.length) {
    const body = element("tbody", "", "", ...row.gpus.map((gpu) =>
      element("tr", "", "", element("td", "", String(gpu.index)), element("td", "number", percent(gpu.utilization)), element("td", "number", `${gibibytes(gpu.used_memory_bytes)} / ${gibibytes(gpu.total_memory_bytes)}`), element("td", "number", gpu.temperature_celsius === null ? "–" : `${Math.round(gpu.temperature_celsius)} °C`), element("td", "number", gpu.power_watts === null ? "–" : `${gpu.power_watts} W`), element("td", "", gpu.throttle_reasons.join(", "))),
    ));
    const head = element("tr", "", "", ...["GPU", "Busy", "Memory, GiB", "Temperature", "Power", "Slowed by"].map((name, index) => element("th", index && index < 5 ? "number" : "", name)));
    parts.push(element("table", "", "", element("thead", "", "", head), body));
  }
  if (picture.actions) parts.push(actions(row));
  open(row.id, { instance: id }, ...parts);
}

function actions(row) {
  const trouble = element("span", "trouble");
  const button = element("button", "", row.draining ? "Resume" : "Drain");
  button.type = "button";
  button.onclick = async () => {
    const answer = await act(`/api/instances/${encodeURIComponent(row.id)}/${row.draining ? "resume" : "drain"}`);
    trouble.textContent = answer.ok ? "" : (await answer.json()).detail;
  };
  return element("div", "actions", "", button, trouble);
}

function act(path, body = {}) {
  return fetch(path, { method: "POST", headers: { "X-Sagecp-Console": "1" }, body: JSON.stringify(body) });
}

function receipt(decision) {
  const names = [...new Set(decision.candidates.flatMap((each) => Object.keys(each.terms)))].slice(0, 3);
  const figure = (value) => (value === null || value === undefined ? "–" : Number(value).toPrecision(4));
  const head = element("tr", "", "", ...["Candidate", "Score", "In flight", "Backlog", "Cached tokens", ...names].map((name, index) => element("th", index ? "number" : "", name)));
  const body = decision.candidates.map((each) =>
    element("tr", "", "", element("td", "", each.instance_id + (each.excluded_reason ? ` (out: ${each.excluded_reason})` : "")), element("td", "number", figure(each.score)), element("td", "number", count(each.in_flight)), element("td", "number", seconds(each.backlog_s)), element("td", "number", count(each.cached_tokens)), ...names.map((name) => element("td", "number", figure(each.terms[name])))),
  );
  return [
    facts([
      ["Attempt", decision.epoch],
      ["Time", clock(decision.time)],
      ["Went to", decision.instance_id],
      ["Why", decision.reason],
      ["Waited", seconds(decision.queue_wait_s)],
      ["Policy", decision.policy],
      ["Routing, balancer", `${decision.routing}, ${decision.balancer}`],
      ["Configuration", `version ${decision.config_version}`],
      ["Candidates", `${decision.candidate_count}; the best are below, lower is better`],
    ]),
    element("table", "", "", element("thead", "", "", head), element("tbody", "", "", ...body)),
  ];
}

function costText(request) {
  const dollars = (value) => `$${value.toPrecision(3)}`;
  const predicted = request.predicted_cost_usd === null ? "" : `predicted ${dollars(request.predicted_cost_usd)}`;
  return [request.cost_usd === null ? "" : dollars(request.cost_usd), predicted].filter(Boolean).join(", ");
}

async function showReceipts(requestId, decisions) {
  const answer = await fetch(`/api/requests/${encodeURIComponent(requestId)}`);
  if (!answer.ok && !decisions.length) {
    open(requestId, {}, element("p", "trouble", (await answer.json()).detail));
    return;
  }
  const found = answer.ok ? await answer.json() : { request: null, decisions };
  const request = found.request;
  const parts = request
    ? [facts([["State", request.state], ["Model", request.model], ["Class", request.priority], ["Tenant", request.tenant_id], ["User", request.user_id], ["Received", clock(request.create_time)], ["First token after", request.first_token_time ? seconds(request.first_token_time - request.create_time) : ""], ["Took", request.end_time ? seconds(request.end_time - request.create_time) : ""], ["Tokens", `${request.prompt_tokens ?? "?"} in, ${request.output_tokens} out`], ["Cost", costText(request)], ["Failure", request.failure]])]
    : [];
  open(requestId, { request: requestId }, ...parts, ...found.decisions.flatMap(receipt));
}

// -- start ---------------------------------------------------------------------------------

function connect() {
  const source = new EventSource("/api/stream");
  const state = $("connection");
  source.onopen = () => {
    state.textContent = "live";
    state.className = "badge good";
  };
  source.onerror = () => {
    state.textContent = "no connection, trying again";
    state.className = "badge bad";
    // The browser tries again by itself, unless the server refused.
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
  };
  source.onmessage = (event) => take(JSON.parse(event.data));
}

$("search").oninput = (event) => {
  view.text = event.target.value;
  drawFleet({ kind: "change", instances: [] });
};
$("find-request").onkeydown = (event) => {
  if (event.key === "Enter" && event.target.value.trim()) showReceipts(event.target.value.trim(), []);
};
$("drawer-close").onclick = () => $("drawer").close();
$("drawer").onclose = () => {
  view.open = null;
};
connect();
