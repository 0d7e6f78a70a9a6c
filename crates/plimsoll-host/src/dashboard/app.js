// Draws what the daemon says, once a second. Text goes into the page as text: a machine's name is chosen by whoever starts it.
'use strict';

const $ = (id) => document.getElementById(id);
const KEY = 'plimsoll-token';
const PLACES = [
  ['resident', 'resident'], ['limbo', 'limbo'], ['stored', 'stored'], ['disk', 'on disk'], ['free', 'free'],
];
// Of what is free, how the guest gave it back.
const GIVEN = [
  ['reported', 'reported free'], ['hinted', 'found free'], ['ballooned', 'in its balloon'], ['given', 'given otherwise'],
];
const HOT = 31250;
const PERIOD_MS = 1000;
const PATIENCE_MS = 15000;

// The token leaves the address bar, and stays with this tab.
if (location.hash.length > 1) {
  sessionStorage.setItem(KEY, location.hash.slice(1));
  history.replaceState(null, '', location.pathname);
}

let chosen = null;
let machines = [];
let isEdited = false;

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** As the command line writes sizes: powers of 1024, at most one digit after the point. */
function size(bytes) {
  if (bytes == null) return '–';
  const units = ['', 'K', 'M', 'G', 'T', 'P'];
  let at = 0;
  while (bytes >= 1024 && at < units.length - 1) { bytes /= 1024; at += 1; }
  return `${Math.floor(bytes * 10) / 10}${units[at]}`;
}

function bytes(text) {
  const found = /^\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)\s*$/i.exec(text);
  if (!found) throw new Error(`"${text}" is no size: use 512M, or 4G`);
  const power = ' KMGTP'.indexOf(found[2].toUpperCase() || ' ');
  return Math.round(Number(found[1]) * 1024 ** power / 4096) * 4096;
}

function part(ppm) {
  return `${Number((ppm / 10000).toFixed(ppm < 10000 ? 3 : 1))} %`;
}

async function ask(path, change) {
  const headers = { authorization: `Bearer ${sessionStorage.getItem(KEY) ?? ''}` };
  if (change) headers['content-type'] = 'application/json';
  const body = change && JSON.stringify(change);
  const answer = await fetch(path, {
    method: change ? 'PATCH' : 'GET', headers, body, cache: 'no-store', signal: AbortSignal.timeout(PATIENCE_MS),
  });
  const said = await answer.json();
  if (!answer.ok) throw new Error(`${said.message}; ${said.help}`);
  return said;
}

const of = (machine, what = '') => `/v1/machines/${encodeURIComponent(machine.name)}${what}`;

function bar(into, parts, whole, label) {
  const made = parts.filter(([, amount]) => amount > 0).map(([name, amount]) => {
    const piece = el('i', { class: name });
    piece.style.width = `${amount / Math.max(whole, 1) * 100}%`;
    return piece;
  });
  into.replaceChildren(...made);
  into.setAttribute('aria-label', label);
}

function numbers(into, rows) {
  into.replaceChildren(...rows.map(([name, value, mark]) => {
    const term = el('dt', {}, ...(mark ? [el('i', { class: mark })] : []), name);
    return el('div', {}, term, el('dd', {}, value));
  }));
}

function showHost(host) {
  const used = host.budget_bytes - host.free_bytes;
  const kept = Math.min(host.kept_free_bytes, host.free_bytes);
  const isWell = host.state === 'high' || host.state === 'clear';
  $('version').textContent = host.version;
  $('state').textContent = host.state;
  $('state').className = isWell ? 'chip' : 'chip ill';
  bar($('host-bar'), [['used', used], ['free', host.free_bytes - kept], ['kept', kept]], host.budget_bytes,
    `${size(used)} of ${size(host.budget_bytes)} used, ${size(kept)} of the rest kept free`);
  numbers($('host-numbers'), [
    ['Budget', size(host.budget_bytes)], ['Used', size(used), 'used'], ['Free', size(host.free_bytes), 'free'],
    ['To stay free', size(host.kept_free_bytes), 'kept'], ['Reserved', size(host.reserved_bytes)],
    ['Machines', String(host.machines)],
  ]);
  $('awaited').hidden = host.waiting.length === 0;
  $('awaited').textContent = 'Awaited: ' + host.waiting.map(({ name, why }) => why ? `${name} (${why})` : name).join(', ');
}

