import { describe, expect, it } from 'vitest';
import { readEvents, type ServerEvent } from './sse';

function body(...chunks: Uint8Array[]): ReadableStream<Uint8Array> {
  return new ReadableStream({
    start(controller) {
      for (const chunk of chunks) controller.enqueue(chunk);
      controller.close();
    },
  });
}

async function all(stream: ReadableStream<Uint8Array>): Promise<ServerEvent[]> {
  const events: ServerEvent[] = [];
  for await (const event of readEvents(stream)) events.push(event);
  return events;
}

const bytes = (text: string) => new TextEncoder().encode(text);

describe('readEvents', () => {
  it('reads ids, names and data', async () => {
    const events = await all(body(bytes('id: 3\nevent: job\ndata: {"a":1}\n\ndata: [DONE]\n\n')));
    expect(events.map((e) => [e.id, e.event, e.data])).toEqual([
      ['3', 'job', '{"a":1}'],
      [undefined, undefined, '[DONE]'],
    ]);
  });

  it('gives the same events wherever the bytes are cut, also inside a Korean letter', async () => {
    const whole = bytes('id: 1\ndata: 안녕하세요 🙂\n\nid: 2\ndata: x\n\n');
    for (let cut = 1; cut < whole.length; cut++) {
      const events = await all(body(whole.slice(0, cut), whole.slice(cut)));
      expect(events.map((e) => [e.id, e.data])).toEqual([
        ['1', '안녕하세요 🙂'],
        ['2', 'x'],
      ]);
    }
  });

  it('leaves comments out, and an event that was cut off', async () => {
    expect(await all(body(bytes(': keep-alive\n\ndata: whole\n\ndata: half')))).toHaveLength(1);
  });
});
