/** One generation from request to last word, through cut connections: a cut is picked up again where it broke. */
import { api, ApiError, errorFrom } from '@/lib/api';
import { readEvents } from '@/lib/sse';
import { generationFrame } from '@/types/api';

export type Report =
  | { kind: 'started'; id: string }
  | { kind: 'waiting'; place: number; reason: string }
  | { kind: 'reading'; gpu: string }
  | { kind: 'text'; text: string }
  | { kind: 'finish'; reason: string }
  | { kind: 'usage'; tokens: number }
  | { kind: 'picture'; picture: Picture }
  | { kind: 'reconnecting' };

/** As far as it is. */
export interface Picture {
  index: number; // among those of one request
  seed: number;
  src: string; // a data URL
  done: boolean;
}

export interface Place {
  id: string;
  lastEventId: string;
}

const RESUME_FOR_MS = 30_000; // the relay keeps a stream that nobody reads this long
const PAUSES_MS = [300, 1_000, 2_000, 4_000];

/**
 * Yields what happens, and ends when the answer is whole. `place`: where an earlier page left off.
 * Throws ApiError for an answer that failed, and AbortError when `signal` says so.
 */
export async function* generate(
  request: unknown,
  signal: AbortSignal,
  moved: (place: Place) => void,
  place?: Place,
): AsyncGenerator<Report> {
  let cutAt = 0;
  let failures = 0;
  for (;;) {
    try {
      const body = place
        ? await api.stream(`/api/generations/${place.id}`, undefined, signal, place.lastEventId)
        : await api.stream('/api/generations', request, signal);
      for await (const event of readEvents(body)) {
        failures = cutAt = 0;
        if (event.data === '[DONE]') return;
        for (const report of reports(event.data)) {
          if (report.kind === 'started') place = { id: report.id, lastEventId: '' };
          yield report;
        }
        if (place && event.id) moved((place = { ...place, lastEventId: event.id }));
      }
      if (!place) throw new ApiError('The relay sent nothing.', 0, 'network');
    } catch (error) {
      if (!isCut(error)) throw error;
      if (!place) throw error instanceof ApiError ? error : new ApiError('The relay did not answer.', 0, 'network');
    }
    cutAt ||= Date.now();
    if (Date.now() - cutAt > RESUME_FOR_MS) throw new ApiError('The connection was lost.', 0, 'no_longer_there');
    yield { kind: 'reconnecting' };
    await pause(PAUSES_MS[Math.min(failures++, PAUSES_MS.length - 1)] ?? 1_000, signal);
  }
}

function* reports(data: string): Generator<Report> {
  const parsed = generationFrame.safeParse(JSON.parse(data));
  if (!parsed.success) return; // a frame that a newer server sends and this page does not know
  const frame = parsed.data;
  if ('error' in frame) throw errorFrom(400, frame);
  if ('type' in frame) {
    if (frame.type === 'started') yield { kind: 'started', id: frame.id };
    else if (frame.type === 'waiting') yield { kind: 'waiting', place: frame.place, reason: frame.reason };
    else if (frame.type === 'reading') yield { kind: 'reading', gpu: frame.gpu };
    else {
      const { index, seed } = frame;
      const src = `data:image/${frame.output_format};base64,${frame.b64_json}`;
      yield { kind: 'picture', picture: { index, seed, src, done: frame.type === 'image_generation.completed' } };
    }
    return;
  }
  const choice = frame.choices[0];
  const text = choice?.delta?.content ?? choice?.text ?? '';
  if (text) yield { kind: 'text', text };
  if (choice?.finish_reason) yield { kind: 'finish', reason: choice.finish_reason };
  if (frame.usage) yield { kind: 'usage', tokens: frame.usage.completion_tokens };
}

/** The connection broke; the answer may still be there. */
function isCut(error: unknown): boolean {
  if (error instanceof DOMException && error.name === 'AbortError') return false;
  return error instanceof ApiError ? error.status === 0 && error.code === 'network' : true;
}

function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener('abort', () => {
      clearTimeout(timer);
      reject(new DOMException('aborted', 'AbortError'));
    });
  });
}