const STATES = { starting: 'starting', running: '', paused: 'paused', leaving: 'leaving', left_out: 'left out' };

function range(settings) {
  const least = settings.minimum_bytes ?? settings.reservation_bytes;
  const most = settings.maximum_bytes ?? settings.limit_bytes;
  return least == null && most == null ? settings.kind ?? '–' : `${size(least ?? 0)}–${most == null ? 'size' : size(most)}`;
}

const rows = new Map();

/** Rows are changed in place, so that the focus stays where it is. */
function row(machine) {
  let known = rows.get(machine.id);
  if (!known) {
    const name = el('button', { type: 'button', class: 'name' });
    const tag = el('span', { class: 'tag' });
    const memory = el('div', { class: 'bar', role: 'img' });
    const cells = ['Size', 'Used', 'Target', 'Entitled', 'May have', 'Waits']
      .map((title) => el('td', { class: 'number', 'data-name': title }));
    const line = el('tr', {}, el('th', { scope: 'row' }, name, ' ', tag), el('td', {}, memory), ...cells);
    known = { line, name, tag, memory, cells };
    name.addEventListener('click', () => choose(machine.id));
    rows.set(machine.id, known);
  }
  known.name.textContent = machine.name;
  known.name.setAttribute('aria-pressed', String(machine.id === chosen));
  known.line.className = machine.id === chosen ? 'chosen' : '';
  known.tag.textContent = machine.trouble ?? STATES[machine.state];
  known.tag.className = machine.trouble ? 'tag ill' : 'tag';
  const { memory, pages } = machine;
  const parts = pages ? PLACES.map(([place]) => [place, pages[`${place}_bytes`]]) : [];
  bar(known.memory, parts, machine.size_bytes, parts.map(([place, amount]) => `${place} ${size(amount)}`).join(', '));
  const values = [size(machine.size_bytes), size(memory?.consumed_bytes), size(memory?.target_bytes),
    size(memory?.entitlement_bytes), range(machine.settings), memory ? part(memory.stalled_ppm) : '–'];
  values.forEach((value, at) => { known.cells[at].textContent = value; });
  return known.line;
}

function showMachines() {
  machines.sort((one, other) => one.name.localeCompare(other.name) || one.id - other.id);
  const lines = machines.map(row);
  for (const id of rows.keys()) if (!machines.some((machine) => machine.id === id)) rows.delete(id);
  const body = $('rows');
  if (lines.length !== body.children.length || lines.some((line, at) => body.children[at] !== line)) {
    const focused = document.activeElement;
    body.replaceChildren(...lines);
    if (body.contains(focused)) focused.focus();
  }
  $('empty').hidden = machines.length > 0;
}

function choose(id) {
  if (id !== chosen) isEdited = false;
  chosen = id;
  $('said').textContent = '';
  showMachines();
  showOne().catch(failed);
}

/** Lines over the same time, from nothing to the most any of them has. */
function plot(into, samples, lines, show, least) {
  if (samples.length < 2) {
    into.replaceChildren(el('p', { class: 'quiet' }, 'A sample is kept every five seconds.'));
    return;
  }
  const top = Math.max(least, ...lines.flatMap(([name]) => samples.map((sample) => sample[name])));
  const [first, last] = [samples[0].unix_ms, samples.at(-1).unix_ms];
  const namespace = 'http://www.w3.org/2000/svg';
  const svg = document.createElementNS(namespace, 'svg');
  svg.setAttribute('viewBox', '0 0 600 120');
  svg.setAttribute('preserveAspectRatio', 'none');
  svg.setAttribute('role', 'img');
  svg.setAttribute('aria-label', lines.map(([name, title]) => `${title} ${show(samples.at(-1)[name])}`).join(', '));
  for (const [name, , style] of lines) {
    const line = document.createElementNS(namespace, 'polyline');
    const at = (sample) => `${(sample.unix_ms - first) / (last - first) * 600},${118 - sample[name] / top * 116}`;
    line.setAttribute('points', samples.map(at).join(' '));
    line.setAttribute('class', style);
    svg.append(line);
  }
  const seconds = Math.round((last - first) / 1000);
  const since = seconds < 120 ? `${seconds} s` : `${Math.round(seconds / 60)} min`;
  const axis = (left, right) => el('div', { class: 'axis' }, el('span', {}, left), el('span', {}, right));
  const legend = el('ul', { class: 'legend' }, ...lines.map(([name, title, style]) =>
    el('li', {}, el('i', { class: style }), `${title} ${show(samples.at(-1)[name])}`)));
  into.replaceChildren(axis(show(top), ''), svg, axis(`${since} ago`, 'now'), legend);
}

