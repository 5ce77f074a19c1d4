import { createServer, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { afterEach, beforeEach, expect, it } from 'vitest';
import { generate, type Place, type Report } from './generation';

// A real server on a real port; addresses of the page are relative, so they are completed here.
let server: Server;
let answer: (method: string, lastEventId: string | undefined, response: ServerResponse) => void;
const plainFetch = globalThis.fetch;

beforeEach(async () => {
  server = createServer((request, response) => {
    response.writeHead(200, { 'content-type': 'text/event-stream' });
    answer(request.method ?? '', request.headers['last-event-id'] as string | undefined, response);
  });
  await new Promise<void>((ready) => server.listen(0, '127.0.0.1', ready));
  const { port } = server.address() as AddressInfo;
  globalThis.fetch = (path, init) => plainFetch(`http://127.0.0.1:${port}${path as string}`, init);
});

afterEach(() => {
  globalThis.fetch = plainFetch;
  server.closeAllConnections();
  server.close();
});

const frame = (id: number, data: unknown) => `id: ${id}\ndata: ${JSON.stringify(data)}\n\n`;
const word = (text: string) => ({ choices: [{ delta: { content: text } }] });

async function run(): Promise<{ reports: Report[]; places: Place[] }> {
  const reports: Report[] = [];
  const places: Place[] = [];
  for await (const report of generate({}, new AbortController().signal, (p) => places.push(p))) reports.push(report);
  return { reports, places };
}

it('yields waiting, reading, words and the end', async () => {
  answer = (_method, _last, response) => {
    response.write(frame(1, { type: 'started', id: 'gen-1' }));
    response.write(frame(2, { type: 'waiting', place: 2, reason: 'no_gpu' }));
    response.write(frame(3, { type: 'reading', gpu: 'colab' }));
    response.write(frame(4, word('Hi')));
    response.write(frame(5, { choices: [{ delta: {}, finish_reason: 'stop' }] }));
    response.end('id: 6\ndata: [DONE]\n\n');
  };
  const { reports, places } = await run();
  expect(reports.map((r) => r.kind)).toEqual(['started', 'waiting', 'reading', 'text', 'finish']);
  expect(places.at(-1)).toEqual({ id: 'gen-1', lastEventId: '5' });
});

it('picks a cut answer up after its last event, so that no word is lost or said twice', async () => {
  answer = (method, last, response) => {
    if (method === 'POST') {
      response.write(frame(1, { type: 'started', id: 'gen-1' }));
      response.write(frame(2, word('one ')), () => setTimeout(() => response.destroy(), 30));
    } else {
      expect(last).toBe('2');
      response.write(frame(3, word('two')));
      response.end('data: [DONE]\n\n');
    }
  };
  const { reports } = await run();
  expect(reports.flatMap((r) => (r.kind === 'text' ? [r.text] : []))).toEqual(['one ', 'two']);
  expect(reports.some((r) => r.kind === 'reconnecting')).toBe(true);
});

it('throws an error of the stream with its code', async () => {
  answer = (_method, _last, response) => {
    response.write(frame(1, { type: 'started', id: 'gen-1' }));
    response.end(frame(2, { error: { message: 'too long', code: 'context_length_exceeded' } }));
  };
  await expect(run()).rejects.toMatchObject({ code: 'context_length_exceeded', message: 'too long' });
});

it('yields each picture as far as it is', async () => {
  const shown = { b64_json: 'AA==', output_format: 'png', index: 1, seed: 7 };
  answer = (_method, _last, response) => {
    response.write(frame(1, { type: 'started', id: 'gen-1' }));
    response.write(frame(2, { type: 'image_generation.partial_image', ...shown }));
    response.write(frame(3, { type: 'image_generation.completed', ...shown }));
    response.end('id: 4\ndata: [DONE]\n\n');
  };
  const { reports } = await run();
  const src = 'data:image/png;base64,AA==';
  expect(reports.slice(1)).toEqual([
    { kind: 'picture', picture: { index: 1, seed: 7, src, done: false } },
    { kind: 'picture', picture: { index: 1, seed: 7, src, done: true } },
  ]);
});
