/**
 * The conversation of this tab: its turns, and the one answer that may be under way. Survives a reload of the page, and
 * belongs to one user.
 */
import { api, ApiError } from '@/lib/api';
import { useSyncExternalStore } from 'react';
import { wireForm, type Band, type DialValues } from './dials';
import { generate, type Picture, type Place, type Report } from './generation';
import { ownDials, wirePicture, type PictureSettings } from './pictures';
import { wireSampling, type Sampling } from './sampling';
import { forgetSettings } from './settings';

/** How an answer is asked for. Kept beside it, so that it can be read and repeated. */
export interface Ask {
  model: string;
  kind: 'chat' | 'completion' | 'image';
  dials: DialValues;
  bands: readonly Band[];
  sampling: Sampling;
  system: string;
  picture: PictureSettings;
}

export type Phase =
  | { is: 'sending' }
  | { is: 'waiting'; place: number; reason: string }
  | { is: 'reading'; gpu: string }
  | { is: 'writing' }
  | { is: 'reconnecting' }
  | { is: 'done'; reason: string }
  | { is: 'stopped' }
  | { is: 'failed'; error: { message: string; status: number; code: string } };

export interface Turn {
  id: string;
  question: string;
  answer: string;
  pictures?: readonly Picture[]; // each as far as it is
  ask: Ask;
  phase: Phase;
  tokens: number;
  firstWordAt: number | null; // performance of this page's clock, in ms
  lastWordAt: number | null;
  place?: Place; // where the stream can be picked up
}

const STORED = 'fine-conversation';
const SAVE_EVERY_MS = 500;

let { owner, turns } = load();
let running: AbortController | null = null;
let saveTimer: ReturnType<typeof setTimeout> | null = null;
const listeners = new Set<() => void>();