function showMap(cells) {
  const map = $('map');
  const made = cells.map((cell) => {
    const { resident_ppm: resident, limbo_ppm: limbo, stored_ppm: stored, heat_ppm: heat } = cell;
    const free = 1e6 - resident - limbo - stored;
    const parts = [['resident', resident], ['limbo', limbo], ['stored', stored], ['free', free]];
    const most = parts.reduce((best, one) => one[1] > best[1] ? one : best);
    const piece = el('i', { class: heat >= HOT ? 'hot' : most[0] });
    // The fuller, the stronger.
    if (most[0] !== 'free') piece.style.opacity = String(0.45 + 0.55 * most[1] / 1e6);
    piece.title = parts.filter(([, ppm]) => ppm > 0).map(([name, ppm]) => `${name} ${part(ppm)}`).join(', ');
    return piece;
  });
  map.replaceChildren(...made);
  const share = (name) => part(cells.reduce((sum, cell) => sum + cell[`${name}_ppm`], 0) / Math.max(cells.length, 1));
  map.setAttribute('aria-label', `${share('resident')} resident, ${share('limbo')} in limbo, ${share('stored')} stored`);
  $('map-words').textContent = cells.some((cell) => cell.heat_ppm != null)
    ? 'From its first page to its last. Red is what came back lately.' : 'From its first page to its last.';
}

function showWhy(why) {
  $('why').replaceChildren(...why.entries.toReversed().map((entry) => {
    const seconds = Math.round((why.at_ms - entry.at_ms) / 1000);
    const often = entry.times > 1 ? ` (${entry.times} times)` : '';
    const refused = entry.refused ? `; not done: ${entry.refused}` : '';
    return el('li', {}, el('time', {}, seconds > 0 ? `${seconds} s ago` : 'now'),
      el('span', {}, entry.sentence + refused + often));
  }));
}

/** The fields of a machine's settings, in its own words. */
function words(settings) {
  return settings.kind === 'dynamic'
    ? ['minimum_bytes', 'maximum_bytes', 'weight'] : ['reservation_bytes', 'limit_bytes', 'shares'];
}

function showSettings(machine) {
  if (isEdited) return;
  const [least, most, weight] = words(machine.settings);
  const isFixed = machine.settings.kind === 'static' || machine.settings.kind === 'dedicated';
  $('weight-name').textContent = weight === 'shares' ? 'Weight (shares)' : 'Weight';
  $('minimum').value = isFixed ? '' : size(machine.settings[least] ?? 0);
  $('maximum').value = isFixed ? '' : size(machine.settings[most] ?? machine.size_bytes);
  $('weight').value = isFixed ? '' : machine.settings[weight];
  for (const id of ['minimum', 'maximum', 'weight']) $(id).disabled = isFixed;
}

async function showOne() {
  const machine = machines.find(({ id }) => id === chosen);
  $('one').hidden = !machine;
  if (!machine) return;
  $('one-title').textContent = machine.name;
  const kind = machine.kind === 'attached' ? 'managed from outside' : 'handed over by its VMM';
  $('one-kind').textContent = kind + (machine.pid ? `, process ${machine.pid}` : '') + (machine.trouble ? `: ${machine.trouble}` : '');
  const { pages, memory } = machine;
  numbers($('one-numbers'), [
    ...(pages ? PLACES.map(([place, title]) => [title, size(pages[`${place}_bytes`]), place]) : []),
    ...(pages ? GIVEN.filter(([way]) => pages[`${way}_bytes`]).map(([way, title]) => [title, size(pages[`${way}_bytes`])]) : []),
    ['in use', size(memory?.active_bytes)], ['compressed to', size(memory?.stored_bytes)],
  ]);
  showSettings(machine);
  const settled = await Promise.allSettled(['/history', '/map', '/why'].map((what) => ask(of(machine, what))));
  // Another one may have been chosen meanwhile.
  if (machine.id !== chosen) return;
  const [history, map, why] = settled.map(({ value }) => value);
  if (history) {
    plot($('plot-memory'), history.samples,
      [['consumed_bytes', 'used', 'consumed'], ['active_bytes', 'in use', 'active'], ['target_bytes', 'target', 'target']], size, 1);
    plot($('plot-waits'), history.samples, [['stalled_ppm', 'waits', 'stalled']], part, 10000);
  }
  if (map) showMap(map.cells);
  if (why) showWhy(why);
}

function failed(error) {
  const text = error.name === 'TypeError' ? 'the dashboard has ended: start `plimsoll dashboard` again' : error.message;
  $('notice').textContent = sessionStorage.getItem(KEY) ? text : 'open the address that `plimsoll dashboard` has printed';
  $('notice').hidden = false;
  document.body.classList.add('old');
}

async function all() {
  const found = [];
  let after = '';
  do {
    const page = await ask(`/v1/machines?limit=1000${after}`);
    found.push(...page.machines);
    after = page.next == null ? null : `&after=${page.next}`;
  } while (after);
  return found;
}

async function look() {
  try {
    const [host, found] = await Promise.all([ask('/v1/host'), all()]);
    machines = found;
    if (!machines.some(({ id }) => id === chosen)) { chosen = machines[0]?.id ?? null; isEdited = false; }
    showHost(host);
    showMachines();
    await showOne();
    $('notice').hidden = true;
    document.body.classList.remove('old');
  } catch (error) {
    failed(error);
  }
}

async function change(event) {
  event.preventDefault();
  const machine = machines.find(({ id }) => id === chosen);
  if (!machine) return;
  const [least, most, weight] = words(machine.settings);
  const said = $('said');
  try {
    const changes = {};
    // Sizes are shown rounded: what was not touched is not sent.
    const isOther = (id, shown) => $(id).value.trim() !== String(shown);
    if (isOther('minimum', size(machine.settings[least] ?? 0))) changes[least] = bytes($('minimum').value);
    if (isOther('maximum', size(machine.settings[most] ?? machine.size_bytes))) changes[most] = bytes($('maximum').value);
    if (isOther('weight', machine.settings[weight])) {
      if (!/^\s*\d+\s*$/.test($('weight').value)) throw new Error(`"${$('weight').value}" is no weight: use a number`);
      changes[weight] = Number($('weight').value);
    }
    said.className = '';
    said.textContent = Object.keys(changes).length > 0 ? '…' : 'nothing is other than it was';
    if (Object.keys(changes).length > 0) {
      const changed = await ask(of(machine), changes);
      machines = machines.map((one) => one.id === changed.id ? changed : one);
      said.textContent = 'changed, and in force';
    }
    isEdited = false;
    showMachines();
    showSettings(machines.find(({ id }) => id === chosen) ?? machine);
  } catch (error) {
    said.className = 'ill';
    said.textContent = error.message;
  }
}

function theme(next) {
  const now = ['auto', 'light', 'dark'].includes(next) ? next : 'auto';
  if (now === 'auto') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = now;
  $('theme').textContent = `Theme: ${now}`;
  localStorage.setItem('plimsoll-theme', now);
}

/** Arrows go from machine to machine. */
function move(event) {
  const names = [...$('rows').querySelectorAll('.name')];
  const at = names.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: names.length - 1 }[event.key];
  if (at < 0 || to === undefined || !names[to]) return;
  event.preventDefault();
  names[to].focus();
}

$('theme').addEventListener('click', () => {
  const order = { auto: 'light', light: 'dark', dark: 'auto' };
  theme(order[localStorage.getItem('plimsoll-theme') ?? 'auto']);
});
$('rows').addEventListener('keydown', move);
$('settings').addEventListener('submit', change);
$('settings').addEventListener('input', () => { isEdited = true; });
$('legend').replaceChildren(...PLACES.map(([place, title]) => el('li', {}, el('i', { class: place }), title)));
theme(localStorage.getItem('plimsoll-theme') ?? 'auto');

(async () => {
  for (;;) {
    if (!document.hidden) await look();
    await new Promise((resolve) => setTimeout(resolve, PERIOD_MS));
  }
})();