function subscribe(listener: () => void): () => void {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

export const useConversation = (): readonly Turn[] => useSyncExternalStore(subscribe, () => turns);
export const useConversationOwner = (): string | null => useSyncExternalStore(subscribe, () => owner);

export const isOver = (phase: Phase): boolean => phase.is === 'done' || phase.is === 'stopped' || phase.is === 'failed';

export function ask(question: string, how: Ask): void {
  const turn: Turn = {
    id: crypto.randomUUID?.() ?? String(Math.random()),
    question,
    answer: '',
    ask: how,
    phase: { is: 'sending' },
    tokens: 0,
    firstWordAt: null,
    lastWordAt: null,
  };
  const before = turns;
  change([...turns, turn]);
  void follow(turn, body(question, how, before));
}

/** Ask the last question again: other dials, the same words. */
export function retry(how: Ask): void {
  const last = turns.at(-1);
  if (!last) return;
  stop();
  change(turns.slice(0, -1));
  ask(last.question, how);
}

export function stop(): void {
  running?.abort();
}

/** A new conversation. */
export function forgetConversation(): void {
  stop();
  change([]);
  save();
}

/** At sign-out, with how its user had set the screen. */
export function forgetUser(): void {
  forgetConversation();
  forgetSettings();
}

/** Before anything of it is shown: somebody else's is forgotten. */
export function claimConversation(user: string): void {
  if (owner === user) return;
  owner = user;
  forgetUser();
}

/** After a reload: an answer that was under way goes on. */
export function resume(): void {
  const last = turns.at(-1);
  if (last && !isOver(last.phase) && !running) {
    if (last.place) void follow(last, undefined);
    else update(last.id, { phase: { is: 'stopped' } });
  }
}

function body(question: string, how: Ask, before: readonly Turn[]): unknown {
  if (how.kind === 'image') {
    const dials = wireForm(how.dials, how.bands, ownDials(how.picture));
    const asked = { model: how.model, prompt: question, ...wirePicture(how.picture) };
    return { kind: 'image', body: { ...asked, ...(dials ? { dials } : {}) } };
  }
  const dials = wireForm(how.dials, how.bands);
  const shared = {
    model: how.model,
    ...wireSampling(how.sampling),
    stream: true,
    stream_options: { include_usage: true },
    ...(dials ? { dials } : {}),
  };
  if (how.kind === 'completion') return { kind: 'completion', body: { ...shared, prompt: question } };
  const messages = [
    ...(how.system.trim() ? [{ role: 'system', content: how.system.trim() }] : []),
    ...before
      .filter((turn) => turn.answer)
      .flatMap((turn) => [
        { role: 'user', content: turn.question },
        { role: 'assistant', content: turn.answer },
      ]),
    { role: 'user', content: question },
  ];
  return { kind: 'chat', body: { ...shared, messages } };
}

async function follow(turn: Turn, request: unknown): Promise<void> {
  running?.abort();
  const mine = (running = new AbortController());
  const { id } = turn;
  let generation = turn.place?.id;
  try {
    const moved = (place: Place) => update(id, { place });
    for await (const report of generate(request, mine.signal, moved, turn.place)) {
      if (report.kind === 'started') generation = report.id;
      take(id, report);
    }
    const now = turns.find((each) => each.id === id);
    if (now && !isOver(now.phase)) update(id, { phase: { is: 'done', reason: 'stop' } });
  } catch (error) {
    if (mine.signal.aborted) {
      // The relay would keep the answer going for a page that comes back: say that none will.
      if (generation) api.delete(`/api/generations/${generation}`).catch(() => undefined);
      update(id, { phase: { is: 'stopped' } });
    } else {
      const failed = error instanceof ApiError ? error : new ApiError(String(error), 0, 'unknown');
      const gone = generation !== undefined && failed.status === 404;
      const { message, status } = failed;
      update(id, { phase: { is: 'failed', error: { message, status, code: gone ? 'no_longer_there' : failed.code } } });
    }
  } finally {
    if (running === mine) running = null;
    save();
  }
}

function take(id: string, report: Report): void {
  const turn = turns.find((each) => each.id === id);
  if (!turn) return;
  const now = performance.now();
  switch (report.kind) {
    case 'waiting':
      return update(id, { phase: { is: 'waiting', place: report.place, reason: report.reason } });
    case 'reading':
      return update(id, { phase: { is: 'reading', gpu: report.gpu } });
    case 'reconnecting':
      return update(id, { phase: { is: 'reconnecting' } });
    case 'text':
      return update(id, {
        answer: turn.answer + report.text,
        tokens: turn.tokens + 1, // a frame is about a token; the usage at the end is exact
        phase: { is: 'writing' },
        firstWordAt: turn.firstWordAt ?? now,
        lastWordAt: now,
      });
    case 'picture': {
      const others = (turn.pictures ?? []).filter((each) => each.index !== report.picture.index);
      const pictures = [...others, report.picture].sort((a, b) => a.index - b.index);
      return update(id, { pictures, phase: { is: 'writing' } });
    }
    case 'finish':
      return update(id, { phase: { is: 'done', reason: report.reason } });
    case 'usage':
      return update(id, { tokens: report.tokens });
    case 'started':
      return undefined;
  }
}

function update(id: string, fields: Partial<Turn>): void {
  change(turns.map((turn) => (turn.id === id ? { ...turn, ...fields } : turn)));
}

function change(next: readonly Turn[]): void {
  turns = next;
  saveTimer ??= setTimeout(save, SAVE_EVERY_MS);
  for (const listener of listeners) listener();
}

function save(): void {
  if (saveTimer) clearTimeout(saveTimer);
  saveTimer = null;
  // Pictures are large: where they do not all fit, the older ones live as long as the page.
  for (let kept = 0; kept <= turns.length; kept++) {
    const stored = turns.map((turn, at) => (at < kept && turn.pictures ? { ...turn, pictures: [] } : turn));
    try {
      sessionStorage.setItem(STORED, JSON.stringify({ owner, turns: stored }));
      return;
    } catch {
      // Full or forbidden.
    }
  }
}

interface Stored {
  owner: string | null; // a user's id
  turns: readonly Turn[];
}

function load(): Stored {
  try {
    const found = JSON.parse(sessionStorage.getItem(STORED) ?? '{}') as Partial<Stored>;
    const turns = (found.turns ?? []).map((turn) => ({ ...turn, firstWordAt: null, lastWordAt: null }));
    return { owner: found.owner ?? null, turns };
  } catch {
    return { owner: null, turns: [] };
  }
}

if (typeof window !== 'undefined') window.addEventListener('pagehide', save);
